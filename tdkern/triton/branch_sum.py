"""The sum that ends a branch of a U-Net, with its bias and its scale, channels last; and its
gradients, in one pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import COLUMNS, COUNTS, OPTIONS, ROWS, Grid, tile_of


@triton.jit(do_not_specialize=COUNTS)
def branch_sum_kernel(
    x,
    branch,
    bias,
    y,
    pixels,
    channels,
    tiles,
    blocks,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of y = (x + branch + bias) scale."""
    values, at, inside, _, _, column = tile_of(
        x, None, pixels, channels, tiles, blocks, ROWS, COLUMNS
    )
    shift = tl.load(bias + column, column < channels, other=0.0).to(tl.float32)
    total = values + tl.load(branch + at, inside, other=0.0).to(tl.float32) + shift[None, :]
    tl.store(y + at, (total * scale).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=COUNTS)
def branch_sum_backward_kernel(
    upstream,
    dx,
    sums,
    pixels,
    channels,
    tiles,
    blocks,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of upstream scale, and the sum of each of its channels."""
    values, at, inside, image, tile, column = tile_of(
        upstream, None, pixels, channels, tiles, blocks, ROWS, COLUMNS
    )
    values = values * scale
    tl.store(dx + at, values.to(dx.dtype.element_ty), inside)
    to = (image * tiles + tile) * channels + column
    tl.store(sums + to, tl.sum(values, 0), column < channels)


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
    y, grid = torch.empty_like(x), Grid.of(x)
    if x.numel() > 0:
        counts = (grid.pixels, grid.channels, grid.tiles, grid.blocks)
        with torch.cuda.device_of(x):
            branch_sum_kernel[grid.programs](
                x, branch, bias, y, *counts, scale, ROWS, COLUMNS, **OPTIONS
            )
    return y


def branch_sum_backward(upstream: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of `branch_sum`: of x and of the branch, which are one, like `upstream`; and of
    the bias [C], float32.
    """
    dx, grid = torch.empty_like(upstream), Grid.of(upstream)
    sums = torch.empty(
        grid.batch * grid.tiles, grid.channels, dtype=torch.float32, device=upstream.device
    )
    if upstream.numel() > 0:
        counts = (grid.pixels, grid.channels, grid.tiles, grid.blocks)
        with torch.cuda.device_of(upstream):
            branch_sum_backward_kernel[grid.programs](
                upstream, dx, sums, *counts, scale, ROWS, COLUMNS, **OPTIONS
            )
    return dx, sums.sum(0)
