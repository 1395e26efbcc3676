import random
import time

import pytest
import torch

from helpers import DATA
from helpers.runs import (
    check_same,
    checkpoints_are_whole,
    contents,
    resume,
    run_child,
    start,
    start_and_stop,
)
from helpers.tiny import TINY, options_of
from tdkern.training import Options, Trainer, train
from tdkern.training.checkpoint import STATE, find, read
from tdkern.training.distributed import this_process

pytestmark = pytest.mark.usefixtures("short_previews")


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
        {"td": False, "precision": "bf16", "uncertainty": True},
        # the state is of a step that RAdam does not rectify, the end of one that it does
        {
            "td": True,
            "optim": "radam",
            "weight_decay": 0.1,
            "clip": 0.5,
            "power_ema": [0.05, 0.1],
            "lr_rampup_kimg": 0,
            "duration": 72e-6,
        },
    ],
    ids=["td", "edm", "radam"],
)
def test_steps_and_a_resume_are_the_same_steps_in_one_go(tmp_path, data, monkeypatch, changes):
    options = options_of(data=data, **{"duration": 56e-6} | TINY | changes)
    assert options.total_steps >= 7
    straight = start(options, tmp_path / "straight")
    kinds = {name.partition(".")[0] for name in read(find(straight, STATE), STATE)[1]}
    assert kinds == {"net", "ema", "step", "exp_avg", "exp_avg_sq"} | (
        {"target"} if changes["td"] else set()
    ) | ({"power"} if "power_ema" in changes else set()) | (
        {"uncertainty"} if "uncertainty" in changes else set()
    )

    start_and_stop(options, tmp_path / "resumed", monkeypatch)
    torch.manual_seed(999)  # what the generators did meanwhile is of no consequence
    torch.rand(10)
    resume(tmp_path / "resumed", workers=2)
    expected, found = contents(straight), contents(tmp_path / "resumed")
    for name in expected:
        if name.endswith("meta.json"):
            # of which one is the number of workers
            (
                expected[name].pop("options"),
                found[name].pop("options"),
            )
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
    stored = DATA / written / "training-state-000000.016"
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


def test_runs_killed_again_and_again_end_in_the_same_bits(tmp_path, data):
    options = options_of(data=data, duration=96e-6, **TINY)
    assert not run_child(tmp_path / "straight", options)
    started = time.monotonic()
    assert not run_child(tmp_path / "0", options)
    seconds = time.monotonic() - started
    expected = contents(tmp_path / "straight")
    choose = random.Random(0)
    # about as many as three steps make
    calls = {
        "fsync": 30,
        "replace": 8,
        "rename": 5,
        "save_file": 4,
        "unlink": 4,
        "rmdir": 2,
    }
    kills = [
        {"kill": (name, choose.randrange(count))} for name, count in calls.items() for _ in range(2)
    ]
    kills += [{"after": choose.uniform(0.1, 0.9) * seconds} for _ in range(10)]
    choose.shuffle(kills)
    run, killed = 0, 0
    for kill in [*kills, {}]:
        run_dir = tmp_path / str(run)
        if run_child(run_dir, options, **kill):
            killed += 1
            checkpoints_are_whole(run_dir)
        else:  # it got to the end: the next is another run
            check_same(contents(run_dir), expected)
            assert not list(run_dir.glob(".*"))
            run += 1
    assert killed >= len(kills) // 2
