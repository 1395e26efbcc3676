"""Batches on their way to a GPU while the step before them runs."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, cuda

AHEAD = 2  # steps that may wait for the device, each with its batch in memory


def on_device(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator:
    """The batches, on a GPU copied by a stream of their own.

    Between two of them the host waits for the end of the step AHEAD before the last: never for the
    one that runs, so that the device has always the next one.

    Args:
        batches: pinned in memory where the device is a GPU.
        device: the steps'.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies, steps = cuda.Stream(device), deque()
    for batch in batches:
        current = cuda.current_stream(device)
        with cuda.stream(copies):
            copied = [tensor.to(device, non_blocking=True) for tensor in batch]
        current.wait_stream(copies)
        for tensor in copied:
            tensor.record_stream(current)  # or a later copy might take their memory too early
        yield copied
        end = cuda.Event(blocking=True)  # whoever waits for it leaves the processor to the readers
        end.record(current)
        steps.append(end)
        if len(steps) > AHEAD:
            steps.popleft().synchronize()
