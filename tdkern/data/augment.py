"""EDM's non-leaky geometric augmentation (arXiv 2206.00364, appendix F.2), with the resampling of
StyleGAN2-ADA (arXiv 2006.06676, appendix B).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# the low-pass filter of the orthogonal wavelet sym6: resampling by two up and, without a transform
# between, down gives the image back
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
DELAY = 5  # taps from the filter's start to its centre
# label columns of each
TRANSFORMS = {
    "xflip": 1,
    "yflip": 1,
    "scale": 1,
    "rotate_frac": 2,
    "aniso": 2,
    "translate_frac": 2,
}
RESAMPLING = ("scale", "rotate_frac", "aniso", "translate_frac")


def gated(value: Tensor, gate: Tensor, probability: float) -> Tensor:
    """A value where its gate is open, else 0."""
    return torch.where(gate < probability, value, torch.zeros_like(value))


def rotation(angle: Tensor) -> Tensor:
    """[B] radians to [B, 2, 2] that turn (x, y)."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).unflatten(
        1, (2, 2)
    )


def resample(images: Tensor, linear: Tensor, shift: Tensor, taps: Tensor) -> Tensor:
    """Affine transforms of images about their centres: the pixel at p shows the image at linear (p
    - shift).

    Reflected by R - 1 pixels on each side, black (0) beyond; upsampled by two, sampled bilinearly,
    downsampled by two. A pixel needs only its own image's transform, where ADA pads by what the
    batch needs and no more; the difference is in the outermost pixels of the images that set ADA's
    padding, most of it in the corners, and elsewhere rounding. With every augmentation, 32 pixels
    and images in [-1, 1] it was at most 1.1e-4 in white noise, and is below 1e-3 for any image.

    Args:
        images: [B, C, R, R]. linear: [B, 2, 2]. shift: [B, 2], pixels, x first. taps: [12], the
            filter. All of images' dtype.

    Returns:
        [B, C, R, R].
    """
    batch, channels, size, _ = images.shape
    margin, taps = size - 1, taps / math.sqrt(2)
    padded = size + 2 * margin  # pixels read per side
    fine = 2 * size + 2 * DELAY  # half-pixels written per side
    x = F.pad(images, [margin] * 4, mode="reflect").reshape(batch * channels, 1, padded, padded)
    x = F.conv_transpose2d(x, 2 * taps.reshape(1, 1, -1, 1), stride=(2, 1), padding=(DELAY, 0))
    x = F.conv_transpose2d(x, 2 * taps.reshape(1, 1, 1, -1), stride=(1, 2), padding=(0, DELAY))
    # Pixel p, counted from the centre, is half-pixel 2 p; affine_grid counts from -1 to 1, edge to
    # edge, and edges lie a quarter pixel off.
    theta = torch.cat(
        [linear * (fine / (2 * padded)), (2 * linear @ (0.25 - shift)[:, :, None] - 0.5) / padded],
        2,
    )
    grid = F.affine_grid(theta, [batch, channels, fine, fine], align_corners=False)
    x = F.grid_sample(
        x.reshape(batch, channels, 2 * padded, 2 * padded),
        grid,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    x = F.conv2d(
        x.reshape(batch * channels, 1, fine, fine), taps.reshape(1, 1, -1, 1), stride=(2, 1)
    )
    return F.conv2d(x, taps.reshape(1, 1, 1, -1), stride=(1, 2)).reshape(images.shape)


class AugmentPipe(nn.Module):
    """Random flips, scales, rotations, stretches and shifts of a batch, and the labels by which the
    network is told of them.

    A transform applies to a sample with probability p times its multiplier. In this order, for w ~
    N(0, 1) and u uniform in [-1, 1):

    | argument | transform | labels |
    | --- | --- | --- |
    | xflip, yflip | a mirror image, with probability 1/2 of the above | 0 or 1 |
    | scale | by 2^(scale_std w) | w |
    | rotate_frac | by r = pi rotate_frac_max u, counter-clockwise | cos r - 1, sin r |
    | aniso | by 2^(aniso_std w) along, 1/that across the x axis, with probability aniso_rotate_prob
    one turned by r = pi u | w cos r, w sin r | | translate_frac | by translate_frac_std w_x R to
    the right, the same w_y down | w_x, w_y |

    Labels are 0 where a transform does not apply, so at sampling no labels means the undistorted
    data; a transform whose multiplier is 0 has no labels.

    Args:
        p: overall probability, in [0, 1]; EDM's are 0.12 (CIFAR-10) and 0.15 (FFHQ, AFHQ).
        xflip, yflip, scale, rotate_frac, aniso, translate_frac: multipliers, >= 0; EDM's are 1, but
            1e8 for xflip, which always applies.
        scale_std, rotate_frac_max, aniso_std, aniso_rotate_prob, translate_frac_std: see the table.

    Raises:
        ValueError: an argument is out of its range.

    Move it to the images' device like any module: then nothing waits for the host, and shapes never
    depend on draws.
    """

    taps: Tensor

    def __init__(
        self,
        p: float = 1,
        xflip: float = 0,
        yflip: float = 0,
        scale: float = 0,
        rotate_frac: float = 0,
        aniso: float = 0,
        translate_frac: float = 0,
        scale_std: float = 0.2,
        rotate_frac_max: float = 1,
        aniso_std: float = 0.2,
        aniso_rotate_prob: float = 0.5,
        translate_frac_std: float = 0.125,
    ):
        super().__init__()
        self.p = p
        self.xflip = xflip
        self.yflip = yflip
        self.scale = scale
        self.rotate_frac = rotate_frac
        self.aniso = aniso
        self.translate_frac = translate_frac
        self.scale_std = scale_std
        self.rotate_frac_max = rotate_frac_max
        self.aniso_std = aniso_std
        self.aniso_rotate_prob = aniso_rotate_prob
        self.translate_frac_std = translate_frac_std
        for name in ("p", *TRANSFORMS):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"AugmentPipe: {name} must be a number >= 0, got {getattr(self, name)}"
                )
        self.register_buffer("taps", torch.tensor(SYM6, dtype=torch.float32), persistent=False)

    @property
    def label_dim(self) -> int:
        """Columns of the labels: the network's `augment_dim`."""
        return sum(columns for name, columns in TRANSFORMS.items() if getattr(self, name) > 0)

    def draw(self, images: Tensor) -> dict[str, Tensor]:
        """All random numbers for a batch, from torch's global generator of the images' device: each
        [B], but translate_normal [2, B].
        """

        def uniform():
            return torch.rand(len(images), dtype=images.dtype, device=images.device)

        def normal(*shape):
            return torch.randn(*shape, len(images), dtype=images.dtype, device=images.device)

        draws = {}
        for name in ("xflip", "yflip"):
            if getattr(self, name) > 0:
                draws |= {
                    f"{name}_choice": (uniform() < 0.5).to(images.dtype),
                    f"{name}_gate": uniform(),
                }
        if self.scale > 0:
            draws |= {"scale_normal": normal(), "scale_gate": uniform()}
        if self.rotate_frac > 0:
            draws |= {"rotate_uniform": uniform(), "rotate_gate": uniform()}
        if self.aniso > 0:
            draws |= {
                "aniso_normal": normal(),
                "aniso_angle_uniform": uniform(),
                "aniso_gate": uniform(),
                "aniso_angle_gate": uniform(),
            }
        if self.translate_frac > 0:
            draws |= {"translate_normal": normal(2), "translate_gate": uniform()}
        return draws

    def forward(
        self, images: Tensor, draws: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augmented images and their labels.

        Args:
            images: [B, C, R, R] float32 or float64.
            draws: as `draw` gives them, any floating dtype; None draws. `_gate` and `_uniform` in
                [0, 1), `_choice` 0 or 1, `_normal` real.

        Returns:
            (images, labels): as `images`, and [B, label_dim] in its dtype, in the table's order.

        Raises:
            ValueError: the images are not square or not of a floating dtype.

        Gradient to `images`. Deterministic for given draws.
        """
        if (
            images.ndim != 4
            or images.shape[2] != images.shape[3]
            or images.dtype not in (torch.float32, torch.float64)
        ):
            raise ValueError(
                "AugmentPipe: images must be [B, C, R, R] of float32 or float64, got "
                f"{list(images.shape)} of {images.dtype}"
            )
        if draws is None:
            draws = self.draw(images)
        else:
            draws = {name: draw.to(images.dtype) for name, draw in draws.items()}
        labels: list[Tensor] = []
        for name, axis in (("xflip", 3), ("yflip", 2)):
            if getattr(self, name) > 0:
                gate = draws[f"{name}_gate"]
                flip = gated(draws[f"{name}_choice"], gate, getattr(self, name) * self.p)
                images = torch.where(flip.reshape(-1, 1, 1, 1) == 1, images.flip(axis), images)
                labels.append(flip)
        if any(getattr(self, name) > 0 for name in RESAMPLING):
            linear, shift, more = self._transform(images, draws)
            images = resample(images, linear, shift, self.taps.to(images))
            labels += more
        return images, torch.stack(labels, 1) if labels else images.new_zeros(len(images), 0)

    def _transform(
        self, images: Tensor, draws: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the resampling does: linear maps [B, 2, 2], shifts [B, 2] in pixels, the labels."""
        labels: list[Tensor] = []
        shift = images.new_zeros(len(images), 2)
        linear = torch.eye(2, dtype=images.dtype, device=images.device).expand(len(images), 2, 2)
        if self.scale > 0:
            w = gated(draws["scale_normal"], draws["scale_gate"], self.scale * self.p)
            linear = linear * torch.exp2(-self.scale_std * w).reshape(-1, 1, 1)
            labels.append(w)
        if self.rotate_frac > 0:
            r = (2 * draws["rotate_uniform"] - 1) * math.pi * self.rotate_frac_max
            r = gated(r, draws["rotate_gate"], self.rotate_frac * self.p)
            linear = linear @ rotation(r)
            labels += [r.cos() - 1, r.sin()]
        if self.aniso > 0:
            w = gated(draws["aniso_normal"], draws["aniso_gate"], self.aniso * self.p)
            r = (2 * draws["aniso_angle_uniform"] - 1) * math.pi
            r = gated(r, draws["aniso_angle_gate"], self.aniso_rotate_prob)
            stretch = torch.exp2(self.aniso_std * torch.stack([-w, w], 1))
            linear = linear @ rotation(-r) @ (stretch[:, :, None] * rotation(r))
            labels += [w * r.cos(), w * r.sin()]
        if self.translate_frac > 0:
            gate = draws["translate_gate"]
            w = gated(draws["translate_normal"], gate, self.translate_frac * self.p)
            shift = self.translate_frac_std * images.shape[3] * w.T
            labels += [w[0], w[1]]
        return linear, shift, labels
