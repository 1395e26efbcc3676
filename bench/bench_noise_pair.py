"""noise_pair against two calls of randn and the arithmetic."""

import pytest
import torch
from measure import DEVICE, compiled, name, sizes
from torch import Tensor

import tdkern


def eager(
    x0: Tensor, alpha: Tensor, sigma: Tensor, alpha_p: Tensor, sigma_p: Tensor
) -> tuple[Tensor, Tensor]:
    """The Markov pair in plain PyTorch: the numbers of each sample in float64, the elements in
    float32.
    """
    a = alpha / alpha_p
    s = (sigma**2 - (a * sigma_p) ** 2).clamp(min=0).sqrt()
    a, s, alpha_p, sigma_p = (
        value.to(x0.dtype).reshape(-1, 1, 1, 1) for value in (a, s, alpha_p, sigma_p)
    )
    x_tp = alpha_p * x0 + sigma_p * torch.randn_like(x0)
    return a * x_tp + s * torch.randn_like(x0), x_tp


@pytest.mark.parametrize("shape", sizes((128, 3, 32, 32), (512, 3, 32, 32)), ids=name)
@pytest.mark.parametrize("competitor", ["tdkern", "eager", "torch.compile", "copy"])
def bench_noise_pair(compare, shape, competitor):
    fused = compiled(eager) if competitor == "torch.compile" else None
    # Read x0; write x_t, x_tp.
    moved = 3 * 4 * torch.Size(shape).numel()

    def make():
        torch.manual_seed(0)
        x0 = torch.randn(shape, device=DEVICE)
        one = torch.ones((), dtype=torch.float64, device=DEVICE).expand(shape[0])
        levels = tdkern.td_coef(
            (1.2 * torch.randn(shape[0], dtype=torch.float64) - 1.2).exp().to(DEVICE)
        )[1]
        args = (x0, one, levels[:, 0], one, levels[:, 2])
        return {
            "tdkern": lambda: tdkern.noise_pair(*args, seed=1, offset=2),
            "eager": lambda: eager(*args),
            "torch.compile": lambda: fused(*args),
        }[competitor]

    compare("noise_pair", name(shape), competitor, make, moved=moved)
