"""The training loop.

Step j is a pure function of the state before it and of (seed, j), so a resumed run ends in the same
bits.
"""

import json
import math
import signal
import sys
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from .._version import __version__
from ..data import (
    AugmentPipe,
    ImageDataset,
    StepBatches,
    derive_seed,
    save_grid,
    step_indices,
    to_float,
)
from ..data.files import append_line, one_line, read_file, sync_file, write_atomic
from ..ema import EMA, PowerFunctionEMA, consistency_decay, copy_decay, edm_decay
from ..ema import target_decay as ramped_decay
from ..families import FAMILIES, default_sampler
from ..losses import Loss
from ..networks.saved import PRECISIONS, NetworkSpec, load, restore
from ..ops._schemas import digest
from ..optim import OPTIMIZERS
from ..samplers import SAMPLERS
from . import checkpoint
from .distributed import (
    Process,
    agree,
    broadcast_,
    data_parallel,
    shard_,
    shard_like,
    sum_,
    whole,
)
from .formats import as_json
from .lock import locked
from .options import Options
from .sampling import NotFinite, preview_levels, sample
from .signals import Stopped, StopRequest, readers
from .state import ADAM, check_adam, check_place, check_step, check_tensors

MAX_STATISTICS = 1 << 30  # bytes of stats.jsonl
IDLE_TICKS = 10  # so many in a row without a step that was taken end a run


class Diverged(RuntimeError):
    """A run in which no step is taken any more; the message says why and what is saved."""


def make_augment_pipe(options: Options) -> AugmentPipe | None:
    """EDM's augmentation, whose 9 labels both networks are told; None where its probability is 0.

    (arXiv 2206.00364, appendix F.2.)
    """
    return (
        AugmentPipe(
            p=options.augment, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1
        )
        if options.augment
        else None
    )


def target_decay(options: Options, loss: Loss, step: int, updates: int | Tensor) -> float | Tensor:
    """Decay of the target network in a step.

    Args:
        options: the run's.
        loss: of the step.
        step: from 0.
        updates: the steps before it, less those that were skipped.
    """
    if FAMILIES[options.family].consistency:
        if options.target_ema_mode == "fixed":
            return options.start_ema
        scales = loss.num_scales  # type: ignore[attr-defined]  # of every such family's loss
        return consistency_decay(options.start_ema, options.start_scales, scales)
    if options.target_copy:
        return copy_decay(options.target_copy, updates)
    return ramped_decay(options.target_ema_tau, step)


def learning_rate(options: Options, nimg: int) -> float:
    """EDM's learning rate after `nimg` images.

    It is a linear ramp, then constant or, with "cosine", falling to 0 over the duration.
    """
    ramp = 1000 * options.lr_rampup_kimg
    lr = options.lr * (min(nimg / ramp, 1) if ramp else 1)
    if options.lr_decay == "cosine":
        lr *= (1 + math.cos(math.pi * min(nimg / (1e6 * options.duration), 1))) / 2
    return lr


def clip_factor(grads: list[Tensor], largest: float) -> Tensor:
    """By what to multiply gradients so that their common norm is at most `largest`, [].

    It is NaN, which skips the step, where the norm is not finite. No host synchronisation.
    """
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.where(norm.isfinite(), largest / norm.clamp(min=largest), torch.nan)


