"""Group normalisation, with silu or without, channels last, and its gradients.

It takes one reading for the sums and one for the result, where PyTorch brings the image into
channels first and back, in nine passes over memory. The backward pass computes it again from its
input, in two readings of input and upstream gradient.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import COLUMNS, COUNTS, OPTIONS, ROWS, Grid, tile_of

SUMS = 256  # of channels in tiles that a kernel of one warp holds at a time; more would spill
ONE_WARP = {"num_warps": 1, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=COUNTS)
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
    values, _, inside, image, tile, column = tile_of(
        x, add, pixels, channels, tiles, blocks, ROWS, COLUMNS
    )
    count = tl.minimum(pixels - tile * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(values, 0) / count
    away = tl.where(inside, values - mean[None, :], 0.0)
    to = (image * tiles + tile) * channels + column
    tl.store(means + to, mean, column < channels)
    tl.store(squares + to, tl.sum(away * away, 0), column < channels)


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
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
    values, at, inside, image, _, column = tile_of(
        x, add, pixels, channels, tiles, blocks, ROWS, COLUMNS
    )
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
def _gradient(
    x,
    add,
    upstream,
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
    """Of a tile: the gradient of the normalised and weighted input, that input normalised, both 0
    outside; weight and inverse of its columns; where it lies.
    """
    values, at, inside, image, _, column = tile_of(
        x, add, pixels, channels, tiles, blocks, ROWS, COLUMNS
    )
    there = column < channels
    group = image * groups + column // (channels // groups)
    mean = tl.load(mean_of + group, there, other=0.0)
    inverse = tl.load(inverse_of + group, there, other=0.0)
    scale = tl.load(weight + image * weight_row + column, there, other=0.0).to(tl.float32)
    hat = tl.where(inside, (values - mean[None, :]) * inverse[None, :], 0.0)
    gradient = tl.load(upstream + at, inside, other=0.0).to(tl.float32)
    if SILU:
        shift = tl.load(bias + image * weight_row + column, there, other=0.0).to(tl.float32)
        normal = hat * scale[None, :] + shift[None, :]
        sigmoid = 1 / (1 + tl.exp(-normal))
        gradient = gradient * (sigmoid * (1 + normal * (1 - sigmoid)))
    return gradient, hat, scale, inverse, group, column, at, inside


@triton.jit(do_not_specialize=COUNTS)
def backward_sums_kernel(
    x,
    add,
    upstream,
    mean_of,
    inverse_of,
    weight,
    bias,
    weight_row,
    pixels,
    channels,
    tiles,
    of_gradient,
    of_product,
    of_hat,
    blocks,
    groups,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of each channel in each tile: the sums of the gradient, of its product with the normalised
    input, and of that input.
    """
    gradient, hat, _, _, _, column, _, _ = _gradient(
        x,
        add,
        upstream,
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
        SILU,
        ROWS,
        COLUMNS,
    )
    to = tl.program_id(0).to(tl.int64) // blocks * channels + column
    there = column < channels
    tl.store(of_gradient + to, tl.sum(gradient, 0), there)
    tl.store(of_product + to, tl.sum(gradient * hat, 0), there)
    tl.store(of_hat + to, tl.sum(hat, 0), there)


