"""Triton's kernels of a U-Net against float64."""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from helpers import aot
from helpers.cases import BF16, F16, F32, F64, device_of
from tdkern.networks import DhariwalUNet, EDMPrecond, SongUNet, half
from tdkern.networks.layers import GroupNorm, ResBlock
from tdkern.ops import _backends, _modes

pytestmark = pytest.mark.skipif(
    bool(_backends.MISSING["triton"]), reason=_backends.MISSING["triton"]
)
SHAPES = [(2, 8, 3, 5), (1, 96, 8, 8), (2, 36, 1, 1), (1, 192, 9, 9), (0, 8, 4, 4)]
MORE_TILES = (1, 8, 72, 71)  # than a kernel holds of its groups at a time
EPS = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}
EXTRAS = ["plain", "added", "of each image", "far from 0", "no silu"]
CASES = [*itertools.product(SHAPES, EPS, EXTRAS), (MORE_TILES, BF16, "added")]


@pytest.mark.parametrize("shape, dtype, extra", CASES, ids=str)
def test_group_norm(shape, dtype, extra):
    """And its gradients, of all that it takes."""
    draw, x = drawn(shape, dtype)
    batch, channels = shape[:2]
    x = x + 30 if extra == "far from 0" else x
    each = (batch, channels) if extra == "of each image" else (channels,)
    weight, bias = 1 + draw(*each).float() / 2, draw(*each).float()
    inputs = [x, weight, bias, *([draw(batch, channels)] if extra == "added" else [])]
    groups, silu = min(32, channels // 4), extra != "no silu"

    def ours(x, weight, bias, add=None):
        return half.group_norm(x, groups, weight, bias, 1e-5, add, silu=silu)

    def plain(x, weight, bias, add=None):
        normal = F.group_norm(x if add is None else x + add[:, :, None, None], groups, eps=1e-5)
        scale, shift = (t.reshape(-1, channels, 1, 1) for t in (weight, bias))
        return F.silu(normal * scale + shift) if silu else normal * scale + shift

    check(ours, plain, inputs, draw(*shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("scale", [1, 0.5**0.5])
def test_branch_sum(shape, dtype, scale):
    """And its gradients: of both biases as well."""
    draw, x = drawn(shape, dtype)
    branch = draw(*shape).contiguous(memory_format=torch.channels_last)
    biases = [draw(shape[1]).float() for _ in range(2)]

    def plain(x, branch, *biases):
        return (x + branch + sum(biases)[:, None, None]) * scale

    ours = lambda x, branch, *biases: half.branch_sum(x, branch, biases, scale)
    check(ours, plain, [x, branch, *biases], draw(*shape))


def check(ours, plain, inputs, upstream):
    """A result like the first input, of whose dtype the others may be rounded, and all gradients,
    against `plain` in float64.
    """
    x = inputs[0]
    given = [each.detach().requires_grad_() for each in inputs]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    got, expected = ours(*given), plain(*wide)
    assert got.dtype == x.dtype and got.shape == x.shape
    assert got.stride() == torch.empty_like(x).stride()
    eps = EPS[x.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=8 * eps)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), got)
    gradients = torch.autograd.grad(got, given, upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for input, gradient, exact in zip(given, gradients, wanted, strict=True):
        assert gradient.dtype == input.dtype and gradient.stride() == input.stride()
        if gradient.numel() == 0:
            continue
        # of sums over many elements each, whose own size is about the largest's
        most = exact.abs().max().item()
        own = EPS[input.dtype]
        assert (gradient.double() - exact).abs().max() <= 8 * own * most + 40 * EPS[F32] * most


def drawn(shape, dtype):
    """A function that draws a tensor of a size, and an image of `shape`, channels last."""
    device, random = device_of("triton"), torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=random, dtype=F64).to(device, dtype)
    return draw, draw(*shape).contiguous(memory_format=torch.channels_last)


def random_net(make, **options):
    """A small network; newly made, the last layers are zero."""
    torch.manual_seed(0)
    options = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1} | options
    net = EDMPrecond(make(8, 3, 3, attn_resolutions=[4], **options))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return net.to(device_of("triton"))


