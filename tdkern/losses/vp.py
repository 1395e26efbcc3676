"""The VP SDE's denoising loss, alone and with a temporal-difference term in continuous time."""

from dataclasses import dataclass

from ..schedules import VP
from .path import PathLoss, TDTimeLoss


@dataclass(frozen=True)
class VPLoss(PathLoss):
    """VP's denoising loss, in which F predicts eps: t uniform in [epsilon_t, 1].

    loss = mean((x0 - D)^2) / sigma_hat(t)^2  (arXiv 2011.13456, as EDM has it in 2206.00364,
    table 1). The fused path is that of `VPPrecond`; `PathLoss` says how it is called.

    Args:
        beta_d, beta_min, epsilon_t: of `schedules.VP`.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    prediction = "eps"

    @property
    def schedule(self) -> VP:
        return VP(self.beta_d, self.beta_min, self.epsilon_t)


@dataclass(frozen=True)
class TDVPLoss(TDTimeLoss, VPLoss):
    """VP's loss with TD; docs/families.md has what each coupling does."""
