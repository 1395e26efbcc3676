"""`adam_ema_`: a step of Adam or AdamW and the averages of the parameters, in one pass; nothing at
all if the square of a gradient is not finite."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import reference
from . import _backends, _modes, _shards
from ._checks import check_number, check_tensor, check_tensors, kind_of, refuse_overlap
from ._dtypes import FLOAT_NAMES, FLOATS, STORAGE_PAIRS, WIDE
from .ema_update import check_one_decay_each, checked_decays, lists_of

# params, grads, exp_avgs, exp_avg_sqs, steps
Columns = tuple[
    Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]
]
Options = tuple[float, float, float, float, bool]  # betas, eps, weight_decay, decoupled


def found_inf(
    grads: Sequence[Tensor],
    *,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Whether Adam can take a step with these gradients: a float32 scalar on their device, 1 if any
    element's g^2 is infinite or NaN, else 0; GradScaler's name for it.

    g = grad clip / grad_scale, and g^2 is rounded to the gradient's dtype, in which `adam_ema_`
    keeps the second moment. An infinite one would hold its parameter where it is for good. So |g|
    is at most 1.8e19 in float32 and bfloat16, 1.3e154 in float64 and 255.9 in float16.

    Args:
        grads: tensors of any shapes and strides, on one device, at least one. float32, float64,
            bfloat16 or float16, also mixed.
        grad_scale, clip: as of `adam_ema_`.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Raises:
        ValueError: no gradients, or the wrong dtype or device. RuntimeError: no such backend here.

    No gradient. Deterministic. No host synchronisation.
    """
    try:
        backend = _backends.resolve("found_inf", backend, grads[0].device)
        if backend not in ("cpp", "cuda"):
            if _shards.any_distributed(grads):
                return _found_inf_of_shards(grads, grad_scale, clip, backend)
            _check_grads(grads, grad_scale, clip)
        with torch.no_grad():
            if backend == "reference":
                return reference.found_inf(grads, grad_scale, clip)
            return _backends.call("found_inf", backend, (grads, grad_scale, clip))
    except _backends.REFUSED:
        if _shards.any_distributed(grads):
            return _found_inf_of_shards(grads, grad_scale, clip, backend)
        _check_grads(grads, grad_scale, clip)
        raise


def _found_inf_of_shards(
    grads: Sequence[Tensor], grad_scale: Tensor | None, clip: Tensor | None, backend: str
) -> Tensor:
    local_scale, local_clip = _shards.local_of(grad_scale), _shards.local_of(clip)
    op = partial(found_inf, grad_scale=local_scale, clip=local_clip, backend=backend)
    return _shards.found_inf(grads, op)


def adam_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]] = (),
    decays: Sequence[float] | Tensor = (),
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """A step of AdamW (arXiv 1711.05101) or Adam (1412.6980) and the weights' averages, in place.

    g = grad clip / grad_scale;  decoupled: p <- (1 - lr weight_decay) p,
    else g <- g + weight_decay p;  m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,
    p <- p - lr/(1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps);  averages as `ema_update_`.
    The C++ backend rounds where torch.optim.Adam(foreach=False) does: it gives its bits up to the
    square root, which torch's (MKL's) does not always round correctly. If the square of any g
    (`found_inf`) or clip / grad_scale is not finite, nothing changes but `skipped`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists or tuples of P tensors, those of one parameter
            with its shape, device and dtype (float32, float64, bfloat16 or float16, computed in
            float32), best alike in memory: others go through copies. Or of DTensors: each process
            steps its shards. What is written may overlap nothing else.
        steps: P float32 scalars on the parameters' device: a parameter's steps, increased by 1.
        averages, decays: as for `ema_update_`; on CUDA at most 16.
        lr: learning rate >= 0. A tensor is a float32 or float64 scalar, as are grad_scale and clip:
            on the CPU, read during the call, or on the parameters' device, where a CUDA graph reads
            it anew at each replay and nothing checks its range.
        betas, eps, weight_decay: as torch.optim.Adam's; betas in [0, 1), the others >= 0.
        decoupled: AdamW, else Adam.
        grad_scale, clip: what GradScaler multiplied the loss by, and a factor of every gradient,
            such as min(1, max_norm / norm); or None.
        found_inf: float32 scalar, not 0 to skip the step; None: `found_inf` looks at the gradients.
        skipped: int64 scalar on the device, increased by 1 if the step is skipped; or None.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Raises:
        ValueError: a wrong length, shape, dtype, device or range. RuntimeError: no such backend.

    No gradient. Deterministic: every element by itself. No host synchronisation.
    """
    columns = (params, grads, exp_avgs, exp_avg_sqs, steps)
    options = (*_pair(betas), eps, weight_decay, decoupled)
    rest = ((lr, found_inf, grad_scale, clip), skipped, options)
    try:
        _on_backend(columns, averages, decays, *rest, backend)
    except _backends.REFUSED:
        if not _on_shards_or_refused(columns, averages, decays, *rest, backend):
            raise


