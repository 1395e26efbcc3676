"""Scratch: which way of running the network is faster on this card."""
import sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).resolve().parents[1])); sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure, steps
from tdkern.networks import layers
from tdkern.networks.layers import Conv2d, GroupNorm, ResBlock
from tdkern.triton.norm_silu import group_norm_silu

tiny = measure.DEVICE == "cpu"
case = steps.Case("EDM", batch=4 if tiny else 256)
plain_conv, plain_block = Conv2d.forward, ResBlock.forward

def conv_first(self, x):
    if self.up: x = self._upsample(x)
    if self.filter_first: x = self._downsample(x)
    if self.weight is not None:
        x = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)
    return self._downsample(x) if self.filter_last else x

def norm_silu(norm, x, add=None):
    if x.is_contiguous(memory_format=torch.channels_last):
        return group_norm_silu(x, norm.groups, norm.weight, norm.bias, norm.eps, add)
    return F.silu(norm(x if add is None else x + add[:, :, None, None]))

def block_fused(self, x, emb):
    h = self.conv0(norm_silu(self.norm0, x))
    a = self.affine(emb).to(h.dtype)
    h = norm_silu(self.norm1, h, a)
    h = self.conv1(F.dropout(h, self.style.dropout, self.training))
    x = self._add(x if self.skip is None else self.skip(x), h)
    return self._add(x, self.proj(self._attend(self.norm2(x)))) if self.heads else x

net = steps.make_net(case, tiny).eval()
for p in net.parameters():
    if p.ndim > 1: torch.nn.init.normal_(p, std=0.02)
n = 8 if tiny else 32
x, sigma = torch.randn(case.batch, 3, n, n, device=measure.DEVICE), torch.linspace(.1, 10, case.batch, device=measure.DEVICE)
params = list(net.parameters())

def forward():
    with torch.no_grad(): return net(x, sigma)
def both():
    return torch.autograd.grad(net(x, sigma).sum(), params)

expected = forward()
for name, conv, block in (("now", plain_conv, plain_block), ("channels first", conv_first, plain_block), ("fused norm", plain_conv, block_fused)):
    Conv2d.forward, ResBlock.forward = conv, block
    got = forward()
    line = {"way": name, "difference": ((got - expected).norm() / expected.norm()).item()}
    line["forward"] = steps.timed(forward, 0.3)["ms"]
    if block is plain_block: line["both"] = steps.timed(both, 0.5)["ms"]
    if not tiny:
        try: line["forward in a graph"] = steps.timed(measure.captured([forward]), 0.3)["ms"]
        except Exception as e: line["graph"] = str(e)[:200]
    print(line, flush=True)
Conv2d.forward, ResBlock.forward = plain_conv, plain_block
if not tiny:
    from torch.profiler import profile, ProfilerActivity
    for name, block in (("now", plain_block), ("fused", block_fused)):
        ResBlock.forward = block
        with profile(activities=[ProfilerActivity.CUDA]) as t: forward(); torch.cuda.synchronize()
        sums = {}
        for e in t.profiler.kineto_results.events():
            if e.device_type() == torch.autograd.DeviceType.CUDA:
                d = sums.setdefault(e.name()[:90], [0, 0]); d[0] += e.duration_ns() / 1e6; d[1] += 1
        print(name, [(k, round(v[0], 2), v[1]) for k, v in sorted(sums.items(), key=lambda kv: -kv[1][0])[:14]], flush=True)
