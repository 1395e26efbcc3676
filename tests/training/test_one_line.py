"""Whatever goes wrong ends in one line that says what to do."""

import ctypes
import functools
import importlib
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch

from helpers import DATA
from helpers.run_dirs import (
    OK,
    line,
    printed,
)
from helpers.tiny import (
    TINY,
    Detector,
    data_set,
    ended,
    flags,
    invoked,
    pixels,
    tdkern_,
)
from tdkern.evaluation.fid import Statistics, write_statistics
from tdkern.training import sample

pytestmark = pytest.mark.usefixtures("short_previews")


def _without_capabilities():
    """Root as any other user: a folder's rights hold for it too."""
    header = struct.pack("Ii", 0x20080522, 0)  # the version of 64 capabilities, this process
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capset(header, bytes(24)) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("place", ["outdir", "numbered", "resume", "data", "transfer", "run"])
def test_what_may_not_be_used_ends_in_one_line(tmp_path, place):
    run_dir, data = tmp_path / "run", data_set(tmp_path / "data" / "a", pixels(8))
    printed(run_dir, duration=8e-6)
    locked = {
        "outdir": tmp_path / "out",
        "numbered": tmp_path / "out",
        "resume": run_dir,
        "data": data.parent,
        "transfer": run_dir,
        "run": run_dir,
    }[place]
    locked.mkdir(exist_ok=True)
    args = {
        "outdir": ["--data", OK, "--outdir", tmp_path / "out", "--nosubdirs"],
        "numbered": ["--data", OK, "--outdir", tmp_path / "out"],
        "resume": ["--resume", run_dir, "--duration", "16e-6"],
        "run": ["--resume", run_dir],
        "data": ["--data", data, "--outdir", tmp_path / "x"],
        "transfer": ["--data", OK, "--outdir", tmp_path / "x", "--transfer", run_dir],
    }[place]
    new = [] if place in ("resume", "run") else ["--duration", 8e-6, *flags(TINY)]
    locked.chmod(0 if place in ("data", "transfer", "run") else 0o555)
    code, output = ended(["train", *args, *new], tmp_path / "log", _without_capabilities)
    locked.chmod(0o755)
    assert code == 1 and line(output), output


