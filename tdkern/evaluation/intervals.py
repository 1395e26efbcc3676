"""How far the distances of `fid` and `features` can be trusted: intervals by bootstrap, and their
noise floor, which is what real images score against real images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .features import squared_mmd
from .fid import Statistics, frechet_distance

LEVEL = 0.95  # of the intervals
MOST_IMAGES = 10_000  # of each set, for kernel distances: pairs of them are looked at


class Interval(NamedTuple):
    """Where a number lies with a probability of LEVEL."""

    low: float
    high: float


class Floor(NamedTuple):
    """What real images score against other real images."""

    mean: float
    low: float  # LEVEL of the scores lie between
    high: float


def some_images(features: Tensor, seed: int = 0) -> Tensor:
    """The features [N, d] of at most MOST_IMAGES images, chosen by a seed, in their order."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(features), generator=generator)[:MOST_IMAGES]
    return features[kept.sort().values]


def frechet_interval(
    generated: Tensor, reference: Statistics, *, resamples: int, seed: int = 0
) -> Interval:
    """Where the Frechet distance of as many images to the reference lies on average.

    The generated images are resampled with replacement, the reference, by which methods are
    compared, is not. A resample has fewer different images and so lies further off, as few images
    do. The interval is therefore the distance plus quantiles of d* - mean d* of the resamples'
    distances d*: it is of what one finds on average with as many images, whose own bias the noise
    floor shows.

    Args:
        generated: [N, d], features of any real dtype; computed in float64.
        reference: of d features.
        resamples: how many, at least 2.
        seed: of the resamples.

    Raises:
        ValueError: there are fewer than 2 images, or another number of features.

    Deterministic. Close to the floor the interval is too wide rather than too narrow.
    """
    x = generated.double()
    value = frechet_distance(_statistics(x), reference)
    found = [
        frechet_distance(_statistics(x, weights), reference)
        for weights in _resampled(len(x), resamples, seed)
    ]
    return _around(value, found)


def kernel_interval(generated: Tensor, real: Tensor, *, resamples: int, seed: int = 0) -> Interval:
    """The same of `squared_mmd` of generated and real images.

    Args:
        generated, real: [N, d] and [M, d], features of any real dtype; computed in float64.
        resamples: how many, at least 2.
        seed: of the resamples.

    Deterministic. In a resample no image is compared with itself, so none lies further off.
    """
    weights = torch.stack(list(_resampled(len(generated), resamples, seed)))
    value = squared_mmd(generated, real).item()
    return _around(value, squared_mmd(generated, real, weights).tolist())


def frechet_floor(real: Tensor, count: int, *, splits: int, seed: int = 0) -> Floor:
    """Frechet distances of `count` real images, and of no more than half, to the other real ones.

    Args:
        real: [M, d], features of any real dtype; computed in float64.
        count: images that are scored; with half of M or more, halves are compared.
        splits: how many random ones, at least 2.
        seed: of the splits.

    Raises:
        ValueError: there are fewer than 4 images.

    Deterministic.
    """
    x = real.double()
    return _floor(
        [
            frechet_distance(_statistics(x[mask]), _statistics(x[~mask]))
            for mask in _split(len(x), count, splits, seed)
        ]
    )


def kernel_floor(real: Tensor, count: int, *, splits: int, seed: int = 0) -> Floor:
    """The same of `squared_mmd`, which is unbiased, so that the mean is about 0."""
    masks = torch.stack(list(_split(len(real), count, splits, seed))).double()
    return _floor(squared_mmd(real, real, masks, 1 - masks).tolist())


def _statistics(x: Tensor, weights: Tensor | None = None) -> Statistics:
    """Mean and covariance of features [N, d], of which each counts so many times."""
    u = torch.ones(len(x)).to(x) if weights is None else weights
    n = u.sum()
    mu = u @ x / n
    centred = x - mu
    sigma = (centred * u[:, None]).T @ centred / (n - 1)
    return Statistics(mu.numpy(), sigma.numpy())


def _resampled(count: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How many times each image is in a resample of as many: [count] float64."""
    if count < 2:
        raise ValueError(f"bootstrap: needs at least 2 images, got {count}")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        drawn = torch.randint(count, (count,), generator=generator)
        yield torch.bincount(drawn, minlength=count).double()


def _split(total: int, count: int, splits: int, seed: int) -> Iterator[Tensor]:
    """Random choices of `count` images, and of at most half: [total] bool."""
    if total < 4 or count < 2:
        raise ValueError(
            f"noise floor: needs at least 4 real images and 2 to score, got {total} and {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(splits):
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.randperm(total, generator=generator)[: min(count, total // 2)]] = True
        yield mask


def _quantiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def _around(value: float, found: list[float]) -> Interval:
    low, high = _quantiles(np.array(found) - np.mean(found))
    return Interval(value + low, value + high)


def _floor(scores: list[float]) -> Floor:
    return Floor(float(np.mean(scores)), *_quantiles(np.array(scores)))
