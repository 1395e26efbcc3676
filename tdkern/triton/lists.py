"""Lists of tensors, a launch for each tensor and those that belong to it: their pointers in the
kernel's arguments stay in a CUDA graph.

Not a launch for the whole list: its table of pointers and counts would have to be on the device,
since as arguments every count would be a specialisation to compile. A copy from the host's memory
waits for the host, or in a graph reads that memory at each replay, when torch may have given it to
another tensor.
"""

from contextlib import contextmanager

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """The values in float64 on the device.

    Those on the CPU go in kernel arguments: a graph's capture refuses a copy of memory that is not
    pinned.
    """
    if values.device == device:
        return values.double().contiguous()
    there = torch.empty(values.shape, dtype=torch.float64, device=device)
    for place, value in zip(there.view(-1).unbind(), values.reshape(-1).tolist(), strict=True):
        place.fill_(value)
    return there


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True
    same = all(
        size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
    # dense, or empty_like would have other strides
    return same and torch.empty_like(a).stride() == a.stride()


@contextmanager
def flat(tensors: list[Tensor]):
    """The tensors, of equal shape, as flat memory: themselves if they lie alike, else contiguous
    copies; all but the first are written back.
    """
    if all(_alike(tensors[0], tensor) for tensor in tensors):
        yield tensors
        return
    copies = [tensor.contiguous() for tensor in tensors]
    yield copies
    for tensor, copy in zip(tensors[1:], copies[1:], strict=True):
        tensor.copy_(copy)
