"""The U-Nets, their blocks and layers, and the preconditioning against golden numbers; precisions,
memory formats, compilation, initialisation.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import golden_of
from tdkern.networks import (
    Denoiser,
    DhariwalUNet,
    EDMPrecond,
    SongUNet,
    VEPrecond,
    VPPrecond,
    iDDPMPrecond,
    unet,
)
from tdkern.networks.layers import (
    BlockStyle,
    Conv2d,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    ResBlock,
)
from tdkern.preconditioning import EDM, Eps, Score
from tdkern.schedules import DDPM

ARCHS = ("ddpmpp", "ncsnpp", "adm")
NETS = ("ddpmpp", "ncsnpp", "adm", "adm_attn")
PRECONDS = {"edm": EDMPrecond, "vp": VPPrecond, "ve": VEPrecond, "iddpm": iDDPMPrecond}


def close(actual, expected, atol, rtol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def whole(name):
    """A golden network with its parameters, in evaluation mode, and its data."""
    data = golden_of(f"unet_{name}")
    cfg = {key[4:]: value.tolist() for key, value in data.items() if key.startswith("cfg_")}
    arch, channels, sigma_data = cfg.pop("arch"), cfg.pop("img_channels"), cfg.pop("sigma_data")
    if arch == 1:
        cfg |= {
            "embedding_type": "fourier",
            "encoder_type": "residual",
            "channel_mult_noise": 2,
            "resample_filter": [1, 3, 3, 1],
        }
    net = EDMPrecond(
        (DhariwalUNet if arch == 2 else SongUNet)(
            in_channels=channels, out_channels=channels, **cfg
        ),
        sigma_data,
    )
    state = {key: value for key, value in data.items() if key.startswith("model.")}
    assert [(key, value.shape) for key, value in net.state_dict().items()] == [
        (key, value.shape) for key, value in state.items()
    ]
    net.load_state_dict(state)
    inputs = data["in_x"], data["in_sigma"], data.get("in_labels"), data.get("in_augment_labels")
    return net.eval(), inputs, data


def tiny(arch, **kwargs):
    """A small network of every kind of layer, with no zero weights."""
    torch.manual_seed(0)
    net = EDMPrecond(
        unet(
            arch,
            8,
            3,
            label_dim=2,
            augment_dim=9,
            **{"cbase": 64 if arch == "adm" else 16, "cres": [1, 1], "dropout": 0} | kwargs,
        )
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 5.0])
    return net, (x, sigma, torch.eye(2), torch.randn(2, 9))


@pytest.mark.parametrize("name", NETS)
def test_whole_network_float32(name):
    net, (x, sigma, labels, augment_labels), data = whole(name)
    with torch.no_grad():
        close(net(x, sigma, labels, augment_labels), data["out_D"], 1e-5)
        close(net(x, sigma, None, augment_labels), data["out_D_nolabel"], 1e-5)
        assert not torch.allclose(data["out_D_nolabel"], data["out_D"], atol=1e-3)
        if augment_labels is not None:
            close(net(x, sigma, labels), data["out_D_noaug"], 1e-5)
            assert not torch.allclose(data["out_D_noaug"], data["out_D"], atol=1e-3)


@pytest.mark.parametrize("name", NETS)
def test_whole_network_float64(name):
    net, (x, sigma, labels, augment_labels), data = whole(name)
    net, x = net.double(), x.double().requires_grad_()
    D = net(x, sigma, labels, augment_labels)
    close(D, data["out_D_f64"], 1e-10)
    close(net(x, sigma, labels, augment_labels, raw=True), data["out_F_f64"], 1e-10)
    close(net.input_scaling(sigma.double())[1], data["c_noise_f64"], 1e-12)

    loss = 0.5 * D.square().mean()
    loss.backward()
    close(loss, data["loss_f64"], 1e-12)
    close(x.grad, data["grad_in_x_f64"], 1e-10 * data["grad_in_x_f64"].abs().max().item())
    norms = torch.stack([parameter.grad.norm() for _, parameter in sorted(net.named_parameters())])
    close(norms, data["param_gradnorm_sorted"], 0, rtol=1e-10)


SONG = {
    "init": Init("xavier_uniform"),
    "init_zero": Init("xavier_uniform"),
    "init_attn": Init("xavier_uniform"),
    "scale_shift": False,
    "skip_scale": 0.5**0.5,
    "eps": 1e-6,
    "project_skip": True,
}
ADM = SONG | {"scale_shift": True, "skip_scale": 1, "eps": 1e-5, "project_skip": False}


@pytest.mark.parametrize(
    "name, style, kwargs",
    [
        ("adm_heads", ADM, {"heads": 4}),
        ("adm_up", ADM, {"up": True}),
        ("adm_down", ADM, {"down": True}),
        ("song_attn", SONG, {"heads": 1}),
        ("song_up_1331", SONG | {"resample_filter": (1, 3, 3, 1)}, {"up": True}),
        ("song_down_1331", SONG | {"resample_filter": (1, 3, 3, 1)}, {"down": True}),
        ("song_down_11", SONG, {"down": True}),
    ],
)
def test_block(name, style, kwargs):
    data = {
        key.removeprefix(f"{name}."): value
        for key, value in golden_of("unet_blocks").items()
        if key.startswith(f"{name}.")
    }
    x, emb, out = data.pop("in_x"), data.pop("in_emb"), data.pop("out")
    block = ResBlock(
        x.shape[1], out.shape[1], BlockStyle(emb.shape[1], dropout=0.0, **style), **kwargs
    )
    block.load_state_dict(data)
    close(block.double()(x.double(), emb.double()), out, 1e-10)


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("down_11", {"down": True}),
        ("up_11", {"up": True}),
        ("down_1331", {"down": True, "resample_filter": [1, 3, 3, 1]}),
        ("up_1331", {"up": True, "resample_filter": [1, 3, 3, 1]}),
        ("fused_down_1331", {"down": True, "resample_filter": [1, 3, 3, 1], "fused": True}),
        ("fused_up_1331", {"up": True, "resample_filter": [1, 3, 3, 1], "fused": True}),
        ("down_1331_nokernel", {"down": True, "resample_filter": [1, 3, 3, 1], "kernel": 0}),
        ("up_1331_nokernel", {"up": True, "resample_filter": [1, 3, 3, 1], "kernel": 0}),
    ],
)
def test_convolution(name, kwargs):
    data = {
        key.removeprefix(f"{name}."): value
        for key, value in golden_of("unet_layers").items()
        if key.startswith(f"{name}.")
    }
    x, out = data.pop("in_x"), data.pop("out")
    conv = Conv2d(5, out.shape[1], **{"kernel": 3, "init": Init("xavier_uniform")} | kwargs)
    conv.load_state_dict(data)
    close(conv.double()(x.double()), out, 1e-12)


@pytest.mark.parametrize(
    "key, source, endpoint",
    [
        ("16", "in", False),
        ("64", "in", False),
        ("large_64", "in_large", False),
        ("endpoint_16", "in", True),
        ("endpoint_64", "in", True),
    ],
)
def test_positional_embedding(key, source, endpoint):
    data = golden_of("unet_layers")
    expected = data[f"emb.positional_{key}"]
    close(
        PositionalEmbedding(expected.shape[1], endpoint)(data[f"emb.{source}"].double()),
        expected,
        1e-12,
    )


class Recorder(nn.Module):
    """A stand-in for a network: returns `F` and keeps what it was called with."""

    def __init__(self, F, label_dim=0):
        super().__init__()
        self.F, self.label_dim = F, label_dim

    def forward(self, *args):
        self.args = args
        return self.F


@pytest.mark.parametrize("name", PRECONDS)
def test_precond(name):
    data = golden_of(f"precond_{name}")
    x, sigma = data["x"].double(), data["sigma"]
    model = Recorder(data["F"].double())
    net = PRECONDS[name](model)
    assert net.preconditioning == {"edm": EDM(0.5), "ve": Score()}.get(name, Eps())
    assert net.sigma_min == pytest.approx(
        data["net_sigma_min"].item(), rel=1e-9
    ) and net.sigma_max == pytest.approx(data["net_sigma_max"].item(), rel=1e-9)

    # the reference's own float32 c_noise is off by up to 1 % (VP near t = 0)
    for dtype, tolerance in (
        (torch.float64, 1e-11),
        (torch.float32, 2e-6),
    ):
        got = (
            *net.input_scaling(sigma.to(dtype)),
            *net.preconditioning.skip_scale(sigma.to(dtype)),
        )
        for key, value in zip(("c_in", "c_noise", "c_skip", "c_out"), got, strict=True):
            close(value, data[key].to(dtype), tolerance if key == "c_noise" else 0, tolerance)

    close(net(x, sigma), data["D"], 1e-11, 1e-11)
    close(model.args[0], data["c_in"][:, None, None, None] * x, 0, 1e-11)
    close(model.args[1], data["c_noise"], 1e-11, 1e-11)
    assert torch.equal(net(x, sigma, raw=True), data["F"][:, :3].double())
    model.F = data["F"]
    D = net(data["x"], sigma.float())
    assert D.dtype == torch.float32
    close(D, data["D_f32"], 1e-5, 2e-6)


def test_vp_noise_level_round_trip():
    data = golden_of("precond_vp")
    net = VPPrecond(Recorder(None))
    close(net.input_scaling(data["sigma"])[1] / (net.M - 1), data["t_of_sigma"], 0, 1e-10)
    close(net.input_scaling(data["sigma_of_t"])[1] / (net.M - 1), data["t_grid"], 0, 1e-10)


def test_iddpm_levels():
    data = golden_of("precond_iddpm")
    net = iDDPMPrecond(Recorder(None))
    close(net.u, data["u"], 0, 1e-9)
    close(net.round_sigma(data["sigma"]), data["round_sigma"], 0, 1e-9)
    assert net.round_sigma(data["sigma"].float().reshape(5, 6)).shape == (5, 6)
    assert net.round_sigma(net.sigma_max).item() == pytest.approx(net.sigma_max)
    assert list(net.state_dict()) == ["u"]
    sigma = torch.tensor([0.5, 2.0])
    assert EDMPrecond(nn.Identity()).round_sigma(sigma) is sigma


def test_a_cast_network_keeps_its_tables():
    """Noise levels and frequencies are not rounded with the parameters; they still move, and stay
    in the state as they were.
    """
    sigma = torch.tensor([0.01, 0.3, 3.0, 100.0])
    for net in (
        iDDPMPrecond(Points()),
        Denoiser(Points(), alphas_cumprod=DDPM().alphas_cumprod),
        tiny("ncsnpp")[0],
    ):
        c_noise, state = net.input_scaling(sigma)[1], net.state_dict()
        tables = {
            name: buffer.clone() for name, buffer in net.named_buffers() if "filter" not in name
        }
        for cast in (
            net.bfloat16,
            net.half,
            lambda net=net: net.to("cpu", torch.bfloat16),
            net.float,
        ):
            cast()
            assert (
                torch.equal(net.input_scaling(sigma)[1], c_noise)
                and net.state_dict().keys() == state.keys()
            )
            assert tables and all(
                torch.equal(net.get_buffer(name), table)
                and net.get_buffer(name).dtype == table.dtype
                for name, table in tables.items()
            )
        assert {parameter.dtype for parameter in net.half().parameters()} == {torch.float16}
        assert all(
            buffer.device.type == "meta" for buffer in net.to("meta", torch.float16).buffers()
        )


class Points(nn.Module):
    """A network of 2-D points."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, c_noise, class_labels, augment_labels):
        return self.layer(torch.cat([x, c_noise[:, None].to(x.dtype)], 1))


