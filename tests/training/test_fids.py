"""FIDs that a run measures while it trains, and what becomes of them."""

import importlib
import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from tqdm import tqdm

from helpers.runs import check_same, contents, resume, start
from helpers.tiny import (
    TINY,
    Detector,
    as_child,
    children,
    in_processes,
    invoked,
    options_of,
    quick_pictures,
    tdkern_,
)
from tdkern.evaluation import unfinished
from tdkern.evaluation.fid import Statistics, write_statistics
from tdkern.samplers import SAMPLERS
from tdkern.training import Options, Trainer, fids, load_network, statistics, train
from tdkern.training.checkpoint import (
    SNAPSHOT,
    STATE,
    checkpoints,
    find,
    images_of,
    read,
    read_options,
)
from tdkern.training.distributed import joined, this_process
from tdkern.training.sampling import NotFinite
from tdkern.training.signals import Stopped

pytestmark = pytest.mark.usefixtures("short_previews")
# every second step is a tick with FIDs of 9 images, in three batches
MEASURED = TINY | {"fid_every": 2, "fid_steps": [3, 2], "fid_num": 9, "duration": 48e-6, "snap": 0}


class Drawing(Detector):
    """It draws random numbers, as a detector might."""

    identity = "drawing"

    def __call__(self, images):
        torch.rand(3)
        return super().__call__(images)


def stand_in():
    """In a process of its own: a detector in place of Inception, and small batches."""
    fids.make_detector, fids.BATCH = lambda *_: Drawing(), 4


@pytest.fixture(autouse=True)
def drawing(monkeypatch):
    monkeypatch.setattr(fids, "make_detector", lambda *_: Drawing())
    monkeypatch.setattr(fids, "BATCH", 4)


@pytest.fixture
def measured(tmp_path, data):
    """A run's options, with a reference beside the data."""
    write_statistics(tmp_path / "ref.npz", Statistics(np.full(2, 120.0), 500 * np.eye(2)))

    def options(**changes):
        return options_of(data=data, fid_ref=str(tmp_path / "ref.npz"), **MEASURED | changes)

    return options


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def fids_in(run_dir):
    found = statistics.fids_of(statistics.read_lines(run_dir / "stats.jsonl"))
    return {(kimg, fid.steps): fid.value for kimg, fid in found}


# ---- what is measured ---------------------------------------------------------------------------


def test_training_is_the_same_with_and_without(tmp_path, measured):
    """Weights, averages, Adam, what is told of ticks; of a network with dropout."""
    changes = {"cond": True, "dropout": 0.2, "augment": 0.3}
    found = {}
    for every in (0, 1):
        run_dir = start(measured(fid_every=every, **changes), tmp_path / f"{every}")
        files = contents(run_dir)
        ticks = [line for line in files.pop("stats.jsonl") if "metric" not in line]
        tensors = {name: files[name] for name in files if name.endswith("/tensors.safetensors")}
        found[every] = tensors | {"ticks": ticks}
    assert len(found[0]) == 3
    check_same(found[1], found[0])


def test_the_generators_are_as_they_were(measured):
    trainer = Trainer(measured(), this_process())
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    signum, fid = trainer.meter.measure(trainer.ema.module, 2, None, print, lambda: 0)
    assert torch.equal(torch.rand(2), expected)
    assert signum == 0 and fid.value > 0
    torch.manual_seed(7)
    fids.FidMeter(measured(), this_process(), trainer.dataset, trainer.network)
    assert torch.equal(torch.rand(2), expected)


def test_they_are_those_of_fid_steps(tmp_path, measured, monkeypatch):
    run_dir = start(measured(snap=2, cond=True), tmp_path / "run")
    found = fids_in(run_dir)
    assert list(found) == [(0.016, 2), (0.016, 3), (0.032, 2), (0.032, 3), (0.048, 2), (0.048, 3)]
    monkeypatch.setattr("tdkern.cli.fid.make_detector", lambda *_: Drawing())
    for snapshot in checkpoints(run_dir, SNAPSHOT):
        flags = ["--network", snapshot, "--ref", tmp_path / "ref.npz", "--num", 9, "--batch", 4]
        result = invoked("fid", "steps", *flags, "--steps", "2,3")
        for row in json.loads(result.stdout.splitlines()[-1])["results"]:
            kimg = float(snapshot.name.rpartition("-")[2])
            assert found[kimg, row["steps"]] == pytest.approx(row["fid"], rel=1e-9)
    line = next(line for line in lines(run_dir) if "metric" in line)
    assert (line["metric"], line["nfe"], line["num"]) == ("fid", 3, 9)


