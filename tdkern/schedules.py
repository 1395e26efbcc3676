"""Noise schedules: alpha(t), sigma(t), their grids and inverses.

Beside them stands the two-moment mean between two levels.

A diffusion path is x_t = alpha_t x0 + sigma_t eps. All functions take tensors of any shape, or
anything `torch.as_tensor` reads, and return float64 tensors on the same device.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ._cache import tensor_cache

ETA = {"markov": 1.0, "shared": 0.0}
BETA_SCHEDULES = ("linear", "cosine")


def eta_of(coupling: str) -> float:
    """DDIM's eta of a coupling.

    It is 1 for "markov" (DDPM's posterior), 0 for "shared" noise (DDIM, the ODE).
    """
    if coupling not in ETA:
        raise ValueError(f"coupling must be 'markov' or 'shared', got {coupling!r}")
    return ETA[coupling]


def as_float64(value) -> Tensor:
    """A tensor in float64; numbers come on the CPU, whatever torch's default device is."""
    return (
        value.double()
        if isinstance(value, Tensor)
        else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    )


def two_moment(
    alpha_t, sigma_t, alpha_tau, sigma_tau, *, coupling: str = "markov", eta: float | None = None
) -> tuple[Tensor, Tensor]:
    """The coefficients (A, kappa) of the two-moment mean mu = A x0 + kappa x_t of x_tau.

    kappa = sqrt(sigma_tau^2 - s^2) / sigma_t,  A = alpha_tau - kappa alpha_t  (DDIM, arXiv
    2010.02502, eq. 12 and 16), s^2 = eta^2 (sigma_tau^2 / sigma_t^2) (sigma_t^2 - (alpha_t /
    alpha_tau)^2 sigma_tau^2), which with r = sigma_tau / sigma_t is kappa = r sqrt(1 - eta^2 + (eta
    r alpha_t / alpha_tau)^2), free of cancellation.

    Args:
        alpha_t, sigma_t: signal and noise level at t; sigma_t > 0. Broadcast against each other.
        alpha_tau, sigma_tau: the same at tau, which has less noise than t; alpha_tau > 0.
        coupling: "markov" (eta = 1, DDPM's posterior) or "shared" (eta = 0, DDIM and the
            probability-flow ODE).
        eta: in [0, 1]; overrides `coupling`.

    Returns:
        A and kappa, float64, in the broadcast shape.

    Deterministic; gradients flow through PyTorch's own autograd.
    """
    eta = eta_of(coupling) if eta is None else eta
    if not 0 <= eta <= 1:
        raise ValueError(f"two_moment: eta must be in [0, 1], got {eta}")
    alpha_t, sigma_t, alpha_tau, sigma_tau = map(
        as_float64, (alpha_t, sigma_t, alpha_tau, sigma_tau)
    )
    r = sigma_tau / sigma_t
    kappa = r * torch.sqrt(1 - eta**2 + (eta * r * alpha_t / alpha_tau) ** 2)
    return alpha_tau - kappa * alpha_t, kappa


@dataclass(frozen=True)
class EDM:
    """EDM's noise levels over a real index, 0 at the most noise (arXiv 2206.00364, eq. 5).

    sigma(i) = (sigma_max^(1/rho) + i/(steps-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, alpha
    = 1.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"EDM: steps must be at least 2, got {self.steps}")
        if self.steps % 1:
            raise ValueError(f"EDM: steps must be a whole number, got {self.steps}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "EDM: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got "
                f"{self.sigma_min} and {self.sigma_max}"
            )
        if self.rho <= 0:
            raise ValueError(f"EDM: rho must be positive, got {self.rho}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def alpha(self, index) -> Tensor:
        """Signal level at an index: 1."""
        return torch.ones_like(as_float64(index))

    def sigma(self, index) -> Tensor:
        """Noise level at a real index.

        It is held at sigma_max below index 0 and at sigma_min above steps - 1.
        """
        a, b = self._ends
        return (a + as_float64(index) / (self.steps - 1) * (b - a)).clamp(b, a) ** self.rho

    def index(self, sigma) -> Tensor:
        """The real index of a noise level: 0 from sigma_max up, steps - 1 from sigma_min down."""
        a, b = self._ends
        return ((as_float64(sigma) ** (1 / self.rho) - a) / (b - a)).clamp(0, 1) * (self.steps - 1)

    def sigmas(self) -> Tensor:
        """The sampler's levels: sigma(0), ..., sigma(steps - 1), 0."""
        return torch.cat(
            [self.sigma(torch.arange(self.steps)), torch.zeros(1, dtype=torch.float64)]
        )


class Schedule(ABC):
    """A path x_t = alpha(t) x0 + sigma(t) eps whose noise rises with the time t.

    A family gives these two, `time` and `times`.

    Networks, losses and samplers work in EDM's state x_t / alpha(t) = x0 + sigma_hat(t) eps, which
    is one and the same for every family. Where alpha(t) = 0 no signal is left: sigma_hat is
    infinite, and the state is by convention the unit noise eps itself, the limit of
    x_t / sigma(t).
    """

    t_end: float  # where tau may go to: 0 is the data itself where sigma(0) = 0
    t_min: float  # the least time that a network is asked about
    t_max: float

    @property
    def ends_in_noise(self) -> bool:
        """Whether no signal is left at t_max: alpha is 0 there, and sigma_hat infinite."""
        return False

    @abstractmethod
    def alpha(self, t) -> Tensor:
        """Signal level at a time."""

    @abstractmethod
    def sigma(self, t) -> Tensor:
        """Noise level at a time, beside alpha(t)."""

    def sigma_hat(self, t) -> Tensor:
        """sigma(t) / alpha(t): the noise level in EDM's state, which rises with t."""
        return self.sigma(t) / self.alpha(t)

    @abstractmethod
    def time(self, sigma_hat) -> Tensor:
        """The inverse of `sigma_hat`, real."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """[steps] falling times of a sampler, from t_max."""

    def sigmas(self, steps: int) -> Tensor:
        """[steps + 1], the sampler's levels: sigma_hat at `times(steps)`, and 0."""
        if steps < 1:
            raise ValueError(f"{type(self).__name__}: steps must be at least 1, got {steps}")
        return torch.cat([self.sigma_hat(self.times(steps)), torch.zeros(1, dtype=torch.float64)])


class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1: a family gives `decay`.

    All levels come from it without cancellation.
    """

    @abstractmethod
    def decay(self, t) -> Tensor:
        """-ln alpha(t)^2 >= 0, which rises with t."""

    def alpha(self, t) -> Tensor:
        return (-self.decay(t) / 2).exp()

    def sigma(self, t) -> Tensor:
        return (-torch.expm1(-self.decay(t))).sqrt()

    def sigma_hat(self, t) -> Tensor:
        return torch.expm1(self.decay(t)).sqrt()


@tensor_cache(maxsize=64)
def _ddpm_decay(T: int, beta_schedule, s: float, beta_max: float, device: torch.device) -> Tensor:
    """[T + 1] float64 -ln alpha_bar at 0 .. T, kept on each device.

    A copy for each call would wait for the device.
    """
    t = torch.arange(T + 1, dtype=torch.float64, device="cpu")
    if beta_schedule == "cosine":
        angle = (t / T + s) / (1 + s) * math.pi / 2
        beta = 1 - (angle[1:].cos() / angle[:-1].cos()) ** 2
    elif beta_schedule == "linear":
        beta = (1e-4 + (t[1:] - 1) / (T - 1) * (0.02 - 1e-4)) * (1000 / T)
    else:
        beta, beta_max = as_float64(beta_schedule), 1.0
    return torch.cat([t[:1], -torch.log1p(-beta.clamp(max=beta_max)).cumsum(0)]).to(device)


@dataclass(frozen=True)
class DDPM(VariancePreserving):
    """DDPM's T discrete times (arXiv 2006.11239), which are DDIM's too.

    alpha(t)^2 = alpha_bar_t = prod_{s <= t} (1 - beta_s), t in 1 .. T, and alpha(0) = 1.

    Args:
        T: number of times.
        beta_schedule: "linear", from 1e-4 to 0.02 for T = 1000 and 1000/T of that else (arXiv
            2006.11239; 2102.09672); "cosine", alpha_bar = cos^2((t/T + s)/(1 + s) pi/2) up to a
            constant (2102.09672, eq. 17); or T numbers, beta_1 .. beta_T in (0, 1), which are kept
            as they are, as a tuple. The last may be 1, zero terminal SNR (2305.08891): alpha(T) is
            then 0.
        s: offset of "cosine".
        beta_max: bound of every beta of "linear" and "cosine".

    `alpha`, `sigma` and `sigma_hat` take whole times 0 .. T, of any dtype.

    Raises:
        ValueError: T or beta_schedule is not as said.
    """

    T: int = 1000
    beta_schedule: str | tuple[float, ...] = "linear"
    s: float = 0.008
    beta_max: float = 0.999

    t_end, t_min = 0.0, 1.0

    def __post_init__(self):
        if not (isinstance(self.T, int) and self.T >= 2):
            raise ValueError(f"DDPM: T must be a whole number, at least 2, got {self.T}")
        if isinstance(self.beta_schedule, str):
            if self.beta_schedule not in BETA_SCHEDULES:
                raise self._wrong_betas(repr(self.beta_schedule))
            return
        given = as_float64(self.beta_schedule)
        if given.shape != (self.T,):
            raise self._wrong_betas(f"numbers of shape {list(given.shape)}")
        betas = tuple(given.tolist())
        if not (all(0 < beta < 1 for beta in betas[:-1]) and 0 < betas[-1] <= 1):
            raise self._wrong_betas(f"numbers from {min(betas)} to {max(betas)}")
        object.__setattr__(self, "beta_schedule", betas)  # hashable, also of a list or a tensor

    def _wrong_betas(self, found: str) -> ValueError:
        return ValueError(
            f"DDPM: beta_schedule must be 'linear', 'cosine' or {self.T} numbers in (0, 1), the "
            f"last of which may be 1, got {found}"
        )

    @property
    def ends_in_noise(self) -> bool:
        return not isinstance(self.beta_schedule, str) and self.beta_schedule[-1] == 1

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return float(self.T)

    def _table(self, device: torch.device) -> Tensor:
        return _ddpm_decay(self.T, self.beta_schedule, self.s, self.beta_max, device)

    @property
    def alphas_cumprod(self) -> Tensor:
        """[T] float64, alpha_bar_t for t = 1 .. T."""
        return (-self._table(torch.device("cpu"))[1:]).exp()

    def decay(self, t) -> Tensor:
        t = t if isinstance(t, Tensor) else torch.as_tensor(t, device="cpu")
        return self._table(t.device)[t.long()]

    def time(self, sigma_hat) -> Tensor:
        """The real time in [1, T] of a level.

        ln sigma_hat is linear between whole times, and held at the ends; 1 / sigma_hat is linear
        before a T of infinite level.
        """
        sigma_hat = as_float64(sigma_hat)
        return 1 + interpolated_index(
            torch.expm1(self._table(sigma_hat.device)[1:]).log() / 2, sigma_hat.log()
        )

    def times(self, steps: int) -> Tensor:
        """[steps] whole times from T down to 1, evenly spread and rounded.

        They are DDIM's subsequence (arXiv 2010.02502, appendix D.2).
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"DDPM: steps must be from 1 to T = {self.T}, got {steps}")
        return torch.linspace(self.T, 1, steps, dtype=torch.float64).round()


