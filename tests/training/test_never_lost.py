"""What `docs/promises.md` says of runs that end before their end: nothing that was made is lost."""

import errno
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from helpers import DATA
from helpers.tiny import (
    TINY,
    children,
    data_set,
    ended,
    flags,
    in_two_processes,
    options_of,
    pixels,
    quick_pictures,
    started,
    started_processes,
    tdkern_,
    train_args,
)
from tdkern.cli import main
from tdkern.data.files import write_atomic
from tdkern.ema import EMA
from tdkern.training import Trainer, checkpoint, record, train
from tdkern.training.checkpoint import EVENTS, SNAPSHOT, STATE, CheckpointError, find, read
from tdkern.training.distributed import joined
from tdkern.training.lock import LockedError, locked
from tdkern.training.signals import Stopped, _end_with
from tdkern.training.statistics import OF_THE_MACHINE

pytestmark = pytest.mark.usefixtures("short_previews")
OK = str(DATA / "faults" / "ok.zip")


def start(run_dir, duration=24e-6, **changes):
    """A run from the command line."""
    tdkern_(
        *train_args(OK, run_dir, duration, TINY | changes),
    )
    return run_dir


def resume(path, *args, code=0):
    return tdkern_("train", "--resume", path, *args, code=code)


def states(run_dir):
    return [path.name for path in checkpoint.checkpoints(run_dir, STATE)]


def names(run_dir):
    """What is in a run directory, but for TensorBoard's files: every resume has one of its own."""
    return sorted(path.name for path in run_dir.iterdir() if not EVENTS.fullmatch(path.name))


def tensors(run_dir):
    return read(find(run_dir, STATE), STATE)[1]


def statistics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in OF_THE_MACHINE} for line in lines]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def move_to(run_dir, nimg):
    """Give a run's newest checkpoints the number of images of a later one."""
    for kind in (SNAPSHOT, STATE):
        path = find(run_dir, kind)
        meta = json.loads((path / "meta.json").read_text())
        meta |= {"step": nimg // 8, "nimg": nimg}
        (path / "meta.json").write_text(json.dumps(meta))
        path.rename(run_dir / f"{kind}-{checkpoint.kimg(nimg)}")


# names


def test_checkpoints_are_ordered_by_number_past_a_billion_images(tmp_path):
    run_dir = start(tmp_path / "run")
    move_to(run_dir, 999_999_984)
    resume(run_dir, "--duration", "1000.000032")
    assert states(run_dir) == ["training-state-1000000.032"]
    assert find(run_dir, SNAPSHOT).name == "network-snapshot-1000000.032"
    assert [path.name for path in checkpoint.checkpoints(run_dir, SNAPSHOT)] == [
        "network-snapshot-999999.984",
        "network-snapshot-1000000.008",
        "network-snapshot-1000000.032",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "training-state-best",
        "training-state-000000.024.bak",
        "training-state-000000.024-copy",
        "training-state-000000.0245",
        "training-state-000000",
        "training-state-",
        "training-state-٠٠٠٠٠٠.٠٢٤",
    ],
)
def test_other_names_are_no_checkpoints_and_stay(tmp_path, name):
    run_dir = start(tmp_path / "run")
    shutil.copytree(run_dir / "training-state-000000.024", run_dir / name)
    resume(run_dir, "--duration", "40e-6")
    assert states(run_dir) == ["training-state-000000.040"]
    assert (run_dir / name / "tensors.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    [
        "training-state-000000.024.tar.gz",
        "network-snapshot-000000.024.zip",
        "network-snapshot-000000.025",
    ],
)
def test_a_file_beside_is_no_checkpoint_and_stays(tmp_path, name):
    run_dir = start(tmp_path / "run")
    (run_dir / name).write_text("packed")
    resume(run_dir / "training-state-000000.024", "--duration", "40e-6")
    assert (
        states(run_dir) == ["training-state-000000.040"]
        and (run_dir / name).read_text() == "packed"
    )
    tdkern_(
        "generate",
        "--network",
        run_dir,
        "--grid",
        tmp_path / "grid.png",
        "--seeds",
        "0",
        "--steps",
        "2",
    )