def _on_backend(
    columns: Columns,
    averages: Sequence[Sequence[Tensor]],
    decays: Sequence[float] | Tensor,
    scalars: tuple,
    skipped: Tensor | None,
    options: Options,
    backend: str,
) -> None:
    """`adam_ema_` on the backend that fits; what that one checks itself is not checked before."""
    params, grads, exp_avgs, exp_avg_sqs, _ = columns
    backend = _backends.resolve_lists("adam_ema_", backend, params)
    decays = checked_decays("adam_ema_", decays)
    scalars = (_checked_numbers(scalars[0], *options[:4]), *scalars[1:])
    lengths = {len(column) for column in columns}
    whole = len(averages) == decays.numel() and len(lengths) == 1
    checks_itself = backend in ("cpp", "cuda") and not torch.compiler.is_compiling()
    if not checks_itself or not whole:
        if _shards.any_distributed(params, grads, *averages):
            return _on_shards(columns, averages, decays, scalars, skipped, options, backend)
        _check(*columns, averages, decays, scalars, skipped)
    if not params:
        return
    lr, flag, grad_scale, clip = scalars
    with torch.no_grad():
        if flag is None:
            flag = found_inf(grads, grad_scale=grad_scale, clip=clip, backend=backend)
        if backend == "reference":
            return reference.adam_ema_(
                *columns, averages, decays, lr, flag, grad_scale, clip, skipped, *options
            )
        flat = [avg for average in averages for avg in average]
        rest = (decays, lr, flag, grad_scale, clip, skipped, *options)
        _backends.call("adam_ema_", backend, (*columns, flat, *rest))
    _modes.written([*params, *exp_avgs, *exp_avg_sqs, *flat])


def _on_shards_or_refused(
    columns: Columns,
    averages: Sequence[Sequence[Tensor]],
    decays: Sequence[float] | Tensor,
    scalars: tuple,
    skipped: Tensor | None,
    options: Options,
    backend: str,
) -> bool:
    """Where a backend has refused: the step of DTensors, else an error that says in full which
    argument is wrong. Returns whether the step is done."""
    _check_lists(*columns, averages)
    decays = checked_decays("adam_ema_", decays)
    scalars = (_checked_numbers(scalars[0], *options[:4]), *scalars[1:])
    if _shards.any_distributed(*columns[:2], *averages):
        _on_shards(columns, averages, decays, scalars, skipped, options, backend)
        return True
    _check(*columns, averages, decays, scalars, skipped)
    return False


