"""One step of EDM's sampler in the paper's own form, in plain PyTorch: the oracle that every kernel
is tested against.
"""

import torch
from torch import Tensor


def heun_step(
    F: Tensor,
    x: Tensor,
    coef: Tensor,
    x_hat: Tensor | None,
    noise: Tensor | None,
    net_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Arithmetic in x's dtype; see `ops/heun_step.py` for the columns of coef."""
    sigma, skip, scale, h, churn, c_in = coef.unbind(0)  # 0-dim: they do not promote x
    denoised = skip * x + scale * F.to(x.dtype)
    d = (x - denoised) / sigma
    x_next = x + h * d
    if x_hat is not None:  # x = x_hat + h d_0 is an Euler step, so this is x_hat + h (d_0 + d) / 2
        x_next = (x_hat + x_next) / 2
    if noise is not None:
        x_next = x_next + churn * noise
    return x_next, None if net_dtype is None else (c_in * x_next).to(net_dtype)
