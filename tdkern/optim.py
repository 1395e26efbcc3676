"""Optimizers on the fused ops."""

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .ops import _modes, _shards
from .ops._checks import kind_of
from .ops.adam_ema import adam_ema_, found_inf
from .ops.ema_update import checked_decays, ema_update_

NOT_IMPLEMENTED = ("amsgrad", "maximize", "differentiable")  # options of torch.optim.Adam's groups


class AdamEMA(torch.optim.Adam):
    """AdamW or Adam with averages of the parameters, one pass over memory a step
    (`tdkern.ops.adam_ema_`).

    A step whose gradients are not all finite changes nothing; it is counted in `skipped` (int64, on
    the device), and the host never waits for the answer. Learning-rate schedulers, parameter
    groups, GradScaler and hooks work as with torch.optim.Adam, whose `state_dict` this is:
    torch.optim.Adam and AdamW load it and the other way round. The averages are the caller's
    tensors and are saved with the networks they belong to; buffers are not averaged, nor is a
    parameter without a gradient. A first step with lr 0, which only makes the state (as
    torch.distributed.checkpoint.state_dict does), leaves the averages alone.

    Change the elements of the tensor `decays` before a step. It is every group's "decays", by which
    it is reached through a wrapper (Accelerate's); a group may be given others. A group that is
    added brings "averages", K lists of tensors in the order of its parameters.

    Where several processes train together, each steps the parameters or shards that it has. Where
    those are shards (DTensors of FSDP2 and tensor parallelism, FSDP1) or some of all
    (ZeroRedundancyOptimizer), what skips the step in one process skips it in all. DDP's gradients
    are the same in all processes, so nothing is asked of the others there. Other optimizers that
    give each process some of the parameters need `flag_group=torch.distributed.group.WORLD` for it.

    Args:
        params: parameters or parameter groups, as of every optimizer; on one device.
        lr, betas, eps, weight_decay: as torch.optim.Adam's; lr may be a scalar tensor on the
            device, for CUDA graphs.
        decoupled: AdamW's weight decay, else Adam's.
        averages: K sequences of tensors in the order of the parameters, such as
            `ema.module.parameters()` of `tdkern.ema.EMA`s; DTensors where the parameters are,
            distributed alike.
        decays: K floats in [0, 1], or a float tensor [K].
        backend: as `adam_ema_`'s.
        flag_group: a process group that skips a step together: every process of it must call
            `step`. None: where the parameters are shards or some of all, those that hold the
            others.
        takes_grad_scale: whether GradScaler leaves its scale and its check to this step, as to
            torch's fused Adam: one wait for the device fewer.
            Lightning's `gradient_clip_val` refuses every such optimizer; clip by `step(clip=)`.

    Raises:
        ValueError: averages that do not match the parameters, an option out of its range, or
            amsgrad, maximize or differentiable in a group or a state. RuntimeError: a sparse
            gradient, or a complex parameter.
    """

    _own = ("_averages", "skipped", "backend", "flag_group", "_step_supports_amp_scaling")

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
        flag_group: "torch.distributed.ProcessGroup | None" = None,
        takes_grad_scale: bool = False,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled, fused=True
        )
        every = [param for group in self.param_groups for param in group["params"]]
        # ZeroRedundancyOptimizer may leave a process without parameters
        device = every[0].device if every else torch.device("cpu")
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.backend, self.flag_group = backend, flag_group or _group_of_zero()
        self._step_supports_amp_scaling = takes_grad_scale
        self.defaults["decays"] = checked_decays(self._name, decays)
        whole = _checked_averages(self._name, averages, every, self.decays)
        self._averages, first = [], 0  # by group, average and parameter
        for group in self.param_groups:
            end = first + len(group["params"])
            self._averages.append([average[first:end] for average in whole])
            group.setdefault("decays", self.decays)
            first = end

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def decays(self) -> Tensor:
        """The decays that the constructor was given, [K]; its elements may be changed."""
        return self.defaults["decays"]

    def add_param_group(self, param_group: dict) -> None:
        """As every optimizer's, with "averages" where there are decays; refuses the options that
        are not implemented."""
        given: object = param_group
        if not isinstance(given, dict):
            return super().add_param_group(param_group)  # which refuses it
        _refuse_options(self._name, [param_group])
        group = dict(param_group)
        averages = group.pop("averages", ())
        in_constructor = "decays" not in self.defaults
        if in_constructor and averages:
            raise ValueError(
                f"{self._name}: averages must be an argument, in the order of all parameters, got "
                "some in a group"
            )
        super().add_param_group(group)
        if in_constructor:
            return
        try:
            params, decays = group["params"], group["decays"]
            self._averages.append(_checked_averages(self._name, averages, params, decays))
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict:
        """torch.optim.Adam's: the decays are left out, as the averages are."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.pop("decays", None)
        return state

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._own}}

    def __setstate__(self, state: dict) -> None:
        """Take a state dict's groups and state, or all of a copied or unpickled optimizer; what
        cannot be continued replaces nothing."""
        for name in NOT_IMPLEMENTED:
            if any(group.get(name) for group in state["param_groups"]):
                raise ValueError(f"{self._name}: a state with {name} cannot be continued")
        whole = "defaults" in state  # not a state dict, which has no decays
        defaults = state["defaults"] if whole else self.defaults
        for i, group in enumerate(state["param_groups"]):
            if not whole:
                group["decays"] = self.param_groups[i]["decays"]
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
        _refuse_options(self._name, self.param_groups)
        if clip is not None and not isinstance(clip, Tensor):
            raise ValueError(f"{self._name}: clip must be a tensor, got {kind_of(clip)}")
        try:
            self._step(clip)
        except ValueError:
            self._refuse_gradients()
            raise
        return loss

    def _step(self, clip: Tensor | None) -> None:
        found, grads = self._found_inf(clip), self._grads()
        if grads and self.skipped.device != grads[0].device:  # the parameters have moved
            self.skipped = self.skipped.to(grads[0].device)
        skipped: Tensor | None = self.skipped
        for group, own_averages in zip(self.param_groups, self._averages, strict=True):
            rows = [i for i, param in enumerate(group["params"]) if param.grad is not None]
            if not rows:
                continue
            params = [group["params"][i] for i in rows]
            only_makes_state = _is_zero(group["lr"]) and not any(
                self.state[param] for param in params
            )
            states = [self._state(param) for param in params]
            averages = [[average[i] for i in rows] for average in own_averages]
            self._step_group(
                group,
                params,
                [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")],
                ([], ()) if only_makes_state else (averages, group["decays"]),
                {"clip": clip, "found_inf": found, "skipped": skipped},
            )
            skipped = None  # counted once, not once a group
        if skipped is not None and found is not None:  # no gradient in this process
            skipped += (found != 0).to(skipped.device, torch.int64)

    def _step_group(
        self,
        group: dict,
        params: list[Tensor],
        state: list[list[Tensor]],
        averages: tuple[list[list[Tensor]], Sequence[float] | Tensor],
        scalars: dict[str, Tensor | None],
    ) -> None:
        """The step of a group's parameters that have gradients.

        Args:
            group: with the options.
            params: those parameters.
            state: exp_avg, exp_avg_sq and step, each in the parameters' order.
            averages: lists in the parameters' order, and their decays.
            scalars: as of `adam_ema_`.
        """
        exp_avgs, exp_avg_sqs, steps = state
        columns, decays = averages
        adam_ema_(
            params,
            [param.grad for param in params if param.grad is not None],
            exp_avgs,
            exp_avg_sqs,
            steps,
            columns,
            decays,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            grad_scale=getattr(self, "grad_scale", None),  # GradScaler's protocol
            backend=self.backend,
            clip=scalars["clip"],
            found_inf=scalars["found_inf"],
            skipped=scalars["skipped"],
        )

    def _grads(self) -> list[Tensor]:
        every = (param for group in self.param_groups for param in group["params"])
        return [param.grad for param in every if param.grad is not None]

    def _refuse_gradients(self) -> None:
        """Raise RuntimeError for gradients that Adam cannot take."""
        for grad in self._grads():
            if grad.is_complex():
                raise RuntimeError(
                    f"{self._name}: parameters must be real, got {grad.dtype}; give "
                    "torch.view_as_real of them"
                ) from None
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{self._name}: Adam does not support sparse gradients, please consider "
                    "SparseAdam instead"
                ) from None

    def _found_inf(self, clip: Tensor | None) -> Tensor | None:
        """Whether any process that this one must skip with has a gradient that no step can be taken
        with; None where there is no gradient and no other process."""
        # GradScaler's protocol; its flag is of the gradients alone, not of their squares
        found, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        grads = self._grads()
        if grads:  # over the meshes of DTensors
            own = found_inf(grads, grad_scale=grad_scale, clip=clip, backend=self.backend)
            found = own if found is None else torch.maximum(own, found.to(own.device))
        group = self.flag_group
        if group is None and not self._flat_shards():
            return found
        if torch.distributed.get_world_size(group) < 2:
            return found
        if found is None:
            found = torch.zeros((), dtype=torch.float32, device=self.skipped.device)
        return _shards.largest_over(group, found)

    def _flat_shards(self) -> bool:
        """Whether FSDP1 holds the parameters, each process some elements of each."""
        every = (param for group in self.param_groups for param in group["params"])
        return any(getattr(param, "_fsdp_flattened", False) for param in every)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


class RAdamEMA(AdamEMA):
    """RAdam (arXiv 1908.03265) with averages, in PyTorch's own operations and `ema_update_`.

    The step is torch.optim.RAdam's, whose `state_dict` this is too; arguments, averages, shards and
    the skipping of steps are `AdamEMA`'s. The variance that
    Adam's first steps divide by is of few gradients: RAdam leaves it out while rho_t <= 5, and
    then multiplies by r_t = sqrt((rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t)), with
    rho = 2 / (1 - beta2) - 1 and rho_t = rho - 2 t beta2^t / (1 - beta2^t).

    Needs temporary memory for three copies of the parameters, as torch.optim.RAdam does.
    Deterministic. No host synchronisation.
    """

    def _step_group(self, group, params, state, averages, scalars) -> None:
        averages, decays = averages
        grad_scale = getattr(self, "grad_scale", None)
        factor, taken = _factor(scalars["found_inf"], scalars["clip"], grad_scale)
        exp_avgs, exp_avg_sqs, steps = state
        own, exp_avgs, exp_avg_sqs, grads = _shards.local_rows(
            self._name,
            params,
            {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
            {"grads": [param.grad for param in params]},
        )
        for step in steps:
            step.add_(taken)
        _radam(own, exp_avgs, exp_avg_sqs, grads, torch.stack(steps), factor, taken, group)
        if averages:
            if not isinstance(decays, Tensor):
                decays = torch.tensor(decays, dtype=torch.float64)
            # a decay of 1 changes nothing
            decays = torch.where(taken, decays.to(taken.device), 1.0)
            ema_update_(averages, params, decays, backend=self.backend)
        if scalars["skipped"] is not None:
            scalars["skipped"].add_(~taken)


OPTIMIZERS = {"adam": AdamEMA, "radam": RAdamEMA}


def _factor(
    found_inf: Tensor, clip: Tensor | None, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By what to multiply gradients, and whether the step is taken, scalars on the device."""
    factor = torch.ones((), dtype=torch.float64, device=found_inf.device)
    if clip is not None:
        factor = factor * _shards.local_of(clip)
    if grad_scale is not None:
        factor = factor / _shards.local_of(grad_scale)
    return factor, (found_inf == 0) & factor.isfinite()