class Trainer:
    """Data, networks, averages and optimizer of a run, and one step of it.

    Args:
        options: the run's.
        process: this process's place; every process of the run makes one Trainer.
        state: the training state to go on from; None starts.

    Raises:
        ValueError: the data, the network or the loss cannot be made as the options say, or the
            state does not fit.
    """

    def __init__(self, options: Options, process: Process, state: Path | None = None):
        self.options, self.process, self.step = options, process, 0
        self.dataset = ImageDataset(options.data, use_labels=options.cond, xflip=options.xflip)
        self.data = self.dataset.fingerprint()
        self._agree()
        self.augment_pipe = make_augment_pipe(options)
        if self.augment_pipe:
            self.augment_pipe.to(process.device)
        self.loss = options.make_loss()
        self.loss.prepare(self.dataset.image_shape)
        spec = self._network_spec()
        self.network = spec.to_json()
        torch.manual_seed(derive_seed(options.seed, "init"))
        self.net: Any = spec.build().to(process.device)  # an FSDPModule too where it is sharded
        if options.transfer and state is None:
            source, _ = checkpoint.load_network(options.transfer)
            restore(self.net, source.state_dict(), Path(options.transfer))
        saved = _Saved(state) if state else None
        if saved:
            restore(self.net, saved.parts["net"], state)
        self.sharded = options.shard and process.world > 1
        # before the copies below, as it gives all processes the first one's weights
        if self.sharded:
            broadcast_(self.net)
        self.online: Any = self.net if self.sharded else data_parallel(self.net, process)
        self.ema = EMA(self.net)
        self.target = EMA(self.net) if options.has_target else None
        if self.target and options.target_precision:
            self.target.module.dtype = PRECISIONS[
                options.target_precision
            ]  # of its activations: the average itself stays float32
        self.averages = [self.ema, self.target] if self.target else [self.ema]
        self.power = PowerFunctionEMA(self.net, options.power_ema) if options.power_ema else None
        if self.power:
            self.averages += self.power.averages.values()
        if saved:
            self._restore_averages(saved)
        if self.sharded:
            for module in (self.net, *(average.module for average in self.averages)):
                shard_(module, process)
        self.optimizer = OPTIMIZERS[options.optim](
            self.net.parameters(),
            lr=options.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=options.weight_decay,
            decays=torch.ones(len(self.averages), dtype=torch.float64, device=process.device),
            averages=[average.module.parameters() for average in self.averages],
        )
        self.sums = torch.zeros(
            4, dtype=torch.float64, device=process.device
        )  # of TDTerms, over the samples since image `counted`
        self.counted = 0
        self.whole = True  # whether all parts are of the same step
        self.idle = 0  # ticks in a row without a step that was taken
        self.warnings = []  # for the first process to tell
        if saved:
            self._restore_rest(saved)
        if process.world > 1 and not self.sharded:
            self._settle_buckets()

    def _agree(self) -> None:
        """Raises ValueError where the processes of the run were not started alike."""
        own = asdict(self.options)
        own |= {name: None for name in ("data", "transfer", "workers")}  # a machine's own
        versions = {"tdkern": __version__, "torch": torch.__version__, "ops": digest()}
        agree(self.process, **own, versions=versions, images=self.data)

    def _settle_buckets(self) -> None:
        """A backward of which nothing is kept.

        DistributedDataParallel puts its buckets in order by its first backward, and with them the
        order in which several processes' numbers are added up. So the first step of a resumed run
        would be in another order than the same step of a run in one go.
        """
        images = torch.zeros(1, *self.dataset.image_shape, dtype=torch.uint8)
        labels = torch.zeros(1, self.dataset.label_dim)
        device = self.process.device
        self._backward(self.loss.at(self.step), images.to(device), labels.to(device), first=0)
        self.optimizer.zero_grad(set_to_none=True)

    def _network_spec(self) -> NetworkSpec:
        options = self.options
        channels, resolution, _ = self.dataset.image_shape
        return FAMILIES[options.family].network(
            self.loss,
            options.arch,
            resolution,
            channels,
            self.dataset.label_dim,
            augment_dim=self.augment_pipe.label_dim if self.augment_pipe else 0,
            cbase=options.cbase,
            cres=options.cres,
            dropout=options.dropout,
            precision=options.precision,
        )

    @property
    def nimg(self) -> int:
        """Images trained on so far."""
        return self.step * self.options.batch

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step on this process's share of the batch.

        Args:
            images: [B, C, H, W] uint8.
            labels: [B, label_dim].
        """
        options, device = self.options, self.process.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.nimg)
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = self.loss.at(self.step)
        # a step that fails halfway has no part in the statistics
        sums = torch.zeros_like(self.sums)
        share = options.batch // self.process.world
        for done in range(0, share, options.batch_gpu):
            part = slice(done, done + options.batch_gpu)
            # the processes exchange gradients during the backward of the last part
            last = part.stop >= share
            with self._exchange(last):
                first = self.process.rank * share + done
                sums += self._backward(loss, images[part], labels[part], first)
        self.optimizer.decays[0] = edm_decay(options.batch, 1e6 * options.ema, self.nimg)
        # on the device, which alone knows of skipped steps
        updates = self.optimizer.state[next(self.net.parameters())].get("step", 0)
        if self.target:
            self.optimizer.decays[1] = target_decay(options, loss, self.step, updates)
        if self.power:
            decays = torch.tensor(self.power.decays(self.step + 1))
            self.optimizer.decays[-len(decays) :] = decays
        grads = [param.grad for param in self.net.parameters() if param.grad is not None]
        self.whole = False
        # nothing, if a gradient's square is not finite: EDM would set NaN to 0 and go on
        self.optimizer.step(clip=clip_factor(grads, options.clip) if options.clip else None)
        for average in self.averages:
            average.copy_buffers(self.net)
        self.sums += sums
        self.step += 1
        if self.power:
            self.power.step = float(self.step)
        self.whole = True

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Within it a backward adds up the processes' gradients, if it is the last of the step."""
        if self.sharded:
            self.net.set_requires_gradient_sync(last)
        if last or self.sharded or self.process.world == 1:
            return nullcontext()
        return self.online.no_sync()

    def _backward(self, loss: Loss, images: Tensor, labels: Tensor, first: int) -> Tensor:
        """Add the gradient of a part of the batch; arguments as `train_step`'s.

        Args:
            first: the index of the part's first sample in the whole batch.

        Returns:
            [4] float64, the sums of the terms over the part.
        """
        options = self.options
        batch = (first, options.batch)
        # All draws take the global generators of the CPU and of CUDA, which this sets both: what a
        # step draws depends on nothing before it, so a resumed run needs no generator's state. A
        # sample's draws belong to its place in the batch: any number of processes makes the same.
        torch.manual_seed(derive_seed(options.seed, "step", self.step))
        x0, augment_labels = self._augmented(to_float(images), *batch)
        pair = loss.part_of(*batch).pair(x0)
        torch.manual_seed(derive_seed(options.seed, "dropout", self.step, first))
        # a loss is a mean over elements; EDM's gradients are of a sum over elements and a mean over
        # the whole batch, and those of several processes are averaged
        scale = x0[0].numel() / (options.batch // self.process.world)
        terms = loss.evaluate(
            self.online,
            self.target and self.target.module,
            pair,
            labels if labels.shape[1] else None,
            augment_labels,
            gradient_scale=scale,
        )
        terms.loss.sum().backward()
        sums = torch.stack([term.detach().double().sum() for term in terms])
        sums[:3] /= scale  # loss, td and base are reported as means over elements
        return sums

    def _augmented(self, x0: Tensor, first: int, samples: int) -> tuple[Tensor, Tensor | None]:
        """A part of a batch after augmentation, and what the networks are told of it."""
        if not self.augment_pipe:
            return x0, None
        draws = self.augment_pipe.draw(x0[:1].expand(samples, *x0.shape[1:]))
        own = slice(first, first + len(x0))
        return self.augment_pipe(x0, {name: draw[..., own] for name, draw in draws.items()})

    def statistics(self) -> dict[str, float]:
        """Means over the samples since the last call, over all processes, and the steps skipped.

        It is the one place that waits for the device.
        """
        sum_(self.sums, self.process)
        loss, td, base, valid = (self.sums / (self.nimg - self.counted)).tolist()
        skipped = self.optimizer.skipped.item()
        steps = (self.nimg - self.counted) // self.options.batch
        self.idle = self.idle + 1 if skipped == steps else 0
        self.sums.zero_()
        self.optimizer.skipped.zero_()
        self.counted = self.nimg
        terms = {"loss": loss}
        if self.options.td:
            terms |= {"td": td, "base": base, "valid": valid}
        if FAMILIES[self.options.family].consistency:
            last = self.loss.at(self.step - 1)
            terms["scales"] = last.scales  # type: ignore[attr-defined]
        return terms | {"skipped": skipped}

    def tensors(self) -> dict[str, Tensor]:
        """All that training goes on from, beside the step."""
        moments = {
            f"{key}.{name}": self.optimizer.state[param][key]
            for name, param in self.net.named_parameters()
            for key in ADAM
        }
        return self._modules_tensors() | moments

    def _modules_tensors(self) -> dict[str, Tensor]:
        modules = {"net": self.net, "ema": self.ema.module}
        if self.target:
            modules["target"] = self.target.module
        if self.power:
            modules["power"] = self.power.profiles
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in modules.items()
            for name, tensor in module.state_dict().items()
        }

    def not_finite(self) -> list[str]:
        """The names of the tensors that are not finite; waits for the device."""
        own = {
            name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self.tensors().items()
        }
        bad = torch.stack([~tensor.isfinite().all() for tensor in own.values()]).int()
        if self.sharded:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        return [name for name, is_bad in zip(own, bad.tolist(), strict=True) if is_bad]

    def _restore_averages(self, saved: "_Saved") -> None:
        """Of a training state; the network has its part already."""
        restore(self.ema.module, saved.parts["ema"], saved.path)
        if self.target:
            restore(self.target.module, saved.parts["target"], saved.path)
        if self.power:
            restore(self.power.profiles, saved.parts["power"], saved.path)
            self.power.step = float(saved.meta["step"])
        check_tensors(self._modules_tensors(), saved.tensors, saved.path)

    def _restore_rest(self, saved: "_Saved") -> None:
        """The optimizer, the place in the run, and what is told of a tick that was not over."""
        meta, parts, path = saved.meta, saved.parts, saved.path
        named = list(self.net.named_parameters())
        check_adam({key: parts[key] for key in ADAM}, dict(named), meta["step"], path)
        state = {}
        for i, (name, param) in enumerate(named):
            state[i] = {key: shard_like(parts[key][name], param) for key in ADAM if key != "step"}
            state[i]["step"] = parts["step"][name]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        check_place(meta, self.options.batch, path)
        self.step = meta["step"]
        self.counted = self.nimg
        if "statistics" in meta:  # of a tick that was not over
            self._restore_statistics(meta["statistics"], path)
        if meta.get("data", self.data) != self.data:
            self.warnings.append(
                f"{self.options.data}: these are not the images and labels that the run was "
                "trained on so far"
            )

    def _restore_statistics(self, saved: dict, path: Path) -> None:
        try:
            self.counted, sums, skipped = saved["counted"], saved["sums"], saved["skipped"]
            if len(sums) != self.process.world:  # of a run in another number of processes
                total = torch.tensor(sums, dtype=torch.float64).sum(0)
                sums = [total.tolist(), *[[0.0] * 4] * (self.process.world - 1)]
            self.sums.copy_(torch.tensor(sums[self.process.rank], dtype=torch.float64))
            self.optimizer.skipped.fill_(skipped)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.CheckpointError(f"{path}: damaged statistics ({error})") from error

    def unfinished_statistics(self) -> dict:
        """Of the samples since image `counted`, for `_restore` to go on from; asks all
        processes.
        """
        sums = [torch.zeros_like(self.sums) for _ in range(self.process.world)]
        if self.process.world > 1:
            dist.all_gather(sums, self.sums)
        else:
            sums = [self.sums]
        skipped = self.optimizer.skipped.item()
        numbers = [part.tolist() for part in sums]
        return {"counted": self.counted, "sums": numbers, "skipped": skipped}


