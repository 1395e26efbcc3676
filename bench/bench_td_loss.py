"""td_loss, forward and backward through autograd, against what it replaces."""
import pytest
import torch
from published import cancelled, eager_td_edm

import tdkern

SIZES = [(128, 3, 32, 32), (1024, 3, 32, 32)]


def inputs(shape):
    torch.manual_seed(0)
    sigma = (1.2 * torch.randn(shape[0], dtype=torch.float64) - 1.2).exp().clamp(0.002, 80)
    coef, levels = tdkern.td_coef(sigma, weight="online")
    F, F_p, x0, x_t, x_tp = (torch.randn(shape) for _ in range(5))
    return F.requires_grad_(), F_p, x0, x_t, x_tp, coef, levels


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("competitor", ["tdkern", "published-style eager", "clean eager", "torch.compile", "copy"])
def bench_td_loss(compare, shape, competitor):
    F, F_p, x0, x_t, x_tp, coef, levels = inputs(shape)
    valid, coef32 = coef[:, 6] > 0, coef.float()
    compiled = torch.compile(cancelled)
    forward = {
        "tdkern": lambda: tdkern.td_loss(F, F_p, x0, coef, x_t, x_tp),
        "published-style eager": lambda: eager_td_edm(F, F_p, x0, x_t, x_tp, levels, valid),
        "clean eager": lambda: cancelled(F, F_p, x0, x_t, x_tp, coef32),
        "torch.compile": lambda: compiled(F, F_p, x0, x_t, x_tp, coef32),
    }.get(competitor)
    if forward is None:  # the floor: a copy that moves as much, three tensors read and three written
        source, target = torch.randn(3, *shape), torch.empty(3, *shape)
        step = lambda: target.copy_(source)  # noqa: E731
    else:
        upstream = torch.ones_like(forward())  # given, so that no competitor's time holds a sum over the batch
        step = lambda: torch.autograd.grad(forward(), F, upstream)  # noqa: E731
    # Read out, out_target, x0, x_t, x_tp; write dF.
    compare("td_loss", "x".join(map(str, shape)), competitor, step, moved=6 * x0.numel() * x0.element_size())
