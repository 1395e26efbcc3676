"""A step of AdamEMA with two averages of a U-Net's parameters against torch's fused Adam with its
averages behind it.
"""

import pytest
import torch
from bench_ema_update import DECAYS, foreach
from measure import DEVICE
from unet import unet_elements, unet_shapes

from tdkern.optim import AdamEMA

FUSED = "Adam(fused=True) + 2 _foreach_lerp_"
CHECKED = "the same behind GradScaler's check"  # which looks at the gradients first, as ours does


@pytest.mark.parametrize(
    "competitor",
    [
        "tdkern",
        FUSED,
        CHECKED,
        "Adam(foreach=True) + 2 _foreach_lerp_",
        "negation in place",
        "copy",
    ],
)
def bench_adam_ema(compare, competitor):
    # Read the gradients; read and write the parameters, both moments and two averages. Ours reads
    # the gradients once more, to look at them first.
    moved = 11 * 4 * unet_elements()

    def make():
        torch.manual_seed(0)
        params = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in unet_shapes()]
        averages = [[torch.randn(shape, device=DEVICE) for shape in unet_shapes()] for _ in DECAYS]
        for param in params:
            param.grad = torch.randn_like(param)
        if competitor == "tdkern":
            return AdamEMA(params, 1e-4, averages=averages, decays=DECAYS).step
        optimizer = torch.optim.Adam(
            params, 1e-4, **{"fused" if competitor in (FUSED, CHECKED) else "foreach": True}
        )
        grads, one = [param.grad for param in params], torch.ones((), device=DEVICE)

        def step():
            if competitor == CHECKED:
                optimizer.found_inf = torch.zeros_like(one)
                torch._amp_foreach_non_finite_check_and_unscale_(grads, optimizer.found_inf, one)
            optimizer.step()
            foreach(averages, params)

        return step

    compare(
        "adam_ema_",
        f"{unet_elements() / 1e6:.0f} M parameters, K=2",
        competitor,
        make,
        moved=moved,
        seconds=2.0,
    )
