"""The campaign of a GPU machine (bench/gpu) without a GPU: its plumbing, what it writes when something fails, and how it measures."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "bench"), str(ROOT / "bench/gpu")]

import campaign  # noqa: E402
import comparison  # noqa: E402
import measure  # noqa: E402
import table  # noqa: E402

needs_cpp = pytest.mark.skipif(not (ROOT / "tdkern/lib/libtdkern_cpu.so").exists(), reason="the C++ backend was not built")


@needs_cpp
def test_dry_run(tmp_path):
    """Every stage but the build, which takes minutes, through the script."""
    stages = ["tests", "sanitize", "bench", "step"]
    command = [ROOT / "bench/gpu/campaign.sh", "--dry", tmp_path / "out", *stages]
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname"):  # a machine with no git, and none that is needed
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PATH": str(tmp_path / "bin")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out/log.txt").read_text()
    found = {name: json.loads((tmp_path / f"out/{name}.json").read_text()) for name in stages}
    assert all(result["ok"] and result["dry"] and result["torch"] == torch.__version__ for result in found.values())
    assert found["tests"]["large"]["passed"] == 8
    assert found["sanitize"]["checks"]["none cpp"]["done"]
    rows = found["bench"]["results"]["rows"] + found["step"]["results"]["rows"]
    assert {(row["op"], row["competitor"]) for row in rows} == {
        ("td_loss", "tdkern"), ("td_loss", "copy as an autograd node"), ("td_loss", "copy"), ("loss path", "tdkern"), ("loss path", "published-style eager"),
        ("training step", "tdkern"), ("training step", "EDM without TD"), ("training step", "TD at .3<sigma<5, a share"),
        ("training step", "the same, bfloat16 target"), ("training step", "published-style eager")}
    assert all(row["median_us"] > 0 and row["extra_bytes"] >= 0 and row["threads"] == 1 for row in rows)
    assert {row["elements"] for row in rows if row["group"] == "bench_growth"} == {1000, 10000}
    assert "a dry run" in (tmp_path / "out/comparison.md").read_text() and len(list((tmp_path / "out").iterdir())) <= 8


def test_a_stage_that_fails_says_so_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def refuses(at):
        raise campaign.Failed("no luck", seconds=1)

    def breaks(at):
        raise KeyError("gone")

    monkeypatch.setattr(campaign, "STAGES", {"refuses": refuses, "breaks": breaks, "works": lambda at: {"figure": 3}})
    monkeypatch.setattr(campaign, "SHARES", dict.fromkeys(campaign.STAGES, 5))
    assert campaign.main([str(tmp_path)]) == 1
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in campaign.STAGES]
    assert [(result["ok"], result.get("failure"), result.get("seconds"), result.get("figure")) for result in found] == [
        (False, "no luck", 1, None), (False, "KeyError: 'gone'", None, None), (True, None, None, 3)]
    assert "refuses   FAILED: no luck" in capsys.readouterr().out
    assert campaign.main([str(tmp_path), "works"]) == 0
    with pytest.raises(SystemExit):
        campaign.main([str(tmp_path), "rests"])


def test_a_stage_leaves_the_next_ones_their_time(tmp_path, monkeypatch):
    """What is left for each of the stages, of which the first takes all that it may: the measurements come last, and are what a lease is for."""
    left, now = {}, [0.0]
    monkeypatch.setattr(campaign.time, "monotonic", lambda: now[0])

    def stage(name):
        def run(at):
            left[name] = at.ends - now[0]
            now[0] = at.ends if name == "build" else now[0] + 1
            return {}
        return run

    monkeypatch.setattr(campaign, "STAGES", {name: stage(name) for name in campaign.STAGES})
    assert campaign.main([str(tmp_path)]) == 0
    assert sum(campaign.SHARES.values()) == campaign.TOTAL and campaign.SHARES.keys() == left.keys()
    assert left["build"] == campaign.SHARES["build"] and left["tests"] == campaign.SHARES["tests"] and left["step"] > campaign.SHARES["step"]
    assert campaign.main([str(tmp_path), "step"]) == 0 and left["step"] == campaign.TOTAL


def test_build_says_what_is_missing(tmp_path, monkeypatch):
    at = campaign.Campaign(tmp_path, dry=False)
    if not torch.cuda.is_available():
        with pytest.raises(campaign.Failed, match="torch sees no GPU here"):
            campaign.build(at)
    monkeypatch.setattr(campaign, "NEEDED", ("torch", "not_there"))
    with pytest.raises(campaign.Failed, match="python3 lacks not_there: carry their wheels and name the folder in TDKERN_WHEELS"):
        campaign.build(at)


def test_sanitize_tells_which_tool_found_what(tmp_path, monkeypatch):
    """compute-sanitizer's part, with its answers given: two errors under racecheck of Triton's kernels, and a run that stopped before its end."""
    at = campaign.Campaign(tmp_path, dry=False)

    def run(*command, **env):
        tool, backend = command[2], command[-1]
        text = "every op ran\n========= ERROR SUMMARY: 0 errors"
        if (tool, backend) == ("racecheck", "triton"):
            return {"rc": 86, "seconds": 1, "timed_out": False, "text": "every op ran\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"}
        stopped = (tool, backend) == ("initcheck", "cuda")
        return {"rc": 0, "seconds": 1, "timed_out": stopped, "text": "stopped" if stopped else text}

    monkeypatch.setattr(at, "run", run)
    monkeypatch.setattr(campaign.shutil, "which", lambda name, path=None: f"/bin/{name}")
    with pytest.raises(campaign.Failed) as failure:
        campaign.sanitize(at)
    assert str(failure.value) == "not clean: racecheck triton, initcheck cuda (out of time)"
    checks = failure.value.facts["checks"]
    assert len(checks) == 8 and checks["racecheck triton"]["errors"] == 2
    assert checks["memcheck cuda"] == {"rc": 0, "seconds": 1, "timed_out": False, "errors": 0, "done": True}


def test_a_command_ends_at_its_limit(tmp_path):
    at = campaign.Campaign(tmp_path, dry=True)
    done = at.run(sys.executable, "-c", "import time; print('begun'); time.sleep(60)", limit=1)
    assert done["timed_out"] and done["rc"] != 0 and done["seconds"] < 15 and "begun" in done["text"] and "begun" in (tmp_path / "log.txt").read_text()


def test_pytest_is_counted(tmp_path):
    (tmp_path / "test_some.py").write_text("import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n@pytest.mark.skip\ndef test_not(): pass\n")
    facts = campaign.Campaign(tmp_path, dry=True).pytest(tmp_path / "test_some.py", "-p", "no:benchmark", "-o", "addopts=")
    assert (facts["passed"], facts["skipped"], facts["rc"]) == (1, 1, 1)
    assert [message.startswith("assert 1 == 2") for message in facts["failed"].values()] == [True]


# ---- figures --------------------------------------------------------------------------------------------------------


def row(competitor, median, **more):
    return {"op": "loss path", "size": "512x3x32x32", "competitor": competitor, "threads": 1, "median_us": median, "times_ours": median / 10} | more


def test_comparison(tmp_path):
    rows = [row("tdkern", 10, graph_us=5, launches=5, syncs=0), row("published-style eager", 310), row("torch.compile", 30, graph_us=9)]
    figure = {key[2]: comparison.measured(rows, *key) for key in comparison.AIMS if key[0] == "loss path"}
    assert figure == {"launches": 5, "host waits": 0, "published-style eager": 31, "torch.compile": 3, "published-style eager, ours in a graph": 62,
                      "torch.compile, both in graphs": 1.8}
    stage = {"ok": True, "dry": False, "device": "GPU", "torch": "2", "commit": "abc", "results": {"rows": rows}}
    (tmp_path / "step.json").write_text(json.dumps(stage))
    (tmp_path / "bench.json").write_text(json.dumps({"ok": False, "dry": False, "failure": "it broke"}))
    text = comparison.markdown(tmp_path)
    for line in ("GPU, torch 2, commit abc:", "| `loss path` | 512x3x32x32 | launches | 4 | 4 | 5 (missed) |", "| host waits | 0 | 0 | 0 |",
                 "| torch.compile, both in graphs |  | 2.0× | 1.8× (missed) |", "| published-style eager |  | 30.0× | 31.0× |"):
        assert line in text
    assert comparison.markdown(None).startswith("Not measured yet")


def test_notes_hold_the_predictions():
    """The table of NOTES.md has a line for each of comparison.py's predictions, as they are."""
    notes = (ROOT / "bench/gpu/NOTES.md").read_text()
    assert all(line.rpartition(" | ")[0] in notes for line in comparison.markdown(None).splitlines()[2:])


