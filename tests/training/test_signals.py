"""A signal, a time limit or a killed torchrun loses no step."""

import functools
import multiprocessing
import os
import signal
import sys
import time

import pytest

from helpers.run_dirs import (
    AT,
    OK,
    alive,
    coarse,
    find_step,
    same,
    states,
    statistics,
    tensors,
    wait_for,
)
from helpers.tiny import (
    children,
    ended,
    flags,
    in_two_processes,
    options_of,
    quick_pictures,
    started_processes,
    train_args,
)
from tdkern.cli import main
from tdkern.training import Trainer, train
from tdkern.training.distributed import joined
from tdkern.training.signals import Stopped

pytestmark = pytest.mark.usefixtures("short_previews")


def _signal_at_a_step(signum, step=AT):
    real = Trainer.train_step

    def train_step(self, *args):
        if self.step == step:
            os.kill(os.getpid(), signum)
        real(self, *args)

    Trainer.train_step = train_step


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_the_state_and_no_step_is_lost(tmp_path, straight, signum, workers):
    run_dir = tmp_path / "run"
    args = train_args(OK, run_dir, 80e-6, coarse(workers=workers))
    code, output = ended(args, tmp_path / "log", functools.partial(_signal_at_a_step, signum))
    assert code == 128 + signum
    assert states(run_dir) == [f"training-state-000000.0{8 * (AT + 1)}"]
    last = output.strip().splitlines()[-1]
    assert (
        signum.name in last
        and f"image {8 * (AT + 1)}" in last
        and f"go on with: tdkern train --resume {run_dir}" in last
    )
    assert not (run_dir / "run.lock").exists()
    assert ended(["train", "--resume", run_dir], tmp_path / "log2")[0] == 0
    assert same(tensors(run_dir), tensors(straight))
    assert statistics(run_dir) == statistics(straight)  # of the one tick that was cut in two, too


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    args = train_args(OK, tmp_path / "run", 64e-6, coarse())
    assert ended(args, tmp_path / "log", _under_nohup)[0] == 0
    assert states(tmp_path / "run") == ["training-state-000000.064"]


def _under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _signal_at_a_step(signal.SIGHUP)


def test_a_second_signal_ends_at_once(tmp_path):
    args = train_args(OK, tmp_path / "run", 80e-6, coarse())
    code, _ = ended(args, tmp_path / "log", _two_signals)
    assert code == -signal.SIGTERM and states(tmp_path / "run") == []


def _two_signals():
    real = Trainer.train_step

    def train_step(self, *args):
        if self.step == AT:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.8)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        real(self, *args)

    Trainer.train_step = train_step


def test_the_same_signal_to_the_whole_group_is_one(tmp_path):
    args = train_args(OK, tmp_path / "run", 80e-6, coarse())
    code, _ = ended(args, tmp_path / "log", _twice)
    assert code == 128 + signal.SIGINT and states(tmp_path / "run") == ["training-state-000000.048"]


def _twice():
    real = Trainer.train_step

    def train_step(self, *args):
        if self.step == AT:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, *args)

    Trainer.train_step = train_step


def test_a_time_limit_does_as_sigterm(tmp_path, straight):
    run_dir = tmp_path / "run"
    args = train_args(OK, run_dir, 80e-6, coarse(time_limit=0.02))
    code, output = ended(args, tmp_path / "log", _slow_steps)
    assert code == 128 + signal.SIGTERM and 0 < find_step(run_dir) < 10
    assert "go on with" in output
    assert ended(["train", "--resume", run_dir, "--time-limit", "100"], tmp_path / "log2")[0] == 0
    assert same(tensors(run_dir), tensors(straight))


def _slow_steps():
    real = Trainer.train_step

    def train_step(self, *args):
        time.sleep(0.3)
        real(self, *args)

    Trainer.train_step = train_step


def _one_rank_is_asked(rank, run_dir, signum):
    if rank == 1:
        _signal_at_a_step(signum)
    quick_pictures()
    options = options_of(data=OK, duration=80e-6, gpus=2, **coarse())
    with joined() as process, pytest.raises(Stopped) as stopped:
        run_dir.mkdir(exist_ok=True)
        train(Trainer(options, process), run_dir if rank == 0 else None)
    assert stopped.value.signum == signum
    step = AT + 2  # the others hear of it a step later
    assert f"at image {8 * step}" in str(stopped.value)
    if rank == 0:
        assert find_step(run_dir) == step


def test_all_processes_agree_on_the_step(tmp_path):
    in_two_processes(_one_rank_is_asked, tmp_path / "run", signal.SIGUSR1)


def _rank_of_torchrun(rank, folder):
    quick_pictures()
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    options = flags(coarse(data=OK, outdir=folder / "run", duration=0.8, tick=800))
    with open(folder / f"stderr{rank}", "w") as sys.stderr:
        main(["train", "--nosubdirs", *options])


def _torchrun(folder):
    """What torchrun is to its ranks: their parent, which they know by the environment."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    fork = multiprocessing.get_context("fork")
    for rank in started_processes(2, _rank_of_torchrun, folder, context=fork):
        rank.join()


def test_when_torchrun_is_killed_its_ranks_save_and_end(tmp_path):
    """By SIGKILL, of which nobody tells them; bench/reliability/kills.py kills the real one."""
    run_dir = tmp_path / "run"
    torchrun = children.Process(target=_torchrun, args=(tmp_path,))
    torchrun.start()
    wait_for(lambda: (run_dir / "reals.png").exists())
    ranks = [int((tmp_path / f"rank{rank}.pid").read_text()) for rank in range(2)]
    torchrun.kill()
    torchrun.join()
    try:
        wait_for(lambda: not any(map(alive, ranks)))
    finally:
        for rank in filter(alive, ranks):
            os.kill(rank, signal.SIGKILL)
    step = find_step(run_dir)
    assert 0 < step < 100_000
    assert f"stopped by SIGTERM at image {8 * step}" in (tmp_path / "stderr0").read_text()
    assert not (run_dir / "run.lock").exists()
