"""The U-Nets, forward and forward with backward, against the obvious build of the same network:
float32, channels first, eager.

"plain" is written from the formulas with the calls that anyone would make: `group_norm`, `silu`,
`dropout` and `conv2d`; attention as softmax(q k^T / sqrt(d)) v; resampling as depthwise
convolutions with the filter. It has our parameters, and is checked to compute the same. Without a
GPU nearly all of the time is in float32 convolutions that oneDNN runs at the speed of the machine's
multiply-adds, for us and for it.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, compiled, name, of_device

from tdkern.networks import DhariwalUNet, EDMPrecond, SongUNet
from tdkern.networks.layers import Conv2d, GroupNorm, ResBlock


class PlainConv2d(Conv2d):
    def forward(self, x):
        x = x.contiguous()  # the image alone is not
        if self.up:
            x = self._upsample(x)
        if self.filter_first:
            x = self._downsample(x)
        if self.weight is not None:
            x = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)
        return self._downsample(x) if self.filter_last else x

    def _upsample(self, x):
        weight = (4 * self.resample_filter).to(x.dtype).repeat(x.shape[1], 1, 1, 1)
        return F.conv_transpose2d(
            x, weight, stride=2, padding=self.filter_padding, groups=x.shape[1]
        )

    def _downsample(self, x):
        return F.conv2d(
            x,
            self.resample_filter.to(x.dtype).repeat(x.shape[1], 1, 1, 1),
            stride=2,
            padding=self.filter_padding,
            groups=x.shape[1],
        )


class PlainGroupNorm(GroupNorm):
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.groups, weight, bias, self.eps)

    def silu(self, x):
        return F.silu(self(x))


class PlainResBlock(ResBlock):
    def forward(self, x, emb):
        h = self.conv0(self.norm0.silu(x))
        a = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.style.scale_shift:
            scale, shift = a.chunk(2, 1)
            h = F.silu(shift + self.norm1(h) * (scale + 1))
        else:
            h = self.norm1.silu(h + a)
        h = self.conv1(F.dropout(h, self.style.dropout, self.training))
        x = h + (x if self.skip is None else self.skip(x))
        x = x * self.style.skip_scale
        if self.heads:
            x = (self.proj(self._attend(self.norm2(x))) + x) * self.style.skip_scale
        return x

    def _attend(self, x):
        # each [B heads, C / heads, HW]
        q, k, v = (
            self.qkv(x).reshape(x.shape[0] * self.heads, x.shape[1] // self.heads, 3, -1).unbind(2)
        )
        weight = (q.transpose(1, 2) @ k / k.shape[1] ** 0.5).softmax(2)  # [B heads, HW, HW]
        return (v @ weight.transpose(1, 2)).reshape(x.shape)


PLAIN = {Conv2d: PlainConv2d, GroupNorm: PlainGroupNorm, ResBlock: PlainResBlock}


def make_plain(net):
    for module in net.modules():
        module.__class__ = PLAIN.get(type(module), type(module))


WIDTH, SHAPE = of_device(
    tiny=(8, (2, 3, 8, 8)), cpu=(64, (8, 3, 32, 32)), cuda=(128, (64, 3, 32, 32))
)
SHARED = {
    "img_resolution": SHAPE[-1],
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": WIDTH,
    "num_blocks": 1,
    "dropout": 0,
}
NETWORKS = {
    "DDPM++": lambda: SongUNet(channel_mult=[2, 2, 2], **SHARED),
    "ADM": lambda: DhariwalUNet(channel_mult=[1, 2, 2], **SHARED),
}
COMPETITORS = [
    (network, competitor)
    for network in NETWORKS
    for competitor in ("tdkern", "tdkern, bfloat16", "plain")
]


@pytest.mark.parametrize("part", ["forward", "forward+backward"])
# the last one compiles for minutes
@pytest.mark.parametrize("network, competitor", [*COMPETITORS, ("DDPM++", "tdkern, torch.compile")])
def bench_network(compare, network, competitor, part):
    def make():
        torch.manual_seed(0)
        net = EDMPrecond(NETWORKS[network]()).to(DEVICE)
        for parameter in net.parameters():  # newly made, the last layers are zero
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(SHAPE, device=DEVICE)
        sigma = torch.linspace(0.1, 10, SHAPE[0], device=DEVICE)
        expected, parameters = net(x, sigma), list(net.parameters())
        net.dtype = torch.bfloat16 if competitor == "tdkern, bfloat16" else None
        if competitor == "plain":
            make_plain(net)
            torch.testing.assert_close(net(x, sigma), expected, atol=1e-4, rtol=1e-4)
        call = compiled(net) if competitor == "tdkern, torch.compile" else net
        if part == "forward":
            return torch.no_grad()(lambda: call(x, sigma))
        return lambda: torch.autograd.grad(call(x, sigma), parameters, torch.ones_like(x))

    compare(f"{network} {part}", name(SHAPE), competitor, make, moved=None, rotate=False)
