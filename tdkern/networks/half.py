"""Where a network's channels lie in memory, and what is one kernel in half precision.

On a CPU, in float32 as in half precision, channels last spares oneDNN two passes over the images
of each convolution: on an Intel Xeon a step of a small U-Net takes 4 to 8 % less time.

On an H100, with DDPM++ and 256 images of 32x32 in bfloat16 (bench/results, "network"), forward and
backward took 222 ms channels last and 186 ms channels first, since PyTorch's group normalisation on
CUDA takes channels first alone. In kernels of our own (`triton.group_norm`, `triton.branch_sum`) it
stays channels last, as the convolutions want it: the forward pass took 49 ms where it took 76.
Where they cannot run, a GPU trains channels first.
"""

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from ..ops import _modes
from ..ops._backends import MISSING


def fuses(x: Tensor) -> bool:
    """Whether what stands between two convolutions of x is one kernel.

    torch.compile fuses by itself, and what watches operations sees PyTorch's own.
    """
    return x.is_cuda and x.dtype.itemsize == 2 and not MISSING["triton"] and _modes.unwatched(x)


def image_format(x: Tensor) -> torch.memory_format:
    """The memory format of convolutions' weights, and so of the images between them."""
    if x.dtype == torch.float64 or (x.dtype == torch.float32 and x.device.type != "cpu"):
        return torch.preserve_format
    by_torch = x.is_cuda and not torch.compiler.is_compiling() and not fuses(x)
    return torch.contiguous_format if by_torch else torch.channels_last


# ---- group normalisation


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
    """`triton.group_norm`, of an x that lies in memory as it may; with gradients."""
    x = x.contiguous(memory_format=torch.channels_last)
    add = add if add is None else add.contiguous()
    return _GroupNorm.apply(x, groups, weight.contiguous(), bias.contiguous(), eps, add, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, add, silu):
        from ..triton.group_norm import group_norm

        y, statistics = group_norm(x, groups, weight, bias, eps, add, silu)
        ctx.save_for_backward(x, weight, bias, add, statistics)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, upstream):
        x, weight, bias, add, statistics = ctx.saved_tensors
        # Where the gradient is differentiated again, or one upstream gradient stands for many.
        if torch.is_grad_enabled() or _modes.batched(upstream):
            plain = partial(_plain_group_norm, groups=ctx.groups, eps=ctx.eps, silu=ctx.silu)
            dx, dweight, dbias, dadd = _by_torch(plain, (x, weight, bias, add), upstream)
            return dx, None, dweight, dbias, None, dadd, None
        from ..triton.group_norm import group_norm_backward

        # x too: what keeps saved tensors elsewhere may lay them out anew
        upstream, x = (t.contiguous(memory_format=torch.channels_last) for t in (upstream, x))
        dx, dweight, dbias, dadd = group_norm_backward(
            upstream, x, ctx.groups, weight, bias, statistics, add, ctx.silu
        )
        if weight.ndim == 1:
            dweight, dbias = dweight.sum(0), dbias.sum(0)
        dadd = None if add is None else dadd.to(add.dtype)
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None, dadd, None


def _plain_group_norm(x, weight, bias, add, groups, eps, silu):
    wide = x.float() if add is None else x.float() + add.float()[:, :, None, None]
    scale, shift = (t.float().reshape(-1, x.shape[1], 1, 1) for t in (weight, bias))
    # not F.group_norm, whose backward pass has no rule for batched gradients
    away = wide.unflatten(1, (groups, -1))
    away = away - away.mean((2, 3, 4), keepdim=True)
    hat = away * (away.square().mean((2, 3, 4), keepdim=True) + eps).rsqrt()
    y = hat.flatten(1, 2) * scale + shift
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


# ---- a branch's end


def branch_sum(x: Tensor, branch: Tensor, biases: Sequence[Tensor], scale: float) -> Tensor:
    """`triton.branch_sum` with the sum of the biases, of images that lie as they may; with
    gradients.
    """
    x, branch = (t.contiguous(memory_format=torch.channels_last) for t in (x, branch))
    return _BranchSum.apply(x, branch, reduce(torch.add, biases).contiguous(), scale)


class _BranchSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, bias, scale):
        from ..triton.branch_sum import branch_sum

        ctx.scale, ctx.bias_dtype = scale, bias.dtype
        return branch_sum(x, branch, bias, scale)

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled() or _modes.batched(upstream):
            dx = upstream * ctx.scale
            dbias = dx.float().sum((0, 2, 3))
        else:
            from ..triton.branch_sum import branch_sum_backward

            upstream = upstream.contiguous(memory_format=torch.channels_last)
            dx, dbias = branch_sum_backward(upstream, ctx.scale)
        return dx, dx, dbias.to(ctx.bias_dtype), None


def _by_torch(function, inputs, upstream):
    """The gradients of function(*inputs), by differentiating it; where gradients are enabled they
    can be differentiated again.
    """
    given = [each for each in inputs if each is not None and each.requires_grad]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = function(*inputs)
    found = iter(torch.autograd.grad(y, given, upstream, create_graph=again))
    return [next(found) if each is not None and each.requires_grad else None for each in inputs]