@pytest.mark.parametrize(
    "changes, steps, sampler",
    [
        ({"fid_steps": None}, [5, 9, 18], "heun"),
        ({"fid_steps": [9, 2, 9]}, [2, 9], "heun"),
        ({"fid_steps": None, "family": "ct"}, [1, 2], "multistep"),
    ],
)
def test_the_numbers_of_steps_and_the_sampler_are_the_familys(
    tmp_path, measured, monkeypatch, changes, steps, sampler
):
    seen = []

    def sample(net, network, seeds, sigmas, *, sampler, classes, **options):
        seen.append((sampler, len(sigmas)))
        return torch.full((len(seeds), 3, 8, 8), seeds[0], dtype=torch.uint8)

    monkeypatch.setattr(fids, "sample", sample)
    start(measured(duration=8e-6, **changes), tmp_path / "run")
    assert set(seen) == {(SAMPLERS[sampler].sample, count + 1) for count in steps}


def test_vector_labels_are_those_of_the_data(tmp_path, measured, monkeypatch):
    from helpers.tiny import data_set, pixels

    vectors = [[i / 10, 1.0] for i in range(6)]
    data = data_set(tmp_path / "vectors.zip", pixels(6), vectors)
    seen = []
    real = fids.sample

    def sample(*args, labels, **options):
        seen.append(labels)
        return real(*args, labels=labels, **options)

    monkeypatch.setattr(fids, "sample", sample)
    given = {"data": str(data), "cond": True, "duration": 8e-6, "fid_steps": [2]}
    options = Options(**vars(measured()) | given)
    start(options, tmp_path / "run")
    expected = [vectors[i % 6] for i in range(9)]
    torch.testing.assert_close(torch.cat(seen), torch.tensor(expected))


def test_images_that_are_not_finite_are_a_warning(tmp_path, measured, monkeypatch):
    real = fids.sample

    def sample(net, network, seeds, sigmas, **options):
        if len(sigmas) == 3 and 4 in seeds:
            raise NotFinite("sample: not finite")
        return real(net, network, seeds, sigmas, **options)

    monkeypatch.setattr(fids, "sample", sample)
    run_dir = start(measured(duration=16e-6), tmp_path / "run")
    two, three = fids_in(run_dir).values()
    assert np.isnan(two) and three > 0
    assert lines(run_dir)[-2]["value"] is None
    assert "Warning: fid with 2 steps is not known at image 16" in (run_dir / "log.txt").read_text()
    assert not (run_dir / "network-snapshot-best-2.safetensors").exists()
    resume(run_dir)  # it is not measured again and again
    assert len(fids_in(run_dir)) == 2


# ---- where it is told, and what is kept ---------------------------------------------------------


class Spy:
    name = "spy"

    def __init__(self):
        self.told = []

    def tick(self, nimg, numbers):
        self.told += [(nimg, numbers)] if len(numbers) == 1 else []

    def sync(self):
        pass

    def close(self):
        pass


@pytest.fixture
def scores(monkeypatch):
    """What is measured at two steps, whatever the images are; at three it is more by 10."""

    def give(values):
        given = iter([value + more for value in values for more in (0, 10)])
        monkeypatch.setattr(fids, "frechet_distance", lambda *_: next(given))

    return give


def test_the_best_is_kept_and_the_last_are_averaged(tmp_path, measured, monkeypatch, scores):
    spy = Spy()
    monkeypatch.setattr("tdkern.training.record.trackers", lambda *_: [spy])
    values = [9.0, 7.0, 8.0, 7.5, 7.0, 9.0, 8.0, 9.5, 7.25, 7.75]
    scores(values)
    run_dir = start(measured(duration=80e-6, fid_every=1, snap=1, cond=True), tmp_path / "run")
    expected = [
        (8 * (i + 1), {f"fid/{steps}": value + more})
        for i, value in enumerate(values)
        for steps, more in ((2, 0), (3, 10))
    ]
    assert spy.told == expected
    log = (run_dir / "log.txt").read_text()
    assert "fid with 2 steps: 7.0000 at image 16, of 9 images, 3 NFE, the lowest so far" in log
    assert "fid with 2 steps: 7.0000 at image 40, of 9 images, 3 NFE\n" in log
    assert "fid with 3 steps: 17.5000 is the mean over the run's last 15 %\n" in log

    net, meta = load_network(run_dir / "network-snapshot-best-2.safetensors")
    assert (meta["nimg"], meta["fid"]["value"], meta["fid"]["steps"]) == (16, 7.0, 2)
    same, _ = load_network(run_dir / "network-snapshot-000000.016")
    others = same.state_dict()
    assert all(torch.equal(own, others[name]) for name, own in net.state_dict().items())
    tdkern_(
        "generate",
        "--network",
        run_dir / "network-snapshot-best-3.safetensors",
        "--outdir",
        tmp_path / "images",
        "--seeds",
        "0-1",
        "--steps",
        2,
    )


