"""Distances of two sets of images by their single features, where FID has their moments alone.

KID, precision and recall, density and coverage.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 24  # distances at once


def gathered(features: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The features of every process, those of the first process first.

    Args:
        features: [B, d], this process's; B may differ, and may be 0.
        device: the process group's, such as its GPU with NCCL.

    Returns:
        [N, d] float32 on the CPU, the same on every process.
    """
    if not dist.is_initialized():
        return features.float().cpu()
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(features))
    padded = torch.zeros(max(counts), features.shape[1], device=device)
    padded[: len(features)] = features
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    parts = [theirs[:count].cpu() for theirs, count in zip(everyone, counts, strict=True)]
    return torch.cat(parts)


class KernelDistance(NamedTuple):
    """KID over subsets."""

    mean: float
    std: float  # of the subsets' estimates


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """Kernel inception distance (arXiv 1801.01401): the squared maximum mean discrepancy.

    With k(a, b) = (a.b / d + 1)^3, and x of one set and y of the other,

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),

    which is unbiased, so it may be below 0, and does not depend on the number of images. The
    default subsets are those of torch-fidelity.

    Args:
        generated, real: [N, d] and [M, d], features of any real dtype; computed in float64.
        subsets: how many pairs of random subsets are averaged, at least 1.
        subset_size: features in each, at least 2; no more are taken than there are.
        seed: of the subsets.

    Raises:
        ValueError: an argument is not as said.

    Deterministic.
    """
    _check("kernel_distance", generated, real, least=2)
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            "kernel_distance: subsets must be at least 1 and subset_size at least 2, got "
            f"{subsets} and {subset_size}"
        )
    size, random = min(subset_size, len(generated), len(real)), np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (
            each[torch.from_numpy(random.choice(len(each), size, replace=False))]
            for each in (generated, real)
        )
        estimates.append(squared_mmd(x, y).item())
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)))


@torch.no_grad()
def squared_mmd(
    x: Tensor, y: Tensor, x_weights: Tensor | None = None, y_weights: Tensor | None = None
) -> Tensor:
    """The unbiased squared maximum mean discrepancy of `kernel_distance`, of whole sets.

    With weights u of x and v of y, resamples of the sets,

    MMD^2 = <u, u> + <v, v> - 2 <u, v>,  <u, v> = sum u_i v_j k_ij / sum u_i v_j,

    where both sums of <u, u> and <v, v> leave out i = j.

    Args:
        x, y: [N, d] and [M, d], features of any real dtype; computed in float64.
        x_weights, y_weights: [B, N] and [B, M], or [1, N] and [1, M] for all alike; each row is of
            one resample, in which an image counts so many times. None is once.

    Returns:
        [B] float64. Deterministic.
    """
    x, y = x.double(), y.double()
    u = torch.ones(1, len(x)).to(x) if x_weights is None else x_weights.to(x)
    v = torch.ones(1, len(y)).to(y) if y_weights is None else y_weights.to(y)
    cross = _kernel_sum(x, y, u, v) / (u.sum(1) * v.sum(1))
    return _mean_of_pairs(x, u) + _mean_of_pairs(y, v) - 2 * cross


def _mean_of_pairs(x: Tensor, u: Tensor) -> Tensor:
    """[B], the mean of k_ij for i != j in each of B resamples."""
    squares = u.square()
    own = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return (_kernel_sum(x, x, u, u) - squares @ own) / (u.sum(1).square() - squares.sum(1))


def _kernel_sum(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """[B], sum_ij u_i v_j k_ij, for some i at a time."""
    total = torch.zeros(max(len(u), len(v))).to(x)
    count = max(1, CHUNK // len(y))
    for part, weights in zip(x.split(count), u.split(count, dim=1), strict=True):
        kernel = (part @ y.T / x.shape[1] + 1) ** 3
        total += (weights @ kernel * v).sum(1)
    return total


class Coverage(NamedTuple):
    """How well two sets of images cover each other; each is best at 1."""

    precision: float  # generated images among the real ones
    recall: float  # real images among the generated ones
    density: float  # how many real images' balls a generated one lies in, over k; may exceed 1
    coverage: float  # real images whose ball holds a generated one


@torch.no_grad()
def precision_recall_density_coverage(
    generated: Tensor,
    real: Tensor,
    *,
    neighbours: int = 3,
    density_neighbours: int = 5,
    device: torch.device | str = "cpu",
) -> Coverage:
    """Precision and recall (arXiv 1904.06991, eq. 1), density and coverage (2002.09797, eq. 4, 5).

    B_k(y) is the ball about a feature y through its k-th neighbour in its own set:

    precision = share of x in generated that lie in B_k(y) of some y in real, recall the reverse,
    density = sum_{x, y} 1[x in B_k(y)] / (k N), coverage = share of y whose B_k(y) holds some x.

    Args:
        generated, real: [N, d] and [M, d], features of any real dtype; computed in float64.
        neighbours: k of precision and recall, 3 in the paper.
        density_neighbours: k of density and coverage, 5 in the paper.
        device: where the distances are computed, some at a time.

    Raises:
        ValueError: an argument is not as said, or a set has no more features than neighbours.

    Deterministic.
    """
    name = "precision_recall_density_coverage"
    if neighbours < 1 or density_neighbours < 1:
        raise ValueError(
            f"{name}: neighbours and density_neighbours must be at least 1, got {neighbours} and "
            f"{density_neighbours}"
        )
    _check(name, generated, real, least=max(neighbours, density_neighbours) + 1)
    centre = real.double().mean(0)  # small numbers lose the fewest digits
    x, y = ((each.double() - centre).to(device) for each in (generated, real))
    x_radius, _ = _radii(x, neighbours, neighbours)
    y_radius, y_density_radius = _radii(y, neighbours, density_neighbours)
    precise = inside = 0.0
    recalled, covered = (torch.zeros(len(y), dtype=torch.bool, device=device) for _ in range(2))
    for rows, squares in _squared_distances(x, y):
        precise += (squares <= y_radius).any(1).sum().item()
        recalled |= (squares <= x_radius[rows, None]).any(0)
        in_ball = squares <= y_density_radius
        inside += in_ball.sum().item()
        covered |= in_ball.any(0)
    return Coverage(
        precision=precise / len(x),
        recall=recalled.double().mean().item(),
        density=inside / (density_neighbours * len(x)),
        coverage=covered.double().mean().item(),
    )


def _radii(features: Tensor, *neighbours: int) -> list[Tensor]:
    """[N] squared distances to the k-th neighbour, for each k; a feature is not its own."""
    radii = [[] for _ in neighbours]
    for _, squares in _squared_distances(features, features):
        nearest = squares.topk(max(neighbours) + 1, largest=False).values
        for found, k in zip(radii, neighbours, strict=True):
            found.append(nearest[:, k])
    return [torch.cat(found) for found in radii]


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|a_i - b_j|^2 for some i at a time: which, and [rows, M]."""
    count = max(1, CHUNK // len(b))
    b_squares = b.square().sum(1)
    for first in range(0, len(a), count):
        part = a[first : first + count]
        squares = part.square().sum(1, keepdim=True) + b_squares - 2 * part @ b.T
        yield slice(first, first + count), squares.clamp_(min=0)


def _check(function: str, generated: Tensor, real: Tensor, least: int) -> None:
    shapes = f"{list(generated.shape)} and {list(real.shape)}"
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"{function}: generated and real must be [N, d] and [M, d] of as many features, got "
            f"{shapes}"
        )
    if min(len(generated), len(real)) < least:
        raise ValueError(
            f"{function}: generated and real must have at least {least} images each, got {shapes}"
        )
