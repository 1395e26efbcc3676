"""EDM's generalised sampler, to compare what a solver, a schedule and a scaling bring."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedules import EDM, VE, VP, FlowMatching, iDDPM
from .base import checked_levels, denoise, unit_noise
from .edm import raised_levels


def _vp(sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> VP:
    """The VP path with sigma(epsilon_s) and sigma(1) at the ends of a range."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    try:
        return VP(beta_d, high - beta_d / 2, epsilon_s)
    except ValueError as error:
        raise ValueError(
            f"ablation: no VP path rises from sigma({epsilon_s:g}) = {sigma_min} to sigma(1) = "
            f"{sigma_max}; take a lower sigma_min"
        ) from error


class SigmaOfTime(NamedTuple):
    """A schedule as the sampler needs it."""

    sigma: Callable[[float], float]  # of t
    time: Callable[[float], float]  # its inverse
    slope: Callable[[float], float]  # sigma'(t)


def _vp_schedule(sigma_min: float | None, sigma_max: float | None) -> SigmaOfTime:
    lo, hi = RANGES["vp"]
    path = _vp(lo if sigma_min is None else sigma_min, hi if sigma_max is None else sigma_max)

    def sigma(t: float) -> float:
        return path.sigma_hat(t).item()

    def time(sigma: float) -> float:
        return path.time(sigma).item()

    def slope(t: float) -> float:
        return (path.beta_d * t + path.beta_min) * (sigma(t) + 1 / sigma(t)) / 2

    return SigmaOfTime(sigma, time, slope)


RANGES = {
    "vp": tuple(VP().sigma_hat([1e-3, 1]).tolist()),
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
    "edm": (0.002, 80.0),
    "flow": tuple(FlowMatching().sigma_hat([1e-3, 0.999]).tolist()),
}