def _on_shards(
    columns: Columns,
    averages: Sequence,
    decays: Tensor,
    scalars: tuple,
    skipped: Tensor | None,
    options: Options,
    backend: str,
) -> None:
    """The step of this process's shards, skipped where `found_inf` is 1 in any process."""
    params, grads, exp_avgs, exp_avg_sqs, steps = columns
    lr, flag, grad_scale, clip = map(_shards.local_of, scalars)
    if flag is None:
        flag = found_inf(grads, grad_scale=grad_scale, clip=clip, backend=backend)
    written = {
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        **{f"averages[{k}]": average for k, average in enumerate(averages)},
    }
    local_params, local_m, local_v, *rest = _shards.local_rows(
        "adam_ema_", params, written, {"grads": grads}
    )
    *local_averages, local_grads = rest
    beta1, beta2, eps, weight_decay, decoupled = options
    adam_ema_(
        local_params,
        local_grads,
        local_m,
        local_v,
        [_shards.local_of(step) for step in steps],
        local_averages,
        _shards.local_of(decays),
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        grad_scale=grad_scale,
        clip=clip,
        found_inf=flag,
        skipped=_shards.local_of(skipped),
        backend=backend,
    )
    flat = [avg for average in averages for avg in average]
    _modes.written([*params, *exp_avgs, *exp_avg_sqs, *flat])


def _pair(betas: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"adam_ema_: betas must be a pair of numbers, got {kind_of(betas)}")
    return betas[0], betas[1]


def _checked_numbers(
    lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Tensor:
    """lr as a tensor; the numbers' values have been looked at where no device is waited for."""
    for name, value, end in (
        ("betas[0]", beta1, 1),
        ("betas[1]", beta2, 1),
        ("eps", eps, math.inf),
        ("weight_decay", weight_decay, math.inf),
    ):
        try:
            inside = 0 <= value < end
        except TypeError:
            check_number("adam_ema_", name, value)
            raise
        if not inside:
            raise ValueError(f"adam_ema_: {name} must be in [0, {end}), got {value}")
    if isinstance(lr, Tensor):
        if _modes.can_check_values(lr) and lr.numel() == 1 and not 0 <= lr.item() < math.inf:
            raise ValueError(f"adam_ema_: lr must be in [0, inf), got {lr.item()}")
        return lr
    try:
        inside = 0 <= lr < math.inf
    except TypeError:
        check_number("adam_ema_", "lr", lr)
        raise
    if not inside:
        raise ValueError(f"adam_ema_: lr must be in [0, inf), got {lr}")
    return torch.tensor(lr, dtype=torch.float64, device="cpu")


def _check_lists(params, grads, exp_avgs, exp_avg_sqs, steps, averages) -> None:
    """Refuse what is no list, before anything looks into it."""
    columns = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "averages": averages,
    }
    if isinstance(averages, list | tuple):
        columns |= {f"averages[{k}]": average for k, average in enumerate(averages)}
    for name, column in columns.items():
        if not isinstance(column, list | tuple):
            raise ValueError(f"adam_ema_: {name} must be a list or tuple, got {kind_of(column)}")


def _check_grads(grads: Sequence[Tensor], grad_scale: Tensor | None, clip: Tensor | None) -> None:
    check_tensors("found_inf", "grads", grads)
    if not grads:
        raise ValueError("found_inf: grads must hold at least one tensor")
    for i, grad in enumerate(grads):
        if grad.dtype not in FLOATS:
            raise ValueError(f"found_inf: grads[{i}] must be {FLOAT_NAMES}, got {grad.dtype}")
        if grad.device != grads[0].device:
            raise ValueError(
                f"found_inf: grads[{i}] must be on {grads[0].device} as grads[0] is, got "
                f"{grad.device}"
            )
    for name, scalar in (("grad_scale", grad_scale), ("clip", clip)):
        _check_scalar("found_inf", name, scalar, grads[0].device)


def _check_scalar(op: str, name: str, scalar: Tensor | None, device: torch.device) -> None:
    if scalar is None:
        return
    check_tensor(op, name, scalar)
    if scalar.numel() != 1 or scalar.dtype not in WIDE:
        raise ValueError(
            f"{op}: {name} must be one float32 or float64, got {scalar.dtype} of shape "
            f"{list(scalar.shape)}"
        )
    if scalar.device != device and scalar.device.type != "cpu":
        raise ValueError(f"{op}: {name} must be on {device}, got {scalar.device}")


