"""A training step of a small U-Net, from clean images to new weights, EDM's average of them and,
where there is one, the target network; beside it the networks' calls alone, which are the floor.

    pytest bench/bench_step.py -k 1-thread

All steps of a size are measured in turn, so that what else the machine does falls on all alike, and
ratios are medians over rounds; table.py holds them against what they should be. "published style"
is the same step as published loops write it: the loss as separate passes, the target network on the
valid samples alone, torch's Adam behind cleaned gradients, averages one parameter at a time.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_ema_update import python_loop
from bench_loss_path import clean_draw
from bench_network import make_plain
from measure import DEVICE, HALF, TINY, compiled, name, of_device
from published import cancelled

from tdkern.benchmark.published import td_edm_loss
from tdkern.columns import W_TD
from tdkern.ema import EMA
from tdkern.losses import EDMLoss, TDEDMLoss
from tdkern.networks import EDMPrecond, SongUNet
from tdkern.optim import AdamEMA

LR, DECAYS = 1e-4, (0.9999, 0.999)  # of the average and of the target network
SIGMA_DATA = 0.5


def fused_step(net, images, loss_fn, compile: bool = False):
    """tdkern's: the loss, and AdamEMA with the average and the target network."""
    averages = [EMA(net), EMA(net)] if isinstance(loss_fn, TDEDMLoss) else [EMA(net)]
    optimizer = AdamEMA(
        net.parameters(),
        LR,
        averages=[average.module.parameters() for average in averages],
        decays=DECAYS[: len(averages)],
    )
    called = [net, averages[-1].module]
    if compile:
        # without a compiler where it is only seen to run
        called = [compiled(each, backend="aot_eager" if TINY else "inductor") for each in called]
    scale = images[0].numel() / len(images)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_fn(*called, images, gradient_scale=scale).sum().backward()
        optimizer.step()

    return step


def loop_step(net, images, loss_of: Callable, update_target: Callable):
    """A loop as EDM's.

    Args:
        loss_of: (net, target, images, gradient_scale=) -> [B].
        update_target: (target, net) -> None.
    """
    target, average = EMA(net), EMA(net)
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, LR)
    scale = images[0].numel() / len(images)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_of(net, target.module, images, gradient_scale=scale).sum().backward()
        for param in params:
            torch.nan_to_num(param.grad, nan=0, posinf=1e5, neginf=-1e5, out=param.grad)
        optimizer.step()
        update_target(target, net)
        python_loop([list(average.module.parameters())], params, DECAYS[:1])

    return step


def by_a_loop(target, net):
    python_loop([list(target.module.parameters())], list(net.parameters()), DECAYS[1:])


def of_no_target(target, net):
    pass


def published_loss(net, target, images, gradient_scale, **settings):
    """The published TD loss on two denoisers, of which the target sees the valid samples alone."""
    return td_edm_loss(net, target, images, (), SIGMA_DATA, **settings) * gradient_scale


def compiled_loss():
    """The loss in its cancelled form, which gathers nothing, handed to torch.compile."""
    draw, loss = compiled(clean_draw), compiled(cancelled)

    def loss_of(net, target, images, gradient_scale):
        sigma = (1.2 * torch.randn(len(images), dtype=torch.float64, device=DEVICE) - 1.2).exp()
        x_t, x_tp, levels, *rest = draw(images, sigma, torch.ones_like(sigma))
        with torch.no_grad():
            F_p = target(x_tp, levels[:, 2], raw=True)
        terms = loss(net(x_t, levels[:, 0], raw=True), F_p, images, x_t, x_tp, *rest)
        return terms.sum(1) * gradient_scale

    return loss_of


def networks_alone(net, images, loss_fn):
    """The floor: the networks' calls of a step with a loss, and nothing between or behind them."""
    target, sigma = EMA(net).module, torch.ones(len(images), device=DEVICE)
    rows = rows_of_target(loss_fn, len(images))

    def step():
        net.zero_grad(set_to_none=True)
        if rows:
            with torch.no_grad():
                target(images[:rows], sigma[:rows])
        net(images, sigma).backward(images)

    return step