def test_sigma_and_ranks():
    torch.manual_seed(0)
    net, x = EDMPrecond(Points()), torch.randn(4, 2)
    D = net(x, torch.full((4,), 2.0))
    assert D.shape == (4, 2) and net(x, 2.0, raw=True).shape == (4, 2)
    for sigma in (
        2.0,
        2,
        torch.tensor(2.0),
        torch.tensor([2.0]),
        torch.full((4, 1), 2.0, dtype=torch.float64),
    ):
        assert torch.equal(net(x, sigma), D)
    c_skip, c_out = (c[:, None] for c in net.preconditioning.skip_scale(torch.full((4,), 2.0)))
    assert torch.equal(D, c_skip * x + c_out * net(x, 2.0, raw=True))
    with pytest.raises(
        ValueError, match="EDMPrecond: sigma must have one element or 4, as x has samples, got 3"
    ):
        net(x, torch.ones(3))


def test_precond_dtypes():
    net = EDMPrecond(Points())
    x = torch.randn(4, 2, dtype=torch.float64)
    assert net(x, 1.0).dtype == torch.float32  # a float64 sampler's state before a float32 network
    assert net(x, 1.0, raw=True).dtype == torch.float32
    assert net.double()(x, 1.0).dtype == torch.float64
    assert net.float()(x.float(), 1.0).dtype == torch.float32


