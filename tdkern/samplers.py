"""Samplers: each is one plain function from scaled noise to data.

All take `denoiser(x, sigma) -> D` with x [B, ...] and sigma [B] in x's dtype, the start `x` = unit noise times sigmas[0], and
the levels `sigmas` (`schedules.EDM.sigmas`). The state keeps x's dtype: give float64, as EDM does, since differences of large
states lose digits; a denoiser that computes in less is converted back. They run without gradients.
"""
import math
from itertools import pairwise

import torch
from torch import Tensor


def _levels(sampler: str, sigmas) -> list[float]:
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"{sampler}: sigmas must have shape [steps + 1] with at least one step, got {list(levels.shape)}")
    levels = levels.tolist()  # the sampler's only host synchronisation
    if not (all(0 < sigma < math.inf for sigma in levels[:-1]) and 0 <= levels[-1] < math.inf):
        raise ValueError(f"{sampler}: sigmas must be positive and finite, the last may be 0, got {levels}")
    return levels


def _denoise(denoiser, x: Tensor, sigma: float) -> Tensor:
    return denoiser(x, x.new_full((len(x),), sigma)).to(x.dtype)


def _churn(x: Tensor, sigma: float, steps: int, S_churn: float, S_min: float, S_max: float, S_noise: float, generator, randn_like) -> tuple[Tensor, float]:
    """Raise x's noise level from sigma to sigma (1 + gamma) (arXiv 2206.00364, algorithm 2, lines 4 to 6)."""
    if S_churn == 0:
        return x, sigma
    # drawn at every step, so that a step's noise does not depend on S_min and S_max
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) if randn_like is None else randn_like(x)
    gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0.0
    sigma_hat = sigma * (1 + gamma)
    return x + math.sqrt(sigma_hat**2 - sigma**2) * S_noise * noise, sigma_hat


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
        ValueError: `sigmas` is not a list of at least two positive levels, the last of which may be 0.

    Deterministic without churn, and with it for one state of the generator.
    """
    sigmas = _levels("heun", sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_hat, sigma_hat = _churn(x, sigma, len(sigmas) - 1, S_churn, S_min, S_max, S_noise, generator, randn_like)
        denoised = _denoise(denoiser, x_hat, sigma_hat)
        if callback is not None:
            callback({"step": step, "x": x, "sigma": sigma, "denoised": denoised})
        d = (x_hat - denoised) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if sigma_next > 0:
            d_next = (x - _denoise(denoiser, x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
    return x


@torch.no_grad()
def euler(denoiser, x: Tensor, sigmas, *, S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0,
          generator=None, randn_like=None, callback=None) -> Tensor:
    """The first-order sampler of the same equation: `heun` without its correction, one call a step. Arguments as there."""
    sigmas = _levels("euler", sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_hat, sigma_hat = _churn(x, sigma, len(sigmas) - 1, S_churn, S_min, S_max, S_noise, generator, randn_like)
        denoised = _denoise(denoiser, x_hat, sigma_hat)
        if callback is not None:
            callback({"step": step, "x": x, "sigma": sigma, "denoised": denoised})
        x = x_hat + (sigma_next - sigma_hat) * (x_hat - denoised) / sigma_hat
    return x