def test_a_copy_of_a_state_can_be_gone_on_from(tmp_path):
    run_dir = start(tmp_path / "run")
    shutil.copytree(run_dir / "training-state-000000.024", run_dir / "training-state-best")
    resume(run_dir, "--duration", "40e-6")
    assert "image 24 of 40" in resume(run_dir / "training-state-best", "--duration", "40e-6")
    assert (run_dir / "training-state-best").exists()


@pytest.mark.parametrize("nosubdirs", [True, False])
def test_a_users_unfinished_files_stay(tmp_path, nosubdirs):
    for name in (
        ".mywork.tmp/thesis.txt",
        ".notes.tmp",
        ".reals.png.backup.tmp",
        ".training-state-best.tmp/a",
        ".tmp",
        "x.tmp",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / ".mywork.tmp")
    before = {path for path in tmp_path.rglob("*")}
    tdkern_(
        "train",
        "--data",
        OK,
        "--outdir",
        tmp_path,
        "--duration",
        8e-6,
        *flags(TINY),
        *["--nosubdirs"] * nosubdirs,
    )
    if nosubdirs:
        resume(tmp_path, "--duration", "16e-6")
    assert before <= {path for path in tmp_path.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [
        "log.txt",
        "reals.png",
        "stats.jsonl",
        "fakes-000000.008.png",
        "curves-000000.008.png",
        "network-snapshot-000000.008",
    ],
)
def test_a_run_does_not_take_over_files_of_another_thing(tmp_path, name):
    (tmp_path / name).write_text("mine")
    output = tdkern_(
        *train_args(OK, tmp_path, 8e-6, TINY),
        code=1,
    )
    assert (
        f"holds {name}, which a run would write" in output
        and (tmp_path / name).read_text() == "mine"
    )


def test_keep_says_how_many_states_stay(tmp_path):
    run_dir = start(tmp_path / "run", duration=72e-6, keep=2, keep_every=3)
    kept = [f"training-state-000000.0{nimg}" for nimg in (24, 48, 64, 72)]
    assert states(run_dir) == kept
    resume(run_dir, "--duration", "96e-6", "--keep", "1")
    assert states(run_dir) == [f"training-state-000000.0{nimg}" for nimg in (24, 48, 72, 96)]


def test_what_is_later_than_where_training_goes_on_is_set_aside(tmp_path):
    run_dir = start(tmp_path / "run", duration=40e-6, keep=9)
    later = (find(run_dir, SNAPSHOT) / "tensors.safetensors").read_bytes()
    other = tmp_path / "other.zip"
    data_set(other, pixels(8, seed=5))
    output = resume(run_dir / "training-state-000000.016", "--data", other)
    assert "set aside" in output and "not the images and labels" in output
    assert (run_dir / "network-snapshot-000000.040" / "tensors.safetensors").read_bytes() != later
    assert (
        run_dir / "set-aside-network-snapshot-000000.040" / "tensors.safetensors"
    ).read_bytes() == later
    assert states(run_dir) == [f"training-state-000000.0{nimg}" for nimg in ("08", 16, 24, 32, 40)]
    assert (run_dir / "set-aside-training-state-000000.024").is_dir()
    assert "set-aside-" not in str(find(run_dir, STATE))


def test_what_was_set_aside_and_comes_again_is_not_kept_twice(tmp_path):
    run_dir = start(tmp_path / "run", duration=40e-6, keep=9)
    before = names(run_dir)
    resume(run_dir / "training-state-000000.016")
    assert names(run_dir) == before


# damage


