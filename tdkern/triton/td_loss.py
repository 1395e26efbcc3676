"""td_loss in Triton: one program per chunk of a sample; where a sample is several chunks, a second
small kernel adds their sums in order.

The kernels' arguments, of which the pointers in `_chunk` and `_correct` are those of a chunk:

    F, F_p, x0, x_t, x_tp: [B, n], the op's `out` to `x_tp`; the last two may be None.
    dF: [B, n], or None where no gradient is wanted.
    F_row to dF_row: from a sample to the next, in elements; those of one sample are side by side.
    coef: [B, 8] float64.
    upstream: [B, 2], the gradient of the loss; None in the forward pass.
    sums: [B, chunks, 2], of delta^2 and of base^2 or |base|; None where a sample is one chunk.
    loss: [B, 2].
    n, inverse_n, chunks: a sample's elements, 1 / n, and its chunks.
    rest: elements from the chunk's first to the sample's last.
    CONSISTENCY, L1: the op's `consistency` and `l1`.
    CHUNK, BLOCK: elements of a program, and of its registers at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import _backends
from ..ops.td_loss import gradient_like

CHUNK = 8192  # most elements of a program; this and the two blocks set the order of summation
BLOCK = 2048  # elements in registers at a time
SUM_BLOCK = 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # Triton 3.10 turns its default off


@triton.jit
def _load(pointer, i, end, T: tl.constexpr):
    return tl.load(pointer + i, i < end, other=0.0).to(T)


@triton.jit
def _sign(x):
    """0 at 0, and NaN at NaN."""
    return tl.where(x > 0, 1, tl.where(x < 0, -1, x))


@triton.jit
def _columns(coef):
    """A sample's eight numbers, in the order of tdkern/columns.py."""
    return (
        tl.load(coef),
        tl.load(coef + 1),
        tl.load(coef + 2),
        tl.load(coef + 3),
        tl.load(coef + 4),
        tl.load(coef + 5),
        tl.load(coef + 6),
        tl.load(coef + 7),
    )


# Where a product feeds a sum it is an fma by name: which products the compiler would fuse by itself
# depends on the code around them, such as whether dF is written, and so would the bits.


