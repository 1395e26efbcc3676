"""What the samplers share: their levels, their noise, one call of the denoiser, and their steps.

A sampler of the probability-flow ODE is a list of `Step`s. `run` takes them in one of two ways with
the same result to rounding: plainly, as they are written here, or with `heun_step`, which makes the
network's next input in the launch that moves the state.
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._cache import tensor_cache
from ..networks.precond import Preconditioned
from ..ops.heun_step import heun_step
from ..preconditioning import unwrapped


def checked_levels(
    sampler: str, sigmas, denoiser, *, falling: bool = True, least: int = 2
) -> list[float]:
    """A sampler's levels as numbers; raises ValueError for what are none.

    The first may be infinite, where the denoiser does not say that it knows nothing there.
    """
    given = torch.as_tensor(sigmas, dtype=torch.float64)
    if given.ndim != 1 or len(given) < least:
        raise ValueError(
            f"{sampler}: sigmas must have shape [steps + 1] with at least one step, "
            f"got {list(given.shape)}"
        )
    levels = given.tolist()  # the sampler's only host synchronisation
    last = len(levels) - 1
    for i, sigma in enumerate(levels):
        positive = sigma > 0 or (i == last > 0 and sigma == 0)
        if not positive or (sigma == math.inf and i > 0):
            raise ValueError(
                f"{sampler}: sigmas must be positive and finite, but for an infinite first and a "
                f"last of 0, got {sigma:g} at {i} of {len(levels)}"
            )
    for sigma, sigma_next in pairwise(levels):
        if falling and not sigma > sigma_next:
            raise ValueError(
                f"{sampler}: sigmas must fall from step to step, got {sigma_next:g} after {sigma:g}"
            )
    if levels[0] == math.inf:
        _check_reaches_noise(sampler, denoiser)
    return levels


def _check_reaches_noise(sampler: str, denoiser) -> None:
    net = unwrapped(network_of(denoiser)[0])
    preconditioning = getattr(net, "preconditioning", None)
    if preconditioning is not None and not preconditioning.reaches_noise:
        raise ValueError(
            f"{sampler}: sigmas must begin at a finite level with {type(net).__name__}, as its "
            f"output of {type(preconditioning).__name__} says nothing of x0 in pure noise, got inf"
        )


def unit_noise(generator, randn_like):
    """`draw(x) -> unit noise` like x.

    It comes from `randn_like` if that is given, else from the generator, None being torch's global
    one.
    """
    if randn_like is not None:
        return randn_like
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def denoise(denoiser, x: Tensor, sigma: float) -> Tensor:
    """D of a batch at one level, in x's dtype."""
    return denoiser(x, x.new_full((len(x),), sigma)).to(x.dtype)


class Step(NamedTuple):
    """One step of a sampler, in four parts.

    1. Increase noise: x_hat = x + raised n, which takes x from sigma to sigma_hat.
    2. Euler step: d = (x_hat - D(x_hat, sigma_hat)) / sigma_hat, x = x_hat + h d, at sigma_next.
    3. 2nd order correction: x = x_hat + h ((1 - w/2) d + w/2 d'), w = `correct`, with
       d' = (x - D(x, sigma_next)) / sigma_next.
    4. Add noise: x + added n.

    From an infinite level, where x is the unit noise itself, d is x_hat, and D takes the place of
    x_hat in 2 and 3: with x = D + sigma d its h is sigma + h.
    """

    sigma: float
    sigma_next: float
    h: float
    sigma_hat: float
    raised: float | None = None  # None leaves 1 out and draws nothing
    correct: float | None = None  # None leaves 3 out
    added: float | None = None  # None leaves 4 out and draws nothing


def run(denoiser, x: Tensor, steps: list[Step], draw, callback) -> Tensor:
    """The state after all steps.

    Args:
        denoiser, x, callback: as of every sampler.
        steps: at least one.
        draw: `draw(x) -> unit noise` like x.
    """
    net, labels = network_of(denoiser)
    inner = unwrapped(net)
    own = isinstance(inner, Preconditioned) and type(inner).forward is Preconditioned.forward
    wide = x.dtype in (torch.float32, torch.float64)
    if own and wide and callback is None and steps[0].sigma < math.inf:
        return _fused(net, labels, x, steps, draw)
    return _plain(denoiser, x, steps, draw, callback)


