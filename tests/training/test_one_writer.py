"""A run directory has one writer, and readers end with their run."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from helpers.run_dirs import (
    OK,
    alive,
    coarse,
    resume,
    start,
    states,
    wait_for,
)
from helpers.tiny import (
    children,
    started,
    train_args,
)
from tdkern.training import Trainer
from tdkern.training.lock import LockedError, locked
from tdkern.training.signals import _end_with

pytestmark = pytest.mark.usefixtures("short_previews")


def _hold(run_dir, ready, done):
    with locked(run_dir):
        ready.set()
        done.wait(60)


def test_a_second_run_in_a_directory_is_refused_and_the_first_goes_on(tmp_path):
    run_dir = start(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    ready, done = children.Event(), children.Event()
    other = children.Process(target=_hold, args=(run_dir, ready, done))
    other.start()
    assert ready.wait(60)
    line = resume(run_dir, "--duration", "40e-6", code=1).strip().splitlines()[-1]
    assert f"process {other.pid} of " in line and "trains here since" in line
    assert {
        path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != "run.lock"
    } == before
    other.kill()  # a dead one holds nothing
    other.join()
    resume(run_dir, "--duration", "40e-6")
    assert states(run_dir) == ["training-state-000000.040"] and not (run_dir / "run.lock").exists()


def test_the_lock_is_not_a_file_that_is_left_behind(tmp_path):
    (tmp_path / "run.lock").write_text("stale")
    with locked(tmp_path) as held:
        assert held and json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    (tmp_path / "run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), locked(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
    assert issubclass(LockedError, ValueError)


def _slow_data():
    """A run that waits for ever in its first step, with its readers at work."""

    def train_step(self, *args):
        pids = [child.pid for child in multiprocessing.active_children()]
        Path(self.options.data + ".pids").write_text(json.dumps(pids))
        time.sleep(60)

    Trainer.train_step = train_step


def test_readers_end_with_their_run(tmp_path):
    data = tmp_path / "data.zip"
    shutil.copy(OK, data)
    pids = Path(f"{data}.pids")
    args = train_args(data, tmp_path / "run", 80e-6, coarse(workers=2))
    process = started(args, tmp_path / "log", _slow_data)
    wait_for(lambda: pids.exists() and pids.read_text())
    readers = json.loads(pids.read_text())
    assert len(readers) == 2 and all(map(alive, readers))
    process.kill()
    process.join()
    wait_for(lambda: not any(map(alive, readers)), seconds=3)


@pytest.mark.parametrize("died, code", [(False, 0), (True, 1)])
def test_a_reader_whose_run_died_before_it_looked_ends(died, code):
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(parent + died, 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