class _Saved:
    """A training state as it was read, its tensors by the part of the run that they are of."""

    def __init__(self, path: Path):
        self.path = path
        self.meta, self.tensors = checkpoint.read(path, checkpoint.STATE)
        check_step(self.meta, path)
        self.parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            prefix, _, rest = name.partition(".")
            self.parts[prefix][rest] = tensor


def crossed(trainer: Trainer, ticks: int) -> bool:
    """Whether the last step went past a multiple of so many ticks: the same in a resumed run."""
    return trainer.step == trainer.options.total_steps or passed(
        trainer.options, trainer.nimg, ticks
    )


def passed(options: Options, nimg: int, ticks: int) -> bool:
    """Whether the step to `nimg` images went past a multiple of so many ticks; 0 never."""
    every = max(round(1000 * options.tick), 1) * ticks
    return every > 0 and nimg // every > (nimg - options.batch) // every


def train(trainer: Trainer, run_dir: Path | None) -> None:
    """Train to the end of the options' duration, saving on the way.

    Whatever ends it before, the state is saved first where it can be.

    Args:
        trainer: new, or going on from a training state.
        run_dir: where the first process writes; the others need none.

    Raises:
        Stopped: a signal or the time limit ended it; the state is saved.
        Diverged: no step is taken any more; the state of before is saved.
        LockedError: another process trains in this directory.
        ValueError, OSError, RuntimeError: data cannot be read, files cannot be written, memory or
            another process is lost.
    """
    with StopRequest(trainer.options.time_limit, trainer.process.world) as request:
        if trainer.process.rank > 0:
            _run(trainer, None, request)
            return
        with locked(run_dir) as held:
            record = Record(trainer, run_dir)
            if not held:
                record.warn(f"{run_dir}: this file system has no locks; start no second run in it")
            try:
                _run(trainer, record, request)
            except (Stopped, Diverged):
                raise
            except Exception:  # torchrun, which ends all at an error of one, lets this be saved
                record.rescue()
                raise


