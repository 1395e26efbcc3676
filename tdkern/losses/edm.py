"""EDM's denoising loss, alone and with a temporal-difference term over its index space."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..columns import SCALE, SIGMA, SIGMA_P, W_BASE
from ..fields import flag
from ..ops import td_coef
from ..ops.td_coef import WEIGHTS
from ..preconditioning import EDM
from ..schedules import EDM as EDMSchedule
from ..schedules import ETA
from .base import (
    NO_TD,
    OWN,
    Loss,
    TDBatch,
    base_weight_flag,
    lambda_base_flag,
    share_flag,
    share_of,
)


@dataclass(frozen=True)
class EDMLoss(Loss):
    """EDM's denoising loss for log-normal noise levels, a mean over each sample's elements.

    ln sigma ~ N(P_mean, P_std^2),  loss = w mean((x0 - D(x0 + sigma n, sigma))^2),
    w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2  (arXiv 2206.00364, eq. 2 and table 1).
    EDM itself sums over elements: multiply by their number for its gradient scale.

    `loss(net, images, labels=None, augment_pipe=None) -> [B]`, which is EDM's own call; `pair` and
    `evaluate` are its two halves. As in the other losses a target network may stand behind `net`;
    it is not used.

    Args:
        P_mean, P_std: mean and standard deviation of ln sigma; P_std >= 0.
        sigma_data: standard deviation of the data, > 0.
        base_weight: another w: a name, or a callable of sigma [B] such as `weighting.MinSNR(3.0)`.
        backend: which backend the ops use, as in `td_loss`.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: ln sigma first,
    then the noise's seed.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5
    base_weight: str | Callable = base_weight_flag()  # noqa: RUF009  (its default is a name)

    def __post_init__(self):
        self._check_base_weight()
        if not self.P_std >= 0:
            name = type(self).__name__
            raise ValueError(f"{name}: P_std must be a number >= 0, got {self.P_std}")
        # the op checks the others
        levels = torch.zeros(0, dtype=torch.float64, device="cpu")
        td_coef(levels, **self._coef_args(), backend="reference")

    @property
    def preconditioning(self) -> EDM:
        return EDM(self.sigma_data)

    def _coef_args(self) -> dict:
        return {"sigma_data": self.sigma_data, "lambda_base": 0.0, "td_sigma": NO_TD}

    def _coef(self, level: Tensor, **args) -> tuple[Tensor, Tensor]:
        """`td_coef`'s coef and levels, with the weight of the base loss."""
        if self.base_weight == OWN:
            return td_coef(level, **args, **self._coef_args(), backend=self.backend)
        args |= {"base_weight": "uniform"}
        coef, levels = td_coef(level, **args, **self._coef_args(), backend=self.backend)
        coef[:, W_BASE] *= self._base_weight(levels[:, SIGMA], coef[:, SCALE])
        return coef, levels

    def pair(
        self, images: Tensor, *, sigma: Tensor | None = None, noise: Tensor | None = None
    ) -> TDBatch:
        """x_t = x0 + sigma noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            sigma: [B] > 0, any float dtype; drawn if None.
            noise: as `images`, unit noise; drawn if None.
        """
        self._check_images(images)
        coef, levels = self._coef(self._sigma(sigma, images))
        sigma = levels[:, SIGMA]
        x_t, _ = self._noisy_pair(images, sigma, sigma, "shared", noise, None)
        return TDBatch(images, x_t, None, coef, levels)

    def _sigma(self, given: Tensor | None, images: Tensor) -> Tensor:
        if given is None:
            normal = self._draw(
                images, lambda n: torch.randn(n, dtype=torch.float64, device=images.device)
            )
            return (self.P_mean + self.P_std * normal).exp()
        self._check_shape("sigma", given, images.shape[:1])
        return given


