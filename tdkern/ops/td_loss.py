"""`td_loss`: the per-sample TD and base loss and the gradient of the network's output, in one
launch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..columns import W_BASE
from . import _backends, _modes
from ._checks import check_number, check_tensor
from ._dtypes import STORAGE_PAIRS, WIDE

BASES = ("denoise", "consistency")
NORMS = ("l2", "l1", "huber")


def td_loss(
    out: Tensor,
    out_target: Tensor,
    x0: Tensor,
    coef: Tensor,
    x_t: Tensor | None = None,
    x_tp: Tensor | None = None,
    *,
    base: str = "denoise",
    base_norm: str = "l2",
    huber_c: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Per-sample temporal-difference loss and base loss, both weighted.

    e = x0 - (skip x_t + scale out),  e' = x0 - (skip' x_tp + scale' out_target),
    delta = A e - A' e',  td = w_td mean(delta^2),
    base = w_base mean(b^2),  b = e or, for "consistency", e - e'
    (arXiv 2606.15048; docs/mathematics.md). A term whose weight is 0 is left out: what it would
    have read may be NaN.

    Two more norms of the base loss: "l1", w_base mean(|b|), and "huber",
    w_base (sqrt(||b||_2^2 + c^2) - c) / n, the pseudo-Huber metric of improved consistency training
    (arXiv 2310.14189, table 1). That paper's loss is n times ours, n being a sample's element
    count: as the others are means, so is this.

    Args:
        out: [B, ...], the online network's raw output F at t. float32, float64, bfloat16 or
            float16; any strides.
        out_target: as `out`, the target network's raw output F' at t'.
        x0: [B, ...] as `out`, clean data; its dtype, or float32 beside a bfloat16 or float16 `out`.
        coef: [B, 8] float32 or float64: skip, scale, skip', scale', A, A', w_td, w_base; from
            `td_coef`.
        x_t: as `x0`, the noisy data at t; may be None where every skip is 0.
        x_tp: as `x0`, the noisy data at t'; may be None where every skip' is 0.
        base: "denoise" or "consistency".
        base_norm: "l2", "l1" or "huber", whose backward pass is a second pass over memory.
        huber_c: c > 0 of "huber"; None is the paper's 0.00054 sqrt(n).
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        [B, 2]: td and base. float64 for float64 data, else float32.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or is not one of the names
            above. RuntimeError: no such backend here.

    Gradient to `out` only, any number of times differentiable. It is computed in the forward pass,
    with unit upstream gradient, and corrected in the backward pass only for samples whose upstream
    gradient is not 1; where the gradient is differentiated again (`create_graph=True`) or batched,
    it is computed by the reference. In forward mode the tangent is that of all arguments: detach()
    what must not count. Deterministic: the result does not depend on the number of threads or the
    launch shape. No host synchronisation.
    """
    given, kind = Given(out, out_target, x0, coef, x_t, x_tp), Kind(base, base_norm, huber_c)
    try:
        return _on_backend(given, kind, backend)
    except _backends.REFUSED:
        _check(given, kind)  # says in full which argument is wrong
        raise