@pytest.mark.parametrize("train", [False, True], ids=["sampled", "trained"])
@pytest.mark.parametrize("make", [SongUNet, DhariwalUNet], ids=lambda make: make.__name__)
def test_a_network_loses_no_more_in_these_kernels(make, train, monkeypatch):
    """Against float32, in its output and its gradients: a normalisation and its silu are rounded
    once in one kernel, not twice, and so are a branch, its bias and what it is added to.
    """
    net = random_net(make, dropout=0).train(train)
    x = torch.randn(2, 3, 8, 8, device=device_of("triton"), requires_grad=train)
    upstream = torch.randn(x.shape).to(x.device)
    sigma = torch.tensor([0.1, 2], device=x.device)
    calls = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("group_norm", "branch_sum"):
        monkeypatch.setattr(half, name, counted(name, getattr(half, name)))

    def results():
        with torch.set_grad_enabled(train):
            out = net(x, sigma, raw=True)
        inputs = [x, *net.parameters()] if train else []
        gradients = torch.autograd.grad(out, inputs, upstream.to(out.dtype)) if train else []
        return [each.float().flatten() for each in (out, *gradients)]

    expected = results()
    assert not calls  # float32
    net.dtype = BF16
    found = []
    for fuses in (False, True):
        monkeypatch.setattr(half, "fuses", lambda x, fuses=fuses: fuses)
        found.append(results())
    norms = sum(isinstance(module, GroupNorm) for module in net.modules())
    branches = sum(1 + bool(block.heads) for block in net.modules() if isinstance(block, ResBlock))
    assert calls == {"group_norm": norms, "branch_sum": branches}
    assert found[0][0].ne(found[1][0]).any()
    for part in (slice(0, 1), slice(1, None) if train else slice(0, 1)):
        exact = torch.cat(expected[part])
        away = [(torch.cat(each[part]) - exact).norm().item() for each in found]
        assert away[1] < 1.1 * away[0] < 0.1 * exact.norm().item()


def test_gradients_of_gradients_and_of_many():
    """They are computed by torch, from the same formulas."""
    draw, x = drawn((2, 8, 3, 5), BF16)
    weight, bias, add = draw(8).float(), draw(8).float(), draw(2, 8)
    many = draw(3, *x.shape)
    found = {}
    for dtype in (F64, BF16):
        given = [each.to(dtype).requires_grad_() for each in (x, weight, bias, add)]
        if dtype == F64:
            normal = F.group_norm(given[0] + given[3][:, :, None, None], 2, *given[1:3], 1e-5)
            y = (F.silu(normal) + given[0] + given[2][:, None, None]) / 2
        else:
            given[1:3] = [each.float().detach().requires_grad_() for each in given[1:3]]
            h = half.group_norm(given[0], 2, *given[1:3], 1e-5, given[3])
            y = half.branch_sum(h, given[0], [given[2]], 0.5)
        slopes = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        penalty = sum(slope.double().square().sum() for slope in slopes)
        second = torch.autograd.grad(penalty, given, retain_graph=True)
        found[dtype] = list(second)
        if dtype == F64:  # of torch's own normalisation there are no batched gradients
            one_by_one = [
                torch.autograd.grad(y, given, each, retain_graph=True) for each in many.to(dtype)
            ]
            found[dtype] += [torch.stack(each) for each in zip(*one_by_one, strict=True)]
        else:
            found[dtype] += torch.autograd.grad(y, given, many.to(dtype), is_grads_batched=True)
    for exact, narrow in zip(*found.values(), strict=True):
        assert exact.shape == narrow.shape
        assert (exact - narrow.double()).norm() < 0.05 * exact.norm()


