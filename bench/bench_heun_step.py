"""heun_step against what it replaces: preconditioning, step and the scaling of the next input as
passes of their own. State float64, network float32.
"""

import pytest
import torch
from measure import DEVICE, compiled, name, sizes

import tdkern

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


@pytest.mark.parametrize("shape", sizes((64, 3, 32, 32), (512, 3, 32, 32)), ids=name)
@pytest.mark.parametrize("part", ["euler", "correction"])
@pytest.mark.parametrize("competitor", ["tdkern", "eager", "torch.compile", "copy"])
def bench_heun_step(compare, shape, part, competitor):
    plain = euler if part == "euler" else correction
    fused = compiled(plain) if competitor == "torch.compile" else None
    # Read F, x and, in the correction, x_hat and noise; write x_next and net_input.
    moved = torch.Size(shape).numel() * ((4 + 8) + (8 + 4) + (0 if part == "euler" else 8 + 8))

    def make():
        torch.manual_seed(0)
        F = torch.randn(shape, device=DEVICE)
        coef = torch.tensor(COEF, dtype=torch.float64, device=DEVICE)
        x, x_hat, d, noise = torch.randn(4, *shape, dtype=torch.float64, device=DEVICE)
        given, ours = (F, x, x_hat, d, noise), (F, x, coef, x_hat, noise)
        if part == "euler":
            given, ours = (F, x), (F, x, coef)
        return {
            "tdkern": lambda: tdkern.heun_step(*ours, net_dtype=torch.float32),
            "eager": lambda: plain(*given, *coef.unbind(0)),
            "torch.compile": lambda: fused(*given, *coef.unbind(0)),
        }[competitor]

    compare("heun_step", f"{part} {name(shape)}", competitor, make, moved=moved)
