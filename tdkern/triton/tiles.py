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
def place_of(tiles, blocks):
    """This program's block of channels and tile of pixels, and its image, of 64 bits: with it,
    what lies behind 2^31 elements is found.
    """
    program = tl.program_id(0)
    return program % blocks, program // blocks % tiles, (program // blocks // tiles).to(tl.int64)


@triton.jit
def tile_of(
    x,
    add,
    image,
    first_row,
    first_column,
    pixels,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x + add of a tile in float32, 0 outside; where its elements lie, and which are there."""
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    inside = (row < pixels) & (column < channels)
    at = (image * pixels + row) * channels + column
    values = tl.load(x + at, inside, other=0.0).to(tl.float32)
    if add is not None:
        more = tl.load(add + image * channels + column, column < channels, other=0.0)
        values = tl.where(inside, values + more.to(tl.float32), 0.0)
    return values, at, inside


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
