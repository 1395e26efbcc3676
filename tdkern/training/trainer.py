"""Data, networks, averages and optimizer of a run, and one step of it.

Step j is a pure function of the state before it and of (seed, j), so a resumed run ends in the same
bits.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._version import __version__
from ..data import (
    AugmentPipe,
    ImageDataset,
    derive_seed,
    to_float,
)
from ..ema import EMA, PowerFunctionEMA, consistency_decay, copy_decay, edm_decay
from ..ema import target_decay as ramped_decay
from ..families import FAMILIES
from ..losses import Loss
from ..networks.precond import Preconditioned
from ..networks.saved import PRECISIONS, NetworkSpec, load, restore
from ..ops._schemas import digest
from ..optim import OPTIMIZERS, AdamEMA
from ..weighting import Uncertainty
from . import checkpoint
from .distributed import (
    Process,
    agree,
    broadcast_,
    data_parallel,
    mean_,
    shard_,
    shard_like,
    sum_,
)
from .fids import FidMeter
from .graph import CaptureError, Seeds, StepGraph
from .options import Options
from .state import ADAM, check_adam, check_place, check_step, check_tensors
from .sums import SIZE, TERMS, Sums, add_norm, of_samples


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


def target_decay(options: Options, loss: Loss, step: int) -> float:
    """Decay of the target network in a step, where it is an average.

    Args:
        options: the run's.
        loss: of the step.
        step: from 0.
    """
    if FAMILIES[options.family].consistency:
        if options.target_ema_mode == "fixed":
            return options.start_ema
        scales = loss.num_scales  # type: ignore[attr-defined]  # of every such family's loss
        return consistency_decay(options.start_ema, options.start_scales, scales)
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


def measure_kernels() -> None:
    """Let cuDNN choose by measuring, and matrix products and convolutions take TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """The common norm of gradients, [], over all processes that have a share. No host wait."""
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_factor(norm: Tensor, largest: float) -> Tensor:
    """By what to multiply gradients of this norm so that it is at most `largest`, [].

    It is NaN, which skips the step, where the norm is not finite. No host synchronisation.
    """
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
        if options.cuda_graph and process.device.type != "cuda":
            raise ValueError("cuda_graph must be False where there is no GPU, got True")
        self.dataset = ImageDataset(
            options.data, use_labels=options.cond, xflip=options.xflip, cache=options.cache
        )
        self.data = self.dataset.fingerprint()
        self._agree()
        if options.bench:
            measure_kernels()
        self.augment_pipe = make_augment_pipe(options)
        if self.augment_pipe:
            self.augment_pipe.to(process.device)
        self.loss = options.make_loss()
        self.loss.prepare(self.dataset.image_shape)
        saved = _Saved(state) if state else None
        self._make_networks(saved)
        self.optimizer = self._make_optimizer()
        self.seeds = Seeds(options.seed, process.device)
        self.run_step: Callable = self._step
        if options.cuda_graph:
            self.run_step = StepGraph(self._step, self.seeds, process.device)
        # over the samples since image `counted`
        self.sums = torch.zeros(SIZE, dtype=torch.float64, device=process.device)
        self.levels: list[list[float]] = []  # `Sums.levels` of the last tick
        self.counted = 0
        self.whole = True  # whether all parts are of the same step
        self.idle = 0  # ticks in a row without a step that was taken
        self.warnings = []  # for the first process to tell
        if saved:
            self._restore_rest(saved)
        self.meter = None
        if options.fid_every:
            self.meter = FidMeter(options, process, self.dataset, self.network)
        if process.world > 1 and not self.sharded:
            self._settle_buckets()

    def _make_networks(self, saved: "_Saved | None") -> None:
        """The network, its averages, and both as the loss calls them."""
        options, process = self.options, self.process
        spec = self._network_spec()
        self.network = spec.to_json()
        torch.manual_seed(derive_seed(options.seed, "init"))
        self.net: Any = spec.build().to(process.device)  # an FSDPModule too where it is sharded
        if options.transfer and not saved:
            source, _ = checkpoint.load_network(options.transfer)
            restore(self.net, source.state_dict(), Path(options.transfer))
        if saved:
            restore(self.net, saved.parts["net"], saved.path)
        self._make_uncertainty(saved)
        self.sharded = options.shard and process.world > 1
        # before the copies below, as it gives all processes the first one's weights
        if self.sharded:
            broadcast_(self.net)
        self.online: Any = self.net if self.sharded else data_parallel(self.net, process)
        self._make_averages()
        if saved:
            self._restore_averages(saved)
        if self.sharded:
            for module in (self.net, *(average.module for average in self.averages)):
                shard_(module, process)
        self.target_net: Any = self.target.module if self.target else None
        if options.compile:
            self.online = torch.compile(self.online)
            self.target_net = torch.compile(self.target_net) if self.target else None

    def _make_uncertainty(self, saved: "_Saved | None") -> None:
        """EDM2's u(sigma): trained beside the network, in no average, and whole in every
        process.
        """
        self.uncertainty: Uncertainty | None = None
        if self.options.uncertainty:
            torch.manual_seed(derive_seed(self.options.seed, "init", 1))
            self.uncertainty = Uncertainty().to(self.process.device)
            if saved:
                restore(self.uncertainty, saved.parts["uncertainty"], saved.path)

    def _make_averages(self) -> None:
        options = self.options
        self.ema = EMA(self.net)
        self.target = EMA(self.net) if options.has_target else None
        if self.target and options.target_precision:
            # of its activations: the average itself stays float32
            self.target.module.dtype = PRECISIONS[options.target_precision]
        self.averages = [self.ema, self.target] if self.target else [self.ema]
        self.power = PowerFunctionEMA(self.net, options.power_ema) if options.power_ema else None
        if self.power:
            self.averages += self.power.averages.values()

    def _make_optimizer(self) -> AdamEMA:
        options, device = self.options, self.process.device
        optimizer = OPTIMIZERS[options.optim](
            self.net.parameters(),
            lr=options.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=options.weight_decay,
            decays=torch.ones(len(self.averages), dtype=torch.float64, device=device),
            averages=[average.module.parameters() for average in self.averages],
        )
        if self.uncertainty:  # without averages, and with a weight that nothing should pull to 0
            group = {"params": self.uncertainty.parameters(), "decays": (), "weight_decay": 0.0}
            optimizer.add_param_group(group)
        for group in optimizer.param_groups:  # `_set_numbers` writes it
            group["lr"] = torch.full((), options.lr, dtype=torch.float64, device=device)
        if options.ls != 1:  # GradScaler's protocol: the step takes it out of the gradients
            optimizer.grad_scale = torch.tensor(options.ls, device=device)  # type: ignore
        return optimizer

    def _agree(self) -> None:
        """Raises ValueError where the processes of the run were not started alike."""
        own = asdict(self.options)
        of_machine = ("data", "transfer", "workers", "fid_ref", "fid_detector")
        own |= dict.fromkeys(of_machine)
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
        loss, device = self.loss.at(self.step), self.process.device
        self._set_numbers(loss)
        self.seeds.start(self.step)
        self.optimizer.zero_grad(set_to_none=True)  # before a capture, whose memory is its own
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        try:
            self.run_step(loss, images, labels)
        except CaptureError:
            self.whole = True
            raise
        self.step += 1
        if self.power:
            self.power.step = float(self.step)
        self.whole = True

    def _set_numbers(self, loss: Loss) -> None:
        """The learning rate and the decays of all averages in this step, where the device reads
        them.
        """
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"].fill_(learning_rate(options, self.nimg))
        decays = [edm_decay(options.batch, 1e6 * options.ema, self.nimg)]
        if self.target:
            decays.append(target_decay(options, loss, self.step))
        if self.power:
            decays += self.power.decays(self.step + 1)
        for own, decay in zip(self.optimizer.decays, decays, strict=True):
            own.fill_(decay)

    def _step(self, loss: Loss, images: Tensor, labels: Tensor) -> None:
        """What a step does on the device, and a CUDA graph holds.

        What changes from step to step is in tensors (`_set_numbers`) and seeds (`Seeds`); nothing
        waits for the device, and no shape depends on a number.

        Args:
            loss: of the step.
            images, labels: as `train_step`'s, on the device.
        """
        options = self.options
        sums = self._accumulate(loss, images, labels)
        if self.uncertainty:
            mean_(self.uncertainty.weight.grad, self.process)
        if options.target_copy:
            # the device alone knows of skipped steps
            updates = self.optimizer.state[next(self.net.parameters())].get("step", 0)
            self.optimizer.decays[1] = copy_decay(options.target_copy, updates)
        grads = [param.grad for param in self.net.parameters() if param.grad is not None]
        norm = gradient_norm(grads)
        clip = clip_factor(norm, options.clip * options.ls) if options.clip else None
        self.whole = False
        # nothing, if a gradient's square is not finite: EDM would set NaN to 0 and go on
        self.optimizer.step(clip=clip)
        for average in self.averages:
            average.copy_buffers(self.net)
        add_norm(sums, norm / options.ls)
        self.sums += sums

    def _accumulate(self, loss: Loss, images: Tensor, labels: Tensor) -> Tensor:
        """Add up the gradient of this process's share, part by part; arguments as `_step`'s.

        Returns:
            [SIZE], the sums of the step: one that fails halfway has no part in the statistics.
        """
        options = self.options
        sums = torch.zeros_like(self.sums)
        share = options.batch // self.process.world
        for done in range(0, share, options.batch_gpu):
            part = slice(done, done + options.batch_gpu)
            # the processes exchange gradients during the backward of the last part
            last = part.stop >= share
            with self._exchange(last):
                first = self.process.rank * share + done
                sums += self._backward(loss, images[part], labels[part], first)
        return sums

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Within it a backward adds up the processes' gradients, if it is the last of the step."""
        if self.sharded:
            self.net.set_requires_gradient_sync(last)
        if last or self.sharded or self.process.world == 1:
            return nullcontext()
        return self.online.no_sync()

    def _backward(self, loss: Loss, images: Tensor, labels: Tensor, first: int) -> Tensor:
        """Add the gradient of a part of the batch; arguments as `_step`'s.

        Args:
            first: the index of the part's first sample in the whole batch.

        Returns:
            [SIZE] float64, the sums over the part.
        """
        options = self.options
        batch = (first, options.batch)
        # a sample's draws belong to its place in the batch: any number of processes makes the same
        self.seeds.begin("step")
        x0, augment_labels = self._augmented(to_float(images), *batch)
        pair = loss.part_of(*batch).pair(x0)
        self.seeds.begin("dropout", first)
        # a loss is a mean over elements; EDM's gradients are of a sum over elements and a mean over
        # the whole batch, and those of several processes are averaged
        scale = x0[0].numel() / (options.batch // self.process.world)
        terms = loss.evaluate(
            self.online,
            self.target_net,
            pair,
            labels if labels.shape[1] else None,
            augment_labels,
            uncertainty=self.uncertainty,
            gradient_scale=scale * options.ls,
        )
        terms.loss.sum().backward()
        return of_samples(terms, pair.sigma, scale * options.ls)

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
        sums = Sums.of(self.sums.cpu())
        loss, td, base, valid = (sums.terms / (self.nimg - self.counted)).tolist()
        norm, counted = sums.norm.tolist()
        self.levels = sums.levels.tolist()
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
        return terms | {"grad_norm": norm / counted if counted else math.nan, "skipped": skipped}

    def tensors(self) -> dict[str, Tensor]:
        """All that training goes on from, beside the step."""
        moments = {
            f"{key}.{name}": self.optimizer.state[param][key]
            for name, param in self._trained().items()
            for key in ADAM
        }
        return self._modules_tensors() | moments

    def _trained(self) -> dict[str, Tensor]:
        """The optimizer's parameters in its order, by their names in a training state."""
        named: dict[str, Tensor] = dict(self.net.named_parameters())
        if self.uncertainty:
            named |= dict(self.uncertainty.named_parameters("uncertainty"))
        return named

    def _modules_tensors(self) -> dict[str, Tensor]:
        modules = {"net": self.net, "ema": self.ema.module}
        if self.target:
            modules["target"] = self.target.module
        if self.power:
            modules["power"] = self.power.profiles
        if self.uncertainty:
            modules["uncertainty"] = self.uncertainty
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in modules.items()
            for name, tensor in module.state_dict().items()
        }

    def whole_average(self) -> Preconditioned:
        """The averaged network; of one that the processes share, which all have to ask, a copy."""
        net = self.ema.module
        if not self.sharded:
            return net
        weights = {
            name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.cpu()
            for name, tensor in net.state_dict().items()
        }
        copied = load(self.network, weights, Path("the averaged network"))
        return copied.to(self.process.device).eval().requires_grad_(False)

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
        named = self._trained()
        check_adam({key: parts[key] for key in ADAM}, named, meta["step"], path)
        state = {}
        for i, (name, param) in enumerate(named.items()):
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
            self.counted, skipped = saved["counted"], saved["skipped"]
            sums = torch.tensor(saved["sums"], dtype=torch.float64)  # [processes, SIZE]
            if sums.shape[1] == TERMS:  # as versions before had it
                sums = torch.nn.functional.pad(sums, (0, SIZE - TERMS))
            if len(sums) != self.process.world:  # of a run in another number of processes
                others = torch.zeros(self.process.world - 1, SIZE, dtype=torch.float64)
                sums = torch.cat([sums.sum(0, keepdim=True), others])
            self.sums.copy_(sums[self.process.rank])
            self.optimizer.skipped.fill_(skipped)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise checkpoint.CheckpointError(f"{path}: damaged statistics ({error})") from error

    def unfinished_statistics(self) -> dict:
        """Of the samples since image `counted`, for `_restore_statistics`; asks all
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
