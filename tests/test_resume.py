import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import TINY, children, options_of, two_steps
from tqdm import tqdm

from tdkern.training import Options, Trainer, loop, train
from tdkern.training.checkpoint import SNAPSHOT, STATE, CheckpointError, find, read, read_options
from tdkern.training.distributed import this_process

pytestmark = pytest.mark.usefixtures("short_previews")


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
        {name: line[name] for name in line if name not in ("time", "images_per_s")}
        for line in statistics
    ]
    return files


def check_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


class Stop(Exception):
    pass


def start_and_stop(options, run_dir, monkeypatch):
    """A run that ends after the training state of its third step."""

    def stop(record, real=loop.Record.state):
        real(record)
        if record.trainer.step == 3:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(loop.Record, "state", stop)
        with pytest.raises(Stop):
            start(options, run_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "td": True,
            "cond": True,
            "xflip": True,
            "lr_decay": "cosine",
            "batch_gpu": 4,
            "augment": 0.5,
            "td_share": 0.5,
            "target_precision": "bf16",
            "target_copy": 2,
        },
        {"td": False, "precision": "bf16"},
    ],
    ids=["td", "edm"],
)
def test_steps_and_a_resume_are_the_same_steps_in_one_go(tmp_path, data, monkeypatch, changes):
    options = options_of(data=data, duration=56e-6, **TINY | changes)
    assert options.total_steps == 7
    straight = start(options, tmp_path / "straight")
    kinds = {name.partition(".")[0] for name in read(find(straight, STATE), STATE)[1]}
    assert kinds == {"net", "ema", "step", "exp_avg", "exp_avg_sq"} | (
        {"target"} if changes["td"] else set()
    )

    start_and_stop(options, tmp_path / "resumed", monkeypatch)
    torch.manual_seed(999)  # what the generators did meanwhile is of no consequence
    torch.rand(10)
    resume(tmp_path / "resumed", workers=2)
    expected, found = contents(straight), contents(tmp_path / "resumed")
    for name in expected:
        if name.endswith("meta.json"):
            (
                expected[name].pop("options"),
                found[name].pop("options"),
            )  # of which one is the number of workers
    check_same(found, expected)


def test_a_longer_duration_goes_on_from_the_end(tmp_path, data):
    short = options_of(data=data, duration=16e-6, **TINY)
    long = options_of(data=data, duration=32e-6, **TINY)
    run_dir = start(short, tmp_path / "short")
    resume(run_dir, duration=32e-6)
    _, tensors = read(find(run_dir, STATE), STATE)
    _, expected = read(find(start(long, tmp_path / "long"), STATE), STATE)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("written", ["format1", "format2", "format3"])
def test_a_state_of_an_older_format_goes_on(tmp_path, data, written):
    """Two steps on ten images, before there was augmentation, checksums, one name for a thing."""
    stored = Path(__file__).parent / "data" / written / "training-state-000000.016"
    meta, tensors = read(stored, STATE)
    assert "checksums" not in meta
    (tmp_path / "run").mkdir()
    trainer = Trainer(
        Options(**meta["options"]).resumed(data=data, duration=24e-6), this_process(), stored
    )
    ours = trainer.tensors()
    assert (
        trainer.step == 2
        and ours.keys() == tensors.keys()
        and all(torch.equal(ours[name], tensors[name]) for name in ours)
    )
    train(trainer, tmp_path / "run")
    assert read(find(tmp_path / "run", STATE), STATE)[0]["step"] == 3


def test_a_run_keeps_its_newest_state_and_all_its_snapshots(tmp_path, data):
    run_dir = start(options_of(data=data, duration=56e-6, **TINY), tmp_path / "run")
    assert [path.name for path in sorted(run_dir.glob("training-state-*"))] == [
        "training-state-000000.056"
    ]
    assert [path.name[-10:] for path in sorted(run_dir.glob("network-snapshot-*"))] == [
        "000000.024",
        "000000.048",
        "000000.056",
    ]


def _child(run_dir, options, kill):
    """In a process of its own: start or resume a run, and be killed at the n-th of its calls of a
    function, if told to.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    loop.preview_levels = two_steps
    sys.stderr = open(os.devnull, "w")
    tqdm.set_lock(
        threading.RLock()
    )  # its own lock between processes would be left behind by a kill
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


def _checkpoints_are_whole(run_dir):
    for kind in (SNAPSHOT, STATE):
        for path in run_dir.glob(f"{kind}-*"):
            meta, tensors = read(path, kind)
            assert meta["nimg"] == 8 * meta["step"]
            assert tensors


def _run_child(run_dir, options, kill=None, after=None):
    """Whether the child was killed: by itself at a call, or from here after some seconds."""
    child = children.Process(target=_child, args=(run_dir, options, kill))
    child.start()
    child.join(after)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def test_runs_killed_again_and_again_end_in_the_same_bits(tmp_path, data):
    options = options_of(data=data, duration=96e-6, **TINY)
    assert not _run_child(tmp_path / "straight", options)
    started = time.monotonic()
    assert not _run_child(tmp_path / "0", options)
    seconds = time.monotonic() - started
    expected = contents(tmp_path / "straight")
    choose = random.Random(0)
    calls = {
        "fsync": 30,
        "replace": 8,
        "rename": 5,
        "save_file": 4,
        "unlink": 4,
        "rmdir": 2,
    }  # about as many as three steps make
    kills = [
        {"kill": (name, choose.randrange(count))} for name, count in calls.items() for _ in range(2)
    ]
    kills += [{"after": choose.uniform(0.1, 0.9) * seconds} for _ in range(10)]
    choose.shuffle(kills)
    run, killed = 0, 0
    for kill in [*kills, {}]:
        run_dir = tmp_path / str(run)
        if _run_child(run_dir, options, **kill):
            killed += 1
            _checkpoints_are_whole(run_dir)
        else:  # it got to the end: the next is another run
            check_same(contents(run_dir), expected)
            assert not list(run_dir.glob(".*"))
            run += 1
    assert killed >= len(kills) // 2
