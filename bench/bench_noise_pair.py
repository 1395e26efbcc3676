"""noise_pair against two calls of randn and the arithmetic."""
import pytest
import torch
from torch import Tensor

import tdkern

SIZES = [(128, 3, 32, 32), (512, 3, 32, 32)]


def eager(x0: Tensor, alpha: Tensor, sigma: Tensor, alpha_p: Tensor, sigma_p: Tensor) -> tuple[Tensor, Tensor]:
    """The Markov pair in plain PyTorch: the numbers of each sample in float64, the elements in float32."""
    a = alpha / alpha_p
    s = (sigma**2 - (a * sigma_p) ** 2).clamp(min=0).sqrt()
    a, s, alpha_p, sigma_p = (value.to(x0.dtype).reshape(-1, 1, 1, 1) for value in (a, s, alpha_p, sigma_p))
    x_tp = alpha_p * x0 + sigma_p * torch.randn_like(x0)
    return a * x_tp + s * torch.randn_like(x0), x_tp


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("competitor", ["tdkern", "eager", "torch.compile", "copy"])
def bench_noise_pair(compare, shape, competitor):
    torch.manual_seed(0)
    x0, one = torch.randn(shape), torch.ones((), dtype=torch.float64).expand(shape[0])
    levels = tdkern.td_coef((1.2 * torch.randn(shape[0], dtype=torch.float64) - 1.2).exp())[1]
    args = (x0, one, levels[:, 0], one, levels[:, 2])
    compiled, source, target = torch.compile(eager), torch.randn(3, *shape), torch.empty(3, *shape)
    step = {
        "tdkern": lambda: tdkern.noise_pair(*args, seed=1, offset=2),
        "eager": lambda: eager(*args),
        "torch.compile": lambda: compiled(*args),
        "copy": lambda: target.view(-1)[: source.numel() // 2].copy_(source.view(-1)[: source.numel() // 2]),  # moves as much: half read, half written
    }[competitor]
    # Read x0; write x_t, x_tp.
    compare("noise_pair", "x".join(map(str, shape)), competitor, step, moved=3 * x0.numel() * x0.element_size())
