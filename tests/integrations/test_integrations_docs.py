"""Every block of docs/swap_in.md, and of README's section of that name, runs.

A diff runs twice: the lines as they were, with what stands in for another program's parts, and the
lines as they become.
"""

import copy
import importlib
import re
import shlex
import sys
from types import SimpleNamespace

import click
import pytest
import torch

import tdkern
from helpers import ROOT
from helpers.examples import example
from tdkern.cli import main
from tdkern.ema import EMA
from tdkern.integrations.edm import edm_sampler
from tdkern.losses import EDMLoss
from tdkern.networks import Denoiser, EDMPrecond, unet

pytestmark = [
    pytest.mark.usefixtures("torchvision_operators"),
    pytest.mark.filterwarnings("ignore"),  # of other libraries about their own
]


def blocks_of(path, section=None):
    """(heading, language, text) of each code block of a file, or of one section of it."""
    text = (ROOT / path).read_text()
    found, heading = [], ""
    for part in re.split(r"^(## .*)$", text, flags=re.MULTILINE):
        if part.startswith("## "):
            heading = part[3:]
        elif section in (None, heading):
            blocks = re.findall(r"^```(\w+)\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
            found += [(heading, language, block) for language, block in blocks]
    return found


BLOCKS = blocks_of("docs/swap_in.md") + blocks_of("README.md", "Swap it in")


def tiny_net(label_dim=2):
    return EDMPrecond(unet("ddpmpp", 8, 3, label_dim, cbase=4, cres=[1]))


class Named(dict):
    """A dict whose entries are attributes too, as EDM's are."""

    __setattr__ = dict.__setitem__


def _construct(class_name=None, **kwargs):
    """In place of what EDM's function constructs: an optimizer, a network, or a loss."""
    if "params" in kwargs:
        return torch.optim.Adam(**kwargs)
    if class_name is not None:
        module, _, name = class_name.rpartition(".")
        module = module.replace("training.networks", "tdkern.integrations.edm")
        return getattr(importlib.import_module(module), name)(**kwargs)
    plain = EDMLoss()

    def loss_fn(*networks, images=None, labels=None, augment_pipe=None, net=None):
        if networks:  # the published loss's order
            net, _, images, labels, augment_pipe = networks
        return plain(net, images, labels, augment_pipe)

    return loss_fn


def common(tmp_path):
    """What every loop has."""
    net = tiny_net()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    return {
        "torch": torch,
        "net": net,
        "ddp": net,
        "optimizer": torch.optim.Adam(net.parameters()),
        "target": EMA(net),
        "images": images,
        "clean_images": images,
        "labels": torch.eye(2)[torch.tensor([0, 1, 1, 0])],
        "augment_pipe": None,
        "batch_size": 4,
        "batch_gpu_total": 4,
        "loss_scaling": 1,
        "edm_loss": EDMLoss(),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=2),
        "output_dir": tmp_path,
    }


def of_edm(tmp_path):
    names = common(tmp_path)
    return names | {
        "dnnlib": SimpleNamespace(util=SimpleNamespace(construct_class_by_name=_construct)),
        "loss_kwargs": {},
        "network_kwargs": Named(model_type="SongUNet", model_channels=4, channel_mult=[1]),
        "interface_kwargs": {"img_resolution": 8, "img_channels": 3, "label_dim": 2},
        "optimizer_kwargs": {"lr": 1e-3},
        "loss_fn": example("edm_loop").TDLoss(),
        "ema": copy.deepcopy(names["net"]).requires_grad_(False),
        "ema_halflife_nimg": 1000,
        "target_net": EMA(names["net"]),
        "latents": torch.randn(2, 3, 8, 8),
        "class_labels": torch.eye(2),
    }


def of_readme(tmp_path):
    x0 = torch.rand(4, 3, 8, 8)
    like = {name: torch.rand_like(x0) for name in ("F", "F_target", "x_t", "x_tp")}
    return of_edm(tmp_path) | like | {"tdkern": tdkern, "x0": x0, "sigma": torch.rand(4) + 0.1}


def of_consistency_models(tmp_path):
    model = example("consistency_models_loop").UNetModel()
    plain = example("consistency_models_loop").Diffusion
    return common(tmp_path) | {
        "KarrasDenoiser": lambda **settings: plain(td=False, **settings),
        "model": model,
        "target_model": copy.deepcopy(model),
        "micro": torch.rand(4, 3, 8, 8),
        "num_scales": 8,
        "y": torch.tensor([0, 1, 1, 0]),
        "weights": torch.ones(4),
    }


def of_diffusers(tmp_path):
    import diffusers
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    model = example("diffusers_loop").small_unet()
    scheduler = diffusers.DDPMScheduler()
    text_model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    text_denoiser = Denoiser.from_scheduler(text_model, scheduler)
    return common(tmp_path) | {
        "accelerator": Accelerator(cpu=True),
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "noise_scheduler": scheduler,
        "ema_model": EMAModel(model.parameters()),
        "text_denoiser": text_denoiser,
        "text_target": EMA(text_denoiser),
        "text": torch.rand(4, 5, 8),
        "loss_fn": example("diffusers_loop").Loss.from_scheduler(scheduler),
    }


def of_lightning(tmp_path):
    import lightning

    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    settings["default_root_dir"] = tmp_path
    names = common(tmp_path) | {"lightning": lightning, "settings": settings}
    return names | {"net": tiny_net(0)}


def of_accelerate(tmp_path):
    from accelerate import Accelerator

    return common(tmp_path) | {"accelerator": Accelerator(cpu=True)}


def of_processes(tmp_path):
    """In one process: `fully_shard` is called on a mesh of one."""
    return common(tmp_path) | {"fully_shard": lambda net, mesh: net, "mesh": None}


NAMES = {
    "Swap it in": of_readme,
    "What every loop needs to know": of_edm,
    "EDM": of_edm,
    "The published TD+EDM run": of_edm,
    "Consistency models": of_consistency_models,
    "diffusers": of_diffusers,
    "Lightning": of_lightning,
    "Accelerate": of_accelerate,
    "Loss scaling": common,
    "DistributedDataParallel and FSDP2": of_processes,
}


def sides(language, block):
    """The program, or the two of a diff: as it was, as it becomes."""
    if language == "python":
        return [block]
    lines = block.splitlines()
    assert all(line[:1] in ("+", "-", " ") for line in lines)
    return ["\n".join(line[1:] for line in lines if line[0] in (" ", mark)) for mark in ("-", "+")]


PROGRAMS = [block for block in BLOCKS if block[1] in ("python", "diff")]
COMMANDS = [
    line
    for _, language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("tdkern ")
]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_blocks_run(number, tmp_path, monkeypatch):
    heading, language, block = PROGRAMS[number]
    monkeypatch.chdir(tmp_path)
    generate = SimpleNamespace(edm_sampler=edm_sampler)  # in place of EDM's module
    monkeypatch.setitem(sys.modules, "generate", generate)
    for program in sides(language, block):
        torch.manual_seed(0)
        names = NAMES[heading](tmp_path)
        exec(compile(program, f"{heading}, block {number}", "exec"), names)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_ones_of_tdkern(line):
    """Each has options that there are, with values that they take."""
    words = shlex.split(line, comments=True)[1:]
    command, context = main, click.Context(main)
    while isinstance(command, click.Group):
        command = command.get_command(context, words.pop(0))
    command.make_context(command.name, words, parent=context)


def test_every_section_has_its_block():
    assert {heading for heading, _, _ in PROGRAMS} == NAMES.keys()
    assert len(COMMANDS) > 8