def test_labels():
    x, labels = torch.randn(4, 2), torch.eye(4)
    model = Recorder(torch.zeros(4, 2), label_dim=4)
    net = EDMPrecond(model)
    net(x, 1.0)
    assert torch.equal(model.args[2], torch.zeros(4, 4)) and model.args[3] is None
    net(x, 1.0, labels, labels)
    assert model.args[2] is labels and model.args[3] is labels
    model.label_dim = 0  # a data set without labels gives [B, 0]
    net(x, 1.0, labels[:, :0])
    assert model.args[2] is None
    net, (x, sigma, labels, _) = tiny("ddpmpp")
    with pytest.raises(
        ValueError, match=r"SongUNet: class_labels must have shape \[2, 2\], got \[1, 2\]"
    ):
        net(x, sigma, labels[:1])
    with pytest.raises(
        ValueError, match=r"SongUNet: class_labels must have shape \[2, 2\], got None"
    ):
        net.model(x, sigma)


@pytest.mark.parametrize("name", ARCHS)
def test_compiles_without_graph_breaks(name):
    net, inputs, _ = whole(name)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    D = compiled(*inputs)
    close(D, net(*inputs), 1e-6)
    grads = torch.autograd.grad(D.square().mean(), list(net.parameters()))
    for grad, expected in zip(
        grads,
        torch.autograd.grad(net(*inputs).square().mean(), list(net.parameters())),
        strict=True,
    ):
        assert relative(grad, expected) < 1e-5


