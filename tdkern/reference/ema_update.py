"""Averages of a parameter list in plain PyTorch, one average and one tensor at a time."""
import torch
from torch import Tensor


def ema_update_(averages: list[list[Tensor]], params: list[Tensor], decays: Tensor) -> None:
    """Every average k becomes lerp(average, parameter, 1 - decay_k), except where the parameter is not finite."""
    for average, decay in zip(averages, decays.double().unbind(), strict=True):
        for avg, param in zip(average, params, strict=True):
            dtype = torch.float64 if avg.dtype == torch.float64 else torch.float32
            new = torch.lerp(avg.to(dtype), param.to(dtype), (1 - decay).to(avg.device, dtype))
            avg.copy_(torch.where(param.isfinite(), new, avg))
