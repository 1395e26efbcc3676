"""The noise levels and the eight numbers of `td_loss`, of the public definitions."""

import torch
from torch import Tensor

from .. import preconditioning
from ..schedules import EDM, two_moment
from ..weighting import base_weighting, td_weighting


def td_coef(
    noise: Tensor,
    from_index: bool,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    sigma_data: float,
    k_idx: float,
    one_idx: float,
    lambda_base: float,
    precond: str,
    base_weight: str,
    eta: float,
    weight: str,
    td_lo: float,
    td_hi: float,
) -> tuple[Tensor, Tensor]:
    schedule = EDM(steps, sigma_min, sigma_max, rho)
    noise = noise.double()
    index = noise if from_index else schedule.index(noise)
    sigma = schedule.sigma(index) if from_index else noise
    sigma_tau, sigma_p, sigma_tau_p = (
        schedule.sigma(index + step) for step in (one_idx, k_idx, k_idx + one_idx)
    )

    A, _ = two_moment(1, sigma, 1, sigma_tau, eta=eta)
    A_p, _ = two_moment(1, sigma_p, 1, sigma_tau_p, eta=eta)
    output: preconditioning.Preconditioning
    if precond == "ct":
        output = preconditioning.CT(sigma_data, sigma_min)
    else:
        output = preconditioning.EDM(sigma_data)
    skip, scale = output.skip_scale(sigma)
    skip_p, scale_p = output.skip_scale(sigma_p)

    in_range = index >= 0 if from_index else (sigma >= sigma_min) & (sigma <= sigma_max)
    valid = (
        in_range & (index <= steps - 1 - (k_idx + one_idx)) & (sigma >= td_lo) & (sigma <= td_hi)
    )
    w_td = torch.where(valid, td_weighting(weight, A, A_p, scale, scale_p), 0.0)
    w_base = base_weighting(base_weight, sigma, sigma_data) * (lambda_base + (~valid).double())
    return torch.stack([skip, scale, skip_p, scale_p, A, A_p, w_td, w_base], 1), torch.stack(
        [sigma, sigma_tau, sigma_p, sigma_tau_p], 1
    )
