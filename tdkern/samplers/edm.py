"""EDM's samplers of the probability-flow ODE, with churn: Heun's and Euler's method."""
import math
from itertools import pairwise

import torch
from torch import Tensor

from .base import Step, checked_levels, denoise, fused, network, unit_noise


def raised_levels(sampler: str, levels: list[float], S_churn: float, S_min: float, S_max: float) -> list[float]:
    """sigma_hat = sigma (1 + gamma) of every step (arXiv 2206.00364, algorithm 2, lines 3 and 5)."""
    if not S_churn >= 0:
        raise ValueError(f"{sampler}: S_churn must be a number >= 0, got {S_churn}")
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    return [sigma * (1 + gamma) if S_min <= sigma <= S_max else sigma for sigma in levels[:-1]]


def _plain(denoiser, x: Tensor, levels: list[float], hats: list[float], churns: list[float], draw, correct: bool, callback) -> Tensor:
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        sigma_hat, x_hat = hats[step], x + churns[step] * draw(x) if draw else x
        denoised = denoise(denoiser, x_hat, sigma_hat)
        if callback is not None:
            callback({"step": step, "x": x, "sigma": sigma, "denoised": denoised})
        d = (x_hat - denoised) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if correct and sigma_next > 0:
            d_next = (x - denoise(denoiser, x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
    return x


def _sample(sampler: str, denoiser, x: Tensor, sigmas, S_churn: float, S_min: float, S_max: float, S_noise: float, generator, randn_like, callback) -> Tensor:
    levels = checked_levels(sampler, sigmas, falling=False)
    hats = raised_levels(sampler, levels, S_churn, S_min, S_max)
    churns = [S_noise * math.sqrt(sigma_hat**2 - sigma**2) for sigma_hat, sigma in zip(hats, levels[:-1], strict=True)]
    # at every step, so that a step's noise does not depend on S_min and S_max
    draw, correct = unit_noise(generator, randn_like) if S_churn > 0 else None, sampler == "heun"
    net, labels = network(denoiser, x, callback)
    if net is None:
        return _plain(denoiser, x, levels, hats, churns, draw, correct, callback)
    coming = zip([*churns[1:], None] if draw else [None] * len(hats), [*hats[1:], levels[-1]], strict=True)
    steps = [Step(sigma_hat, sigma_next - sigma_hat, sigma_next, *raised) for sigma_hat, sigma_next, raised in zip(hats, levels[1:], coming, strict=True)]
    return fused(net, labels, x + churns[0] * draw(x) if draw else x, steps, draw, correct)


@torch.no_grad()
def heun(denoiser, x: Tensor, sigmas, *, S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0,
         generator=None, randn_like=None, callback=None) -> Tensor:
    """EDM's second-order sampler of dx/dsigma = (x - D(x, sigma)) / sigma (arXiv 2206.00364, algorithm 2).

    Args:
        denoiser, x, sigmas: see the module. 2 steps - 1 calls if the last level is 0.
        S_churn, S_min, S_max, S_noise: noise added before a step at S_min <= sigma <= S_max; none with S_churn = 0.
        generator: `torch.Generator` of that noise; None is torch's global one.
        randn_like: `randn_like(x) -> unit noise` in place of the generator, once a step; for a seed a sample, or recorded noise.
        callback: called at every step with a dict of step, x (before noise is added), sigma (its level) and denoised.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two positive levels, the last of which may be 0, or S_churn is negative.

    Deterministic without churn, and with it for one state of the generator.
    """
    return _sample("heun", denoiser, x, sigmas, S_churn, S_min, S_max, S_noise, generator, randn_like, callback)


@torch.no_grad()
def euler(denoiser, x: Tensor, sigmas, *, S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0,
          generator=None, randn_like=None, callback=None) -> Tensor:
    """The first-order sampler of the same equation: `heun` without its correction, one call a step. Arguments as there."""
    return _sample("euler", denoiser, x, sigmas, S_churn, S_min, S_max, S_noise, generator, randn_like, callback)
