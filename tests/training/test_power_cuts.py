"""What a power cut leaves is whole."""

import functools
import os
from pathlib import Path

import pytest

from helpers.run_dirs import (
    start,
)

pytestmark = pytest.mark.usefixtures("short_previews")


class Disk:
    """What a disk may hold after a power cut: of what was not made durable, nothing.

    Names are durable once their directory was synced, contents once the file was.
    """

    def __init__(self, monkeypatch, root):
        self.root, self.events = root, []
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, functools.partial(self._call, name, getattr(os, name)))

    def _call(self, name, real, *args):
        if name == "fsync":
            place = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            self.events.append(
                (
                    "sync",
                    place,
                    list(map(str, place.iterdir())) if place.is_dir() else place.stat().st_size,
                )
            )
        else:
            self.events.append(("rename", *map(Path, args)))
        return real(*args)


def test_a_state_is_durable_before_its_name_is_and_before_the_older_goes(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, tmp_path)
    run_dir = start(tmp_path / "run", duration=16e-6)
    events = disk.events
    named = [
        i
        for i, event in enumerate(events)
        if event[0] == "rename" and event[2].name.startswith("training-state")
    ]
    assert len(named) == 2
    for i in named:
        unfinished = events[i][1]
        synced = [
            event[1].name
            for event in events[:i]
            if event[0] == "sync" and event[1].parent == unfinished
        ]
        assert "tensors.safetensors" in synced and any(
            name.startswith(".meta.json") for name in synced
        )
        contents = next(
            event for event in reversed(events[:i]) if event[0] == "sync" and event[1] == unfinished
        )[2]
        assert {Path(name).name for name in contents} == {"tensors.safetensors", "meta.json"}
        assert events[i + 1][:2] == ("sync", run_dir)  # the next thing
        lines = next(
            event
            for event in reversed(events[:i])
            if event[0] == "sync" and event[1].name == "stats.jsonl"
        )
        assert lines[2] > 0
    removed = next(
        i
        for i, event in enumerate(events)
        if event[0] == "rename" and event[1].name == "training-state-000000.008"
    )
    assert removed > named[1] + 1
