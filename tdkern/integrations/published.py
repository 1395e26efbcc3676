"""The published TD+EDM run (arXiv 2606.15048) as its command and its code have it, in one preset.

They differ from the paper's text, which this package follows elsewhere: the TD term's weight
is that of the online network's error alone, k_idx is 3 and one_idx 0.2, the target network's decay
is 0.999 from the first step on, and the gradient is numel x batch times smaller than EDM's, near
Adam's eps of 1e-8. The learning rate of the command is 2e-4.
"""

from typing import Any

from torch import Tensor

from ..losses import TDEDMLoss
from . import edm

SETTINGS: dict[str, Any] = {"lambda_base": 0.5, "k_idx": 3.0, "one_idx": 0.2, "weight": "online"}
TARGET_DECAY = 0.999  # at every step
LEARNING_RATE = 2e-4

__all__ = ["LEARNING_RATE", "SETTINGS", "TARGET_DECAY", "TDLoss", "published_loss"]


class TDLoss(edm.TDLoss):
    """`edm.TDLoss` with the published settings and the published gradient.

    The loss is one number, the mean over samples and elements; the loop's own
    `loss.sum().mul(loss_scaling / batch_gpu_total)` divides it by the batch once more.

    Args:
        changes: of `losses.TDEDMLoss`, in place of the published settings.
    """

    def __init__(self, **changes):
        super().__init__(decay=TARGET_DECAY, **SETTINGS | changes)

    def __call__(
        self, net, images: Tensor, labels: Tensor | None = None, augment_pipe=None
    ) -> Tensor:
        """The loss, without dimensions."""
        return self.per_sample(net, images, labels, augment_pipe).mean()


def published_loss(**changes) -> TDEDMLoss:
    """The loss of the published run, per sample, for a loop that has a target of its own:
    `loss_fn(net, target_net, images, labels, augment_pipe)`.

    The published gradient is that of its `mean()`, divided by the batch once more.
    """
    return TDEDMLoss(**SETTINGS | changes)