def _check(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    averages,
    decays: Tensor,
    scalars: tuple,
    skipped: Tensor | None,
) -> None:
    _check_lists(params, grads, exp_avgs, exp_avg_sqs, steps, averages)
    check_one_decay_each("adam_ema_", averages, decays)
    device = params[0].device if params else decays.device
    if device.type == "cuda" and len(averages) > 16:
        raise ValueError(f"adam_ema_: on CUDA at most 16 averages, got {len(averages)}")
    columns = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    columns |= {f"averages[{k}]": average for k, average in enumerate(averages)}
    for name, column in {**columns, "steps": steps}.items():
        if len(column) != len(params):
            raise ValueError(
                f"adam_ema_: {name} must hold {len(params)} tensors, one for each parameter, got "
                f"{len(column)}"
            )
        check_tensors("adam_ema_", name, column)
    _check_rows(columns, steps, device)
    _check_scalars(decays, scalars, skipped, device)
    written = {name: column for name, column in columns.items() if name != "grads"}
    refuse_overlap("adam_ema_", {**written, "steps": steps}, {"grads": grads})


def _check_rows(
    columns: dict[str, Sequence[Tensor]], steps: Sequence[Tensor], device: torch.device
) -> None:
    """Refuse a parameter's tensors that do not belong together."""
    for i, param in enumerate(columns["params"]):
        for name, column in columns.items():
            tensor = column[i]
            if tensor.shape != param.shape:
                raise ValueError(
                    f"adam_ema_: {name}[{i}] must have params[{i}]'s shape {list(param.shape)}, "
                    f"got {list(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"adam_ema_: {name}[{i}] must be on {device}, got {tensor.device}")
            dtype = columns["averages[0]"][i].dtype if name.startswith("averages") else param.dtype
            if tensor.dtype != dtype or (param.dtype, dtype) not in STORAGE_PAIRS:
                raise ValueError(
                    f"adam_ema_: {name}[{i}] must have params[{i}]'s dtype, {FLOAT_NAMES}, or all "
                    "averages of a "
                    f"bfloat16 or float16 parameter float32; got {tensor.dtype} beside "
                    f"{param.dtype}"
                )
        step = steps[i]
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != device:
            raise ValueError(
                f"adam_ema_: steps[{i}] must be one float32 on {device}, got {step.dtype} of shape "
                f"{list(step.shape)} on {step.device}"
            )


def _check_scalars(
    decays: Tensor, scalars: tuple, skipped: Tensor | None, device: torch.device
) -> None:
    for name, scalar in zip(("lr", "found_inf", "grad_scale", "clip"), scalars, strict=True):
        _check_scalar("adam_ema_", name, scalar, device)
    found_inf = scalars[1]
    for name, scalar in (("found_inf", found_inf), ("decays", decays)):
        needed = name == "found_inf" or scalar.device.type != "cpu"
        if scalar is not None and needed and scalar.device != device:
            raise ValueError(f"adam_ema_: {name} must be on {device}, got {scalar.device}")
    if skipped is None:
        return
    check_tensor("adam_ema_", "skipped", skipped)
    if skipped.numel() != 1 or skipped.dtype != torch.int64 or skipped.device != device:
        raise ValueError(
            f"adam_ema_: skipped must be one int64 on {device}, got {skipped.dtype} of shape "
            f"{list(skipped.shape)} on {skipped.device}"
        )


def _fake_found_inf(grads, grad_scale, clip):
    _check_grads(grads, grad_scale, clip)  # a tensor on "meta" brings an eager call here too
    return grads[0].new_empty((), dtype=torch.float32)


def _fake_adam(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    averages,
    decays,
    lr,
    found_inf,
    grad_scale,
    clip,
    skipped,
    *_,
):
    scalars = (lr, found_inf, grad_scale, clip)
    _check(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lists_of(averages, params),
        decays,
        scalars,
        skipped,
    )


def _reference_adam(params, grads, exp_avgs, exp_avg_sqs, steps, averages, *rest):
    reference.adam_ema_(
        params, grads, exp_avgs, exp_avg_sqs, steps, lists_of(averages, params), *rest
    )


_backends.define("found_inf", _fake_found_inf, reference.found_inf)
_backends.define("adam_ema_", _fake_adam, _reference_adam)
