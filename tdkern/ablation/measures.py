"""How far a network is from a problem's known answer, with the same draws at every call."""

import math
from collections.abc import Callable
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.fid import Statistics, frechet_distance
from ..samplers import heun
from ..schedules import EDM
from .problems import Problem

BANDS = ((0.02, 0.2), (0.2, 0.4), (0.4, 4.0), (4.0, 12.0), (12.0, 80.0))  # noise levels from, to
BUDGETS = (5, 9, 18)  # steps of Heun's method
# of Heun's method with the exact denoiser, for the flow: 0.002 a pixel from its end
EXACT_STEPS = 48
REAL = 8192  # draws of the data, for the moments of its features
PART = 128  # samples that a network is given at once: more do not stay near a processor


class Noisy(NamedTuple):
    """Noisy data at levels that cover the bands evenly in ln sigma, and what is known of it."""

    x: Tensor  # [N, C, H, W] float32, band by band, as many in each
    sigma: Tensor  # [N] float32
    labels: Tensor | None
    denoised: Tensor  # [N, C, H, W] float32, by the exact denoiser


class Flow(NamedTuple):
    """Where the exact probability flow takes noise of level 80."""

    x: Tensor  # [N, C, H, W] float32, x_T
    labels: Tensor | None
    end: Tensor  # [N, C, H, W] float32


class RandomFeatures:
    """Three random convolutions and their mean over the image: fixed features of small images.

    Args:
        channels: of the images.
        dim: features.

    images [B, channels, H, W] to [B, dim]. The weights are the same at every call.
    """

    def __init__(self, channels: int, dim: int = 64):
        generator = torch.Generator().manual_seed(0)
        self.weights = [
            torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            for before, after in pairwise((channels, dim, dim, dim))
        ]

    def __call__(self, images: Tensor) -> Tensor:
        h = images
        for weight, stride in zip(self.weights, (1, 2, 1), strict=True):
            h = F.relu(F.conv2d(h, weight, padding=1, stride=stride))
        return h.mean((2, 3))

    @torch.no_grad()
    def statistics(self, images: Tensor) -> Statistics:
        """The mean and covariance of the features of images [N, channels, H, W]."""
        features = torch.cat([self(part) for part in images.float().split(PART)]).double().numpy()
        return Statistics(features.mean(0), np.cov(features, rowvar=False))


class Measures:
    """The measures of a problem. Every draw and exact answer is made once, when it is needed.

    `measures(net) -> dict` for `net(x, sigma, labels) -> D`, such as a preconditioned network, or
    `partial(problem.denoise)`, whose numbers are the least that can be reached. The numbers are

    - "error/LO-HI" by band, "error/all": the excess of EDM's loss over the least possible,
      mean(w (D - D_exact)^2) with w = 1 / sigma^2 + 1 / sigma_data^2, over levels that are even in
      ln sigma; for "all" they have the density from which EDM's loss draws them;
    - "map/STEPS": the root mean square distance, of a pixel, between what Heun's method makes of
      x_T in so many steps and the end of the exact probability flow from the same x_T;
    - "frechet/STEPS": the squared Frechet distance between `RandomFeatures` of those samples and
      of the data.

    Args:
        problem: the problem.
        points: noisy data points in each band.
        samples: from which samplers start.
        seed: of the draws. What is chosen by one seed's numbers is to be reported by another's.

    Deterministic if the network is.
    """

    def __init__(self, problem: Problem, *, points: int = 256, samples: int = 256, seed: int = 0):
        self.problem, self.points, self.samples, self.seed = problem, points, samples, seed
        self.features = RandomFeatures(problem.image_shape[0])

    def __call__(self, net: Callable) -> dict[str, float]:
        return self.errors(net) | self.few_steps(net)

    @torch.no_grad()
    def errors(self, net: Callable) -> dict[str, float]:
        """The excess error, by band and over all levels."""
        noisy = self.noisy
        denoised = [net(*part) for part in _parts(noisy.x, noisy.sigma, noisy.labels)]
        squares = (torch.cat(denoised).double() - noisy.denoised).square().flatten(1).mean(1)
        sigma = noisy.sigma.double()
        squares *= 1 / sigma**2 + 1 / self.problem.sigma_data**2
        errors = {
            f"error/{low:g}-{high:g}": of_band.mean().item()
            for (low, high), of_band in zip(BANDS, squares.split(self.points), strict=True)
        }
        return errors | {"error/all": (squares @ self._shares).item()}

    def few_steps(self, net: Callable) -> dict[str, float]:
        """The error of the few-step map, and the distance of its samples."""
        numbers = {}
        for steps in BUDGETS:
            images = self.sampled(net, steps)
            gap = (images.double() - self.flow.end).square().mean()
            distance = frechet_distance(self.features.statistics(images), self.real)
            numbers |= {f"map/{steps}": math.sqrt(gap.item()), f"frechet/{steps}": distance}
        return numbers

    def sampled(self, net: Callable, steps: int) -> Tensor:
        """[samples, C, H, W] float32: what Heun's method makes of every x_T."""
        parts = []
        for x, labels in _parts(self.flow.x, self.flow.labels):
            denoiser = net if labels is None else partial(net, class_labels=labels)
            parts.append(heun(denoiser, x, EDM(steps).sigmas()))
        return torch.cat(parts)

    @cached_property
    def noisy(self) -> Noisy:
        """See `Noisy`; level i of a band is drawn from the i-th of as many parts of it."""
        generator = torch.Generator().manual_seed(self.seed)
        x0, labels = self.problem.sample(len(BANDS) * self.points, generator)
        noise = torch.randn(x0.shape, generator=generator)
        edges = torch.tensor(BANDS, dtype=torch.float64).log()
        place = torch.arange(self.points) + torch.rand(len(BANDS), self.points, generator=generator)
        width = edges.diff() / self.points
        sigma = (edges[:, :1] + width * place).exp().flatten().float()
        x = x0 + sigma.view(-1, 1, 1, 1) * noise
        return Noisy(x, sigma, labels, self.problem.denoise(x, sigma, labels))

    @property
    def _shares(self) -> Tensor:
        """[N] float64, summing to 1: of the noisy points, as EDM's loss draws noise levels."""
        edges = torch.tensor(BANDS, dtype=torch.float64).log()
        width = edges.diff().flatten().repeat_interleave(self.points)
        density = (-((self.noisy.sigma.double().log() + 1.2) ** 2) / (2 * 1.2**2)).exp()
        return density * width / (density * width).sum()

    @cached_property
    def flow(self) -> Flow:
        """See `Flow`."""
        generator = torch.Generator().manual_seed(self.seed)
        x0, labels = self.problem.sample(self.samples, generator)
        x = EDM(EXACT_STEPS).sigma_max * torch.randn(x0.shape, generator=generator)

        def exact(x: Tensor, sigma: Tensor) -> Tensor:
            return self.problem.denoise(x, sigma[0], labels)

        return Flow(x, labels, heun(exact, x.double(), EDM(EXACT_STEPS).sigmas()).float())

    @cached_property
    def real(self) -> Statistics:
        """The moments of the data's features."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.features.statistics(self.problem.sample(REAL, generator)[0])


def _parts(x: Tensor, *others: Tensor | None):
    """Tensors of as many rows, some rows at a time; None stays None."""
    for first in range(0, len(x), PART):
        rows = slice(first, first + PART)
        yield x[rows], *(None if each is None else each[rows] for each in others)