def test_compiles_in_half_precision_and_with_checkpointing():
    net, inputs = tiny("ncsnpp")
    net.dtype, net.model.checkpointing = torch.bfloat16, True
    torch._dynamo.reset()
    got = torch.compile(net, fullgraph=True, backend="eager")(*inputs, raw=True)
    assert got.dtype == torch.bfloat16 and torch.equal(got, net(*inputs, raw=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ARCHS)
def test_convolutions_are_channels_last(arch, dtype):
    """Every convolution is given, and gives, channels_last, and its weight is cast into that
    format: neither tensor cores nor oneDNN need another pass.
    """
    net, inputs = tiny(arch)
    net.dtype, formats, real = dtype, [], F.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F,
            "conv2d",
            lambda x, weight, *args, **kwargs: (
                formats.append((x, weight)) or real(x, weight, *args, **kwargs)
            ),
        )
        raw = net(*inputs, raw=True)
    assert len(formats) > 10 and raw.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:  # the image is taken as it comes
        formats = [(x, weight) for x, weight in formats if x.shape[1] != 3]
    for x, weight in formats:
        assert x.is_contiguous(memory_format=torch.channels_last)
        # the filter that resamples
        assert weight.is_contiguous(memory_format=torch.channels_last) or weight.shape[1] == 1
    # float64, which oneDNN has not, keeps the image's
    exact = [each.double() for each in (inputs[0], torch.zeros(2), torch.eye(2))]
    assert net.model.double()(*exact).is_contiguous()


@pytest.mark.parametrize("arch", ARCHS)
def test_channels_last(arch):
    net, (x, *rest) = tiny(arch)
    expected = net(x, *rest)
    net = net.to(memory_format=torch.channels_last)
    raw = net(x.contiguous(memory_format=torch.channels_last), *rest, raw=True)
    assert raw.is_contiguous(memory_format=torch.channels_last)
    close(net(x.contiguous(memory_format=torch.channels_last), *rest), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETS)
