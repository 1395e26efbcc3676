"""Adam as its papers write it, one tensor at a time, then the averages. Nothing here depends on a
tensor's value but by arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ema_update import ema_update_


def found_inf(grads: Sequence[Tensor], grad_scale: Tensor | None, clip: Tensor | None) -> Tensor:
    """1 where the square of any element of any gradient, as the second moment is stored, is not
    finite, else 0."""
    device = grads[0].device
    factor = _number(clip, device) / _number(grad_scale, device)
    finite = []
    for grad in grads:
        dtype = _arithmetic(grad)
        g = grad.to(dtype) * factor.to(dtype)
        finite.append((g * g).to(grad.dtype).isfinite().all())
    return (~torch.stack(finite)).any().float()


def adam_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]],
    decays: Tensor,
    lr: Tensor,
    found_inf: Tensor,
    grad_scale: Tensor | None,
    clip: Tensor | None,
    skipped: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One step: gradients times clip / grad_scale, Adam or AdamW, averages of the new parameters;
    or nothing but skipped + 1."""
    if not params:
        return
    device = params[0].device
    lr, factor = _number(lr, device), _number(clip, device) / _number(grad_scale, device)
    skip = (found_inf.reshape(()) != 0) | ~factor.isfinite()
    if skipped is not None:
        skipped.add_(skip.to(torch.int64).reshape(skipped.shape))
    for param, grad, exp_avg, exp_avg_sq, step in zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, strict=True
    ):
        dtype = _arithmetic(param)
        t = step.reshape(()).double() + 1
        shrink = 1 - lr * weight_decay if decoupled else torch.ones_like(lr)
        step_size, root = lr / (1 - beta1**t), (1 - beta2**t).sqrt()

        p, m, v, g = (tensor.to(dtype) for tensor in (param, exp_avg, exp_avg_sq, grad))
        g = g * factor.to(dtype)
        if not decoupled:
            g = g + weight_decay * p
        m = m.lerp(g, 1 - beta1)
        v = beta2 * v + (1 - beta2) * g * g
        p = p * shrink.to(dtype) - step_size.to(dtype) * m / (v.sqrt() / root.to(dtype) + eps)

        for tensor, new in (
            (param, p),
            (exp_avg, m),
            (exp_avg_sq, v),
            (step, t.reshape(step.shape)),
        ):
            tensor.copy_(torch.where(skip, tensor, new.to(tensor.dtype)))
    new_averages = [[avg.clone() for avg in average] for average in averages]
    ema_update_(new_averages, params, decays)
    for average, new_average in zip(averages, new_averages, strict=True):
        for avg, new in zip(average, new_average, strict=True):
            avg.copy_(torch.where(skip, avg, new))


def _number(scalar: Tensor | None, device: torch.device) -> Tensor:
    """In float64 on the device; 1 for None."""
    if scalar is None:
        return torch.ones((), dtype=torch.float64, device=device)
    return scalar.reshape(()).to(device, torch.float64)


def _arithmetic(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
