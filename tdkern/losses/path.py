"""What the losses along a schedule's time share: DDPM, VP, VE and flow matching.

Each adds its schedule and its prediction.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..columns import SIGMA, SIGMA_P
from ..fields import flag, short
from ..ops._modes import can_check_values
from ..ops.td_coef import WEIGHTS
from ..preconditioning import PREDICTIONS, Preconditioning, append_dims
from ..schedules import ETA, Schedule, eta_of
from .base import (
    Loss,
    TDBatch,
    base_weight_flag,
    lambda_base_flag,
    path_coef,
    share_flag,
    share_of,
)


@dataclass(frozen=True)
class PathLoss(Loss):
    """A denoising loss along a path x_t = alpha_t x0 + sigma_t eps, at uniform times.

    It is the mean square error of the network's own output F, or by `base_weight` w(sigma_hat)
    mean((x0 - D)^2) with another w: a name, or a callable of sigma_hat [B] such as
    `weighting.MinSNR(3.0)`; SNR is sigma_hat^-2. Networks are called in EDM's state,
    x_t / alpha_t with the noise level sigma_hat = sigma_t / alpha_t, and so is `TDBatch` there.
    Where alpha_t = 0 (zero terminal SNR, t = 1 of flow matching) sigma_hat is infinite, and the
    state is the unit noise.

    `loss(net, images, labels=None, augment_pipe=None) -> [B]`, a mean over each sample's elements;
    `pair` and `evaluate` are its two halves. As in the other losses a target network may stand
    behind `net`; it is not used. Gradient to `net`'s parameters. The draws come from torch's global
    generator: t, then the noise's seed, or the noise itself of a schedule that ends in alpha_t = 0.
    A family's class raises ValueError for an argument out of its range.
    """

    base_weight: str | Callable = base_weight_flag()  # noqa: RUF009  (its default is a name)
    # "karras" is of data whose deviation is known
    base_weights = tuple(name for name in Loss.base_weights if name != "karras")

    def __post_init__(self):
        self._check_base_weight()
        # the schedule checks its own arguments
        if self.schedule.ends_in_noise and not self.preconditioning.reaches_noise:
            raise ValueError(
                f"{type(self).__name__}: prediction must be one that gives x0 where no signal is "
                f"left, as at this schedule's end, got {self.prediction!r}"
            )

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

    def pair(
        self, images: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> TDBatch:
        """x_t / alpha_t = x0 + sigma_hat(t) noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            t: [B], times of the schedule, t_min to t_max; drawn if None. Their range is checked on
                the CPU alone: a GPU would have to be waited for.
            noise: as `images`, unit noise; drawn if None.

        Raises:
            ValueError: a wrong shape, dtype or time.
        """
        self._check_images(images)
        level = self.schedule.sigma_hat(self._time(t, images))
        skip, scale = self.preconditioning.skip_scale(level)
        zero = torch.zeros_like(level)
        w = self._base_weight(level, scale)
        coef = torch.stack([skip, scale, zero, zero, zero, zero, zero, w], 1)
        x_t, _ = self._noisy_pair(images, level, level, "shared", noise, None)
        return TDBatch(images, x_t, None, coef, level[:, None].expand(-1, 4))

    def _noisy_pair(
        self,
        x0: Tensor,
        sigma: Tensor,
        sigma_p: Tensor,
        coupling: str,
        noise: Tensor | None,
        noise_p: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if not self.schedule.ends_in_noise:
            return super()._noisy_pair(x0, sigma, sigma_p, coupling, noise, noise_p)
        signal_gone = sigma.isinf()
        noise = self._noise("noise", noise, x0)
        sigma = sigma.masked_fill(signal_gone, 0.0)
        x_t, x_tp = super()._noisy_pair(x0, sigma, sigma_p, coupling, noise, noise_p)
        return torch.where(append_dims(signal_gone, x0.ndim), noise, x_t), x_tp

    def _time(self, given: Tensor | None, images: Tensor) -> Tensor:
        low, high = self.schedule.t_min, self.schedule.t_max
        if given is None:
            uniform = self._draw(
                images, lambda n: torch.rand(n, dtype=torch.float64, device=images.device)
            )
            return high + (low - high) * uniform
        self._check_shape("t", given, images.shape[:1])
        given = given.double()
        slack = 1e-6 * (high - low)  # float32 times may lie that far beyond the ends
        on_path = (given >= low - slack) & (given <= high + slack)
        if can_check_values(given) and not on_path.all():
            found = f"{given.min().item()} to {given.max().item()}"
            raise ValueError(
                f"{type(self).__name__}: t must be from {low:g} to {high:g}, "
                f"got values from {found}"
            )
        return given


@dataclass(frozen=True, kw_only=True)
class TDPathLoss(PathLoss):
    """A path's loss with a temporal-difference term (arXiv 2606.15048), to mix in before it.

    With t' = t - k, tau = t - delta and tau' = t' - delta,

    delta = A (x0 - D(x_t, t)) - A' (x0 - D'(x_t', t')),  A = alpha_tau - kappa alpha_t from
    `two_moment`, D' the target network,
    loss = w_td mean(delta^2) + lambda_base base, or (1 + lambda_base) base where tau' would leave
    the path.

    D is the same denoiser as in EDM: in the state x_t / alpha_t every path is EDM's. What a family
    adds is the factor alpha_tau of A = alpha_tau (1 - kappa alpha_t / alpha_tau), hence the ratio
    r = A' / A. The TD target of D is x0 - r (x0 - D').

    coupling "markov": x_t' lies on the Markov path to x_t, so E[x0 - D'(x_t') | x_t] = 0 at the
    optimum for any r: the target is unbiased, and its variance is 1 - (2 r - r^2) v'/v of the
    baseline's, v and v' the mean squares of x0 - E[x0 | x_t] at the two levels: below it as long as
    r < 2, whatever the data.

    "shared": one noise for both states, and the target is biased: for Gaussian data of standard
    deviation s its slope in x_t is off by the share
    r sigma_hat' (sigma_hat - sigma_hat') / (s^2 + sigma_hat'^2) of the optimal one, of which
    docs/families.md gives numbers (s = 0.5). From level to level this adds up: with r = 1 and small
    steps it leads to the ODE's end, a consistency model, in place of a denoiser. It is here for
    comparison.

    `eta` is of the means alone: eta = 0 with "markov" states takes DDIM's drift, and is as
    unbiased. Just before the data r is then larger: 1.98 in flow matching, 2.03 in VP, and 3.1 in
    DDPM (T = 1000), where the variance is 2.5 times the baseline's.

    The arguments are described where they are declared. `target_net` is needed. The draws: t, then
    the seed of the pair's noise.
    """

    lambda_base: float = lambda_base_flag()
    coupling: str = flag("markov", "Noise of the pair; shared noise is biased.", choices=ETA)
    eta: float | None = flag(
        None,
        "DDIM's eta of the means, in [0, 1].",
        default_help="1, or 0 with shared noise",
    )
    weight: str = flag("pairwise", "Weight of the TD term.", choices=WEIGHTS)
    td_share: float = share_flag()

    def __post_init__(self):
        super().__post_init__()
        self._check_share()
        name = type(self).__name__
        self._check_lambda_base()
        if self.weight not in WEIGHTS:
            known = ", ".join(WEIGHTS)
            raise ValueError(f"{name}: weight must be one of {known}, got {short(self.weight)}")
        eta_of(self.coupling)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"{name}: eta must be in [0, 1], got {self.eta}")

    @property
    @abstractmethod
    def distances(self) -> tuple[float, float]:
        """(delta, k): how far tau and t' are from t, in the schedule's time."""

    def window_share(self, batch: int) -> float:
        """A `td_share` for uniform times and batches of a size.

        It is the mean share of samples whose pair stays on the path and one standard deviation of a
        batch's, as in `TDEDMLoss.window_share`.
        """
        path = self.schedule
        p = (path.t_max - (path.t_end + sum(self.distances))) / (path.t_max - path.t_min)
        return share_of(min(p, 1.0), batch)

    # whether the end of the path has the TD term of a known return in place of the base loss
    mean_matching = False

    def pair(
        self,
        images: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        noise_p: Tensor | None = None,
    ) -> TDBatch:
        """The coupled pair (x_t, x_t') in EDM's state.

        "markov": x_t' = x0 + sigma_hat' noise_p,
                  x_t = x_t' + sqrt(sigma_hat^2 - sigma_hat'^2) noise.
        "shared": x_t = x0 + sigma_hat noise, x_t' = x0 + sigma_hat' noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            t: [B], as in the loss without TD.
            noise, noise_p: as `images`, unit noise; drawn if None. "shared" takes no `noise_p`.

        Raises:
            ValueError: a wrong shape, dtype or time, or `noise_p` with "shared".
        """
        self._check_images(images)
        t = self._time(t, images)
        delta, k = self.distances
        path = self.schedule
        valid = t - k - delta >= path.t_end
        t_p = (t - k).clamp(min=path.t_min)
        tau, tau_p = (t - delta).clamp(min=path.t_end), (t_p - delta).clamp(min=path.t_end)
        times = torch.stack([t, tau, t_p, tau_p])
        coef, levels = path_coef(
            path.alpha(times),
            path.sigma(times),
            valid,
            preconditioning=self.preconditioning,
            eta=eta_of(self.coupling) if self.eta is None else self.eta,
            weight=self.weight,
            lambda_base=self.lambda_base,
            base_weight=self._base_weight,
            mean_matching=self.mean_matching,
        )
        x_t, x_tp = self._noisy_pair(
            images, levels[:, SIGMA], levels[:, SIGMA_P], self.coupling, noise, noise_p
        )
        return TDBatch(images, x_t, x_tp, coef, levels)


@dataclass(frozen=True, kw_only=True)
class TDTimeLoss(TDPathLoss):
    """TD in continuous time, in units of one step of a sampler with `steps` steps.

    The unit is (t_max - t_min) / (steps - 1). With k_idx and one_idx both 1 tau is t', the next
    state, as in TD(0), and the ratio r stays below 2 (with eta None, for VP from 13 steps on); just
    before the data it is up to 2.9 in VP and 2.8 in flow matching with `one_idx` 0.25, and 4.0 and
    2.4 with `k_idx` 3.
    """

    steps: int = flag(18, "Noise levels of the TD term's index space, at least 2.")
    k_idx: float = flag(1.0, "Distance from t to t', in steps, > 0.")
    one_idx: float = flag(1.0, "Distance from t to tau, in steps, > 0.")

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if not self.steps >= 2:
            raise ValueError(f"{name}: steps must be at least 2, got {self.steps}")
        if self.steps % 1:
            raise ValueError(f"{name}: steps must be a whole number, got {self.steps}")
        if not (0 < self.k_idx < math.inf and 0 < self.one_idx < math.inf):
            raise ValueError(
                f"{name}: k_idx and one_idx must be positive numbers, "
                f"got {self.k_idx} and {self.one_idx}"
            )
        if not sum(self.distances) < self.schedule.t_max - self.schedule.t_end:
            raise ValueError(
                f"{name}: some sample must have a TD term, and with these settings none can: "
                f"k_idx + one_idx = {self.k_idx + self.one_idx:g} steps of {self.steps - 1:g}"
            )

    @property
    def distances(self) -> tuple[float, float]:
        step = (self.schedule.t_max - self.schedule.t_min) / (self.steps - 1)
        return self.one_idx * step, self.k_idx * step
