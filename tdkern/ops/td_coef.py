"""`td_coef`: the noise levels and the eight numbers of each sample, in one launch."""

import math
import sys

import torch
from torch import Tensor

from .. import reference
from ..schedules import EDM, eta_of
from . import _backends, _modes
from ._checks import check_number, check_tensor, kind_of

PRECONDS = ("edm", "ct")
BASE_WEIGHTS = ("karras", "uniform", "snr", "snr+1", "truncated-snr")
WEIGHTS = ("pairwise", "pairwise_x0", "online", "none")
NUMBERS = (
    "steps",
    "sigma_min",
    "sigma_max",
    "rho",
    "sigma_data",
    "k_idx",
    "one_idx",
    "lambda_base",
)


def td_coef(
    noise: Tensor,
    *,
    from_index: bool = False,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_data: float = 0.5,
    k_idx: float = 1.0,
    one_idx: float = 0.25,
    lambda_base: float = 0.5,
    precond: str = "edm",
    base_weight: str = "karras",
    coupling: str = "markov",
    weight: str = "pairwise",
    td_sigma: tuple[float, float] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`td_loss`'s `coef` and the four noise levels, from one noise level (or index) per sample.

    With i the real index of sigma on EDM's schedule: t = i, tau = i + one_idx, t' = i + k_idx,
    tau' = t' + one_idx; (A, kappa) = two_moment at (t, tau) and at (t', tau'); D = skip x + scale F
    by `precond`; w_td by `weight`; w_base = lambda_base w, and where the pair leaves the schedule
    w_td = 0 and w_base = (1 + lambda_base) w (arXiv 2606.15048; docs/mathematics.md).

    Args:
        noise: [B], any float dtype or int64. The noise level sigma > 0 of each sample or, with
            `from_index`, its index >= 0.
        from_index: read `noise` as indices on the schedule instead of noise levels.
        steps, sigma_min, sigma_max, rho: the schedule, as in `schedules.EDM`.
        sigma_data: standard deviation of the data, > 0.
        k_idx, one_idx: index distances from t to t' and from t to tau, > 0.
        lambda_base: weight of the base loss beside the TD term, >= 0.
        precond: "edm" or "ct" (boundary condition at sigma_min).
        base_weight: "karras" (EDM's own), "uniform", "snr", "snr+1" or "truncated-snr".
        coupling: "markov" or "shared", with which the TD target is biased; see the losses.
        weight: "pairwise", "pairwise_x0", "online" (the published EDM code's) or "none".
        td_sigma: (lo, hi); TD only where lo <= sigma <= hi.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        coef: [B, 8] float64: skip, scale, skip', scale', A, A', w_td, w_base.
        levels: [B, 4] float64: sigma at t, tau, t', tau'.

    Raises:
        ValueError: a wrong shape, dtype or range. `noise` is looked at on the CPU alone, so that no
            GPU is waited for: a level that is not > 0 there gives numbers without a meaning.

    No gradients; in forward mode the tangent of `noise`. Deterministic; float64 inside on every
    backend. No host synchronisation.
    """
    schedule = (steps, sigma_min, sigma_max, rho)
    numbers = (sigma_data, k_idx, one_idx, lambda_base)
    try:
        options = _options(schedule, numbers, precond, base_weight, coupling, weight, td_sigma)
        return _on_backend(noise, from_index, options, backend)
    except _backends.REFUSED:
        _check_kinds(noise, *schedule, *numbers)  # says in full which argument is wrong
        raise


def _on_backend(
    noise: Tensor, from_index: bool, options: tuple, backend: str
) -> tuple[Tensor, Tensor]:
    """`td_coef` on the backend that fits, with the op's own options."""
    _check_noise(noise, from_index)
    backend = _backends.resolve("td_coef", backend, noise.device)
    noise = noise if _modes.forward_mode() else noise.detach()
    if backend == "reference":
        return reference.td_coef(noise, from_index, *options)
    return _backends.call("td_coef", backend, (noise.double(), from_index, *options))


def _options(
    schedule: tuple[int, float, float, float],
    numbers: tuple[float, float, float, float],
    precond: str,
    base_weight: str,
    coupling: str,
    weight: str,
    td_sigma: tuple[float, float] | None,
) -> tuple:
    """The options as the op's schema has them, checked."""
    EDM(*schedule)  # checks it
    _check_options(*numbers, precond, base_weight, weight)
    window = _finite_bounds(td_sigma)
    return (*schedule, *numbers, precond, base_weight, eta_of(coupling), weight, *window)


def _check_kinds(noise: Tensor, *numbers: float) -> None:
    check_tensor("td_coef", "noise", noise)
    for name, value in zip(NUMBERS, numbers, strict=True):
        check_number("td_coef", name, value)


def _check_noise(noise: Tensor, from_index: bool) -> None:
    if noise.ndim != 1:
        raise ValueError(f"td_coef: noise must have shape [B], got {list(noise.shape)}")
    if noise.dtype.is_complex or noise.dtype == torch.bool:
        raise ValueError(f"td_coef: noise must be of a float dtype or int64, got {noise.dtype}")
    if _modes.can_check_values(noise) and len(noise) > 0:
        low, high = noise.min().item(), noise.max().item()
        if not -math.inf < low <= high < math.inf or (low <= 0 and not from_index):
            wanted = "finite" if from_index else "finite and > 0"
            raise ValueError(f"td_coef: noise must be {wanted}, got values from {low} to {high}")


def _check_options(
    sigma_data: float,
    k_idx: float,
    one_idx: float,
    lambda_base: float,
    precond: str,
    base_weight: str,
    weight: str,
) -> None:
    for name, value in (("sigma_data", sigma_data), ("k_idx", k_idx), ("one_idx", one_idx)):
        if not 0 < value < math.inf:
            raise ValueError(f"td_coef: {name} must be a positive number, got {value}")
    if not 0 <= lambda_base < math.inf:
        raise ValueError(f"td_coef: lambda_base must be a number >= 0, got {lambda_base}")
    for name, word, names in (
        ("precond", precond, PRECONDS),
        ("base_weight", base_weight, BASE_WEIGHTS),
        ("weight", weight, WEIGHTS),
    ):
        if word not in names:
            raise ValueError(f"td_coef: {name} must be one of {', '.join(names)}, got {word!r}")


def _finite_bounds(td_sigma: tuple[float, float] | None) -> tuple[float, float]:
    """The window's ends, none of them infinite: a package of AOTInductor cannot hold infinity."""
    largest = sys.float_info.max
    if td_sigma is None:
        return 0.0, largest
    if not isinstance(td_sigma, list | tuple) or len(td_sigma) != 2:
        raise ValueError(f"td_coef: td_sigma must be (lo, hi) or None, got {kind_of(td_sigma)}")
    low, high = td_sigma
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
        raise ValueError(f"td_coef: td_sigma must be (lo, hi) with lo < hi, got {td_sigma}")
    return max(low, -largest), min(high, largest)


def _fake(noise, *_):
    batch = noise.shape[0]  # len(noise), an int, would compile a graph for every batch size
    coef, levels = (noise.new_empty(batch, columns, dtype=torch.float64) for columns in (8, 4))
    return coef, levels


_backends.define("td_coef", _fake, reference.td_coef)
