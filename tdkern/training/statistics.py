"""stats.jsonl, a line for every tick: what a line is, and what of a file is one."""

import json
import resource
import sys
from pathlib import Path

import torch

from ..data.files import read_file

FILE = "stats.jsonl"
LIMIT = 1 << 30  # bytes
# what a line says of the machine and the time of day: another run of the same bits has other values
OF_THE_MACHINE = ("time", "images_per_s", "seconds_left", "host_gib", "gpu_gib")


def read_ticks(path: Path, until: float = sys.float_info.max) -> dict[str, dict]:
    """The lines of a run's stats.jsonl, each with what it says, in the order of their kimg.

    Args:
        path: the file; where there is none, there is no line.
        until: the kimg of the last line that is wanted.

    A line that is torn, another's, or before the one above it is left out.

    Raises:
        OSError: the file cannot be read, or has more than LIMIT bytes.
    """
    ticks: dict[str, dict] = {}
    if not path.exists():
        return ticks
    last = -1.0
    for line in read_file(path, LIMIT).decode(errors="replace").split("\n")[:-1]:
        tick = _tick_of(line)
        if tick is not None and last < tick["kimg"] <= until:
            ticks[line] = tick
            last = tick["kimg"]
    return ticks


def _tick_of(line: str) -> dict | None:
    """What a line of stats.jsonl says; None if it is not one."""
    try:
        tick = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tick, dict) or type(tick.get("kimg")) not in (int, float):
        return None
    return tick


def memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has had so far, in GiB: of the host and of its GPU."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes in one of ru_maxrss
    most = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        most["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return most