def interpolated_index(log_levels: Tensor, values: Tensor) -> Tensor:
    """The real index of each value in a rising table of ln sigma.

    It is linear between the table's entries and held at its ends. Before a last entry of infinity
    1 / sigma is linear in it instead, which falls to 0 there.
    """
    values = values.clamp(log_levels[0], log_levels[-1])
    right = torch.searchsorted(log_levels, values).clamp(1, len(log_levels) - 1)
    above, below = log_levels[right], log_levels[right - 1]
    before = torch.where(above.isinf(), (below - values).exp(), (above - values) / (above - below))
    return right - before


@dataclass(frozen=True)
class iDDPM:
    """EDM's form of improved DDPM (arXiv 2206.00364, table 1).

    Levels u_j of EDM's state, j in 0 .. M, 0 at the most noise, u_M = 0.

    u_{j-1} = sqrt((u_j^2 + 1) / max(alpha_bar(j-1) / alpha_bar(j), C_1) - 1), alpha_bar(j) =
    sin^2(pi/2 j/(M (C_2 + 1))), which is DDPM's "cosine" read from its end: u_j = sigma_hat(M - j)
    of `DDPM(M, "cosine", s=C_2, beta_max=1 - C_1)`.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    @property
    def ddpm(self) -> DDPM:
        """The same levels as DDPM's times."""
        return DDPM(self.M, "cosine", self.C_2, 1 - self.C_1)

    @property
    def u(self) -> Tensor:
        """[M + 1] float64, the levels, falling to 0."""
        return self.ddpm.sigma_hat(torch.arange(self.M, -1, -1, device="cpu"))

    def sigmas(self, steps: int, *, sigma_min: float = 0.002, sigma_max: float = 81.0) -> Tensor:
        """[steps + 1], the sampler's levels.

        Of the u_j in that range they are as many, evenly spread and rounded, and 0.
        """
        u = self.u
        u = u[(u >= sigma_min) & (u <= sigma_max)]
        if not 1 <= steps <= len(u):
            raise ValueError(
                f"iDDPM: steps must be from 1 to {len(u)}, the levels between {sigma_min} and "
                f"{sigma_max}, got {steps}"
            )
        chosen = (
            torch.linspace(0, len(u) - 1, steps, dtype=torch.float64, device=u.device)
            .round()
            .long()
        )
        return torch.cat([u[chosen], u.new_zeros(1)])


