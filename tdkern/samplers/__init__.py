"""Samplers: each is one plain function from scaled noise to data, called as `sampler(denoiser, x, sigmas, *, callback=None, ...)`.

All take `denoiser(x, sigma) -> D` with x [B, ...] and sigma [B] in x's dtype, the start `x` = unit noise times sigmas[0], and
the levels `sigmas` (`schedules.EDM(steps).sigmas()`, or `sigmas(steps)` of another family's schedule). The state keeps x's dtype:
give float64, as EDM does, since differences of large states lose digits; a denoiser that computes in less is converted back. They
run without gradients.

The state is EDM's, x = x0 + sigma eps, for every family: x_t = alpha_t x0 + sigma_t eps is alpha_t x, at sigma = sigma_t / alpha_t.
In it no sampler needs alpha, so DDPM's, DDIM's and DPM-Solver's steps serve any network that gives its D there (`networks`).

A callback is called once a step with a dict of step, x (the state of which the denoiser is asked, before noise is added to it),
sigma (its level) and denoised.

`heun`, `euler`, `ddim` and `ddpm` have a fused path. A denoiser that is a network of `networks` (`EDMPrecond` and its like), or a
`functools.partial` of one that gives its labels by keyword, is called through its raw output F, and `heun_step` makes its next
input from F in one launch. So is one that DistributedDataParallel, torch.compile or `fully_shard` wraps. The result is the same to
rounding. A callback, which is shown what that launch does not make, takes the plain path, and so does every other callable.
"""
from .ablation import ablation, ablation_sigmas
from .consistency import multistep, onestep
from .ddim import ddim, ddpm
from .edm import euler, heun
from .fewstep import dpmpp, unipc

__all__ = ["ablation", "ablation_sigmas", "ddim", "ddpm", "dpmpp", "euler", "heun", "multistep", "onestep", "unipc"]
