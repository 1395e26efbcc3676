"""Few-step solvers of the probability-flow ODE: DPM-Solver++(2M) and UniPC.

They remember the last denoised states.

With lambda = -ln sigma the ODE in D is linear but for D(lambda), and over a step of length h

    x(lambda + h) = e^-h x + integral_0^1 h e^-h(1-u) D(lambda + u h) du

is exact. A solver puts the polynomial through known values of D in the place of D (arXiv
2211.01095, 2302.04867).
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .base import checked_levels, denoise


@torch.no_grad()
def dpmpp(denoiser, x: Tensor, sigmas, *, lower_order_final: bool = False, callback=None) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order, one call in each step.

    x <- e^-h x + (1 - e^-h) (D + (D - D_before) / (2 r)),  h = ln(sigma / sigma_next),  r =
    h_before / h. The first step, and one to level 0, are of first order.

    Args:
        denoiser, x, sigmas, callback: see the module; one call in each step. The levels fall.
        lower_order_final: take the last step in first order also where it ends at a positive level,
            as diffusers does with few steps. On a plain VP grid down to sigma_min that step is by
            far the longest in lambda, and which order is the better depends on the data; a list
            that ends at 0 is better than both.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two falling positive levels, the first of
            which may be infinite and the last 0.

    Deterministic.
    """
    levels = checked_levels("dpmpp", sigmas, denoiser)
    return _sample(denoiser, x, levels, 2, False, lower_order_final, callback)


@torch.no_grad()
def unipc(
    denoiser,
    x: Tensor,
    sigmas,
    *,
    order: int = 2,
    lower_order_final: bool = False,
    callback=None,
) -> Tensor:
    """UniPC of data prediction with B(h) = e^h - 1 (arXiv 2302.04867, section 3).

    Predictor and corrector take one call in each step.

    A step is predicted from the last `order` values of D. The value at the predicted point, which
    the next step needs anyway, corrects the step: one order more. The first steps, and where level
    0 ends the list the last ones, have fewer values and a lower order.

    Args:
        denoiser, x, sigmas, callback: see the module; one call in each step. The levels fall. The
            callback is shown the predicted state.
        order: of the predictor, 1, 2 or 3.
        lower_order_final: lower the order of the last steps also where the list ends at a positive
            level, as diffusers does: the last has order 1, the one before it at most 2. See
            `dpmpp`.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two falling positive levels, the first of
            which may be infinite and the last 0, or order is none of 1, 2, 3.

    Deterministic.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"unipc: order must be 1, 2 or 3, got {order}")
    levels = checked_levels("unipc", sigmas, denoiser)
    return _sample(denoiser, x, levels, order, True, lower_order_final, callback)


def _sample(
    denoiser, x: Tensor, levels: list[float], order: int, correct: bool, lower: bool, callback
) -> Tensor:
    lambdas = [-math.log(sigma) if sigma > 0 else math.inf for sigma in levels]
    lower = lower or levels[-1] == 0
    known = []  # (lambda, D), the newest first
    begin, values = x, 0  # the state and the number of values that the last prediction took
    for step, (lam, lam_next) in enumerate(pairwise(lambdas)):
        denoised = denoise(denoiser, x, levels[step])
        if callback is not None:
            callback({"step": step, "x": x, "sigma": levels[step], "denoised": denoised})
        if correct and known:
            x = _advance(begin, lam, [*known[:values], (lam, denoised)])
        if lam == -math.inf:
            # the state is the unit noise: x = D + sigma noise, and no polynomial passes through
            # values that are infinitely far apart
            x = denoised + levels[1] * x
            continue
        known = [(lam, denoised), *known[: order - 1]]
        values = min(len(known), len(levels) - 1 - step if lower else order)
        begin = x
        x = _advance(begin, lam_next, known[:values])
    return x


def _advance(x: Tensor, lam_next: float, known: list[tuple[float, Tensor]]) -> Tensor:
    """x at lam_next, from x at the first known value's lambda.

    The polynomial through all of them is taken as its first value and differences from it.

    The moments mu_n = integral_0^1 h e^-h(1-u) u^n du, that is mu_0 = 1 - e^-h and mu_n = 1 - n/h
    mu_{n-1}, give the weights: sum_j c_j r_j^n = mu_n at the nodes r_j. One difference alone has c
    = mu_0 / (2 r): UniPC with B(h) = e^h - 1, and DPM-Solver++.
    """
    (lam, denoised), *others = known
    h = lam_next - lam
    nodes = [(lam_j - lam) / h for lam_j, _ in others]
    moments = [-math.expm1(-h)]
    for n in range(1, len(others) + 1):
        moments.append(1 - n / h * moments[-1])
    if len(nodes) == 1:
        weights = [moments[0] / 2 / nodes[0]]
    else:
        weights = np.linalg.solve(
            np.vander(nodes, len(nodes) + 1, increasing=True).T[1:], moments[1:]
        ).tolist()
    x = math.exp(-h) * x + moments[0] * denoised
    for weight, (_, other) in zip(weights, others, strict=True):
        x = x + weight * (other - denoised)
    return x
