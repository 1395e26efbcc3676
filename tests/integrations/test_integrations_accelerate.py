"""Accelerate: the example, its states, bfloat16 through the loss, two processes."""

import pytest
import torch

import tdkern
from helpers.examples import example, lines_changed, same_tensors
from helpers.tiny import in_two_processes
from tdkern.ema import EMA
from tdkern.losses import TDDDPMLoss, TDEDMLoss
from tdkern.networks import Denoiser, EDMPrecond
from tdkern.samplers import heun
from tdkern.schedules import DDPM


@pytest.fixture(autouse=True)
def own_state():
    """Accelerate keeps a process's state in a class."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_example_runs_and_resumes(tmp_path):
    loop = example("accelerate_loop")
    torch.manual_seed(0)
    net, target = loop.train(tmp_path)
    assert not same_tensors(net, target.module)
    resumed_net, resumed = loop.train(epochs=0, resume=tmp_path)
    assert same_tensors(resumed_net, net) and same_tensors(resumed, target)
    state = torch.load(tmp_path / "optimizer.bin", weights_only=False)
    assert state["tdkern_target"]["step"] == 4  # of 8 batches, accumulated two by two


def test_lines_changed():
    assert lines_changed("accelerate_loop") == 4


def test_mixed_precision_reaches_the_network_through_the_loss(monkeypatch):
    loop = example("accelerate_loop")
    seen, unet = [], loop.unet

    def watched(*args, **kwargs):
        model = unet(*args, **kwargs)
        conv = next(layer for name, layer in model.named_modules() if name.endswith("conv0"))
        conv.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        return model

    monkeypatch.setattr(loop, "unet", watched)
    loop.train(epochs=1, mixed_precision="bf16")
    assert torch.bfloat16 in seen


@pytest.mark.parametrize("kind", ["EDMPrecond", "Denoiser"])
def test_mixed_precision_reaches_what_is_prepared(kind):
    """A wrapper of ours, or one around a foreign model, in the losses and in the samplers."""
    from accelerate import Accelerator

    conv = torch.nn.Conv2d(3, 3, 1)
    if kind == "Denoiser":
        net = Denoiser(Foreign(conv), "eps", alphas_cumprod=DDPM().alphas_cumprod)
    else:
        net = EDMPrecond(Foreign(conv))
    target, seen, called = EMA(net), [], []
    conv.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    net.register_forward_hook(lambda module, given, out: called.append(out.dtype))
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(net)
    x = torch.randn(2, 3, 4, 4)
    loss = TDEDMLoss() if kind == "EDMPrecond" else TDDDPMLoss()
    loss(prepared, target, x).mean().backward()
    heun(prepared, x, [2.0, 1.0, 0.0])
    assert seen == [torch.bfloat16] * 4  # one of the loss, three of the sampler
    assert called == [torch.float32] * 4  # which Accelerate makes of it


class Foreign(torch.nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x, t):
        return self.conv(x)


def _train_in_two(rank, folder):
    net, target = example("accelerate_loop").train(epochs=1)
    torch.save({"net": net.module.state_dict(), "target": target.state_dict()}, folder / str(rank))


def test_two_processes_have_one_network_and_one_target(tmp_path):
    in_two_processes(_train_in_two, tmp_path)
    first, second = (torch.load(tmp_path / rank, weights_only=True) for rank in "01")
    assert same_tensors(first["net"], second["net"])
    assert same_tensors(first["target"], second["target"])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_find_executable_batch_size_goes_on_after_an_op_is_out_of_memory(backend):
    from accelerate.utils import find_executable_batch_size

    tried = []
    coef = torch.ones(6, dtype=torch.float64)

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch):
        tried.append(batch)
        elements = 2**46 if batch > 2 else 4  # 256 TiB a sample, more than any address space
        x = torch.zeros(1).expand(batch, elements)
        tdkern.heun_step(x, x, coef, backend=backend)
        return batch

    assert train() == 2 and len(tried) > 1
