"""Consistency models' samplers: one call, or a few with fresh noise between them."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .base import checked_levels, denoise, unit_noise


@torch.no_grad()
def multistep(
    denoiser,
    x: Tensor,
    sigmas,
    *,
    sigma_min: float = 0.002,
    clip_denoised: bool = False,
    generator=None,
    randn_like=None,
    callback=None,
) -> Tensor:
    """Consistency models' multistep sampling (arXiv 2303.01469, algorithm 1).

    x <- D(x, sigma_i) + sqrt(max(sigma_{i+1}, sigma_min)^2 - sigma_min^2) noise. The last level,
    sigma_min or 0, adds no noise and is not asked about: levels of indices 0, 22 and 39 of 40 are
    `schedules.EDM(40).sigma([0, 22, 39])`, and mean two calls.

    Args:
        denoiser, x, sigmas, callback: see the module; one call in each step, of a network that
            gives D from any level at once. The levels fall.
        sigma_min: level at which the network was trained to give x back, >= 0.
        clip_denoised: clamp D, and the result, to [-1, 1].
        generator: `torch.Generator` of the noise; None is torch's global one.
        randn_like: `randn_like(x) -> unit noise` in place of the generator, once in each step that
            adds noise.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two falling positive levels, the first of
            which may be infinite and the last 0, or sigma_min is negative.

    Deterministic for one state of the generator.
    """
    levels = checked_levels("multistep", sigmas, denoiser)
    if not sigma_min >= 0:
        raise ValueError(f"multistep: sigma_min must be at least 0, got {sigma_min}")
    return _sample(
        denoiser, x, levels, sigma_min, clip_denoised, unit_noise(generator, randn_like), callback
    )


@torch.no_grad()
def onestep(denoiser, x: Tensor, sigmas, *, clip_denoised: bool = False, callback=None) -> Tensor:
    """Consistency models' one-step sampling, D(x, sigmas[0]).

    It is `multistep` that stops after its first call. Arguments as there.

    Only sigmas[0] is used, and may be alone, [80.0]. Deterministic.
    """
    first = checked_levels("onestep", sigmas, denoiser, least=1)[0]
    return _sample(denoiser, x, [first, 0.0], 0.0, clip_denoised, None, callback)


def _sample(
    denoiser, x: Tensor, levels: list[float], sigma_min: float, clip_denoised: bool, draw, callback
) -> Tensor:
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(denoiser, x, sigma)
        if clip_denoised:
            denoised = denoised.clamp(-1, 1)
        if callback is not None:
            callback({"step": step, "x": x, "sigma": sigma, "denoised": denoised})
        x = denoised
        if sigma_next > sigma_min:
            x = x + math.sqrt(sigma_next**2 - sigma_min**2) * draw(x)
    return x.clamp(-1, 1) if clip_denoised else x
