"""What the U-Nets are made of.

Weights stay in their own dtype and are cast to the activation's, so that one network runs in any
precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._modes import transformed
from . import half


class KeepsBuffers(nn.Module):
    """A module whose own buffers stay as precise as they are when the network is cast.

    They are tables of levels or frequencies; `.half()` and `.to(dtype)` cast the rest.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = self._buffers[name]
            if buffer is None or cast is None:
                continue
            if cast.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(cast.device)
        return self


@dataclass(frozen=True)
class Init:
    """Initial values of a layer.

    They are `gain` times a distribution for its weight, `bias_gain` times the same one for its
    bias.
    """

    mode: str
    gain: float = 1.0
    bias_gain: float = 0.0

    def parameters(
        self, shape: tuple[int, ...], bias: bool
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight and bias of a layer whose weight has `shape` [out, in, *kernel].

        Both have the layer's fans, which count the kernel.
        """
        fan_out, fan_in = (channels * prod(shape[2:]) for channels in shape[:2])
        draw = {
            "xavier_uniform": lambda size: (
                (6 / (fan_in + fan_out)) ** 0.5 * (2 * torch.rand(size) - 1)
            ),
            "kaiming_uniform": lambda size: (3 / fan_in) ** 0.5 * (2 * torch.rand(size) - 1),
            "kaiming_normal": lambda size: (1 / fan_in) ** 0.5 * torch.randn(size),
        }[self.mode]
        weight = nn.Parameter(self.gain * draw(shape))
        return weight, nn.Parameter(self.bias_gain * draw(shape[:1])) if bias else None


class Linear(nn.Module):
    """Fully connected layer in the activation's dtype."""

    def __init__(self, in_features: int, out_features: int, init: Init, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.weight, self.bias = init.parameters((out_features, in_features), bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class Conv2d(nn.Module):
    """Convolution with same padding, after an optional resampling by two with a separable filter.

    A kernel of 0 is the filter alone. `fused` puts the filter after the convolution when going down
    and pads once for both.
    """

    resample_filter: Tensor  # [1, 1, taps, taps], where it resamples

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        init: Init | None = None,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter=(1, 1),
        fused: bool = False,
    ):
        super().__init__()
        self.weight, self.bias = None, None
        if kernel:
            assert init is not None
            shape = (out_channels, in_channels, kernel, kernel)
            self.weight, self.bias = init.parameters(shape, True)
        self.up = up
        self.filter_first = down and not (fused and kernel)
        self.filter_last = down and fused and kernel > 0
        self.box = list(resample_filter) == [1, 1]
        padding, filter_padding = kernel // 2, (len(resample_filter) - 1) // 2
        self.padding, self.filter_padding = padding, filter_padding
        if self.filter_last:
            self.padding, self.filter_padding = padding + filter_padding, 0
        elif fused and kernel:
            self.padding = max(padding - filter_padding, 0)
            self.filter_padding = max(filter_padding - padding, 0)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        self.register_buffer(
            "resample_filter",
            (taps.outer(taps) / taps.sum() ** 2)[None, None] if up or down else None,
        )

    @property
    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """Both, of a kernel above 0."""
        assert self.weight is not None and self.bias is not None
        return self.weight, self.bias

    def forward(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        if self.up:
            x = self._upsample(x)
        if self.filter_first:
            x = self._downsample(x)
        if self.weight is not None:
            weight, bias = self.weight_and_bias
            # In half precision the cast also lays the weight out, in the same pass. A kernel of one
            # pixel or of one channel is laid out already: it is cast flat, or its gradient would
            # come with other strides than the parameter's, of which DistributedDataParallel warns.
            if 1 in weight.shape[1:]:
                weight = weight.flatten().to(x.dtype).view_as(weight)
            else:
                weight = weight.to(x.dtype, memory_format=half.image_format(x))
            added = bias.to(x.dtype) if with_bias else None
            x = F.conv2d(x, weight, added, padding=self.padding)
        return self._downsample(x) if self.filter_last else x

    def _upsample(self, x: Tensor) -> Tensor:
        if self.box:  # the filter [1, 1] repeats pixels
            return F.interpolate(x, scale_factor=2, mode="nearest")
        weight = (4 * self.resample_filter).to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(
            x, weight, stride=2, padding=self.filter_padding, groups=x.shape[1]
        )

    def _downsample(self, x: Tensor) -> Tensor:
        if self.box:  # and averages them
            return F.avg_pool2d(x, 2)
        weight = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, weight, stride=2, padding=self.filter_padding, groups=x.shape[1])


class GroupNorm(nn.Module):
    """Normalisation over groups of at least four channels, at most 32 groups.

    In the activation's dtype: torch sums a half-precision one in float32, and a copy of it in
    float32 would be most of what a step of a network in bfloat16 moves on a GPU.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if self.groups == 0 or channels % self.groups:
            raise ValueError(
                "GroupNorm: channels must be at least 4 and a multiple of the groups, "
                f"min(32, channels // 4), got {channels}"
            )
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if half.fuses(x):
            return half.group_norm(x, self.groups, self.weight, self.bias, self.eps, silu=False)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.groups, weight, bias, self.eps)

    def silu(
        self, x: Tensor, add: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """silu(norm(x + add)); (scale, shift) = modulation: silu(norm(x + add) (1 + scale) +
        shift).

        x: [B, C, H, W]; add: [B, C], modulation: [B, 2 C], both in x's dtype.
        """
        if half.fuses(x):
            weight: Tensor = self.weight
            bias: Tensor = self.bias
            if modulation is not None:
                scale, shift = modulation.float().chunk(2, 1)
                weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
            return half.group_norm(x, self.groups, weight, bias, self.eps, add)
        h = self(x if add is None else x + add[:, :, None, None])
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, 1)
            h = torch.addcmul(shift, h, 1 + scale)
        return F.silu(h)


class PositionalEmbedding(nn.Module):
    """[B] to [B, channels]: cosines, then sines, at frequencies 10000^(-j/(n/2)).

    With `endpoint` they are 10000^(-j/(n/2-1)).
    """

    def __init__(self, channels: int, endpoint: bool = False):
        super().__init__()
        self.frequencies = channels // 2
        self.last = self.frequencies - 1 if endpoint else self.frequencies

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(self.frequencies, device=x.device, dtype=x.dtype)
        angles = x.outer(10000 ** -(places / self.last))
        return torch.cat([angles.cos(), angles.sin()], 1)


class FourierEmbedding(KeepsBuffers):
    """[B] to [B, channels]: cosines, then sines, at random frequencies (arXiv 2011.13456).

    A checkpoint keeps the frequencies.
    """

    freqs: Tensor  # [channels / 2]

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = x.outer(2 * torch.pi * self.freqs.to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], 1)


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout` in training, with masks that a CPU draws three times as fast.

    One random number of 64 bits decides for four elements. So p is taken as the nearest multiple
    of 2^-16 there, and what is kept is scaled by what was taken. It draws from the global
    generator, as `F.dropout` does, but a seed gives other masks than there, and than in EDM's code.
    Under transforms it is `F.dropout`: vmap of torch before 2.13 has no rule for the view of bits.

    Args:
        x: [...], any floating dtype.
        p: probability of an element to be zeroed, in [0, 1].
    """
    zeroed = round(p * 2**16)
    drawn_here = x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
    if not drawn_here or zeroed in (0, 2**16):
        return F.dropout(x, p)
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),))
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= zeroed - 2**15
    return x * torch.where(kept, 1 / (1 - zeroed / 2**16), 0.0).to(x.dtype)


