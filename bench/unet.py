"""The parameter list of a U-Net of 50 million parameters, for the ops that work on whole lists."""

import math

from measure import TINY


def unet_shapes() -> list[tuple[int, ...]]:
    """Shapes in the order of a forward pass: widths 128 to 512, three blocks on each level,
    attention at the second; 354 tensors.
    """
    shapes = []

    def conv(out: int, inp: int, kernel: int = 3) -> None:
        shapes.extend([(out, inp, kernel, kernel), (out,)])

    def norm(channels: int) -> None:
        shapes.extend([(channels,), (channels,)])

    def linear(out: int, inp: int) -> None:
        shapes.extend([(out, inp), (out,)])

    def block(out: int, inp: int, attention: bool = False) -> None:
        norm(inp), conv(out, inp), linear(out, 512), norm(out), conv(out, out)
        if out != inp:
            conv(out, inp, 1)
        if attention:
            norm(out), conv(3 * out, out, 1), conv(out, out, 1)

    widths, channels = (128, 256, 256, 384), 128
    linear(512, 128), linear(512, 512), conv(channels, 3)
    skips = [channels]
    for level, width in enumerate(widths):
        if level > 0:
            block(channels, channels)
            skips.append(channels)
        for _ in range(2):
            block(width, channels, level == 1)
            channels = width
            skips.append(channels)
    block(channels, channels, True), block(channels, channels)
    for level, width in reversed(list(enumerate(widths))):
        if level < 3:
            block(channels, channels)
        for _ in range(3):
            block(width, channels + skips.pop(), level == 1)
            channels = width
    norm(channels), conv(3, channels)
    return shapes[:12] if TINY else shapes


def unet_elements() -> int:
    return sum(map(math.prod, unet_shapes()))