def rows_of_target(loss_fn, batch: int) -> int:
    """On how many samples of a batch a loss calls the target network, on average."""
    torch.manual_seed(0)
    pairs = loss_fn.pair(torch.zeros(4096, 1))
    if pairs.x_tp is None:
        return 0
    share = min((pairs.coef[:, W_TD] != 0).double().mean().item(), loss_fn.td_share)
    return max(1, round(share * batch))


# ---- one network, without TD and with it, and the same in the published style --------------------

SHAPE, CHANNELS = of_device(
    tiny=((2, 3, 8, 8), 8), cpu=((16, 3, 16, 16), 32), cuda=((256, 3, 32, 32), 64)
)
PLAIN, TD = EDMLoss(), TDEDMLoss(weight="online")
WINDOW = replace(TD, td_sigma=(0.3, 5.0))
WINDOW = replace(WINDOW, td_share=WINDOW.window_share(SHAPE[0]))
STEPS = {
    "EDM without TD": partial(fused_step, loss_fn=PLAIN),
    "tdkern": partial(fused_step, loss_fn=TD),
    "TD at .3<sigma<5, a share": partial(fused_step, loss_fn=WINDOW),
    "published-style eager": partial(loop_step, loss_of=published_loss, update_target=by_a_loop),
    "torch.compile": lambda *given: loop_step(*given, compiled_loss(), by_a_loop),
    "tdkern, --compile": partial(fused_step, loss_fn=TD, compile=True),
    "the networks alone, without TD": partial(networks_alone, loss_fn=PLAIN),
    "the networks alone, TD": partial(networks_alone, loss_fn=TD),
    "the networks alone, a share": partial(networks_alone, loss_fn=WINDOW),
}
IN_BFLOAT16 = ("EDM without TD", "tdkern", "TD at .3<sigma<5, a share", "tdkern, --compile")


def one_network(make: Callable, dtype: torch.dtype | None = None):
    """What makes a step of a network that is the same for all."""

    def made():
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
        net = EDMPrecond(model, dtype=dtype).to(DEVICE)
        return make(net, torch.randn(SHAPE, device=DEVICE) / 2)

    return made


def bench_step(in_turn):
    makes = {each: one_network(make) for each, make in STEPS.items()}
    if HALF:
        makes |= {f"{each}, bf16": one_network(STEPS[each], torch.bfloat16) for each in IN_BFLOAT16}
    in_turn("training step", name(SHAPE), makes)


# ---- the published run's own step: its settings, EDM's kind of network, the loops around it ------

SETTINGS = {"k_idx": 3.0, "one_idx": 0.2}
PUBLISHED = replace(TD, **SETTINGS)
RESOLUTIONS = (8,) if TINY else (16, 32)


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


WHOLE_STEPS = {
    "published style": lambda net, images: loop_step(
        Denoised(net), images, partial(published_loss, **SETTINGS), by_a_loop
    ),
    "tdkern, EDM's network": lambda net, images: loop_step(
        Denoised(net), images, PUBLISHED, lambda target, net: target.update(net, DECAYS[1])
    ),
    "tdkern, its network and AdamEMA": lambda net, images: fused_step(net, images, PUBLISHED),
    "EDM without TD": lambda net, images: loop_step(Denoised(net), images, PLAIN, of_no_target),
    "EDM's networks alone, TD": lambda net, images: networks_alone(
        Denoised(net), images, PUBLISHED
    ),
    "tdkern's networks alone, TD": lambda net, images: networks_alone(net, images, PUBLISHED),
}


def edms_size(make: Callable, resolution: int):
    """What makes a step of a network as EDM's, small."""

    def made():
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
        images = torch.randn(2 if TINY else 16, 3, resolution, resolution, device=DEVICE) / 2
        return make(EDMPrecond(model).to(DEVICE), images)

    return made


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def bench_whole_step(in_turn, resolution):
    makes = {each: edms_size(make, resolution) for each, make in WHOLE_STEPS.items()}
    in_turn("published training step", f"{resolution} pixels", makes)
