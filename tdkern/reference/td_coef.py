"""The noise levels and the eight numbers of `td_loss` in plain PyTorch, composed of the public definitions."""
import torch
from torch import Tensor

from ..schedules import EDM, two_moment


def preconditioning(sigma: Tensor, precond: str, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor]:
    """(skip, scale) of D = skip x + scale F: EDM's (arXiv 2206.00364, table 1) or CT's boundary condition (2303.01469, app. C)."""
    shifted = sigma - sigma_min if precond == "ct" else sigma
    return sigma_data**2 / (shifted**2 + sigma_data**2), shifted * sigma_data / torch.sqrt(sigma**2 + sigma_data**2)


def base_weighting(sigma: Tensor, base_weight: str, sigma_data: float) -> Tensor:
    """Weight of the base loss at a noise level, under the names of consistency models; EDM's own is "karras"."""
    snr = sigma**-2
    return {
        "karras": snr + sigma_data**-2,
        "uniform": torch.ones_like(sigma),
        "snr": snr,
        "snr+1": snr + 1,
        "truncated-snr": snr.clamp(min=1),
    }[base_weight]


def td_weighting(weight: str, A: Tensor, A_p: Tensor, scale: Tensor, scale_p: Tensor) -> Tensor:
    """Weight of the TD term for a pair of noise levels (design, section 1)."""
    return {
        "pairwise": lambda: 1 / ((A * scale) ** 2 + (A_p * scale_p) ** 2),
        "pairwise_x0": lambda: 1 / (A**2 + A_p**2).clamp(min=0.01),
        "online": lambda: 1 / ((A * scale) ** 2).clamp(min=1e-8),
        "none": lambda: torch.ones_like(A),
    }[weight]()


def td_coef(noise: Tensor, from_index: bool, steps: int, sigma_min: float, sigma_max: float, rho: float, sigma_data: float, k_idx: float, one_idx: float,
            lambda_base: float, precond: str, base_weight: str, eta: float, weight: str, td_lo: float, td_hi: float) -> tuple[Tensor, Tensor]:
    schedule = EDM(steps, sigma_min, sigma_max, rho)
    noise = noise.double()
    index = noise if from_index else schedule.index(noise)
    sigma = schedule.sigma(index) if from_index else noise
    sigma_tau, sigma_p, sigma_tau_p = (schedule.sigma(index + step) for step in (one_idx, k_idx, k_idx + one_idx))

    A, _ = two_moment(1, sigma, 1, sigma_tau, eta=eta)
    A_p, _ = two_moment(1, sigma_p, 1, sigma_tau_p, eta=eta)
    skip, scale = preconditioning(sigma, precond, sigma_data, sigma_min)
    skip_p, scale_p = preconditioning(sigma_p, precond, sigma_data, sigma_min)

    in_range = index >= 0 if from_index else (sigma >= sigma_min) & (sigma <= sigma_max)
    valid = in_range & (index <= steps - 1 - (k_idx + one_idx)) & (sigma >= td_lo) & (sigma <= td_hi)
    w_td = torch.where(valid, td_weighting(weight, A, A_p, scale, scale_p), 0.0)
    w_base = base_weighting(sigma, base_weight, sigma_data) * (lambda_base + (~valid).double())
    return torch.stack([skip, scale, skip_p, scale_p, A, A_p, w_td, w_base], 1), torch.stack([sigma, sigma_tau, sigma_p, sigma_tau_p], 1)