def _run(trainer: Trainer, record: "Record | None", request: StopRequest) -> None:
    """The steps of a run; the first process has a record."""
    options, process = trainer.options, trainer.process
    place = (trainer.step, options.total_steps, process.rank, process.world)
    order = StepBatches(len(trainer.dataset), options.batch, options.seed, *place)
    loader = torch.utils.data.DataLoader(
        trainer.dataset,
        batch_sampler=order,
        pin_memory=process.device.type == "cuda",
        **readers(options.workers),
    )
    with progress(trainer) as bar:
        for images, labels in loader:
            trainer.train_step(images, labels)
            bar.update(options.batch)
            if crossed(trainer, 1):
                _tick(trainer, record, bar)
            signum = request.asked()
            if signum and trainer.step < options.total_steps:
                _stop(trainer, record, request, signum)


def progress(trainer: Trainer) -> tqdm:
    """The bar on the first process' terminal; in a file each of its states is a line."""
    hidden = trainer.process.rank > 0 or sys.stderr is None
    return tqdm(
        total=trainer.options.total_steps * trainer.options.batch,
        initial=trainer.nimg,
        unit="img",
        unit_scale=True,
        mininterval=0.1 if not hidden and sys.stderr.isatty() else 30,  # seconds between two states
        disable=hidden,
    )


