"""DDIM at any eta; eta = 1 is DDPM's ancestral sampler."""
import math
from itertools import pairwise

import torch
from torch import Tensor

from ..schedules import two_moment
from .base import Step, checked_levels, denoise, fused, network, unit_noise


@torch.no_grad()
def ddim(denoiser, x: Tensor, sigmas, *, eta: float = 0.0, generator=None, randn_like=None, callback=None) -> Tensor:
    """DDIM, between the probability-flow ODE (eta = 0, which is `euler`) and DDPM's ancestral sampling (eta = 1).

    x_tau = (1 - k) D + k x + s noise,  k = r sqrt(1 - eta^2 + (eta r)^2),  s = eta sigma_tau sqrt(1 - r^2),  r = sigma_tau / sigma_t:
    the two-moment step (arXiv 2010.02502, eq. 12 and 16; `schedules.two_moment`) divided by alpha_tau. In this state alpha is gone,
    so it is the step of DDPM, VP, VE and flow matching alike.

    Args:
        denoiser, x, sigmas, callback: see the module; one call a step. The levels fall.
        eta: in [0, 1], the share of a step's noise that is drawn anew.
        generator: `torch.Generator` of that noise; None is torch's global one.
        randn_like: `randn_like(x) -> unit noise` in place of the generator, once a step that does not end at 0.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two falling positive levels, the last of which may be 0, or eta is out of its range.

    Deterministic with eta = 0, and otherwise for one state of the generator.
    """
    return _sample("ddim", denoiser, x, sigmas, eta, generator, randn_like, callback)


@torch.no_grad()
def ddpm(denoiser, x: Tensor, sigmas, *, generator=None, randn_like=None, callback=None) -> Tensor:
    """DDPM's ancestral sampler (arXiv 2006.11239, eq. 7, of the lower variance beta-tilde): `ddim` with eta = 1. Arguments as there."""
    return _sample("ddpm", denoiser, x, sigmas, 1.0, generator, randn_like, callback)


def _sample(sampler: str, denoiser, x: Tensor, sigmas, eta: float, generator, randn_like, callback) -> Tensor:
    levels = checked_levels(sampler, sigmas)
    if not 0 <= eta <= 1:
        raise ValueError(f"{sampler}: eta must be in [0, 1], got {eta}")
    kappas = two_moment(1.0, levels[:-1], 1.0, levels[1:], eta=eta)[1].tolist()
    churns = [eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2) if eta and sigma_next else None for sigma, sigma_next in pairwise(levels)]
    draw = unit_noise(generator, randn_like)
    net, labels = network(denoiser, x, callback)
    if net is not None:
        steps = [Step(sigma, sigma * (kappa - 1), sigma_next, churn, sigma_next)
                 for (sigma, sigma_next), kappa, churn in zip(pairwise(levels), kappas, churns, strict=True)]
        return fused(net, labels, x, steps, draw)
    for step, (sigma, kappa, churn) in enumerate(zip(levels[:-1], kappas, churns, strict=True)):
        denoised = denoise(denoiser, x, sigma)
        if callback is not None:
            callback({"step": step, "x": x, "sigma": sigma, "denoised": denoised})
        x = denoised + kappa * (x - denoised)
        if churn is not None:
            x = x + churn * draw(x)
    return x
