"""A whole training step of consistency training with TD against one without: the pair, both networks, the backward pass, Adam and the target.

CT runs the target network on x_t' anyway, and TD takes its output from there: what it adds is inside the loss kernel. The published code runs the
target network on that point once more. "slower than tdkern" of CT alone is the inverse of what TD costs.
"""
import pytest
import torch
from measure import DEVICE, TINY

from tdkern.ema import EMA
from tdkern.losses import CTLoss, TDCTLoss
from tdkern.networks import CTPrecond, SongUNet
from tdkern.optim import AdamEMA

BATCH, CHANNELS = (1, 8) if TINY else (8, 32)


@pytest.mark.parametrize("competitor", ["tdkern", "CT alone", "the target network twice"])
def bench_ct_step(compare, competitor):
    torch.manual_seed(0)
    net = CTPrecond(SongUNet(32, 3, 3, model_channels=CHANNELS, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[])).to(DEVICE)

    def make():
        loss, target = CTLoss() if competitor == "CT alone" else TDCTLoss(), EMA(net)
        optimizer = AdamEMA(net.parameters(), averages=[target.module.parameters()], decays=[0.95])
        images = torch.randn(BATCH, 3, 32, 32, device=DEVICE) / 2

        def step():
            optimizer.zero_grad()
            batch = loss.pair(images)
            if competitor == "the target network twice":
                with torch.no_grad():
                    target.module(batch.x_tp, batch.levels[:, 2])
            loss.evaluate(net, target.module, batch).loss.mean().backward()
            optimizer.step()

        return step

    # Read each parameter for three passes, write and read its gradient, read and write it, Adam's two states and the target.
    moved = (3 + 2 + 8) * 4 * sum(parameter.numel() for parameter in net.parameters())
    compare("ct_step", f"SongUNet {BATCH}x3x32x32", competitor, make, moved=moved, seconds=10.0, rotate=False)