def _tick(trainer: Trainer, record: "Record | None", bar: tqdm) -> None:
    """Tell how training goes, and save what is due; all processes raise Diverged together."""
    options = trainer.options
    statistics = trainer.statistics()
    if record:
        bar.set_postfix({name: f"{value:.4g}" for name, value in statistics.items()}, refresh=False)
        record.tick(statistics)
        if trainer.idle:
            record.warn(
                "no step was taken since image "
                f"{trainer.nimg - options.batch * int(statistics['skipped'])}: "
                "all had gradients that are not finite"
            )
    if trainer.idle >= IDLE_TICKS:
        raise Diverged(_diagnosis(trainer, statistics, record))
    # A state of the first such tick has the weights of before it; later ones would only replace it.
    due = trainer.idle == 1 or (crossed(trainer, options.dump) and not trainer.idle)
    if due and trainer.not_finite():
        raise Diverged(_diagnosis(trainer, statistics, record))
    snap = crossed(trainer, options.snap) and trainer.idle < 2
    weights = whole(trainer.ema.module.state_dict(), trainer.process) if snap else {}
    power = whole(trainer.power.state_dict(), trainer.process) if snap and trainer.power else {}
    tensors = whole(trainer.tensors(), trainer.process) if due else {}
    if record:
        if snap:
            record.snapshot(weights)
            if power:
                record.averages(power)
        if due:
            record.state(tensors)
        record.time = time.monotonic()  # what was saved is no part of the next tick


