"""The processes of a run: those that torchrun started, or this one alone."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Process(NamedTuple):
    """This process's place among those of the run."""

    rank: int
    world: int
    device: torch.device


def this_process() -> Process:
    """Rank, number of processes and device, from the environment that torchrun sets.

    Without it they are (0, 1, device).
    """
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    return Process(
        rank,
        world,
        torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu"),
    )


@contextmanager
def joined() -> Iterator[Process]:
    """This process, joined with the run's others while the context lasts."""
    process = this_process()
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
        torch.backends.cudnn.deterministic = True  # a resumed run ends in the same bits
        torch.backends.cudnn.allow_tf32 = False  # as in EDM: float32 is float32
    if process.world == 1:
        yield process
        return
    dist.init_process_group("nccl" if process.device.type == "cuda" else "gloo")
    try:
        yield process
    finally:
        dist.destroy_process_group()


def sum_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over all processes, in one exchange."""
    tensors = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(total.view_as(tensor))


def broadcast_(module: torch.nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, 0)
