"""ema_update_ in Triton: one launch per parameter, one program per block of it and its averages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import _backends
from .lists import flat, on_device

BLOCK = 2048  # elements of a program; float64 has half as many, which registers hold


@triton.jit
def ema_element(avg, param, weight):
    """lerp from the nearer end, as torch.lerp does; a weight of 1 copies; where the parameter is
    not finite, the average as it is (ema_update_math.h).
    """
    change = param - avg
    average = tl.where(weight < 0.5, avg + weight * change, param - (1 - weight) * change)
    return tl.where(param - param == 0, tl.where(weight == 1, param, average), avg)


@triton.jit
def update_averages(averages, decays, value, i, inside, T: tl.constexpr):
    """The averages of a block of one parameter; value: the parameter, already in its storage
    dtype.
    """
    for k in tl.static_range(len(averages)):
        avg = averages[k] + i
        new = ema_element(tl.load(avg, inside).to(T), value.to(T), (1 - tl.load(decays + k)).to(T))
        tl.store(avg, new.to(averages[k].dtype.element_ty), inside)


@triton.jit
def ema_kernel(param, averages, decays, n, BLOCK: tl.constexpr):
    T: tl.constexpr = tl.float64 if averages[0].dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    update_averages(averages, decays, tl.load(param + i, inside), i, inside, T)


def block_of(param: Tensor) -> int:
    return BLOCK // 2 if param.dtype == torch.float64 else BLOCK


def ema_update_(averages, params, decays):
    if not averages:
        return
    decays = on_device(decays, params[0].device)
    with torch.cuda.device_of(params[0]):
        for i, param in enumerate(params):
            if param.numel() > 0:
                with flat([param, *averages[i :: len(params)]]) as (param, *row):
                    block = block_of(param)
                    ema_kernel[(triton.cdiv(param.numel(), block),)](
                        param, tuple(row), decays, param.numel(), block
                    )


_backends.library.impl("ema_update_.triton", ema_update_, _backends.triton_key())
