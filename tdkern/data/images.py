"""Images between pixels and numbers: uint8 0..255 on disk, float -1..1 in training."""

import io
from pathlib import Path

import torch
from torch import Tensor

from .files import write_atomic


def to_float(images: Tensor) -> Tensor:
    """Pixels as the network sees them: x / 127.5 - 1, float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The nearest pixels to the network's images: x 127.5 + 127.5 rounded, held in 0..255."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def save_image(path: str | Path, image: Tensor, *, durable: bool = True) -> None:
    """Write one image as a PNG file, whole or not at all.

    Args:
        path: of the PNG file.
        image: [1 or 3, H, W] uint8.
        durable: as in `write_atomic`.
    """
    import PIL.Image

    pixels = image.permute(1, 2, 0).cpu().numpy()
    png = io.BytesIO()
    PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(png, format="png")
    write_atomic(path, png.getvalue(), durable=durable)


def save_grid(path: str | Path, images: Tensor, columns: int) -> None:
    """Write images as one PNG file, row by row; an unfilled last row ends in black.

    Args:
        path: of the PNG file.
        images: [N, 1 or 3, H, W] uint8.
        columns: images per row.
    """
    n, c, h, w = images.shape
    rows = -(-n // columns)
    grid = images.new_zeros(rows * columns, c, h, w)
    grid[:n] = images
    save_image(
        path,
        grid.reshape(rows, columns, c, h, w)
        .permute(2, 0, 3, 1, 4)
        .reshape(c, rows * h, columns * w),
    )
