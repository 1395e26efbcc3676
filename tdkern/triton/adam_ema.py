"""adam_ema_ in Triton: one launch per parameter, for its step and its averages. Whether it is
skipped is read on the device.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import _backends
from .ema_update import block_of, update_averages
from .lists import flat, on_device


@triton.jit
def adam_kernel(
    grad, exp_avg, exp_avg_sq, param, averages, decays, s, skip, n, BLOCK: tl.constexpr
):
    """One step of a parameter [n] and its averages, unless `skip` [1] is not 0.

    Args:
        grad, exp_avg, exp_avg_sq, param: [n].
        averages: a tuple of [n], or None; decays: [K] float64, theirs.
        s: [9] float64, the numbers of adam_ema_math.h's AdamStep, the last without its minus.
    """
    T: tl.constexpr = tl.float64 if param.dtype.element_ty == tl.float64 else tl.float32
    grad_factor, shrink, weight_decay = tl.load(s).to(T), tl.load(s + 1).to(T), tl.load(s + 2).to(T)
    weight1, beta2, weight2 = tl.load(s + 3).to(T), tl.load(s + 4).to(T), tl.load(s + 5).to(T)
    correction2, eps, step_size = tl.load(s + 6).to(T), tl.load(s + 7).to(T), tl.load(s + 8).to(T)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n * (1 - tl.load(skip))
    g, p = tl.load(grad + i, inside, other=0.0).to(T), tl.load(param + i, inside, other=0.0).to(T)
    m = tl.load(exp_avg + i, inside, other=0.0).to(T)
    v = tl.load(exp_avg_sq + i, inside, other=0.0).to(T)
    g = g * grad_factor
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    m = m + weight1 * (g - m)
    v = v * beta2 + weight2 * g * g
    p = p * shrink - step_size * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(exp_avg + i, m.to(exp_avg.dtype.element_ty), inside)
    tl.store(exp_avg_sq + i, v.to(exp_avg_sq.dtype.element_ty), inside)
    p = p.to(param.dtype.element_ty)
    tl.store(param + i, p, inside)
    if averages is not None:
        update_averages(averages, decays, p, i, inside, T)


def found_inf(grads, grad_scale, clip):
    """By torch's own norms, which look at a list in few launches: the largest element of a tensor
    has its largest square, and one that is NaN is the largest.
    """
    device = grads[0].device
    factor = _grad_factor(grad_scale, clip, device)
    found = torch.zeros((), dtype=torch.bool, device=device)
    for dtype in {grad.dtype for grad in grads}:
        some = [grad for grad in grads if grad.dtype == dtype and grad.numel() > 0]
        if not some:
            continue
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        largest = torch.stack(torch._foreach_norm(some, math.inf)).to(wide) * factor.to(wide)
        found |= ~(largest * largest).to(dtype).isfinite().all()
    return found.float()


def _grad_factor(grad_scale, clip, device):
    """clip / grad_scale, in float64 on the device."""
    one = torch.ones((), dtype=torch.float64, device=device)
    clip, grad_scale = (
        one if scalar is None else on_device(scalar.reshape(()), device)
        for scalar in (clip, grad_scale)
    )
    return clip / grad_scale


def adam_ema_(
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
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled,
):
    if not params:
        return
    device = params[0].device
    lr, decays = on_device(lr.reshape(()), device), on_device(decays, device)
    factor = _grad_factor(grad_scale, clip, device)
    skip = (found_inf.reshape(()) != 0) | ~factor.isfinite()
    if skipped is not None:
        skipped += skip.view_as(skipped)
    counted = (~skip).float()
    # one tensor for all would be waited for
    torch._foreach_add_(steps, [counted.view_as(count) for count in steps])
    constants = _constants(steps, lr, factor, beta1, beta2, eps, weight_decay, decoupled)
    flag = skip.to(torch.int32)
    with torch.cuda.device_of(flag):
        for i, tensors in enumerate(zip(grads, exp_avgs, exp_avg_sqs, params, strict=True)):
            _step([*tensors, *averages[i :: len(params)]], decays, constants[i], flag)


def _constants(
    steps: list[Tensor],
    lr: Tensor,
    factor: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> Tensor:
    """[P, 9] float64: each parameter's AdamStep, as adam_kernel reads it."""
    step = torch.stack([count.reshape(()) for count in steps]).double()
    shrink = 1 - lr * weight_decay if decoupled else 1.0
    values = (
        factor,
        shrink,
        0.0 if decoupled else weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step).sqrt(),
        eps,
        lr / (1 - beta1**step),
    )
    constants = step.new_empty(len(steps), len(values))
    for column, value in zip(constants.unbind(1), values, strict=True):
        column.copy_(value) if isinstance(value, Tensor) else column.fill_(value)
    return constants


def _step(tensors: list[Tensor], decays: Tensor, constants: Tensor, flag: Tensor) -> None:
    """One parameter's launch: its gradient, moments, the parameter itself and its averages."""
    n = tensors[0].numel()
    if n == 0:
        return
    with flat(tensors) as (grad, exp_avg, exp_avg_sq, param, *averages):
        block = block_of(param)
        grid = (triton.cdiv(n, block),)
        row = (tuple(averages) or None, decays, constants, flag, n, block)
        adam_kernel[grid](grad, exp_avg, exp_avg_sq, param, *row)


_backends.library.impl("found_inf.triton", found_inf, _backends.triton_key())
_backends.library.impl("adam_ema_.triton", adam_ema_, _backends.triton_key())
