"""An error, a lost folder or a full disk on the way loses nothing that was made."""

import errno
import functools
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from helpers.run_dirs import (
    AT,
    OK,
    coarse,
    find_step,
    names,
    resume,
    same,
    start,
    states,
    statistics,
    tensors,
)
from helpers.tiny import (
    ended,
    flags,
    train_args,
)
from tdkern.data.files import write_atomic
from tdkern.ema import EMA
from tdkern.training import Trainer, record

pytestmark = pytest.mark.usefixtures("short_previews")


def _fail(method, error, at=AT, of=Trainer):
    """Let a method fail once a run is at a step."""

    def hook():
        real = getattr(of, method)

        def failing(self, *args, **kwargs):
            if getattr(self, "trainer", self).step == at:
                raise error
            return real(self, *args, **kwargs)

        setattr(of, method, failing)

    return hook


def _out_of_memory():
    _fail(
        "train_step",
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines"),
    )()


def _peer_lost():
    _fail(
        "train_step",
        RuntimeError(
            "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1\nmore"
        ),
    )()


def _reader_killed():
    def train_step(self, *args):
        if self.step == AT:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
        return real(self, *args)

    real, Trainer.train_step = Trainer.train_step, train_step


def _broken_image():
    _fail("train_step", ValueError("a.zip: 1.png is not a readable image; remove or replace it"))()


def _half_a_step():
    """The optimizer has stepped, the rest has not: no state that could be saved."""
    real = EMA.copy_buffers

    def copy_buffers(self, net):
        calls.append(1)
        if len(calls) > 2 * AT:
            raise MemoryError
        real(self, net)

    calls = []
    EMA.copy_buffers = copy_buffers


@pytest.mark.parametrize(
    "hook, workers, message",
    [
        (_out_of_memory, 0, "CUDA out of memory"),
        (_peer_lost, 0, "another process of the run ended"),
        (_reader_killed, 1, "DataLoader worker"),
        (_broken_image, 0, "1.png is not a readable image"),
    ],
)
def test_an_error_between_two_dumps_saves_the_state(tmp_path, straight, hook, workers, message):
    run_dir = tmp_path / "run"
    args = train_args(OK, run_dir, 80e-6, coarse(workers=workers))
    code, output = ended(args, tmp_path / "log", hook)
    last = output.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in output
    assert (
        last.startswith("Error: ")
        and message in last
        and "go on with: tdkern train --resume" in last
    )
    assert find_step(run_dir) >= AT
    assert ended(["train", "--resume", run_dir], tmp_path / "log2")[0] == 0
    assert same(tensors(run_dir), tensors(straight)) and statistics(run_dir) == statistics(straight)


def _sigterm_in_the_rescue():
    """As torchrun sends to all processes once one has failed."""
    _out_of_memory()
    real = record.Record.rescue

    def rescue(self):
        os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    record.Record.rescue = rescue


def test_a_signal_does_not_end_the_saving(tmp_path):
    run_dir = tmp_path / "run"
    args = ["train", "--data", OK, "--outdir", run_dir, "--nosubdirs", "--duration", 80e-6]
    code, output = ended([*args, *flags(coarse())], tmp_path / "log", _sigterm_in_the_rescue)
    assert code == 1 and "CUDA out of memory" in output and find_step(run_dir) == AT


def test_half_a_step_is_not_saved(tmp_path):
    run_dir = tmp_path / "run"
    args = train_args(OK, run_dir, 80e-6, coarse())
    code, output = ended(args, tmp_path / "log", _half_a_step)
    assert (
        code == 1
        and "out of memory" in output
        and "no state is saved" in output
        and states(run_dir) == []
    )


def test_a_grid_that_cannot_be_written_does_not_end_a_run(tmp_path, monkeypatch):
    real = record.save_grid

    def save_grid(path, *args):
        if "fakes" in path.name:
            raise OSError(28, "No space left on device", str(path))
        real(path, *args)

    monkeypatch.setattr(record, "save_grid", save_grid)
    run_dir = start(tmp_path / "run")
    assert states(run_dir) == ["training-state-000000.024"] and not list(run_dir.glob("fakes*"))
    assert "Warning: fakes-000000.024.png is not written: " in (run_dir / "log.txt").read_text()


def _under_a_run(change, at=AT):
    """Let something happen to the run directory in a step."""
    real = Trainer.train_step

    def train_step(self, *args):
        if self.step == at:
            change(Path(self.options.data).parent / "run")
        return real(self, *args)

    Trainer.train_step = train_step


def _renamed(run_dir):
    run_dir.rename(run_dir.with_name("elsewhere"))


