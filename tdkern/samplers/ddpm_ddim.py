"""DDIM at any eta; eta = 1 is DDPM's ancestral sampler."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..schedules import two_moment
from .base import Step, checked_levels, run, unit_noise

VARIANCES = ("small", "large")


def ddim_steps(sampler: str, sigmas, denoiser, eta: float, variance: str = "small") -> list[Step]:
    """x_tau = (1 - kappa) D + kappa x + s noise: eq. 12 and 16 of arXiv 2010.02502."""
    levels = checked_levels(sampler, sigmas, denoiser)
    if not 0 <= eta <= 1:
        raise ValueError(f"{sampler}: eta must be in [0, 1], got {eta}")
    kappas = two_moment(1.0, levels[:-1], 1.0, levels[1:], eta=eta)[1].tolist()
    steps = []
    for (sigma, sigma_next), kappa in zip(pairwise(levels), kappas, strict=True):
        if sigma < math.inf:
            # (1 - kappa) D + kappa x = x + h d with d = (x - D) / sigma
            h = sigma * (kappa - 1)
        else:
            # D + kappa sigma d, with kappa sigma as sigma grows
            h = sigma_next * math.sqrt(1 - eta**2)
        s = None
        if eta > 0 and sigma_next > 0:
            s = eta * _deviation(sigma, sigma_next, variance)
        steps.append(Step(sigma, sigma_next, h, sigma_hat=sigma, added=s))
    return steps


def _deviation(sigma: float, sigma_next: float, variance: str) -> float:
    """Of a step's new noise, in EDM's state.

    beta-tilde / alpha_tau^2 = sigma_tau^2 (1 - r^2), r = sigma_tau / sigma_t, or, "large",
    beta / alpha_tau^2 = (1 - r^2) (1 + sigma_tau^2) / (1 + 1/sigma_t^2) on a VP path.
    """
    share = 1 - (sigma_next / sigma) ** 2
    if variance == "large":
        return math.sqrt(share * (1 + sigma_next**2) / (1 + sigma**-2))
    return sigma_next * math.sqrt(share)


@torch.no_grad()
def ddim(
    denoiser,
    x: Tensor,
    sigmas,
    *,
    eta: float = 0.0,
    generator=None,
    randn_like=None,
    callback=None,
) -> Tensor:
    """DDIM, from the probability-flow ODE (eta = 0, which is `euler`) to DDPM's sampling (eta = 1).

    x_tau = (1 - k) D + k x + s noise,  k = r sqrt(1 - eta^2 + (eta r)^2),
    s = eta sigma_tau sqrt(1 - r^2),  r = sigma_tau / sigma_t: the two-moment step (arXiv
    2010.02502, eq. 12 and 16; `schedules.two_moment`) divided by alpha_tau. In this state alpha is
    gone, so it is the step of DDPM, VP, VE and flow matching alike.

    Args:
        denoiser, x, sigmas, callback: see the module; one call in each step. The levels fall.
        eta: in [0, 1], the share of a step's noise that is drawn anew.
        generator: `torch.Generator` of that noise; None is torch's global one.
        randn_like: `randn_like(x) -> unit noise` in place of the generator, once in each step that
            does not end at 0.

    Returns:
        The state at sigmas[-1], like `x`.

    Raises:
        ValueError: `sigmas` is not a list of at least two falling positive levels, the first of
            which may be infinite and the last 0, or eta is out of its range.

    Deterministic with eta = 0, and otherwise for one state of the generator.
    """
    steps = ddim_steps("ddim", sigmas, denoiser, eta)
    return run(denoiser, x, steps, unit_noise(generator, randn_like), callback)


@torch.no_grad()
def ddpm(
    denoiser,
    x: Tensor,
    sigmas,
    *,
    variance: str = "small",
    generator=None,
    randn_like=None,
    callback=None,
) -> Tensor:
    """DDPM's ancestral sampler (arXiv 2006.11239, eq. 7): `ddim` with eta = 1.

    Arguments as there, and

    Args:
        variance: of a step's noise: "small", beta-tilde = beta (1 - abar_tau) / (1 - abar_t), or
            "large", beta = 1 - abar_t / abar_tau, which is that of a variance-preserving path
            (section 3.2 there; diffusers' fixed_small and fixed_large). The last step, to 0, adds
            none.

    Raises:
        ValueError: as `ddim`, or variance is neither.
    """
    if variance not in VARIANCES:
        raise ValueError(f"ddpm: variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    steps = ddim_steps("ddpm", sigmas, denoiser, 1.0, variance)
    return run(denoiser, x, steps, unit_noise(generator, randn_like), callback)
