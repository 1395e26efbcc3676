"""The architectures of EDM's experiments by name."""

from collections.abc import Sequence
from typing import NamedTuple

from .unet import DhariwalUNet, SongUNet


class Preset(NamedTuple):
    """An architecture (arXiv 2206.00364, tables 7 and 8)."""

    model: type
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_from_64: tuple[int, ...]  # of images of 64 pixels and more
    settings: dict  # of the model


DDPMPP = {
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "decoder_type": "standard",
    "resample_filter": [1, 3, 3, 1],
}
PRESETS = {
    "ddpmpp": Preset(SongUNet, 128, (2, 2, 2), (1, 2, 2, 2), DDPMPP),
    "ncsnpp": Preset(SongUNet, 128, (2, 2, 2), (1, 2, 2, 2), NCSNPP),
    "adm": Preset(DhariwalUNet, 192, (1, 2, 3, 4), (1, 2, 3, 4), {}),
}


def unet_arguments(
    arch: str,
    img_resolution: int,
    img_channels: int,
    label_dim: int = 0,
    *,
    cbase: int | None = None,
    cres: Sequence[int] | None = None,
    dropout: float = 0.13,
    augment_dim: int = 0,
) -> tuple[type, dict]:
    """The class and the arguments of `unet`, which are plain values; arguments as there."""
    if arch not in PRESETS:
        raise ValueError(f"unet: arch must be one of {', '.join(PRESETS)}, got {arch!r}")
    preset = PRESETS[arch]
    multiples = preset.channel_mult_from_64 if img_resolution >= 64 else preset.channel_mult
    arguments = {
        "img_resolution": img_resolution,
        "in_channels": img_channels,
        "out_channels": img_channels,
        "label_dim": label_dim,
        "augment_dim": augment_dim,
        "model_channels": cbase or preset.model_channels,
        "channel_mult": list(cres or multiples),
        "dropout": dropout,
    }
    return preset.model, arguments | preset.settings


def unet(arch: str, img_resolution: int, img_channels: int, label_dim: int = 0, **settings):
    """One of EDM's networks, without its preconditioning (arXiv 2206.00364, tables 7 and 8).

    Args:
        arch: "ddpmpp", "ncsnpp" (128 channels, times 2 at each level; a first level times 1 from 64
            pixels up) or "adm" (192, times 1, 2, 3, 4).
        img_resolution: height and width in pixels.
        img_channels: of the image, in and out.
        label_dim, augment_dim: widths of the class and augmentation labels, 0 for none.
        cbase: model_channels, the base width; None is the preset's.
        cres: channel_mult, the base width's multiple at each level; None is the preset's.
        dropout: probability, in training, 0.13 unless given.

    Returns:
        A `SongUNet` or `DhariwalUNet`.

    Raises:
        ValueError: arch is not one of the names above, or img_resolution does not divide.
    """
    model, arguments = unet_arguments(arch, img_resolution, img_channels, label_dim, **settings)
    return model(**arguments)
