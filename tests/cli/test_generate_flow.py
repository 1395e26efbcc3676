"""`tdkern generate` along flow matching's own levels, and with DDPM's larger variance."""

import importlib

import numpy as np
import PIL.Image
import pytest
import torch

from helpers.tiny import invoked, tdkern_
from tdkern.networks import Denoiser, EDMPrecond
from tdkern.samplers import SAMPLERS, heun
from tdkern.schedules import FlowMatching
from tdkern.training import sample

module = importlib.import_module("tdkern.cli.generate")
META = {"network": {"label_dim": 0, "img_channels": 3, "img_resolution": 4}}


class Shade(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x, t, *labels):
        return (self.slope * x + t[:, None, None, None]).sin()


@pytest.fixture
def draw(tmp_path, monkeypatch):
    nets = {"flow": Denoiser(Shade(), "velocity"), "edm": EDMPrecond(Shade())}
    monkeypatch.setattr(module, "load_network", lambda name, device: (nets[name], META))

    def draw(*flags, network="flow"):
        path = tmp_path / "grid.png"
        args = ("--network", network, "--grid", path, "--seeds", "0", "--steps", "5", *flags)
        tdkern_("generate", *args)
        return torch.from_numpy(np.array(PIL.Image.open(path))).permute(2, 0, 1)[None]

    draw.nets = nets
    return draw


def expected(net, sigmas, **options):
    return sample(net, META["network"], [0], sigmas, **options)


@pytest.mark.parametrize(
    ("flags", "t_max"), [((), 0.999), (("--sigma_max", "inf"), 1)], ids=["near 1", "t = 1"]
)
def test_heun_and_ablation_step_in_flows_time(draw, flags, t_max):
    net, sigmas = draw.nets["flow"], FlowMatching(t_max=t_max).sigmas(5)
    images = draw("--disc", "flow", *flags)
    assert torch.equal(images, expected(net, sigmas, sampler=heun, time="flow"))
    assert not torch.equal(images, expected(net, sigmas, sampler=heun))
    for name in ("euler", "ddpm", "dpmpp", "unipc"):
        theirs = expected(net, sigmas, sampler=SAMPLERS[name].sample)
        assert torch.equal(draw("--disc", "flow", "--sampler", name, *flags), theirs)
    if t_max < 1:
        ablated = draw("--disc", "flow", "--sampler", "ablation").int()
        assert (ablated - images.int()).abs().max() <= 1
        other = draw("--disc", "flow", "--sampler", "ablation", "--schedule", "linear").int()
        assert (ablated - other).abs().max() > 1


def test_an_infinite_level_is_refused_where_nothing_is_known_there(tmp_path, draw):
    args = ("generate", "--grid", tmp_path / "a.png", "--seeds", "0", "--sigma_max", "inf")
    refused = invoked(*args, "--network", "edm", "--disc", "flow", code=1).output
    assert "Error: heun: sigmas must begin at a finite level with EDMPrecond" in refused
    refused = invoked(*args, "--network", "flow", code=1).output
    assert "Error: EDM: sigma_min and sigma_max must satisfy" in refused
    assert not (tmp_path / "a.png").exists()


def test_ddpms_larger_variance(draw):
    small, large = (draw("--sampler", "ddpm", "--variance", name) for name in ("small", "large"))
    assert torch.equal(small, draw("--sampler", "ddpm")) and not torch.equal(small, large)