def _diagnosis(trainer: Trainer, statistics: dict[str, float], record: "Record | None") -> str:
    """Why no step is taken any more."""
    bad = trainer.not_finite()
    what = (
        f"{bad[0]} and {len(bad) - 1} more tensors are not finite"
        if bad
        else "the weights are finite"
    )
    lr = learning_rate(trainer.options, trainer.nimg)
    way = f"; {checkpoint.way_on(record.run_dir)}" if record else ""
    return (
        f"training has diverged at image {trainer.nimg}: gradients are not finite, {what}, the "
        "loss is "
        f"{statistics['loss']:.4g}, the learning rate {lr:.4g}, precision "
        f"{trainer.options.precision}; "
        f"a new run needs a lower --lr, or --transfer from a snapshot of before{way}"
    )


def _stop(trainer: Trainer, record: "Record | None", request: StopRequest, signum: int) -> None:
    """Save the state between two ticks and raise Stopped, in all processes."""
    statistics = trainer.unfinished_statistics()
    tensors = whole(trainer.tensors(), trainer.process)
    message = f"stopped by {signal.Signals(signum).name} at image {trainer.nimg}"
    if record:
        record.state(tensors, statistics)
        record.log(message)
        message += f": {checkpoint.way_on(record.run_dir)}"
    request.meet()
    raise Stopped(signum, message)


