"""Images as training wants them: upright, 8 bits, square, of one size; or the reason why not."""

import io

import numpy as np

from .decode import PNG_DEPTH

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 1 << 26  # of a source image
TIFF_DEPTH = 258  # the tag of its bits a channel
FITS = ("crop", "stretch", "none")


class LeftOut(Exception):
    """An image that is not taken; the message says why."""


def resized(data: bytes | np.ndarray, size: int | None, fit: str, grey: bool) -> np.ndarray:
    """An image file's pixels, upright, square and of a size.

    Args:
        data: the file, or pixels [H, W, 3] uint8.
        size: pixels a side; None keeps the side.
        fit: "crop" takes the largest square in the middle, "stretch" the whole, "none" squares.
        grey: whether the result is grey, by Pillow's weights, else RGB.

    Returns:
        [1 or 3, size, size] uint8. Where the size changes, by Pillow's Lanczos filter, whose
        support grows as an image shrinks: the resampling that clean-fid asks for
        (arXiv 2104.11222).

    Raises:
        LeftOut: the file is no image, or its pixels are not all that it says.
    """
    import PIL.Image
    import PIL.ImageOps

    try:
        if isinstance(data, np.ndarray):
            image = PIL.Image.fromarray(data)
        else:
            image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
            _check(image, data)
            image = PIL.ImageOps.exif_transpose(image)
        image = _opaque(image).convert("L" if grey else "RGB")
        if fit == "none" and image.width != image.height:
            raise LeftOut("not square")
        if fit == "crop":  # first, as the filter would see beyond the edges
            image = image.crop(_square(image.width, image.height))
        side = size or image.width
        image = image.resize((side, side), PIL.Image.Resampling.LANCZOS)
    except LeftOut:
        raise
    except Exception as error:  # whatever Pillow makes of a broken file
        raise LeftOut(f"not a readable image ({type(error).__name__})") from error
    pixels = np.array(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1).copy()


def _check(image, data: bytes) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise LeftOut(f"more than {MAX_PIXELS} pixels")
    if getattr(image, "n_frames", 1) > 1:
        raise LeftOut("several frames")
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
        raise LeftOut(f"Pillow mode {image.mode}")
    if _depth(image, data) > 8:
        raise LeftOut(f"{_depth(image, data)} bits a channel")


def _depth(image, data: bytes) -> int:
    """Bits of a channel; Pillow's mode is RGB for more than 8 too, of which it drops the rest."""
    if image.format == "PNG":
        return data[PNG_DEPTH]
    return max(image.tag_v2.get(TIFF_DEPTH, (1,))) if image.format == "TIFF" else 8


def _opaque(image):
    """The image without its transparency, of which there must be none in its pixels."""
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise LeftOut("transparent")
    return image


def _square(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
