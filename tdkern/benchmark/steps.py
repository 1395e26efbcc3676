"""The training steps that are compared, from clean images to new weights and their average."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..ema import EMA
from ..losses import TDEDMLoss
from ..networks.precond import Preconditioned
from ..optim import AdamEMA
from ..preconditioning import unwrapped
from .clock import AVERAGES, BACKWARD, LOSS, OPTIMIZER, Clock
from .published import edm_loss, td_edm_loss, update_average

LR, DECAY = 1e-4, 0.999
WINDOW = (0.3, 5.0)  # the noise levels of the TD term where it has a share of the batch
COMPILED = "torch.compile"
Step = Callable[[Clock], None]


@dataclass(frozen=True)
class Setting:
    """What every step is given.

    Args:
        net: as `net(x, sigma) -> D`, or `net(x, sigma, class_labels) -> D` where labels are given.
        target: its average, which is the target network.
        images: [B, ...] float32.
        labels: [B, classes] one-hot, or nothing.
    """

    net: nn.Module
    target: EMA
    images: Tensor
    labels: tuple[Tensor, ...] = ()

    @property
    def sigma_data(self) -> float:
        return getattr(unwrapped(self.net), "sigma_data", 0.5)


def steps_of(setting: Setting) -> dict[str, Callable[[], Step]]:
    """What makes each step, by its name; the first is what the others are compared with.

    All train the same network, so that it is in memory once. "tdkern" has Adam and the average as a
    loop would have them; each of those behind it changes what its name says.
    """
    loss = TDEDMLoss(sigma_data=setting.sigma_data, weight="online")
    window = replace(loss, td_sigma=WINDOW)
    window = replace(window, td_share=window.window_share(len(setting.images)))
    shared = f"TD at {WINDOW[0]:g} < sigma < {WINDOW[1]:g}"
    return {
        "without TD": lambda: _plain(setting, td=False),
        "published style": lambda: _plain(setting, td=True),
        "tdkern": lambda: _ours(setting, loss),
        "AdamEMA": lambda: _ours(setting, loss, adam_ema=True),
        shared: lambda: _ours(setting, window),
        "bfloat16 target": lambda: _ours(setting, loss, half=("target",)),
        "bfloat16 networks": lambda: _ours(setting, loss, half=("net", "target")),
        COMPILED: lambda: _ours(setting, loss, compiled=True),
        "AdamEMA, window, bfloat16 target": lambda: _ours(
            setting, window, adam_ema=True, half=("target",)
        ),
    }


def _step(net, target, optimizer, loss_of: Callable[[], Tensor], average: Callable[[], None]):
    def step(clock: Clock) -> None:
        optimizer.zero_grad()
        clock.mark(OPTIMIZER)
        with clock.watching(net, target):
            loss = loss_of()
        clock.mark(LOSS)
        loss.backward()
        clock.mark(BACKWARD)
        optimizer.step()
        clock.mark(OPTIMIZER)
        average()
        clock.mark(AVERAGES)

    return step


def _plain(setting: Setting, td: bool) -> Step:
    net = setting.net
    target = setting.target.module
    images = setting.images
    given = (images, setting.labels, setting.sigma_data)
    elements = images[0].numel()

    def loss_of() -> Tensor:
        terms = td_edm_loss(net, target, *given) if td else edm_loss(net, *given)
        return terms.mean() * elements

    def average() -> None:
        update_average(target, net, DECAY)

    return _step(net, target, torch.optim.Adam(net.parameters(), LR), loss_of, average)


def _ours(
    setting: Setting,
    loss: TDEDMLoss,
    *,
    adam_ema: bool = False,
    half: tuple[str, ...] = (),
    compiled: bool = False,
) -> Step:
    ema, images = setting.target, setting.images
    net: nn.Module | Callable = setting.net
    target: nn.Module | Callable = ema.module
    if compiled:
        net, target = torch.compile(net), torch.compile(target)
    scale = images[0].numel() / len(images)
    networks = {"net": net, "target": target}

    def loss_of() -> Tensor:
        with _in_bfloat16([networks[name] for name in half]) as calls:
            called = {name: calls.get(module, module) for name, module in networks.items()}
            terms = loss(
                called["net"], called["target"], images, *setting.labels, gradient_scale=scale
            )
        return terms.sum()

    if adam_ema:
        fused = AdamEMA(
            setting.net.parameters(), LR, averages=[ema.module.parameters()], decays=[DECAY]
        )
        return _step(net, target, fused, loss_of, lambda: ema.copy_buffers(setting.net))
    optimizer = torch.optim.Adam(setting.net.parameters(), LR)
    return _step(net, target, optimizer, loss_of, lambda: ema.update(setting.net, DECAY))


@contextmanager
def _in_bfloat16(modules: list):
    """What to call in place of networks so that they compute in bfloat16, by the network.

    Ours do so by their `dtype`, and stay what they are; others under autocast.
    """
    own = [unwrapped(module) for module in modules]
    own = [module for module in own if isinstance(module, Preconditioned)]
    before = [module.dtype for module in own]
    for module in own:
        module.dtype = torch.bfloat16
    try:
        others = [module for module in modules if unwrapped(module) not in own]
        yield {module: _Autocast(module) for module in others}
    finally:
        for module, dtype in zip(own, before, strict=True):
            module.dtype = dtype


class _Autocast(nn.Module):
    """A network under autocast, whose answer is float32."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x, *args, **kwargs).to(x.dtype)
