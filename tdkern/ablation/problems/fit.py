"""A mixture of low-rank Gaussians fitted to points or images."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...data import ImageDataset
from .empirical import images_of
from .low_rank import LowRankMixture

ROUNDS = 10  # of k-means, and then of the mixture


class Recipe(NamedTuple):
    """How a problem's mixture is made of a data set of 32 x 32 images."""

    size: int  # pixels a side
    patches: int  # random patches of each image; 0: the whole image, averaged down
    components: int  # of each class, where there are classes
    rank: int
    basis: int  # vectors in which they are stored
    classes: bool


RECIPES = {
    "patches8": Recipe(8, patches=2, components=256, rank=16, basis=96, classes=False),
    "images8": Recipe(8, patches=0, components=25, rank=16, basis=96, classes=True),
    "images16": Recipe(16, patches=0, components=20, rank=16, basis=112, classes=True),
}


def patches_of(images: Tensor, size: int, each: int, generator: torch.Generator) -> Tensor:
    """[N each, C, size, size]: patches of images [N, C, H, W] at uniform places."""
    room = images.shape[2] - size + 1
    y, x = torch.randint(room, (2, each, len(images)), generator=generator)
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    every = torch.arange(len(images))
    return torch.cat([windows[every, :, y[i], x[i]] for i in range(each)])


def fit(points: Tensor, components: int, rank: int, generator: torch.Generator) -> LowRankMixture:
    """A mixture of at most so many Gaussians of a rank, by k-means and then hard EM.

    Each round gives every point to the component under which w_k N(x; m_k, C_k) is largest, and
    each component the mean and principal axes of its points: probabilistic PCA (Tipping and Bishop,
    Neural Computation 11, 1999), whose v is the mean of the variances left out. A component of
    fewer than 2 rank + 2 points is dropped.

    Args:
        points: [N, d].
        components: K, at most N.
        rank: r, below d.
        generator: of the first means, which are points.

    Deterministic, but for rounding on another machine.
    """
    points = points.double()
    first = torch.randperm(len(points), generator=generator)[:components]
    means, owner = points[first], torch.zeros(len(points), dtype=torch.long)
    for _ in tqdm(range(ROUNDS), "k-means", leave=False):
        owner = torch.cat([torch.cdist(part, means).argmin(1) for part in points.split(4096)])
        counts = torch.zeros(len(means)).index_add_(0, owner, torch.ones(len(points)))
        sums = torch.zeros_like(means).index_add_(0, owner, points)
        means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), means)
    mixture = _of_owners(points, owner, rank)
    for _ in tqdm(range(ROUNDS), "mixture", leave=False):
        mixture = _of_owners(points, mixture.likeliest(points), rank)
    return mixture


def _of_owners(points: Tensor, owner: Tensor, rank: int) -> LowRankMixture:
    """The mixture whose components have these points [N, d], by their numbers [N]."""
    parts = [points[owner == k] for k in range(int(owner.max()) + 1)]
    parts = [part for part in parts if len(part) >= 2 * rank + 2]
    means, factors, variances = zip(*(_principal(part, rank) for part in parts), strict=True)
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    return LowRankMixture(
        counts / counts.sum(), torch.stack(means), torch.stack(factors), torch.stack(variances)
    )


def _principal(points: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(m [d], W [d, rank], v) of probabilistic PCA."""
    mean = points.mean(0)
    centred = points - mean
    total = centred.square().sum() / len(points)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    spreads = singular[:rank].square() / len(points)
    v = ((total - spreads.sum()) / (len(mean) - rank)).clamp(min=1e-6)
    return mean, (axes[:rank] * (spreads - v).clamp(min=0).sqrt()[:, None]).T, v


def fit_problem(dataset: ImageDataset, recipe: Recipe, seed: int = 0) -> LowRankMixture:
    """The mixture of a recipe, of a data set's images and their mirror images.

    Args:
        dataset: of square images with classes, whose size is a multiple of the recipe's.
    """
    generator = torch.Generator().manual_seed(seed)
    if recipe.patches:
        points = images_of(dataset)
        points = patches_of(points, recipe.size, recipe.patches, generator)
    else:
        points = images_of(dataset, recipe.size)
    if not recipe.classes:
        return fit(_mirrored(points), recipe.components, recipe.rank, generator)
    labels = torch.from_numpy(dataset.labels)
    fits = [
        fit(_mirrored(points[labels == c]), recipe.components, recipe.rank, generator)
        for c in tqdm(range(dataset.label_dim), "classes")
    ]
    return joined(fits, torch.bincount(labels) / len(labels))


def _mirrored(images: Tensor) -> Tensor:
    """[2 N, d]: images and their mirror images."""
    return torch.cat([images, images.flip(3)]).flatten(1)


def joined(mixtures: list[LowRankMixture], shares: Tensor) -> LowRankMixture:
    """One mixture of a mixture for each class, which have these shares [classes]."""
    sizes = torch.tensor([len(each.weights) for each in mixtures])
    return LowRankMixture(
        torch.cat([each.weights for each in mixtures]) * shares.double().repeat_interleave(sizes),
        torch.cat([each.means for each in mixtures]),
        torch.cat([each.factors for each in mixtures]),
        torch.cat([each.variances for each in mixtures]),
        classes=torch.arange(len(mixtures)).repeat_interleave(sizes),
    )
