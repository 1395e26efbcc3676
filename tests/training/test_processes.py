"""Runs in several processes: what they draw, how they are started, and how they end."""

import json
import os
import signal
import sys
import time

import PIL.Image
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers.tiny import (
    TINY,
    data_set,
    flags,
    in_processes,
    options_of,
    pixels,
    quick_pictures,
    started_processes,
    tdkern_,
)
from tdkern.cli import main
from tdkern.training import Options, Trainer, distributed, train
from tdkern.training.checkpoint import AVERAGES, SNAPSHOT, STATE, find, read, read_options
from tdkern.training.distributed import joined, leave, this_process
from tdkern.training.sums import Sums

pytestmark = pytest.mark.usefixtures("short_previews")
# of 12 images per step; every second step is a tick
TWELVE = TINY | {"batch": 12, "tick": 0.024, "snap": 0, "dump": 0, "augment": 0.3, "seed": 5}
FAMILIES = {
    "edm": {"cond": True},
    "edm, shared": {"td_coupling": "shared"},
    "edm without TD": {"td": False},
    "ct": {"family": "ct"},
    "ict": {"family": "ct", "scale_mode": "exponential", "total_training_steps": 1000},
    "ddpm": {"family": "ddpm"},
    "vp, uncertainty": {"family": "vp", "uncertainty": True},
}


def changes_of(family):
    names = {"td_coupling": "coupling"}
    return {names.get(name, name): value for name, value in FAMILIES[family].items()}


def _rank(rank, run_dir, options, resumed):
    quick_pictures()
    with joined() as process:
        state = find(run_dir, STATE) if resumed else None
        train(Trainer(options, process, state), run_dir if rank == 0 else None)


def run(run_dir, options, resumed=False):
    """Train in as many processes as the options say: the losses of its ticks."""
    run_dir.mkdir(exist_ok=True)
    in_processes(options.gpus, _rank, run_dir, options, resumed)
    lines = (run_dir / "stats.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_processes_sees_the_same_losses(tmp_path, data, family):
    changes = TWELVE | changes_of(family)
    losses = [
        run(tmp_path / f"{gpus}", options_of(data=data, duration=72e-6, gpus=gpus, **changes))
        for gpus in (1, 3)
    ]
    assert len(losses[0]) == 3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_fifty_steps_in_one_two_three_and_four_processes(tmp_path, data):
    """With a ramp as long as published ones: Adam makes much of the rounding of gradients that are
    next to zero.
    """
    changes = TWELVE | {"lr_rampup_kimg": 10}
    losses = [
        run(tmp_path / f"{gpus}", options_of(data=data, duration=6e-4, gpus=gpus, **changes))
        for gpus in (1, 2, 3, 4)
    ]
    assert len(losses[0]) == 25
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=0)


def test_a_run_goes_on_in_another_number_of_processes(tmp_path, data):
    """Also from the middle of a tick, of which each process has its part."""
    straight = run(tmp_path / "straight", options_of(data=data, duration=96e-6, **TWELVE))
    run_dir = tmp_path / "run"
    short = TWELVE | {"gpus": 2, "batch_gpu": 3}
    first = run(run_dir, options_of(data=data, duration=36e-6, **short))
    for gpus, duration in ((3, 72e-6), (1, 96e-6)):
        options = Options(**read_options(run_dir / "training_options.json"))
        options = options.resumed(gpus=gpus, duration=duration)
        assert options.batch // gpus % options.batch_gpu == 0
        losses = run(run_dir, options, resumed=True)
    assert len(first) == 2 and len(losses) >= 4
    torch.testing.assert_close(losses[-1], straight[-1], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"power_ema": [0.05, 0.1]},
        {"family": "ct", "optim": "radam", "total_training_steps": 1000},
        {"clip": 0.5, "batch_gpu": 2, "cond": True, "uncertainty": True},
    ],
)
def test_shards_are_the_same_run(tmp_path, data, changes):
    """The same losses, states and snapshots that go on without shards and with them again, in any
    number of processes.
    """
    changes = TWELVE | {"snap": 1, "dump": 1, "lr_rampup_kimg": 10} | changes
    straight = tmp_path / "straight"
    losses = run(straight, options_of(data=data, duration=96e-6, **changes))
    run_dir = tmp_path / "run"
    options = options_of(data=data, duration=48e-6, gpus=2, shard=True, **changes)
    run(run_dir, options)
    for gpus, shard, duration in ((1, False, 72e-6), (3, True, 96e-6)):
        options = options.resumed(gpus=gpus, shard=shard, duration=duration)
        found = run(run_dir, options, resumed=True)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
    for kind in (STATE, SNAPSHOT, *([AVERAGES] if "power_ema" in changes else [])):
        (_, ours), (_, theirs) = (read(find(path, kind), kind) for path in (run_dir, straight))
        assert ours.keys() == theirs.keys()
        worst = max((ours[name].double() - theirs[name].double()).abs().max() for name in ours)
        assert worst < 1e-4  # Adam makes steps of the rounding of gradients next to zero