def network_of(denoiser) -> tuple:
    """What a denoiser calls, and the labels that it gives."""
    if isinstance(denoiser, partial) and not denoiser.args:
        return denoiser.func, denoiser.keywords
    return denoiser, {}


def _plain(denoiser, x: Tensor, steps: list[Step], draw, callback) -> Tensor:
    for number, step in enumerate(steps):
        x_hat = x
        if step.raised is not None:
            x_hat = x + step.raised * draw(x)
        denoised = denoise(denoiser, x_hat, step.sigma_hat)
        if callback is not None:
            callback({"step": number, "x": x, "sigma": step.sigma, "denoised": denoised})
        if step.sigma_hat == math.inf:
            start, d = denoised, x_hat
        else:
            start, d = x_hat, (x_hat - denoised) / step.sigma_hat
        x = start + step.h * d
        if step.correct is not None:
            d_next = (x - denoise(denoiser, x, step.sigma_next)) / step.sigma_next
            half = step.correct / 2
            x = start + step.h * ((1 - half) * d + half * d_next)
        if step.added is not None:
            x = x + step.added * draw(x)
    return x


class Launch(NamedTuple):
    """One call of the network, and of `heun_step` with what it gives."""

    sigma: float  # of the state that the network is asked about
    h: float
    noise: float | None  # added to the state that the launch makes; None draws nothing
    sigma_after: float  # the level of that state
    corrects: float | None = None  # the share w of a step's 2nd order correction, if it is one


def _launches(steps: list[Step]) -> list[Launch]:
    """The noise that raises a state is added by the launch before it."""
    launches = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        noise, sigma_after = step.added, step.sigma_next
        if following is not None:
            noise = step.added if following.raised is None else following.raised
            sigma_after = following.sigma_hat
        if step.correct is None:
            launches.append(Launch(step.sigma_hat, step.h, noise, sigma_after))
            continue
        w = step.correct
        launches.append(Launch(step.sigma_hat, step.h, None, step.sigma_next))
        launches.append(Launch(step.sigma_next, w * step.h, noise, sigma_after, w))
    return launches


@tensor_cache(maxsize=16)
def _table(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """The rows as a float64 tensor.

    It is kept, since to bring numbers to a device waits for it, which the capture of a sampler in a
    CUDA graph, behind a first call, does not allow.
    """
    return torch.tensor(rows, dtype=torch.float64, device=device)


def _fused(net: Any, labels: dict, x: Tensor, steps: list[Step], draw) -> Tensor:
    if steps[0].raised is not None:
        x = x + steps[0].raised * draw(x)
    launches, inner = _launches(steps), unwrapped(net)
    numbers = [(each.sigma, each.h, each.noise or 0.0, each.sigma_after) for each in launches]
    sigma, h, noise, sigma_after = _table(tuple(numbers), x.device).unbind(1)
    c_in = inner.input_scaling(sigma_after)[0]
    coef = torch.stack([sigma, *inner.preconditioning.skip_scale(sigma), h, noise, c_in], 1)

    scaled = x_hat = None
    for launch, row in zip(launches, coef, strict=True):
        F = net(x, row[0], raw=True, scaled=scaled, **labels)
        begin = None
        if launch.corrects is None:
            x_hat = x
        else:
            assert x_hat is not None  # a step begins before it is corrected
            begin = _begin(x, x_hat, launch.corrects)
        x, scaled = heun_step(
            F,
            x,
            row,
            begin,
            None if launch.noise is None else draw(x),
            net_dtype=None if launch is launches[-1] else inner.input_dtype(x),
        )
    return x


def _begin(x: Tensor, x_hat: Tensor, share: float) -> Tensor:
    """The state from which `heun_step` corrects x, with h times the share w.

    Its (b + x + w h d') / 2 with b = w x_hat + (1 - w) x is Step's part 3.
    """
    return x_hat if share == 1 else torch.lerp(x, x_hat, share)
