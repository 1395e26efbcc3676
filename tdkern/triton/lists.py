"""Lists of tensors, a launch each: pointers in kernel arguments need no table on the device and stay in a CUDA graph."""
from contextlib import contextmanager

import torch
from torch import Tensor


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True
    same = all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))
    return same and torch.empty_like(a).stride() == a.stride()  # dense, or empty_like would have other strides


@contextmanager
def flat(tensors: list[Tensor]):
    """The tensors, of equal shape, as flat memory: themselves if they lie alike, else contiguous copies; all but the first are written back."""
    if all(_alike(tensors[0], tensor) for tensor in tensors):
        yield tensors
        return
    copies = [tensor.contiguous() for tensor in tensors]
    yield copies
    for tensor, copy in zip(tensors[1:], copies[1:], strict=True):
        tensor.copy_(copy)
