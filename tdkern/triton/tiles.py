"""Images in channels last as tiles of pixels and channels: what the kernels of a U-Net share."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64  # pixels and channels of a tile
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# A kernel is not compiled anew for these, of which a network has many; whether packs of channels
# are aligned shows in the number of channels alone.
COUNTS = ["pixels", "tiles", "blocks", "groups"]


@triton.jit
def tile_of(
    x,
    add,
    pixels,
    channels,
    tiles,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """This program's tile of x + add in float32, 0 outside; where its elements lie, and which are
    there; its image, its number there and its channels. The image is of 64 bits: with it, what lies
    behind 2^31 elements is found.
    """
    program = tl.program_id(0)
    image, tile = (program // blocks // tiles).to(tl.int64), program // blocks % tiles
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    there = (column < channels)[None, :]
    inside = (row < pixels) & there
    at = (image * pixels + row) * channels + column[None, :]
    values = tl.load(x + at, inside, other=0.0).to(tl.float32)
    if add is not None:
        more = tl.load(add + image * channels + column[None, :], there, other=0.0)
        values = tl.where(inside, values + more.to(tl.float32), 0.0)
    return values, at, inside, image, tile, column


class Grid(NamedTuple):
    """The tiles of images [B, C, H, W]."""

    batch: int
    channels: int
    pixels: int
    tiles: int  # of an image, each of ROWS pixels
    blocks: int  # each of COLUMNS channels

    @classmethod
    def of(cls, x: Tensor) -> "Grid":
        batch, channels, height, width = x.shape
        pixels = height * width
        tiles, blocks = triton.cdiv(pixels, ROWS), triton.cdiv(channels, COLUMNS)
        return cls(batch, channels, pixels, tiles, blocks)

    @property
    def programs(self) -> tuple[int]:
        return (self.batch * self.tiles * self.blocks,)
