"""EDM's loss, alone and with TD, in plain PyTorch: what users run today.

They are written from the equations (arXiv 2206.00364, 2606.15048) in the style of the published
training loops: on denoised images, one operation at a time, all four posterior means formed, and
the samples with a TD term gathered by a boolean mask, for which a GPU is waited for.
"""

import torch
from torch import Tensor

from ..preconditioning import append_dims
from ..schedules import EDM


def edm_loss(net, images: Tensor, labels: tuple[Tensor, ...], sigma_data: float) -> Tensor:
    """EDM's weighted loss of each sample [B], a mean over its elements."""
    sigma = _draw_sigma(images)
    denoised = net(images + _column(sigma, images) * torch.randn_like(images), sigma, *labels)
    return _base(denoised, images, sigma, sigma_data)


def td_edm_loss(
    net,
    target,
    images: Tensor,
    labels: tuple[Tensor, ...],
    sigma_data: float,
    *,
    lambda_base: float = 0.5,
    k_idx: float = 1.0,
    one_idx: float = 0.25,
) -> Tensor:
    """The same with the TD term, whose weight is 1 / (A c_out)^2, and Markov noise: [B]."""
    schedule, sigma = EDM(), _draw_sigma(images)
    index = schedule.index(sigma)
    sigma_tau, sigma_p, sigma_tau_p = (
        schedule.sigma(index + away).to(images.dtype) for away in (one_idx, k_idx, k_idx + one_idx)
    )
    inside = (sigma >= schedule.sigma_min) & (sigma <= schedule.sigma_max)
    valid = inside & (index + k_idx + one_idx <= schedule.steps - 1)

    nearer = images + _column(sigma_p, images) * torch.randn_like(images)
    rise = (sigma**2 - sigma_p**2).clamp(min=0).sqrt()
    noisy = nearer + _column(rise, images) * torch.randn_like(images)
    denoised = net(noisy, sigma, *labels)
    base = _base(denoised, images, sigma, sigma_data)
    loss = (1 + lambda_base) * base
    if not valid.any():
        return loss

    x0, x_t, x_p, D = images[valid], noisy[valid], nearer[valid], denoised[valid]
    sigma, sigma_tau, sigma_p, sigma_tau_p = (
        _column(level[valid], images) for level in (sigma, sigma_tau, sigma_p, sigma_tau_p)
    )
    with torch.no_grad():
        D_p = target(x_p, sigma_p.flatten(), *(label[valid] for label in labels))
    kappa, kappa_p = (sigma_tau / sigma) ** 2, (sigma_tau_p / sigma_p) ** 2
    mu_true = (1 - kappa) * x0 + kappa * x_t
    mu_true_p = (1 - kappa_p) * x0 + kappa_p * x_p
    mu_model = (1 - kappa) * D + kappa * x_t
    mu_model_p = (1 - kappa_p) * D_p + kappa_p * x_p
    delta = (mu_true - mu_true_p) - (mu_model - mu_model_p)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    weight = 1 / ((1 - kappa) * c_out).square().clamp(min=1e-8)
    loss = loss.clone()
    loss[valid] = (weight * delta**2).flatten(1).mean(1) + lambda_base * base[valid]
    return loss


def update_average(average, net, decay: float) -> None:
    """An exponential moving average, parameter by parameter."""
    with torch.no_grad():
        for kept, param in zip(average.parameters(), net.parameters(), strict=True):
            kept.copy_(param.lerp(kept, decay))


def _draw_sigma(images: Tensor) -> Tensor:
    return (1.2 * torch.randn(len(images), device=images.device) - 1.2).exp()


def _base(denoised: Tensor, images: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (_column(weight, images) * (denoised - images) ** 2).flatten(1).mean(1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return append_dims(values.to(like.dtype), like.ndim)
