"""What a U-Net runs between its convolutions, channels last and without gradients: a target network
and a sampler's.

Group normalisation, with silu or without, in one reading for the sums and one for the result, for
which PyTorch brings the image into channels first and back, in nine passes over memory; and the sum
that ends a branch, with its biases and its scale.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64  # pixels and channels of a tile
SUMS = 256  # of channels in tiles that groups_kernel, one warp, holds at a time; more would spill
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
ONE_WARP = {"num_warps": 1, "enable_fp_fusion": True}


@triton.jit
def _tile(
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


@triton.jit
def sums_kernel(
    x,
    add,
    means,
    squares,
    pixels,
    channels,
    tiles,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of each channel in each tile: the mean, and the sum of squares about it."""
    program = tl.program_id(0).to(tl.int64)
    block, tile, image = program % blocks, program // blocks % tiles, program // blocks // tiles
    values, _, inside = _tile(
        x, add, image, tile * ROWS, block * COLUMNS, pixels, channels, ROWS, COLUMNS
    )
    count = tl.minimum(pixels - tile * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(values, 0) / count
    away = tl.where(inside, values - mean[None, :], 0.0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    to = (image * tiles + tile) * channels + column
    tl.store(means + to, mean, column < channels)
    tl.store(squares + to, tl.sum(away * away, 0), column < channels)


@triton.jit
def groups_kernel(
    means,
    squares,
    mean_of,
    inverse_of,
    pixels,
    channels,
    tiles,
    groups,
    eps,
    TILES: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of each group: the mean, and 1 / sqrt(variance + eps)."""
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    size = channels // groups
    tile, place = tl.arange(0, TILES)[:, None], tl.arange(0, SIZE)[None, :]
    at = (image * tiles + tile) * channels + group * size + place
    total = (pixels * size).to(tl.float32)
    values = tl.zeros((TILES, SIZE), tl.float32)
    for start in range(0, tiles, TILES):
        inside = (start + tile < tiles) & (place < size)
        count = tl.minimum(pixels - (start + tile) * ROWS, ROWS).to(tl.float32)
        values += count * tl.load(means + at + start * channels, inside, other=0.0)
    mean = tl.sum(tl.sum(values, 1), 0) / total
    values = tl.zeros((TILES, SIZE), tl.float32)
    for start in range(0, tiles, TILES):
        inside = (start + tile < tiles) & (place < size)
        count = tl.minimum(pixels - (start + tile) * ROWS, ROWS).to(tl.float32)
        away = tl.load(means + at + start * channels, inside, other=0.0) - mean
        square = tl.load(squares + at + start * channels, inside, other=0.0)
        values += square + tl.where(inside, count * away * away, 0.0)
    variance = tl.sum(tl.sum(values, 1), 0) / total
    tl.store(mean_of + program, mean)
    tl.store(inverse_of + program, 1 / tl.sqrt(variance + eps))


@triton.jit
def result_kernel(
    x,
    add,
    y,
    mean_of,
    inverse_of,
    weight,
    bias,
    weight_row,
    pixels,
    channels,
    tiles,
    blocks,
    groups,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of y = (x + add - mean) inverse weight + bias, or of its silu."""
    program = tl.program_id(0).to(tl.int64)
    block, tile, image = program % blocks, program // blocks % tiles, program // blocks // tiles
    values, at, inside = _tile(
        x, add, image, tile * ROWS, block * COLUMNS, pixels, channels, ROWS, COLUMNS
    )
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    there = column < channels
    group = image * groups + column // (channels // groups)
    mean = tl.load(mean_of + group, there, other=0.0)
    inverse = tl.load(inverse_of + group, there, other=0.0)
    scale = inverse * tl.load(weight + image * weight_row + column, there, other=0.0).to(tl.float32)
    shift = tl.load(bias + image * weight_row + column, there, other=0.0).to(tl.float32)
    result = (values - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        result = result / (1 + tl.exp(-result))
    tl.store(y + at, result.to(y.dtype.element_ty), inside)


@triton.jit
def branch_sum_kernel(
    x,
    branch,
    bias,
    y,
    rows,
    channels,
    blocks,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of y = (x + branch + bias) scale; the rows are the pixels of all images."""
    program = tl.program_id(0).to(tl.int64)
    first_row, first_column = program // blocks * ROWS, program % blocks * COLUMNS
    values, at, inside = _tile(x, bias, 0, first_row, first_column, rows, channels, ROWS, COLUMNS)
    total = values + tl.load(branch + at, inside, other=0.0).to(tl.float32)
    tl.store(y + at, (total * scale).to(y.dtype.element_ty), inside)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(group_norm(x + add)), or without silu, in float32 from x's dtype to x's dtype.

    Args:
        x: [B, C, H, W] float32, bfloat16 or float16, contiguous in channels last.
        groups: of C / groups channels.
        weight, bias: [C], or [B, C] for one of each image; contiguous.
        eps: added to the variance.
        add: [B, C] in x's dtype, contiguous, added to every pixel before; or None.
        silu: whether silu follows.

    Returns:
        [B, C, H, W] like x.

    No gradient. Deterministic. No host synchronisation.
    """
    batch, channels, height, width = x.shape
    pixels, y = height * width, torch.empty_like(x)
    if x.numel() == 0:
        return y
    tiles, blocks = triton.cdiv(pixels, ROWS), triton.cdiv(channels, COLUMNS)
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    means, squares = new(2, batch, tiles, channels)
    mean_of, inverse_of = new(2, batch, groups)
    grid, counts = (batch * tiles * blocks,), (pixels, channels, tiles)
    size = triton.next_power_of_2(channels // groups)
    tiles_at_once = min(triton.next_power_of_2(tiles), max(1, SUMS // size))
    weights = (weight, bias, channels if weight.ndim == 2 else 0)
    with torch.cuda.device_of(x):
        sums_kernel[grid](x, add, means, squares, *counts, blocks, ROWS, COLUMNS, **OPTIONS)
        sums = (means, squares, mean_of, inverse_of)
        held = (tiles_at_once, size, ROWS)
        groups_kernel[(batch * groups,)](*sums, *counts, groups, eps, *held, **ONE_WARP)
        statistics, shape = (mean_of, inverse_of), (*counts, blocks, groups)
        result_kernel[grid](
            x, add, y, *statistics, *weights, *shape, silu, ROWS, COLUMNS, **OPTIONS
        )
    return y


def branch_sum(x: Tensor, branch: Tensor, bias: Tensor, scale: float) -> Tensor:
    """(x + branch + bias) scale, in float32 from x's dtype to x's dtype.

    Args:
        x, branch: [B, C, H, W] float32, bfloat16 or float16, contiguous in channels last.
        bias: [C], contiguous.
        scale: of the sum.

    Returns:
        [B, C, H, W] like x.

    No gradient. Deterministic. No host synchronisation.
    """
    batch, channels, height, width = x.shape
    rows, y = batch * height * width, torch.empty_like(x)
    if x.numel() == 0:
        return y
    blocks = triton.cdiv(channels, COLUMNS)
    with torch.cuda.device_of(x):
        branch_sum_kernel[(triton.cdiv(rows, ROWS) * blocks,)](
            x, branch, bias, y, rows, channels, blocks, scale, ROWS, COLUMNS, **OPTIONS
        )
    return y