def _run_beside_its_data(tmp_path, hook, **changes):
    """The exit code of a run, its last line and its directory."""
    data, run_dir = tmp_path / "data.zip", tmp_path / "run"
    shutil.copy(OK, data)
    options = flags(coarse(data=data, outdir=run_dir, duration=80e-6, **changes))
    code, output = ended(["train", "--nosubdirs", *options], tmp_path / "log", hook)
    assert "Traceback" not in output
    return code, output.strip().splitlines()[-1], run_dir


def _goes_on_to_the_same(run_dir, straight):
    assert ended(["train", "--resume", run_dir], run_dir.parent / "log2")[0] == 0
    assert same(tensors(run_dir), tensors(straight))
    assert not [name for name in names(run_dir) if name.startswith(".")]


@pytest.mark.parametrize("change", [shutil.rmtree, _renamed])
def test_a_folder_lost_under_a_run_is_made_again_for_the_state(tmp_path, straight, change):
    hook = functools.partial(_under_a_run, change)
    code, last, run_dir = _run_beside_its_data(tmp_path, hook, tick=0.064)
    assert code == 1 and "No such file" in last and "image 64 is saved" in last
    _goes_on_to_the_same(run_dir, straight)
    if change is _renamed:
        assert (tmp_path / "elsewhere" / "training_options.json").exists()


def _unfinished_removed():
    """As one who clears up hidden files, once, while a state is written."""
    real = safetensors.torch.save_file

    def save_file(tensors, path):
        real(tensors, path)
        shutil.rmtree(path.parent)
        safetensors.torch.save_file = real

    safetensors.torch.save_file = save_file


def test_an_unfinished_state_removed_under_a_run_is_written_again(tmp_path, straight):
    code, last, run_dir = _run_beside_its_data(tmp_path, _unfinished_removed, tick=0.016, dump=1)
    assert code == 1 and "training-state-000000.016 cannot be written" in last
    assert "image 16 is saved; go on with" in last
    _goes_on_to_the_same(run_dir, straight)


def _nothing_can_be_made(number, run_dir):
    """From here on the disk has no inodes left, or may only be read: see `number`."""
    real_open, real_mkdir, real_rename = os.open, os.mkdir, os.rename

    def refuse(path, writes):
        if str(path).startswith(str(run_dir)) and writes:
            raise OSError(number, os.strerror(number), str(path))

    def open_(path, flags, *args, **kwargs):
        makes = flags & os.O_CREAT and not os.path.exists(path)
        writes = number == errno.EROFS and flags & (os.O_WRONLY | os.O_RDWR)
        refuse(path, makes or writes)
        return real_open(path, flags, *args, **kwargs)

    def mkdir(path, *args, **kwargs):
        refuse(path, True)
        return real_mkdir(path, *args, **kwargs)

    def rename(path, *args, **kwargs):
        refuse(path, number == errno.EROFS)
        return real_rename(path, *args, **kwargs)

    os.open, os.mkdir, os.rename = open_, mkdir, rename


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_where_nothing_can_be_written_any_more_the_last_state_stays(tmp_path, straight, number):
    hook = functools.partial(_under_a_run, functools.partial(_nothing_can_be_made, number))
    code, last, run_dir = _run_beside_its_data(tmp_path, hook, tick=0.016, dump=1)
    assert code == 1 and last.startswith("Error: ") and os.strerror(number) in last
    assert "image 32 is saved; go on with" in last and states(run_dir) == [
        "training-state-000000.032"
    ]
    _goes_on_to_the_same(run_dir, straight)


def _full_after(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.parametrize("size", [3_000, 60_000, 100_000])
def test_a_full_disk_leaves_no_half_and_one_line(tmp_path, size):
    """A limit on files' size stands for the disk: writes fail in the middle in the same way."""
    run_dir = start(tmp_path / "run", duration=16e-6)
    before = tensors(run_dir)
    code, output = ended(
        ["train", "--resume", run_dir, "--duration", "40e-6"],
        tmp_path / "log",
        functools.partial(_full_after, size),
    )
    last = output.strip().splitlines()[-1]
    assert (
        code == 1
        and "Traceback" not in output
        and last.startswith("Error: ")
        and "go on with" in last
    ), output
    assert states(run_dir) == ["training-state-000000.016"] and same(tensors(run_dir), before)
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".")]
    resume(run_dir, "--duration", "40e-6")
    whole = start(tmp_path / "whole", duration=40e-6)
    assert same(tensors(run_dir), tensors(whole))


def test_nothing_unfinished_is_left_where_a_write_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == []
