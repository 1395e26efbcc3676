"""A training step of a small U-Net, from clean images to the new weights and their average, which
is the target network: without TD and with it.

    python bench/bench_step.py [ROUNDS]   # the published style beside ours, in turn, in one thread
"""

import statistics
import sys
import time
from dataclasses import replace

import pytest
import torch
from bench_ema_update import python_loop
from bench_loss_path import clean_draw, published_draw
from bench_network import make_plain
from bench_noise_pair import eager as pair
from measure import DEVICE, TINY, compiled, name, of_device
from published import cancelled, eager_td_edm

from tdkern.benchmark.published import td_edm_terms, td_levels
from tdkern.ema import EMA
from tdkern.losses import EDMLoss, TDEDMLoss
from tdkern.networks import EDMPrecond, SongUNet
from tdkern.optim import AdamEMA

SHAPE, CHANNELS = of_device(
    tiny=((2, 3, 8, 8), 8), cpu=((16, 3, 16, 16), 32), cuda=((256, 3, 32, 32), 64)
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


# ---- the published run's own step: its settings, EDM's kind of network, the loops around it ----

SETTINGS = {"k_idx": 3.0, "one_idx": 0.2}
RESOLUTIONS = (8,) if TINY else (16, 32)
WHOLE_STEP = [
    "published style",
    "tdkern, EDM's network",
    "tdkern, its network and AdamEMA",
    "EDM without TD",
]


class Denoised(torch.nn.Module):
    """A network of EDM's kind: it gives the denoised image and nothing else, and is the obvious
    build (`bench_network`).
    """

    def __init__(self, net):
        super().__init__()
        make_plain(net)
        self.net = net

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return self.net(x, sigma, class_labels, augment_labels)


def published_loss(net, target, images):
    """The published TD loss on two denoisers, of which the target sees the valid samples alone."""
    sigma = (1.2 * torch.randn(len(images), dtype=torch.float64, device=DEVICE) - 1.2).exp()
    one = torch.ones_like(sigma)
    levels, valid = td_levels(sigma, **SETTINGS)
    x_t, x_tp = pair(images, one, levels[:, 0], one, levels[:, 2])

    def denoise_p(x):
        return target(x, levels[valid, 2].float())

    denoised = net(x_t, levels[:, 0].float())
    return td_edm_terms(denoised, denoise_p, images, x_t, x_tp, levels, valid)


def whole_step(competitor: str, resolution: int):
    """The step of a loop with a target network and EDM's own average of the weights."""
    torch.manual_seed(0)
    model = SongUNet(
        resolution,
        3,
        3,
        model_channels=4 if TINY else 16,
        channel_mult=[1, 2],
        num_blocks=1 if TINY else 4,
        attn_resolutions=[16],
        dropout=0.13,
    )
    net = EDMPrecond(model).to(DEVICE)
    images = torch.randn(2 if TINY else 16, 3, resolution, resolution, device=DEVICE) / 2
    loss_fn = EDMLoss() if "EDM without" in competitor else TDEDMLoss(weight="online", **SETTINGS)
    scale = images[0].numel() / len(images)
    own = competitor == "tdkern, its network and AdamEMA"
    net = net if own else Denoised(net)
    target, average = EMA(net), EMA(net)
    params = list(net.parameters())
    if own:
        averages = [each.module.parameters() for each in (target, average)]
        optimizer = AdamEMA(params, 1e-4, averages=averages, decays=[0.999, 0.9999])
    else:
        optimizer = torch.optim.Adam(params, 1e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        if competitor == "published style":
            loss = published_loss(net, target.module, images) * scale
        else:
            loss = loss_fn(net, target, images, gradient_scale=scale)
        loss.sum().backward()
        if not own:  # EDM's loop; AdamEMA leaves out a step that is not finite
            for param in params:
                torch.nan_to_num(param.grad, nan=0, posinf=1e5, neginf=-1e5, out=param.grad)
        optimizer.step()
        if own:
            return
        if competitor == "published style":
            python_loop([list(target.module.parameters())], params, [0.999])
        elif "EDM without" not in competitor:
            target.update(net, 0.999)
        python_loop([list(average.module.parameters())], params, [0.9999])

    return step


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("competitor", WHOLE_STEP)
def bench_whole_step(compare, competitor, resolution):
    compare(
        "published training step",
        f"{resolution} pixels",
        competitor,
        lambda: whole_step(competitor, resolution),
        moved=None,
        seconds=4.0,
        rotate=False,
    )


def in_turn(rounds: int) -> None:
    """Prints every competitor's time beside the published style's, their steps taken in turn: what
    else the machine does then falls on all alike. The ratio is the median over rounds.
    """
    torch.set_num_threads(1)
    torch.ones(31 * 2**18)  # glibc then keeps what is freed, as conftest says
    for resolution in RESOLUTIONS:
        steps = {each: whole_step(each, resolution) for each in WHOLE_STEP}
        times = {each: [] for each in WHOLE_STEP}
        for number in range(rounds + 2):
            for each in WHOLE_STEP if number % 2 else reversed(WHOLE_STEP):
                torch.manual_seed(number)  # of as many valid samples for all
                start = time.process_time()
                steps[each]()
                if number >= 2:
                    times[each].append(time.process_time() - start)
        published = times["published style"]
        for each, its in times.items():
            ratio = statistics.median(a / b for a, b in zip(its, published, strict=True))
            print(
                f"{resolution} pixels, {each}: {statistics.median(its) * 1e3:.0f} ms, {ratio:.3f}"
            )


if __name__ == "__main__":
    in_turn(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