@pytest.mark.parametrize("desc", ["lr=1e-3/ema", "x" * 250, "a\0b"])
def test_a_description_that_is_no_name_ends_in_one_line(tmp_path, desc):
    output = tdkern_(
        "train",
        "--data",
        OK,
        "--outdir",
        tmp_path,
        "--duration",
        8e-6,
        *flags(TINY),
        "--desc",
        desc,
        code=1,
    )
    assert line(output) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run and the statistics of images."""
    folder = tmp_path_factory.mktemp("made")
    args = ["--outdir", folder / "run", "--nosubdirs", "--duration", 8e-6]
    assert ended(["train", "--data", OK, *args, *flags(TINY)], folder / "log")[0] == 0
    write_statistics(folder / "ref.npz", Statistics(np.zeros(2), np.eye(2)))
    return folder


COMMANDS = {
    "train": ["--data", OK, "--nosubdirs", "--duration", 8e-6, *flags(TINY), "--outdir", "{out}"],
    "generate": "--network {made}/run --seeds 0 --steps 2 --outdir {out}".split(),
    "fid ref": ["--data", OK, "--workers", "0", "--dest", "{out}"],
    "fid steps": "--network {made}/run --ref {made}/ref.npz --steps 2 --num 8".split(),
    "dataset": [OK, "{out}.zip"],
    "convert": [DATA / "edm_snapshot_tiny.pkl", "{out}.safetensors"],
    "demo": "--seeds 2 --iterations 3 --compute 1 --outdir {out}".split(),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("streams", [["stderr"], ["stdin", "stdout"]])
def test_without_standard_streams_commands_run(tmp_path, made, command, streams):
    """As under a daemon: what they are for is there, and nothing was printed into it."""
    args = [str(arg).format(made=made, out=tmp_path / "out") for arg in COMMANDS[command]]
    hook = functools.partial(_without, streams)
    code, output = ended([*command.split(), *args], tmp_path / "log", hook)
    assert code == 0 and "Traceback" not in output, output
    assert command == "fid steps" or list(tmp_path.glob("out*"))


def _without(streams):
    importlib.import_module("tdkern.cli.fid").make_detector = Detector
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if name in streams:
            os.close(fd)
            setattr(sys, name, None)


def test_a_full_stdout_ends_in_one_line(tmp_path):
    """A run too, before it leaves anything."""
    args = ["train", "--data", OK, "--outdir", tmp_path / "runs", *flags(TINY)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "tdkern.cli", *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    said = result.stderr.strip().splitlines()
    assert result.returncode == 1 and said == ["Error: No space left on device"]
    assert list(tmp_path.iterdir()) == []


def test_an_unforeseen_error_is_one_line_too_and_a_traceback_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("tdkern.cli.train.Trainer", lambda *_: {}["no"])
    args = ["train", "--data", OK, "--outdir", tmp_path, *flags(TINY)]
    assert "unforeseen KeyError: 'no'" in line(tdkern_(*args, code=1))
    monkeypatch.setenv("TDKERN_TRACEBACK", "1")
    assert "Traceback" in tdkern_(*args, code=1)


def test_ctrl_c_before_the_first_step_is_130(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tdkern.cli.train.Trainer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert (
        "Aborted!"
        in invoked("train", "--data", OK, "--outdir", tmp_path, *flags(TINY), code=130).output
    )


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere", "there is no such file or folder"),
        ("https://example.org/edm.pkl", "it is an address; fetch the file"),
        ("edm", "of tdkern in it, but EDM's; make one of them a file by tdkern convert"),
    ],
)
def test_what_to_do_about_a_network_that_is_none(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edm").mkdir()
    (tmp_path / "edm" / "network-snapshot-000100.pkl").write_bytes(b"")
    assert message in line(tdkern_("generate", "--network", path, "--outdir", "a", code=1))


def test_generate_finds_out_before_the_work(tmp_path, monkeypatch):
    printed(tmp_path / "run", duration=8e-6)
    monkeypatch.setattr(
        "tdkern.cli.generate.sample", lambda *args, **kwargs: pytest.fail("sampled")
    )
    (tmp_path / "g").mkdir()
    (tmp_path / "file").write_text("")
    args = ["generate", "--network", tmp_path / "run", "--seeds", "0-3", "--steps", "2"]
    assert "is a folder" in line(tdkern_(*args, "--grid", tmp_path / "g", code=1))
    assert "file" in line(tdkern_(*args, "--grid", tmp_path / "file" / "x.png", code=1))
    assert "class-conditional" not in line(tdkern_(*args, "--outdir", tmp_path / "file", code=1))
    assert not list(tmp_path.glob(".*"))


def test_the_folder_of_a_grid_is_made_before_the_work(tmp_path, monkeypatch):
    printed(tmp_path / "run", duration=8e-6)
    grid, real = tmp_path / "no" / "such" / "folder" / "x.png", sample

    def sample_there(*args, **kwargs):
        assert grid.parent.is_dir()
        return real(*args, **kwargs)

    monkeypatch.setattr("tdkern.cli.generate.sample", sample_there)
    args = ["generate", "--network", tmp_path / "run", "--seeds", "0-3", "--steps", "2"]
    tdkern_(*args, "--grid", grid)
    assert os.listdir(grid.parent) == ["x.png"]


def test_an_unconditional_network_has_no_class(tmp_path):
    printed(tmp_path / "run", duration=8e-6)
    said = line(
        tdkern_(
            "generate",
            "--network",
            tmp_path / "run",
            "--outdir",
            tmp_path / "a",
            "--class",
            "1",
            "--seeds",
            "0",
            "--steps",
            "2",
            code=1,
        )
    )
    assert "this one has no classes, got 1" in said


def test_seeds_up_to_64_bits(tmp_path):
    printed(tmp_path / "run", duration=8e-6)
    seeds = f"{2**63 - 1},{2**63},{2**64 - 2}"
    tdkern_(
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "a",
        "--seeds",
        seeds,
        "--steps",
        "2",
    )
    assert len({path.read_bytes() for path in (tmp_path / "a").glob("*.png")}) == 3
    assert "a seed must be in 0 .. 2^64 - 1" in line(
        tdkern_(
            "generate",
            "--network",
            tmp_path / "run",
            "--outdir",
            tmp_path / "a",
            "--seeds",
            2**64,
            "--steps",
            "2",
            code=1,
        )
    )
    tdkern_(
        "generate",
        "--network",
        tmp_path / "run",
        "--outdir",
        tmp_path / "a",
        "--seeds",
        "0-99999999999",
        "--steps",
        "2",
        code=2,
    )


def test_a_converted_network_that_is_not_finite_is_refused(tmp_path):
    source = DATA / "edm_snapshot_tiny.pkl"
    tdkern_("convert", source, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    next(iter(tensors.values())).fill_(float("nan"))
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", meta)
    said = line(
        tdkern_(
            "generate",
            "--network",
            tmp_path / "b.safetensors",
            "--grid",
            tmp_path / "a.png",
            "--seeds",
            "0",
            "--steps",
            "2",
            code=1,
        )
    )
    assert "not finite from the sampler's step 1 of 2" in said
