"""`tdkern fid` goes on after a kill, in any number of processes."""

import importlib
import os
import re
import signal

import numpy as np
import pytest
import torch

from helpers.tiny import Detector, data_set, in_processes, invoked, pixels, started_processes
from tdkern.cli import main
from tdkern.evaluation import unfinished
from tdkern.evaluation.fid import FeatureSums, read_features, read_statistics
from tdkern.evaluation.unfinished import Unfinished
from tdkern.networks import MLP, EDMPrecond

cli = importlib.import_module("tdkern.cli.fid")
FEATURE_SUMS_ADD = FeatureSums.add


class Counting(Detector):
    """It knows how many images it was given, and dies at the one that it is told."""

    dim = 4
    seen = 0
    die_at: int | None = None

    def __call__(self, images):
        Counting.seen += len(images)
        if self.die_at is not None and self.seen > self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x = images.double().flatten(2).mean(2)
        return torch.cat([x, x[:, :1] ** 2], 1)


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(cli, "make_detector", lambda *_: Counting())
    monkeypatch.setattr(Counting, "seen", 0)


@pytest.fixture
def always(monkeypatch):
    """The file is written behind every turn."""
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "PATIENCE", 0)


@pytest.fixture
def images(tmp_path):
    return data_set(tmp_path / "a.zip", pixels(23))


def measuring(images, tmp_path, *more):
    """The words that make statistics and features of the images, and keep what is not over."""
    words = ("fid", "ref", "--data", images, "--dest", tmp_path / "ref.npz", "--features")
    words += ("--batch", 3, "--workers", 0, "--state", tmp_path / "state", *more)
    return list(map(str, words))


def _measure(rank, args, die_at):
    """One of several processes, which may die at an image."""
    cli.make_detector = lambda *_: Counting()
    unfinished.EVERY = unfinished.PATIENCE = 0
    Counting.die_at = die_at
    main(args, standalone_mode=False)