def test_tables(tmp_path):
    rows = [row("tdkern", 10, extra_bytes=1234, share_of_copy=0.5), row("other", 25), row("other", 30, threads=2), row("tdkern", 9, threads=2)]
    growth = [{"op": "td_loss", "size": "", "competitor": "tdkern", "threads": 1, "elements": 10**k, "median_us": us, "share_of_copy": 0.9}
              for k, us in ((7, 2e4), (8, 2.2e5))]
    (tmp_path / "cpu.json").write_text(json.dumps({"device": "CPU", "date": "2026-11-25T", "versions": {"torch": "2"}, "rows": rows + growth}))
    text = table.markdown(tmp_path / "cpu.json")
    assert "| `loss path` | 512x3x32x32 | tdkern | 10 µs | 1.00× | 50% | 9 µs | 0.90× |  | 1,234 B |" in text
    assert "| `td_loss` | 1 | 2.00, 90% | 2.20, 90% | +10% |" in text
    gpu = table.competitors([row("tdkern", 10, launches=4, syncs=0, graph_us=5.25)])
    assert "| tdkern | 10 µs | 1.00× |  | 5.2 µs | 4 | 0 |  |" in gpu


def test_measuring_on_cuda(monkeypatch):
    """on_cuda's own logic, with a stand-in for torch.cuda that counts."""
    seen = {"replays": 0, "steps": 0, "held": 0}

    class Event:
        def __init__(self, enable_timing):
            self.steps = 0

        def record(self):
            self.steps = seen["steps"] + seen["replays"]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.steps - self.steps + 1e-3  # a step takes 1 ms, a replay too

    class Graph:
        def replay(self):
            seen["replays"] += 1

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    cuda = types.SimpleNamespace(
        get_device_properties=lambda: types.SimpleNamespace(L2_cache_size=1000), synchronize=lambda: None, reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 100, max_memory_allocated=lambda: 164, Event=Event, Stream=lambda: stream, current_stream=lambda: stream,
        stream=contextlib.nullcontext, CUDAGraph=Graph, graph=contextlib.nullcontext, set_sync_debug_mode=lambda mode: None)
    monkeypatch.setattr(measure, "torch", types.SimpleNamespace(cuda=cuda, autograd=torch.autograd))
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    monkeypatch.setattr(measure, "launches", lambda step: {"launches": 4, "copies": 0})

    def make():
        def step():
            seen["steps"] += 1
            return object()

        return step

    row = measure.on_cuda(make, moved=1500, seconds=0.01, rotate=True)
    assert (row["sets"], row["extra_bytes"], row["syncs"], row["launches"]) == (3, 64, 0, 4)
    assert row["median_us"] == pytest.approx(1000, rel=0.01) and row["graph_us"] == pytest.approx(1000 / 3, rel=0.01) and row["rounds"] >= 10
    alone = measure.on_cuda(make, moved=1500, seconds=0.01, rotate=False)
    assert alone["sets"] == 1 and "graph_us" not in alone


@needs_cpp
def test_peak_extra():
    """What a step holds at once beside what was there, and not what it releases of that or all that it allocates."""
    there, size = torch.zeros(1000), 4000

    def step():
        for _ in range(5):
            del_me = there + 1
        return del_me * 2

    assert 2 * size <= measure.peak_extra(step, "cpu") <= 3 * size
    assert measure.peak_extra(lambda: None, "cpu") == 0
