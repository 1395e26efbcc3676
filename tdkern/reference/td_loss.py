"""The TD error in the paper's own form, in plain PyTorch: the oracle that every kernel is tested against."""
import torch
from torch import Tensor


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def td_loss(out: Tensor, out_target: Tensor, x0: Tensor, coef: Tensor, x_t: Tensor | None, x_tp: Tensor | None, base: str, base_norm: str = "l2",
            huber_c: float = 0.0) -> Tensor:
    """Per-sample [B, 2]: w_td ||delta||_2^2 / n and w_base ||base|| / n in its norm, four means written out (design, section 1)."""
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    out, out_target, x0 = out.to(dtype), out_target.to(dtype), x0.to(dtype)
    x_t = torch.zeros_like(x0) if x_t is None else x_t.to(dtype)
    x_tp = torch.zeros_like(x0) if x_tp is None else x_tp.to(dtype)
    skip, scale, skip_p, scale_p, A, A_p, w_td, w_base = (_column(c, x0) for c in coef.unbind(1))
    kappa, kappa_p = 1 - A, 1 - A_p  # alpha = 1; any kappa gives the same delta, which is what the kernels use

    D = skip * x_t + scale * out
    D_p = skip_p * x_tp + scale_p * out_target
    mu_true, mu_true_p = A * x0 + kappa * x_t, A_p * x0 + kappa_p * x_tp
    mu_model, mu_model_p = A * D + kappa * x_t, A_p * D_p + kappa_p * x_tp
    delta = (mu_true - mu_true_p) - (mu_model - mu_model_p)
    error = x0 - D if base == "denoise" else (x0 - D) - (x0 - D_p)

    def term(weight, error, norm="l2"):  # a term whose weight is 0 is left out: 0 times NaN must not reach the loss
        error = torch.where(weight == 0, torch.zeros_like(error), error).unsqueeze(-1).flatten(1)
        total = (error.abs() if norm == "l1" else error.square()).sum(1)
        if norm == "huber":
            total = (total + huber_c**2).sqrt() - huber_c
        return weight.flatten() * total / max(error.shape[1], 1)

    return torch.stack([term(w_td, delta), term(w_base, error, base_norm)], 1)
