"""A training step of a small U-Net, from clean images to the new weights and their average, which
is the target network: without TD and with it.
"""

from dataclasses import replace

import pytest
import torch
from bench_ema_update import python_loop
from bench_loss_path import clean_draw, published_draw
from measure import DEVICE, TINY, compiled, name
from published import cancelled, eager_td_edm

from tdkern.ema import EMA
from tdkern.losses import EDMLoss, TDEDMLoss
from tdkern.networks import EDMPrecond, SongUNet
from tdkern.optim import AdamEMA

SHAPE, CHANNELS = (
    ((2, 3, 8, 8), 8)
    if TINY
    else ((16, 3, 16, 16), 32)
    if DEVICE == "cpu"
    else ((256, 3, 32, 32), 64)
)


def tdkern_step(net, target, images, loss_fn):
    optimizer = AdamEMA(net.parameters(), 1e-4, averages=[target.parameters()], decays=[0.999])

    def step():
        optimizer.zero_grad()
        loss_fn(net, target, images).mean().backward()
        optimizer.step()

    return step


def other_step(net, target, images, draw, loss_fn):
    """Draws by draw(x0, sigma, one) -> (x_t, x_tp, levels, what the loss takes besides)."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    one = torch.ones(len(images), dtype=torch.float64, device=DEVICE)

    def step():
        optimizer.zero_grad()
        sigma = (1.2 * torch.randn(len(images), dtype=torch.float64, device=DEVICE) - 1.2).exp()
        x_t, x_tp, levels, *rest = draw(images, sigma, one)
        with torch.no_grad():
            F_p = target(x_tp, levels[:, 2], raw=True)
        loss_fn(net(x_t, levels[:, 0], raw=True), F_p, images, x_t, x_tp, *rest).flatten(1).sum(
            1
        ).mean().backward()
        optimizer.step()
        python_loop([list(target.parameters())], list(net.parameters()), [0.999])

    return step


WINDOW = TDEDMLoss(weight="online", td_sigma=(0.3, 5.0))
WINDOW = replace(WINDOW, td_share=WINDOW.window_share(SHAPE[0]))


@pytest.mark.parametrize(
    "competitor",
    [
        "tdkern",
        "EDM without TD",
        "TD at .3<sigma<5, a share",
        "the same, bfloat16 target",
        "published-style eager",
        "torch.compile",
    ],
)
def bench_step(compare, competitor):
    fused = (
        {fn: compiled(fn) for fn in (clean_draw, cancelled)}
        if competitor == "torch.compile"
        else {}
    )

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
        net = EDMPrecond(model).to(DEVICE)
        target = EMA(net).module
        target.dtype = torch.bfloat16 if competitor == "the same, bfloat16 target" else None
        given = net, target, torch.randn(SHAPE, device=DEVICE) / 2
        return {
            "tdkern": lambda: tdkern_step(*given, TDEDMLoss(weight="online")),
            "EDM without TD": lambda: tdkern_step(*given, EDMLoss()),
            "TD at .3<sigma<5, a share": lambda: tdkern_step(*given, WINDOW),
            "the same, bfloat16 target": lambda: tdkern_step(*given, WINDOW),
            "published-style eager": lambda: other_step(
                *given, published_draw, lambda *args: eager_td_edm(*args)[:, None]
            ),
            "torch.compile": lambda: other_step(*given, fused[clean_draw], fused[cancelled]),
        }[competitor]()

    compare("training step", name(SHAPE), competitor, make, moved=None, seconds=2.0, rotate=False)