@dataclass(frozen=True)
class TDEDMLoss(EDMLoss):
    """EDM's loss with a temporal-difference term over its index space (arXiv 2606.15048).

    With i the real index of sigma (`schedules.EDM`): t = i, tau = i + one_idx, t' = i + k_idx,
    tau' = t' + one_idx, and

    delta = A (x0 - D(x_t, t)) - A' (x0 - D'(x_t', t')),  A = 1 - kappa from `two_moment`,
    loss = w_td mean(delta^2) + lambda_base EDM's loss, or (1 + lambda_base) EDM's loss where the
    pair leaves the schedule; D' is the target network.

    The coupling decides whether this has EDM's minimiser. With "markov", the default, x_t' is an
    earlier point of the Markov path that ends in x_t: E[x0 - D'(x_t') | x_t] = 0 at the optimum,
    the TD target is unbiased and has at most .92 of EDM's variance. With "shared" noise x_t and
    x_t' together determine x0, that mean is not 0, and the target is biased: for Gaussian data of
    standard deviation sigma_data its slope in x_t is off by +22, +51, +69 and +68 % at sigma .5, 1,
    2 and 4 with the other defaults. It is here for comparison.

    Args:
        P_mean, P_std, sigma_data, base_weight, backend: see `EDMLoss`.
        sigma_min, sigma_max, rho: the schedule of the index space, see `schedules.EDM`.

    The other arguments are described where they are declared. `target_net` is needed. The draws:
    ln sigma, then the seed of the pair's noise.
    """

    lambda_base: float = lambda_base_flag()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    steps: int = flag(18, "Noise levels of the TD term's index space, at least 2.")
    k_idx: float = flag(1.0, "Distance from t to t', in steps, > 0.")
    one_idx: float = flag(0.25, "Distance from t to tau, in steps, > 0.")
    coupling: str = flag("markov", "Noise of the pair; shared noise is biased.", choices=ETA)
    weight: str = flag("pairwise", "Weight of the TD term.", choices=WEIGHTS)
    td_sigma: tuple[float, float] | None = flag(
        None,
        "TD at these noise levels alone; elsewhere the base loss, as where the pair leaves the "
        "schedule.",
        metavar="LO,HI",
        default_help="all levels",
    )
    td_share: float = share_flag()

    def __post_init__(self):
        self._check_share()
        self._check_lambda_base()
        super().__post_init__()
        if self.steps % 1:
            raise ValueError(f"TDEDMLoss: steps must be a whole number, got {self.steps}")
        self._check_td_is_possible()

    def _check_td_is_possible(self) -> None:
        low, high = self._td_levels()
        fixed = math.exp(self.P_mean) if self.P_std == 0 else None
        if low < high and (fixed is None or low <= fixed <= high):
            return
        raise ValueError(
            "TDEDMLoss: some sample must have a TD term, and with these settings none can: "
            f"it needs k_idx + one_idx = {self.k_idx + self.one_idx:g} below steps - 1 = "
            f"{self.steps - 1:g} and a sigma between {low:g} and {high:g}"
        )

    def _end(self) -> float:
        """The least noise level whose pair stays on the schedule."""
        schedule = EDMSchedule(int(self.steps), self.sigma_min, self.sigma_max, self.rho)
        last = max(self.steps - 1 - (self.k_idx + self.one_idx), 0.0)
        return schedule.sigma(torch.tensor(last, dtype=torch.float64, device="cpu")).item()

    def _td_levels(self) -> tuple[float, float]:
        """The noise levels between which samples have a TD term."""
        low, high = (0.0, math.inf) if self.td_sigma is None else self.td_sigma
        return max(low, self._end()), min(high, self.sigma_max)

    def _coef_args(self) -> dict:
        return {
            "steps": int(self.steps),
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
            "sigma_data": self.sigma_data,
            "k_idx": self.k_idx,
            "one_idx": self.one_idx,
            "lambda_base": self.lambda_base,
            "coupling": self.coupling,
            "weight": self.weight,
            "td_sigma": self.td_sigma,
        }

    def window_share(self, batch: int) -> float:
        """A `td_share` for log-normal noise levels and batches of a size.

        It is the mean share p of samples with a TD term, at `td_sigma` and where the pair stays on
        the schedule, and one standard deviation, sqrt(p (1 - p) / batch). A batch has more of them
        one time in six, so that of all TD terms the share 0.083 sqrt((1 - p) / (p batch)) is left
        out: for (0.3, 5) and the default noise levels 2 % in batches of 16, 0.4 % in batches of
        512. Those are of the smallest sigma, where TD brings least. It is 1 where it would leave no
        sample out.
        """
        edges = torch.tensor(self._td_levels(), dtype=torch.float64, device="cpu").log()
        p = torch.special.ndtr((edges - self.P_mean) / self.P_std).diff().item()
        return share_of(p, batch)

    def pair(
        self,
        images: Tensor,
        *,
        sigma: Tensor | None = None,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        noise_p: Tensor | None = None,
    ) -> TDBatch:
        """The coupled pair (x_t, x_t').

        "markov": x_t' = x0 + sigma' noise_p,  x_t = x_t' + sqrt(max(sigma^2 - sigma'^2, 0)) noise,
        so that below sigma_min x_t carries noise of sigma_min, as in the published code.
        "shared": x_t = x0 + sigma noise, x_t' = x0 + sigma' noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            sigma: [B] > 0, any float dtype; drawn if neither it nor `index` is given.
            index: [B] >= 0, real indices on the schedule, in place of `sigma`.
            noise, noise_p: as `images`, unit noise; drawn if None. "shared" takes no `noise_p`.

        Raises:
            ValueError: a wrong shape or dtype, both `sigma` and `index`, or `noise_p` with
                "shared".
        """
        self._check_images(images)
        if sigma is not None and index is not None:
            raise ValueError("TDEDMLoss: only one of sigma and index may be given, got both")
        if index is None:
            level = self._sigma(sigma, images)
        else:
            self._check_shape("index", index, images.shape[:1])
            level = index
        coef, levels = self._coef(level, from_index=index is not None)
        x_t, x_tp = self._noisy_pair(
            images, levels[:, SIGMA], levels[:, SIGMA_P], self.coupling, noise, noise_p
        )
        return TDBatch(images, x_t, x_tp, coef, levels)
