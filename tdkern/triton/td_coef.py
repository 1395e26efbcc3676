"""td_coef in Triton: float64 throughout, one lane per sample."""

import torch
import triton
import triton.language as tl

from ..ops import _backends
from ..schedules import EDM

BLOCK = 128


@triton.jit
def _f64(value):
    """A Python float, which every scalar is in the interpreter, is float32 to min, max and where
    before Triton 3.9.
    """
    return tl.full([], value, tl.float64)


@triton.jit
def _pow(x, y):
    """x^y, for x >= 0 and y > 0."""
    return tl.exp(y * tl.log(x))


@triton.jit
def _sigma(index, intervals, a, b, rho):
    """EDM's schedule: sigma(i) = (a + i/(steps-1) (b - a))^rho with a = sigma_max^(1/rho),
    b = sigma_min^(1/rho).
    """
    return _pow(tl.minimum(tl.maximum(a + index / intervals * (b - a), _f64(b)), _f64(a)), rho)


@triton.jit
def _index(sigma, intervals, a, b, inverse_rho):
    """The inverse, within the schedule."""
    return tl.minimum(tl.maximum((_pow(sigma, inverse_rho) - a) / (b - a), 0), 1) * intervals


@triton.jit
def _A(sigma, sigma_tau, eta):
    """A of the two-moment mean with alpha = 1: A = 1 - kappa,
    kappa = r sqrt(1 - eta^2 + (eta r)^2), r = sigma_tau / sigma_t.
    """
    r = sigma_tau / sigma
    return 1 - r * tl.sqrt(1 - eta * eta + eta * r * (eta * r))


@triton.jit
def _preconditioning(sigma, sigma_data, sigma_min, PRECOND: tl.constexpr):
    """(skip, scale) of D = skip x + scale F."""
    shifted = sigma - sigma_min if PRECOND == "ct" else sigma
    skip = sigma_data * sigma_data / (shifted * shifted + sigma_data * sigma_data)
    scale = shifted * sigma_data / tl.sqrt(sigma * sigma + sigma_data * sigma_data)
    return skip, scale


@triton.jit
def _base_weighting(sigma, sigma_data, BASE_WEIGHT: tl.constexpr):
    snr = 1 / (sigma * sigma)
    if BASE_WEIGHT == "karras":
        snr += 1 / (sigma_data * sigma_data)
    elif BASE_WEIGHT == "uniform":
        snr = tl.full(snr.shape, 1, tl.float64)
    elif BASE_WEIGHT == "snr+1":
        snr += 1
    elif BASE_WEIGHT == "truncated-snr":
        snr = tl.maximum(snr, 1)
    return snr


@triton.jit
def _td_weighting(A, A_p, scale, scale_p, WEIGHT: tl.constexpr):
    online, target = A * scale * (A * scale), A_p * scale_p * (A_p * scale_p)
    if WEIGHT == "pairwise":
        w = 1 / (online + target)
    elif WEIGHT == "pairwise_x0":
        w = 1 / tl.maximum(A * A + A_p * A_p, _f64(0.01))
    elif WEIGHT == "online":
        w = 1 / tl.maximum(online, _f64(1e-8))
    else:
        w = tl.full(A.shape, 1, tl.float64)
    return w


@triton.jit
def _store_four(to, first, second, third, fourth, inside):
    """Four columns that lie side by side."""
    tl.store(to, first, inside)
    tl.store(to + 1, second, inside)
    tl.store(to + 2, third, inside)
    tl.store(to + 3, fourth, inside)


@triton.jit
def coef_kernel(
    noise,
    coef,
    levels,
    batch,
    intervals: tl.float64,
    sigma_min: tl.float64,
    sigma_max: tl.float64,
    a: tl.float64,
    b: tl.float64,
    rho: tl.float64,
    inverse_rho: tl.float64,
    sigma_data: tl.float64,
    k_idx: tl.float64,
    one_idx: tl.float64,
    lambda_base: tl.float64,
    eta: tl.float64,
    td_lo: tl.float64,
    td_hi: tl.float64,
    FROM_INDEX: tl.constexpr,
    PRECOND: tl.constexpr,
    BASE_WEIGHT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of coef [B, 8] and levels [B, 4], in the order of tdkern/columns.py, from noise [B].

    The scalars are those of the op, but for intervals = steps - 1, a = sigma_max^(1/rho),
    b = sigma_min^(1/rho) and inverse_rho = 1 / rho. Their types are given, since Triton would pass
    a Python float as float32.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < batch
    sample = tl.load(noise + i, inside, other=1.0)
    if FROM_INDEX:
        index, sigma = sample, _sigma(sample, intervals, a, b, rho)
        in_range = index >= 0
    else:
        index, sigma = _index(sample, intervals, a, b, inverse_rho), sample
        in_range = (sigma >= sigma_min) & (sigma <= sigma_max)
    in_window = (sigma >= td_lo) & (sigma <= td_hi)
    valid = in_range & (index <= intervals - (k_idx + one_idx)) & in_window
    sigma_tau = _sigma(index + one_idx, intervals, a, b, rho)
    sigma_p = _sigma(index + k_idx, intervals, a, b, rho)
    sigma_tau_p = _sigma(index + (k_idx + one_idx), intervals, a, b, rho)

    A, A_p = _A(sigma, sigma_tau, eta), _A(sigma_p, sigma_tau_p, eta)
    skip, scale = _preconditioning(sigma, sigma_data, sigma_min, PRECOND)
    skip_p, scale_p = _preconditioning(sigma_p, sigma_data, sigma_min, PRECOND)
    w_td = tl.where(valid, _td_weighting(A, A_p, scale, scale_p, WEIGHT), 0)
    share = tl.where(valid, _f64(lambda_base), 1 + _f64(lambda_base))
    w_base = _base_weighting(sigma, sigma_data, BASE_WEIGHT) * share

    _store_four(coef + 8 * i, skip, scale, skip_p, scale_p, inside)
    _store_four(coef + 8 * i + 4, A, A_p, w_td, w_base, inside)
    _store_four(levels + 4 * i, sigma, sigma_tau, sigma_p, sigma_tau_p, inside)


def td_coef(
    noise,
    from_index,
    steps,
    sigma_min,
    sigma_max,
    rho,
    sigma_data,
    k_idx,
    one_idx,
    lambda_base,
    precond,
    base_weight,
    eta,
    weight,
    td_lo,
    td_hi,
):
    batch = len(noise)
    noise, coef, levels = noise.contiguous(), noise.new_empty(batch, 8), noise.new_empty(batch, 4)
    a, b = EDM(steps, sigma_min, sigma_max, rho)._ends
    if batch > 0:
        with torch.cuda.device_of(noise):
            coef_kernel[(triton.cdiv(batch, BLOCK),)](
                noise,
                coef,
                levels,
                batch,
                steps - 1.0,
                sigma_min,
                sigma_max,
                a,
                b,
                rho,
                1 / rho,
                sigma_data,
                k_idx,
                one_idx,
                lambda_base,
                eta,
                td_lo,
                td_hi,
                from_index,
                precond,
                base_weight,
                weight,
                BLOCK,
                enable_fp_fusion=True,
            )
    return coef, levels


_backends.library.impl("td_coef.triton", td_coef, _backends.triton_key())
