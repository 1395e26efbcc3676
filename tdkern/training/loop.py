"""The training loop.

Step j is a pure function of the state before it and of (seed, j), so a resumed run ends in the same
bits.
"""
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import AugmentPipe, ImageDataset, StepBatches, derive_seed, save_grid, step_indices, to_float
from ..data.files import write_atomic
from ..ema import EMA, consistency_decay, copy_decay, edm_decay
from ..ema import target_decay as ramped_decay
from ..families import FAMILIES, default_sampler
from ..losses import Loss
from ..networks.saved import PRECISIONS, NetworkSpec, restore
from ..optim import AdamEMA
from ..samplers import SAMPLERS
from . import checkpoint
from .distributed import Process, broadcast_, sum_
from .formats import as_json
from .options import Options
from .sampling import preview_levels, sample

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps for each parameter


def make_augment_pipe(options: Options) -> AugmentPipe | None:
    """EDM's augmentation, whose 9 labels both networks are told; None where its probability is 0.

    (arXiv 2206.00364, appendix F.2.)
    """
    return AugmentPipe(p=options.augment, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1) if options.augment else None


def target_decay(
    options: Options, loss: Loss, step: int, updates: int | Tensor
) -> float | Tensor:
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
        return consistency_decay(options.start_ema, options.start_scales, loss.num_scales)
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
        self.augment_pipe = make_augment_pipe(options)
        if self.augment_pipe:
            self.augment_pipe.to(process.device)
        self.loss = options.make_loss()
        self.loss.prepare(self.dataset.image_shape)
        spec = self._network_spec()
        self.network = spec.to_json()
        torch.manual_seed(derive_seed(options.seed, "init"))
        self.net = spec.build().to(process.device)
        if options.transfer and state is None:
            source, _ = checkpoint.load_network(options.transfer)
            restore(self.net, source.state_dict(), Path(options.transfer))
        if process.world > 1:
            broadcast_(self.net)  # before the copies below, which must start equal in all processes
        self.ema = EMA(self.net)
        self.target = EMA(self.net) if options.has_target else None
        if self.target and options.target_precision:
            self.target.module.dtype = PRECISIONS[options.target_precision]  # of its activations: the average itself stays float32
        self.averages = [self.ema, self.target] if self.target else [self.ema]
        self.optimizer = AdamEMA(self.net.parameters(), lr=options.lr, betas=(0.9, 0.999), eps=1e-8,
                                 decays=torch.ones(len(self.averages), dtype=torch.float64, device=process.device),
                                 averages=[average.module.parameters() for average in self.averages])
        self.sums = torch.zeros(4, dtype=torch.float64, device=process.device)  # of TDTerms, over the samples since image `counted`
        self.counted = 0
        if state is not None:
            self._restore(state)

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
        # The loss's draws and dropout all take the global generators of the CPU and of CUDA, which
        # this sets both: what a step draws depends on nothing before it, so a resumed run needs no
        # generator's state. Each process draws its own noise.
        torch.manual_seed(derive_seed(options.seed, "step", self.step, self.process.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.nimg)
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = self.loss.at(self.step)
        size = options.batch_gpu
        for part in zip(images.split(size), labels.split(size), strict=True):
            self._backward(loss, *part)
        if self.process.world > 1:
            sum_([param.grad for param in self.net.parameters() if param.grad is not None])
        self.optimizer.decays[0] = edm_decay(options.batch, 1e6 * options.ema, self.nimg)
        # on the device, which alone knows of skipped steps
        updates = self.optimizer.state[next(self.net.parameters())].get("step", 0)
        # empty where there is no target network
        self.optimizer.decays[1:] = target_decay(options, loss, self.step, updates)
        # nothing, if a gradient is not finite: EDM would set its elements to 0 and go on
        self.optimizer.step()
        for average in self.averages:
            average.copy_buffers(self.net)
        self.step += 1

    def _backward(self, loss: Loss, images: Tensor, labels: Tensor) -> None:
        """Add the gradient and the terms of a part of the batch; arguments as `train_step`'s."""
        x0, augment_labels = to_float(images), None
        if self.augment_pipe:
            x0, augment_labels = self.augment_pipe(x0)
        # a loss is a mean over elements; EDM's gradients are of a sum over elements and a mean over
        # the whole batch
        scale = x0[0].numel() / self.options.batch
        terms = loss.evaluate(
            self.net,
            self.target and self.target.module,
            loss.pair(x0),
            labels if labels.shape[1] else None,
            augment_labels,
            gradient_scale=scale,
        )
        terms.loss.sum().backward()
        sums = torch.stack([term.detach().double().sum() for term in terms])
        sums[:3] /= scale  # loss, td and base are reported as means over elements
        self.sums += sums

    def statistics(self) -> dict[str, float]:
        """Means over the samples since the last call, over all processes, and the steps skipped.

        It is the one place that waits for the device.
        """
        if self.process.world > 1:
            sum_([self.sums])
        loss, td, base, valid = (self.sums / (self.nimg - self.counted)).tolist()
        skipped = self.optimizer.skipped.item()
        self.sums.zero_()
        self.optimizer.skipped.zero_()
        self.counted = self.nimg
        terms = {"loss": loss}
        if self.options.td:
            terms |= {"td": td, "base": base, "valid": valid}
        if FAMILIES[self.options.family].consistency:
            terms["scales"] = self.loss.at(self.step - 1).num_scales
        return terms | {"skipped": skipped}

    def tensors(self) -> dict[str, Tensor]:
        """All that training goes on from, beside the step."""
        modules = {"net": self.net, "ema": self.ema.module} | ({"target": self.target.module} if self.target else {})
        tensors = {f"{prefix}.{name}": tensor for prefix, module in modules.items() for name, tensor in module.state_dict().items()}
        moments = {f"{key}.{name}": self.optimizer.state[param][key] for name, param in self.net.named_parameters() for key in ADAM}
        return tensors | moments

    def _restore(self, path: Path) -> None:
        meta, tensors = checkpoint.read(path, checkpoint.STATE)
        parts = defaultdict(dict)
        for name, tensor in tensors.items():
            prefix, _, rest = name.partition(".")
            parts[prefix][rest] = tensor
        restore(self.net, parts["net"], path)
        restore(self.ema.module, parts["ema"], path)
        if self.target:
            restore(self.target.module, parts["target"], path)
        try:
            state = {i: {key: parts[key][name] for key in ADAM} for i, (name, _) in enumerate(self.net.named_parameters())}
        except KeyError as error:
            raise checkpoint.CheckpointError(f"{path}: damaged: Adam's state of {error} is not there; give another {checkpoint.STATE}") from error
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = meta["step"]
        self.counted = self.nimg


def train(trainer: Trainer, run_dir: Path | None) -> None:
    """Train to the end of the options' duration, saving on the way.

    Args:
        trainer: new, or going on from a training state.
        run_dir: where the first process writes; the others need none.
    """
    options, process = trainer.options, trainer.process
    main = process.rank == 0
    record = Record(trainer, run_dir) if main else None
    order = StepBatches(len(trainer.dataset), options.batch, options.seed, trainer.step, options.total_steps, process.rank, process.world)
    loader = torch.utils.data.DataLoader(trainer.dataset, batch_sampler=order, num_workers=options.workers, pin_memory=process.device.type == "cuda")

    def crossed(ticks: int) -> bool:  # whether the last step went past a multiple of so many ticks: the same in a resumed run
        every = max(round(1000 * options.tick), 1) * ticks
        return trainer.step == options.total_steps or (every > 0 and trainer.nimg // every > (trainer.nimg - options.batch) // every)

    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two states of the bar; in a file each is a line
    with tqdm(total=options.total_steps * options.batch, initial=trainer.nimg, unit="img", unit_scale=True, mininterval=pause, disable=not main) as bar:
        for images, labels in loader:
            trainer.train_step(images, labels)
            bar.update(options.batch)
            if not crossed(1):
                continue
            statistics = trainer.statistics()
            if main:
                bar.set_postfix({name: f"{value:.4g}" for name, value in statistics.items()}, refresh=False)
                record.tick(statistics)
                if crossed(options.snap):
                    record.snapshot()
                if crossed(options.dump):
                    record.state()


class Record:
    """What the first process writes into the run directory."""

    def __init__(self, trainer: Trainer, run_dir: Path):
        self.trainer, self.run_dir = trainer, run_dir
        self.time, self.nimg = time.monotonic(), trainer.nimg
        checkpoint.clean(run_dir)
        checkpoint.keep_newest(run_dir, checkpoint.STATE)  # a kill may have come between writing one and removing its elder
        options = json.dumps(as_json(trainer.options), indent=2)
        write_atomic(run_dir / "training_options.json", options.encode())
        self._drop_later_statistics()
        self.side = 8 if trainer.process.device.type == "cuda" else 4  # a grid of 64 would hold a CPU for minutes
        chosen = step_indices(len(trainer.dataset), self.side**2, trainer.options.seed, 0).tolist()
        save_grid(run_dir / "reals.png", torch.stack([trainer.dataset[i][0] for i in chosen]), self.side)

    def tick(self, statistics: dict[str, float]) -> None:
        """Add a line to stats.jsonl and to log.txt."""
        trainer, now = self.trainer, time.monotonic()
        seconds, images = now - self.time, trainer.nimg - self.nimg
        self.time, self.nimg = now, trainer.nimg
        statistics = {name: value if math.isfinite(value) else None for name, value in statistics.items()}  # JSON knows no NaN
        line = {"kimg": trainer.nimg / 1000, **statistics, "lr": learning_rate(trainer.options, trainer.nimg),
                "images_per_s": images / seconds, "time": time.time()}
        if trainer.process.device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._append("stats.jsonl", json.dumps(line))
        self.log("  ".join(f"{name} {'none' if value is None else format(value, '.5g')}" for name, value in line.items() if name != "time"))

    def log(self, text: str) -> None:
        """Add a line to log.txt."""
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def snapshot(self) -> None:
        """Save the EMA network and a grid of its images."""
        trainer = self.trainer
        net = trainer.ema.module
        checkpoint.write(self.run_dir, checkpoint.SNAPSHOT, trainer.nimg, net.state_dict(), self._meta())
        seeds = torch.arange(self.side**2).split(trainer.options.batch_gpu)
        sampler = SAMPLERS[default_sampler(net)].sample
        images = torch.cat([sample(net, trainer.network, part.tolist(), preview_levels(net), sampler=sampler) for part in seeds])
        save_grid(self.run_dir / f"fakes-{checkpoint.kimg(trainer.nimg)}.png", images, self.side)

    def state(self) -> None:
        """Save the training state and, once that is durable, remove the older ones."""
        trainer = self.trainer
        checkpoint.write(self.run_dir, checkpoint.STATE, trainer.nimg, trainer.tensors(), self._meta())
        checkpoint.keep_newest(self.run_dir, checkpoint.STATE)

    def _meta(self) -> dict:
        return {"step": self.trainer.step, "network": self.trainer.network, "options": asdict(self.trainer.options)}

    def _append(self, name: str, line: str) -> None:
        with open(self.run_dir / name, "a") as file:
            file.write(line + "\n")

    def _drop_later_statistics(self) -> None:
        """Keep of stats.jsonl what was written up to where training goes on.

        The rest comes again.
        """
        path = self.run_dir / "stats.jsonl"
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["kimg"] <= self.trainer.nimg / 1000]
            write_atomic(path, "".join(kept).encode())
