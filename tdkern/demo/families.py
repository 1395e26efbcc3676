"""What a study needs to know of a family: losses, network, noise levels and sampler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..evaluation.mixture import GaussianMixture
from ..families import FAMILIES as losses_of
from ..losses import Loss, TDCTLoss, TDDDPMLoss, TDEDMLoss
from ..losses.path import PathLoss
from ..networks import CTPrecond, Denoiser, EDMPrecond, VEPrecond, VPPrecond
from ..preconditioning import append_dims
from ..samplers import ablation, ddim, ddpm, euler, heun, multistep, unipc
from ..schedules import DDPM, EDM

# noise levels from, to, and how many are measured
BANDS = (
    (0.02, 0.2, 6),
    (0.2, 0.4, 2),
    (0.4, 4.0, 6),
    (4.0, 12.0, 3),
    (12.0, 40.0, 3),
)


class Levels:
    """The noise levels at which errors are measured.

    They are the middles, in log sigma, of the cells that make up BANDS.
    """

    edges = torch.tensor(
        [lo * (hi / lo) ** (i / n) for lo, hi, n in BANDS for i in range(n)] + [BANDS[-1][1]],
        dtype=torch.float64,
    )
    sigma = (edges[1:] * edges[:-1]).sqrt()
    band = torch.repeat_interleave(torch.arange(len(BANDS)), torch.tensor([n for *_, n in BANDS]))

    def __init__(self, cdf: Callable[[Tensor], Tensor]):
        self.share = cdf(self.edges).diff()  # of the noise levels that training draws

    def by_band(self, error: Tensor) -> Tensor:
        """[seeds, levels] to [seeds, bands + 1]: the mean in each band.

        The last is over all levels, as training weighs them.
        """
        bands = [error[:, self.band == i].mean(1) for i in range(len(BANDS))]
        return torch.stack([*bands, self.overall(error)], 1)

    def overall(self, error: Tensor) -> Tensor:
        return error @ self.share / self.share.sum()


@dataclass(frozen=True)
class Family:
    """A way to train and to sample: all that differs between the studies."""

    losses: dict[str, Loss]  # the first is the baseline, "TD" the one that the conclusion is about
    # from a network that takes c_noise in EDM's range, -1.6 to 1.1
    network: Callable[[nn.Module], nn.Module]
    # n noise levels, as a keyword of `loss.pair`
    draw: Callable[[int, torch.Generator], dict[str, Tensor]]
    cdf: Callable[[Tensor], Tensor]  # the share of those below sigma
    sampler: Callable
    sampler_name: str
    sigmas: Callable[[int], Tensor]  # the sampler's levels for so many steps
    budgets: tuple[int, ...]  # sampling steps
    config: dict = field(default_factory=dict)  # what it needs otherwise than `study.Config` has it
    # what a perfect network gives
    exact: Callable[[GaussianMixture], Callable] = lambda mixture: mixture.denoise
    exact_name: str = "the exact denoiser"
    error_name: str = "excess of EDM's loss over the exact denoiser's"
    # over training: the distance of samples with the smallest budget instead of the error
    follow_samples: bool = False

    @property
    def levels(self) -> Levels:
        return Levels(self.cdf)


class Timed(nn.Module):
    """A network in a wrapper whose c_noise goes from `lo` to `hi`.

    It is moved to -1.6 .. 1.1, EDM's range, for which the network's embedding is made.

    `c_in(c_noise)` scales the input, where the wrapper leaves that to the network.
    """

    def __init__(
        self,
        mlp: nn.Module,
        lo: float,
        hi: float,
        c_in: Callable[[Tensor], Tensor] = torch.ones_like,
    ):
        super().__init__()
        self.mlp = mlp
        self.lo = lo
        self.hi = hi
        self.c_in = c_in
        self.num_models = getattr(mlp, "num_models", 1)
        self.label_dim = getattr(mlp, "label_dim", 0)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        return self.mlp(
            append_dims(self.c_in(c_noise), x.ndim) * x,
            2.7 * (c_noise - self.lo) / (self.hi - self.lo) - 1.6,
            class_labels,
            augment_labels,
        )


def _losses(family: str, baseline: str, **td) -> dict[str, Loss]:
    """A family's losses: without TD, and under "TD" with it; `td` are its arguments."""
    its = losses_of[family]
    return {baseline: its.make_loss(False, td), "TD": its.make_loss(True, td)}