def ablation_sigmas(
    discretization: str,
    steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Tensor:
    """The levels of one of EDM's discretizations: [steps + 1] float64, falling to 0.

    (arXiv 2206.00364, table 1.)

    Args:
        discretization: "vp", evenly spread times of the VP path that fits the range; "ve", a
            geometric sequence; "iddpm", of `schedules.iDDPM`; "edm", of `schedules.EDM`; "flow",
            evenly spread times of `schedules.FlowMatching`.
        steps: >= 2.
        sigma_min, sigma_max: lowest positive level and highest; None is the discretization's own,
            see RANGES. Of "flow" the highest may be infinite.
        rho: of "edm".

    Raises:
        ValueError: no such discretization, or the range or the steps are not to be had.
    """
    if discretization not in RANGES:
        raise ValueError(
            f"ablation_sigmas: discretization must be one of {', '.join(RANGES)}, got "
            f"{discretization!r}"
        )
    lo, hi = RANGES[discretization]
    lo, hi = lo if sigma_min is None else sigma_min, hi if sigma_max is None else sigma_max
    flow = discretization == "flow"
    edm = EDM(steps, lo, 2 * lo if flow and hi == math.inf else hi, rho)  # checks them all
    if flow:
        t_min, t_max = FlowMatching().time([lo, hi]).tolist()
        return FlowMatching(t_min, t_max).sigmas(steps)
    if discretization == "vp":
        return _vp(lo, hi).sigmas(steps)
    if discretization == "iddpm":
        return iDDPM().sigmas(steps, sigma_min=lo, sigma_max=hi)
    return VE(lo, hi).sigmas(steps) if discretization == "ve" else edm.sigmas()


SCHEDULES = ("vp", "ve", "linear", "flow")
FIXED_SCHEDULES = {
    "ve": SigmaOfTime(math.sqrt, lambda sigma: sigma**2, lambda t: 0.5 / math.sqrt(t)),
    "linear": SigmaOfTime(float, float, lambda t: 1.0),
    "flow": SigmaOfTime(
        lambda t: t / (1 - t), lambda sigma: sigma / (1 + sigma), lambda t: (1 - t) ** -2
    ),
}


def _schedule(name: str, sigma_min: float | None, sigma_max: float | None) -> SigmaOfTime:
    """A schedule by its name; that of VP is made for a range of levels."""
    return _vp_schedule(sigma_min, sigma_max) if name == "vp" else FIXED_SCHEDULES[name]


class Scaling(NamedTuple):
    """A scaling as the sampler needs it."""

    s: Callable[[float], float]  # of sigma
    shrink: Callable[[float], float]  # -s' / s over sigma', of sigma


SCALINGS = {
    "vp": Scaling(lambda sigma: 1 / math.sqrt(1 + sigma**2), lambda sigma: sigma / (1 + sigma**2)),
    "none": Scaling(lambda sigma: 1.0, lambda sigma: 0.0),
    "flow": Scaling(lambda sigma: 1 / (1 + sigma), lambda sigma: 1 / (1 + sigma)),
}
SOLVERS = ("euler", "heun")


@torch.no_grad()
def ablation(
    denoiser,
    x: Tensor,
    sigmas,
    *,
    solver: str = "heun",
    schedule: str = "linear",
    scaling: str = "none",
    alpha: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    generator=None,
    randn_like=None,
    callback=None,
) -> Tensor:
    """EDM's generalised sampler (arXiv 2206.00364, eq. 4, algorithms 1 to 3, table 1).

    It solves dx/dt = (s'/s + sigma'/sigma) x - s sigma'/sigma D(x/s, sigma).

    `sigmas` is the discretization, as of `ablation_sigmas`: t_i = t(sigma_i). By default this is
    `heun`.

    | schedule | sigma(t) | | scaling | s(t) |
    | --- | --- | --- | --- | --- |
    | "vp" | sqrt(exp(beta_d t^2/2 + beta_min t) - 1) | | "vp" | 1/sqrt(1 + sigma(t)^2) |
    | "ve" | sqrt(t) | | "none" | 1 |
    | "linear" | t | | "flow" | 1/(1 + sigma(t)) |
    | "flow" | t/(1 - t) |

    Args:
        denoiser, x, sigmas, callback: see the module; its states are x/s. 2 steps - 1 calls with
            "heun" if the last level is 0, else one in each step.
        solver: "euler" or "heun", which is the second-order step of parameter `alpha`.
        schedule, scaling: see the tables.
        alpha: in (0, 1], where in the step the second derivative is taken: 1 is Heun's method, 1/2
            the midpoint, 2/3 Ralston's.
        sigma_min, sigma_max: of the "vp" schedule, its sigma(0.001) and sigma(1). None: those of
            `schedules.VP()`.
        S_churn, S_min, S_max, S_noise, generator, randn_like: as in `heun`.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` are not at least two positive levels, the last of which may be 0, an
            argument is none of those it may be, or no VP path rises over the range.

    Deterministic without churn, and with it for one state of the generator.
    """
    levels = checked_levels("ablation", sigmas, denoiser, falling=False)
    _check(levels, solver, schedule, scaling, alpha)
    ode = Ode(denoiser, _schedule(schedule, sigma_min, sigma_max), SCALINGS[scaling])
    draw = unit_noise(generator, randn_like) if S_churn > 0 else None
    hats = raised_levels("ablation", levels, denoiser, S_churn, S_min, S_max)
    midpoint = alpha if solver == "heun" else None
    return _solve(ode, x, levels, hats, midpoint, S_noise, draw, callback)


class Ode(NamedTuple):
    """dx/dt along a schedule and a scaling."""

    denoiser: Callable
    path: SigmaOfTime
    scaling: Scaling

    def derivative(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """dx/dt, and the D in it."""
        sigma, slope = self.path.sigma(t), self.path.slope(t)
        s = self.scaling.s(sigma)
        growth = slope / sigma  # sigma' / sigma
        shrink = slope * self.scaling.shrink(sigma)  # -s' / s
        denoised = denoise(self.denoiser, x / s, sigma)
        return (growth - shrink) * x - growth * s * denoised, denoised


def _solve(
    ode: Ode,
    x: Tensor,
    levels: list[float],
    hats: list[float],
    alpha: float | None,
    S_noise: float,
    draw,
    callback,
) -> Tensor:
    """The state after all steps: of second order with an alpha, and of raised noise with a draw."""
    path, s = ode.path, ode.scaling.s
    x = s(levels[0]) * x
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        sigma_hat = hats[step]
        t_hat = path.time(sigma_hat)
        t_next = path.time(sigma_next) if sigma_next > 0 else 0.0
        x_hat = s(sigma_hat) / s(sigma) * x
        if draw is not None:
            x_hat = x_hat + s(sigma_hat) * S_noise * math.sqrt(sigma_hat**2 - sigma**2) * draw(x)
        h = t_next - t_hat
        d, denoised = ode.derivative(x_hat, t_hat)
        if callback is not None:
            callback({"step": step, "x": x / s(sigma), "sigma": sigma, "denoised": denoised})
        x = x_hat + h * d
        if alpha is not None and sigma_next > 0:
            d_next, _ = ode.derivative(x_hat + alpha * h * d, t_hat + alpha * h)
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_next)
    return x / s(levels[-1])


def _check(levels: list[float], solver: str, schedule: str, scaling: str, alpha: float) -> None:
    if levels[0] == math.inf:
        raise ValueError(
            'ablation: sigmas must be finite; from an infinite level take heun with time="flow", '
            "got inf"
        )
    for name, value, known in (
        ("solver", solver, SOLVERS),
        ("schedule", schedule, SCHEDULES),
        ("scaling", scaling, SCALINGS),
    ):
        if value not in known:
            raise ValueError(f"ablation: {name} must be one of {', '.join(known)}, got {value!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"ablation: alpha must be in (0, 1], got {alpha}")
