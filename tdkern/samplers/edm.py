"""EDM's samplers of the probability-flow ODE, with churn: Heun's and Euler's method."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .base import Step, checked_levels, run, unit_noise


def raised_levels(
    sampler: str, levels: list[float], S_churn: float, S_min: float, S_max: float
) -> list[float]:
    """sigma_hat = sigma (1 + gamma) of every step.

    (arXiv 2206.00364, algorithm 2, lines 3 and 5.)
    """
    if not S_churn >= 0:
        raise ValueError(f"{sampler}: S_churn must be a number >= 0, got {S_churn}")
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    return [sigma * (1 + gamma) if S_min <= sigma <= S_max else sigma for sigma in levels[:-1]]


def edm_steps(
    sampler: str, sigmas, churn: tuple[float, float, float, float], *, correct: bool
) -> list[Step]:
    """Algorithm 2 of arXiv 2206.00364; churn is (S_churn, S_min, S_max, S_noise)."""
    S_churn, S_min, S_max, S_noise = churn
    levels = checked_levels(sampler, sigmas, falling=False)
    hats = raised_levels(sampler, levels, S_churn, S_min, S_max)
    steps = []
    for (sigma, sigma_next), sigma_hat in zip(pairwise(levels), hats, strict=True):
        # lines 4 to 6: increase noise temporarily; at every step, so that a step's noise does not
        # depend on S_min and S_max
        raised = S_noise * math.sqrt(sigma_hat**2 - sigma**2) if S_churn > 0 else None
        # lines 7 and 8: an Euler step from sigma_hat to sigma_next
        h = sigma_next - sigma_hat
        # lines 9 to 11: 2nd order correction, unless the step ends at 0
        corrected = correct and sigma_next > 0
        steps.append(Step(sigma, sigma_next, h, sigma_hat, raised, corrected))
    return steps


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
    generator=None,
    randn_like=None,
    callback=None,
) -> Tensor:
    """EDM's second-order sampler of dx/dsigma = (x - D(x, sigma)) / sigma.

    (arXiv 2206.00364, algorithm 2.)

    Args:
        denoiser, x, sigmas: see the module. 2 steps - 1 calls if the last level is 0.
        S_churn, S_min, S_max, S_noise: noise added before a step at S_min <= sigma <= S_max; none
            with S_churn = 0.
        generator: `torch.Generator` of that noise; None is torch's global one.
        randn_like: `randn_like(x) -> unit noise` in place of the generator, once in each step; it
            allows a seed for each sample, or recorded noise.
        callback: called at every step with a dict of step, x (before noise is added), sigma (its
            level) and denoised.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two positive levels, the last of which may be
            0, or S_churn is negative.

    Deterministic without churn, and with it for one state of the generator.
    """
    steps = edm_steps("heun", sigmas, (S_churn, S_min, S_max, S_noise), correct=True)
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

    One call in each step. Arguments as there.
    """
    steps = edm_steps("euler", sigmas, (S_churn, S_min, S_max, S_noise), correct=False)
    return run(denoiser, x, steps, unit_noise(generator, randn_like), callback)
