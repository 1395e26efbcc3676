"""Flow matching's loss, alone and with a temporal-difference term in continuous time."""

from dataclasses import dataclass

from ..schedules import FlowMatching
from .path import PathLoss, TDTimeLoss


@dataclass(frozen=True)
class FlowLoss(PathLoss):
    """Flow matching on the straight path x_t = (1 - t) x0 + t eps: t uniform in [t_min, t_max].

    loss = mean((eps - x0 - F)^2), F the velocity  (arXiv 2210.02747, 2209.03003). The fused path is
    that of `Denoiser(module, "velocity")`; `PathLoss` says how it is called.

    Args:
        t_min, t_max: of `schedules.FlowMatching`, 0 < t_min < t_max <= 1.
        shift: of the same, above 0.
    """

    t_min: float = 1e-3
    t_max: float = 0.999
    shift: float = 1.0

    prediction = "velocity"

    @property
    def schedule(self) -> FlowMatching:
        return FlowMatching(self.t_min, self.t_max, self.shift)


@dataclass(frozen=True)
class TDFlowLoss(TDTimeLoss, FlowLoss):
    """Flow matching's loss with TD, which is ours; docs/families.md has its equations."""
