"""Runs started, stopped and resumed in this process, and what they leave."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import safetensors.torch
from tqdm import tqdm

from helpers.tiny import as_child, children, quick_pictures
from tdkern.training import Options, Trainer, record, train
from tdkern.training.checkpoint import (
    SNAPSHOT,
    STATE,
    CheckpointError,
    find,
    read,
    read_options,
    remove,
    write,
)
from tdkern.training.distributed import this_process
from tdkern.training.statistics import OF_THE_MACHINE


def start(options, run_dir):
    run_dir.mkdir()
    train(Trainer(options, this_process()), run_dir)
    return run_dir


def resume(run_dir, **changes):
    """Go on with a run from its newest state, or from the beginning where there is none yet."""
    try:
        state = find(run_dir, STATE)
    except CheckpointError:
        state = None
    options = Options(**read_options(run_dir / "training_options.json")).resumed(**changes)
    train(Trainer(options, this_process(), state), run_dir)


def poison(run_dir, value=float("nan")):
    """Let one weight of a run's snapshot be another number."""
    path = find(run_dir, SNAPSHOT)
    meta, tensors = read(path, SNAPSHOT)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.map_layer0.bias"][3] = value
    remove(path)
    kept = ("step", "network", "options", "classes")
    write(
        run_dir,
        SNAPSHOT,
        meta["nimg"],
        tensors,
        {name: meta[name] for name in kept if name in meta},
    )


def contents(run_dir):
    """What a run leaves, as far as it does not depend on the time of day."""
    files = {}
    for path in sorted(run_dir.rglob("*")):
        if path.suffix in (".safetensors", ".png"):
            files[str(path.relative_to(run_dir))] = path.read_bytes()
        elif path.name == "meta.json":
            files[str(path.relative_to(run_dir))] = json.loads(path.read_text())
    statistics = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    files["stats.jsonl"] = [
        {name: line[name] for name in line if name not in OF_THE_MACHINE} for line in statistics
    ]
    return files


def check_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


class Stop(Exception):
    pass


def start_and_stop(options, run_dir, monkeypatch):
    """A run that ends after the training state of its third step."""

    def stop(self, *args, real=record.Record.state):
        real(self, *args)
        if self.trainer.step == 3:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(record.Record, "state", stop)
        with pytest.raises(Stop):
            start(options, run_dir)


def train_or_die(run_dir, options, kill):
    """In a process of its own: start or resume a run, and be killed at the n-th of its calls of a
    function, if told to.
    """
    as_child()
    quick_pictures()
    # its own lock between processes would be left behind by a kill
    tqdm.set_lock(threading.RLock())
    if kill is not None:
        name, call = kill
        calls = iter(range(10**6))
        real = safetensors.torch.save_file if name == "save_file" else getattr(os, name)

        def killing(*args, **kwargs):
            if next(calls) == call:
                if name == "save_file":  # half of it
                    Path(args[1]).write_bytes(safetensors.torch.save(args[0])[:-1000])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(safetensors.torch if name == "save_file" else os, name, killing)
    if (run_dir / "training_options.json").exists():
        resume(run_dir)
    else:
        run_dir.mkdir(exist_ok=True)
        train(Trainer(options, this_process()), run_dir)


def checkpoints_are_whole(run_dir):
    for kind in (SNAPSHOT, STATE):
        for path in run_dir.glob(f"{kind}-*"):
            meta, tensors = read(path, kind)
            assert meta["nimg"] == 8 * meta["step"]
            assert tensors


def run_child(run_dir, options, kill=None, after=None):
    """Whether the child was killed: by itself at a call, or from here after some seconds."""
    child = children.Process(target=train_or_die, args=(run_dir, options, kill))
    child.start()
    child.join(after)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0