class Given(NamedTuple):
    """`td_loss`'s tensors."""

    out: Tensor
    out_target: Tensor
    x0: Tensor
    coef: Tensor
    x_t: Tensor | None
    x_tp: Tensor | None

    def on_one_device(self) -> bool:
        device = self.out.device
        for tensor in self[1:]:
            if tensor is not None and tensor.device != device:
                return False
        return True

    def fixed(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All but `out`, without gradients; but in forward mode with their tangents, which would
        otherwise be dropped without a word.
        """
        if _modes.forward_mode():
            return self[1:]
        x_t = None if self.x_t is None else self.x_t.detach()
        x_tp = None if self.x_tp is None else self.x_tp.detach()
        return self.out_target.detach(), self.x0.detach(), self.coef.detach(), x_t, x_tp


class Kind(NamedTuple):
    """`td_loss`'s choices."""

    base: str
    base_norm: str
    huber_c: float | None

    def known(self) -> bool:
        """Whether the compiled ops have it, as it is."""
        return self.base in BASES and self.base_norm in ("l2", "l1") and self.huber_c is None

    def flags(self) -> tuple[bool, bool]:
        """The ops' `consistency` and `l1`."""
        return self.base == "consistency", self.base_norm == "l1"


def _on_backend(given: Given, kind: Kind, backend: str) -> Tensor:
    """`td_loss` on the backend that fits; what that one checks itself is not checked before."""
    out = given.out
    backend = _backends.resolve("td_loss", backend, out.device)
    if kind.base_norm == "huber":
        return _huber(given, kind, backend)
    compiling = torch.compiler.is_compiling()
    # Of the rest the C++ and the CUDA op check themselves.
    checks_itself = backend in ("cpp", "cuda") and kind.known() and not compiling
    if not checks_itself or not given.on_one_device():
        _check(given, kind)
    if backend == "reference":
        return reference.td_loss(out, *given.fixed(), kind.base, kind.base_norm)
    recorded = backend == _backends.BY_DEVICE  # a replay finds out in its backward pass
    want_grad = out.requires_grad and torch.is_grad_enabled() and not recorded
    if want_grad and not compiling:
        return _TDLoss.apply(out, (*given[1:], *kind.flags()), backend)
    arguments = (out, *given.fixed(), *kind.flags(), want_grad)
    return _backends.call("td_loss", backend, arguments)[0]


def _huber(given: Given, kind: Kind, backend: str) -> Tensor:
    """Pseudo-Huber from the op's unweighted mean(b^2): w (sqrt(s + c^2) - c) / n with s = n
    mean(b^2), without the cancellation.

    Its slope in the mean reaches the op as a sample's upstream gradient.
    """
    _check(given, kind)
    n = max(given.out[0:1].numel(), 1)
    c = 0.00054 * n**0.5 if kind.huber_c is None else kind.huber_c
    if backend == "reference":
        return reference.td_loss(given.out, *given.fixed(), kind.base, "huber", c)
    coef = given.coef
    w_base = coef.detach()[:, W_BASE]
    coef = torch.cat([coef[:, :W_BASE], (w_base != 0)[:, None]], 1)
    unweighted = given._replace(coef=coef)
    td, mean = td_loss(*unweighted, base=kind.base, backend=backend).unbind(1)
    return torch.stack([td, w_base.to(mean.dtype) * mean / ((n * mean + c**2).sqrt() + c)], 1)


def _check(given: Given, kind: Kind) -> None:
    for name, tensor in given._asdict().items():
        if tensor is not None or name not in ("x_t", "x_tp"):
            check_tensor("td_loss", name, tensor)
    out, x0 = given.out, given.x0
    if out.ndim < 1:
        raise ValueError("td_loss: out must have shape [B, ...], got []")
    if (out.dtype, x0.dtype) not in STORAGE_PAIRS:
        raise ValueError(
            "td_loss: x0 must have out's dtype, or float32 beside a bfloat16 or float16 out, got "
            f"{x0.dtype} beside {out.dtype}"
        )
    for name in ("out_target", "x0", "x_t", "x_tp"):
        tensor = getattr(given, name)
        if tensor is None:
            continue
        dtype = out.dtype if name == "out_target" else x0.dtype
        if tensor.shape != out.shape:
            raise ValueError(
                f"td_loss: {name} must have out's shape {list(out.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"td_loss: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != out.device:
            raise ValueError(f"td_loss: {name} must be on {out.device}, got {tensor.device}")
    _check_coef(given.coef, out)
    _check_kind(*kind)


def _check_coef(coef: Tensor, out: Tensor) -> None:
    if coef.shape != (out.shape[0], 8):
        raise ValueError(
            f"td_loss: coef must have shape [{out.shape[0]}, 8], got {list(coef.shape)}"
        )
    if coef.dtype not in WIDE:
        raise ValueError(f"td_loss: coef must be float32 or float64, got {coef.dtype}")
    if coef.device != out.device:
        raise ValueError(f"td_loss: coef must be on {out.device}, got {coef.device}")


def _check_kind(base: str, base_norm: str, huber_c: float | None) -> None:
    if base not in BASES:
        raise ValueError(f"td_loss: base must be one of {', '.join(BASES)}, got {base!r}")
    if base_norm not in NORMS:
        raise ValueError(f"td_loss: base_norm must be one of {', '.join(NORMS)}, got {base_norm!r}")
    if huber_c is not None:
        check_number("td_loss", "huber_c", huber_c)
    if huber_c is not None and (base_norm != "huber" or not 0 < huber_c < math.inf):
        wanted = (
            "a positive number" if base_norm == "huber" else f"None with base_norm {base_norm!r}"
        )
        raise ValueError(f"td_loss: huber_c must be {wanted}, got {huber_c}")


def gradient_like(out: Tensor) -> Tensor:
    """dF before it is written: in out's own layout if that keeps samples apart in memory, else
    contiguous."""
    grad = torch.empty_like(out)
    apart = out.ndim == 1 or out.shape[0] <= 1 or grad.stride(0) == grad[0:1].numel()
    return grad if apart else torch.empty(out.shape, dtype=out.dtype, device=out.device)


def _fake(out, out_target, x0, coef, x_t, x_tp, consistency, l1, want_grad):
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    grad = gradient_like(out) if want_grad else out.new_empty(0)
    return out.new_empty(out.shape[0], 2, dtype=dtype), grad


def _setup_context(ctx, inputs, output):
    *tensors, consistency, l1, want_grad = inputs
    ctx.kind = consistency, l1
    # references to what the caller holds anyway; dF is the one new buffer
    ctx.save_for_backward(*tensors)
    ctx.grad = output[1] if want_grad else None
    # an output with a grad_fn, held by that grad_fn, would be a reference cycle
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(backend, ctx, upstream, _=None):
    """Hand dF out as it is where upstream is 1; a sample whose upstream is not is corrected in
    place, on the device."""
    if upstream is None:
        return (None,) * 9
    tensors = ctx.saved_tensors
    # Where dF is differentiated again, or one upstream gradient stands for many.
    if torch.is_grad_enabled() or _modes.batched(upstream):
        given = Given(*tensors)
        dF = reference.td_loss_gradient(upstream, given.out, *given.fixed(), *ctx.kind)
        return (dF, *(None,) * 8)
    grad, ctx.grad = ctx.grad, None  # handed out once: whoever gets it owns it
    if grad is None:  # a further backward through a retained graph
        grad = _backends.call("td_loss", backend, (*tensors, *ctx.kind, True))[1]
    elif type(grad) is not Tensor:  # traced: a saved activation must not be written
        grad = grad.clone()
    _backends.call("td_loss_backward_", backend, (grad, upstream.contiguous(), *tensors, *ctx.kind))
    return (grad, *(None,) * 8)


class _TDLoss(torch.autograd.Function):
    """The op's autograd formula in eager mode, without the 60 us on a CPU that `torch.library` adds
    to each call."""

    @staticmethod
    def forward(ctx, out, rest, backend):
        with torch._C._AutoDispatchBelowAutograd():
            loss, ctx.grad = _backends.call("td_loss", backend, (out, *rest, True))
        *tensors, consistency, l1 = rest
        ctx.backend, ctx.kind = backend, (consistency, l1)
        ctx.save_for_backward(out, *tensors)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return _backward(ctx.backend, ctx, upstream)[0], None, None


def _reference(out, out_target, x0, coef, x_t, x_tp, consistency, l1, want_grad):
    base, norm = "consistency" if consistency else "denoise", "l1" if l1 else "l2"
    loss = reference.td_loss(out, out_target, x0, coef, x_t, x_tp, base, norm)
    if not want_grad:
        return loss, out.new_empty(0)
    grad = gradient_like(out)
    _reference_backward_(
        grad, torch.ones_like(loss), out, out_target, x0, coef, x_t, x_tp, consistency, l1
    )
    return loss, grad


def _reference_backward_(grad, upstream, *arguments):
    grad.copy_(reference.td_loss_gradient(upstream, *arguments))


_backends.define("td_loss_backward_", lambda *_: None, _reference_backward_)
_backends.define("td_loss", _fake, _reference, _backward, _setup_context)
