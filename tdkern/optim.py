"""Optimizers on the fused ops."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .ops import _modes, _shards
from .ops._checks import kind_of
from .ops.adam_ema import adam_ema_, found_inf
from .ops.ema_update import checked_decays

NOT_IMPLEMENTED = ("amsgrad", "maximize", "differentiable")  # options of torch.optim.Adam's groups


class AdamEMA(torch.optim.Adam):
    """AdamW or Adam with averages of the parameters, one pass over memory a step
    (`tdkern.ops.adam_ema_`).

    A step with a gradient whose square is not finite (`tdkern.ops.found_inf`) changes nothing; it
    is counted in `skipped` (int64, on the device), and the host never waits for the answer.
    Learning-rate schedulers, parameter groups, GradScaler and hooks work as with torch.optim.Adam,
    whose `state_dict` this is: torch.optim.Adam and AdamW load it and the other way round. The
    averages are the caller's tensors and are saved with the networks they belong to; buffers are
    not averaged, nor is a parameter without a gradient. A first step with lr 0, which only makes
    the state (as torch.distributed.checkpoint.state_dict does), leaves the averages alone.

    Where several processes train together, each steps the parameters or shards that it has (DDP,
    FSDP, ZeroRedundancyOptimizer), and what skips the step in one of them skips it in all: their
    flags are reduced over `flag_group`, so every process of it must call `step`. Under Lightning's
    "16-mixed" and "bf16-mixed" clip by `step(clip=)` in manual optimization: its
    `gradient_clip_val` refuses every optimizer that takes GradScaler's scale itself, as torch's
    fused Adam does.

    Args:
        params: parameters or parameter groups, as of every optimizer; on one device.
        lr, betas, eps, weight_decay: as torch.optim.Adam's; lr may be a scalar tensor on the
            device, for CUDA graphs.
        decoupled: AdamW's weight decay, else Adam's.
        averages: K sequences of tensors in the order of the parameters, such as
            `ema.module.parameters()` of `tdkern.ema.EMA`s; DTensors where the parameters are,
            distributed alike.
        decays: K floats in [0, 1], or a float tensor [K]. `self.decays` is a tensor: change its
            elements before a step.
        backend: as `adam_ema_`'s.
        flag_group: the process group that skips a step together; "default" is torch.distributed's
            default group wherever it runs, None this process alone.

    Raises:
        ValueError: averages that do not match the parameters, an option out of its range, or
            amsgrad, maximize or differentiable in a group or a state. RuntimeError: a sparse
            gradient.
    """

    _step_supports_amp_scaling = True  # for GradScaler; torch.optim.Adam's is lost by pickle

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        averages: Sequence[Iterable[Tensor]] = (),
        decays: Sequence[float] | Tensor = (),
        backend: str = "auto",
        flag_group: "torch.distributed.ProcessGroup | Literal['default'] | None" = "default",
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled, fused=True
        )
        every = [param for group in self.param_groups for param in group["params"]]
        self.decays = checked_decays("AdamEMA", decays)
        device = (
            every[0].device if every else torch.device("cpu")
        )  # ZeroRedundancyOptimizer may leave a process without parameters
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.backend, self.flag_group = backend, flag_group
        self._averages = _averages_by_param(averages, every, self.decays)

    def add_param_group(self, param_group: dict) -> None:
        """As every optimizer's; refuses the options that are not implemented."""
        if isinstance(param_group, dict):
            _refuse_options([param_group])
        super().add_param_group(param_group)

    def __getstate__(self) -> dict:
        own = ("_averages", "decays", "skipped", "backend", "flag_group")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict) -> None:
        """Take a state dict's groups and state, or all of a copied or unpickled optimizer; what
        cannot be continued replaces nothing."""
        if any(group.get(name) for group in state["param_groups"] for name in NOT_IMPLEMENTED):
            raise ValueError("AdamEMA: a state with amsgrad or maximize cannot be continued")
        defaults = state["defaults"] if "defaults" in state else self.defaults
        for group in state["param_groups"]:
            for name, value in defaults.items():
                group.setdefault(name, value)
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None
            for param in group["params"]:
                if "step" in self.state[param]:
                    self.state[param]["step"] = self.state[param]["step"].to(
                        param.device, torch.float32
                    )

    @torch.no_grad()
    def step(self, closure=None, *, clip: Tensor | None = None):
        """One step; returns the closure's loss. clip: a factor of all gradients, a scalar tensor;
        `adam_ema_` says more."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_options(self.param_groups)
        try:
            self._step(clip)
        except ValueError:
            grads = [
                param.grad
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            ]
            if any(grad.layout is not torch.strided for grad in grads):
                raise RuntimeError(
                    "AdamEMA: Adam does not support sparse gradients, please consider SparseAdam "
                    "instead"
                ) from None
            raise
        return loss

    def _step(self, clip: Tensor | None) -> None:
        grad_scale = getattr(self, "grad_scale", None)
        skipped: Tensor | None = self.skipped
        found = self._found_inf(grad_scale, clip)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            only_makes_state = _is_zero(group["lr"]) and not any(
                self.state[param] for param in params
            )
            states = [self._state(param) for param in params]
            averages: list[tuple[Tensor, ...]] = []
            decays: Tensor | tuple[float, ...] = ()
            if not only_makes_state:
                averages = list(zip(*map(self._averages_of, params), strict=True))
                decays = self.decays
            adam_ema_(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                averages,
                decays,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
                grad_scale=grad_scale,
                clip=clip,
                found_inf=found,
                skipped=skipped,
                backend=self.backend,
            )
            skipped = None  # counted once, not once a group
        if skipped is not None and found is not None:  # no gradient in this process
            skipped += (found != 0).to(skipped.device, torch.int64)

    def _found_inf(self, grad_scale: Tensor | None, clip: Tensor | None) -> Tensor | None:
        """Whether any process of the group has a gradient that no step can be taken with; None
        where there is no gradient and no other process."""
        found = getattr(self, "found_inf", None)  # GradScaler's protocol
        grads = [
            param.grad
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        if grads:  # GradScaler looks at the gradients themselves alone
            own = found_inf(grads, grad_scale=grad_scale, clip=clip, backend=self.backend)
            found = own if found is None else torch.maximum(own, found.to(own.device))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.flag_group is None or not distributed:
            return found
        group = None if self.flag_group == "default" else self.flag_group
        if torch.distributed.get_world_size(group) < 2:
            return found
        if found is None:
            found = torch.zeros((), dtype=torch.float32, device=self.skipped.device)
        return _shards.largest_over(group, found)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _averages_of(self, param: Tensor) -> list[Tensor]:
        if param not in self._averages:
            if len(self.decays) > 0:
                raise ValueError(
                    "AdamEMA: a parameter that was added later has no averages; make a new "
                    "optimizer and load this one's state_dict"
                )
            return []
        return self._averages[param]


def _averages_by_param(
    averages: Sequence[Iterable[Tensor]], every: list[Tensor], decays: Tensor
) -> dict[Tensor, list[Tensor]]:
    """The averages of each parameter, as many as there are decays."""
    try:
        columns = [list(average) for average in averages]
    except TypeError:
        raise ValueError(
            "AdamEMA: averages must hold K lists of tensors, such as [ema.module.parameters()]"
        ) from None
    if len(columns) != len(decays):
        raise ValueError(
            f"AdamEMA: decays must hold one decay for each of the {len(columns)} averages, got "
            f"{len(decays)}"
        )
    for k, average in enumerate(columns):
        for i, avg in enumerate(average):
            if not isinstance(avg, Tensor):
                raise ValueError(
                    f"AdamEMA: averages[{k}][{i}] must be a tensor, got {kind_of(avg)}"
                )
        if [avg.shape for avg in average] != [param.shape for param in every]:
            raise ValueError(
                f"AdamEMA: averages[{k}] must hold a tensor of the shape of each of the "
                f"{len(every)} parameters, in their order"
            )
    return {param: [average[i] for average in columns] for i, param in enumerate(every)}


def _refuse_options(groups: list[dict]) -> None:
    for group in groups:
        for name in NOT_IMPLEMENTED:
            if group.get(name):
                raise ValueError(
                    f"AdamEMA: {name} must be False, which alone is implemented, got {group[name]}"
                )


def _is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is 0, looked at where no device is waited for."""
    if isinstance(lr, Tensor):
        return _modes.can_check_values(lr) and lr.item() == 0
    return lr == 0
