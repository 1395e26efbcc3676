"""A callback of Lightning that keeps a target network, and averages, for a LightningModule."""

from collections.abc import Callable

import lightning

from .targets import attach_target, paper_decay

__all__ = ["TDCallback"]

Decay = float | Callable[[int], float]


class TDCallback(lightning.Callback):
    """Gives a LightningModule a target network, `self.target`, and averages, `self.averages`.

    As a fit begins they are made of the module's network, on its device. Each step of its first
    optimizer moves them, accumulation and skipped steps considered. They are saved with that
    optimizer's state in every checkpoint that holds it, and a resumed fit goes on with them; they
    are no part of the module's own `state_dict`. For `loss_fn(self.net, self.target, x)` in
    `training_step`.

    Args:
        net: the attribute of the module that is the network.
        decay: of the target network, as `attach_target` takes it.
        averages: a decay for each name, such as {"ema": 0.9999}: then `self.averages["ema"]`.
    """

    def __init__(
        self, net: str = "net", decay: Decay = paper_decay, averages: dict[str, Decay] | None = None
    ):
        self.net = net
        self.decay = decay
        self.averages = averages or {}

    def on_fit_start(self, trainer, pl_module) -> None:
        """Make them, before a checkpoint's optimizer is loaded."""
        net, optimizer = getattr(pl_module, self.net), trainer.optimizers[0]
        averages = {
            name: attach_target(net, optimizer, decay=decay, name=name)
            for name, decay in self.averages.items()
        }
        # not as parts of the module, whose state dict is then the same with and without them
        object.__setattr__(pl_module, "target", attach_target(net, optimizer, decay=self.decay))
        object.__setattr__(pl_module, "averages", averages)
