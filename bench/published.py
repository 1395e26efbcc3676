"""What users run today: the TD loss as eager PyTorch in the style of the published training loops.

Written from the paper's equations, not from anyone's code: preconditioning as separate passes,
valid samples gathered by a boolean mask, all four posterior means formed, and the terms scattered
back to their samples.
"""

import torch
from torch import Tensor

from tdkern.schedules import EDM


def td_levels(sigma: Tensor, *, k_idx: float = 1.0, one_idx: float = 0.25) -> tuple[Tensor, Tensor]:
    """The four noise levels [B, 4] of each sigma [B] on EDM's schedule, and which samples are
    valid.
    """
    schedule = EDM()
    index = schedule.index(sigma)
    levels = torch.stack(
        [sigma, *(schedule.sigma(index + step) for step in (one_idx, k_idx, k_idx + one_idx))], 1
    )
    valid = (
        (sigma >= schedule.sigma_min)
        & (sigma <= schedule.sigma_max)
        & (index <= schedule.steps - 1 - (k_idx + one_idx))
    )
    return levels, valid


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def eager_td_edm(
    F: Tensor,
    F_p: Tensor,
    x0: Tensor,
    x_t: Tensor,
    x_tp: Tensor,
    levels: Tensor,
    valid: Tensor,
    *,
    sigma_data: float = 0.5,
    lambda_edm: float = 0.5,
    denoised: bool = False,
) -> Tensor:
    """Per-sample TD+EDM loss [B]: online weight, Markov coupling, `levels` [B, 4] as `td_coef`
    returns them. denoised: whether F and F_p are the denoised images already.
    """
    sigma, sigma_tau, sigma_p, sigma_tau_p = (_column(level, x0) for level in levels.unbind(1))

    def denoise(x, F, sigma):
        if denoised:
            return F
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return c_skip * x + c_out * F

    D = denoise(x_t, F, sigma)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    recon = (weight * (D - x0) ** 2).flatten(1).mean(1)
    losses = (1 + lambda_edm) * recon
    if valid.any():  # a host synchronisation on a GPU
        y, x, x_p = x0[valid], x_t[valid], x_tp[valid]
        D_valid = D[valid]
        with torch.no_grad():
            D_p = denoise(x_p, F_p[valid], sigma_p[valid])
        kappa = (sigma_tau / sigma)[valid] ** 2
        kappa_p = (sigma_tau_p / sigma_p)[valid] ** 2
        mu_true = (1 - kappa) * y + kappa * x
        mu_true_p = (1 - kappa_p) * y + kappa_p * x_p
        mu_model = (1 - kappa) * D_valid + kappa * x
        mu_model_p = (1 - kappa_p) * D_p + kappa_p * x_p
        residual = (mu_true - mu_true_p) - (mu_model - mu_model_p)
        c_out = (sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt())[valid]
        w_td = 1 / ((1 - kappa) ** 2 * c_out**2).clamp(min=1e-8)
        td = (w_td * residual**2).flatten(1).mean(1)
        losses = losses.clone()
        losses[valid] = td + lambda_edm * recon[valid]
    return losses


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