@triton.jit(do_not_specialize=COUNTS)
def backward_groups_kernel(
    of_gradient,
    of_product,
    of_hat,
    inverse_of,
    weight,
    weight_row,
    first_of,
    second_of,
    of_weight,
    of_bias,
    of_add,
    pixels,
    channels,
    tiles,
    groups,
    TILES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Of each group: the means of weight g and of weight g hat. Of each of its channels: the
    gradients of weight, bias and what was added.
    """
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    size = channels // groups
    tile, place = tl.arange(0, TILES)[:, None], tl.arange(0, SIZE)
    column, there = group * size + place, place < size
    at = (image * tiles + tile) * channels + column[None, :]
    gradient = tl.zeros((SIZE,), tl.float32)
    product = tl.zeros((SIZE,), tl.float32)
    hat = tl.zeros((SIZE,), tl.float32)
    for start in range(0, tiles, TILES):
        inside = (start + tile < tiles) & there[None, :]
        here = at + start * channels
        gradient += tl.sum(tl.load(of_gradient + here, inside, other=0.0), 0)
        product += tl.sum(tl.load(of_product + here, inside, other=0.0), 0)
        hat += tl.sum(tl.load(of_hat + here, inside, other=0.0), 0)
    scale = tl.load(weight + image * weight_row + column, there, other=0.0).to(tl.float32)
    total = (pixels * size).to(tl.float32)
    first, second = tl.sum(scale * gradient, 0) / total, tl.sum(scale * product, 0) / total
    tl.store(first_of + program, first)
    tl.store(second_of + program, second)
    to = image * channels + column
    tl.store(of_weight + to, product, there)
    tl.store(of_bias + to, gradient, there)
    added = tl.load(inverse_of + program) * (scale * gradient - pixels * first - hat * second)
    tl.store(of_add + to, added, there)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    x,
    add,
    upstream,
    mean_of,
    inverse_of,
    weight,
    bias,
    weight_row,
    pixels,
    channels,
    tiles,
    first_of,
    second_of,
    dx,
    blocks,
    groups,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of the gradient of x."""
    gradient, hat, scale, inverse, group, column, at, inside = _gradient(
        x,
        add,
        upstream,
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
        SILU,
        ROWS,
        COLUMNS,
    )
    there = column < channels
    first = tl.load(first_of + group, there, other=0.0)
    second = tl.load(second_of + group, there, other=0.0)
    result = inverse[None, :] * (scale[None, :] * gradient - first[None, :] - hat * second[None, :])
    tl.store(dx + at, result.to(dx.dtype.element_ty), inside)


def held(grid: Grid, groups: int) -> tuple[int, int]:
    """How many tiles, and channels of a group, one warp holds at a time."""
    size = triton.next_power_of_2(grid.channels // groups)
    return max(1, SUMS // size), size


def row_of(grid: Grid, weight: Tensor) -> int:
    """How far an image's weights lie behind those of the image before."""
    return grid.channels if weight.ndim == 2 else 0


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """silu(group_norm(x + add)), or without silu, in float32 from x's dtype to x's dtype.

    Args:
        x: [B, C, H, W] float32, bfloat16 or float16, contiguous in channels last.
        groups: of C / groups channels.
        weight, bias: [C], or [B, C] for one of each image; contiguous.
        eps: added to the variance.
        add: [B, C], contiguous, added to every pixel before; or None.
        silu: whether silu follows.

    Returns:
        [B, C, H, W] like x, and [2, B, groups] float32: the means and 1 / sqrt(variance + eps).

    No gradient. Deterministic. No host synchronisation.
    """
    y, grid = torch.empty_like(x), Grid.of(x)
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    statistics = new(2, grid.batch, groups)
    if x.numel() == 0:
        return y, statistics
    means, squares = new(2, grid.batch, grid.tiles, grid.channels)
    counts = (grid.pixels, grid.channels, grid.tiles)
    with torch.cuda.device_of(x):
        sums_kernel[grid.programs](
            x, add, means, squares, *counts, grid.blocks, ROWS, COLUMNS, **OPTIONS
        )
        groups_kernel[(grid.batch * groups,)](
            means, squares, *statistics, *counts, groups, eps, *held(grid, groups), ROWS, **ONE_WARP
        )
        result_kernel[grid.programs](
            x,
            add,
            y,
            *statistics,
            weight,
            bias,
            row_of(grid, weight),
            *counts,
            grid.blocks,
            groups,
            silu,
            ROWS,
            COLUMNS,
            **OPTIONS,
        )
    return y, statistics


class Gradients(NamedTuple):
    """Of `group_norm`, for one upstream gradient."""

    x: Tensor  # like x
    weight: Tensor  # [B, C] float32, as those below
    bias: Tensor
    add: Tensor  # also where nothing is added


def group_norm_backward(
    upstream: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    add: Tensor | None,
    silu: bool,
) -> Gradients:
    """The gradients of `group_norm`, whose arguments and statistics these are.

    upstream: like x. With hat the normalised input and g = upstream silu'(hat weight + bias), dx =
    inverse (weight g - m1 - hat m2), m1 and m2 being the group's means of weight g and weight g
    hat. Deterministic. No host synchronisation.
    """
    dx, grid = torch.empty_like(x), Grid.of(x)
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    of_weight, of_bias, of_add = new(3, grid.batch, grid.channels)
    if x.numel() == 0:
        return Gradients(dx, of_weight.zero_(), of_bias.zero_(), of_add.zero_())
    sums = new(3, grid.batch, grid.tiles, grid.channels)
    moments = new(2, grid.batch, groups)
    counts, row = (grid.pixels, grid.channels, grid.tiles), row_of(grid, weight)
    given = (x, add, upstream, *statistics, weight, bias, row, *counts)
    with torch.cuda.device_of(x):
        backward_sums_kernel[grid.programs](
            *given, *sums, grid.blocks, groups, silu, ROWS, COLUMNS, **OPTIONS
        )
        backward_groups_kernel[(grid.batch * groups,)](
            *sums,
            statistics[1],
            weight,
            row,
            *moments,
            of_weight,
            of_bias,
            of_add,
            *counts,
            groups,
            *held(grid, groups),
            **ONE_WARP,
        )
        backward_kernel[grid.programs](
            *given, *moments, dx, grid.blocks, groups, silu, ROWS, COLUMNS, **OPTIONS
        )
    return Gradients(dx, of_weight, of_bias, of_add)