def test_going_on_from_an_earlier_state_sets_a_later_best_aside(tmp_path, measured, scores):
    scores([9.0, 7.0, 8.0])
    run_dir = start(measured(keep=9, dump=0), tmp_path / "run")
    states = checkpoints(run_dir, STATE)
    assert [images_of(state) for state in states] == [16, 32, 48]  # with each FID there is one
    later = run_dir / "network-snapshot-best-2.safetensors"
    assert load_network(later)[1]["nimg"] == 32
    scores([7.5, 7.0])
    train(Trainer(measured(keep=9), this_process(), states[0]), run_dir)
    aside = run_dir / f"set-aside-{later.name}"
    assert load_network(aside)[1]["fid"]["value"] == 7.0  # of another future
    assert load_network(later)[1]["fid"]["value"] == 7.0 and load_network(later)[1]["nimg"] == 48
    assert [value for (_, steps), value in fids_in(run_dir).items() if steps == 2] == [9, 7.5, 7]


def test_of_another_reference_the_first_is_the_best(tmp_path, measured, scores):
    scores([5.0, 7.0])
    run_dir = start(measured(duration=32e-6), tmp_path / "run")
    other = tmp_path / "other.npz"
    write_statistics(other, Statistics(np.zeros(2), np.eye(2)))
    scores([8.0, 9.0])  # of the image from which it goes on too
    resume(run_dir, fid_ref=str(other), duration=40e-6)
    best = run_dir / "network-snapshot-best-2.safetensors"
    kept = [
        load_network(run_dir / name)[1]["fid"]["value"]
        for name in (best.name, f"set-aside-{best.name}")
    ]
    assert kept == [8.0, 5.0]
    assert "fid with 2 steps: 9.0000 is the mean" in (run_dir / "log.txt").read_text()


def test_a_damaged_best_is_set_aside(tmp_path, measured):
    run_dir = start(measured(duration=16e-6), tmp_path / "run")
    best = run_dir / "network-snapshot-best-2.safetensors"
    best.write_bytes(b"damaged")
    resume(run_dir, duration=32e-6)
    assert (run_dir / f"set-aside-{best.name}").read_bytes() == b"damaged"
    assert load_network(best)[1]["nimg"] == 32


# ---- runs that end in between -------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 3, 4, 6])
def test_a_run_that_is_stopped_while_it_measures_goes_on_with_that(
    tmp_path, measured, monkeypatch, call
):
    """Also in the last of its batches, also at the end of training: the same files come out."""
    straight = contents(start(measured(duration=24e-6), tmp_path / "straight"))
    calls = []

    class Stopping(Drawing):
        def __call__(self, images):
            calls.append(len(images))
            if len(calls) in (call, call + 6):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(images)

    monkeypatch.setattr(fids, "make_detector", lambda *_: Stopping())
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped, match="stopped by SIGTERM at image 16"):
        start(measured(duration=24e-6), run_dir)
    with pytest.raises(Stopped, match="stopped by SIGTERM at image 24"):
        resume(run_dir)
    resume(run_dir)
    assert calls == [4, 4, 1] * 4  # nothing is measured twice
    check_same(contents(run_dir), straight)


def _measure_or_die(run_dir, options, kill):
    as_child()
    quick_pictures()
    stand_in()
    tqdm.set_lock(threading.RLock())
    unfinished.EVERY = unfinished.PATIENCE = 0
    real, calls = os.replace, iter(range(10**6))

    def replace(source, target):
        if next(calls) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    if (run_dir / "training_options.json").exists():
        resume(run_dir)
    else:
        run_dir.mkdir(exist_ok=True)
        train(Trainer(options, this_process()), run_dir)


def test_killed_at_any_file_it_ends_in_the_same_files(tmp_path, measured):
    def died(run_dir, kill=None):
        args = (run_dir, measured(duration=24e-6), kill)
        child = children.Process(target=_measure_or_die, args=args)
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        return child.exitcode != 0

    assert not died(tmp_path / "straight")
    expected = contents(tmp_path / "straight")
    run, killed = 0, 0
    for kill in (*range(0, 36, 3), None):
        run_dir = tmp_path / f"{run}"
        if died(run_dir, kill):
            killed += 1
        else:
            check_same(contents(run_dir), expected)
            run += 1
    assert killed >= 6


def test_a_run_may_begin_to_measure_when_it_goes_on(tmp_path, measured, data):
    without = {"fid_every": 0, "fid_ref": None}
    run_dir = start(Options(**vars(measured()) | without), tmp_path / "run")
    assert fids_in(run_dir) == {}
    flags = ("--fid-every", 2, "--fid-ref", tmp_path / "ref.npz", "--fid-steps", "2")
    tdkern_("train", "--resume", run_dir, *flags, "--fid-num", 9)
    assert list(fids_in(run_dir)) == [(0.048, 2)]  # of the end, from which it went on
    saved = read_options(run_dir / "training_options.json")
    assert saved["fid_ref"] == str(tmp_path / "ref.npz")


