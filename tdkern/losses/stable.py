"""The stable target field: an estimate of the posterior mean in the place of the clean data."""

import torch
from torch import Tensor

from ..columns import SIGMA, SIGMA_P
from .base import TDBatch


@torch.no_grad()
def stable_target(
    batch: TDBatch,
    reference: Tensor,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> TDBatch:
    """The stable target field (arXiv 2302.00670): x0 becomes an estimate of E[x0 | x_t].

    With y_j over the batch's own x0 and the reference together,

    x0 <- sum_j softmax_j(-|x_t - y_j|^2 / (2 sigma^2)) y_j,

    the posterior mean under the empirical distribution of the y. With the base loss it is the
    target. Of a TD term it is in the true mean at t, and the same estimate at x_t', in the batch's
    `x0_p`, in the true mean at t': A (x0 - D) - A' (x0_p - D'). One estimate for both would raise
    the term's variance, as x0 and D' at x_t' err alike.

    Args:
        batch: of `loss.pair`; not of consistency training with its target network.
        reference: [n, ...] as x0, further clean data; the paper's reference batch is both together.
        labels, reference_labels: [B, classes] and [n, classes], one-hot, or [B] and [n] int64, the
            classes' indices; with them the y_j of other classes have no weight.

    Returns:
        The batch with another x0, and x0_p where it has an x_t'. No gradient. Deterministic.
    """
    y = torch.cat([batch.x0, reference]).flatten(1).double()
    other = None
    if labels is not None and reference_labels is not None:
        other = _of_other_classes(labels, torch.cat([labels, reference_labels]))

    def estimate(x: Tensor, sigma: Tensor) -> Tensor:
        logits = (x.flatten(1).double() @ y.T - y.square().sum(1) / 2) / sigma[:, None] ** 2
        if other is not None:
            logits = logits.masked_fill(other, -torch.inf)
        return (logits.softmax(1) @ y).to(x.dtype).view_as(x)

    x0_p = None if batch.x_tp is None else estimate(batch.x_tp, batch.levels[:, SIGMA_P])
    return batch._replace(x0=estimate(batch.x_t, batch.levels[:, SIGMA]), x0_p=x0_p)


def _of_other_classes(labels: Tensor, others: Tensor) -> Tensor:
    """Whether the class of a label is another than that of one of others, [B, n] bool."""
    if labels.ndim == 1:
        return labels[:, None] != others
    return labels @ others.mT == 0
