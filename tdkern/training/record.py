"""What a run leaves in its directory: statistics, states, snapshots and grids of images."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import save_grid, step_indices
from ..data.files import append_line, brief, one_line, sync_file, write_atomic
from ..families import default_sampler
from ..networks.saved import load
from ..samplers import SAMPLERS
from . import best, checkpoint, statistics
from .curves import draw_curves
from .formats import as_json
from .sampling import NotFinite, preview_levels, sample
from .statistics import Fid
from .trackers import trackers
from .trainer import Trainer, learning_rate, passed


class Record:
    """What the first process writes into the run directory."""

    def __init__(self, trainer: Trainer, run_dir: Path):
        self.trainer, self.run_dir = trainer, run_dir
        self.time = time.monotonic()
        self.nimg = trainer.nimg
        self.saved = trainer.step
        checkpoint.clean(run_dir)
        aside = checkpoint.set_aside(run_dir, trainer.nimg)
        aside += best.set_aside(run_dir, trainer.nimg)
        self._write_options()
        self._drop_later_statistics()
        for warning in trainer.warnings:
            self.warn(warning)
        if aside:
            self.warn(
                f"later than image {trainer.nimg}, so set aside in {run_dir}: {', '.join(aside)}"
            )
        self._keep_newest()  # a kill may have come between writing one and removing its elder
        # a grid of 64 would hold a CPU for minutes
        self.side = 8 if trainer.process.device.type == "cuda" else 4
        chosen = step_indices(len(trainer.dataset), self.side**2, trainer.options.seed, 0).tolist()
        images, labels = zip(*(trainer.dataset[i] for i in chosen), strict=True)
        self.labels = torch.stack(labels)
        save_grid(run_dir / "reals.png", torch.stack(images), self.side)
        self.trackers = trackers(trainer.options, run_dir, trainer.nimg)

    def _write_options(self) -> None:
        text = json.dumps(as_json(self.trainer.options), indent=2)
        write_atomic(self.run_dir / "training_options.json", text.encode())

    def tick(self, terms: dict[str, float]) -> None:
        """Add a line to stats.jsonl and to log.txt.

        terms: from `Trainer.statistics`.
        """
        trainer, now = self.trainer, time.monotonic()
        images_per_s = (trainer.nimg - self.nimg) / (now - self.time)
        self.time, self.nimg = now, trainer.nimg
        options = trainer.options
        left = options.total_steps * options.batch - trainer.nimg
        line = {
            "kimg": trainer.nimg / 1000,
            # JSON knows no NaN
            **{name: value if math.isfinite(value) else None for name, value in terms.items()},
            "lr": learning_rate(options, trainer.nimg),
            "images_per_s": images_per_s,
            "seconds_left": left / images_per_s if images_per_s else None,
            **statistics.memory(trainer.process.device),
            "time": time.time(),
        }
        append_line(self.run_dir / statistics.FILE, json.dumps(line))
        numbers = {name: value for name, value in line.items() if value is not None}
        self._track("tick", trainer.nimg, numbers)
        self.log(
            "  ".join(
                f"{name} {'none' if value is None else format(value, '.5g')}"
                for name, value in line.items()
                if name != "time"
            )
        )

    def _track(self, call: str, *args) -> None:
        """Call a method of every tracker; one that fails is left out from here on."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, call)(*args)
            except Exception as error:  # whatever it is: it is not worth the run
                self.trackers.remove(tracker)
                self.warn(f"{tracker.name} gets no more numbers: {brief(error)}")

    def close(self) -> None:
        """Nothing more is recorded."""
        self._track("close")

    def log(self, text: str) -> None:
        """Add a line to log.txt."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {one_line(text)}"
        append_line(self.run_dir / "log.txt", line)

    def warn(self, text: str) -> None:
        """Tell the user something that does not end the run."""
        self.tell(f"Warning: {text}")

    def tell(self, text: str) -> None:
        """Add a line to log.txt, and print it."""
        self.log(text)
        if sys.stderr is not None:
            tqdm.write(one_line(text), file=sys.stderr)

    def snapshot(self, weights: dict[str, Tensor]) -> None:
        """Save the EMA network and, where they can be made, a grid of its images and the curves.

        weights: the network's state dict.
        """
        trainer = self.trainer
        checkpoint.write(self.run_dir, checkpoint.SNAPSHOT, trainer.nimg, weights, self._meta())
        self._picture("fakes", lambda path: save_grid(path, self._images(weights), self.side))
        self._picture("curves", self._draw_curves)

    def _picture(self, kind: str, make: Callable[[Path], None]) -> None:
        """Write a picture; one that cannot be made is a warning."""
        path = self.run_dir / f"{kind}-{checkpoint.kimg(self.trainer.nimg)}.png"
        try:
            make(path)
        except (OSError, ImportError, NotFinite) as error:
            self.warn(f"{path.name} is not written: {error}")
        else:
            checkpoint.forget_same(path)

    def _draw_curves(self, path: Path) -> None:
        lines = statistics.read_lines(self.run_dir / statistics.FILE)
        write_atomic(path, draw_curves(self.trainer.levels, statistics.ticks_of(lines)))

    def averages(self, tensors: dict[str, Tensor]) -> None:
        """Save the averages of --power-ema; tensors: their state dict."""
        nimg = self.trainer.nimg
        checkpoint.write(self.run_dir, checkpoint.AVERAGES, nimg, tensors, self._meta())

    def _images(self, weights: dict[str, Tensor]) -> Tensor:
        """The EMA network's images of the seeds from 0."""
        net, dataset = self.trainer.ema.module, self.trainer.dataset
        if self.trainer.sharded:  # the other processes do not sample with this one
            net = load(self.trainer.network, weights, self.run_dir).eval()
            net.to(self.trainer.process.device)
        choice: dict[str, Any] = {"classes": dataset.classes}
        if dataset.classes == []:  # labels are no classes that could be drawn
            choice = {"labels": self.labels}
        sampler, levels = SAMPLERS[default_sampler(net)].sample, preview_levels(net)
        parts = []
        for seeds in torch.arange(self.side**2).split(self.trainer.options.batch_gpu):
            given = {
                name: value[seeds] if name == "labels" else value for name, value in choice.items()
            }
            network = self.trainer.network
            parts.append(sample(net, network, seeds.tolist(), levels, sampler=sampler, **given))
        return torch.cat(parts)

    def unmeasured(self) -> list[int]:
        """The numbers of steps at which this image's FID is to be measured yet."""
        trainer, meter = self.trainer, self.trainer.meter
        lines = statistics.read_lines(self.run_dir / statistics.FILE)
        wanted = {meter.kind(steps): steps for steps in trainer.options.fid_steps}
        for kimg, fid in statistics.fids_of(lines):
            if kimg == trainer.nimg / 1000:
                wanted.pop(fid.kind, None)
        return list(wanted.values())

    def fid(self, fid: Fid, weights: dict[str, Tensor]) -> None:
        """Add a line to stats.jsonl and to log.txt, and keep the snapshot if it is the best.

        Args:
            fid: the averaged network's.
            weights: the network's state dict.
        """
        trainer = self.trainer
        line = {"kimg": trainer.nimg / 1000, **fid.to_json(), "time": time.time()}
        append_line(self.run_dir / statistics.FILE, json.dumps(line))
        if not math.isfinite(fid.value):
            self.warn(f"{fid.name} is not known at image {trainer.nimg}: images are not finite")
            return
        self._track("tick", trainer.nimg, {f"{fid.metric}/{fid.steps}": fid.value})
        network, classes = trainer.network, trainer.dataset.classes
        is_best = best.keep(self.run_dir, fid, trainer.nimg, network, weights, classes)
        found = f"{fid.value:.4f} at image {trainer.nimg}, of {fid.num} images, {fid.nfe} NFE"
        self.tell(f"{fid.name}: {found}{', the lowest so far' if is_best else ''}")

    def last_fids(self) -> None:
        """Tell the means over the run's last FIDs."""
        fids = statistics.fids_of(statistics.read_lines(self.run_dir / statistics.FILE))
        for curve in statistics.curves_of(fids):
            mean = curve.last_mean
            if math.isfinite(mean):
                self.tell(f"{curve.fid.name}: {mean:.4f} is the mean over the run's last 15 %")

    def state(self, tensors: dict[str, Tensor], unfinished: dict | None = None) -> None:
        """Save the training state and, once that is durable, remove the older ones.

        tensors: `Trainer.tensors()`, whole.
        unfinished: the statistics of a tick that is not over, from `Trainer.unfinished_statistics`.
        """
        trainer = self.trainer
        meta = self._meta() | {"data": trainer.data}
        if unfinished and unfinished["counted"] < trainer.nimg:
            meta["statistics"] = unfinished
        # what was recorded up to here survives a power cut too
        for name in (statistics.FILE, "log.txt"):
            if (self.run_dir / name).exists():
                sync_file(self.run_dir / name)
        self._track("sync")
        checkpoint.write(self.run_dir, checkpoint.STATE, trainer.nimg, tensors, meta)
        self.saved = trainer.step
        self._keep_newest()

    def rescue(self) -> None:
        """Save the state before an error ends the run, where that can be done."""
        trainer = self.trainer
        if not trainer.whole or trainer.step == self.saved or trainer.idle or trainer.sharded:
            return
        try:
            if trainer.not_finite():
                return
            if not self.run_dir.exists():
                self.run_dir.mkdir(parents=True)
                self._write_options()
            alone = trainer.process.world == 1  # the other processes may not answer any more
            unfinished = trainer.unfinished_statistics() if alone else None
            self.state(trainer.tensors(), unfinished)
        except Exception as error:
            print(f"Warning: the state could not be saved: {one_line(error)}", file=sys.stderr)

    def _keep_newest(self) -> None:
        options = self.trainer.options

        def kept(nimg: int) -> bool:
            return passed(options, nimg, options.dump * options.keep_every)

        checkpoint.keep_newest(self.run_dir, checkpoint.STATE, options.keep, kept)

    def _meta(self) -> dict:
        trainer = self.trainer
        return {
            "step": trainer.step,
            "network": trainer.network,
            "classes": trainer.dataset.classes,
            "options": asdict(trainer.options),
        }

    def _drop_later_statistics(self) -> None:
        """Keep of stats.jsonl what was written up to where training goes on: the rest comes again.

        A line that is torn or another's is left out.
        """
        path = self.run_dir / statistics.FILE
        if path.exists():
            kept = statistics.read_lines(path, until=self.trainer.nimg / 1000)
            write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
