"""The demo's problem: four unequal Gaussians on a ring in the plane."""

import torch
from torch import Tensor, nn

from ...evaluation.mixture import GaussianMixture
from ...networks import MLP
from .base import Problem


class Points(nn.Module):
    """An MLP whose points come as images of one pixel, a coordinate a channel."""

    label_dim = 0

    def __init__(self, mlp: MLP):
        super().__init__()
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        return self.mlp(x.flatten(1), noise_labels).view_as(x)


class Ring(Problem):
    """`GaussianMixture.ring`, each point an image of two channels and one pixel."""

    name = "mixture"
    image_shape = (2, 1, 1)

    def __init__(self):
        self.mixture = GaussianMixture.ring(self.sigma_data)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return self.mixture.sample(n, generator).float().view(n, *self.image_shape), None

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        denoised = self.mixture.denoise(x.flatten(1), torch.as_tensor(sigma))
        return denoised.to(x.dtype).view_as(x)

    def network(self) -> Points:
        return Points(MLP(2, width=64, num_blocks=2))
