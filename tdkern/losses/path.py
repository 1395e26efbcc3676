"""What the losses along a schedule's time share: DDPM, VP, VE and flow matching. Each adds its schedule and its prediction."""
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _library
from ..columns import SIGMA, SIGMA_P
from ..ops.td_coef import WEIGHTS
from ..preconditioning import PREDICTIONS, Preconditioning
from ..schedules import Schedule, eta_of
from .base import Loss, TDBatch, path_coef


@dataclass(frozen=True)
class PathLoss(Loss):
    """A denoising loss along a path x_t = alpha_t x0 + sigma_t eps, at uniform times: the mean square error of the network's own output F.

    Networks are called in EDM's state, x_t / alpha_t with the noise level sigma_hat = sigma_t / alpha_t, and so is `TDBatch` there.
    """

    def __post_init__(self):
        self.schedule  # noqa: B018  (it checks its own arguments)

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The path."""

    @property
    @abstractmethod
    def prediction(self) -> str:
        """What F is, a name of `preconditioning.PREDICTIONS`."""

    @property
    def preconditioning(self) -> Preconditioning:
        return PREDICTIONS[self.prediction]

    def pair(self, images: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None) -> TDBatch:
        """x_t / alpha_t = x0 + sigma_hat(t) noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            t: [B], times of the schedule, t_min to t_max; drawn if None. Their range is checked on the CPU alone: a GPU would have to be waited for.
            noise: as `images`, unit noise; drawn if None.

        Raises:
            ValueError: a wrong shape, dtype or time.
        """
        self._check_images(images)
        level = self.schedule.sigma_hat(self._time(t, images))
        skip, scale = self.preconditioning.skip_scale(level)
        zero = torch.zeros_like(level)
        coef = torch.stack([skip, scale, zero, zero, zero, zero, zero, scale**-2], 1)
        x_t, _ = self._noisy_pair(images, level, level, "shared", noise, None)
        return TDBatch(images, x_t, None, coef, level[:, None].expand(-1, 4))

    def _time(self, given: Tensor | None, images: Tensor) -> Tensor:
        if given is None:
            t_min, t_max = self.schedule.t_min, self.schedule.t_max
            return t_max + (t_min - t_max) * torch.rand(len(images), dtype=torch.float64, device=images.device)
        self._check_shape("t", given, images.shape[:1])
        given, (low, high) = given.double(), (self.schedule.t_min, self.schedule.t_max)
        slack = 1e-6 * (high - low)  # float32 times may lie that far beyond the ends
        if _library.readable(given) and not ((given >= low - slack) & (given <= high + slack)).all():
            raise ValueError(f"{type(self).__name__}: t must be from {low:g} to {high:g}, got values from {given.min().item()} to {given.max().item()}")
        return given


@dataclass(frozen=True, kw_only=True)
class TDPathLoss(PathLoss):
    """A path's loss with a temporal-difference term (arXiv 2606.15048): a mixin before the path's own loss.

    With t' = t - k, tau = t - delta and tau' = t' - delta,

    delta = A (x0 - D(x_t, t)) - A' (x0 - D'(x_t', t')),  A = alpha_tau - kappa alpha_t from `two_moment`, D' the target network,
    loss = w_td mean(delta^2) + lambda_base base, or (1 + lambda_base) base where tau' would leave the path.

    D is the same denoiser as in EDM: in the state x_t / alpha_t every path is EDM's. What a family adds is the factor alpha_tau of
    A = alpha_tau (1 - kappa alpha_t / alpha_tau), hence the ratio r = A' / A. The TD target of D is x0 - r (x0 - D').

    coupling "markov": x_t' lies on the Markov path to x_t, so E[x0 - D'(x_t') | x_t] = 0 at the optimum for any r: the target is unbiased,
    and its variance is 1 - (2 r - r^2) v'/v of the baseline's, v and v' the mean squares of x0 - E[x0 | x_t] at the two levels: below it as
    long as r < 2, whatever the data.
    "shared": one noise for both states, and the target is biased: for Gaussian data of standard deviation s its slope in x_t is off by the
    share r sigma_hat' (sigma_hat - sigma_hat') / (s^2 + sigma_hat'^2) of the optimal one, of which each loss gives numbers (s = 0.5). From
    level to level this adds up: with r = 1 and small steps it leads to the ODE's end, a consistency model, in place of a denoiser. It is here
    for comparison.
    `eta` is of the means alone: eta = 0 with "markov" states takes DDIM's drift, and is as unbiased. Just before the data r is then larger:
    1.98 in flow matching, 2.03 in VP, and 3.1 in DDPM (T = 1000), where the variance is 2.5 times the baseline's.

    Args:
        lambda_base: weight of the base loss beside the TD term, >= 0.
        coupling: of the states, and of the means unless `eta` is given: "markov" or "shared".
        eta: DDIM's eta of the means, in [0, 1]; None is 1 for "markov", 0 for "shared".
        weight: w_td, "pairwise" 1/((A scale)^2 + (A' scale')^2), "pairwise_x0" 1/(A^2 + A'^2), "online" 1/(A scale)^2 or "none".
        td_share: the target network runs on ceil(td_share B) samples: of those with a TD term the ones of the largest sigma_hat, then others.
            A sample whose TD term has no room has (1 + lambda_base) base. In (0, 1].

    The draws: t, then the seed of the pair's noise.
    """

    lambda_base: float = 0.5
    coupling: str = "markov"
    eta: float | None = None
    weight: str = "pairwise"
    td_share: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._check_share()
        name = type(self).__name__
        if not 0 <= self.lambda_base < math.inf:
            raise ValueError(f"{name}: lambda_base must be a number >= 0, got {self.lambda_base}")
        if self.weight not in WEIGHTS:
            raise ValueError(f"{name}: weight must be one of {', '.join(WEIGHTS)}, got {self.weight!r}")
        eta_of(self.coupling)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"{name}: eta must be in [0, 1], got {self.eta}")

    @property
    @abstractmethod
    def distances(self) -> tuple[float, float]:
        """(delta, k): how far tau and t' are from t, in the schedule's time."""

    mean_matching = False  # whether the end of the path has the TD term of a known return in place of the base loss

    def pair(self, images: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None, noise_p: Tensor | None = None) -> TDBatch:
        """The coupled pair (x_t, x_t') in EDM's state.

        "markov": x_t' = x0 + sigma_hat' noise_p,  x_t = x_t' + sqrt(sigma_hat^2 - sigma_hat'^2) noise.
        "shared": x_t = x0 + sigma_hat noise, x_t' = x0 + sigma_hat' noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            t: [B], as in the loss without TD.
            noise, noise_p: as `images`, unit noise; drawn if None. "shared" takes no `noise_p`.

        Raises:
            ValueError: a wrong shape, dtype or time, or `noise_p` with "shared".
        """
        self._check_images(images)
        t, (delta, k), path = self._time(t, images), self.distances, self.schedule
        valid = t - k - delta >= path.t_end
        t_p = (t - k).clamp(min=path.t_min)
        times = torch.stack([t, (t - delta).clamp(min=path.t_end), t_p, (t_p - delta).clamp(min=path.t_end)])
        coef, levels = path_coef(path.alpha(times), path.sigma(times), valid, preconditioning=self.preconditioning, weight=self.weight,
                                 eta=eta_of(self.coupling) if self.eta is None else self.eta, lambda_base=self.lambda_base, mean_matching=self.mean_matching)
        x_t, x_tp = self._noisy_pair(
            images, levels[:, SIGMA], levels[:, SIGMA_P], self.coupling, noise, noise_p
        )
        return TDBatch(images, x_t, x_tp, coef, levels)


@dataclass(frozen=True, kw_only=True)
class TDTimeLoss(TDPathLoss):
    """TD in continuous time, in units of one step of a sampler with `steps` steps.

    Args:
        steps: the unit is (t_max - t_min) / (steps - 1).
        k_idx, one_idx: how far t' and tau are from t in that unit, > 0. With both 1 tau is t', the next state, as in TD(0), and the ratio r
            stays below 2 (with eta None, for VP from 13 steps on); just before the data it is up to 2.9 in VP and 2.8 in flow matching
            with `one_idx` 0.25, and 4.0 and 2.4 with `k_idx` 3.
    """

    steps: int = 18
    k_idx: float = 1.0
    one_idx: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if not self.steps >= 2:
            raise ValueError(f"{name}: steps must be at least 2, got {self.steps}")
        if not (0 < self.k_idx < math.inf and 0 < self.one_idx < math.inf):
            raise ValueError(f"{name}: k_idx and one_idx must be positive numbers, got {self.k_idx} and {self.one_idx}")

    @property
    def distances(self) -> tuple[float, float]:
        step = (self.schedule.t_max - self.schedule.t_min) / (self.steps - 1)
        return self.one_idx * step, self.k_idx * step
