"""Triton's kernels of a U-Net against float64."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from helpers import aot
from helpers.cases import BF16, F16, F32, F64, device_of
from tdkern.networks import DhariwalUNet, EDMPrecond, SongUNet, half
from tdkern.networks.layers import GroupNorm, ResBlock
from tdkern.ops import _backends

pytestmark = pytest.mark.skipif(
    bool(_backends.MISSING["triton"]), reason=_backends.MISSING["triton"]
)
# more tiles than groups_kernel holds at a time
SHAPES = [
    (2, 8, 3, 5),
    (1, 96, 8, 8),
    (3, 128, 16, 16),
    (2, 36, 1, 1),
    (2, 192, 9, 9),
    (0, 8, 4, 4),
    (1, 8, 72, 71),
]
EPS = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("extra", ["plain", "added", "of each image", "far from 0", "no silu"])
def test_group_norm(shape, dtype, extra):
    from tdkern.triton import unet

    draw, x = drawn(shape, dtype)
    batch, channels = shape[:2]
    x = x + 30 if extra == "far from 0" else x
    add = draw(batch, channels) if extra == "added" else None
    each = (batch, channels) if extra == "of each image" else (channels,)
    weight, bias = 1 + draw(*each).float() / 2, draw(*each).float()
    groups = min(32, channels // 4)
    got = unet.group_norm(x, groups, weight, bias, 1e-5, add, extra != "no silu")
    wide = x.double() if add is None else x.double() + add.double()[:, :, None, None]
    normal = F.group_norm(wide, groups, eps=1e-5)
    scale, shift = (t.double().reshape(-1, channels, 1, 1) for t in (weight, bias))
    expected = normal * scale + shift
    check(got, x, expected if extra == "no silu" else F.silu(expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("scale", [1, 0.5**0.5])
def test_branch_sum(shape, dtype, scale):
    from tdkern.triton import unet

    draw, x = drawn(shape, dtype)
    branch, bias = draw(*shape).contiguous(memory_format=torch.channels_last), draw(shape[1])
    expected = x.double() + branch.double() + bias.double()[:, None, None]
    check(unet.branch_sum(x, branch, bias, scale), x, expected * scale)


def drawn(shape, dtype):
    """A function that draws a tensor of a size, and an image of `shape`, channels last."""
    device, random = device_of("triton"), torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=random, dtype=F64).to(device, dtype)
    return draw, draw(*shape).contiguous(memory_format=torch.channels_last)


def check(got, x, expected):
    """That an image is like x in all but its values, which are rounded once."""
    assert got.dtype == x.dtype and got.shape == x.shape
    assert got.stride() == torch.empty_like(x).stride()
    eps = EPS[x.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("make", [SongUNet, DhariwalUNet], ids=lambda make: make.__name__)
def test_a_network_without_gradients_loses_no_more_in_these_kernels(make, monkeypatch):
    """Against float32: a normalisation and its silu are rounded once in one kernel, not twice, and
    so are a branch, its bias and what it is added to.
    """
    torch.manual_seed(0)
    device = device_of("triton")
    model = make(
        16, 3, 3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8]
    )
    net = EDMPrecond(model).to(device).eval()
    for parameter in net.parameters():  # newly made, the last layers are zero
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    x = torch.randn(4, 3, 16, 16, device=device)
    sigma = torch.tensor([0.1, 0.5, 2, 9], device=device)
    calls = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("group_norm", "branch_sum"):
        monkeypatch.setattr(half, name, counted(name, getattr(half, name)))
    with torch.no_grad():
        expected = net(x, sigma, raw=True)
        assert not calls  # float32
        net.dtype = BF16
        results = []
        for fuses in (False, True):
            monkeypatch.setattr(half, "fuses", lambda x, fuses=fuses: fuses)
            results.append(net(x, sigma, raw=True).float())
    away = [(result - expected).norm().item() for result in results]
    norms = sum(isinstance(module, GroupNorm) for module in net.modules())
    branches = sum(1 + bool(block.heads) for block in net.modules() if isinstance(block, ResBlock))
    assert calls == {"group_norm": norms, "branch_sum": branches}
    assert results[0].ne(results[1]).any()
    assert away[1] < 1.1 * away[0] < 0.05 * expected.norm().item()


def test_torchs_default_dtype_changes_nothing():
    from tdkern.triton import unet

    x = torch.randn(1, 8, 5, 5, device=device_of("triton"))
    x = x.contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)
    expected = unet.group_norm(x, 2, one, zero, 1e-5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(unet.group_norm(x, 2, one, zero, 1e-5), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_are_not_fused():
    """The kernel has none, so a network that may need them does not run it."""
    x = torch.zeros(1, 8, 2, 2, dtype=BF16, device=device_of("triton"))
    assert not half.fuses(x)
    assert not half.fuses(x.float())
    with torch.no_grad():
        assert half.fuses(x) == x.is_cuda


@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_unet_ahead_of_time(capability):
    """Every kernel compiles to a cubin for the architecture, without a GPU, and spills nothing."""
    report = {
        name: facts for name, facts in aot.report(capability).items() if name.startswith("unet")
    }
    assert len(report) == 16
    assert all(
        facts["stack"] == facts["local"] == 0 and facts["registers"] <= 128
        for facts in report.values()
    ), report
