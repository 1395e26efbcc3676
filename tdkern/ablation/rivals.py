"""What else lowers the variance of training, or of its result; each goes with and without TD.

A larger batch is the first of them, and needs no code: a run's batch times a factor.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ema import PowerFunctionEMA
from ..losses import TDBatch

# relative widths of power-function averages, about a factor of 1.4 apart
WIDTHS = (0.02, 0.03, 0.04, 0.06, 0.085, 0.12, 0.17, 0.24)


@torch.no_grad()
def stable_target(
    batch: TDBatch,
    reference: Tensor,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> TDBatch:
    """The stable target field (arXiv 2302.00670): x0 becomes an estimate of E[x0 | x_t].

    With y_j over the batch's own x0 and the reference together,

    x0_j <- sum_j softmax_j(-|x_t - y_j|^2 / (2 sigma^2)) y_j,

    the posterior mean under the empirical distribution of the y. With the base loss it is the
    target; in a TD term both true means A x0 + kappa x are made of it. On a Markov path that leaves
    the TD target its mean: there D' at x_t' estimates E[x0 | x_t'], of which x_t adds nothing.

    Args:
        batch: of `loss.pair`, in EDM's state, x_t = x0 + sigma noise.
        reference: [n, ...] as x0, further clean data; the paper's reference batch is both together.
        labels, reference_labels: [B, classes] and [n, classes], one-hot; with them the y_j of other
            classes have no weight.

    Returns:
        The batch with another x0. No gradient. Deterministic.
    """
    y = torch.cat([batch.x0, reference]).flatten(1).double()
    logits = batch.x_t.flatten(1).double() @ y.T - y.square().sum(1) / 2
    logits = logits / batch.sigma.double()[:, None] ** 2
    if labels is not None and reference_labels is not None:
        same = labels @ torch.cat([labels, reference_labels]).T
        logits = logits.masked_fill(same == 0, -torch.inf)
    return batch._replace(x0=(logits.softmax(1) @ y).to(batch.x0.dtype).view_as(batch.x0))


def best_width(
    averages: PowerFunctionEMA, score: Callable[[nn.Module], float]
) -> tuple[float, nn.Module]:
    """Of EDM2's power-function averages the one of the least score: its width and its network.

    Args:
        averages: such as `PowerFunctionEMA(net, WIDTHS)`, after training.
        score: of a network, less being better, on other draws than the ones that are reported.
    """
    networks = {width: average.module for width, average in averages.averages.items()}
    width = min(networks, key=lambda width: score(networks[width]))
    return width, networks[width]
