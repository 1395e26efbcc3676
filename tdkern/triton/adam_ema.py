"""adam_ema_ in Triton: for each parameter a launch for its step and one for its averages. Whether it is skipped is read on the device."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _library
from .ema_update import BLOCK, ema_kernel
from .lists import flat


@triton.jit
def finite_kernel(grad, found, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.load(grad + i, i < n, other=0.0).to(tl.float32) * 0  # NaN where an element is not finite
    if grad.dtype.element_ty == tl.float64:
        zero = tl.load(grad + i, i < n, other=0.0) * 0
    if tl.sum((zero != 0).to(tl.int32)) > 0:
        tl.store(found, 1.0)


# s: AdamStep of adam_math.h, in float64.
@triton.jit
def adam_kernel(grad, exp_avg, exp_avg_sq, param, s, skip, n, BLOCK: tl.constexpr):
    T: tl.constexpr = tl.float64 if param.dtype.element_ty == tl.float64 else tl.float32
    grad_factor, shrink, weight_decay = tl.load(s).to(T), tl.load(s + 1).to(T), tl.load(s + 2).to(T)
    weight1, beta2, weight2 = tl.load(s + 3).to(T), tl.load(s + 4).to(T), tl.load(s + 5).to(T)
    correction2, eps, step_size = tl.load(s + 6).to(T), tl.load(s + 7).to(T), tl.load(s + 8).to(T)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n * (1 - tl.load(skip))
    g, p = tl.load(grad + i, inside, other=0.0).to(T), tl.load(param + i, inside, other=0.0).to(T)
    m, v = tl.load(exp_avg + i, inside, other=0.0).to(T), tl.load(exp_avg_sq + i, inside, other=0.0).to(T)
    g = g * grad_factor
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    m = m + weight1 * (g - m)
    v = v * beta2 + weight2 * g * g
    p = p * shrink - step_size * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(exp_avg + i, m.to(exp_avg.dtype.element_ty), inside)
    tl.store(exp_avg_sq + i, v.to(exp_avg_sq.dtype.element_ty), inside)
    tl.store(param + i, p.to(param.dtype.element_ty), inside)


def found_inf(grads):
    found = grads[0].new_zeros((), dtype=torch.float32)
    with torch.cuda.device_of(found):
        for grad in grads:
            if grad.numel() > 0:
                with flat([grad]) as (grad,):
                    finite_kernel[(triton.cdiv(grad.numel(), BLOCK),)](grad, found, grad.numel(), BLOCK)
    return found


def adam_ema_(params, grads, exp_avgs, exp_avg_sqs, steps, averages, decays, lr, found_inf, grad_scale, clip, skipped, beta1, beta2, eps, weight_decay,
              decoupled):
    if not params:
        return
    device = params[0].device
    on_device = lambda scalar: scalar.to(device, torch.float64, non_blocking=True).reshape(())  # noqa: E731
    lr, decays = on_device(lr), decays.double().contiguous().to(device, non_blocking=True)
    one = torch.ones_like(lr)
    factor = (one if clip is None else on_device(clip)) / (one if grad_scale is None else on_device(grad_scale))
    skip = (found_inf.reshape(()) != 0) | ~factor.isfinite()
    if skipped is not None:
        skipped += skip.view_as(skipped)
    torch._foreach_add_(steps, (~skip).float())
    step = torch.stack([count.reshape(()) for count in steps]).double()
    shrink = 1 - lr * weight_decay if decoupled else 1.0
    values = (factor, shrink, 0.0 if decoupled else weight_decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step).sqrt(), eps, lr / (1 - beta1**step))
    constants = step.new_empty(len(params), len(values))
    for column, value in zip(constants.unbind(1), values, strict=True):
        column.copy_(value) if isinstance(value, Tensor) else column.fill_(value)
    flag = skip.to(torch.int32)
    with torch.cuda.device_of(flag):
        for i, tensors in enumerate(zip(grads, exp_avgs, exp_avg_sqs, params, strict=True)):
            n = tensors[0].numel()
            if n == 0:
                continue
            with flat([*tensors, *averages[i :: len(params)]]) as (grad, exp_avg, exp_avg_sq, param, *row):
                grid = (triton.cdiv(n, BLOCK),)
                adam_kernel[grid](grad, exp_avg, exp_avg_sq, param, constants[i], flag, n, BLOCK)
                if row:
                    ema_kernel[grid](param, tuple(row), decays, flag, n, BLOCK)


_library.library.impl("found_inf.triton", found_inf, _library.triton_key())
_library.library.impl("adam_ema_.triton", adam_ema_, _library.triton_key())