def test_low_precision(name, dtype):
    """Output and gradients lose at most twice what PyTorch's own autocast loses at that
    precision.
    """
    net, inputs, data = whole(name)

    def run():
        raw = net(*inputs, raw=True)
        return raw, torch.cat(
            [
                grad.flatten()
                for grad in torch.autograd.grad(raw.float().square().mean(), list(net.parameters()))
            ]
        )

    raw, grad = run()
    with torch.autocast("cpu", dtype):
        autocast_raw, autocast_grad = run()
    net.dtype = dtype
    low_raw, low_grad = run()
    assert low_raw.dtype == dtype and low_grad.dtype == torch.float32
    assert 0 < relative(low_raw, raw) < 2 * relative(autocast_raw, raw)
    assert 0 < relative(low_grad, grad) < 2 * relative(autocast_grad, grad)
    D = net(*inputs)
    assert D.dtype == torch.float32
    assert relative(D, data["out_D"]) < 2 * relative(autocast_raw, raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalisation_in_float32(dtype):
    torch.manual_seed(0)
    norm, x = GroupNorm(16), (10 + torch.randn(2, 16, 4, 4)).to(dtype)
    nn.init.normal_(norm.weight)
    expected = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-5)
    assert norm(x).dtype == dtype
    # the rounding of the result, and no more
    assert relative(norm(x), expected) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("arch", ARCHS)
def test_checkpointing_gives_the_same_gradients(arch):
    net, inputs = tiny(arch, dropout=0.2)
    calls = []
    for module in net.modules():
        if isinstance(module, ResBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        torch.manual_seed(1)
        return torch.autograd.grad(net(*inputs).square().mean(), list(net.parameters())), len(calls)

    expected, blocks = gradients()
    net.model.checkpointing = True
    got, recomputed = gradients()
    assert recomputed == 2 * blocks
    for grad, want in zip(got, expected, strict=True):
        assert torch.equal(grad, want)


def test_dropout_only_in_training():
    net, inputs = tiny("ddpmpp", dropout=0.5)
    assert not torch.equal(net(*inputs), net(*inputs))
    net.eval()
    assert torch.equal(net(*inputs), net(*inputs))


@pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])
def test_label_dropout(cls):
    torch.manual_seed(0)
    net = cls(
        4, 1, 1, label_dim=3, model_channels=4, channel_mult=[1], num_blocks=1, label_dropout=0.25
    )
    seen = []
    net.map_label.register_forward_pre_hook(lambda _, args: seen.append(args[0].bool().any(1)))
    labels = torch.eye(3).repeat(400, 1)
    for training in (True, False):
        net.train(training)(torch.zeros(1200, 1, 4, 4), torch.zeros(1200), labels)
    assert 0.2 < 1 - seen[0].float().mean().item() < 0.3
    assert seen[1].all()


def uniform(parameter, bound):
    """Whether `parameter` looks uniform in [-bound, bound]."""
    largest = parameter.abs().max().item()
    return largest <= bound * (1 + 1e-6) and (
        parameter.numel() < 500
        or (largest > 0.97 * bound and abs(parameter.std().item() / bound * 3**0.5 - 1) < 0.15)
    )


def fans(weight):
    field = weight[0, 0].numel()
    return weight.shape[1] * field, weight.shape[0] * field


def test_song_initialisation():
    torch.manual_seed(0)
    net = unet("ncsnpp", 16, 3, label_dim=10, augment_dim=9, cbase=32)
    for name, parameter in net.named_parameters():
        layer, kind = name.rsplit(".", 1)
        if "norm" in layer:
            assert torch.equal(parameter, torch.full_like(parameter, kind == "weight")), name
        elif kind == "bias":
            assert not parameter.any(), name
        else:
            gain = 1
            if layer.endswith(("conv1", "proj", "aux_conv")):
                gain = 1e-5
            elif layer.endswith("qkv"):
                gain = 0.2**0.5
            assert uniform(parameter, gain * math.sqrt(6 / sum(fans(parameter)))), name
    assert 0.6 < net.map_noise.freqs.std().item() / 16 < 1.4 and net.map_noise.freqs.shape == (32,)


def test_adm_initialisation():
    torch.manual_seed(0)
    net = unet("adm", 16, 3, label_dim=10, augment_dim=9, cbase=64, cres=[1, 2])
    modules = dict(net.named_modules())
    for name, parameter in net.named_parameters():
        layer, kind = name.rsplit(".", 1)
        if "norm" in layer:
            assert torch.equal(parameter, torch.full_like(parameter, kind == "weight")), name
        elif layer.endswith(("conv1", "proj", "out_conv", "map_augment")):
            assert not parameter.any(), name
        elif layer == "map_label":
            # sqrt(label_dim) sqrt(1/label_dim) N(0, 1)
            assert abs(parameter.std().item() - 1) < 0.1 and parameter.abs().max() > 2.5
        else:
            assert uniform(parameter, 1 / math.sqrt(fans(modules[layer].weight)[0])), name
    assert not net(torch.randn(1, 3, 16, 16), torch.ones(1), torch.ones(1, 10)).any()


