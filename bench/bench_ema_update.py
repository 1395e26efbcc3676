"""ema_update_ of two averages of a U-Net's parameters against what it replaces."""

import pytest
import torch
from measure import DEVICE
from unet import unet_elements, unet_shapes

import tdkern

DECAYS = [0.999, 0.9999]


@torch.no_grad()
def python_loop(averages, params, decays=DECAYS):
    """What EDM's training loop does for its one average."""
    for average, decay in zip(averages, decays, strict=True):
        for avg, param in zip(average, params, strict=True):
            avg.copy_(param.lerp(avg, decay))


@torch.no_grad()
def foreach(averages, params):
    for average, decay in zip(averages, DECAYS, strict=True):
        torch._foreach_lerp_(average, params, 1 - decay)


@pytest.mark.parametrize(
    "competitor", ["tdkern", "Python loop", "torch._foreach_lerp_", "negation in place", "copy"]
)
def bench_ema_update(compare, competitor):
    # Read the parameters; read and write two averages.
    moved = 5 * 4 * unet_elements()

    def make():
        torch.manual_seed(0)
        params = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in unet_shapes()]
        averages = [[torch.randn(shape, device=DEVICE) for shape in unet_shapes()] for _ in DECAYS]
        step = {
            "tdkern": lambda *lists: tdkern.ema_update_(*lists, DECAYS),
            "Python loop": python_loop,
            "torch._foreach_lerp_": foreach,
        }[competitor]
        return lambda: step(averages, params)

    compare(
        "ema_update_",
        f"{unet_elements() / 1e6:.0f} M parameters, K=2",
        competitor,
        make,
        moved=moved,
    )
