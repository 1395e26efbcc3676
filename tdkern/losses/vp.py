"""The VP SDE's denoising loss, alone and with a temporal-difference term in continuous time."""
from dataclasses import dataclass

from ..schedules import VP
from .path import PathLoss, TDTimeLoss


@dataclass(frozen=True)
class VPLoss(PathLoss):
    """VP's denoising loss, in which F predicts eps: t uniform in [epsilon_t, 1], loss = mean((x0 - D)^2) / sigma_hat(t)^2.

    (arXiv 2011.13456, as EDM has it in 2206.00364, table 1; `schedules.VP`.) `loss(net, target_net, images, labels=None, augment_pipe=None) ->
    [B]`, a mean over each sample's elements; `target_net` is not used and may be None. The fused path is that of `VPPrecond`.

    Args:
        beta_d, beta_min, epsilon_t: of the schedule.
        backend: of the ops, as in `td_loss`.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: t, then the noise's seed.
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
    """VP's loss with a temporal-difference term in continuous time.

    Coupling: with "markov" the target is unbiased and has .07 to .69 of the baseline's variance (r from 1.2 to 1.65); with "shared" its slope is
    off by +30, +34, +37 and +45 % at sigma_hat .5, 1, 2 and 4 (Gaussian data of standard deviation 0.5, default steps).

    `TDPathLoss` has the equations and the arguments `lambda_base`, `coupling`, `eta`, `weight`; `TDTimeLoss` `steps`, `k_idx`, `one_idx`;
    `VPLoss` the schedule and the rest. `target_net` is needed.
    """