@dataclass(frozen=True)
class VP(VariancePreserving):
    """The VP SDE (arXiv 2011.13456; 2206.00364, table 1).

    sigma_hat(t)^2 = exp(beta_d t^2/2 + beta_min t) - 1, t in [epsilon_t, 1].
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    t_max = 1.0

    def __post_init__(self):
        if not 0 < self.epsilon_t < 1:
            raise ValueError(f"VP: epsilon_t must be between 0 and 1, got {self.epsilon_t}")
        # so that noise is there at epsilon_t, and rises up to 1
        if not 0 < min(self.beta_d * self.epsilon_t / 2, self.beta_d) + self.beta_min < math.inf:
            raise ValueError(
                "VP: beta_min must be above -beta_d epsilon_t / 2 and -beta_d, got "
                f"{self.beta_min} with beta_d {self.beta_d}"
            )

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.epsilon_t

    t_end = t_min

    def decay(self, t) -> Tensor:
        t = as_float64(t)
        return t * (self.beta_d * t / 2 + self.beta_min)

    def time(self, sigma_hat) -> Tensor:
        exponent = (as_float64(sigma_hat) ** 2).log1p()
        return (
            2 * exponent / ((self.beta_min**2 + 2 * self.beta_d * exponent).sqrt() + self.beta_min)
        )

    def times(self, steps: int, *, epsilon_s: float = 1e-3) -> Tensor:
        """[steps] times from 1 to epsilon_s, or to epsilon_t if that is more, evenly spread.

        (arXiv 2206.00364, table 1.)
        """
        return torch.linspace(1, max(epsilon_s, self.epsilon_t), steps, dtype=torch.float64)


@dataclass(frozen=True)
class VE(Schedule):
    """The VE SDE (arXiv 2011.13456): alpha = 1.

    sigma(t) = sigma_min (sigma_max/sigma_min)^t, t in [0, 1].
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    t_end, t_min, t_max = 0.0, 0.0, 1.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "VE: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got "
                f"{self.sigma_min} and {self.sigma_max}"
            )

    def alpha(self, t) -> Tensor:
        return torch.ones_like(as_float64(t))

    def sigma(self, t) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** as_float64(t)

    def time(self, sigma_hat) -> Tensor:
        return (as_float64(sigma_hat) / self.sigma_min).log() / math.log(
            self.sigma_max / self.sigma_min
        )

    def times(self, steps: int) -> Tensor:
        """[steps] times from 1 to 0, evenly spread: a geometric sequence of levels."""
        return torch.linspace(1, 0, steps, dtype=torch.float64)