class Record:
    """What the first process writes into the run directory."""

    def __init__(self, trainer: Trainer, run_dir: Path):
        self.trainer, self.run_dir = trainer, run_dir
        self.time, self.nimg, self.saved = time.monotonic(), trainer.nimg, trainer.step
        checkpoint.clean(run_dir)
        aside = checkpoint.set_aside(run_dir, trainer.nimg)
        self._write_options()
        self._drop_later_statistics()
        for warning in trainer.warnings:
            self.warn(warning)
        if aside:
            self.warn(
                f"later than image {trainer.nimg}, so set aside in {run_dir}: {', '.join(aside)}"
            )
        self._keep_newest()  # a kill may have come between writing one and removing its elder
        self.side = (
            8 if trainer.process.device.type == "cuda" else 4
        )  # a grid of 64 would hold a CPU for minutes
        chosen = step_indices(len(trainer.dataset), self.side**2, trainer.options.seed, 0).tolist()
        images, labels = zip(*(trainer.dataset[i] for i in chosen), strict=True)
        self.labels = torch.stack(labels)
        save_grid(run_dir / "reals.png", torch.stack(images), self.side)

    def _write_options(self) -> None:
        text = json.dumps(as_json(self.trainer.options), indent=2)
        write_atomic(self.run_dir / "training_options.json", text.encode())

    def tick(self, statistics: dict[str, float]) -> None:
        """Add a line to stats.jsonl and to log.txt."""
        trainer, now = self.trainer, time.monotonic()
        seconds, images = now - self.time, trainer.nimg - self.nimg
        self.time, self.nimg = now, trainer.nimg
        statistics = {
            name: value if math.isfinite(value) else None for name, value in statistics.items()
        }  # JSON knows no NaN
        line = {
            "kimg": trainer.nimg / 1000,
            **statistics,
            "lr": learning_rate(trainer.options, trainer.nimg),
            "images_per_s": images / seconds,
            "time": time.time(),
        }
        if trainer.process.device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        append_line(self.run_dir / "stats.jsonl", json.dumps(line))
        self.log(
            "  ".join(
                f"{name} {'none' if value is None else format(value, '.5g')}"
                for name, value in line.items()
                if name != "time"
            )
        )

    def log(self, text: str) -> None:
        """Add a line to log.txt."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {one_line(text)}"
        append_line(self.run_dir / "log.txt", line)

    def warn(self, text: str) -> None:
        """Tell the user something that does not end the run."""
        self.log(f"Warning: {text}")
        if sys.stderr is not None:
            tqdm.write(f"Warning: {one_line(text)}", file=sys.stderr)

    def snapshot(self, weights: dict[str, Tensor]) -> None:
        """Save the EMA network, and a grid of its images where that can be made.

        weights: the network's state dict.
        """
        trainer = self.trainer
        checkpoint.write(self.run_dir, checkpoint.SNAPSHOT, trainer.nimg, weights, self._meta())
        grid = self.run_dir / f"fakes-{checkpoint.kimg(trainer.nimg)}.png"
        try:
            save_grid(grid, self._images(weights), self.side)
        except (OSError, NotFinite) as error:
            self.warn(f"{grid.name} is not written: {error}")
        else:
            checkpoint.forget_same(grid)

    def averages(self, tensors: dict[str, Tensor]) -> None:
        """Save the averages of --power-ema; tensors: their state dict."""
        nimg = self.trainer.nimg
        checkpoint.write(self.run_dir, checkpoint.AVERAGES, nimg, tensors, self._meta())

    def _images(self, weights: dict[str, Tensor]) -> Tensor:
        """The EMA network's images of the seeds from 0."""
        net, dataset = self.trainer.ema.module, self.trainer.dataset
        if self.trainer.sharded:  # the other processes do not sample with this one
            net = load(self.trainer.network, weights, self.run_dir).to(self.trainer.process.device)
        choice: dict[str, Any] = {"classes": dataset.classes}
        if dataset.classes == []:  # labels are no classes that could be drawn
            choice = {"labels": self.labels}
        parts = []
        for seeds in torch.arange(self.side**2).split(self.trainer.options.batch_gpu):
            given = {
                name: value[seeds] if name == "labels" else value for name, value in choice.items()
            }
            sampler = SAMPLERS[default_sampler(net)].sample
            parts.append(
                sample(
                    net,
                    self.trainer.network,
                    seeds.tolist(),
                    preview_levels(net),
                    sampler=sampler,
                    **given,
                )
            )
        return torch.cat(parts)

    def state(self, tensors: dict[str, Tensor], statistics: dict | None = None) -> None:
        """Save the training state and, once that is durable, remove the older ones.

        tensors: `Trainer.tensors()`, whole.
        statistics: of a tick that is not over, from `Trainer.unfinished_statistics`.
        """
        trainer = self.trainer
        meta = self._meta() | {"data": trainer.data}
        if statistics and statistics["counted"] < trainer.nimg:
            meta["statistics"] = statistics
        for name in (
            "stats.jsonl",
            "log.txt",
        ):  # what was recorded up to here survives a power cut too
            if (self.run_dir / name).exists():
                sync_file(self.run_dir / name)
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
            statistics = trainer.unfinished_statistics() if alone else None
            self.state(trainer.tensors(), statistics)
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
        path = self.run_dir / "stats.jsonl"
        if not path.exists():
            return
        kept, last = [], -1.0
        for line in read_file(path, MAX_STATISTICS).decode(errors="replace").split("\n")[:-1]:
            kimg = _kimg_of(line)
            if kimg is not None and last < kimg <= self.trainer.nimg / 1000:
                kept.append(line + "\n")
                last = kimg
        write_atomic(path, "".join(kept).encode())


def _kimg_of(line: str) -> float | None:
    """The kimg of a line of stats.jsonl; None if it is not one."""
    try:
        kimg = json.loads(line)["kimg"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return kimg if type(kimg) in (int, float) else None
