"""The processes of a run: those that torchrun started, or this one alone."""

import inspect
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..networks.layers import ResBlock

BEAT = 2.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one after which a process counts as lost
START = timedelta(seconds=90)  # for all processes to come together, tried twice
_LEFT: list = []  # the groups that this process has left


class Process(NamedTuple):
    """This process's place among those of the run."""

    rank: int
    world: int
    device: torch.device


def _numbers(*names: str) -> list[int]:
    """Variables of the environment that torchrun sets, as numbers.

    Raises:
        ValueError: one is missing, or none.
    """
    values = {name: os.environ.get(name, "") for name in names}
    for name, value in values.items():
        if not value.isdecimal():
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r} in the environment, so {name} must be "
                f"a number there, got {value!r}: start with torchrun, or unset WORLD_SIZE"
            )
    return [int(value) for value in values.values()]


def this_process() -> Process:
    """Rank, number of processes and device, from the environment that torchrun sets.

    Without WORLD_SIZE they are (0, 1, device).

    Raises:
        ValueError: WORLD_SIZE is there without the others, as when it was left over, or they do
            not fit together.
    """
    rank, world, local = 0, 1, 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        rank, world, local = _numbers("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if rank >= world:
            raise ValueError(
                f"RANK must be below WORLD_SIZE, {world}, got {rank}: start with torchrun"
            )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
    return Process(rank, world, device)


@contextmanager
def joined() -> Iterator[Process]:
    """This process, joined with the run's others while the context lasts.

    It ends within a minute of the loss of one of the others.

    Raises:
        ValueError: the environment does not say where the others are.
    """
    process = this_process()
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
        torch.backends.cudnn.deterministic = True  # a resumed run ends in the same bits
        torch.backends.cudnn.allow_tf32 = False  # as in EDM: float32 is float32
    if process.world == 1:
        yield process
        return
    _numbers("MASTER_PORT")
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError(
            "MASTER_ADDR must be the first process's host, got none: start with torchrun"
        )
    store, _, _ = next(dist.rendezvous("env://", timeout=START))
    with watched(process, dist.PrefixStore("watch", store.clone())):
        dist.init_process_group(
            "nccl" if process.device.type == "cuda" else "gloo",
            store=dist.PrefixStore("run", store),
            rank=process.rank,
            world_size=process.world,
        )
        try:
            yield process
        finally:
            leave()


def leave() -> None:
    """`torch.distributed.destroy_process_group`, after which a DistributedDataParallel may live on.

    Its destructor would be the last to hold the group, and would wait for the group's threads while
    it holds Python's lock, for which they may wait.
    """
    _LEFT.append(dist.group.WORLD)
    dist.destroy_process_group()


@contextmanager
def watched(process: Process, store: dist.Store) -> Iterator[None]:
    """While it is entered, this process gives signs of life, and ends when another gives none.

    Whoever waits for a process that was stopped would otherwise wait for ever: the operating system
    keeps its connections open.
    """
    done = threading.Event()
    heard = {rank: time.monotonic() for rank in range(process.world) if rank != process.rank}
    threads = [
        threading.Thread(target=_beat, args=(process, store, heard, done), daemon=True),
        threading.Thread(target=_judge, args=(process, heard, done), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
        _leave(process, store, heard)  # not after an error: then the others are to end too
    finally:
        done.set()
        threads[0].join(2 * BEAT)  # it may be in the store, which goes with the process group


def _leave(process: Process, store: dist.Store, heard: dict) -> None:
    """Tell the others that this process is done; the first, which may hold the store, waits for
    them.
    """
    try:
        store.add(f"{process.rank} has left", 1)
    except dist.DistError:
        return  # the first has left already
    while process.rank == 0 and any(math.isfinite(when) for when in heard.values()):
        time.sleep(BEAT / 4)


def _beat(process: Process, store: dist.Store, heard: dict, done: threading.Event) -> None:
    """Say that this process lives, and note when the others last did."""
    counts = dict.fromkeys(heard, 0)
    try:
        while not done.wait(BEAT):
            store.add(f"{process.rank}", 1)
            for rank in heard:
                count = store.add(f"{rank}", 0)
                if count != counts[rank]:
                    counts[rank], heard[rank] = count, time.monotonic()
                if store.add(f"{rank} has left", 0):
                    heard[rank] = math.inf
    except dist.DistError:  # the first process, which holds the store, is gone
        return


def _judge(process: Process, heard: dict, done: threading.Event) -> None:
    """End this process when another has been silent for too long."""
    while not done.wait(BEAT):
        silent = [rank for rank, when in heard.items() if time.monotonic() - when > SILENCE]
        if silent:
            print(  # on a line of its own: a progress bar may be open
                f"\nError: process {process.rank} of {process.world} ends: process {silent[0]} "
                f"gave no sign of life for {SILENCE:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # the main thread waits for the other process, and cannot be woken


def agree(process: Process, **facts: object) -> None:
    """See that all processes were started alike.

    Args:
        process: this one.
        facts: what must be equal in all, by name.

    Raises:
        ValueError: in every process, naming what differs and where.
    """
    if process.world == 1:
        return
    everyone: list = [None] * process.world
    dist.all_gather_object(everyone, facts)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"all processes must have the same {name}, got {value!r} in process 0 and "
                    f"{theirs.get(name)!r} in process {rank}"
                )


def shared(value, process: Process):
    """The first process's value, in all of them."""
    values = [value]
    if process.world > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast_(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, 0)


def shard_(module: nn.Module, process: Process) -> None:
    """Keep of a network's parameters this process's share, and gather a block's while it runs."""
    mesh = init_device_mesh(process.device.type, (process.world,))
    for part in module.modules():
        if isinstance(part, ResBlock):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def shard_like(tensor: Tensor, param: Tensor) -> Tensor:
    """This process's share of a tensor that every process has, where it has one of a parameter."""
    if not isinstance(param, DTensor):
        return tensor
    return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements)


def whole(tensors: dict[str, Tensor], process: Process) -> dict[str, Tensor]:
    """Tensors whose shards the processes hold, as a whole in the first process, on the CPU.

    Every process has to call it, with its own. The others get nothing of what is sharded.
    """
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            if process.rank > 0:
                continue
            tensor = tensor.cpu()
        found[name] = tensor
    return found


def data_parallel(net: nn.Module, process: Process) -> nn.Module:
    """The network as the loss calls it: its backward leaves the mean of all processes' gradients.

    The first process's weights become everyone's.
    """
    if process.world == 1:
        return net
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}  # they are the same in all
    return DistributedDataParallel(
        net,
        device_ids=[process.device] if process.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=True,
        **options,  # the older name warns where both are known
    )


def sum_(tensor: Tensor, process: Process) -> None:
    """Replace a tensor by its sum over all processes."""
    if process.world > 1:
        dist.all_reduce(tensor)


def mean_(tensor: Tensor, process: Process) -> None:
    """Replace a tensor by its mean over all processes."""
    sum_(tensor, process)
    tensor /= process.world