def flow_time(sigma_hat: Tensor) -> Tensor:
    """Flow matching's time t = sigma_hat / (1 + sigma_hat), which is 1 at an infinite level."""
    return torch.where(sigma_hat.isinf(), 1.0, sigma_hat / (1 + sigma_hat))


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """The straight path of flow matching: alpha = 1 - t, sigma = t, data at 0, noise at 1.

    (arXiv 2210.02747, 2209.03003.)

    t is in [t_min, t_max]. At 0, which is left out, sigma_hat = t / (1 - t) is 0; at 1 no signal is
    left and it is infinite. `samplers.heun` steps well along these levels in flow's own time,
    `time="flow"`.

    A `shift` s above 1 moves times towards the noise (arXiv 2403.03206, eq. 23): the path's own
    time, which is sigma and what a network is told, is s t / (1 + (s - 1) t).

    Raises:
        ValueError: not 0 < t_min < t_max <= 1, or `shift` is not above 0.
    """

    t_min: float = 1e-3
    t_max: float = 0.999
    shift: float = 1.0

    def __post_init__(self):
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(
                "FlowMatching: t_min and t_max must satisfy 0 < t_min < t_max <= 1, got "
                f"{self.t_min} and {self.t_max}"
            )
        if not 0 < self.shift < math.inf:
            raise ValueError(f"FlowMatching: shift must be a number above 0, got {self.shift}")

    @property
    def ends_in_noise(self) -> bool:
        return self.t_max == 1

    @property
    def t_end(self) -> float:  # type: ignore[override]
        return self.t_min

    def alpha(self, t) -> Tensor:
        return (1 - as_float64(t)) / self._slowing(t)

    def sigma(self, t) -> Tensor:
        return self.shift * as_float64(t) / self._slowing(t)

    def _slowing(self, t) -> Tensor:
        return 1 + (self.shift - 1) * as_float64(t)

    def time(self, sigma_hat) -> Tensor:
        sigma = flow_time(as_float64(sigma_hat))
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def times(self, steps: int) -> Tensor:
        """[steps] times from t_max to t_min, evenly spread."""
        return torch.linspace(self.t_max, self.t_min, steps, dtype=torch.float64)


