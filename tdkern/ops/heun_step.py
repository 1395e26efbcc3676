"""`heun_step`: from the network's raw output to its next input, in one launch."""

import torch
from torch import Tensor

from .. import reference
from . import _backends, _modes
from ._checks import check_tensor
from ._dtypes import FLOATS, WIDE, names


def heun_step(
    F: Tensor,
    x: Tensor,
    coef: Tensor,
    x_hat: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    net_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """One Euler step, or the correction that makes it Heun's, and the network's next input.

    D = skip x + scale F,  d = (x - D) / sigma,
    x_next = x + h d  or, with x_hat,  (x_hat + x + h d) / 2; then x_next += churn noise and
    net_input = c_in x_next (arXiv 2206.00364, algorithm 2). Any network with D = skip x + scale F.

    A step of the sampler from x_hat at sigma_hat to sigma_next is two calls, with F and F' the
    network's outputs:

        # sigma = sigma_hat, h = sigma_next - sigma_hat
        x_next, net_input = heun_step(F, x_hat, coef, net_dtype=dtype)
        # sigma = sigma_next, the same h
        x_hat, net_input = heun_step(F', x_next, coef', x_hat, noise, net_dtype=dtype)

    The second also raises the state to the coming step's sigma_hat, by churn = S_noise
    sqrt(sigma_hat^2 - sigma_next^2). Euler's sampler is the first call alone, with the noise. The
    last call of a sampler needs no noise, c_in and net_dtype.

    Args:
        F: the network's raw output at x, of any shape. float32, float64, bfloat16 or float16; any
            strides.
        x: as `F`, the state that the network was asked about. float32 or float64, the precision of
            all arithmetic.
        coef: [6] float64, may change between the replays of a CUDA graph: sigma, skip, scale, h,
            churn, c_in. sigma > 0 (checked on the CPU alone: a GPU would have to be waited for),
            skip and scale are x's; c_in is that of the level that the state has after this call.
        x_hat: as `x`, the state from which the step began; makes this call the correction. None: an
            Euler step.
        noise: as `x`, unit noise. None: churn is not used.
        net_dtype: dtype of the network's next input, any of F's; None: it is not made.
        backend: "auto", "cuda", "triton", "cpp" or "reference".

    Returns:
        x_next: as `x`, in its memory layout if that is dense. net_input: the same in `net_dtype`,
            or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range. RuntimeError: no such
            backend here.

    No gradients; in forward mode the tangents of all arguments. Deterministic. No host
    synchronisation.
    """
    try:
        return _on_backend(F, x, coef, x_hat, noise, net_dtype, backend)
    except _backends.REFUSED:
        _check(F, x, coef, x_hat, noise, net_dtype)  # says in full which argument is wrong
        raise


def _on_backend(
    F: Tensor,
    x: Tensor,
    coef: Tensor,
    x_hat: Tensor | None,
    noise: Tensor | None,
    net_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`heun_step` on the backend that fits."""
    backend = _backends.resolve("heun_step", backend, x.device)
    # in forward mode nothing is detached: the reference gives the tangents too
    if (torch.is_grad_enabled() or backend == _backends.BY_DEVICE) and not _modes.forward_mode():
        F, x, coef = F.detach(), x.detach(), coef.detach()
        x_hat = None if x_hat is None else x_hat.detach()
        noise = None if noise is None else noise.detach()
    if backend not in ("cpp", "cuda"):  # these two check for themselves
        _check(F, x, coef, x_hat, noise, net_dtype)
    readable = _modes.can_check_values(coef) and coef.dtype == torch.float64
    if readable and coef.shape == (6,) and not coef.tolist()[0] > 0:
        raise ValueError(f"heun_step: coef[0], which is sigma, must be > 0, got {coef[0].item()}")
    if backend == "reference":
        return reference.heun_step(F, x, coef, x_hat, noise, net_dtype)
    args = (F, x, coef, x_hat, noise, net_dtype)
    x_next, net_input = _backends.call("heun_step", backend, args)
    return x_next, None if net_dtype is None else net_input


def _check(
    F: Tensor,
    x: Tensor,
    coef: Tensor,
    x_hat: Tensor | None,
    noise: Tensor | None,
    net_dtype: torch.dtype | None,
) -> None:
    tensors = (("F", F), ("x", x), ("coef", coef), ("x_hat", x_hat), ("noise", noise))
    for name, tensor in tensors:
        if tensor is not None or name in ("F", "x", "coef"):
            check_tensor("heun_step", name, tensor)
    if x.dtype not in WIDE:
        raise ValueError(f"heun_step: x must be one of {names(WIDE)}, got {x.dtype}")
    if F.dtype not in FLOATS:
        raise ValueError(f"heun_step: F must be one of {names(FLOATS)}, got {F.dtype}")
    if net_dtype is not None and net_dtype not in FLOATS:
        raise ValueError(
            f"heun_step: net_dtype must be None or one of {names(FLOATS)}, got {net_dtype}"
        )
    for name, tensor, dtype in (
        ("F", F, F.dtype),
        ("x_hat", x_hat, x.dtype),
        ("noise", noise, x.dtype),
    ):
        if tensor is None:
            continue
        if tensor.shape != x.shape:
            raise ValueError(
                f"heun_step: {name} must have x's shape {list(x.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"heun_step: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"heun_step: {name} must be on {x.device}, got {tensor.device}")
    if coef.shape != (6,):
        raise ValueError(f"heun_step: coef must have shape [6], got {list(coef.shape)}")
    if coef.dtype != torch.float64:
        raise ValueError(f"heun_step: coef must be float64, got {coef.dtype}")
    if coef.device != x.device:
        raise ValueError(f"heun_step: coef must be on {x.device}, got {coef.device}")


def _fake(F, x, coef, x_hat, noise, net_dtype):
    _check(F, x, coef, x_hat, noise, net_dtype)
    net_input = x.new_empty(0) if net_dtype is None else torch.empty_like(x, dtype=net_dtype)
    return torch.empty_like(x), net_input


def _reference(F, x, coef, x_hat, noise, net_dtype):
    x_next, net_input = reference.heun_step(F, x, coef, x_hat, noise, net_dtype)
    return x_next, x.new_empty(0) if net_dtype is None else net_input


_backends.define("heun_step", _fake, _reference)
