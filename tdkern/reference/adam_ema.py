"""Adam through torch.optim's own function, one tensor at a time, then the averages. Reads the flag on the host."""
import math

import torch
from torch import Tensor
from torch.optim.adam import adam

from .ema_update import ema_update_


def found_inf(grads: list[Tensor]) -> Tensor:
    """1 where any element of any gradient is not finite, else 0."""
    return torch.stack([~grad.isfinite().all() for grad in grads]).any().float()


def adam_ema_(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor], averages: list[list[Tensor]],
              decays: Tensor, lr: Tensor, found_inf: Tensor, grad_scale: Tensor | None, clip: Tensor | None, skipped: Tensor | None, beta1: float, beta2: float,
              eps: float, weight_decay: float, decoupled: bool) -> None:
    """One step: gradients times clip / grad_scale, torch.optim.Adam or AdamW, averages of the new parameters; or nothing but skipped + 1."""
    factor = (1.0 if clip is None else clip.item()) / (1.0 if grad_scale is None else grad_scale.item() or math.nan)
    if found_inf.item() != 0 or not math.isfinite(factor):
        if skipped is not None:
            skipped += 1
        return
    half = (torch.float16, torch.bfloat16)
    wide = [[t.float() if t.dtype in half else t for t in column] for column in (params, grads, exp_avgs, exp_avg_sqs)]
    wide[1] = [grad * factor for grad in wide[1]]
    adam(*wide, [], steps, foreach=False, fused=False, capturable=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr.item(),
         weight_decay=weight_decay, eps=eps, maximize=False, decoupled_weight_decay=decoupled)
    for column, new in zip((params, exp_avgs, exp_avg_sqs), (wide[0], *wide[2:]), strict=True):
        for tensor, value in zip(column, new, strict=True):
            tensor.copy_(value)
    ema_update_(averages, params, decays)
