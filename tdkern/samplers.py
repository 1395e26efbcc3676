"""Samplers: each is one plain function from scaled noise to data.

All take `denoiser(x, sigma) -> D` with x [B, ...] and sigma [B] in x's dtype, the start `x` = unit noise times sigmas[0], and
the levels `sigmas` (`schedules.EDM.sigmas`). The state keeps x's dtype: give float64, as EDM does, since differences of large
states lose digits; a denoiser that computes in less is converted back. They run without gradients.

A denoiser that is a network of `networks` (`EDMPrecond` and its like), or a `functools.partial` of one that gives its labels by
keyword, is called through its raw output F, and `heun_step` makes its next input from F in one launch. The result is the same to
rounding. A callback, which is shown what that launch does not make, takes the plain path, and so does every other callable:
for a compiled network, compile the `model` inside it.
"""
import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .networks.precond import _Precond
from .ops import heun_step


def _levels(sampler: str, sigmas) -> list[float]:
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"{sampler}: sigmas must have shape [steps + 1] with at least one step, got {list(levels.shape)}")
    levels = levels.tolist()  # the sampler's only host synchronisation
    if not (all(0 < sigma < math.inf for sigma in levels[:-1]) and 0 <= levels[-1] < math.inf):
        raise ValueError(f"{sampler}: sigmas must be positive and finite, the last may be 0, got {levels}")
    return levels


def _raised_levels(levels: list[float], S_churn: float, S_min: float, S_max: float) -> list[float]:
    """sigma_hat = sigma (1 + gamma) of every step (arXiv 2206.00364, algorithm 2, lines 3 and 5)."""
    gamma = min(S_churn / (len(levels) - 1), math.sqrt(2) - 1)
    return [sigma * (1 + gamma) if S_min <= sigma <= S_max else sigma for sigma in levels[:-1]]


def _network(denoiser) -> tuple[_Precond | None, dict]:
    """The network behind the denoiser, with its labels; None unless its D is exactly that of its F."""
    net, labels = (denoiser.func, denoiser.keywords) if isinstance(denoiser, partial) and not denoiser.args else (denoiser, {})
    own = isinstance(net, _Precond) and all(getattr(type(net), name) is getattr(_Precond, name) for name in ("forward", "raw"))
    return net if own else None, labels


def _plain(denoiser, x: Tensor, levels: list[float], hats: list[float], churns: list[float], draw, correct: bool, callback) -> Tensor:
    def denoise(x: Tensor, sigma: float) -> Tensor:
        return denoiser(x, x.new_full((len(x),), sigma)).to(x.dtype)

    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        sigma_hat, x_hat = hats[step], x + churns[step] * draw(x) if draw else x
        denoised = denoise(x_hat, sigma_hat)
        if callback is not None:
            callback({"step": step, "x": x, "sigma": sigma, "denoised": denoised})
        d = (x_hat - denoised) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if correct and sigma_next > 0:
            d_next = (x - denoise(x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
    return x


def _fused(net: _Precond, labels: dict, x: Tensor, levels: list[float], hats: list[float], churns: list[float], draw, correct: bool) -> Tensor:
    calls = []  # sigma, h, churn and the level behind it, of every call
    for step, (sigma_hat, sigma_next) in enumerate(zip(hats, levels[1:], strict=True)):
        h, coming = sigma_next - sigma_hat, (churns[step + 1], hats[step + 1]) if step + 1 < len(hats) else (0.0, sigma_next)
        calls += [(sigma_hat, h, 0.0, sigma_next), (sigma_next, h, *coming)] if correct and sigma_next > 0 else [(sigma_hat, h, *coming)]
    sigma, h, churn, behind = torch.tensor(calls, dtype=torch.float64, device=x.device).unbind(1)
    coef = torch.stack([sigma, *net.output_scaling(sigma), h, churn, net.input_scaling(behind)[0]], 1)

    x_hat = x + churns[0] * draw(x) if draw else x
    scaled, c_noise = net.scaled(x_hat, hats[0])
    rows = zip(coef, net.input_scaling(sigma)[1].to(c_noise.dtype)[:, None].expand(-1, len(x)), strict=True)
    net_dtype = scaled.dtype
    for step, sigma_next in enumerate(levels[1:]):
        x, begin, last = x_hat, None, step + 1 == len(hats)
        if correct and sigma_next > 0:
            row, c_noise = next(rows)
            begin = x_hat
            x, scaled = heun_step(net.raw_scaled(scaled, c_noise, **labels), x_hat, row, net_dtype=net_dtype)
        row, c_noise = next(rows)
        F = net.raw_scaled(scaled, c_noise, **labels)
        x_hat, scaled = heun_step(F, x, row, begin, draw(x) if draw and not last else None, net_dtype=None if last else net_dtype)
    return x_hat


def _sample(sampler: str, denoiser, x: Tensor, sigmas, S_churn: float, S_min: float, S_max: float, S_noise: float, generator, randn_like, callback) -> Tensor:
    levels = _levels(sampler, sigmas)
    hats = _raised_levels(levels, S_churn, S_min, S_max)
    churns = [S_noise * math.sqrt(sigma_hat**2 - sigma**2) for sigma_hat, sigma in zip(hats, levels[:-1], strict=True)]

    def draw(x: Tensor) -> Tensor:  # at every step, so that a step's noise does not depend on S_min and S_max
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) if randn_like is None else randn_like(x)

    run = levels, hats, churns, draw if S_churn > 0 else None, sampler == "heun"
    net, labels = _network(denoiser)
    if net is None or callback is not None or x.dtype not in (torch.float32, torch.float64):
        return _plain(denoiser, x, *run, callback)
    return _fused(net, labels, x, *run)


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
    return _sample("heun", denoiser, x, sigmas, S_churn, S_min, S_max, S_noise, generator, randn_like, callback)


@torch.no_grad()
def euler(denoiser, x: Tensor, sigmas, *, S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0,
          generator=None, randn_like=None, callback=None) -> Tensor:
    """The first-order sampler of the same equation: `heun` without its correction, one call a step. Arguments as there."""
    return _sample("euler", denoiser, x, sigmas, S_churn, S_min, S_max, S_noise, generator, randn_like, callback)
