"""An MLP for points, any number of which train side by side as one."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of the noise embedding: EDM's c_noise spans -1.6 to 1.1; with faster waves training is unstable
FREQUENCIES = (
    0.5,
    1.0,
    1.5,
    2.0,
)


class ModelLinear(nn.Module):
    """A linear layer of every model, which starts Kaiming uniform, or at 0.

    x [num_models, B, in_features] becomes [num_models, B, out_features].
    """

    def __init__(self, in_features: int, out_features: int, num_models: int, *, zero: bool = False):
        super().__init__()
        weight = (3 / in_features) ** 0.5 * (
            2 * torch.rand(num_models, in_features, out_features) - 1
        )
        self.weight = nn.Parameter(torch.zeros_like(weight) if zero else weight)
        self.bias = nn.Parameter(torch.zeros(num_models, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Module):
    """Residual MLP over points, for the preconditioning wrappers.

    `num_models` of them are one network of batched matrices.

    emb = (cos f c_noise, sin f c_noise) for f in FREQUENCIES,  h = linear(x, emb),  then a block at
    a time h = h + linear(silu(linear(silu(h), emb))),  and F = linear(silu(h)).

    Args:
        in_channels: coordinates of a point.
        width: hidden units, > 0.
        num_blocks: residual blocks, >= 0.
        num_models: models, >= 1. They share nothing: along the batch come the first model's
            samples, then the second's, and so on, and each model's outputs and gradients are what
            it would have alone. Every parameter is [num_models, ...].

    A model starts at F = 0; the initial values come from torch's global generator.
    """

    label_dim = 0

    def __init__(
        self, in_channels: int = 2, width: int = 64, num_blocks: int = 2, num_models: int = 1
    ):
        super().__init__()
        self.num_models = num_models
        emb = 2 * len(FREQUENCIES)
        self.input = ModelLinear(in_channels + emb, width, num_models)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [ModelLinear(width + emb, width, num_models), ModelLinear(width, width, num_models)]
            )
            for _ in range(num_blocks)
        )
        self.output = ModelLinear(width, in_channels, num_models, zero=True)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """F of each point.

        Args:
            x: [num_models * B, in_channels], scaled noisy points, model by model; the parameters'
                dtype.
            noise_labels: [num_models * B], c_noise.
            class_labels, augment_labels: not used.

        Returns:
            [num_models * B, in_channels], as x.

        Raises:
            ValueError: x does not divide into `num_models` equal parts.

        Gradients to x, noise_labels and the parameters. Deterministic.
        """
        if x.ndim != 2 or len(x) % self.num_models:
            raise ValueError(
                f"MLP: x must have shape [{self.num_models} * B, channels], got {list(x.shape)}"
            )
        angles = noise_labels.to(x.dtype)[:, None] * torch.tensor(
            FREQUENCIES, dtype=x.dtype, device=x.device
        )
        emb = torch.cat([angles.cos(), angles.sin()], 1).unflatten(0, (self.num_models, -1))
        h = self.input(torch.cat([x.unflatten(0, (self.num_models, -1)), emb], 2))
        for block in self.blocks:
            first, second = cast("nn.ModuleList", block)
            h = h + second(F.silu(first(torch.cat([F.silu(h), emb], 2))))
        return self.output(F.silu(h)).flatten(0, 1)
