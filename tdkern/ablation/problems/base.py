"""What a problem is: data whose exact denoiser is known, and a small network to learn it."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...networks import SongUNet


class Problem(ABC):
    """Data, its exact denoiser, and the network that is to learn it.

    Attributes:
        name: in `PROBLEMS`.
        image_shape: (channels, height, width) of the data, which lies in about [-1, 1].
        label_dim: classes, or 0 where there are none.
        sigma_data: what the losses and the preconditioning are told, about the data's deviation.
    """

    name: str
    image_shape: tuple[int, int, int]
    label_dim: int = 0
    sigma_data: float = 0.5

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """n independent draws: x0 [n, C, H, W] float32 and one-hot labels [n, label_dim] float32.

        The labels are None where there are no classes. The same for one state of the generator.
        """

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The exact denoiser D(x; sigma) = E[x0 | x], or E[x0 | x, labels].

        It is x + sigma^2 grad ln p(x; sigma), and of all denoisers has the least loss (EDM, arXiv
        2206.00364, eq. 3).

        Args:
            x: [B, C, H, W], float32 or float64, noisy data.
            sigma: [B] or a number, > 0, the noise levels.
            labels: [B, label_dim], one-hot; None is the mean over the classes.

        Returns:
            [B, C, H, W] in x's dtype; computed in float64. No gradient. Deterministic.
        """

    def network(self) -> nn.Module:
        """A new network for a preconditioning wrapper such as `EDMPrecond`.

        It is called as `SongUNet` is: `model(c_in x, c_noise, class_labels, augment_labels)`. Its
        initial values come from torch's global generator.
        """
        return FoldedUNet(self.image_shape, self.label_dim)


class FoldedUNet(nn.Module):
    """A DDPM++ of squares of 2 x 2 pixels as channels, whose training steps take a core 20 ms.

    Over the pixels themselves it would take four times as long, most of it in passes over memory.

    Args:
        image_shape: (channels, height, width), the sides even.
        label_dim: width of the class labels, 0 for none.
    """

    def __init__(self, image_shape: tuple[int, int, int], label_dim: int):
        super().__init__()
        channels, size, _ = image_shape
        self.img_resolution, self.in_channels, self.label_dim = size, channels, label_dim
        self.unet = SongUNet(
            size // 2,
            4 * channels,
            4 * channels,
            label_dim=label_dim,
            model_channels=32,
            channel_mult=[1] * (size.bit_length() - 3),  # down to 4 x 4 squares
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
        )

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """F [B, C, H, W]; arguments as `SongUNet`'s."""
        squares = F.pixel_unshuffle(x, 2)
        return F.pixel_shuffle(self.unet(squares, noise_labels, class_labels, augment_labels), 2)