def test_saved_tensors_may_be_laid_out_anew():
    """As `save_on_cpu` lays them out, and other hooks that keep them elsewhere."""
    draw, x = drawn((2, 8, 3, 5), BF16)
    weight, bias, upstream = draw(8).float(), draw(8).float(), draw(2, 8, 3, 5)

    def gradients():
        given = [each.detach().requires_grad_() for each in (x, weight, bias)]
        return torch.autograd.grad(half.group_norm(given[0], 2, *given[1:], 1e-5), given, upstream)

    expected = gradients()
    with saved_tensors_hooks(lambda tensor: tensor.clone().contiguous(), lambda tensor: tensor):
        found = gradients()
    assert all(map(torch.equal, found, expected))


def test_gradients_of_many_are_plain():
    _, x = drawn((2, 8, 3, 5), BF16)
    weight = torch.ones(8, device=x.device, requires_grad=True)
    y = half.group_norm(x, 2, weight, torch.zeros_like(weight), 1e-5)
    (many,) = torch.autograd.grad(y, weight, torch.stack([y, y]).detach(), is_grads_batched=True)
    assert not many.requires_grad


@pytest.mark.parametrize("channels", [3, 144])
def test_channels_that_groups_do_not_divide(channels):
    with pytest.raises(ValueError, match=f"^GroupNorm: channels must be .* got {channels}$"):
        GroupNorm(channels)


def test_a_branch_gets_its_biases_once(monkeypatch):
    """Also where convolutions give another dtype than they got, as under autocast."""
    monkeypatch.setattr(half, "fuses", lambda x: x.dtype == BF16)
    block = random_net(SongUNet, dropout=0).model.dec["8x8_block0"]
    for layer in (block.conv1, block.skip):
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, block.norm0.weight.shape[0], 8, 8, device=device_of("triton"))
    emb = torch.randn(2, block.affine.in_features, device=x.device)
    with torch.no_grad():
        expected = block(x, emb)
        with torch.autocast(x.device.type, BF16):
            found = block(x, emb)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_torchs_default_dtype_changes_nothing():
    x = torch.randn(1, 8, 5, 5, device=device_of("triton"))
    one, zero = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)

    def results():
        given = x.clone().requires_grad_()
        y = half.branch_sum(half.group_norm(given, 2, one, zero, 1e-5), given, [zero], 2.0)
        return y, *torch.autograd.grad(y, given, x)

    expected = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_when_kernels_are_fused(monkeypatch):
    """On a GPU in half precision, where nothing but autograd watches."""

    class OnGpu:
        is_cuda, dtype = True, BF16

    x = torch.zeros(1, 8, 2, 2, dtype=BF16, device=device_of("triton"))
    assert half.fuses(x) == x.is_cuda and not half.fuses(x.float())
    watched = []
    monkeypatch.setattr(half._modes, "unwatched", lambda x: not watched)
    assert half.fuses(OnGpu())
    watched.append("by a transform, a mode or a compiler")
    assert not half.fuses(OnGpu())


def test_what_watches_operations():
    x = torch.zeros(2, 2)
    assert _modes.unwatched(x, torch.nn.Parameter(x))
    seen = []
    torch.func.vmap(lambda row: seen.append(_modes.unwatched(torch.ones(2))) or row)(x)
    with FakeTensorMode():
        seen.append(_modes.unwatched(x))
    with forward_ad.dual_level():
        seen.append(_modes.unwatched(x))
    with FlopCounterMode(display=False):
        seen.append(_modes.unwatched(x))
    assert seen == [False] * 4


@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_unet_ahead_of_time(capability):
    """Every kernel compiles to a cubin for the architecture, without a GPU, and spills nothing."""
    report = {
        name: facts for name, facts in aot.report(capability).items() if name.startswith("unet")
    }
    assert len(report) == 28
    assert all(
        facts["stack"] == facts["local"] == 0 and facts["registers"] <= 168  # 12 warps at once
        for facts in report.values()
    ), report
