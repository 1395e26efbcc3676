"""td_loss, forward and backward through autograd, against what it replaces."""

import pytest
import torch
from measure import DEVICE, compiled, copy_of, name, sizes
from published import cancelled, eager_td_edm

import tdkern


def inputs(shape):
    torch.manual_seed(0)
    sigma = (
        (1.2 * torch.randn(shape[0], dtype=torch.float64) - 1.2).exp().clamp(0.002, 80).to(DEVICE)
    )
    coef, levels = tdkern.td_coef(sigma, weight="online")
    F, F_p, x0, x_t, x_tp = (torch.randn(shape, device=DEVICE) for _ in range(5))
    return F.requires_grad_(), F_p, x0, x_t, x_tp, coef, levels


class CopyNode(torch.autograd.Function):
    """The floor of any loss with a Python autograd node: the node does nothing but a plain copy of
    as many bytes.
    """

    @classmethod
    def of(cls, F, moved):
        copy, loss, dF = copy_of(moved), torch.zeros(len(F), 2, device=DEVICE), torch.zeros_like(F)
        return lambda: cls.apply(F, copy, loss, dF)

    @staticmethod
    def forward(ctx, F, copy, loss, dF):
        copy()
        ctx.dF = dF
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.dF, None, None, None


@pytest.mark.parametrize("shape", sizes((128, 3, 32, 32), (1024, 3, 32, 32)), ids=name)
@pytest.mark.parametrize(
    "competitor",
    [
        "tdkern",
        "published-style eager",
        "clean eager",
        "torch.compile",
        "copy as an autograd node",
        "copy",
    ],
)
def bench_td_loss(compare, shape, competitor):
    fused = compiled(cancelled) if competitor == "torch.compile" else None
    # Read out, out_target, x0, x_t, x_tp; write dF.
    moved = 6 * 4 * torch.Size(shape).numel()

    def make():
        F, F_p, x0, x_t, x_tp, coef, levels = inputs(shape)
        valid, coef32 = coef[:, 6] > 0, coef.float()
        node = CopyNode.of(F, moved) if competitor == "copy as an autograd node" else None
        forward = {
            "tdkern": lambda: tdkern.td_loss(F, F_p, x0, coef, x_t, x_tp),
            "published-style eager": lambda: eager_td_edm(F, F_p, x0, x_t, x_tp, levels, valid),
            "clean eager": lambda: cancelled(F, F_p, x0, x_t, x_tp, coef32),
            "torch.compile": lambda: fused(F, F_p, x0, x_t, x_tp, coef32),
            "copy as an autograd node": node,
        }[competitor]
        # given, so that no competitor's time holds a sum over the batch
        upstream = torch.ones_like(forward())
        return lambda: torch.autograd.grad(forward(), F, upstream)

    compare("td_loss", name(shape), competitor, make, moved=moved)
