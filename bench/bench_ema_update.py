"""ema_update_ of two averages of a U-Net's parameters against what it replaces."""
import pytest
import torch
from unet import unet_elements, unet_shapes

import tdkern

DECAYS = [0.999, 0.9999]


@torch.no_grad()
def python_loop(averages, params):
    """What EDM's training loop does for its one average."""
    for average, decay in zip(averages, DECAYS, strict=True):
        for avg, param in zip(average, params, strict=True):
            avg.copy_(param.lerp(avg, decay))


@torch.no_grad()
def foreach(averages, params):
    for average, decay in zip(averages, DECAYS, strict=True):
        torch._foreach_lerp_(average, params, 1 - decay)


@pytest.mark.parametrize("competitor", ["tdkern", "Python loop", "torch._foreach_lerp_", "copy"])
def bench_ema_update(compare, competitor):
    torch.manual_seed(0)
    params = [torch.randn(shape, requires_grad=True) for shape in unet_shapes()]
    averages = [[torch.randn(shape) for shape in unet_shapes()] for _ in DECAYS]
    step = {"tdkern": lambda: tdkern.ema_update_(averages, params, DECAYS), "Python loop": lambda: python_loop(averages, params),
            "torch._foreach_lerp_": lambda: foreach(averages, params)}.get(competitor)
    if step is None:  # the floor: a copy that moves as much
        source, target = torch.randn(unet_elements() * 5 // 2), torch.empty(unet_elements() * 5 // 2)
        step = lambda: target.copy_(source)  # noqa: E731
    # Read the parameters; read and write two averages.
    compare("ema_update_", "50 M parameters, K=2", competitor, step, moved=5 * 4 * unet_elements())
