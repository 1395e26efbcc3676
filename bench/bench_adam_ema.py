"""A step of AdamEMA with two averages of a U-Net's parameters against torch's fused Adam with its averages behind it."""
import pytest
import torch
from bench_ema_update import DECAYS, foreach
from unet import unet_elements, unet_shapes

from tdkern.optim import AdamEMA


@pytest.mark.parametrize("competitor", ["tdkern", "Adam(fused=True) + 2 _foreach_lerp_", "Adam(foreach=True) + 2 _foreach_lerp_", "copy"])
def bench_adam_ema(compare, competitor):
    torch.manual_seed(0)
    params = [torch.randn(shape, requires_grad=True) for shape in unet_shapes()]
    averages = [[torch.randn(shape) for shape in unet_shapes()] for _ in DECAYS]
    for param in params:
        param.grad = torch.randn_like(param)
    if competitor == "tdkern":
        step = AdamEMA(params, 1e-4, averages=averages, decays=DECAYS).step
    elif competitor == "copy":  # the floor: a copy that moves as much
        source, target = torch.randn(unet_elements() * 11 // 2), torch.empty(unet_elements() * 11 // 2)
        step = lambda: target.copy_(source)  # noqa: E731
    else:
        optimizer = torch.optim.Adam(params, 1e-4, **{"fused" if "fused" in competitor else "foreach": True})

        def step():
            optimizer.step()
            foreach(averages, params)

    # Read the gradients; read and write the parameters, both moments and two averages. Ours reads the gradients once more, to look at them first.
    compare("adam_ema_", "50 M parameters, K=2", competitor, step, moved=11 * 4 * unet_elements(), seconds=2.0)
