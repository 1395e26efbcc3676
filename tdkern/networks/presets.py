"""The architectures of EDM's experiments by name."""
from collections.abc import Sequence

from .unet import DhariwalUNet, SongUNet

PRESETS = {
    "ddpmpp": {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard", "resample_filter": (1, 1)},
    "ncsnpp": {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "decoder_type": "standard", "resample_filter": (1, 3, 3, 1)},
    "adm": {},
}


def unet(arch: str, img_resolution: int, img_channels: int, label_dim: int = 0, *, cbase: int | None = None, cres: Sequence[int] | None = None,
         dropout: float = 0.13, augment_dim: int = 0) -> SongUNet | DhariwalUNet:
    """One of EDM's networks, without its preconditioning (arXiv 2206.00364, tables 7 and 8).

    Args:
        arch: "ddpmpp", "ncsnpp" (128 channels, times 2 at each level; a first level times 1 from 64 pixels up) or "adm" (192, times 1, 2, 3, 4).
        img_resolution: height and width in pixels. img_channels: of the image, in and out.
        label_dim, augment_dim: widths of the class and augmentation labels, 0 for none.
        cbase: model_channels, the base width. cres: channel_mult, its multiple at each level. None for the preset's.
        dropout: probability, in training.

    Returns:
        A `SongUNet` or `DhariwalUNet`.

    Raises:
        ValueError: arch names nothing, or img_resolution does not divide.
    """
    if arch not in PRESETS:
        raise ValueError(f"unet: arch must be one of {', '.join(PRESETS)}, got {arch!r}")
    cls, width, mult = (DhariwalUNet, 192, (1, 2, 3, 4)) if arch == "adm" else (SongUNet, 128, (1, 2, 2, 2) if img_resolution >= 64 else (2, 2, 2))
    return cls(img_resolution, img_channels, img_channels, label_dim, augment_dim, cbase or width, cres or mult, dropout=dropout, **PRESETS[arch])
