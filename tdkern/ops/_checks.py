"""Checks that every op shares: what a tensor is, what a list of tensors is, and whether memory that
is written overlaps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._modes import PLAIN, transformed

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def kind_of(value: object) -> str:
    """A value's type as an error names it."""
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ in ("builtins", "torch")
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def check_tensor(op: str, name: str, value: object) -> None:
    """Refuse what is no dense tensor of this process alone."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {kind_of(value)}")
    if value.is_nested:
        raise ValueError(f"{op}: {name} must be a dense tensor, got a nested tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got one of layout {value.layout}")
    if is_distributed(value):
        raise ValueError(
            f"{op}: {name} must be a plain tensor, got a DTensor: give its to_local() or "
            "full_tensor(), or backend='reference'"
        )


def check_tensors(op: str, name: str, values: object) -> None:
    """Refuse what is no list or tuple of dense tensors."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{op}: {name} must be a list or tuple of tensors, got {kind_of(values)}")
    for i, value in enumerate(values):
        check_tensor(op, f"{name}[{i}]", value)


def check_number(op: str, name: str, value: object) -> None:
    """Refuse what is no number, where a number is wanted. For error messages: symbolic numbers
    would be refused too."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.number | Tensor)
        or (isinstance(value, Tensor) and value.numel() != 1)
    ):
        raise ValueError(f"{op}: {name} must be a number, got {kind_of(value)}")


def is_distributed(value: object) -> "TypeGuard[DTensor]":
    """Whether a value is a DTensor."""
    if type(value) in PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


# ---- overlapping memory: csrc/include/overlap.h has the same rules


class _Span(NamedTuple):
    """The bytes from a tensor's first element to behind its last."""

    begin: int
    end: int
    row: int  # tensors of one row belong together, element by element
    written: bool
    name: str
    tensor: Tensor


def _span(name: str, tensor: Tensor, row: int, written: bool) -> _Span:
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = tensor.data_ptr()
    return _Span(begin, begin + (last + 1) * tensor.element_size(), row, written, name, tensor)


def _places(tensor: Tensor) -> np.ndarray:
    """The first byte of every element."""
    at = np.array([tensor.data_ptr()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = (at[:, None] + np.arange(size) * stride * tensor.element_size()).ravel()
    return at


def _dense(tensor: Tensor) -> bool:
    reach = 1
    for stride, size in sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    ):
        if stride != reach:
            return False
        reach *= size
    return True


def _overlaps_itself(tensor: Tensor) -> bool:
    if _dense(tensor):
        return False
    if any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return True
    return len(np.unique(_places(tensor))) < tensor.numel()


def _overlap(a: Tensor, b: Tensor) -> bool:
    in_a, in_b = np.sort(_places(a)), np.sort(_places(b))
    # for each element of a, the first element of b that does not begin before it
    behind = np.searchsorted(in_b, in_a)
    after = behind < len(in_b)
    before = behind > 0
    return bool(
        (in_b[behind[after]] < in_a[after] + a.element_size()).any()
        or (in_a[before] < in_b[behind[before] - 1] + b.element_size()).any()
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True
    return all(
        size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def _may_meet(a: _Span, b: _Span) -> bool:
    if not a.written and not b.written:
        return True
    same = (
        a.row == b.row
        and a.begin == b.begin
        and a.tensor.dtype == b.tensor.dtype
        and a.tensor.shape == b.tensor.shape
    )
    if same and a.written != b.written and _alike(a.tensor, b.tensor):
        return True
    return not (_dense(a.tensor) and _dense(b.tensor)) and not _overlap(a.tensor, b.tensor)


def refuse_overlap(
    op: str, written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor]]
) -> None:
    """Refuse written memory that overlaps itself or another tensor, as torch's own in-place ops do.

    Tensor i of every list is of row i. What is written may be, element by element, what is read in
    the same row.
    """
    if torch.compiler.is_compiling() or transformed():
        return  # there is no memory yet, and the kernels look again; or the reference computes
    spans = []
    for columns, is_written in ((written, True), (read, False)):
        for name, column in columns.items():
            for i, tensor in enumerate(column):
                if type(tensor) in PLAIN and not tensor.is_meta and tensor.numel() > 0:
                    spans.append(_span(f"{name}[{i}]", tensor, i, is_written))
    for span in spans:
        if span.written and _overlaps_itself(span.tensor):
            raise ValueError(f"{op}: {span.name} is written and overlaps itself: clone() it first")
    open_spans: list[_Span] = []
    for span in sorted(spans, key=lambda span: span.begin):
        open_spans = [other for other in open_spans if other.end > span.begin]
        for other in open_spans:
            if not _may_meet(other, span):
                first, second = (span, other) if span.written else (other, span)
                raise ValueError(
                    f"{op}: {first.name} is written and overlaps {second.name}: clone() one of "
                    "them first"
                )
        open_spans.append(span)
