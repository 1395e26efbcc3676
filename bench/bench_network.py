"""The U-Nets, forward and forward with backward, against the obvious build of the same network: float32, channels first, eager.

"plain" is written from the formulas with the calls that anyone would make: `group_norm`, `silu` and `conv2d`; attention as softmax(q k^T / sqrt(d)) v;
resampling as depthwise convolutions with the filter. It has our parameters, and is checked to compute the same. Without a GPU nearly all of the time is
in float32 convolutions that oneDNN runs at the speed of the machine's multiply-adds, for us and for it: there only attention can win, or bfloat16.
"""
import copy

import pytest
import torch
import torch.nn.functional as F

from tdkern.networks import DhariwalUNet, EDMPrecond, SongUNet
from tdkern.networks.layers import Conv2d, ResBlock


class PlainConv2d(Conv2d):
    def _upsample(self, x):
        weight = (4 * self.resample_filter).repeat(x.shape[1], 1, 1, 1)
        return F.conv_transpose2d(x, weight, stride=2, padding=self.filter_padding, groups=x.shape[1])

    def _downsample(self, x):
        return F.conv2d(x, self.resample_filter.repeat(x.shape[1], 1, 1, 1), stride=2, padding=self.filter_padding, groups=x.shape[1])


class PlainResBlock(ResBlock):
    def _attend(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0] * self.heads, x.shape[1] // self.heads, 3, -1).unbind(2)  # each [B heads, C / heads, HW]
        weight = (q.transpose(1, 2) @ k / k.shape[1] ** 0.5).softmax(2)  # [B heads, HW, HW]
        return (v @ weight.transpose(1, 2)).reshape(x.shape)


def plain(net):
    net = copy.deepcopy(net)
    for module in net.modules():
        module.__class__ = {Conv2d: PlainConv2d, ResBlock: PlainResBlock}.get(type(module), type(module))
    return net


NETWORKS = {
    "DDPM++": lambda: SongUNet(32, 3, 3, model_channels=64, channel_mult=[2, 2, 2], num_blocks=1, dropout=0),
    "ADM": lambda: DhariwalUNet(32, 3, 3, model_channels=64, channel_mult=[1, 2, 2], num_blocks=1, dropout=0),
}
BATCH = 8


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("part", ["forward", "forward+backward"])
@pytest.mark.parametrize("competitor", ["tdkern", "tdkern, torch.compile", "tdkern, bfloat16", "plain"])
def bench_network(compare, network, part, competitor):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = EDMPrecond(NETWORKS[network]()).to(device)
    for parameter in net.parameters():  # newly made, the last layers are zero
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    x, sigma = torch.randn(BATCH, 3, 32, 32, device=device), torch.linspace(0.1, 10, BATCH, device=device)
    expected = net(x, sigma)
    if competitor == "plain":
        net = plain(net)
        torch.testing.assert_close(net(x, sigma), expected, atol=1e-4, rtol=1e-4)
    elif competitor == "tdkern, torch.compile":
        net = torch.compile(net, fullgraph=True)
    elif competitor == "tdkern, bfloat16":
        net.dtype = torch.bfloat16
    parameters, upstream = list(net.parameters()), torch.ones_like(expected)

    def step():
        if part == "forward":
            with torch.no_grad():
                net(x, sigma)
        else:
            torch.autograd.grad(net(x, sigma), parameters, upstream)
        if device == "cuda":
            torch.cuda.synchronize()

    # Read every parameter and, in the backward pass, again, and write its gradient; activations could stay in a cache.
    size = sum(parameter.numel() for parameter in parameters)
    compare("network", f"{network} {part} {BATCH}x3x32x32", competitor, step, moved=4 * size * (1 if part == "forward" else 3))