def _edm(losses: dict[str, Loss]) -> Family:
    loss = cast("TDEDMLoss", losses["TD"])

    def draw(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        normal = torch.randn(n, generator=generator, dtype=torch.float64)
        return {"sigma": (loss.P_mean + loss.P_std * normal).exp()}

    return Family(
        losses=losses,
        network=lambda mlp: EDMPrecond(mlp, sigma_data=0.5),
        draw=draw,
        cdf=lambda sigma: torch.special.ndtr((sigma.log() - loss.P_mean) / loss.P_std),
        sampler=heun,
        sampler_name="Heun's method",
        sigmas=lambda steps: EDM(steps).sigmas(),
        budgets=(4, 6, 9, 12, 18),
    )


def _path(losses: dict[str, Loss], **settings) -> Family:
    """A family with uniform times of a schedule; `settings` are of the `Family`."""
    path = cast("PathLoss", losses["TD"]).schedule

    def draw(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        if isinstance(path, DDPM):
            return {"t": torch.randint(1, path.T + 1, (n,), generator=generator)}
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        return {"t": path.t_min + (path.t_max - path.t_min) * uniform}

    return Family(
        losses=losses,
        draw=draw,
        cdf=lambda sigma: (path.time(sigma) - path.t_min) / (path.t_max - path.t_min),
        sigmas=path.sigmas,
        **settings,
    )


def _ddpm_network(path: DDPM) -> Callable[[nn.Module], nn.Module]:
    levels = path.alphas_cumprod
    return lambda mlp: Denoiser(Timed(mlp, 0, path.T - 1), "eps", alphas_cumprod=levels)


def _ct(losses: dict[str, Loss]) -> Family:
    scales = cast("int", cast("TDCTLoss", losses["TD"]).num_scales)
    levels = EDM(scales).sigma(torch.arange(scales - 1))

    def exact(mixture: GaussianMixture):
        """The consistency function: where the ODE from (x, sigma) ends at sigma_min."""

        def end(x: Tensor, sigma: Tensor) -> Tensor:
            sigmas = EDM(40, sigma_max=sigma[0].item()).sigmas()[:-1]
            return unipc(mixture.denoise, x.double(), sigmas, order=3)

        return end

    def draw(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"index": torch.randint(scales - 1, (n,), generator=generator)}

    return Family(
        losses=losses,
        network=lambda mlp: CTPrecond(mlp, time_scale=0.25),
        draw=draw,
        cdf=lambda sigma: (levels < sigma[..., None]).double().mean(-1),
        sampler=multistep,
        sampler_name="multistep sampling",
        sigmas=lambda steps: EDM(steps + 1).sigmas()[:-1],
        budgets=(1, 2, 4),
        config={"target_ema_tau": 0.0},
        exact=exact,
        exact_name="the exact ODE",
        error_name="EDM's loss against the end of the exact ODE",
        follow_samples=True,
    )


def _ve_input(c_noise: Tensor) -> Tensor:
    """1/sqrt(sigma^2 + sigma_data^2) at c_noise = ln(sigma/2).

    It is what a U-Net's first normalisation does for VE, whose c_in is 1.
    """
    return (4 * (2 * c_noise).exp() + 0.25).rsqrt()


# without td_share: at 16 points of a seed, choosing costs more than it saves
WINDOW = TDEDMLoss(weight="online", td_sigma=(0.3, 5.0))
STUDY = _edm(
    _losses("edm", "EDM")
    | {"TD, online weight": TDEDMLoss(weight="online"), "TD, online, .3<sigma<5": WINDOW}
)
FAMILIES = {
    "ddpm": _path(
        _losses("ddpm", "DDPM"),
        network=_ddpm_network(DDPM()),
        sampler=ddpm,
        sampler_name="DDPM's ancestral sampler",
        budgets=(10, 20, 50, 100),
    ),
    "ddim": _path(
        _losses("ddpm", "DDPM", eta=0.0) | {"TD, shared noise": TDDDPMLoss(coupling="shared")},
        network=_ddpm_network(DDPM()),
        sampler=ddim,
        sampler_name="DDIM",
        budgets=(5, 10, 20, 50),
    ),
    "vp": _path(
        _losses("vp", "VP"),
        network=lambda mlp: VPPrecond(Timed(mlp, 0, 999)),
        sampler=partial(ablation, schedule="vp", scaling="vp"),
        sampler_name="Heun's method in VP's time",
        budgets=(10, 20, 40, 80),
    ),
    "ve": _path(
        _losses("ve", "VE"),
        network=lambda mlp: VEPrecond(Timed(mlp, -4.6, 3.9, _ve_input)),
        sampler=ddpm,
        sampler_name="VE's ancestral sampler",
        budgets=(10, 20, 50, 100),
    ),
    "edm": _edm(_losses("edm", "EDM")),
    # 20 levels, l2 and karras: of seven settings tried, where both curves fall steadily; what TD
    # brings here is no evidence for the others
    "ct": _ct(_losses("ct", "CT", num_scales=20, base_weight="karras")),
    "flow": _path(
        _losses("flow", "flow"),
        network=lambda mlp: Denoiser(Timed(mlp, 0, 1), "velocity"),
        sampler=euler,
        sampler_name="Euler's method",
        budgets=(5, 10, 20, 50),
    ),
}
