"""EDM's samplers of the probability-flow ODE, with churn: Heun's and Euler's method."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..preconditioning import unwrapped
from .base import Step, checked_levels, network_of, run, unit_noise

TIMES = ("sigma", "flow")


def raised_levels(
    sampler: str, levels: list[float], denoiser, S_churn: float, S_min: float, S_max: float
) -> list[float]:
    """sigma_hat = sigma (1 + gamma) of every step, at the nearest level that the network knows.

    (arXiv 2206.00364, algorithm 2, lines 3 and 5.) A level is not lowered, and what is not raised
    is kept.
    """
    if not S_churn >= 0:
        raise ValueError(f"{sampler}: S_churn must be a number >= 0, got {S_churn}")
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    hats = [sigma * (1 + gamma) if S_min <= sigma <= S_max else sigma for sigma in levels[:-1]]
    round_sigma = getattr(unwrapped(network_of(denoiser)[0]), "round_sigma", None)
    if gamma == 0 or round_sigma is None:
        return hats
    rounded = round_sigma(torch.tensor(hats, dtype=torch.float64)).tolist()
    return [
        max(near, sigma) if sigma < hat < math.inf else hat
        for sigma, hat, near in zip(levels, hats, rounded, strict=False)
    ]


def edm_steps(
    sampler: str,
    sigmas,
    denoiser,
    churn: tuple[float, float, float, float],
    *,
    correct: bool,
    time: str = "sigma",
) -> list[Step]:
    """Algorithm 2 of arXiv 2206.00364; churn is (S_churn, S_min, S_max, S_noise)."""
    S_churn, S_min, S_max, S_noise = churn
    levels = checked_levels(sampler, sigmas, denoiser, falling=False)
    hats = raised_levels(sampler, levels, denoiser, S_churn, S_min, S_max)
    steps = []
    for (sigma, sigma_next), sigma_hat in zip(pairwise(levels), hats, strict=True):
        # lines 4 to 6: increase noise temporarily; at every step, so that a step's noise does not
        # depend on S_min and S_max
        raised = None
        if S_churn > 0:
            raised = S_noise * math.sqrt(sigma_hat**2 - sigma**2) if sigma < math.inf else 0.0
        # lines 7 and 8: an Euler step from sigma_hat to sigma_next
        h = sigma_next - sigma_hat if sigma < math.inf else sigma_next
        # lines 9 to 11: 2nd order correction, unless the step ends at 0
        w = _correction(sigma_hat, sigma_next, time) if correct and sigma_next > 0 else None
        steps.append(Step(sigma, sigma_next, h, sigma_hat, raised, w))
    return steps


def _correction(sigma: float, sigma_next: float, time: str) -> float | None:
    """Step's share w of a correction, None where there is none.

    Heun's method for z = x / (1 + sigma) in t = sigma / (1 + sigma), dz/dt = d - D, makes of EDM's
    correction h (d' - d) / 2 the share w = (1 + sigma_next) / (1 + sigma). From an infinite sigma
    the limit of w h is -(1 + sigma_next), and Step's h is sigma_next; in time sigma there is none.
    """
    if time == "flow":
        if sigma == math.inf:
            return -(1 + sigma_next) / sigma_next
        return (1 + sigma_next) / (1 + sigma)
    return None if sigma == math.inf else 1.0


@torch.no_grad()
def heun(
    denoiser,
    x: Tensor,
    sigmas,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    time: str = "sigma",
    generator=None,
    randn_like=None,
    callback=None,
) -> Tensor:
    """EDM's second-order sampler of dx/dsigma = (x - D(x, sigma)) / sigma.

    (arXiv 2206.00364, algorithm 2.)

    Args:
        denoiser, x, sigmas: see the module. 2 steps - 1 calls if the last level is 0.
        S_churn, S_min, S_max, S_noise: noise added before a step at S_min <= sigma <= S_max; none
            with S_churn = 0. The raised level is rounded by the denoiser's `round_sigma`, if it is
            a network, or a `functools.partial` of one, that has it.
        time: in which Heun's method steps: "sigma", EDM's, or "flow", t = sigma / (1 + sigma) with
            the state x / (1 + sigma), for levels of flow matching, whose first steps are as long as
            all others together in sigma. A step from an infinite level is Euler's in "sigma".
        generator: `torch.Generator` of that noise; None is torch's global one.
        randn_like: `randn_like(x) -> unit noise` in place of the generator, once in each step; it
            allows a seed for each sample, or recorded noise.
        callback: called at every step with a dict of step, x (before noise is added), sigma (its
            level) and denoised.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two positive levels, the first of which may
            be infinite and the last 0, S_churn is negative, or time is neither.

    Deterministic without churn, and with it for one state of the generator.
    """
    if time not in TIMES:
        raise ValueError(f"heun: time must be one of {', '.join(TIMES)}, got {time!r}")
    churn = (S_churn, S_min, S_max, S_noise)
    steps = edm_steps("heun", sigmas, denoiser, churn, correct=True, time=time)
    return run(denoiser, x, steps, unit_noise(generator, randn_like), callback)


@torch.no_grad()
def euler(
    denoiser,
    x: Tensor,
    sigmas,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    generator=None,
    randn_like=None,
    callback=None,
) -> Tensor:
    """The first-order sampler of the same equation: `heun` without its correction.

    One call in each step, which is the same in sigma and in flow matching's time. Arguments as
    there.
    """
    churn = (S_churn, S_min, S_max, S_noise)
    steps = edm_steps("euler", sigmas, denoiser, churn, correct=False)
    return run(denoiser, x, steps, unit_noise(generator, randn_like), callback)
