"""The VE SDE's denoising loss, alone and with a temporal-difference term in continuous time."""

from dataclasses import dataclass

from ..schedules import VE
from .path import PathLoss, TDTimeLoss


@dataclass(frozen=True)
class VELoss(PathLoss):
    """VE's denoising loss, in which F predicts -eps: ln sigma uniform from sigma_min to sigma_max.

    loss = mean((x0 - D)^2) / sigma^2  (arXiv 2011.13456, as EDM has it in 2206.00364, table 1).
    The fused path is that of `VEPrecond`; `PathLoss` says how it is called.

    Args:
        sigma_min, sigma_max: of `schedules.VE`.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    prediction = "score"

    @property
    def schedule(self) -> VE:
        return VE(self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class TDVELoss(TDTimeLoss, VELoss):
    """VE's loss with TD; docs/families.md has what each coupling does."""
