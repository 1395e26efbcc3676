"""Averages of a parameter list in plain PyTorch, one average and one tensor at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update_(
    averages: Sequence[Sequence[Tensor]], params: Sequence[Tensor], decays: Tensor
) -> None:
    """Every average k becomes lerp(average, parameter, 1 - decay_k), or with decay 0 the parameter,
    whatever the average held.

    An element of the parameter that is not finite leaves the average's as it is.
    """
    for average, decay in zip(averages, decays.double().unbind(), strict=True):
        for avg, param in zip(average, params, strict=True):
            dtype = torch.float64 if avg.dtype == torch.float64 else torch.float32
            decay = decay.to(avg.device)
            new = torch.lerp(avg.to(dtype), param.to(dtype), (1 - decay).to(dtype))
            new = torch.where(decay == 0, param.to(dtype), new)
            avg.copy_(torch.where(param.isfinite(), new, avg))
