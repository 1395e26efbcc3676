"""The code of docs/losses.md, as it stands there."""

import re

import torch

from helpers import ROOT
from tdkern.ema import EMA
from tdkern.losses import TDEDMLoss
from tdkern.networks import EDMPrecond, SongUNet


def test_every_block_runs():
    unet = SongUNet(8, 3, 3, 4, 9, model_channels=4, channel_mult=[1], num_blocks=1)
    net = EDMPrecond(unet)
    names = {
        "torch": torch,
        "net": net,
        "target": EMA(net),
        "images": torch.randn(4, 3, 8, 8),
        "labels": torch.tensor([0, 1, 2, 3]),
        "loss_fn": TDEDMLoss(),
        "augment_pipe": lambda images: (images, torch.zeros(4, 9)),
        "conditions": {},
        "scale": 1.0,
        "loss_scaling": 2.0,
        "batch_gpu_total": 4,
        "device": "cpu",
        "step": 30_000,
        "reference": torch.randn(16, 3, 8, 8),
        "reference_labels": torch.arange(4).repeat(4),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/losses.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
        assert names["loss"].shape == (4,) and names["loss"].isfinite().all()
    assert names["easy"].at(names["step"]).num_scales.ratio == 4
    assert all(each.grad.isfinite().all() for each in net.parameters() if each.grad is not None)
