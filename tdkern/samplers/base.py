"""What the samplers share: their levels, their noise, one call of the denoiser, and the fused path."""
import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..networks.precond import Preconditioned
from ..ops import heun_step
from ..preconditioning import unwrapped


def checked_levels(sampler: str, sigmas, *, falling: bool = True) -> list[float]:
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"{sampler}: sigmas must have shape [steps + 1] with at least one step, got {list(levels.shape)}")
    levels = levels.tolist()  # the sampler's only host synchronisation
    if not (all(0 < sigma < math.inf for sigma in levels[:-1]) and 0 <= levels[-1] < math.inf):
        raise ValueError(f"{sampler}: sigmas must be positive and finite, the last may be 0, got {levels}")
    if falling and not all(sigma > sigma_next for sigma, sigma_next in pairwise(levels)):
        raise ValueError(f"{sampler}: sigmas must fall from step to step, got {levels}")
    return levels


def unit_noise(generator, randn_like):
    """`draw(x) -> unit noise` like x: from `randn_like` if given, else from the generator, None being torch's global one."""
    if randn_like is not None:
        return randn_like
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def denoise(denoiser, x: Tensor, sigma: float) -> Tensor:
    """D of a batch at one level, in x's dtype."""
    return denoiser(x, x.new_full((len(x),), sigma)).to(x.dtype)


class Step(NamedTuple):
    """x <- x + h (x - D) / sigma, or Heun's correction of it, then noise: what the fused path does in a step."""

    sigma: float  # of x
    h: float
    sigma_next: float  # after h
    churn: float | None  # noise added after the step; None draws none
    behind: float  # the level with that noise


def network(denoiser, x: Tensor, callback) -> tuple[Preconditioned | None, dict]:
    """The network behind the denoiser, with its labels; None unless the fused path gives what the plain one does."""
    net, labels = denoiser, {}
    if isinstance(denoiser, partial) and not denoiser.args:
        net, labels = denoiser.func, denoiser.keywords
    inner = unwrapped(net)
    own = isinstance(inner, Preconditioned) and type(inner).forward is Preconditioned.forward
    if not own or callback is not None or x.dtype not in (torch.float32, torch.float64):
        return None, labels
    return net, labels


def fused(net, labels: dict, x: Tensor, steps: list[Step], draw, correct: bool = False) -> Tensor:
    calls = []  # sigma, h, churn and the level behind it, of every call
    for sigma, h, sigma_next, churn, behind in steps:
        end = h, churn or 0.0, behind
        if correct and sigma_next > 0:
            calls += [(sigma, h, 0.0, sigma_next), (sigma_next, *end)]
        else:
            calls += [(sigma, *end)]
    sigma, h, churn, behind = torch.tensor(calls, dtype=torch.float64, device=x.device).unbind(1)
    inner = unwrapped(net)
    skip_scale = inner.preconditioning.skip_scale(sigma)
    coef = torch.stack([sigma, *skip_scale, h, churn, inner.input_scaling(behind)[0]], 1)
    rows = iter(coef)
    net_dtype = inner.input_dtype(x)

    scaled = None
    for i, step in enumerate(steps):
        state, begin, last = x, None, i + 1 == len(steps)
        if correct and step.sigma_next > 0:
            row = next(rows)
            begin = x
            F = net(x, row[0], raw=True, scaled=scaled, **labels)
            state, scaled = heun_step(F, x, row, net_dtype=net_dtype)
        row = next(rows)
        F = net(state, row[0], raw=True, scaled=scaled, **labels)
        noise = None if step.churn is None else draw(state)
        x, scaled = heun_step(F, state, row, begin, noise, net_dtype=None if last else net_dtype)
    return x
