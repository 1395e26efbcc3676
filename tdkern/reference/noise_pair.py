"""The coupled noisy pair in plain PyTorch: the numbers of `philox`, then the two equations."""

import torch
from torch import Tensor

from . import philox


def noise_pair(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_p: Tensor,
    sigma_p: Tensor,
    shared: bool,
    seed: int | Tensor,
    offset: int | Tensor,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor]:
    """(x_t, x_tp): the forward transition from x_tp to x_t, or one noise for both."""
    clean = x0.to(torch.float64 if x0.dtype == torch.float64 else torch.float32)

    def column(values: Tensor) -> Tensor:
        return values.to(clean.dtype).reshape(-1, *[1] * (x0.ndim - 1))

    def noise(stream: int) -> Tensor:
        n = x0[0:1].numel() if len(x0) else 0
        return (
            philox.normals(len(x0), n, seed, offset, stream, x0.device, first_sample)
            .to(clean.dtype)
            .reshape(x0.shape)
        )

    n1 = noise(0)
    x_tp = column(alpha_p) * clean + column(sigma_p) * n1
    if shared:
        x_t = column(alpha) * clean + column(sigma) * n1
    else:
        a = alpha / alpha_p
        x_t = column(a) * x_tp + column(
            (sigma**2 - (a * sigma_p) ** 2).clamp(min=0).sqrt()
        ) * noise(1)
    return x_t.to(x0.dtype), x_tp.to(x0.dtype)