@pytest.mark.parametrize("first, then", [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_killed_it_goes_on_in_any_number_of_processes(tmp_path, images, counting, first, then):
    """In as many it comes to the same bits, in others it differs by float64's rounding."""
    args = measuring(images, tmp_path)
    in_processes(first, _measure, args, None)
    expected = [*read_statistics(tmp_path / "ref.npz")[:2], read_features(tmp_path / "ref.npz")]
    (tmp_path / "ref.npz").unlink()

    ranks = started_processes(first, _measure, args, 7)  # in the third turn
    ranks[0].join(100)
    for rank in ranks:  # torchrun ends the others
        rank.kill()
        rank.join()
    assert ranks[0].exitcode == -signal.SIGKILL and not (tmp_path / "ref.npz").exists()
    (state,) = (tmp_path / "state").iterdir()
    assert re.fullmatch(r"fid-[0-9a-f]{16}\.safetensors", state.name)
    if then == 1:
        done = 6 * first
        assert f"Going on behind image {done}, from {state}" in invoked(*args).stderr
        assert Counting.seen == 23 - done
    else:
        in_processes(then, _measure, args, None)
    assert list((tmp_path / "state").iterdir()) == []
    found = [*read_statistics(tmp_path / "ref.npz")[:2], read_features(tmp_path / "ref.npz")]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
        assert first != then or np.array_equal(ours, theirs)


class Lost(Exception):
    """In place of a kill, in this process."""


@pytest.fixture
def lost_at(monkeypatch, counting, always):
    """Let the next measurement end at so many images."""

    def lose(count):
        monkeypatch.setattr(Counting, "seen", 0)

        def turn(self, features, real=FeatureSums.add):
            real(self, features)
            if self.count > count:
                raise Lost

        monkeypatch.setattr(FeatureSums, "add", turn if count else FEATURE_SUMS_ADD)

    return lose


def measured_after_a_loss(lost_at, args, count=7):
    """The images that the command looks at when it goes on after a loss, and what it prints."""
    lost_at(count)
    invoked(*args, code=1)
    lost_at(None)
    result = invoked(*args)
    return Counting.seen, result


def test_calc_goes_on_with_all_metrics(tmp_path, images, lost_at):
    invoked(*measuring(images, tmp_path))
    other = data_set(tmp_path / "b.zip", pixels(20, seed=1))
    args = ["fid", "calc", "--images", other, "--ref", tmp_path / "ref.npz", "--num", 18]
    args += ["--batch", 4, "--workers", 0, "--metrics", "fid,kid,prdc"]
    args += ["--state", tmp_path / "state"]
    expected = invoked(*args).stdout
    seen, result = measured_after_a_loss(lost_at, args)
    assert seen == 18 - 4 and result.stdout == expected
    assert list((tmp_path / "state").iterdir()) == []


def test_steps_draws_no_image_twice(tmp_path, images, lost_at, monkeypatch):
    invoked(*measuring(images, tmp_path))
    drawn = []

    def sample(net, network, seeds, sigmas, sampler):
        drawn.append((len(sigmas) - 1, seeds))
        return torch.from_numpy(pixels(40))[seeds] // len(sigmas)

    net = EDMPrecond(MLP())
    monkeypatch.setattr(cli, "load_network", lambda *_: (net, {"network": {"img_channels": 3}}))
    monkeypatch.setattr(cli, "sample", sample)
    args = ["fid", "steps", "--network", "a", "--ref", tmp_path / "ref.npz", "--steps", "2,3"]
    args += ["--num", 8, "--seed", 5, "--batch", 3, "--state", tmp_path / "state"]
    expected, every = invoked(*args).stdout, list(drawn)
    assert len(every) == 6
    drawn.clear()
    lost_at(6)  # at the end of the first number of steps
    invoked(*args, code=1)
    lost_at(None)
    assert invoked(*args).stdout == expected
    assert drawn == [*every[:3], *every[2:]]  # the turn that was lost comes again
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("change", ["images", "batch", "features", "detector"])
def test_what_is_kept_is_for_the_same_inputs_alone(tmp_path, images, lost_at, monkeypatch, change):
    args = measuring(images, tmp_path)
    lost_at(7)
    invoked(*args, code=1)
    lost_at(None)
    changed = {
        "images": lambda: data_set(images, pixels(23, seed=2)),
        "batch": lambda: args.extend(["--batch", "4"]),
        "features": lambda: args.remove("--features"),
        "detector": lambda: monkeypatch.setattr(Counting, "identity", "other"),
    }
    changed[change]()
    assert "Going on" not in invoked(*args).stderr and Counting.seen == 23
    assert len(list((tmp_path / "state").iterdir())) == 1  # the other's is still there


@pytest.mark.parametrize("damage", ["torn", "flipped", "other"])
def test_what_is_damaged_is_told_and_measured_again(tmp_path, images, lost_at, damage):
    args = measuring(images, tmp_path)
    lost_at(7)
    invoked(*args, code=1)
    (state,) = (tmp_path / "state").iterdir()
    content = bytearray(state.read_bytes())
    content[-3] ^= 1
    state.write_bytes({"torn": content[:200], "flipped": content, "other": b"x"}[damage])
    lost_at(None)
    result = invoked(*args)
    assert f"{state}: damaged (" in result.stderr and Counting.seen == 23
    assert list((tmp_path / "state").iterdir()) == []


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(tmp_path, images, counting, always):
    (tmp_path / "state").write_text("a file")
    result = invoked(*measuring(images, tmp_path))
    assert result.stderr.count("cannot be written") == 1 and (tmp_path / "ref.npz").exists()


def test_a_short_measurement_leaves_no_trace(tmp_path, images, counting, monkeypatch):
    """The folder is the cache of whoever measures; writing is for what takes long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Unfinished, "save", lambda *_: pytest.fail("written"))
    assert unfinished.default_folder() == tmp_path / "cache" / "tdkern"
    monkeypatch.setattr(cli, "default_folder", lambda: tmp_path / "cache")
    args = measuring(images, tmp_path)
    invoked(*args[: args.index("--state")])
    assert not (tmp_path / "cache").exists()


def test_the_file_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: clock[0])

    def slow(path, data):
        clock[0] += 10.0
        written.append(clock[0])

    written = []
    monkeypatch.setattr(unfinished, "write_atomic", slow)
    file = Unfinished(tmp_path / "a.safetensors", {}, print)
    sums = FeatureSums(Counting())
    for _ in range(1000):
        clock[0] += 1.0
        file.after_turn(sums)
    assert written[0] == 40 and np.diff(written).tolist() == [210.0] * 4
