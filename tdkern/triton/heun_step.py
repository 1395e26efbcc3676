"""heun_step in Triton: one pass over flat arrays."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import _backends

BLOCK = 512  # elements of a program: four of a thread
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton 3.10 turns its default off


@triton.jit
def heun_step_kernel(F, x, coef, x_hat, noise, x_next, net_input, n, BLOCK: tl.constexpr):
    """A block of x_next [n], and of net_input [n] unless it is None; of the op's arguments."""
    D: tl.constexpr = x.dtype.element_ty
    ratio = tl.load(coef + 3) / tl.load(coef)  # h / sigma
    w_x, w_F = 1 + ratio * (1 - tl.load(coef + 1)), -ratio * tl.load(coef + 2)
    if x_hat is not None:
        w_x, w_F = w_x / 2, w_F / 2

    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    state = w_x.to(D) * tl.load(x + i, inside) + w_F.to(D) * tl.load(F + i, inside).to(D)
    if x_hat is not None:
        state += tl.load(x_hat + i, inside) / 2
    if noise is not None:
        state += tl.load(coef + 4).to(D) * tl.load(noise + i, inside)
    tl.store(x_next + i, state, inside)
    if net_input is not None:
        scaled = tl.load(coef + 5).to(D) * state
        if net_input.dtype.element_ty.primitive_bitwidth == 16:
            scaled = scaled.to(tl.float32)  # half precision goes through float, as in torch
        tl.store(net_input + i, scaled.to(net_input.dtype.element_ty), inside)


def _laid_as(tensor: Tensor | None, layout: Tensor) -> Tensor | None:
    """`tensor` if it lies in memory as the dense `layout` does; else a copy that does."""
    if tensor is None or all(
        size <= 1 or a == b
        for size, a, b in zip(layout.shape, tensor.stride(), layout.stride(), strict=True)
    ):
        return tensor
    return torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


def heun_step(F, x, coef, x_hat, noise, net_dtype):
    x_next = torch.empty_like(x)
    net_input = x.new_empty(0) if net_dtype is None else torch.empty_like(x, dtype=net_dtype)
    if x.numel() > 0:
        F, x, x_hat, noise = (_laid_as(tensor, x_next) for tensor in (F, x, x_hat, noise))
        grid, to = (triton.cdiv(x.numel(), BLOCK),), None if net_dtype is None else net_input
        with torch.cuda.device_of(x):
            heun_step_kernel[grid](
                F, x, coef.contiguous(), x_hat, noise, x_next, to, x.numel(), BLOCK, **OPTIONS
            )
    return x_next, net_input


_backends.library.impl("heun_step.triton", heun_step, _backends.triton_key())
