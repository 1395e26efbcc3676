"""A callback of Lightning that keeps a target network, and averages, for a LightningModule."""

from collections.abc import Callable

import lightning

from .targets import attach_target, attached_to, paper_decay

__all__ = ["TDCallback"]

Decay = float | Callable[[int], float]


class TDCallback(lightning.Callback):
    """Gives a LightningModule a target network, `self.target`, and averages, `self.averages`.

    As a fit begins they are made of the module's network, on its device, unless its optimizer has
    them from a fit before. Each step of its first optimizer moves them, accumulation and skipped
    steps considered. They are saved with that optimizer's state in every checkpoint that holds it,
    and a resumed fit goes on with them; they are no part of the module's own `state_dict`. For
    `loss_fn(self.net, self.target, x)` in `training_step`.

    Args:
        net: the attribute of the module that is the network.
        decay: of the target network, as `attach_target` takes it.
        averages: a decay for each name, such as {"ema": 0.9999}: then `self.averages["ema"]`.

    Raises:
        ValueError: an average is called "target".
    """

    def __init__(
        self, net: str = "net", decay: Decay = paper_decay, averages: dict[str, Decay] | None = None
    ):
        self.net = net
        self.decay = decay
        self.averages = averages or {}
        if "target" in self.averages:
            raise ValueError('TDCallback: averages must have other names than "target", got that')

    def on_fit_start(self, trainer, pl_module) -> None:
        """Make them, before a checkpoint's optimizer is loaded."""
        net, optimizer = getattr(pl_module, self.net), trainer.optimizers[0]
        found = attached_to(optimizer)
        for name, decay in {**self.averages, "target": self.decay}.items():
            if name not in found:
                attach_target(net, optimizer, decay=decay, name=name)
        # not as parts of the module, whose state dict is then the same with and without them
        object.__setattr__(pl_module, "target", found["target"])
        object.__setattr__(pl_module, "averages", {name: found[name] for name in self.averages})
