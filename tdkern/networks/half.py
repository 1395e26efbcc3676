"""Where a network's channels lie in memory, and what is one kernel in half precision.

On a CPU, in float32 as in half precision, channels last spares oneDNN two passes over the images
of each convolution: on an Intel Xeon a step of a small U-Net takes 4 to 8 % less time.

Measured on an H100 with DDPM++ and 256 images of 32x32 in bfloat16 (bench/results, "network"):
forward and backward take 222 ms channels last and 186 ms channels first, since PyTorch's group
normalisation on CUDA takes channels first alone; the forward pass without gradients takes 85, 76
and, channels last with silu of the normalisation in one kernel, 49 ms.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..ops._backends import MISSING


def fuses(x: Tensor) -> bool:
    """Whether what stands between two convolutions of x is one kernel (`triton.unet`).

    torch.compile fuses by itself.
    """
    eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and x.is_cuda and x.dtype.itemsize == 2 and not MISSING["triton"]


def image_format(x: Tensor) -> torch.memory_format:
    """The memory format of convolutions' weights, and so of the images between them."""
    if x.dtype == torch.float64 or (x.dtype == torch.float32 and x.device.type != "cpu"):
        return torch.preserve_format
    trains_on_cuda = x.is_cuda and not torch.compiler.is_compiling() and not fuses(x)
    return torch.contiguous_format if trains_on_cuda else torch.channels_last


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None = None,
    *,
    silu: bool = True,
) -> Tensor:
    """`triton.unet.group_norm`, of an x that lies in memory as it may."""
    from ..triton import unet

    x = x.contiguous(memory_format=torch.channels_last)
    add = add if add is None else add.contiguous()
    return unet.group_norm(x, groups, weight.contiguous(), bias.contiguous(), eps, add, silu)


def branch_sum(x: Tensor, branch: Tensor, biases: Sequence[Tensor], scale: float) -> Tensor:
    """`triton.unet.branch_sum` with the sum of the biases, of images that lie as they may."""
    from ..triton import unet

    x, branch = (t.contiguous(memory_format=torch.channels_last) for t in (x, branch))
    bias = reduce(torch.add, biases)
    return unet.branch_sum(x, branch, bias.contiguous(), scale)
