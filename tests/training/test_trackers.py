"""What TensorBoard and Weights & Biases are told of a run."""

import errno
import json
import sys
import types

import pytest

from helpers.runs import resume, start
from helpers.tiny import TINY, flags, options_of, tdkern_
from tdkern.training import Trainer, trackers, train
from tdkern.training.checkpoint import EVENTS, STATE, checkpoints
from tdkern.training.distributed import this_process

pytestmark = pytest.mark.usefixtures("short_previews")


def options(data, **changes):
    return options_of(data=data, **TINY | {"duration": 32e-6, "keep": 9, "snap": 0} | changes)


def ticks(run_dir):
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def events(run_dir):
    return sorted(path for path in run_dir.iterdir() if EVENTS.fullmatch(path.name))


def test_tensorboard_reads_every_tick_once_after_a_torn_end_and_a_resume(tmp_path, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = start(options(data), tmp_path / "run")
    whole = events(run_dir)[0].read_bytes()
    events(run_dir)[0].write_bytes(whole[:-7])
    state = checkpoints(run_dir, STATE)[1]
    train(Trainer(options(data), this_process(), state), run_dir)
    resume(run_dir, duration=48e-6)
    assert len(events(run_dir)) == 3
    read = EventAccumulator(str(run_dir)).Reload()
    lines = ticks(run_dir)
    for name in ("loss", "td", "base", "lr", "kimg", "host_gib"):
        scalars = read.Scalars(name)
        assert [scalar.step for scalar in scalars] == [8, 16, 24, 32, 40, 48]
        values = [scalar.value for scalar in scalars]
        assert values == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_what_tensorboard_has_is_durable_before_a_state_is(tmp_path, data, monkeypatch):
    pytest.importorskip("tensorboard")
    synced = []

    def sync(path):
        synced.append((path, checkpoints(path.parent, STATE)))

    monkeypatch.setattr(trackers, "sync_file", sync)
    run_dir = start(options(data, duration=8e-6), tmp_path / "run")
    assert synced == [(events(run_dir)[0], [])]


@pytest.mark.parametrize("call", ["open", "write", "import"])
def test_tensorboard_that_cannot_be_written_is_one_warning(tmp_path, data, monkeypatch, call):
    pytest.importorskip("tensorboard")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "open":
        monkeypatch.setattr(trackers, "open_new", full)
    if call == "write":
        monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    if call == "import":
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    run_dir = start(options(data), tmp_path / "run")
    assert len(ticks(run_dir)) == 4 and len(checkpoints(run_dir, STATE)) == 4
    log = (run_dir / "log.txt").read_text()
    assert log.count("Warning: TensorBoard gets no more numbers: ") == 1


def test_a_run_without_tensorboard_trains(tmp_path, data, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    run_dir = start(options(data), tmp_path / "run")
    assert events(run_dir) == [] and "Warning" not in (run_dir / "log.txt").read_text()


def test_a_folder_with_events_of_another_program_is_refused(tmp_path, data):
    theirs = tmp_path / "out" / "events.out.tfevents.1700000000.host.1.0"
    theirs.parent.mkdir()
    theirs.write_bytes(b"mine")
    given = ["--data", data, "--duration", 8e-6, *flags(TINY)]
    output = tdkern_("train", "--outdir", theirs.parent, "--nosubdirs", *given, code=1)
    assert f"holds {theirs.name}, which a run would write" in output
    assert theirs.read_bytes() == b"mine"


class Stub(types.ModuleType):
    """In place of wandb: remembers what it is told."""

    def __init__(self, broken=False):
        super().__init__("wandb")
        self.runs, self.logged, self.finished, self.broken = [], [], 0, broken

    def init(self, **settings):
        self.runs.append(settings)
        return self

    def log(self, numbers, step):
        if self.broken:
            raise ConnectionError("the network\nis down")
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_numbers_of_stats_jsonl_and_a_resumed_run_is_the_same(
    tmp_path, data, monkeypatch
):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    run_dir = start(options(data, wandb="sunflowers"), tmp_path / "run")
    resume(run_dir, duration=40e-6)
    first, second = stub.runs
    assert first["project"] == "sunflowers" and first["name"] == "run"
    assert first["config"]["batch"] == 8 and first["dir"] == str(run_dir)
    assert first["id"] == second["id"] == (run_dir / "wandb-run.txt").read_text().strip()
    assert second["resume"] == "allow" and stub.finished == 2
    assert [numbers for _, numbers in stub.logged] == ticks(run_dir)
    assert [step for step, _ in stub.logged] == [8, 16, 24, 32, 40]


def test_wandb_may_be_left_out_or_added_when_a_run_goes_on(tmp_path, data, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    run_dir = start(options(data), tmp_path / "run")
    assert stub.runs == []
    tdkern_("train", "--resume", run_dir, "--duration", "40e-6", "--wandb", "sunflowers")
    assert [step for step, _ in stub.logged] == [40]


def test_wandb_that_fails_on_the_way_is_one_warning(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Stub(broken=True))
    run_dir = start(options(data, wandb="sunflowers"), tmp_path / "run")
    assert len(ticks(run_dir)) == 4
    log = (run_dir / "log.txt").read_text()
    told = "Weights & Biases gets no more numbers: ConnectionError: the network\\nis down"
    assert log.count(told) == 1


def test_wandb_that_is_not_there_or_was_damaged_is_an_error_in_a_line(tmp_path, data, monkeypatch):
    given = ["--data", data, "--duration", 8e-6, "--wandb", "sunflowers", *flags(TINY)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    output = tdkern_("train", "--outdir", tmp_path / "runs", *given, code=1)
    last = output.strip().splitlines()[-1]
    assert last.startswith("Error: wandb is not installed") and "pip install" in last
    stub = Stub()
    stub.init = lambda **settings: {}["no\nkey"]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    output = tdkern_("train", "--outdir", tmp_path / "runs", *given, code=1)
    last = output.strip().splitlines()[-1]
    assert last.startswith("Error: Weights & Biases cannot start (KeyError: ")
    assert "WANDB_MODE=offline" in last
    monkeypatch.setitem(sys.modules, "wandb", Stub())
    run_dir = start(options(data, wandb="sunflowers"), tmp_path / "run")
    (run_dir / "wandb-run.txt").write_text("../../other")
    output = tdkern_("train", "--resume", run_dir, "--duration", "40e-6", code=1)
    assert f"{run_dir / 'wandb-run.txt'}: does not hold" in output.strip().splitlines()[-1]
