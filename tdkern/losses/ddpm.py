"""DDPM's and DDIM's loss over discrete times, alone and with a temporal-difference term, TD(k)."""
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _library
from ..schedules import DDPM
from .path import PathLoss, TDPathLoss

PREDICTIONS = ("eps", "x0", "v")
TERMINALS = ("mean", "simple")


@dataclass(frozen=True)
class DDPMLoss(PathLoss):
    """DDPM's simple loss: t uniform in 1 .. T, loss = mean((F* - F)^2), F* the eps, x0 or v that the network predicts.

    (arXiv 2006.11239, eq. 14; 2202.00512; `schedules.DDPM`.) `loss(net, target_net, images, labels=None, augment_pipe=None) -> [B]`, a mean
    over each sample's elements; `target_net` is not used and may be None. The fused path is that of `Denoiser` with the same prediction,
    and for "eps" of `VPPrecond` and `iDDPMPrecond` too.

    Args:
        T: number of times.
        prediction: "eps", "x0" or "v". It sets the loss's weight; a network of any other kind works through its denoised output.
        beta_schedule: "linear", "cosine" or a tuple of T betas.
        backend: of the ops, as in `td_loss`.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: t, then the noise's seed.
    """

    T: int = 1000
    prediction: str = field(default="eps", kw_only=True)
    beta_schedule: str | tuple[float, ...] = field(default="linear", kw_only=True)

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"{type(self).__name__}: prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        super().__post_init__()

    @property
    def schedule(self) -> DDPM:
        return DDPM(self.T, self.beta_schedule)

    def _time(self, given: Tensor | None, images: Tensor) -> Tensor:
        if given is None:
            return torch.randint(1, self.T + 1, (len(images),), device=images.device).double()
        given = super()._time(given, images)
        if _library.readable(given) and not (given == given.round()).all():
            raise ValueError(f"{type(self).__name__}: t must be whole numbers, got {given[given != given.round()][0].item()}")
        return given


@dataclass(frozen=True)
class TDDDPMLoss(TDPathLoss, DDPMLoss):
    """TD(k) for DDPM and DDIM (arXiv 2606.15048): tau = t - 1, t' = t - k, tau' = t - k - 1; TD(0) is k = 1.

    Where t <= k the whole return is known: the error is A^2 |x0 - D|^2, "mean matching", weighed as a TD term whose A' is 0; with the
    weights "pairwise" and "online" that is the simple loss again. The DDPM loss comes beside both, lambda_base times.

    Coupling (Gaussian data of standard deviation 0.5): with "markov" the target is unbiased. For k = 1 its variance is below the baseline's at every
    t (r from 1.00 to 1.83 with linear betas, 1.89 with cosine); for k > 1 it exceeds it just above t = k, where A' is near 1 and A is not: r is
    2.6 at t = 3 for k = 2, and above 2 from t = 11 to 17 for k = 10, where the variance reaches 2.8 times the baseline's. With "shared" its slope is
    off by +0.4, +0.4, +0.5 and +0.6 % at sigma_hat .5, 1, 2 and 4 for T = 1000 and k = 1, which adds up over the steps, and by +13, +17, +23 and
    +40 % for T = 50, cosine, k = 3.

    `TDPathLoss` has the equations and the arguments `lambda_base`, `coupling`, `eta`, `weight`; `DDPMLoss` the schedule and the rest.
    `target_net` is needed.

    Args:
        k: how many steps lie between x_t and x_t', >= 1.
        terminal: the loss where t <= k, "mean" matching or the "simple" DDPM loss.
    """

    k: int = 1
    terminal: str = field(default="mean", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.k, int) and 1 <= self.k < self.T):
            raise ValueError(f"TDDDPMLoss: k must be a whole number from 1 to T - 1 = {self.T - 1}, got {self.k}")
        if self.terminal not in TERMINALS:
            raise ValueError(f"TDDDPMLoss: terminal must be one of {', '.join(TERMINALS)}, got {self.terminal!r}")

    @property
    def distances(self) -> tuple[float, float]:
        return 1.0, float(self.k)

    @property
    def mean_matching(self) -> bool:
        return self.terminal == "mean"
