"""The empirical distribution of real images, whose exact denoiser is a softmax over all of them."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import DatasetError, ImageDataset, to_float
from .base import Problem

DATA_VARIABLE = "TDKERN_ABLATION_DATA"  # names the images where no argument does
CHUNK = 1 << 22  # logits at once: 32 MiB


class Empirical(Problem):
    """N real images, each as likely as the others.

    D(x; sigma) = sum_i softmax_i(-|x - y_i|^2 / (2 sigma^2)) y_i over the images y_i (EDM, arXiv
    2206.00364, eq. 57). A network that reaches it has learnt the images by heart, so the excess
    error over it is that of a training set, and tells methods apart while training is short.

    Args:
        name: in `PROBLEMS`.
        images: [N, C, H, H], in [-1, 1].
    """

    def __init__(self, name: str, images: Tensor):
        _, channels, height, width = images.shape
        self.name, self.image_shape = name, (channels, height, width)
        self.images = images.float()
        self._half_squares = torch.cat(
            [part.double().square().sum(1) / 2 for part in self._points.split(4096)]
        )

    @property
    def _points(self) -> Tensor:
        return self.images.flatten(1)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return self.images[torch.randint(len(self.images), (n,), generator=generator)], None

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """See `Problem.denoise`. The logits and their sum are in float64: at low noise they are
        differences of numbers 10^5 times as large. The mean of images is in float32."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1).expand(len(x), 1)
        rows = max(1, CHUNK // len(self.images))
        parts = zip(x.flatten(1).split(rows), sigma.split(rows), strict=True)
        means = [self._weights(part.double(), level) @ self._points for part, level in parts]
        return torch.cat(means).to(x.dtype).view_as(x)

    def _weights(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[b, N] float32, the posterior probability of each image.

        Of |x - y|^2 the square of x is the same for all images, and is left out.
        """
        products = [x @ part.double().T for part in self._points.split(4096)]
        logits = (torch.cat(products, 1) - self._half_squares) / sigma**2
        return logits.softmax(1).float()


def empirical_of(
    name: str = "empirical",
    *,
    data: str | Path | None = None,
    size: int | None = None,
    n: int | None = None,
) -> Empirical:
    """The empirical distribution of a data set's images, averaged down to a size.

    Args:
        name: in `PROBLEMS`.
        data: a folder, zip or .npy file of images, as `ImageDataset` reads; None takes that of the
            environment's TDKERN_ABLATION_DATA. A packed file of `tdkern dataset` is read at once.
        size: pixels a side, of which the images' is a multiple; None keeps it.
        n: the first n images; None takes all.

    Raises:
        DatasetError: there are no such images.
    """
    path = data or os.environ.get(DATA_VARIABLE)
    if not path:
        raise DatasetError(
            f"{name}: needs a data set; name its folder, zip or .npy file in {DATA_VARIABLE}"
        )
    return Empirical(name, images_of(ImageDataset(path), size, n))


def images_of(dataset: ImageDataset, size: int | None = None, n: int | None = None) -> Tensor:
    """[N, C, size, size] float32 in [-1, 1]: the first n images, averaged over squares.

    Raises:
        DatasetError: the images' size is no multiple of `size`.
    """
    own = dataset[0][0].shape[1]
    size = size or own
    if own % size:
        raise DatasetError(
            f"{dataset.path}: must have images of a multiple of {size} pixels, got {own}"
        )
    parts = torch.arange(len(dataset))[:n].split(1024)
    parts = [torch.stack([dataset[i][0] for i in part.tolist()]) for part in parts]
    return torch.cat([F.avg_pool2d(to_float(part), own // size) for part in parts])
