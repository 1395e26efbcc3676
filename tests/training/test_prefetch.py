"""Batches on their way to the device: which stream does what, and for what the host waits."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from helpers.runs import check_same, contents, start
from helpers.tiny import TINY, options_of
from tdkern.training import loop, prefetch
from tdkern.training.prefetch import AHEAD, on_device

GPU = torch.device("cuda", 0)


class Machine:
    """In place of torch.cuda: streams that only say what they are asked for, in order."""

    def __init__(self):
        self.said, self.now = [], "steps"
        self.Stream = lambda device: self.stream_of("copies")
        self.current_stream = lambda device: self.stream_of(self.now)

    def stream_of(self, name):
        wait = lambda other: self.said.append((name, "waits for", other.name))
        return SimpleNamespace(name=name, wait_stream=wait)

    def Event(self, blocking):
        """Of the end of the step that was the last to run."""
        assert blocking
        step = self.said[-1][1]
        return SimpleNamespace(
            record=lambda stream: self.said.append((stream.name, "end", step)),
            synchronize=lambda: self.said.append(("host waits", step)),
        )

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def tensor(self, name):
        """A tensor of the host, which says by which stream it is copied and who still reads it."""

        def to(device, non_blocking):
            assert device == GPU and non_blocking
            self.said.append((self.now, "copies", name))
            kept = lambda stream: self.said.append((stream.name, "holds", name))
            return SimpleNamespace(name=name, record_stream=kept)

        return SimpleNamespace(to=to)


def test_a_batch_is_copied_beside_the_step_before(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(prefetch, "cuda", machine)
    batches = ([machine.tensor(f"x{i}"), machine.tensor(f"y{i}")] for i in range(AHEAD + 3))
    for i, (images, labels) in enumerate(on_device(batches, GPU)):
        assert (images.name, labels.name) == (f"x{i}", f"y{i}")
        machine.said.append(("runs", i))
    for i in range(AHEAD + 3):
        begin = machine.said.index(("copies", "copies", f"x{i}"))
        assert machine.said[begin : begin + 7] == [
            ("copies", "copies", f"x{i}"),
            ("copies", "copies", f"y{i}"),
            ("steps", "waits for", "copies"),
            ("steps", "holds", f"x{i}"),
            ("steps", "holds", f"y{i}"),
            ("runs", i),
            ("steps", "end", i),
        ]
    waits = [i for i, said in enumerate(machine.said) if said[0] == "host waits"]
    assert [machine.said[i] for i in waits] == [("host waits", step) for step in range(3)]
    ends = [("steps", "end", step + AHEAD) for step in range(3)]
    assert [machine.said[i - 1] for i in waits] == ends


def test_on_a_cpu_batches_are_as_they_are():
    batches = [[torch.zeros(2), torch.ones(2)]] * 3
    assert list(on_device(batches, torch.device("cpu"))) == batches


@pytest.mark.usefixtures("short_previews")
def test_a_run_takes_its_batches_through_it_in_their_order(tmp_path, data, monkeypatch):
    """One that copies them first trains the same network."""
    copied = []

    def copying(batches, device):
        for batch in batches:
            copied.append(device)
            yield [tensor.clone() for tensor in batch]

    make = lambda: options_of(data=data, duration=24e-6, **TINY)
    expected = contents(start(make(), tmp_path / "plain"))
    monkeypatch.setattr(loop, "on_device", copying)
    check_same(contents(start(make(), tmp_path / "copied")), expected)
    assert copied == [torch.device("cpu")] * 3