# diffusers' words for what a network predicts
DIFFUSERS_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def of_scheduler(scheduler) -> tuple[str, DDPM | FlowMatching]:
    """What a diffusers scheduler says of the network and of the path that it is trained on.

    Args:
        scheduler: one with `betas`, such as DDPMScheduler and those of its kind, zero terminal SNR
            (`rescale_betas_zero_snr`) and CogVideoX's shifted SNR among them, or of flow matching,
            with its `shift`, such as FlowMatchEulerDiscreteScheduler.

    Returns:
        (prediction, path), prediction a name of `preconditioning.PREDICTIONS`. The path's times 1
        to T are the scheduler's timesteps 0 to T - 1.

    Raises:
        ValueError: it is another, or predicts something else.
    """
    name, config = type(scheduler).__name__, scheduler.config
    betas = getattr(scheduler, "betas", None)
    if betas is None:
        shift = getattr(config, "shift", None)
        if not isinstance(shift, int | float) or getattr(config, "use_dynamic_shifting", False):
            raise ValueError(
                "from_scheduler: scheduler must have betas, or a fixed shift of flow matching, got "
                f"{name}"
            )
        if getattr(config, "invert_sigmas", False):
            raise ValueError(
                f"from_scheduler: invert_sigmas of {name} must be False, as time runs from the "
                "noise to the data there, got True"
            )
        return "velocity", FlowMatching(shift=float(shift))
    prediction = getattr(config, "prediction_type", None)
    if prediction not in DIFFUSERS_PREDICTIONS:
        known = ", ".join(DIFFUSERS_PREDICTIONS)
        raise ValueError(
            f"from_scheduler: the prediction_type of {name} must be one of {known}, got "
            f"{prediction!r}"
        )
    path_betas = _betas_of_path(betas, getattr(scheduler, "alphas_cumprod", None))
    return DIFFUSERS_PREDICTIONS[prediction], DDPM(len(path_betas), path_betas)


def _betas_of_path(betas, alphas_cumprod) -> tuple[float, ...]:
    """The betas of the levels that a scheduler uses.

    They are in its `alphas_cumprod`, a table in float32 mostly, to which its own betas are nearer
    where the two agree. CogVideoX's schedulers change the table alone.
    """
    own = as_float64(betas).cpu()
    if alphas_cumprod is None:
        return tuple(own.tolist())
    table = as_float64(alphas_cumprod).cpu()
    if not torch.allclose((1 - own).cumprod(0), table, rtol=0, atol=1e-5):
        own = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
    return tuple(own.tolist())