def test_a_flipped_bit_is_found_and_the_next_older_whole_state_is_named(tmp_path):
    run_dir = start(tmp_path / "run", keep=3)
    for name in ("training-state-000000.024", "training-state-000000.016"):
        file = run_dir / name / "tensors.safetensors"
        data = bytearray(file.read_bytes())
        data[-77] ^= 4
        file.write_bytes(data)
    output = resume(run_dir, "--duration", "40e-6", code=1)
    assert "000000.024: damaged" in output and "training-state-000000.008 is whole" in output
    assert len(output.strip().splitlines()[-1]) == len(output.strip().splitlines()[-1].strip())
    assert "image 8 of 40" in resume(run_dir / "training-state-000000.008", "--duration", "40e-6")


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json"])
def test_every_flipped_bit_is_found(tmp_path, name):
    run_dir = start(tmp_path / "run", duration=8e-6)
    file = find(run_dir, STATE) / name
    whole, trainer_state = file.read_bytes(), find(run_dir, STATE)
    went_on = []
    for place in range(3, len(whole), max(len(whole) // 25, 1)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        try:
            read(trainer_state, STATE)
        except CheckpointError:
            continue
        went_on.append(whole[place - 20 : place + 20])
    if (
        name == "meta.json"
    ):  # versions, the name's numbers and the options that may change are compared elsewhere
        known = (
            "tdkern",
            "torch",
            "nimg",
            "step",
            "data",
            "duration",
            "tick",
            "snap",
            "dump",
            "keep",
            "workers",
            "time_limit",
            "{",
            "\\n",
        )
        went_on = [part for part in went_on if not any(word.encode() in part for word in known)]
    assert went_on == []


def _tensor(name, change):
    def damage(path):
        loaded = {
            key: value.clone()
            for key, value in safetensors.torch.load_file(path / "tensors.safetensors").items()
        }
        loaded[name] = change(loaded[name])
        safetensors.torch.save_file(loaded, path / "tensors.safetensors")

    return damage


def _meta(**changes):
    def damage(path):
        meta = json.loads((path / "meta.json").read_text()) | changes
        (path / "meta.json").write_text(
            json.dumps({key: value for key, value in meta.items() if value != "gone"})
        )

    return damage


FIRST = "model.map_layer0.bias"


@pytest.mark.parametrize(
    "damage, message",
    [
        (_tensor(f"exp_avg.{FIRST}", lambda t: t[:3]), rf"exp_avg.{FIRST} must be \[16\]"),
        (_tensor(f"exp_avg.{FIRST}", lambda t: t * float("nan")), "not finite"),
        (_tensor(f"exp_avg_sq.{FIRST}", lambda t: t - 1), "not finite"),
        (_tensor(f"exp_avg_sq.{FIRST}", lambda t: t + float("inf")), "not finite"),
        (_tensor(f"exp_avg.{FIRST}", torch.Tensor.double), "torch.float32, got .* torch.float64"),
        (_tensor(f"step.{FIRST}", lambda t: t + 1), "not finite"),
        (_tensor(f"step.{FIRST}", lambda t: t[None]), r"must be \[\]"),
        (_tensor(f"net.{FIRST}", torch.Tensor.char), "torch.float32, got torch.int8"),
        (_tensor(f"net.{FIRST}", lambda t: t + 0j), "torch.float32, got torch.complex64"),
        (_tensor(f"ema.{FIRST}", torch.Tensor.half), "torch.float32, got torch.float16"),
        (_tensor(f"target.{FIRST}", lambda t: t / 0), "not finite"),
        (_meta(step="gone"), "step must be an integer"),
        (_meta(step=-1), "step must be an integer"),
        (_meta(step=2.5), "step must be an integer"),
        (_meta(step="4"), "step must be an integer"),
        (_meta(step=10**30), "step must be an integer"),
        (_meta(step=0), "not finite or out of range|do not agree"),
        (_meta(options="gone"), "damaged|does not hold options"),
        (_meta(options=[1]), "damaged|does not hold options"),
        (_meta(format=float("nan")), "damaged"),
        (_meta(format=True), "damaged"),
    ],
)
def test_a_state_that_is_not_what_training_left_is_refused(tmp_path, monkeypatch, damage, message):
    run_dir = start(tmp_path / "run", duration=8e-6)
    damage(find(run_dir, STATE))
    path = find(run_dir, STATE)
    with open(path / "meta.json") as file:
        meta = json.load(file)
    if meta.get("format") == checkpoint.FORMAT:  # as one who wrote it so would have sealed it
        meta["checksums"] = {
            "meta.json": checkpoint._digest(meta),
            "tensors.safetensors": checkpoint.sha256(path / "tensors.safetensors"),
        }
        (path / "meta.json").write_text(json.dumps(meta))
    line = resume(run_dir, "--duration", "16e-6", code=1).strip().splitlines()[-1]
    assert line.startswith("Error: ") and re.search(message, line), line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\0" * 100,
        "{torn",
        "[1, 2]",
        '{"kimg": "x"}',
        '{"other": 1}',
        "[" * 100_000,
        "\udcff",
        '{"kimg": NaN}',
    ],
)
def test_a_line_that_is_no_statistics_is_dropped(tmp_path, line):
    run_dir = start(tmp_path / "run", duration=16e-6)
    with open(run_dir / "stats.jsonl", "ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
        file.write(b'{"kimg": 0.0')  # and a torn end
    resume(run_dir, "--duration", "24e-6")
    assert [entry["kimg"] for entry in statistics(run_dir)] == [0.008, 0.016, 0.024]


# signals

AT = 5  # the step in whose middle a signal comes


def _signal_at_a_step(signum, step=AT):
    real = Trainer.train_step

    def train_step(self, *args):
        if self.step == step:
            os.kill(os.getpid(), signum)
        real(self, *args)

    Trainer.train_step = train_step


def coarse(**changes):
    """Options of a run whose tick is its duration: nothing is saved on the way."""
    return TINY | {"tick": 0.08, "snap": 0, "dump": 0} | changes


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run in one go, ten steps."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    args = train_args(OK, run_dir, 80e-6, coarse())
    assert ended(args, run_dir.parent / "log")[0] == 0
    return run_dir


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


def find_step(run_dir):
    return read(find(run_dir, STATE), STATE)[0]["step"]


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


# one writer


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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


# errors on the way


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


# power cuts


class Disk:
    """What a disk may hold after a power cut: of what was not made durable, nothing.

    Names are durable once their directory was synced, contents once the file was.
    """

    def __init__(self, monkeypatch, root):
        self.root, self.events = root, []
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, functools.partial(self._call, name, getattr(os, name)))

    def _call(self, name, real, *args):
        if name == "fsync":
            place = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            self.events.append(
                (
                    "sync",
                    place,
                    list(map(str, place.iterdir())) if place.is_dir() else place.stat().st_size,
                )
            )
        else:
            self.events.append(("rename", *map(Path, args)))
        return real(*args)


def test_a_state_is_durable_before_its_name_is_and_before_the_older_goes(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, tmp_path)
    run_dir = start(tmp_path / "run", duration=16e-6)
    events = disk.events
    named = [
        i
        for i, event in enumerate(events)
        if event[0] == "rename" and event[2].name.startswith("training-state")
    ]
    assert len(named) == 2
    for i in named:
        unfinished = events[i][1]
        synced = [
            event[1].name
            for event in events[:i]
            if event[0] == "sync" and event[1].parent == unfinished
        ]
        assert "tensors.safetensors" in synced and any(
            name.startswith(".meta.json") for name in synced
        )
        contents = next(
            event for event in reversed(events[:i]) if event[0] == "sync" and event[1] == unfinished
        )[2]
        assert {Path(name).name for name in contents} == {"tensors.safetensors", "meta.json"}
        assert events[i + 1][:2] == ("sync", run_dir)  # the next thing
        lines = next(
            event
            for event in reversed(events[:i])
            if event[0] == "sync" and event[1].name == "stats.jsonl"
        )
        assert lines[2] > 0
    removed = next(
        i
        for i, event in enumerate(events)
        if event[0] == "rename" and event[1].name == "training-state-000000.008"
    )
    assert removed > named[1] + 1
