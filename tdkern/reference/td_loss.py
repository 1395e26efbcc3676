"""The TD error in the paper's own form, in plain PyTorch: the oracle that every kernel is tested
against."""

import torch
from torch import Tensor


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def td_loss(
    out: Tensor,
    out_target: Tensor,
    x0: Tensor,
    coef: Tensor,
    x_t: Tensor | None,
    x_tp: Tensor | None,
    base: str,
    base_norm: str = "l2",
    huber_c: float = 0.0,
) -> Tensor:
    """Per-sample [B, 2]: w_td ||delta||_2^2 / n and w_base ||base|| / n in its norm, four means
    written out (docs/mathematics.md)."""
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    out, out_target, x0 = out.to(dtype), out_target.to(dtype), x0.to(dtype)
    x_t = torch.zeros_like(x0) if x_t is None else x_t.to(dtype)
    x_tp = torch.zeros_like(x0) if x_tp is None else x_tp.to(dtype)
    skip, scale, skip_p, scale_p, A, A_p, w_td, w_base = (_column(c, x0) for c in coef.unbind(1))
    # alpha = 1; any kappa gives the same delta, which is what the kernels use
    kappa, kappa_p = 1 - A, 1 - A_p

    D = skip * x_t + scale * out
    D_p = skip_p * x_tp + scale_p * out_target
    mu_true, mu_true_p = A * x0 + kappa * x_t, A_p * x0 + kappa_p * x_tp
    mu_model, mu_model_p = A * D + kappa * x_t, A_p * D_p + kappa_p * x_tp
    delta = (mu_true - mu_true_p) - (mu_model - mu_model_p)
    error = x0 - D if base == "denoise" else (x0 - D) - (x0 - D_p)

    # A term whose weight is 0 is left out: 0 times NaN must not reach the loss.
    def term(weight, error, norm="l2"):
        error = torch.where(weight == 0, torch.zeros_like(error), error).unsqueeze(-1).flatten(1)
        total = (error.abs() if norm == "l1" else error.square()).sum(1)
        if norm == "huber":
            total = (total + huber_c**2).sqrt() - huber_c
        return weight.flatten() * total / max(error.shape[1], 1)

    return torch.stack([term(w_td, delta), term(w_base, error, base_norm)], 1)


def td_loss_gradient(
    upstream: Tensor,
    out: Tensor,
    out_target: Tensor,
    x0: Tensor,
    coef: Tensor,
    x_t: Tensor | None,
    x_tp: Tensor | None,
    consistency: bool,
    l1: bool,
) -> Tensor:
    """dF for the upstream gradient [B, 2]: -(scale / n) (2 w_td u_td A delta + w_base u_base
    slope), the slope 2 b, or b's sign in "l1".

    Linear in `out`, but for the sign, and in `upstream`: PyTorch differentiates it again.
    """
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    F, F_p, clean = out.to(dtype), out_target.to(dtype), x0.to(dtype)
    skip, scale, skip_p, scale_p, A, A_p, w_td, w_base = (_column(c, clean) for c in coef.unbind(1))
    e = clean - scale * F if x_t is None else clean - (skip * x_t.to(dtype) + scale * F)
    e_p = (
        clean - scale_p * F_p if x_tp is None else clean - (skip_p * x_tp.to(dtype) + scale_p * F_p)
    )
    error = e - e_p if consistency else e
    slope = error.sign() if l1 else 2 * error
    u_td, u_base = (_column(u, clean) for u in upstream.unbind(1))
    n = max(out[0:1].numel(), 1)

    def term(weight, value):  # as in the loss: 0 times NaN must not reach the gradient
        return weight * torch.where(weight == 0, torch.zeros_like(value), value)

    dF = -(scale / n) * (
        u_td * term(w_td, 2 * A * (A * e - A_p * e_p)) + u_base * term(w_base, slope)
    )
    return dF.to(out.dtype)
