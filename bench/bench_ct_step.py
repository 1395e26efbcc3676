"""A training step of consistency training, from clean images to the new weights and the target:
without TD and with it.

CT runs the target network on x_t' anyway, and TD takes its output from there: what it adds lies
inside the loss kernel. The published code runs the target network on that point once more.
"""

import pytest
import torch
from measure import DEVICE, name, of_device

from tdkern.ema import EMA
from tdkern.losses import CTLoss, TDCTLoss
from tdkern.networks import CTPrecond, SongUNet
from tdkern.optim import AdamEMA

SHAPE, CHANNELS = of_device(
    tiny=((2, 3, 8, 8), 8), cpu=((16, 3, 16, 16), 32), cuda=((256, 3, 32, 32), 64)
)


@pytest.mark.parametrize("competitor", ["tdkern", "CT without TD", "target network twice"])
def bench_ct_step(compare, competitor):
    loss_fn = CTLoss() if competitor == "CT without TD" else TDCTLoss()

    def make():
        torch.manual_seed(0)
        model = SongUNet(
            SHAPE[-1],
            3,
            3,
            model_channels=CHANNELS,
            channel_mult=[1, 2],
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
        )
        net, images = CTPrecond(model).to(DEVICE), torch.randn(SHAPE, device=DEVICE) / 2
        target = EMA(net).module
        optimizer = AdamEMA(net.parameters(), 1e-4, averages=[target.parameters()], decays=[0.95])

        def step():
            optimizer.zero_grad()
            batch = loss_fn.pair(images)
            if competitor == "target network twice":
                with torch.no_grad():
                    target(batch.x_tp, batch.levels[:, 2])
            loss_fn.evaluate(net, target, batch).loss.mean().backward()
            optimizer.step()

        return step

    compare(
        "CT training step", name(SHAPE), competitor, make, moved=None, seconds=2.0, rotate=False
    )