@dataclass(frozen=True)
class BlockStyle:
    """What the residual blocks of one network share, and what sets SongUNet's apart from ADM's."""

    emb_channels: int
    dropout: float
    init: Init
    init_zero: Init  # of the layers that end a branch: conv1 and proj
    init_attn: Init
    # the embedding scales and shifts the second normalisation, or is added before it
    scale_shift: bool
    skip_scale: float
    eps: float
    project_skip: bool  # a 1x1 kernel on a skip that resamples, even where channels stay
    resample_filter: tuple[float, ...] = (1, 1)


class ResBlock(nn.Module):
    """Residual block with noise conditioning, and with self-attention where `heads` is not 0.

    h = conv0(silu(norm0(x))),  a = affine(emb),  h = silu(norm1(h + a)) or, with (scale, shift) =
    a, silu(norm1(h) (1 + scale) + shift), x = (skip(x) + conv1(dropout(h))) skip_scale,  x = (x +
    proj(attention(qkv(norm2(x))))) skip_scale. x: [B, in_channels, H, W], emb: [B, emb_channels];
    returns [B, out_channels, H', W'], in x's dtype.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
    ):
        super().__init__()
        self.style = style
        self.heads = heads
        self.out_channels = out_channels
        resample: dict[str, Any] = {
            "up": up,
            "down": down,
            "resample_filter": style.resample_filter,
        }
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, style.init, **resample)
        modulation = 2 * out_channels if style.scale_shift else out_channels
        self.affine = Linear(style.emb_channels, modulation, style.init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, style.init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = int(style.project_skip or out_channels != in_channels)
            self.skip = Conv2d(in_channels, out_channels, kernel, style.init, **resample)
        if heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, style.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, style.init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # a bias is a pass of its own over its convolution's output, unless the next kernel adds it
        later = half.fuses(x)
        h = self.conv0(self.norm0.silu(x), with_bias=not later)
        bias = self.conv0.weight_and_bias[1].to(h.dtype) if later else None
        a = self.affine(emb).to(h.dtype)
        if self.style.scale_shift:
            add = None if bias is None else bias.expand(len(h), -1)
            h = self.norm1.silu(h, add, modulation=a)
        else:
            h = self.norm1.silu(h, a if bias is None else a + bias)
        h = dropout(h, self.style.dropout if self.training else 0.0)
        h = self.conv1(h, with_bias=not later)
        if self.skip is None:
            x = self._add(x, h, [self.conv1] if later else [])
        else:
            x, layers = self.skip(x, with_bias=not later), [self.conv1, self.skip]
            x = self._add(x, h, layers if later else [])
        if not self.heads:
            return x
        h = self.proj(self._attend(self.norm2(x)), with_bias=not later)
        return self._add(x, h, [self.proj] if later else [])

    def _add(self, x: Tensor, h: Tensor, layers: Sequence[Conv2d]) -> Tensor:
        """(x + h) skip_scale, in one kernel with the biases that `layers` have left to it."""
        scale = self.style.skip_scale
        if layers:
            biases = [layer.bias for layer in layers if layer.bias is not None]
            return half.branch_sum(x, h, biases, scale)
        return x + h if scale == 1 else (x + h) * scale  # x first: it has x's memory format

    def _attend(self, x: Tensor) -> Tensor:
        # A checkpoint's qkv channels are head, channel, q/k/v innermost. Its rows, which are few,
        # are put in the order q/k/v, head, channel, so that q, k and v come out contiguous, as the
        # fast attention kernels want them.
        weight, bias = self.qkv.weight_and_bias
        weight, bias = (
            p.to(x.dtype).unflatten(0, (self.heads, -1, 3)).movedim(2, 0).flatten(0, 2)
            for p in (weight.flatten(1), bias)
        )
        tokens = F.linear(x.flatten(2).transpose(1, 2), weight, bias)  # [B, HW, 3 C]
        q, k, v = tokens.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # each [B, heads, HW, C / heads]
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = tokens.transpose(1, 2).unflatten(2, x.shape[2:])  # channels last, as tokens are
        return image if x.is_contiguous(memory_format=torch.channels_last) else image.contiguous()