def _rectified(steps: Tensor, group: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Of counts of steps: by what to multiply exp_avg, and its quotient by the square root of
    exp_avg_sq; and which of these is the direction: float64, float64 and bool, as many."""
    beta1, beta2 = group["betas"]
    t = steps.double().clamp(min=1)  # before the first step that is taken nothing moves
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / correction2
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    plain = 1 / correction1
    return plain, plain * (ratio * correction2).sqrt(), length > 5


def _radam(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    steps: Tensor,
    factor: Tensor,
    taken: Tensor,
    group: dict,
) -> None:
    """RAdam's step, in place; it changes nothing where it is not `taken`."""
    beta1, beta2 = group["betas"]
    dtype = torch.promote_types(params[0].dtype, torch.float32)  # of scalars
    kept = taken.to(dtype)
    lr = (group["lr"] * kept).to(dtype)
    grads = [torch.where(taken, grad, 0.0) for grad in grads]
    torch._foreach_mul_(grads, torch.where(taken, factor, 1.0).to(dtype))
    if group["decoupled_weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    else:
        torch._foreach_add_(grads, params, alpha=group["weight_decay"])
    _average(exp_avgs, grads, (1 - beta1) * kept)
    torch._foreach_mul_(grads, grads)
    _average(exp_avg_sqs, grads, (1 - beta2) * kept)

    plain, rectified, by_variance = (vector.unbind() for vector in _rectified(steps, group))
    by_spread = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(by_spread, group["eps"])
    torch._foreach_reciprocal_(by_spread)
    torch._foreach_mul_(by_spread, rectified)
    weights = [
        torch.where(by, weight, value.to(weight.dtype))
        for by, weight, value in zip(by_variance, by_spread, plain, strict=True)
    ]
    torch._foreach_mul_(weights, exp_avgs)
    torch._foreach_mul_(weights, lr)
    torch._foreach_sub_(params, weights)


def _average(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """average <- average + weight (value - average), in place; a weight of 0 changes nothing.

    As torch.lerp; 1 - weight, of the other form, is 1 in bfloat16.
    """
    gaps = torch._foreach_sub(values, averages)
    torch._foreach_mul_(gaps, weight)
    torch._foreach_add_(averages, gaps)


def _checked_averages(
    name: str,
    averages: Sequence[Iterable[Tensor]],
    params: list[Tensor],
    decays: Sequence[float] | Tensor,
) -> list[list[Tensor]]:
    """The averages as lists, as many as there are decays, each in the order of the parameters."""
    try:
        columns = [list(average) for average in averages]
    except TypeError:
        raise ValueError(
            f"{name}: averages must hold K lists of tensors, such as [ema.module.parameters()]"
        ) from None
    if len(columns) != len(decays):
        raise ValueError(
            f"{name}: decays must hold one decay for each of the {len(columns)} averages, got "
            f"{len(decays)}"
        )
    for k, average in enumerate(columns):
        for i, avg in enumerate(average):
            if not isinstance(avg, Tensor):
                raise ValueError(f"{name}: averages[{k}][{i}] must be a tensor, got {kind_of(avg)}")
        if [avg.shape for avg in average] != [param.shape for param in params]:
            raise ValueError(
                f"{name}: averages[{k}] must hold a tensor of the shape of each of the "
                f"{len(params)} parameters, in their order"
            )
    return columns


def _refuse_options(name: str, groups: list[dict]) -> None:
    for group in groups:
        for option in NOT_IMPLEMENTED:
            if group.get(option):
                raise ValueError(
                    f"{name}: {option} must be False, which alone is implemented, got "
                    f"{group[option]}"
                )


def _group_of_zero() -> "torch.distributed.ProcessGroup | None":
    """The processes of the ZeroRedundancyOptimizer that is making an optimizer of its share.

    It does not tell the optimizer so, and hands it parameters that look like any others.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module else None
    while module and frame:
        maker = frame.f_locals.get("self")
        if isinstance(maker, module.ZeroRedundancyOptimizer):
            return maker.process_group
        frame = frame.f_back
    return None


def _is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is 0, looked at where no device is waited for."""
    if isinstance(lr, Tensor):
        return _modes.can_check_values(lr) and lr.item() == 0
    return lr == 0
