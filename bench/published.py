"""The TD loss in plain PyTorch on the networks' raw outputs: what users run today, and the best
that can be made of it.
"""

import torch
from torch import Tensor

from tdkern.benchmark.published import td_edm_terms
from tdkern.columns import SIGMA, SIGMA_P
from tdkern.preconditioning import EDM, append_dims


def _column(value: Tensor, like: Tensor) -> Tensor:
    return append_dims(value.to(like.dtype), like.ndim)


def eager_td_edm(
    F: Tensor,
    F_p: Tensor,
    x0: Tensor,
    x_t: Tensor,
    x_tp: Tensor,
    levels: Tensor,
    valid: Tensor,
) -> Tensor:
    """Per-sample TD+EDM loss [B] as `tdkern bench` has it for the published style, with the
    preconditioning as separate passes before it.
    """

    def denoise(x, out, sigma):
        skip, scale = (_column(factor, x0) for factor in EDM().skip_scale(sigma))
        return skip * x + scale * out

    def denoise_p(x):
        return denoise(x, F_p[valid], levels[valid, SIGMA_P])

    denoised = denoise(x_t, F, levels[:, SIGMA])
    return td_edm_terms(denoised, denoise_p, x0, x_t, x_tp, levels, valid)


def cancelled(
    F: Tensor, F_p: Tensor, x0: Tensor, x_t: Tensor, x_tp: Tensor, coef: Tensor
) -> Tensor:
    """Per-sample [B, 2] in the cancelled form, with nothing gathered: what one would hand to
    torch.compile.
    """
    skip, scale, skip_p, scale_p, A, A_p, w_td, w_base = (_column(c, x0) for c in coef.unbind(1))
    e = x0 - (skip * x_t + scale * F)
    e_p = x0 - (skip_p * x_tp + scale_p * F_p)
    delta = A * e - A_p * e_p
    return torch.stack(
        [(w_td * delta.square()).flatten(1).mean(1), (w_base * e.square()).flatten(1).mean(1)], 1
    )
