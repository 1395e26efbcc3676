"""noise_pair in Triton: one program per block of a sample's elements, one lane per Philox call. The
formulas are those of csrc/include/noise_pair_math.h.

The arguments of `pair_kernel`:

    x0, x_t, x_tp: [B, n]; from a sample to the next x0_row, or out_row, elements.
    alpha, sigma, alpha_p, sigma_p: [B]; from one to the next alpha_step, ... elements.
    seed, offset: numbers; where seed_at or offset_at is not None, what it points to instead.
    first_sample: the stream of the first sample.
    n, chunks: a sample's elements and blocks.
    plane, step: element k of a sample, as they are drawn, lies at k % plane * step + k // plane.
    SHARED, FLAT: whether the coupling is "shared", and whether step is 1.
"""

import torch
import triton
import triton.language as tl

from ..ops import _backends
from ..ops.noise_pair import output_like

BLOCK = 512  # elements of a program: four of a thread, which float64 too holds in registers
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _box_muller(a, b, T: tl.constexpr):
    """Two words to two normals. float32: the header's polynomials; float64: Taylor's, nested, of an
    angle of at most pi/4.
    """
    if T == tl.float64:
        minus_2_ln_u = -2 * tl.log((a.to(T) + 0.5) * 2.3283064365386963e-10)
        angle = (b << 2).to(tl.int32, bitcast=True).to(T) * (
            0.78539816339744831 * 4.656612873077393e-10
        )
        z = angle * angle
        sine, cosine = tl.full(z.shape, 1, T), tl.full(z.shape, 1, T)
        for i in tl.static_range(9):
            sine = 1 - z * sine / (2 * (9 - i) * (2 * (9 - i) + 1))
            cosine = 1 - z * cosine / ((2 * (9 - i) - 1) * 2 * (9 - i))
        sine *= angle
    else:
        signed = a.to(tl.int32, bitcast=True)
        x = (signed ^ (signed >> 31)).to(T) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        u = tl.where(signed < 0, 1 - x, x).to(tl.int32, bitcast=True)
        above = u - 0x3F3504F3
        exponent = above & -0x800000
        f = tl.where(above < 0, (u - exponent).to(T, bitcast=True) - 1, -x)
        q = f * -0.18284172 + 0.29363370
        q = q * f - 0.29828411
        q = q * f + 0.33006522
        q = q * f - 0.39912954
        q = q * f + 0.50011414
        q = q * f - 0.66668397
        q = q * f + 0.99999833
        minus_2_ln_u = tl.fma(q * f - 2, f, exponent.to(T) * (-1.38629436 / 8388608))
        y = (b << 2).to(tl.int32, bitcast=True).to(T) * 4.656612873077393e-10
        z = y * y
        sine = z * -3.5950427e-5 + 2.4900010e-3
        sine = sine * z - 8.0745429e-2
        sine = (sine * z + 0.78539819) * y
        cosine = z * 3.5303367e-6 - 3.2594008e-4
        cosine = cosine * z + 1.5854327e-2
        cosine = cosine * z - 0.30842513
        cosine = cosine * z + 1
    cosine = tl.where((b >> 31) == 1, -cosine, cosine)
    swap = (b >> 30 & 1) == 1
    radius = tl.sqrt(minus_2_ln_u) if T == tl.float64 else tl.sqrt_rn(minus_2_ln_u)
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def _normals(seed, block, sample, offset_low, offset_high, T: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK normals of one stream, in the order of the elements."""
    w0, w1, w2, w3 = tl.philox(seed, block, sample, offset_low, offset_high)
    n0, n1 = _box_muller(w0, w1, T)
    n2, n3 = _box_muller(w2, w3, T)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def _transition(alpha, sigma, alpha_p, sigma_p):
    """(a, s) of x_t = a x_tp + s n2, the step from the level of x_tp to that of x_t."""
    a = alpha / alpha_p
    variance = sigma * sigma - (a * sigma_p) * (a * sigma_p)
    return a, tl.sqrt(tl.where(variance < 0, 0, variance))  # not maximum, which would drop a NaN


@triton.jit(do_not_specialize=["seed", "offset", "first_sample"])
def pair_kernel(
    x0,
    x_t,
    x_tp,
    x0_row,
    out_row,
    alpha,
    sigma,
    alpha_p,
    sigma_p,
    alpha_step,
    sigma_step,
    alpha_p_step,
    sigma_p_step,
    seed,
    seed_at,
    offset,
    offset_at,
    first_sample,
    n,
    plane,
    step,
    chunks,
    SHARED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a sample's x_t and x_tp."""
    T: tl.constexpr = tl.float64 if x0.dtype.element_ty == tl.float64 else tl.float32
    task = tl.program_id(0).to(tl.int64)
    b, begin = task // chunks, task % chunks * BLOCK
    key = tl.load(seed_at) if seed_at is not None else seed.to(tl.int64)
    counter = tl.load(offset_at) if offset_at is not None else offset.to(tl.int64)

    a, s = tl.load(alpha + b * alpha_step), tl.load(sigma + b * sigma_step)
    alpha_p_b, sigma_p_b = tl.load(alpha_p + b * alpha_p_step), tl.load(sigma_p + b * sigma_p_step)
    if not SHARED:
        a, s = _transition(a, s, alpha_p_b, sigma_p_b)

    k = begin + tl.arange(0, BLOCK)
    inside = k < n
    at = k if FLAT else k % plane * step + k // plane
    x0_k = tl.load(x0 + b * x0_row + at, inside, other=0.0).to(T)
    block = (begin // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(block)
    sample = zero + (first_sample + b).to(tl.uint32)
    offset_low = zero + (counter & 0xFFFFFFFF).to(tl.uint32)
    offset_high = zero + (counter >> 31 & 0xFFFFFFFE).to(tl.uint32)
    n1 = _normals(key, block, sample, offset_low, offset_high, T, BLOCK)
    # An fma by name: which of the two products the compiler would fuse depends on the code around.
    x_tp_k = tl.fma(sigma_p_b.to(T), n1, alpha_p_b.to(T) * x0_k)
    if SHARED:
        x_t_k = tl.fma(s.to(T), n1, a.to(T) * x0_k)
    else:
        n2 = _normals(key, block, sample, offset_low, offset_high + 1, T, BLOCK)
        x_t_k = tl.fma(s.to(T), n2, a.to(T) * x_tp_k)
    at += b * out_row
    tl.store(x_t + at, x_t_k.to(x_t.dtype.element_ty), inside)
    tl.store(x_tp + at, x_tp_k.to(x_tp.dtype.element_ty), inside)


def noise_pair(
    x0, alpha, sigma, alpha_p, sigma_p, shared, seed, seed_at, offset, offset_at, first_sample
):
    x_t, x_tp = output_like(x0), output_like(x0)
    if x0.numel() > 0:
        if any(x0.size(d) > 1 and x0.stride(d) != x_t.stride(d) for d in range(1, x0.ndim)):
            x0 = torch.empty_like(x_t).copy_(x0)
        n = x0[0].numel()
        step = 1 if x_t.is_contiguous() else x0.size(1)
        columns = (alpha, sigma, alpha_p, sigma_p)
        chunks = triton.cdiv(n, BLOCK)
        with torch.cuda.device_of(x0):
            pair_kernel[(len(x0) * chunks,)](
                x0,
                x_t,
                x_tp,
                x0.stride(0),
                n,
                *columns,
                *(column.stride(0) for column in columns),
                seed,
                seed_at,
                offset,
                offset_at,
                first_sample,
                n,
                n // step,
                step,
                chunks,
                shared,
                step == 1,
                BLOCK,
                **OPTIONS,
            )
    return x_t, x_tp


_backends.library.impl("noise_pair.triton", noise_pair, _backends.triton_key())
