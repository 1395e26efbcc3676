"""The whole loss path, from noise levels, clean data and the networks' outputs to the gradient of
the output: levels, pair, loss, backward.
"""

import pytest
import torch
from bench_noise_pair import eager as pair
from measure import DEVICE, compiled, name, sizes
from published import cancelled, eager_td_edm
from torch import Tensor

import tdkern
from tdkern.benchmark.published import td_levels


def tdkern_path(F: Tensor, F_p: Tensor, x0: Tensor, sigma: Tensor, one: Tensor) -> Tensor:
    coef, levels = tdkern.td_coef(sigma, weight="online")
    x_t, x_tp = tdkern.noise_pair(x0, one, levels[:, 0], one, levels[:, 2], seed=1)
    return tdkern.td_loss(F, F_p, x0, coef, x_t, x_tp)


def published_draw(x0: Tensor, sigma: Tensor, one: Tensor) -> tuple[Tensor, ...]:
    levels, valid = td_levels(sigma)
    return *pair(x0, one, levels[:, 0], one, levels[:, 2]), levels, levels, valid


def clean_draw(x0: Tensor, sigma: Tensor, one: Tensor) -> tuple[Tensor, ...]:
    coef, levels = tdkern.td_coef(sigma, weight="online", backend="reference")
    return *pair(x0, one, levels[:, 0], one, levels[:, 2]), levels, coef.float()


def published_path(F: Tensor, F_p: Tensor, x0: Tensor, sigma: Tensor, one: Tensor) -> Tensor:
    x_t, x_tp, _, levels, valid = published_draw(x0, sigma, one)
    return eager_td_edm(F, F_p, x0, x_t, x_tp, levels, valid)


def clean_path(F: Tensor, F_p: Tensor, x0: Tensor, sigma: Tensor, one: Tensor) -> Tensor:
    x_t, x_tp, _, coef = clean_draw(x0, sigma, one)
    return cancelled(F, F_p, x0, x_t, x_tp, coef)


@pytest.mark.parametrize("shape", sizes((512, 3, 32, 32)), ids=name)
@pytest.mark.parametrize("competitor", ["tdkern", "published-style eager", "torch.compile"])
def bench_loss_path(compare, shape, competitor):
    loss = {
        "tdkern": tdkern_path,
        "published-style eager": published_path,
        "torch.compile": clean_path,
    }[competitor]
    loss = compiled(loss) if competitor == "torch.compile" else loss

    def make():
        torch.manual_seed(0)
        F, F_p, x0 = (torch.randn(shape, device=DEVICE) for _ in range(3))
        sigma = (1.2 * torch.randn(shape[0], dtype=torch.float64, device=DEVICE) - 1.2).exp()
        args = F.requires_grad_(), F_p, x0, sigma, torch.ones_like(sigma)
        upstream = torch.ones_like(loss(*args))
        return lambda: torch.autograd.grad(loss(*args), F, upstream)

    # noise_pair's three tensors and td_loss's six.
    compare("loss path", name(shape), competitor, make, moved=9 * 4 * torch.Size(shape).numel())