@triton.jit
def _chunk(
    F,
    F_p,
    x0,
    x_t,
    x_tp,
    dF,
    coef,
    g_td,
    g_base,
    rest,
    inverse_n,
    CONSISTENCY: tl.constexpr,
    L1: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of a sample: returns its sums of delta^2 and of base^2 or |base|, and writes dF.

    g_td and g_base are the sample's upstream gradient. A term that is off adds exactly 0, whatever
    its error is, and what only terms that are off need is not read.
    """
    T: tl.constexpr = tl.float64 if x0.dtype.element_ty == tl.float64 else tl.float32
    skip, scale, skip_p, scale_p, A, A_p, w_td, w_base = _columns(coef)
    has_td, has_base = (w_td != 0) & (g_td != 0), (w_base != 0) & (g_base != 0)
    td_end, base_end = tl.where(has_td, rest, 0), tl.where(has_base, rest, 0)
    end = tl.where(has_td | has_base, rest, 0)
    target_end = end if CONSISTENCY else td_end
    unit = -2 * scale * inverse_n
    grad_td = tl.where(has_td, unit * w_td * g_td * A, 0).to(T)
    grad_base = tl.where(has_base, (0.5 * unit if L1 else unit) * w_base * g_base, 0).to(T)
    skip, scale, A = skip.to(T), scale.to(T), A.to(T)
    skip_p, scale_p, A_p = skip_p.to(T), scale_p.to(T), A_p.to(T)

    sum_td, sum_base = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        D = tl.fma(scale, _load(F, i, end, T), 0.0)
        D_p = tl.fma(scale_p, _load(F_p, i, target_end, T), 0.0)
        if x_t is not None:
            D = tl.fma(skip, _load(x_t, i, end, T), D)
        if x_tp is not None:
            D_p = tl.fma(skip_p, _load(x_tp, i, target_end, T), D_p)
        x0_i = _load(x0, i, end, T)
        e, e_p = x0_i - D, x0_i - D_p

        delta = tl.where(i < td_end, tl.fma(A, e, -(A_p * e_p)), 0)
        base = tl.where(i < base_end, e - e_p if CONSISTENCY else e, 0)
        sum_td = tl.fma(delta, delta, sum_td)
        slope = _sign(base) if L1 else base
        sum_base = tl.fma(slope, base, sum_base)
        if dF is not None:
            gradient = tl.fma(grad_td, delta, grad_base * slope)
            tl.store(dF + i, gradient.to(dF.dtype.element_ty), i < rest)
    return tl.sum(sum_td), tl.sum(sum_base)


@triton.jit
def _store_loss(loss, coef, b, inverse_n, td, base):
    """The sample's row of loss [B, 2], from the sums over its elements."""
    _, _, _, _, _, _, w_td, w_base = _columns(coef)
    tl.store(loss + 2 * b, w_td * td * inverse_n)
    tl.store(loss + 2 * b + 1, w_base * base * inverse_n)


@triton.jit
def _correct(
    F,
    F_p,
    x0,
    x_t,
    x_tp,
    dF,
    coef,
    g,
    rest,
    inverse_n,
    CONSISTENCY: tl.constexpr,
    L1: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes dF, which holds the gradient for an upstream gradient of 1, that for the one at g."""
    T: tl.constexpr = tl.float64 if x0.dtype.element_ty == tl.float64 else tl.float32
    g_td, g_base = tl.load(g), tl.load(g + 1)
    # Half precision is computed anew: before a loss scale, dF may have underflowed.
    can_scale: tl.constexpr = dF.dtype.element_ty == T
    if (g_td != 1) | (g_base != 1):
        if can_scale & (g_td == g_base) & (g_td != 0):
            for start in range(0, CHUNK, BLOCK):
                i = start + tl.arange(0, BLOCK)
                tl.store(dF + i, g_td * tl.load(dF + i, i < rest), i < rest)
        else:
            _chunk(
                F,
                F_p,
                x0,
                x_t,
                x_tp,
                dF,
                coef,
                g_td,
                g_base,
                rest,
                inverse_n,
                CONSISTENCY,
                L1,
                CHUNK,
                BLOCK,
            )


@triton.jit
def chunk_kernel(
    F,
    F_p,
    x0,
    x_t,
    x_tp,
    dF,
    F_row,
    F_p_row,
    x0_row,
    x_t_row,
    x_tp_row,
    dF_row,
    coef,
    upstream,
    sums,
    loss,
    n,
    inverse_n: tl.float64,
    chunks,
    CONSISTENCY: tl.constexpr,
    L1: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: writes dF, and the sums, or at once the loss where a sample is one chunk. Backward:
    corrects dF where a sample's upstream gradient is not 1.
    """
    task = tl.program_id(0).to(tl.int64)
    b, begin = task // chunks, task % chunks * CHUNK
    F += b * F_row + begin
    F_p += b * F_p_row + begin
    x0 += b * x0_row + begin
    if x_t is not None:
        x_t += b * x_t_row + begin
    if x_tp is not None:
        x_tp += b * x_tp_row + begin
    if dF is not None:
        dF += b * dF_row + begin
    coef += 8 * b
    rest = n - begin

    if upstream is None:
        td, base = _chunk(
            F, F_p, x0, x_t, x_tp, dF, coef, 1, 1, rest, inverse_n, CONSISTENCY, L1, CHUNK, BLOCK
        )
        if sums is not None:
            tl.store(sums + 2 * task, td)
            tl.store(sums + 2 * task + 1, base)
        else:
            _store_loss(loss, coef, b, inverse_n, td, base)
    else:
        g = upstream + 2 * b
        _correct(F, F_p, x0, x_t, x_tp, dF, coef, g, rest, inverse_n, CONSISTENCY, L1, CHUNK, BLOCK)


@triton.jit
def sum_kernel(
    sums, coef, loss, inverse_n: tl.float64, chunks, SPAN: tl.constexpr, SUM_BLOCK: tl.constexpr
):
    """The losses of samples of several chunks: adds their sums, in order."""
    b = tl.program_id(0).to(tl.int64)
    sums += 2 * b * chunks
    td, base = tl.zeros([SUM_BLOCK], tl.float64), tl.zeros([SUM_BLOCK], tl.float64)
    for start in range(0, SPAN, SUM_BLOCK):
        c = start + tl.arange(0, SUM_BLOCK)
        td += tl.load(sums + 2 * c, c < chunks, other=0.0)
        base += tl.load(sums + 2 * c + 1, c < chunks, other=0.0)
    _store_loss(loss, coef + 8 * b, b, inverse_n, tl.sum(td), tl.sum(base))


def _rows(tensor: Tensor | None, layout: Tensor) -> tuple[Tensor | None, int]:
    """A tensor whose samples lie as `layout`'s do, copied only if they do not, and the distance
    from one to the next.
    """
    if tensor is None:
        return None, 0
    if any(
        size > 1 and a != b
        for size, a, b in zip(
            layout.shape[1:], tensor.stride()[1:], layout.stride()[1:], strict=True
        )
    ):
        tensor = torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)
    return tensor, tensor.stride(0)


def _whole(length: int, block: int) -> int:
    """A length in whole blocks: loops have constant bounds, which Triton's interpreter needs before
    3.9 under NumPy 2.4.
    """
    return triton.cdiv(length, block) * block


def _launch(
    out, out_target, x0, coef, x_t, x_tp, consistency, l1, grad, layout, upstream, loss
) -> None:
    batch, n = len(out), out[0].numel()
    chunks, chunk = triton.cdiv(n, CHUNK), min(CHUNK, _whole(n, BLOCK))
    coef = coef.double().contiguous()
    tensors, rows = zip(
        *(_rows(tensor, layout) for tensor in (out, out_target, x0, x_t, x_tp, grad)), strict=True
    )
    sums = loss.new_empty(batch * chunks, 2) if loss is not None and chunks > 1 else None
    with torch.cuda.device_of(out):
        chunk_kernel[(batch * chunks,)](
            *tensors,
            *rows,
            coef,
            upstream,
            sums,
            loss,
            n,
            1 / n,
            chunks,
            consistency,
            l1,
            chunk,
            BLOCK,
            **OPTIONS,
        )
        if sums is not None:
            sum_kernel[(batch,)](
                sums,
                coef,
                loss,
                1 / n,
                chunks,
                _whole(chunks, SUM_BLOCK),
                SUM_BLOCK,
                enable_fp_fusion=True,
            )


def td_loss(out, out_target, x0, coef, x_t, x_tp, consistency, l1, want_grad):
    loss = out.new_empty(
        len(out), 2, dtype=torch.float64 if x0.dtype == torch.float64 else torch.float32
    )
    layout = gradient_like(out)
    grad = layout if want_grad else None
    if out.numel() > 0:
        _launch(out, out_target, x0, coef, x_t, x_tp, consistency, l1, grad, layout, None, loss)
    else:
        loss.zero_()
    return loss, grad if want_grad else out.new_empty(0)


def td_loss_backward_(grad, upstream, out, out_target, x0, coef, x_t, x_tp, consistency, l1):
    if out.numel() > 0:
        _launch(out, out_target, x0, coef, x_t, x_tp, consistency, l1, grad, grad, upstream, None)


_backends.library.impl("td_loss.triton", td_loss, _backends.triton_key())
_backends.library.impl("td_loss_backward_.triton", td_loss_backward_, _backends.triton_key())
