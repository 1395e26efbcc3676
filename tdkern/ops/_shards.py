"""DTensors: the list ops work on each process's shards, and a flag is reduced over the mesh."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import is_distributed, kind_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def any_distributed(*columns: object) -> bool:
    """Whether any tensor of any of these lists is a DTensor."""
    lists = [column for column in columns if isinstance(column, list | tuple)]
    return any(is_distributed(tensor) for column in lists for tensor in column)


def local_rows(
    op: str,
    params: Sequence[Tensor],
    written: dict[str, Sequence[Tensor]],
    read: dict[str, Sequence[Tensor]],
) -> list[list[Tensor]]:
    """The shards of this process: those of `params`, then of every written list, then of every list
    that is read.

    What is written must be sharded as its parameter is; what is read is redistributed so.
    """
    for name, column in (written | read).items():
        if len(column) != len(params):
            raise ValueError(
                f"{op}: {name} must hold {len(params)} tensors, one for each parameter, got "
                f"{len(column)}"
            )
    local = [[_own(op, f"params[{i}]", param, param) for i, param in enumerate(params)]]
    local += [
        [_own(op, f"{name}[{i}]", tensor, params[i]) for i, tensor in enumerate(column)]
        for name, column in written.items()
    ]
    local += [
        [_same_shard(op, f"{name}[{i}]", tensor, params[i]) for i, tensor in enumerate(column)]
        for name, column in read.items()
    ]
    return local


def local_of(scalar: Any) -> Any:
    """This process's part of a scalar, which every process has; anything else as it is."""
    return scalar.full_tensor() if is_distributed(scalar) else scalar


def _own(op: str, name: str, tensor: Tensor, param: Tensor) -> Tensor:
    if not is_distributed(param) and not is_distributed(tensor):
        return tensor
    if not is_distributed(tensor) or not is_distributed(param) or _layout(tensor) != _layout(param):
        raise ValueError(
            f"{op}: {name} must be distributed as its parameter is, {_words(param)}, got "
            f"{_words(tensor)}: fully_shard or distribute both alike"
        )
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{op}: {name} must be sharded or replicated, got {_words(tensor)}: redistribute() it "
            "first"
        )
    return tensor.to_local()


def _same_shard(op: str, name: str, tensor: Tensor, param: Tensor) -> Tensor:
    if is_distributed(tensor) and is_distributed(param) and tensor.device_mesh == param.device_mesh:
        return tensor.redistribute(placements=param.placements).to_local()
    return _own(op, name, tensor, param)


def _layout(tensor: "DTensor") -> tuple:
    return tensor.shape, tensor.device_mesh, tuple(tensor.placements)


def _words(tensor: Tensor) -> str:
    return (
        f"a DTensor of {tuple(tensor.placements)}"
        if is_distributed(tensor)
        else f"a plain {kind_of(tensor)}"
    )


def found_inf(grads: Sequence[Tensor], local_found_inf) -> Tensor:
    """The flag of DTensors, plain tensors among them: every process's of its shards, and the
    largest over each mesh.

    local_found_inf: the op for plain tensors.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    plain, by_mesh = [], {}
    for grad in grads:
        if not is_distributed(grad):
            plain.append(grad)
            continue
        whole = [
            Replicate() if placement.is_partial() else placement for placement in grad.placements
        ]
        by_mesh.setdefault(grad.device_mesh, []).append(
            grad.redistribute(placements=whole).to_local()
        )
    flags = [local_found_inf(plain)] if plain else []
    for mesh, shards in by_mesh.items():
        flag = DTensor.from_local(
            local_found_inf(shards), mesh, [Partial("max")] * mesh.ndim, run_check=False
        )
        flags.append(flag.full_tensor())
    return torch.stack(flags).max()


def largest_over(group: "torch.distributed.ProcessGroup | None", flag: Tensor) -> Tensor:
    """The largest of the processes' flags; group None is the default group. No host synchronisation
    but for a flag on the CPU."""
    there = (
        flag.cuda()
        if flag.is_cpu and torch.distributed.get_backend(group) == "nccl"
        else flag.clone()
    )
    torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX, group)
    return there.to(flag.device)
