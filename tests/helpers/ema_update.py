"""Lists for ema_update_, what they become by the definition, and how near an op has to be."""

import math

import torch

from helpers.cases import DTYPES, channels_last, gaps, offset, swapped
from tdkern.ops import _backends

SHAPES = [(5, 7), (1,), (), (0,), (2, 3, 4, 5), (3, 0, 2), (8193,), (16,), (64, 3, 3, 3)]
DECAYS = [0.999, 0.3, 0.0, 1.0, 0.75]
LIE = {
    "contiguous": (torch.Tensor.contiguous, torch.Tensor.contiguous),
    "misaligned": (offset, offset),
    "one misaligned": (offset, torch.Tensor.contiguous),
}
LIE_4D = {
    "channels_last": (channels_last, channels_last),
    "swapped": (swapped, swapped),
    "parameter channels_last": (channels_last, torch.Tensor.contiguous),
    "averages gaps": (torch.Tensor.contiguous, gaps),
    "both gaps": (gaps, gaps),
    "one of both": (swapped, channels_last),
}


def lists(dtypes, device, K=3, shapes=SHAPES, lie=(torch.Tensor.contiguous,) * 2, seed=0):
    """(averages, params): some elements of the parameters are not finite."""
    random = torch.Generator().manual_seed(seed)
    net, wide = DTYPES[dtypes]
    draw = lambda shape: torch.randn(shape, generator=random, dtype=torch.float64)
    params = [draw(shape) for shape in shapes]
    for i, param in enumerate(params):
        if param.numel() > 4:
            param.view(-1)[i % 5 :: 11] = (math.nan, math.inf, -math.inf)[i % 3]
    averages = [[lie[1](draw(shape).to(device, wide)) for shape in shapes] for _ in range(K)]
    return averages, [lie[0](param.to(device, net)).requires_grad_() for param in params]


def oracle(averages, params, decays):
    """The new averages in float64, by the definition."""

    def new(avg, param, decay):
        avg, param = avg.detach().double().cpu(), param.detach().double().cpu()
        return torch.where(param.isfinite(), decay * avg + (1 - decay) * param, avg)

    return [
        [new(avg, param, decay) for avg, param in zip(average, params, strict=True)]
        for average, decay in zip(averages, decays, strict=True)
    ]


def check(averages, expected, backend):
    for average, wanted in zip(averages, expected, strict=True):
        for avg, want in zip(average, wanted, strict=True):
            eps = torch.finfo(avg.dtype).eps
            if backend == "triton" and _backends.interpreted() and avg.dtype == torch.bfloat16:
                eps *= 2  # the interpreter cuts off instead of rounding
            torch.testing.assert_close(
                avg.double().cpu(),
                want,
                rtol=eps,
                atol=4 * eps if avg.dtype in (torch.float32, torch.float64) else eps / 1000,
            )
