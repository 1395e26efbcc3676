"""What a study needs to know of a family: its losses, its network, how its noise levels are drawn and how it is sampled."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..evaluation.mixture import GaussianMixture
from ..losses import EDMLoss, Loss, TDEDMLoss
from ..networks import EDMPrecond
from ..samplers import heun
from ..schedules import EDM

BANDS = ((0.02, 0.2, 6), (0.2, 0.4, 2), (0.4, 4.0, 6), (4.0, 12.0, 3), (12.0, 40.0, 3))  # noise levels from, to, and how many are measured


class Levels:
    """The noise levels at which errors are measured: the middles, in log sigma, of the cells that make up BANDS."""

    edges = torch.tensor([lo * (hi / lo) ** (i / n) for lo, hi, n in BANDS for i in range(n)] + [BANDS[-1][1]], dtype=torch.float64)
    sigma = (edges[1:] * edges[:-1]).sqrt()
    band = torch.repeat_interleave(torch.arange(len(BANDS)), torch.tensor([n for *_, n in BANDS]))

    def __init__(self, cdf: Callable[[Tensor], Tensor]):
        self.share = cdf(self.edges).diff()  # of the noise levels that training draws

    def by_band(self, error: Tensor) -> Tensor:
        """[seeds, levels] to [seeds, bands + 1]: the mean in each band, and last over all levels as training weighs them."""
        bands = [error[:, self.band == i].mean(1) for i in range(len(BANDS))]
        return torch.stack([*bands, self.overall(error)], 1)

    def overall(self, error: Tensor) -> Tensor:
        return error @ self.share / self.share.sum()


@dataclass(frozen=True)
class Family:
    """A way to train and to sample: all that differs between the studies."""

    losses: dict[str, Loss]  # the first is the baseline, "TD" the one that the conclusion is about
    network: Callable[[nn.Module], nn.Module]  # from an MLP that takes c_noise in EDM's range, -1.6 to 1.1
    draw: Callable[[int, torch.Generator], dict[str, Tensor]]  # n noise levels, as a keyword of `loss.pair`
    cdf: Callable[[Tensor], Tensor]  # the share of those below sigma
    sampler: Callable
    sampler_name: str
    sigmas: Callable[[int], Tensor]  # the sampler's levels for so many steps
    budgets: tuple[int, ...]  # sampling steps
    config: dict = field(default_factory=dict)  # what it needs otherwise than `study.Config` has it
    exact: Callable[[GaussianMixture], Callable] = lambda mixture: mixture.denoise  # what a perfect network gives
    exact_name: str = "the exact denoiser"
    error_name: str = "excess of EDM's loss over the exact denoiser's"
    follow_samples: bool = False  # over training: the distance of samples with the smallest budget instead of the error

    @property
    def levels(self) -> Levels:
        return Levels(self.cdf)


def _edm(losses: dict[str, Loss]) -> Family:
    loss = losses["TD"]
    return Family(
        losses, lambda mlp: EDMPrecond(mlp, sigma_data=0.5),
        lambda n, generator: {"sigma": (loss.P_mean + loss.P_std * torch.randn(n, generator=generator, dtype=torch.float64)).exp()},
        lambda sigma: torch.special.ndtr((sigma.log() - loss.P_mean) / loss.P_std),
        heun, "Heun's method", lambda steps: EDM(steps).sigmas(), (4, 6, 9, 12, 18),
    )


STUDY = _edm({
    "EDM": EDMLoss(),
    "TD": TDEDMLoss(),
    "TD, online weight": TDEDMLoss(weight="online"),
    "TD, online, .3<sigma<5": TDEDMLoss(weight="online", td_sigma=(0.3, 5.0)),  # its target network runs on the whole batch all the same
})
FAMILIES = {"edm": _edm({"EDM": EDMLoss(), "TD": TDEDMLoss()})}
