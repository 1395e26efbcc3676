"""The VE SDE's denoising loss, alone and with a temporal-difference term in continuous time."""
from dataclasses import dataclass

from ..schedules import VE
from .path import PathLoss, TDTimeLoss


@dataclass(frozen=True)
class VELoss(PathLoss):
    """VE's denoising loss, in which F predicts -eps: ln sigma uniform between sigma_min and sigma_max, loss = mean((x0 - D)^2) / sigma^2.

    (arXiv 2011.13456, as EDM has it in 2206.00364, table 1; `schedules.VE`.) `loss(net, target_net, images, labels=None, augment_pipe=None) ->
    [B]`, a mean over each sample's elements; `target_net` is not used and may be None. The fused path is that of `VEPrecond`.

    Args:
        sigma_min, sigma_max: of the schedule.
        backend: of the ops, as in `td_loss`.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: t, then the noise's seed.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    prediction = "score"

    @property
    def schedule(self) -> VE:
        return VE(self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class TDVELoss(TDTimeLoss, VELoss):
    """VE's loss with a temporal-difference term in continuous time.

    Levels fall by one factor a step, so A' = A and r = 1: delta = A (D' - D), in which x0 cancels, and the target of D is D' itself.

    Coupling: with "markov" the target is unbiased and has at most .63 of the baseline's variance; with "shared", which is consistency training,
    its slope is off by +17, +39, +56 and +62 % at sigma .5, 1, 2 and 4 (Gaussian data of standard deviation 0.5, default steps).

    `TDPathLoss` has the equations and the arguments `lambda_base`, `coupling`, `eta`, `weight`; `TDTimeLoss` `steps`, `k_idx`, `one_idx`;
    `VELoss` the schedule and the rest. `target_net` is needed.
    """
