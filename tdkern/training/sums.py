"""What a step adds to a tick's statistics: sums on the device, which nothing waits for.

One tensor holds all of them, so that a state in the middle of a tick keeps them as one:

    terms        TDTerms, 4: summed over the samples
    norm         2: the sum of the gradient's norms, and how many were finite
    levels       LEVELS x 5: samples, and their TDTerms, by noise level
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import TDTerms

TERMS, NORM = len(TDTerms._fields), 2
LOWEST, DECADES, IN_A_DECADE = -3, 6, 4  # noise levels from 1e-3 to 1e3; beyond, the outermost
LEVELS = DECADES * IN_A_DECADE
SIZE = TERMS + NORM + LEVELS * (1 + TERMS)


class Sums(NamedTuple):
    """The parts of a tensor of sums [SIZE], in its memory."""

    terms: Tensor  # [4]
    norm: Tensor  # [2]
    levels: Tensor  # [LEVELS, 5]

    @classmethod
    def of(cls, sums: Tensor) -> "Sums":
        """Those of `sums`."""
        terms, norm, levels = sums.split([TERMS, NORM, LEVELS * (1 + TERMS)])
        return cls(terms, norm, levels.view(LEVELS, 1 + TERMS))


def middles() -> list[float]:
    """The noise level in the middle of each row of `Sums.levels`."""
    return [10 ** (LOWEST + (i + 0.5) / IN_A_DECADE) for i in range(LEVELS)]


def of_samples(terms: TDTerms, sigma: Tensor, scale: float) -> Tensor:
    """[SIZE] float64, the sums over samples.

    Args:
        terms: of the samples, [B] each.
        sigma: [B] float64, their noise levels.
        scale: by what loss, td and base are divided: they are reported as means over elements.

    Deterministic, no host wait.
    """
    sums = torch.zeros(SIZE, dtype=torch.float64, device=sigma.device)
    parts = Sums.of(sums)
    values = torch.stack([term.detach().double() for term in terms])  # [4, B]
    parts.terms.copy_(torch.stack([value.sum() for value in values]))
    row = ((sigma.log10() - LOWEST) * IN_A_DECADE).clamp(0, LEVELS - 1).long()
    own = row == torch.arange(LEVELS, device=sigma.device)[:, None]  # [LEVELS, B]
    counted = torch.cat([torch.ones_like(values[:1]), values])  # [5, B]
    # not a product: a term that is not finite belongs to its own level alone
    parts.levels.copy_(counted.where(own[:, None], 0).sum(2))
    for part in (parts.terms[:3], parts.levels[:, 1:4]):
        part /= scale
    return sums


def add_norm(sums: Tensor, norm: Tensor) -> None:
    """Add a gradient's norm, [], where it is finite."""
    finite = norm.isfinite()
    added = torch.stack([norm.where(finite, 0).double(), finite.double()])
    Sums.of(sums).norm.add_(added)
