"""heun_step against what it replaces: preconditioning, step and the scaling of the next input as passes of their own. State float64, network float32."""
import pytest
import torch

import tdkern

SIZES = [(64, 3, 32, 32), (512, 3, 32, 32)]
COEF = (2.0, 0.06, 0.48, -0.7, 0.9, 0.48)  # sigma, skip, scale, h, churn, c_in


def denoised(F, x, skip, scale):
    return (skip.float() * x.float() + scale.float() * F).double()


def euler(F, x, sigma, skip, scale, h, churn, c_in):
    d = (x - denoised(F, x, skip, scale)) / sigma
    x_next = x + h * d
    return x_next, d, c_in.float() * x_next.float()


def correction(F, x, x_hat, d, noise, sigma, skip, scale, h, churn, c_in):
    d_next = (x - denoised(F, x, skip, scale)) / sigma
    x_next = x_hat + h * (d + d_next) / 2 + churn * noise
    return x_next, c_in.float() * x_next.float()


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("part", ["euler", "correction"])
@pytest.mark.parametrize("competitor", ["tdkern", "eager", "torch.compile", "copy"])
def bench_heun_step(compare, shape, part, competitor):
    torch.manual_seed(0)
    F, x, coef = torch.randn(shape), torch.randn(shape, dtype=torch.float64), torch.tensor(COEF, dtype=torch.float64)
    x_hat, d, noise = torch.randn(3, *shape, dtype=torch.float64)
    plain, given = (euler, (F, x)) if part == "euler" else (correction, (F, x, x_hat, d, noise))
    compiled = torch.compile(plain)
    # Read F, x and, in the correction, x_hat and noise; write x_next and net_input.
    moved = x.numel() * ((4 + 8) + (8 + 4) + (0 if part == "euler" else 8 + 8))
    source, target = torch.randn(moved // 8), torch.empty(moved // 8)
    ours = (F, x, coef) if part == "euler" else (F, x, coef, x_hat, noise)
    fn = {
        "tdkern": lambda: tdkern.heun_step(*ours, net_dtype=torch.float32),
        "eager": lambda: plain(*given, *coef.unbind(0)),
        "torch.compile": lambda: compiled(*given, *coef.unbind(0)),
        "copy": lambda: target.copy_(source),
    }[competitor]
    compare("heun_step", f"{part} {'x'.join(map(str, shape))}", competitor, fn, moved=moved)
