"""Runs from the command line, and what their directories hold."""

import json
import time
from pathlib import Path

import torch

from helpers import DATA
from helpers.tiny import (
    TINY,
    flags,
    tdkern_,
    train_args,
)
from tdkern.training import checkpoint
from tdkern.training.checkpoint import EVENTS, SNAPSHOT, STATE, find, read
from tdkern.training.statistics import OF_THE_MACHINE

FAULTS = DATA / "faults"
OK = str(FAULTS / "ok.zip")
AT = 5  # the step in whose middle a signal comes


def printed(run_dir, *args, data=OK, duration=24e-6, code=0, **changes):
    """What a run from the command line prints."""
    return tdkern_(
        *train_args(data, run_dir, duration, TINY | changes),
        *args,
        code=code,
    )


def start(run_dir, duration=24e-6, **changes):
    """A run from the command line."""
    printed(run_dir, duration=duration, **changes)
    return run_dir


def resume(path, *args, code=0):
    return tdkern_("train", "--resume", path, *args, code=code)


def states(run_dir):
    return [path.name for path in checkpoint.checkpoints(run_dir, STATE)]


def names(run_dir):
    """What is in a run directory, but for TensorBoard's files: every resume has one of its own."""
    return sorted(path.name for path in run_dir.iterdir() if not EVENTS.fullmatch(path.name))


def tensors(run_dir):
    return read(find(run_dir, STATE), STATE)[1]


def statistics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in OF_THE_MACHINE} for line in lines]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def move_to(run_dir, nimg):
    """Give a run's newest checkpoints the number of images of a later one."""
    for kind in (SNAPSHOT, STATE):
        path = find(run_dir, kind)
        meta = json.loads((path / "meta.json").read_text())
        meta |= {"step": nimg // 8, "nimg": nimg}
        (path / "meta.json").write_text(json.dumps(meta))
        path.rename(run_dir / f"{kind}-{checkpoint.kimg(nimg)}")


def line(output):
    """The last line, which must say it all."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in output, output
    return last


def coarse(**changes):
    """Options of a run whose tick is its duration: nothing is saved on the way."""
    return TINY | {"tick": 0.08, "snap": 0, "dump": 0} | changes


def find_step(run_dir):
    return read(find(run_dir, STATE), STATE)[0]["step"]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def train_dry(data, *args, code=0):
    return tdkern_(
        "train",
        "--data",
        data,
        "--outdir",
        "nowhere",
        "--duration",
        8e-6,
        *flags(TINY),
        *args,
        "-n",
        code=code,
    )
