"""Networks as folders of diffusers' UNet2DModel: its names and shapes, its numbers where diffusers
is installed, and what has no counterpart.
"""

import json
import os

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from helpers import DATA
from tdkern.cli import main
from tdkern.data.files import beside
from tdkern.families import FAMILIES
from tdkern.integrations import export_diffusers
from tdkern.losses import EDMLoss
from tdkern.networks import Denoiser, DhariwalUNet, EDMPrecond, SongUNet, unet
from tdkern.training import load_network
from tdkern.training.checkpoint import SNAPSHOT, write

# a level with attention and one without
ADM = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 6,
    "label_dim": 3,
    "augment_dim": 9,
    "model_channels": 128,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.2,
}


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    """A network, and a file of `tdkern convert` that holds it."""
    torch.manual_seed(0)
    net = EDMPrecond(DhariwalUNet(**ADM)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.08, 0.08)
    network = {
        "class": "EDMPrecond",
        "arguments": {"sigma_data": 0.5},
        "model": "DhariwalUNet",
        "model_arguments": ADM,
        "precision": "fp32",
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 3,
    }
    path = tmp_path_factory.mktemp("adm") / "model.safetensors"
    safetensors.torch.save_file(
        net.state_dict(), path, {"tdkern": json.dumps({"format": 1, "network": network})}
    )
    return net, path


def bits(tensors):
    """A number that the order of all the tensors' elements does not change, and any other change
    does.
    """
    return sum(
        tensor.contiguous().view(torch.int32).sum(dtype=torch.int64).item() for tensor in tensors
    )


def test_folder(adm, tmp_path):
    """The tensors have the names and shapes of diffusers 0.42's UNet2DModel of that config, and are
    the network's own numbers, each once.
    """
    net, path = adm
    done = export_diffusers(load_network(path)[0], tmp_path / "unet", name=str(path))
    numbers = sum(p.numel() for name, p in net.named_parameters() if "map_augment" not in name)
    assert done == (
        f"{tmp_path / 'unet'}: the DhariwalUNet of {path} as a UNet2DModel, to be called with c_in "
        "x and c_noise of EDMPrecond: 161 tensors, "
        f"{numbers:,} numbers; left out: the augmentation labels' layer, which sampling does "
        "without"
    )
    assert sorted(file.name for file in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    stored = json.loads((DATA / "unet2d.json").read_text())
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == stored["config"]
    saved = safetensors.torch.load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == stored["shapes"]
    ours = [p.detach() for name, p in net.named_parameters() if "map_augment" not in name]
    assert bits(saved.values()) == bits(ours)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_nothing_unfinished_is_left(adm, tmp_path, monkeypatch):
    """Neither by a call that fails, nor by one that was killed before."""
    net, dst = load_network(adm[1])[0], tmp_path / "unet"
    left = beside(dst)
    left.mkdir()
    (left / "config.json").write_text("{}")

    def rename(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "rename", rename)
        export_diffusers(net, dst, name="a")
    assert os.listdir(tmp_path) == []
    left.mkdir()
    export_diffusers(net, dst, name="a")
    assert os.listdir(tmp_path) == ["unet"]


def test_diffusers_computes_the_same(adm, tmp_path, torchvision_operators):
    import diffusers

    net, path = adm
    export_diffusers(load_network(path)[0], tmp_path / "unet", name=str(path))
    theirs, loading = diffusers.UNet2DModel.from_pretrained(
        tmp_path / "unet", output_loading_info=True
    )
    assert not any(loading.values())
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([2, 0])
    one_hot = torch.eye(3)[labels]
    with torch.no_grad():
        c_in, c_noise = net.input_scaling(torch.tensor([0.3, 5.0]))
        out = theirs(c_in[:, None, None, None] * x, c_noise, class_labels=labels).sample
    torch.testing.assert_close(
        out, net(x, torch.tensor([0.3, 5.0]), one_hot, raw=True), atol=1e-5, rtol=1e-5
    )


def test_denoiser_takes_a_model_of_diffusers(torchvision_operators):
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    ).eval()
    scheduler = diffusers.DDPMScheduler()
    net = Denoiser(model, "eps", alphas_cumprod=scheduler.alphas_cumprod)
    alpha2 = scheduler.alphas_cumprod[[10, 700]]
    sigma, x, labels = (1 / alpha2 - 1).sqrt(), torch.randn(2, 3, 8, 8), torch.tensor([2, 0])
    with torch.no_grad():
        eps = model(
            x * alpha2.sqrt()[:, None, None, None], torch.tensor([10.0, 700.0]), labels
        ).sample
        torch.testing.assert_close(
            net(x, sigma, torch.eye(3)[labels]),
            x - sigma[:, None, None, None] * eps,
            atol=1e-4,
            rtol=1e-4,
        )


def run(*args):
    result = CliRunner().invoke(main, ["convert", "--diffusers", *map(str, args)])
    return result.exit_code, result.output.strip().splitlines()[-1]


def test_a_snapshot_of_a_run(tmp_path):
    spec = FAMILIES["edm"].network(EDMLoss(), "adm", 4, 3, 0, cbase=128, cres=[1], dropout=0.1)
    net = spec.build()
    write(tmp_path, SNAPSHOT, 8, net.state_dict(), {"network": spec.to_json()})
    code, line = run(tmp_path, tmp_path / "unet")
    assert (
        code == 0
        and line.startswith(f"{tmp_path / 'unet'}: the DhariwalUNet of {tmp_path} as a UNet2DModel")
        and line.endswith("left out: nothing")
    )
    saved = safetensors.torch.load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["conv_in.weight"], net.model.enc["4x4_conv"].weight)
    code, line = run(tmp_path, tmp_path / "unet")
    assert (
        code == 1
        and line
        == f"Error: convert: DST must not be there yet, got {tmp_path / 'unet'}; remove it or "
        "give another name"
    )
    code, line = run(tmp_path / "nowhere", tmp_path / "b")
    assert code == 1 and "no network-snapshot-* in it" in line


@pytest.mark.parametrize(
    "model, reason",
    [
        (
            lambda: unet("ddpmpp", 8, 3, cbase=128),
            "this SongUNet: it scales its residual sums by sqrt(1/2), and its decoder has "
            "attention in the last block",
        ),
        (
            lambda: unet("adm", 8, 3, cbase=64, cres=[1, 2]),
            "this DhariwalUNet: a level has 64 channels, and only multiples of 64 from 128 up",
        ),
        (
            lambda: unet("adm", 8, 3, cbase=160, cres=[1]),
            "this DhariwalUNet: a level has 160 channels",
        ),
        (
            lambda: unet("adm", 8, 3, cbase=64, cres=[2, 2]),
            "this DhariwalUNet: its noise embedding has 64 channels and its first level 128",
        ),
        (
            lambda: SongUNet(8, 3, 3, model_channels=8, encoder_type="skip", decoder_type="skip"),
            "this SongUNet: it scales",
        ),
    ],
)
def test_networks_without_a_counterpart_are_refused(tmp_path, model, reason):
    with torch.device("meta"):
        net = EDMPrecond(model())
    with pytest.raises(ValueError, match=r"^a: no UNet2DModel computes ") as raised:
        export_diffusers(net, tmp_path / "unet", name="a")
    assert reason in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
