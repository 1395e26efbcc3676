"""Samplers: each is one plain function from scaled noise to data.

It is called as `sampler(denoiser, x, sigmas, *, callback=None, ...)`.

All take `denoiser(x, sigma) -> D` with x [B, ...] and sigma [B] in x's dtype, the start `x` = unit
noise times sigmas[0], and the levels `sigmas` (`schedules.EDM(steps).sigmas()`, or `sigmas(steps)`
of another family's schedule). The state keeps x's dtype: give float64, as EDM does, since
differences of large states lose digits; a denoiser that computes in less is converted back. They
run without gradients.

The state is EDM's, x = x0 + sigma eps, for every family: x_t = alpha_t x0 + sigma_t eps is alpha_t
x, at sigma = sigma_t / alpha_t. In it no sampler needs alpha, so DDPM's, DDIM's and DPM-Solver's
steps serve any network that gives its D there (`networks`).

The first level may be infinite, where no signal is left: t = 1 of flow matching, or the end of a
schedule with zero terminal SNR. The state there, the start `x` and what the denoiser is asked
about, is the unit noise itself; the first step goes to D + sigma noise. `Denoiser` answers there
for "x0", "v" and "velocity"; what predicts eps or a score, EDM's and consistency models' networks
and `ablation` refuse it.

A callback is called once in each step with a dict of step, x (the state of which the denoiser is
asked, before noise is added to it), sigma (its level) and denoised.

`heun`, `euler`, `ddim` and `ddpm` have a fused path. A denoiser that is a network of `networks`
(`EDMPrecond` and its like), or a `functools.partial` of one that gives its labels by keyword, is
called through its raw output F, and `heun_step` makes its next input from F in one launch. So is
one that DistributedDataParallel, torch.compile or `fully_shard` wraps. The result is the same to
rounding. A callback, which is shown what that launch does not make, takes the plain path, and so
does every other callable.
"""

from collections.abc import Callable
from typing import NamedTuple

from .consistency import multistep, onestep
from .ddpm_ddim import ddim, ddpm
from .edm import euler, heun
from .fewstep import dpmpp, unipc
from .generalised import ablation, ablation_sigmas


def _one_a_step(steps: int) -> int:
    return steps


class Sampler(NamedTuple):
    """What is to be known of a sampler beside its arguments.

    Args:
        sample: the function.
        evaluations: of the network, in so many steps.
        least_steps: the fewest that it takes.
        repeats: whether it takes one level twice in a row.
        from_one_level: whether it asks the network at its first level alone.
        ends_at_sigma_min: whether its last level is the network's lowest, where a consistency model
            gives back what it gets, rather than 0.
        has_range: whether its arguments are the ends of the levels too.
        on_flow: its options for flow matching's own levels.
        choices: whether the user has more to choose than the number of steps.
    """

    sample: Callable
    evaluations: Callable[[int], int] = _one_a_step
    least_steps: int = 2
    repeats: bool = False
    from_one_level: bool = False
    ends_at_sigma_min: bool = False
    has_range: bool = False
    on_flow: tuple[tuple[str, str], ...] = ()
    choices: bool = False


SAMPLERS = {
    # EDM's samplers take equal levels, as in EDM: a step between them changes nothing
    "heun": Sampler(heun, lambda steps: 2 * steps - 1, repeats=True, on_flow=(("time", "flow"),)),
    "euler": Sampler(euler, repeats=True),
    "ddim": Sampler(ddim),
    "ddpm": Sampler(ddpm),
    "dpmpp": Sampler(dpmpp),
    "unipc": Sampler(unipc),
    "onestep": Sampler(onestep, lambda steps: 1, from_one_level=True, choices=True),
    "multistep": Sampler(multistep, least_steps=1, ends_at_sigma_min=True),
    "ablation": Sampler(
        ablation,
        lambda steps: 2 * steps - 1,
        repeats=True,
        has_range=True,
        on_flow=(("schedule", "flow"), ("scaling", "flow")),
        choices=True,
    ),
}

__all__ = [
    "SAMPLERS",
    "Sampler",
    "ablation",
    "ablation_sigmas",
    "ddim",
    "ddpm",
    "dpmpp",
    "euler",
    "heun",
    "multistep",
    "onestep",
    "unipc",
]