def test_the_grid_of_a_run_in_shards_is_drawn_without_dropout(tmp_path, data):
    """It is the snapshot's, as `generate` draws it."""
    changes = TWELVE | {"shard": True, "dropout": 0.5, "lr": 0.1}  # so that dropout shows
    run(tmp_path / "run", options_of(data=data, duration=48e-6, gpus=2, **changes))
    grid = ("--grid", tmp_path / "grid.png", "--seeds", "0-15", "--steps", "2", "--batch", 6)
    tdkern_("generate", "--network", tmp_path / "run", *grid)
    drawn = PIL.Image.open(tmp_path / "run" / "fakes-000000.048.png")
    assert drawn.tobytes() == PIL.Image.open(tmp_path / "grid.png").tobytes()


def test_a_state_in_the_middle_of_a_tick_keeps_its_sums(data):
    trainer = Trainer(options_of(data=data, duration=96e-6, **TWELVE), this_process())
    trainer._restore_statistics({"counted": 12, "sums": [[1.0] * 4, [2.0] * 4], "skipped": 0}, "x")
    assert Sums.of(trainer.sums).terms.tolist() == [3.0] * 4


# ---- how they are started -----------------------------------------------------------------------


def _differing(rank, data, name, value):
    changes = TWELVE | ({name: value} if rank == 1 else {})
    options = options_of(data=data, duration=24e-6, gpus=2, **changes)
    with joined() as process, pytest.raises(ValueError, match=f"same {name}, got .* in process 1"):
        Trainer(options, process)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.5), ("seed", 6), ("loss", {"k_idx": 2.0}), ("cbase", 8)]
)
def test_processes_that_were_started_otherwise_are_refused(data, name, value):
    if name == "loss":
        name, value = "k_idx", 2.0
        in_processes(2, _differing_loss, data)
    else:
        in_processes(2, _differing, data, name, value)


def _differing_loss(rank, data):
    changes = TWELVE | ({"k_idx": 2.0} if rank == 1 else {})
    options = options_of(data=data, duration=24e-6, gpus=2, **changes)
    with joined() as process, pytest.raises(ValueError, match="same loss, got"):
        Trainer(options, process)


def _differing_data(rank, paths):
    options = options_of(data=str(paths[rank]), duration=24e-6, gpus=2, cond=True, **TWELVE)
    with joined() as process, pytest.raises(ValueError, match=r"same images, got .* in process 1"):
        Trainer(options, process)


@pytest.mark.parametrize("change", ["pixels", "labels"])
def test_one_with_other_data_of_the_same_size_is_refused(tmp_path, change):
    images, labels = pixels(10), [i % 3 for i in range(10)]
    paths = [data_set(tmp_path / "a.zip", images, labels)]
    (tmp_path / "other").mkdir()
    if change == "pixels":
        images = images[::-1]
    else:
        labels = labels[::-1]
    paths.append(data_set(tmp_path / "other" / "a.zip", images, labels))
    in_processes(2, _differing_data, paths)


@pytest.mark.parametrize(
    "env",
    [
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "RANK": "1"},
        {"WORLD_SIZE": "x", "RANK": "1", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"},
    ],
)
def test_an_environment_without_the_others_is_refused(monkeypatch, env):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start with torchrun"), joined():
        pass


# ---- how they end -------------------------------------------------------------------------------


def _until_lost(rank, folder, data, lost, way):
    quick_pictures()
    distributed.BEAT, distributed.SILENCE = 0.1, 2.0
    real = Trainer.train_step

    def train_step(self, *args):
        if rank == lost and self.step == 2:
            (folder / "lost").touch()
            if way == "fails":
                raise OSError("images.zip: image 7 is damaged")
            os.kill(os.getpid(), way)
        real(self, *args)

    Trainer.train_step = train_step
    changes = {"data": data, "outdir": folder / "run", "duration": 1e-3}
    with open(folder / f"stderr{rank}", "w") as sys.stderr:
        main(["train", "--nosubdirs", "--cond", *flags(TWELVE | changes)])


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("way", [signal.SIGSTOP, signal.SIGKILL, "fails"])
def test_a_process_that_is_lost_ends_the_others(tmp_path, data, lost, way):
    """Whether it was stopped, killed or failed by itself: in one line."""
    ranks = started_processes(2, _until_lost, tmp_path, data, lost, way)
    try:
        other = ranks[1 - lost]
        other.join(60)
        assert (tmp_path / "lost").exists() and other.exitcode == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    said = (tmp_path / f"stderr{1 - lost}").read_text()
    *_, last = said.strip().splitlines()
    silent = f"process {1 - lost} of 2 ends: process {lost} gave no sign of life for 2 s"
    gone = "another process of the run ended or cannot be reached"
    assert last.startswith("Error: ") and "Traceback" not in said, said
    assert silent in last or (way != signal.SIGSTOP and gone in last), said


def _leaves_at(rank, seconds):
    distributed.BEAT, distributed.SILENCE = 0.1, 1.0
    with joined():
        time.sleep(seconds[rank])


@pytest.mark.parametrize("seconds", [(0, 3), (3, 0)])
def test_one_that_is_done_may_leave_before_the_others(seconds):
    in_processes(2, _leaves_at, seconds)


def _one_exchange():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    net = DistributedDataParallel(torch.nn.Linear(3, 3))
    net(torch.rand(2, 3)).sum().backward()
    leave()  # and the wrapper is freed at once


def _exchanges(rank):
    for _ in range(100):
        _one_exchange()


def test_a_wrapper_may_outlive_its_group():
    """Its destructor waits for the group's threads, if nobody else holds the group any more."""
    in_processes(1, _exchanges, seconds=60)
