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
    basis: int  # vectors that span all means and factors, in which they are stored
    classes: bool


RECIPES = {
    "patches8": Recipe(8, patches=1, components=256, rank=28, basis=64, classes=False),
    "images8": Recipe(8, patches=0, components=25, rank=28, basis=64, classes=True),
    "images16": Recipe(16, patches=0, components=20, rank=18, basis=112, classes=True),
}


class Basis(NamedTuple):
    """The principal axes of some points."""

    centre: Tensor  # [d] float64, their mean
    axes: Tensor  # [d, q] float64, orthonormal

    @classmethod
    def of(cls, points: Tensor, size: int) -> "Basis":
        """Of points [N, d], the `size` axes along which they vary most."""
        centre = points.mean(0, dtype=torch.float64)
        covariance = sum(_square(part.double() - centre) for part in points.split(4096))
        return cls(centre, torch.linalg.eigh(covariance).eigenvectors[:, -size:])


class Points(NamedTuple):
    """Points in the coordinates of a basis."""

    inside: Tensor  # [N, q] float64
    outside: Tensor  # [N] float64, squared distance from what the basis spans

    def of(self, chosen: Tensor) -> "Points":
        """Some of the points."""
        return Points(self.inside[chosen], self.outside[chosen])


def patches_of(images: Tensor, size: int, each: int, generator: torch.Generator) -> Tensor:
    """[N each, C, size, size]: patches of images [N, C, H, W] at uniform places."""
    room = images.shape[2] - size + 1
    y, x = torch.randint(room, (2, each, len(images)), generator=generator)
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    every = torch.arange(len(images))
    return torch.cat([windows[every, :, y[i], x[i]] for i in range(each)])


def fit(
    points: Tensor, basis: Basis, components: int, rank: int, generator: torch.Generator
) -> LowRankMixture:
    """A mixture of at most so many Gaussians of a rank, by k-means and then hard EM.

    Each round gives every point to the component under which w_k N(x; m_k, C_k) is largest, and
    each component the mean and principal axes of its points: probabilistic PCA (Tipping and Bishop,
    Neural Computation 11, 1999), whose v is the mean of the variances left out. A component of
    fewer than 2 rank + 2 points is dropped.

    Args:
        points: [N, d].
        basis: what spans the means and factors; outside it a component has v in every direction.
        components: K, at most N.
        rank: r, at most the basis' size and below d.
        generator: of the first means, which are points.

    Deterministic, but for rounding on another machine.
    """
    d = points.shape[1]
    centred = [part.double() - basis.centre for part in points.split(4096)]
    inside = torch.cat([part @ basis.axes for part in centred])
    whole = torch.cat([part.square().sum(1) for part in centred])
    known = Points(inside, (whole - inside.square().sum(1)).clamp(min=0))
    mixture = _of_owners(known, _nearest_means(inside, components, generator), rank, d)
    for _ in tqdm(range(ROUNDS), "mixture", leave=False):
        mixture = _of_owners(known, _likeliest(mixture, known, d), rank, d)
    return LowRankMixture(
        mixture.weights,
        basis.centre + mixture.means @ basis.axes.T,
        basis.axes @ mixture.factors,
        mixture.variances,
    )


def _nearest_means(points: Tensor, components: int, generator: torch.Generator) -> Tensor:
    """[N] int64: k-means' component of each point [N, q]."""
    means = points[torch.randperm(len(points), generator=generator)[:components]]
    for _ in tqdm(range(ROUNDS), "k-means", leave=False):
        owner = torch.cat([torch.cdist(part, means).argmin(1) for part in points.split(4096)])
        counts = torch.bincount(owner, minlength=len(means))[:, None]
        sums = torch.zeros_like(means).index_add_(0, owner, points)
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return owner


def _likeliest(mixture: LowRankMixture, points: Points, d: int) -> Tensor:
    """[N] int64: the component under which each point is likeliest; `mixture` is of coordinates."""
    v, beyond = mixture.variances, d - points.inside.shape[1]
    owners = []
    for inside, outside in zip(*(each.split(1024) for each in points), strict=True):
        log_p = mixture.log_joint(inside, 0.0) - outside[:, None] / (2 * v) - beyond / 2 * v.log()
        owners.append(log_p.argmax(1))
    return torch.cat(owners)


def _of_owners(points: Points, owner: Tensor, rank: int, d: int) -> LowRankMixture:
    """The mixture whose components have these points, by their numbers [N]; of coordinates."""
    parts = [points.of(owner == k) for k in range(int(owner.max()) + 1)]
    parts = [part for part in parts if len(part.inside) >= 2 * rank + 2]
    means, factors, variances = zip(*(_principal(part, rank, d) for part in parts), strict=True)
    counts = torch.tensor([len(part.inside) for part in parts], dtype=torch.float64)
    return LowRankMixture(
        counts / counts.sum(), torch.stack(means), torch.stack(factors), torch.stack(variances)
    )


def _principal(points: Points, rank: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """(m [q], W [q, rank], v) of probabilistic PCA in d dimensions."""
    mean = points.inside.mean(0)
    covariance = _square(points.inside - mean) / len(points.inside)
    spreads, axes = torch.linalg.eigh(covariance)
    left = spreads[:-rank].sum() + points.outside.mean()
    v = (left / (d - rank)).clamp(min=1e-6)
    return mean, axes[:, -rank:] * (spreads[-rank:] - v).clamp(min=0).sqrt(), v


def _square(rows: Tensor) -> Tensor:
    return rows.T @ rows


def fit_problem(dataset: ImageDataset, recipe: Recipe, seed: int = 0) -> LowRankMixture:
    """The mixture of a recipe, of a data set's images and their mirror images.

    Args:
        dataset: of square images with classes, whose size is a multiple of the recipe's.
        recipe: what to make of them.
        seed: of the patches' places and the first means.
    """
    generator = torch.Generator().manual_seed(seed)
    if recipe.patches:
        images = patches_of(images_of(dataset), recipe.size, recipe.patches, generator)
    else:
        images = images_of(dataset, recipe.size)
    basis = Basis.of(_mirrored(images), recipe.basis)
    if not recipe.classes:
        return fit(_mirrored(images), basis, recipe.components, recipe.rank, generator)
    labels = torch.from_numpy(dataset.labels)
    fits = [
        fit(_mirrored(images[labels == c]), basis, recipe.components, recipe.rank, generator)
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