# ---- several processes --------------------------------------------------------------------------


def _rank(rank, run_dir, options, resumed):
    quick_pictures()
    stand_in()
    with joined() as process:
        state = find(run_dir, STATE) if resumed else None
        train(Trainer(options, process, state), run_dir if rank == 0 else None)


@pytest.mark.parametrize("gpus, shard", [(2, False), (3, False), (2, True)])
def test_any_number_of_processes_measures_the_same(tmp_path, measured, gpus, shard):
    changes = {"batch": 12, "tick": 0.012, "lr_rampup_kimg": 10, "dropout": 0.0, "cond": True}
    changes |= {"fid_num": 18, "duration": 48e-6}
    one = fids_in(start(measured(**changes), tmp_path / "one"))
    run_dir = tmp_path / "several"
    run_dir.mkdir()
    options = measured(**changes | {"gpus": gpus, "shard": shard, "duration": 24e-6})
    in_processes(gpus, _rank, run_dir, options, False)
    in_processes(gpus, _rank, run_dir, options.resumed(duration=48e-6), True)
    several = fids_in(run_dir)
    assert len(one) == 4 and several == pytest.approx(one, rel=1e-3)
    theirs = read(find(tmp_path / "one", SNAPSHOT), SNAPSHOT)[1]
    ours = load_network(find(run_dir, SNAPSHOT))[0].state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def _stopped(rank, run_dir, options):
    quick_pictures()
    stand_in()
    real, calls = Drawing.__call__, []

    def stopping(self, images):
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, images)

    Drawing.__call__ = stopping
    with joined() as process, pytest.raises(Stopped):
        train(Trainer(options, process), run_dir if rank == 0 else None)


def test_two_processes_that_are_stopped_while_they_measure(tmp_path, measured):
    """The signal comes to the second alone, in its last but one batch."""
    options = measured(fid_num=30, duration=16e-6, gpus=2)
    for name, work in (("straight", _rank), ("run", _stopped)):
        (tmp_path / name).mkdir()
        args = (tmp_path / name, options, *[False] * (work is _rank))
        in_processes(2, work, *args)
    assert fids_in(tmp_path / "run") == {}
    in_processes(2, _rank, tmp_path / "run", options, True)
    check_same(contents(tmp_path / "run"), contents(tmp_path / "straight"))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fid_ref": None}, "fid_ref must be given with fid_every"),
        ({"fid_steps": [1, 5]}, r"fid_steps must be at least 2 each with heun, got \[1, 5\]"),
        ({"fid_steps": [0], "family": "ct"}, "fid_steps must be at least 1"),
        ({"fid_num": 1}, "fid_num must be at least 2, got 1"),
        ({"fid_every": -1}, "fid_every must be at least 0, got -1"),
    ],
)
def test_options_that_cannot_be_are_refused(data, changes, message):
    given = {"data": data, "fid_ref": "a.npz", **MEASURED, **changes}
    with pytest.raises(ValueError, match=message):
        options_of(**given)


def test_a_reference_that_is_none_is_told_before_the_run_leaves_anything(tmp_path, data):
    start_it = ["train", "--data", data, "--outdir", tmp_path / "runs", "--fid-every", 1]
    ref = tmp_path / "none.npz"
    output = tdkern_(*start_it, "--fid-ref", ref, "--cbase", 4, "--cres", 1, code=1)
    assert output.strip().splitlines()[-1].startswith(f"Error: {ref}: not an .npz file")
    assert not (tmp_path / "runs").exists()
    write_statistics(ref, Statistics(np.zeros(3), np.eye(3)))
    output = tdkern_(*start_it, "--fid-ref", ref, "--cbase", 4, "--cres", 1, code=1)
    assert f"{ref}: must have the 2 features of drawing" in output.strip().splitlines()[-1]


def test_paths_are_absolute_and_addresses_and_names_stay(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built_in = {"cifar10": tmp_path / "cifar10.safetensors"}
    monkeypatch.setattr(importlib.import_module("tdkern.cli.train"), "BUILT_IN", built_in)
    write_statistics("ref.npz", Statistics(np.full(2, 120.0), np.eye(2)))
    args = ["train", "--dry-run", "--data", data, "--cbase", 4, "--cres", 1]
    for ref, detector in (("ref.npz", "own.pth"), ("https://a.b/c.npz", "cifar10")):
        printed = invoked(*args, "--fid-ref", ref, "--fid-detector", detector).stdout
        options = json.loads(printed)
        there = ref if ":" in ref else str(tmp_path / ref)
        name = detector if detector == "cifar10" else str(tmp_path / detector)
        assert (options["fid_ref"], options["fid_detector"]) == (there, name)