@pytest.mark.parametrize(
    "arch, resolution, label_dim, millions",
    [
        ("ddpmpp", 32, 0, 55.7),
        ("ncsnpp", 32, 0, 56.4),
        ("ddpmpp", 64, 0, 61.8),
        ("adm", 64, 1000, 295.9),
    ],
)
def test_presets_have_the_sizes_of_the_paper(arch, resolution, label_dim, millions):
    with torch.device("meta"):
        net = unet(arch, resolution, 3, label_dim, augment_dim=0 if arch == "adm" else 9)
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.05
    )
    assert (net.img_resolution, net.in_channels, net.out_channels, net.label_dim) == (
        resolution,
        3,
        3,
        label_dim,
    )


def test_skip_architectures_contain_the_standard_one():
    """A skip encoder and decoder whose extra layers are zero compute what the standard ones do, and
    otherwise do not.
    """
    torch.manual_seed(0)
    kwargs = {
        "img_resolution": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0,
    }
    standard = SongUNet(**kwargs)
    for parameter in standard.parameters():
        nn.init.normal_(parameter, std=0.2)
    net = SongUNet(encoder_type="skip", decoder_type="skip", **kwargs)
    missing, unexpected = net.load_state_dict(standard.state_dict(), strict=False)
    assert not unexpected
    extra = ["enc.4x4_aux_skip", "dec.4x4_aux_conv"]
    assert {name for name in missing if "resample" not in name} == {
        f"{layer}.{kind}" for layer in [*extra, "dec.4x4_aux_norm"] for kind in ("weight", "bias")
    }
    assert {"enc.4x4_aux_down.resample_filter", "dec.8x8_aux_up.resample_filter"} <= set(missing)

    x, c_noise = torch.randn(2, 3, 8, 8), torch.randn(2)
    for layer in extra:
        for parameter in net.get_submodule(layer).parameters():
            nn.init.zeros_(parameter)
    expected = standard(x, c_noise)
    close(net(x, c_noise), expected, 1e-5)
    for layer in extra:
        other = copy.deepcopy(net)
        nn.init.constant_(other.get_submodule(layer).weight, 0.3)
        assert relative(other(x, c_noise), expected) > 1e-2, layer


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: unet("ddim", 32, 3), "unet: arch must be one of ddpmpp, ncsnpp, adm, got 'ddim'"),
        (
            lambda: unet("adm", 28, 3),
            "DhariwalUNet: img_resolution must be a multiple of 8, as it has 4 levels, got 28",
        ),
        (
            lambda: DhariwalUNet(8, 3, 3, model_channels=8, dropout=1.5),
            r"DhariwalUNet: dropout must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: SongUNet(8, 3, 3, embedding_type="x"),
            "SongUNet: embedding_type must be one of positional, fourier, got 'x'",
        ),
        (
            lambda: SongUNet(8, 3, 3, encoder_type="x"),
            "SongUNet: encoder_type must be one of standard, skip, residual, got 'x'",
        ),
        (
            lambda: SongUNet(8, 3, 3, decoder_type="x"),
            "SongUNet: decoder_type must be one of standard, skip, got 'x'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_linear_without_bias():
    layer = Linear(4, 3, Init("kaiming_uniform"), bias=False)
    assert (
        list(layer.state_dict()) == ["weight"]
        and layer(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edms_network_at_the_level_0_that_it_says_it_takes(dtype):
    """D(x, 0) = x, beside a sample at another level that is what it is alone."""
    torch.manual_seed(0)
    net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1])).to(dtype).eval()
    x = torch.rand(2, 3, 8, 8, dtype=dtype)
    assert net.sigma_min == 0
    both = net(x, torch.tensor([0.0, 0.7], dtype=dtype))
    assert torch.equal(both[0], x[0])
    torch.testing.assert_close(both[1:], net(x[1:], torch.tensor([0.7], dtype=dtype)))
