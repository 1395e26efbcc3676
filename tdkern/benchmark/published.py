"""EDM's loss, alone and with TD, in plain PyTorch: what users run today.

They are written from the equations (arXiv 2206.00364, 2606.15048) in the style of the published
training loops: on denoised images, one operation at a time, all four posterior means formed, and
the samples with a TD term gathered by a boolean mask, for which a GPU is waited for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..columns import SIGMA, SIGMA_P
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
    """The same with the TD term, and Markov noise: [B]."""
    sigma = _draw_sigma(images)
    levels, valid = td_levels(sigma, k_idx=k_idx, one_idx=one_idx)
    sigma_p = levels[:, SIGMA_P]
    x_tp = images + _column(sigma_p, images) * torch.randn_like(images)
    rise = (sigma**2 - sigma_p**2).clamp(min=0).sqrt()
    x_t = x_tp + _column(rise, images) * torch.randn_like(images)

    def denoise_p(x: Tensor) -> Tensor:
        return target(x, sigma_p[valid], *(label[valid] for label in labels))

    return td_edm_terms(
        net(x_t, sigma, *labels),
        denoise_p,
        images,
        x_t,
        x_tp,
        levels,
        valid,
        sigma_data=sigma_data,
        lambda_base=lambda_base,
    )


def td_levels(sigma: Tensor, *, k_idx: float = 1.0, one_idx: float = 0.25) -> tuple[Tensor, Tensor]:
    """The four noise levels [B, 4] of each sigma [B] on EDM's schedule, and which samples have a TD
    term [B].
    """
    schedule = EDM()
    index = schedule.index(sigma)
    others = (schedule.sigma(index + away) for away in (one_idx, k_idx, k_idx + one_idx))
    levels = torch.stack([sigma, *(level.to(sigma.dtype) for level in others)], 1)
    inside = (sigma >= schedule.sigma_min) & (sigma <= schedule.sigma_max)
    return levels, inside & (index + (k_idx + one_idx) <= schedule.steps - 1)


def td_edm_terms(
    denoised: Tensor,
    denoise_p: Callable[[Tensor], Tensor],
    x0: Tensor,
    x_t: Tensor,
    x_tp: Tensor,
    levels: Tensor,
    valid: Tensor,
    *,
    sigma_data: float = 0.5,
    lambda_base: float = 0.5,
) -> Tensor:
    """EDM's loss with the TD term, whose weight is 1 / (A c_out)^2, of denoised images: [B].

    Args:
        denoised: [B, ...], the online network's.
        denoise_p: x_tp of the valid samples -> the target network's, called where there is one.
        x0, x_t, x_tp: [B, ...], the images and their two noisy states.
        levels, valid: as `td_levels` returns them.
    """
    base = _base(denoised, x0, levels[:, SIGMA], sigma_data)
    loss = (1 + lambda_base) * base
    if not valid.any():  # a host synchronisation on a GPU
        return loss
    x0, x_t, x_tp, denoised = (whole[valid] for whole in (x0, x_t, x_tp, denoised))
    with torch.no_grad():
        denoised_p = denoise_p(x_tp)
    sigma, sigma_tau, sigma_p, sigma_tau_p = (
        _column(level, x0) for level in levels[valid].unbind(1)
    )
    kappa = (sigma_tau / sigma) ** 2
    kappa_p = (sigma_tau_p / sigma_p) ** 2
    mu_true = (1 - kappa) * x0 + kappa * x_t
    mu_true_p = (1 - kappa_p) * x0 + kappa_p * x_tp
    mu_model = (1 - kappa) * denoised + kappa * x_t
    mu_model_p = (1 - kappa_p) * denoised_p + kappa_p * x_tp
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
