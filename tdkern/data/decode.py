"""Pixels of image files: PNG and JPEG alone, where the pixels are all that the file says."""

import io

import numpy as np

MAX_SIDE = 4096  # pixels; a file's header is believed up to here
FORMATS = ("PNG", "JPEG")
ORIENTATION = 0x0112  # EXIF's
PNG_DEPTH = 24  # the place of its bit depth in a PNG file


class ImageError(ValueError):
    """A file that is no image of the wanted kind; the message says what it is, and not its name."""


def decode(data: bytes, shape: tuple[int, ...] | None = None, first: str = "") -> np.ndarray:
    """The pixels of a PNG or JPEG file.

    Args:
        data: the file.
        shape: that of the data set's images [C, H, W], compared before pixels are decoded.
        first: the name of the image that has it.

    Returns:
        [1 or 3, H, H] uint8.

    Raises:
        ImageError: it cannot be read, is not square, of another shape, or not 8 bits of RGB or
            grey; or it is turned by EXIF, transparent, or has several frames, of which its pixels
            say nothing.
    """
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as file:
            problem = wrong(file, data, shape, first)
            if problem:
                raise ImageError(problem)
            image = np.array(file)
    except ImageError:
        raise
    # all that Pillow raises for a broken file
    except (
        OSError,
        SyntaxError,
        ValueError,
        PIL.Image.DecompressionBombError,
        PIL.Image.DecompressionBombWarning,
    ) as error:
        raise ImageError(f"is not a readable image ({error}); remove or replace it") from error
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1).copy()


def wrong(file, data: bytes, shape: tuple[int, ...] | None = None, first: str = "") -> str:
    """Why an opened image is not taken, from its header; empty if it is. Otherwise as `decode`."""
    if file.mode not in ("RGB", "L"):
        return f"must be RGB or grey with 8 bits a channel, got Pillow mode {file.mode}; convert it"
    if file.format == "PNG" and data[PNG_DEPTH] == 16:
        return "must have 8 bits a channel, got 16; convert it"
    if file.width != file.height:
        return f"must be square, got {file.width}x{file.height}; crop or resize the images"
    if file.width > MAX_SIDE:
        return f"must have at most {MAX_SIDE} pixels a side, got {file.width}; resize the images"
    if "transparency" in file.info:
        return "must not be transparent, got a transparent colour; convert it"
    if getattr(file, "n_frames", 1) > 1:
        return f"must be one image, got {file.n_frames} frames; split or convert it"
    turned = orientation(file)
    if turned != 1:
        return f"must be upright, got EXIF orientation {turned}; tdkern dataset turns such images"
    found = (len(file.getbands()), file.height, file.width)
    if shape is not None and found != tuple(shape):
        return f"must have {first}'s shape {list(shape)}, got {list(found)}; make all alike"
    return ""


def orientation(file) -> int:
    """EXIF's orientation of an opened image: 1, upright, where nothing readable says otherwise."""
    try:
        turned = file.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block is no reason to refuse pixels
        return 1
    return turned if type(turned) is int and 1 <= turned <= 8 else 1
