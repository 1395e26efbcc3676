"""`adam_ema_`: a step of Adam or AdamW and the averages of the parameters, in one pass; nothing at all if a gradient is not finite."""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library, reference
from .ema_update import DTYPES, checked_decays, lists_of


def found_inf(grads: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Whether any element of any of the gradients is infinite or NaN: a float32 scalar on their device, 1 or 0; GradScaler's name for it.

    Args:
        grads: tensors of any shapes and strides, on one device, at least one. float32, float64, bfloat16 or float16, also mixed.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Raises:
        ValueError: no gradients, or the wrong dtype or device. RuntimeError: no such backend here.

    Deterministic. No host synchronisation.
    """
    if not grads:
        raise ValueError("found_inf: grads must hold at least one tensor")
    backend = _library.resolve("found_inf", backend, grads[0].device)
    if backend not in ("cpp", "cuda"):
        _check_grads(grads)
    with torch.no_grad():
        if backend == "reference":
            return reference.found_inf(grads)
        try:
            return _library.op("found_inf", backend)(grads)
        except RuntimeError:
            _check_grads(grads)
            raise


_found_inf = found_inf  # adam_ema_'s argument has the op's name


def adam_ema_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor],
              averages: Sequence[Sequence[Tensor]] = (), decays: Sequence[float] | Tensor = (), *, lr: float | Tensor,
              betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = True,
              grad_scale: Tensor | None = None, clip: Tensor | None = None, found_inf: Tensor | None = None,
              skipped: Tensor | None = None, backend: str = "auto") -> None:
    """One step of AdamW (arXiv 1711.05101) or Adam (arXiv 1412.6980), and the averages of the new parameters, in place.

    g = grad clip / grad_scale;  decoupled: p <- (1 - lr weight_decay) p, else g <- g + weight_decay p;
    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  p <- p - lr/(1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps);
    average_k <- decay_k average_k + (1 - decay_k) p, as `ema_update_`. The C++ backend rounds where torch.optim.Adam(foreach=False) does,
    so float32 and float64 give its bits, up to the square root, which torch's own (MKL's) does not always round correctly.
    If any gradient is not finite, or clip / grad_scale is not, nothing changes but `skipped`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: P tensors each; those of one parameter have its shape, device and dtype (float32, float64,
            bfloat16 or float16). Best where they lie in memory alike: others go through copies. Half precision is computed in float32.
        steps: P float32 scalars on the parameters' device, one tensor each: the count of a parameter's steps, increased by 1.
        averages, decays: as for `ema_update_`; on CUDA at most 16.
        lr: learning rate >= 0. A tensor is a float32 or float64 scalar, as are grad_scale and clip: on the CPU, read during the call, or
            on the parameters' device, where a CUDA graph reads it anew at each replay and nothing checks its range.
        betas, eps, weight_decay: as torch.optim.Adam's; betas in [0, 1), the others >= 0.
        decoupled: AdamW, else Adam.
        grad_scale: what the loss was multiplied by (GradScaler), or None.
        clip: a factor of every gradient, such as min(1, max_norm / norm), or None.
        found_inf: not 0 where a gradient is not finite, a float32 scalar on the parameters' device; None: the gradients are looked at.
        skipped: an int64 scalar on the parameters' device, increased by 1 if the step is skipped; or None.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Raises:
        ValueError: an argument has the wrong length, shape, dtype, device or range, or names nothing. RuntimeError: no such backend here.

    No gradient. Deterministic: every element by itself. No host synchronisation, except in the reference.
    """
    backend = _library.resolve("adam_ema_", backend, params[0].device if params else torch.device("cpu"))
    decays = checked_decays("adam_ema_", decays)
    for name, value, end in (("betas[0]", betas[0], 1), ("betas[1]", betas[1], 1), ("eps", eps, math.inf), ("weight_decay", weight_decay, math.inf)):
        if not 0 <= value < end:
            raise ValueError(f"adam_ema_: {name} must be in [0, {end}), got {value}")
    if not isinstance(lr, Tensor):
        lr = torch.tensor(lr, dtype=torch.float64)
    if _library.readable(lr) and lr.numel() == 1 and not 0 <= lr.item() < math.inf:
        raise ValueError(f"adam_ema_: lr must be in [0, inf), got {lr.item()}")
    columns = (params, grads, exp_avgs, exp_avg_sqs, steps)
    scalars = {"lr": lr, "found_inf": found_inf, "grad_scale": grad_scale, "clip": clip}
    lengths = len(averages) == decays.numel() and len(grads) == len(params)
    if backend not in ("cpp", "cuda") or not lengths or torch.compiler.is_compiling():  # these two check for themselves
        _check(*columns, averages, decays, scalars, skipped)
    if not params:
        return
    with torch.no_grad():
        try:
            flag = _found_inf(grads, backend=backend) if found_inf is None else found_inf
            rest = (decays, lr, flag, grad_scale, clip, skipped, *betas, eps, weight_decay, decoupled)
            if backend == "reference":
                return reference.adam_ema_(*columns, averages, *rest)
            flat = [avg for average in averages for avg in average]
            _library.op("adam_ema_", backend)(*columns, flat, *rest)
        except (RuntimeError, ValueError):
            _check(*columns, averages, decays, scalars, skipped)  # says in full which argument is wrong
            raise
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *flat])  # autograd notices a write to what it saved


def _check_grads(grads: Sequence[Tensor]) -> None:
    for i, grad in enumerate(grads):
        if (grad.dtype, grad.dtype) not in DTYPES:
            raise ValueError(f"found_inf: grads[{i}] must be float32, float64, bfloat16 or float16, got {grad.dtype}")
        if grad.device != grads[0].device:
            raise ValueError(f"found_inf: grads[{i}] must be on {grads[0].device} as grads[0] is, got {grad.device}")


def _check(params, grads, exp_avgs, exp_avg_sqs, steps, averages, decays: Tensor, scalars: dict[str, Tensor | None], skipped: Tensor | None) -> None:
    if decays.ndim != 1 or decays.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"adam_ema_: decays must be float32 or float64 of shape [K], got {decays.dtype} of shape {list(decays.shape)}")
    if len(averages) != len(decays):
        raise ValueError(f"adam_ema_: decays must hold one decay for each of the {len(averages)} averages, got {len(decays)}")
    device = params[0].device if params else decays.device
    if device.type == "cuda" and len(averages) > 16:
        raise ValueError(f"adam_ema_: on CUDA at most 16 averages, got {len(averages)}")
    columns = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    columns |= {f"averages[{k}]": average for k, average in enumerate(averages)}
    for name, column in {**columns, "steps": steps}.items():
        if len(column) != len(params):
            raise ValueError(f"adam_ema_: {name} must hold {len(params)} tensors, one for each parameter, got {len(column)}")
    for i, param in enumerate(params):
        for name, column in columns.items():
            tensor = column[i]
            if tensor.shape != param.shape:
                raise ValueError(f"adam_ema_: {name}[{i}] must have params[{i}]'s shape {list(param.shape)}, got {list(tensor.shape)}")
            if tensor.device != device:
                raise ValueError(f"adam_ema_: {name}[{i}] must be on {device}, got {tensor.device}")
            dtype = averages[0][i].dtype if name.startswith("averages") else param.dtype
            if tensor.dtype != dtype or (param.dtype, dtype) not in DTYPES:
                raise ValueError(f"adam_ema_: {name}[{i}] must have params[{i}]'s dtype, float32, float64, bfloat16 or float16, or all averages of a "
                                 f"bfloat16 or float16 parameter float32; got {tensor.dtype} beside {param.dtype}")
        step = steps[i]
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != device:
            raise ValueError(f"adam_ema_: steps[{i}] must be one float32 on {device}, got {step.dtype} of shape {list(step.shape)} on {step.device}")
    for name, scalar in {**scalars, "decays": decays}.items():
        if scalar is None:
            continue
        if name != "decays" and (scalar.numel() != 1 or scalar.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"adam_ema_: {name} must be one float32 or float64, got {scalar.dtype} of shape {list(scalar.shape)}")
        if scalar.device != device and (name == "found_inf" or scalar.device.type != "cpu"):
            raise ValueError(f"adam_ema_: {name} must be on {device}, got {scalar.device}")
    if skipped is not None and (skipped.numel() != 1 or skipped.dtype != torch.int64 or skipped.device != device):
        raise ValueError(f"adam_ema_: skipped must be one int64 on {device}, got {skipped.dtype} of shape {list(skipped.shape)} on {skipped.device}")


def _fake_found_inf(grads):
    _check_grads(grads)  # a tensor on "meta" brings an eager call here too
    return grads[0].new_empty((), dtype=torch.float32)


def _fake_adam(params, grads, exp_avgs, exp_avg_sqs, steps, averages, decays, lr, found_inf, grad_scale, clip, skipped, *_):
    scalars = {"lr": lr, "found_inf": found_inf, "grad_scale": grad_scale, "clip": clip}
    _check(params, grads, exp_avgs, exp_avg_sqs, steps, lists_of(averages, params), decays, scalars, skipped)


_library.define("found_inf", "(Tensor[] grads) -> Tensor", _fake_found_inf)
_library.define("adam_ema_", "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
                "Tensor(e!)[] averages, Tensor decays, Tensor lr, Tensor found_inf, Tensor? grad_scale, Tensor? clip, Tensor(f!)? skipped, "
                "float beta1, float beta2, float eps, float weight_decay, bool decoupled) -> ()", _fake_adam)
