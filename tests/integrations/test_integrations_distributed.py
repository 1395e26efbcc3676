"""Plain loops under DistributedDataParallel and FSDP2: the examples, and the gradient's scale."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tdkern
from helpers.examples import example, lines_changed, same_tensors
from helpers.tiny import in_processes, in_two_processes
from tdkern.ema import EMA
from tdkern.losses import TDEDMLoss
from tdkern.networks import EDMPrecond, unet
from tdkern.training.distributed import Process, data_parallel, leave


def _ddp(rank, folder):
    _, target = example("ddp_loop").main(folder / "state.pt", steps=2)
    torch.save(target.module.state_dict(), folder / f"target{rank}")


def test_the_ddp_example(tmp_path):
    """Both processes have one target, and rank 0's file has it with the optimizer."""
    in_two_processes(_ddp, tmp_path)
    first, second = (torch.load(tmp_path / f"target{rank}", weights_only=True) for rank in (0, 1))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    saved = state["optimizer"]["tdkern_target"]
    assert same_tensors(first, second) and same_tensors(first, saved["module"])
    assert saved["step"] == 2 and not same_tensors(first, state["net"])


def _fsdp(rank, folder):
    example("fsdp_loop").train(folder / "model.safetensors", steps=2)


def test_the_fsdp_example(tmp_path):
    in_two_processes(_fsdp, tmp_path)
    net, _ = tdkern.load_network(tmp_path / "model.safetensors")
    assert net(torch.randn(1, 3, 8, 8), 1.0).isfinite().all()


def test_lines_changed():
    assert lines_changed("ddp_loop") == 5 and lines_changed("fsdp_loop") == 9


def _network():
    torch.manual_seed(0)
    net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1], dropout=0.0))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def _pair(loss, images=8):
    torch.manual_seed(3)
    return loss.pair(torch.rand(images, 3, 8, 8))


def _gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def _gradient_of_two(rank, folder):
    dist.init_process_group("gloo")
    net, loss = _network(), TDEDMLoss()
    batch = _pair(loss)
    mine = type(batch)(*(None if each is None else each.chunk(2)[rank] for each in batch))
    ddp = DistributedDataParallel(net)
    scale = batch.x0[0].numel() / len(mine.x0)  # the process's own samples
    terms = loss.evaluate(ddp, EMA(_network()), mine, gradient_scale=scale)
    terms.loss.sum().backward()
    torch.save(_gradient(net), folder / f"gradient{rank}")
    leave()


def test_the_gradient_has_edms_scale_on_any_number_of_processes(tmp_path):
    """By the number of a process's own samples, not of all: DistributedDataParallel averages."""
    in_two_processes(_gradient_of_two, tmp_path)
    net, loss = _network(), TDEDMLoss()
    batch = _pair(loss)
    scale = batch.x0[0].numel() / len(batch.x0)
    loss.evaluate(net, EMA(copy.deepcopy(net)), batch, gradient_scale=scale).loss.sum().backward()
    for rank in (0, 1):
        of_two = torch.load(tmp_path / f"gradient{rank}", weights_only=True)
        torch.testing.assert_close(of_two, _gradient(net), rtol=1e-4, atol=1e-5)


def _warned(rank, dtype, channels, isa):
    """In a process of its own, as torch warns once."""
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa
    dist.init_process_group("gloo")
    net = EDMPrecond(unet("ddpmpp", 16, channels, 0, cbase=4, cres=[1, 2]), dtype=dtype)
    target, found = EMA(net), []
    process = Process(0, 2, torch.device("cpu"))  # of two, or there would be nothing to exchange
    for make in (lambda: data_parallel(net, process), lambda: DistributedDataParallel(net)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ddp = make()
            TDEDMLoss()(ddp, target, torch.rand(2, channels, 16, 16)).mean().backward()
        found.append([str(warning.message) for warning in seen])
        net.zero_grad()
    leave()
    assert found == [[], []]


@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])  # half precision by oneDNN, and by torch
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_data_parallel_warns_of_nothing(dtype, channels, isa):
    """Neither in the driver nor in a loop, in which EDM's networks have it warn of strides."""
    in_processes(1, _warned, dtype, channels, isa)
