"""How long the parts of a step last."""

import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from torch import nn

FORWARD, TARGET, LOSS = "network forward", "target forward", "loss path"
BACKWARD, OPTIMIZER, AVERAGES = "backward", "optimizer", "averages"
PARTS = (FORWARD, TARGET, LOSS, BACKWARD, OPTIMIZER, AVERAGES)


class Clock:
    """Marks between the parts of steps: the host's time, or on a GPU the device's, by events.

    `start` begins; each `mark` ends the part that it names. Nothing waits for a GPU before `read`.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin, after all that the GPU still has to do."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """What came since the last mark was this part."""
        self.marks.append((part, self._now()))

    @contextmanager
    def watching(self, net: nn.Module, target: nn.Module):
        """Mark the calls of two networks, and what lies before each as the loss path."""
        handles = []
        for module, part in ((net, FORWARD), (target, TARGET)):
            handles += [
                module.register_forward_pre_hook(lambda *_: self.mark(LOSS)),
                module.register_forward_hook(lambda *_, part=part: self.mark(part)),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self) -> dict[str, float]:
        """Milliseconds of each part, all its marks together."""
        if self.on_gpu:
            torch.cuda.synchronize()
        parts = defaultdict(float)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            if self.on_gpu:
                parts[part] += before.elapsed_time(after)
            else:
                parts[part] += 1e3 * (after - before)
        return dict(parts)
