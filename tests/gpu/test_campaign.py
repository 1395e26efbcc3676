"""The campaign of a GPU machine (bench/gpu) without one: what it writes when something fails, how
it shares its time, how it reads its tools, what it makes of figures, and how it measures. Its
stages run in test_rehearsal.py.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

from helpers import ROOT

sys.path += [str(ROOT / "bench"), str(ROOT / "bench/gpu")]

import campaign
import comparison
import measure
import steps
import table

from tdkern.networks import half

H100 = ROOT / "bench/results/nvidia-h100-80gb-hbm3.json"


def stages_are(monkeypatch, **stages) -> None:
    monkeypatch.setattr(campaign, "STAGES", stages)
    monkeypatch.setattr(campaign, "SHARES", dict.fromkeys(stages, 5))


def results(out: Path) -> dict:
    return json.loads((out / "campaign.json").read_text())["stages"]


# ---- the stages' turns --------------------------------------------------------------------------


def test_a_stage_that_fails_says_so_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def refuses(at):
        raise campaign.Failed("no luck", seconds=1, rows=[{"ms": 2}])

    def breaks(at):
        assert results(tmp_path)["refuses"]["failure"] == "no luck"  # it is already written
        raise KeyError("gone")

    stages_are(monkeypatch, refuses=refuses, breaks=breaks, works=lambda at: {"figure": 3})
    monkeypatch.setenv("TDKERN_COMMIT", "abc")
    assert campaign.main([str(tmp_path)]) == 1
    found = results(tmp_path)
    assert list(found) == ["refuses", "breaks", "works"]
    keys = ("ok", "failure", "seconds", "rows", "figure", "commit")
    assert [[result.get(key) for key in keys] for result in found.values()] == [
        [False, "no luck", 1, [{"ms": 2}], None, "abc"],
        [False, "KeyError: 'gone'", None, None, None, "abc"],
        [True, None, None, None, 3, "abc"],
    ]
    assert all(result["stage_seconds"] >= 0 for result in found.values())
    said = capsys.readouterr().out
    assert "refuses   FAILED: no luck" in said and "works     ok" in said
    assert (tmp_path / "comparison.md").read_text().splitlines()[0].endswith("commit abc:")
    with pytest.raises(SystemExit):
        campaign.main([str(tmp_path), "--again", "rests"])


def test_a_full_disk_costs_no_stage_its_turn(tmp_path, monkeypatch, capsys):
    """What cannot be written is printed, which comes back with the call."""
    monkeypatch.setattr(campaign.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28)))
    stages_are(monkeypatch, one=lambda at: {"rows": [{"ms": 7}]}, two=lambda at: {})
    assert campaign.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert '"rows": [{"ms": 7}]' in said and "two       ok" in said


def test_a_log_that_cannot_be_written_costs_no_command(tmp_path):
    (tmp_path / "log.txt").mkdir()
    done = campaign.Campaign(tmp_path, dry=True).run("echo", "said")
    assert done["rc"] == 0 and done["text"] == "said\n"


def test_again_runs_some_and_keeps_the_others(tmp_path, monkeypatch):
    """In the stages' own order, whatever order they are named in."""
    ran = []

    def stage(name):
        return lambda at: ran.append(name) or {"turn": len(ran)}

    stages_are(monkeypatch, **{name: stage(name) for name in ("one", "two", "three")})
    assert campaign.main([str(tmp_path)]) == 0
    assert campaign.main([str(tmp_path), "--again", "three", "one"]) == 0
    assert ran == ["one", "two", "three", "one", "three"]
    turns = {name: result["turn"] for name, result in results(tmp_path).items()}
    assert turns == {"one": 4, "two": 2, "three": 5}


def test_again_with_a_stage_that_failed_before(tmp_path, monkeypatch):
    """The exit code is of the stages that ran."""

    def fails(at):
        raise campaign.Failed("once")

    stages_are(monkeypatch, first=fails, second=lambda at: {})
    assert campaign.main([str(tmp_path)]) == 1
    assert campaign.main([str(tmp_path), "--again", "second"]) == 0
    assert campaign.main([str(tmp_path), "--again", "first"]) == 1
    campaign.STAGES["first"] = lambda at: {}
    assert campaign.main([str(tmp_path), "--again", "first"]) == 0
    assert all(result["ok"] for result in results(tmp_path).values())


def test_again_keeps_the_rows_that_it_did_not_come_to(tmp_path, monkeypatch):
    """And those whose case fails now, beside the failure."""
    rows = [{"op": "step", "loss": name, "ms": 1} for name in ("EDM", "CT", "TD+CT")]
    stages_are(monkeypatch, step=lambda at: {"rows": rows})
    assert campaign.main([str(tmp_path)]) == 0

    def ends_early(at):
        new = [{"op": "step", "loss": "EDM", "ms": 2}]
        raise campaign.Failed(
            "out of time", rows=[*new, {"op": "step", "loss": "CT", "failure": ""}]
        )

    campaign.STAGES["step"] = ends_early
    assert campaign.main([str(tmp_path), "--again", "step"]) == 1
    found = [(row["loss"], row.get("ms")) for row in results(tmp_path)["step"]["rows"]]
    assert found == [("CT", 1), ("TD+CT", 1), ("EDM", 2), ("CT", None)]


def test_benchmarks_say_the_commit_of_a_copy_without_git(monkeypatch):
    env = {**os.environ, "TDKERN_COMMIT": "abc", "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}
    code = "import conftest; print(conftest.commit())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "bench", env=env)
    assert done.stdout.splitlines() == ["abc"], done.stderr


def test_small_sizes_are_no_results():
    """They go where the campaign says, and never among what was measured."""
    code = "import conftest; print(conftest.RESULTS)"
    env = {**os.environ, "TDKERN_BENCH_TINY": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}
    env.pop("TDKERN_BENCH_RESULTS", None)
    folders = []
    for more in ({}, {"TDKERN_BENCH_RESULTS": "named"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT / "bench",
            env=env | more,
        )
        folders += done.stdout.split()
    assert folders[1] == "named" and ROOT not in Path(folders[0]).parents
    assert not Path(folders[0]).exists()


def test_on_a_gpu_the_loss_path_comes_first_and_the_drivers_steps_last(monkeypatch):
    """The benchmarks that an aim asks for."""
    names = ["bench_driver_step[64-64]", "bench_loss_path[tdkern]", "bench_growth[copy]"]
    code = f"""
import types, conftest
conftest.DEVICE = "cuda"
path = types.SimpleNamespace(stem="bench_growth")
items = [types.SimpleNamespace(name=name, path=path) for name in {names}]
conftest.pytest_collection_modifyitems(items)
print(*(item.name for item in items), sep="\\n")
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "bench", env=env)
    assert done.stdout.splitlines() == [*names[1:], names[0]], done.stderr
    at, files = campaign.Campaign(Path("/"), dry=False), []
    monkeypatch.setattr(at, "pytest", lambda *args, **env: files.extend(args) or {"rc": 1} | LATE)
    with pytest.raises(campaign.Failed):
        campaign.bench(at)
    assert files[:3] == [f"bench/bench_{name}.py" for name in ("loss_path", "growth", "adam_ema")]


LATE = {"timed_out": False}


def left_for(monkeypatch, tmp_path, *arguments, greedy=("build",)) -> dict:
    """The seconds that each stage finds left, of which the greedy ones take all, others one."""
    left, now = {}, [0.0]
    monkeypatch.setattr(campaign.time, "monotonic", lambda: now[0])

    def stage(name):
        def run(at):
            left[name] = at.ends - now[0]
            return {}

        return run

    def passing(group):  # a group's stages begin together, and its time passes once
        ends = max(left[name] for name in group)
        now[0] += ends if set(group) & set(greedy) else 1

    written = campaign.write

    def write(path, facts):
        passing([name for name in facts["stages"] if name not in done])
        done.update(facts["stages"])
        written(path, facts)

    done = set()
    monkeypatch.setattr(campaign, "write", write)
    monkeypatch.setattr(campaign, "machine", lambda: {"torch": "2", "commit": "abc"})
    monkeypatch.setattr(campaign, "STAGES", {name: stage(name) for name in campaign.STAGES})
    assert campaign.main([str(tmp_path), *arguments]) == 0
    monkeypatch.undo()
    return left


def test_a_stage_leaves_the_next_ones_their_time(tmp_path, monkeypatch):
    """What a stage does not take is the next ones'; what it may take is its share and no more."""
    shares = campaign.SHARES
    assert shares.keys() == campaign.STAGES.keys()
    groups = campaign.groups_of(list(campaign.STAGES))
    assert ["tests", "sanitize", "warm"] in groups and len(groups) == len(shares) - 2
    scale = campaign.TOTAL / sum(max(shares[name] for name in group) for group in groups)
    assert scale <= 1.01  # the stages' shares fill what there is
    left = left_for(monkeypatch, tmp_path / "greedy", greedy=campaign.STAGES)
    for name, share in shares.items():
        assert left[name] == pytest.approx(share * scale)
    left = left_for(monkeypatch, tmp_path / "quick")
    assert left["build"] == pytest.approx(shares["build"] * scale)
    assert left["tests"] == left["sanitize"] > shares["tests"] * scale
    # what nothing measures takes no more than its share: what is left over is for whole steps
    assert left["warm"] == pytest.approx(shares["warm"] * scale)
    assert left["step"] > left["bench"] > shares["bench"] * scale
    between = len(groups) - 2  # each of which took a second
    assert left["confirm"] == pytest.approx(campaign.TOTAL - shares["build"] * scale - between)


def test_a_shorter_campaign_shares_what_it_has(tmp_path, monkeypatch):
    left = left_for(monkeypatch, tmp_path / "one", "--seconds", "180", "--again", "step")
    assert left == {"step": 180}
    some = ["bench", "step", "tests", "warm"]
    left = left_for(
        monkeypatch, tmp_path / "some", "--seconds", "100", "--again", *some, greedy=some
    )
    whole = sum(campaign.SHARES[name] for name in ("tests", "bench", "step"))
    assert left == {name: pytest.approx(100 * campaign.SHARES[name] / whole) for name in some}
    left = left_for(monkeypatch, tmp_path / "warm", "--seconds", "99", "--again", "warm", "bench")
    assert left["warm"] == pytest.approx(99 * 150 / (150 + campaign.SHARES["bench"]))
    left = left_for(monkeypatch, tmp_path / "dry", "--dry", "--seconds", "50", greedy=())
    assert set(left.values()) == {50}


def test_stages_side_by_side_share_their_time(tmp_path, monkeypatch):
    """Each begins before another ends; one that fails costs neither the other nor the next."""
    both = threading.Barrier(2, timeout=30)

    def tests(at):
        both.wait()
        raise campaign.Failed("broken", passed=3)

    def warm(at):
        both.wait()
        return {}

    stages_are(monkeypatch, tests=tests, warm=warm, bench=lambda at: {})
    assert campaign.main([str(tmp_path)]) == 1
    assert [result["ok"] for result in results(tmp_path).values()] == [False, True, True]
    assert results(tmp_path)["tests"]["passed"] == 3


def test_a_gpu_machine_keeps_one_file(tmp_path, monkeypatch):
    """OUT/<device>.json, what bench/results takes: all but what a failure printed."""

    def fails(at):
        raise campaign.Failed("no", tail="long", rows=[1])

    stages_are(monkeypatch, fails=fails)
    facts = {"torch": "2", "commit": "abc", "device": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(campaign, "machine", lambda: dict(facts))
    assert campaign.main([str(tmp_path)]) == 1
    kept = json.loads((tmp_path / H100.name).read_text())
    assert kept | facts == kept and kept["dry"] is False
    assert kept["stages"]["fails"]["rows"] == [1] and "tail" not in kept["stages"]["fails"]
    assert results(tmp_path)["fails"]["tail"] == "long"


# ---- a stage's commands -------------------------------------------------------------------------


def test_build_says_what_is_missing(tmp_path, monkeypatch):
    at = campaign.Campaign(tmp_path, dry=False)
    if not torch.cuda.is_available():
        with pytest.raises(campaign.Failed, match="torch sees no GPU here"):
            campaign.build(at)
    monkeypatch.setattr(campaign, "NEEDED", ("torch", "not_there"))
    with pytest.raises(
        campaign.Failed,
        match="python3 lacks not_there: carry their wheels and name the folder in TDKERN_WHEELS",
    ):
        campaign.build(at)


@pytest.mark.parametrize("missing", [None, "cuda", "triton"])
def test_a_carried_build_spares_the_wait(tmp_path, monkeypatch, missing):
    """If both backends load; else this machine builds, and `confirm` builds in any case."""
    at, built = campaign.Campaign(tmp_path, dry=False), []
    backends = {"cuda": "", "triton": "", "cpp": "not built"} | ({missing: "no"} if missing else {})
    monkeypatch.setattr(campaign, "capability", lambda: "9.0")
    monkeypatch.setattr(campaign, "library_facts", lambda at: {"info": {"backends": backends}})
    monkeypatch.setattr(
        campaign, "build_into", lambda at, folder: built.append(folder) or {"seconds": 1}
    )
    facts = campaign.build(at)
    assert facts["carried"] == (missing is None) and built == ([None] if missing else [])
    assert campaign.confirm(at) == {"seconds": 1} and built[-1] == "build/confirm"


@pytest.mark.parametrize("text", ["", "a traceback\nImportError: no", "warning\n{not json"])
def test_a_library_that_does_not_import(tmp_path, monkeypatch, text):
    at = campaign.Campaign(tmp_path, dry=False)
    monkeypatch.setattr(at, "run", lambda *command: {"text": text})
    facts = campaign.library_facts(at)
    assert facts == {"info": None, "tail": text} and not campaign.works(facts)


def test_a_library_that_speaks_after_its_facts(tmp_path, monkeypatch):
    """It is not built anew for a warning at the end."""
    at = campaign.Campaign(tmp_path, dry=False)
    text = '7\n{"backends": {"cuda": "", "triton": ""}}\nException ignored in: atexit\n3\n'
    monkeypatch.setattr(at, "run", lambda *command: {"text": text})
    assert campaign.works(campaign.library_facts(at))


def test_a_build_that_fails(tmp_path, monkeypatch):
    at = campaign.Campaign(tmp_path, dry=True)
    done = {"rc": -9, "seconds": 70, "timed_out": True, "text": "nvcc ..."}
    monkeypatch.setattr(at, "run", lambda *command, **env: done)
    with pytest.raises(campaign.Failed, match=r"the build failed \(out of time\)") as failure:
        campaign.build_into(at, "build/dry")
    assert failure.value.facts == {"seconds": 70, "architecture": "9.0", "tail": "nvcc ..."}


def test_sanitize_tells_which_tool_found_what(tmp_path, monkeypatch):
    """compute-sanitizer's part, with its answers given: two errors under racecheck of Triton's
    kernels, and a run that stopped before its end."""
    at, commands = campaign.Campaign(tmp_path, dry=False), []

    def run(*command, **env):
        commands.append(command)
        tool, backend = command[2], command[-1]
        text = "every op ran\n========= ERROR SUMMARY: 0 errors"
        if (tool, backend) == ("racecheck", "triton"):
            return {
                "rc": 86,
                "seconds": 1,
                "timed_out": False,
                "text": "every op ran\n"
                "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            }
        stopped = (tool, backend) == ("initcheck", "cuda")
        return {"rc": 0, "seconds": 1, "timed_out": stopped, "text": "stopped" if stopped else text}

    monkeypatch.setattr(at, "run", run)
    monkeypatch.setattr(campaign.shutil, "which", lambda name, path=None: f"/bin/{name}")
    with pytest.raises(campaign.Failed) as failure:
        campaign.sanitize(at)
    assert str(failure.value) == "not clean: initcheck cuda (out of time), racecheck triton"
    checks = failure.value.facts["checks"]
    assert len(checks) == len(commands) == 8 and checks["racecheck triton"]["errors"] == 2
    assert checks["memcheck cuda"] == {
        "rc": 0,
        "seconds": 1,
        "timed_out": False,
        "errors": 0,
        "done": True,
    }
    assert checks["initcheck cuda"]["tail"] == "stopped" and not checks["initcheck cuda"]["done"]
    quiet = {command[2] for command in commands if "--report-api-errors" in command}
    assert quiet == {"memcheck"}
    monkeypatch.setattr(campaign.shutil, "which", lambda name, path=None: None)
    with pytest.raises(campaign.Failed, match="compute-sanitizer is not here"):
        campaign.sanitize(at)


def test_the_sanitizers_see_the_networks_kernels():
    """In Triton's interpreter; they are no ops, so nothing else calls them for the sanitizers."""
    code = "import selection; selection.run('triton', {}); from tdkern.triton import branch_sum; "
    code += "selection.IMAGES = (); branch_sum.branch_sum_backward = None; print('ran')\n"
    code += "selection.run('triton', {}); selection.IMAGES = ((1, 8, 2, 2),)\n"
    code += "selection.run('triton', {})"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'bench/gpu'}"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "ran\n" and "'NoneType' object is not callable" in done.stderr


NCU = """==PROF== Connected to process 7
every op ran
==PROF== Disconnected from process 7
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","ns","register/thread","%"
"0","void forward_kernel<float, 4>(const float *, long)","(4096, 1, 1)","763,520","48","91.95"
"1","coef_kernel","(1, 1, 1)","3,104","40","0.10"
==WARNING== something else
""".replace("\\\n", "")


def test_ncu_is_read():
    rows = campaign.profiled(NCU)
    assert [row["kernel"] for row in rows] == [
        "void forward_kernel<float, 4>(const float *, long)",
        "coef_kernel",
    ]
    assert {
        key: rows[0][key] for key in ("ns", "registers", "dram_percent", "occupancy_percent")
    } == {"ns": "763,520", "registers": "48", "dram_percent": "91.95", "occupancy_percent": None}
    assert all(row.keys() == {"kernel", *campaign.METRICS.values()} for row in rows)
    assert campaign.profiled("") == campaign.profiled("==ERROR== no permission\n") == []


def test_profile_says_why_it_has_nothing(tmp_path, monkeypatch):
    at, commands = campaign.Campaign(tmp_path, dry=False), []
    done = {"rc": 1, "seconds": 2, "timed_out": False, "text": NCU + "==ERROR== ERR_NVGPUCTRPERM"}
    monkeypatch.setattr(at, "run", lambda *command, **env: commands.append(command) or dict(done))
    monkeypatch.setattr(campaign.shutil, "which", lambda name, path=None: f"/bin/{name}")
    with pytest.raises(campaign.Failed, match=r"^the profile failed$") as failure:
        campaign.profile(at)
    assert len(failure.value.facts["kernels"]) == 2
    assert failure.value.facts["tail"].endswith("ERR_NVGPUCTRPERM")
    done |= {"rc": 0}
    assert [row["registers"] for row in campaign.profile(at)["kernels"]] == ["48", "40"]
    assert commands[0][0] == "/bin/ncu" and commands[0][-1] == "100000000"
    done |= {"text": "every op ran\n==ERROR== ERR_NVGPUCTRPERM\n"}
    with pytest.raises(campaign.Failed, match=r"^ncu profiled no kernel$"):
        campaign.profile(at)
    monkeypatch.setattr(campaign.shutil, "which", lambda name, path=None: None)
    with pytest.raises(campaign.Failed, match="ncu is not here"):
        campaign.profile(at)


def test_steps_that_end_early_keep_their_rows(tmp_path, monkeypatch):
    """A line a case, whatever ends the run; a limit is said."""
    monkeypatch.setenv("TDKERN_COMMIT", "abc")
    at = campaign.Campaign(tmp_path, dry=False, ends=campaign.time.monotonic() + 100)

    def run(*command, **env):
        assert command[command.index("--part") + 1] == "compile"
        assert 80 <= int(command[command.index("--seconds") + 1]) <= 88  # it ends by itself before
        Path(command[2]).write_text('{"ms": 3}\n{"failure": "RuntimeError: no"}\n')
        return {"rc": -9, "timed_out": True, "text": "hung"}

    monkeypatch.setattr(at, "run", run)
    with pytest.raises(campaign.Failed, match=r"^1 of 2 cases failed \(out of time\)$") as failure:
        campaign.compile(at)
    assert failure.value.facts == {
        "rc": -9,
        "tail": "hung",
        "rows": [{"ms": 3, "commit": "abc"}, {"failure": "RuntimeError: no", "commit": "abc"}],
    }
    monkeypatch.setattr(at, "run", lambda *command: {"rc": 0, "timed_out": False, "text": ""})
    with pytest.raises(campaign.Failed, match=r"^0 of 0 cases failed$"):
        campaign.step(at)


def test_a_case_that_ends_its_process_costs_that_case_alone(tmp_path, monkeypatch):
    """One that is killed, one that leaves CUDA unusable; each has its line, and says its commit."""
    at = campaign.Campaign(tmp_path, dry=False, ends=campaign.time.monotonic() + 100)
    monkeypatch.setenv("TDKERN_COMMIT", "abc")
    skipped, codes = [], iter([-9, steps.UNUSABLE, 0])

    def run(*command, **env):
        skip = int(command[command.index("--skip") + 1])
        skipped.append(skip)
        rows = [{"case": n, "failure": "no"} for n in range(skip + 1)]
        code = next(codes)
        rows += [] if code else [{"case": skip + 1, "ms": 3}]
        Path(command[2]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return {"rc": code, "timed_out": False, "text": ""}

    monkeypatch.setattr(at, "run", run)
    with pytest.raises(campaign.Failed, match=r"^3 of 4 cases failed$") as failure:
        campaign.step(at)
    assert skipped == [0, 1, 2]
    assert failure.value.facts["rows"][-1] == {"case": 3, "ms": 3, "commit": "abc"}


def run_steps(monkeypatch, out: Path, skip: int) -> list[dict]:
    """What steps.py writes of cases whose second ends its process."""
    monkeypatch.setattr(sys, "argv", ["steps.py", str(out), "--skip", str(skip), "--tiny"])
    with contextlib.suppress(SystemExit):
        steps.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_an_error_that_stays_ends_the_process_behind_its_line(tmp_path, monkeypatch):
    """Every later case would fail with it."""
    usable = iter([True, False, True])
    monkeypatch.setattr(steps, "cases", lambda part: [steps.Case(name) for name in ("A", "B", "C")])
    monkeypatch.setattr(steps, "attempt", lambda *args: {"ms": 1})
    monkeypatch.setattr(steps, "usable", lambda: next(usable))
    rows = run_steps(monkeypatch, tmp_path / "rows.jsonl", 0)
    assert [row["loss"] for row in rows] == ["A", "B"]
    rows = run_steps(monkeypatch, tmp_path / "rows.jsonl", 2)
    assert [(row["loss"], row["ms"]) for row in rows] == [("A", 1), ("B", 1), ("C", 1)]


def test_a_case_has_its_line_before_it_begins(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"

    def killed(*args):
        raise SystemExit

    monkeypatch.setattr(steps, "attempt", killed)
    rows = run_steps(monkeypatch, out, 0)
    assert [(row["loss"], row["failure"]) for row in rows] == [("EDM", steps.CUT_OFF)]


@pytest.mark.parametrize("loss", ["TD+EDM", "CT"])
def test_the_published_style_has_none_of_our_kernels(loss, monkeypatch):
    """Its target network would run them, in half precision and without gradients."""
    called = []
    for name in ("group_norm", "branch_sum"):
        monkeypatch.setattr(
            half, name, lambda *args, name=name, **_: called.append(name) or args[0]
        )
    monkeypatch.setattr(half, "fuses", lambda x: True)
    x, sigma = torch.randn(2, 3, 8, 8), torch.ones(2)
    for style in ("published", "tdkern"):
        called.clear()
        net = steps.make_net(steps.Case(loss, style), tiny=True)
        with torch.no_grad(), contextlib.suppress(TypeError):
            net(x, sigma, raw=True)
        assert bool(called) == (style == "tdkern"), called


def test_cuda_that_is_unusable(monkeypatch):
    def refuses():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(steps, "DEVICE", "cuda")
    monkeypatch.setattr(steps.torch.cuda, "synchronize", refuses)
    assert not steps.usable()
    assert steps.attempt(steps.Sampler("eager"), True, 0.0)["failure"]


def test_a_driver_that_fails_leaves_cudnn_as_it_was(monkeypatch):
    """Or all cases behind it would be timed with deterministic kernels."""

    def refuses(*args):
        raise RuntimeError("no graph")

    monkeypatch.setattr(steps, "driver_of", refuses)
    row = steps.attempt(steps.Driver("graph"), True, 0.0)
    assert row == {"failure": "RuntimeError: no graph"}
    assert not torch.backends.cudnn.deterministic


def test_what_an_aim_asks_for_is_measured_first():
    """With the published style in every precision among it; the driver and the sampler next."""
    main = steps.cases("step")
    wanted = [
        steps.Case(**{**comparison.DEFAULTS, **case})
        for under, over, _, aim, _ in comparison.STEPS.values()
        if aim
        for case in (under, over)
    ]
    first = main[: len(set(wanted)) + 4]
    assert set(wanted) <= set(first)
    assert [kind for kind in first if not isinstance(kind, steps.Case)] == [
        steps.Driver("eager"),
        steps.Driver("graph"),
        steps.Sampler("eager"),
        steps.Sampler("graph"),
    ]


def test_steps_cover_what_is_asked():
    """By issue 15: five losses, both styles, three precisions, three ways, three batches."""
    cases = [case for part in ("step", "compile") for case in steps.cases(part)]
    assert len(cases) == len(set(cases))
    of_steps = [case for case in cases if isinstance(case, steps.Case)]
    for name, values in {
        "loss": {"EDM", "TD+EDM", "TD+EDM window", "CT", "TD+CT"},
        "style": {"tdkern", steps.TORCHS, "published"},
        "precision": {"bf16", "tf32", "fp32"},
        "mode": {"eager", "graph", "compile"},
        "batch": {64, 256, 512},
    }.items():
        assert {getattr(case, name) for case in of_steps} == values
    for kind in (steps.Sampler, steps.Driver):
        assert [case.mode for case in cases if isinstance(case, kind)] == ["eager", "graph"]
    for under, over, *_ in comparison.STEPS.values():  # each ratio's cases are measured
        for wanted in (under, over):
            assert steps.Case(**{**comparison.DEFAULTS, **wanted}) in of_steps
    assert all(
        value == getattr(steps.Case("EDM"), name) for name, value in comparison.DEFAULTS.items()
    )


def test_a_command_ends_at_its_limit(tmp_path):
    at = campaign.Campaign(tmp_path, dry=True)
    code = "import time; print('begun'); time.sleep(60)"
    done = at.run(sys.executable, "-c", code, limit=3)
    assert done["timed_out"] and done["rc"] != 0 and done["seconds"] < 15
    assert "begun" in done["text"] and "KeyboardInterrupt" in done["text"]
    assert "begun" in (tmp_path / "log.txt").read_text()
    at.ends = campaign.time.monotonic() - 1
    assert at.run("sleep", "60")["timed_out"]  # of a stage that has nothing left
    at.ends += 100
    assert at.run("false") | {"seconds": 0} == {
        "command": "false",
        "rc": 1,
        "seconds": 0,
        "timed_out": False,
        "text": "",
    }


def test_a_process_that_nothing_ends(tmp_path, monkeypatch):
    """As one does that waits in the GPU's driver: it is left, and no success."""

    class Stuck:
        pid, returncode = 1 << 30, None

        def __init__(self, *args, **options): ...

        def wait(self, timeout):  # a wait without an end would be one
            raise subprocess.TimeoutExpired("stuck", timeout)

    monkeypatch.setattr(campaign.subprocess, "Popen", Stuck)
    monkeypatch.setattr(campaign.os, "killpg", lambda *args: None)
    done = campaign.Campaign(tmp_path, dry=True).run("stuck", limit=0)
    assert done["timed_out"] and done["rc"] == -9


def test_a_report_that_is_cut_off(tmp_path, monkeypatch):
    at = campaign.Campaign(tmp_path, dry=True)

    def run(*command, **env):
        (report,) = (word for word in map(str, command) if word.startswith("--junitxml="))
        Path(report.partition("=")[2]).write_text("<testsuites><testsuite><testcase")
        return {"rc": -9, "seconds": 1, "timed_out": True, "text": "killed"}

    monkeypatch.setattr(at, "run", run)
    facts = at.pytest("tests")
    assert facts["rc"] == -9 and facts["passed"] == 0 and facts["tail"] == "killed"


def held(lock: Path) -> bool:
    """Whether a process has the lock on the file."""
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_command_that_ends_leaves_nothing_running(tmp_path):
    """One that heeds its interrupt, and a child of it that does not."""
    at, lock = campaign.Campaign(tmp_path, dry=True), tmp_path / "lock"
    code = f"""
import fcntl, signal, subprocess, time
lock = open({str(lock)!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()])
signal.signal(signal.SIGINT, signal.default_int_handler)
time.sleep(60)
"""
    assert at.run(sys.executable, "-c", code, limit=5)["timed_out"]
    deadline = time.monotonic() + 30
    while held(lock) and time.monotonic() < deadline:  # a killed process takes a moment to end
        time.sleep(0.05)
    assert not held(lock)


def test_pytest_is_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_not(): pass\n"
    )
    at = campaign.Campaign(tmp_path, dry=True)
    facts = at.pytest(tmp_path / "test_some.py", "-p", "no:benchmark", "-o", "addopts=")
    assert (facts["passed"], facts["skipped"], facts["rc"]) == (1, 1, 1)
    assert [why.startswith("assert 1 == 2") for why in facts["failed"].values()] == [True]
    assert len(facts["slowest"]) == 3 and "tail" not in facts
    nothing = at.pytest(tmp_path / "test_gone.py", "-o", "addopts=")
    assert nothing["rc"] and nothing["passed"] == 0 and "test_gone.py" in nothing["tail"]


def test_a_benchmark_is_written_before_the_next(tmp_path):
    """What is killed, as what waits for a GPU is, has the rows of all that ended before."""
    (tmp_path / "bench_some.py").write_text("""
import os, signal

def bench_first(compare):
    compare("op", "small", "tdkern", lambda: lambda: None, moved=8)

def bench_second(compare):
    os.kill(os.getpid(), signal.SIGKILL)
""")
    env = {
        **os.environ,
        "TDKERN_BENCH_RESULTS": str(tmp_path / "results"),
        "OMP_NUM_THREADS": "1",
        "TDKERN_BENCH_TINY": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench'}",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "pythonpath=",  # tests has a conftest too
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        f"--rootdir={ROOT}",
        "-c",
        ROOT / "pyproject.toml",
        tmp_path / "bench_some.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "bench", env=env)
    assert done.returncode == -9, done.stdout + done.stderr
    (file,) = (tmp_path / "results").iterdir()
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["op"], row["competitor"], row["times_ours"]) == ("op", "tdkern", 1)


# ---- figures ------------------------------------------------------------------------------------


def row(competitor, median, **more):
    return {
        "op": "loss path",
        "size": "512x3x32x32",
        "competitor": competitor,
        "threads": 1,
        "median_us": median,
        "times_ours": median / 10,
    } | more


def case(loss, ms, **more):
    return {"op": "step", "loss": loss, **comparison.DEFAULTS, "ms": ms} | more


PATH_ROWS = [
    row("tdkern", 10, graph_us=5, launches=5, syncs=0),
    row("published-style eager", 310),
    row("torch.compile", 30, graph_us=9),
]


def test_figures_of_benchmarks():
    figure = {
        key[2]: comparison.measured(PATH_ROWS, *key)
        for key in comparison.AIMS
        if key[0] == "loss path"
    }
    assert figure == {
        "launches": 5,
        "host waits": 0,
        "published-style eager": 31,
        "torch.compile": 3,
        "published-style eager, ours in a graph": 62,
        "torch.compile, both in graphs": 1.8,
    }
    large = {
        "op": "td_loss",
        "size": "1e+08",
        "competitor": "tdkern",
        "elements": 10**8,
        "extra_bytes": 5 * 10**8,
        "share_of_copy": 0.93,
    }
    measured = comparison.measured
    assert measured([large], "td_loss", "1e+08", "share of a copy") == 0.93
    assert measured([large], "td_loss", "1e+08", "extra memory in dF") == 1.25
    for figure in ("share of a copy", "extra memory in dF", "launches", "host waits", "other"):
        assert measured([], "td_loss", "1e+08", figure) is None
    assert measured(PATH_ROWS[1:], "loss path", "512x3x32x32", "torch.compile") is None


def test_figures_of_steps():
    rows = [
        case("EDM", 100),
        case("TD+EDM", 150),
        case("EDM", 50, mode="graph"),
        case("TD+EDM", 70, mode="graph"),
        case("TD+EDM", 999, batch=64),
        case("TD+EDM", 300, style="published"),
        case("CT", 10),
        {"op": "sampler", "mode": "eager", "ms": 9},
        {"op": "sampler", "mode": "graph", "ms": 4},
    ]
    ratio = comparison.step_ratio
    assert ratio(rows, "TD+EDM / EDM") == 1.5
    assert ratio(rows, "TD+EDM / EDM, both in graphs") == 1.4
    assert ratio(rows, "published / ours, TD+EDM, bf16") == 2
    assert ratio(rows, "TD+CT / CT") is None and ratio([], "TD+CT / CT") is None
    rows.append(case("EDM", 200))  # measured again
    assert ratio(rows, "TD+EDM / EDM") == 0.75
    failed = case("EDM", None) | {"failure": "OutOfMemoryError"}
    del failed["ms"]
    assert ratio([failed, case("TD+EDM", 150)], "TD+EDM / EDM") is None
    assert comparison.sampler_ratio(rows) == 2.25
    assert comparison.sampler_ratio(rows[:-2]) is None
    assert comparison.sampler_ratio([{"op": "sampler", "mode": "eager", "failure": "no"}]) is None


def test_figures_of_the_driver():
    rows = [
        case("EDM", 100),
        {"op": "driver", "mode": "eager", "ms": 9, "host_waits": 0, "same_bits": True},
        {"op": "driver", "mode": "graph", "ms": 6, "host_waits": 2, "same_bits": False},
    ]
    found = comparison.driver_figures(rows)
    assert list(found.values()) == [0, 2, 1.5, True, False]
    failed = {"op": "driver", "mode": "graph", "failure": "no"}
    assert list(comparison.driver_figures([*rows[:2], failed]).values()) == [
        0,
        None,
        None,
        True,
        None,
    ]
    assert set(comparison.driver_figures([]).values()) == {None}
    run = {"stages": {"step": {"rows": rows}}}
    texts = {line[2]: line[3:] for line in comparison.lines(run) if line[0] == "driver"}
    assert texts == {
        "host waits": ["0", "0", "0"],
        "host waits, in a graph": ["0", "0", "2 (missed)"],
        "eager / graph": ["", "", "1.50×"],
        "same bits twice": ["1", "1", "1"],
        "same bits in a graph": ["1", "1", "0 (missed)"],
    }


def test_comparison(tmp_path):
    """Of a run whose stages failed, what they have is used, and what they have not is empty."""
    stages = {
        "bench": {"ok": False, "failure": "it broke", "rows": PATH_ROWS},
        "step": {"ok": True, "rows": [case("EDM", 100), case("TD+EDM", 120)]},
        "compile": {"ok": False, "failure": "KeyError: 'gone'"},
    }
    file = tmp_path / "gpu.json"
    run = {"dry": False, "device": "GPU", "torch": "2", "commit": "abc", "stages": stages}
    file.write_text(json.dumps(run))
    text = comparison.markdown(file)
    for line in (
        "GPU, torch 2, commit abc:",
        "| `loss path` | 512x3x32x32 | launches | 4 | 4 | 5 (missed) |",
        "| host waits | 0 | 0 | 0 |",
        "| published-style eager |  | 30.0× | 31.0× |",
        "| torch.compile, both in graphs | 2.2× | 2.0× | 1.8× (missed) |",
        "| step | 256x3x32x32 | TD+EDM / EDM | 1.33× | 1.25× | 1.20× |",
        "| step | 256x3x32x32 | TD+CT / CT | 1.00× |  |  |",
    ):
        assert line in text
    short = comparison.measured_alone(file)
    assert short.splitlines()[:2] == [
        "GPU, torch 2, commit abc;",
        "from `bench/results/gpu.json`, where each row says its commit:",
    ]
    # what was not measured and has an aim is said, what has none is left out
    assert [line for line in short.splitlines()[5:] if "not measured" not in line] == [
        "| `loss path` | 512x3x32x32 | launches | 4 | 5 (missed) |",
        "| `loss path` | 512x3x32x32 | host waits | 0 | 0 |",
        "| `loss path` | 512x3x32x32 | torch.compile, both in graphs | 2.0× | 1.8× (missed) |",
        "| `loss path` | 512x3x32x32 | published-style eager | 30.0× | 31.0× |",
        "| `loss path` | 512x3x32x32 | torch.compile | 2.0× | 3.0× |",
        "| `loss path` | 512x3x32x32 | published-style eager, ours in a graph | 30.0× | 62.0× |",
        "| step | 256x3x32x32 | TD+EDM / EDM | 1.25× | 1.20× |",
    ]
    for line in (
        "| `adam_ema_` | 1e+08 | share of a copy | 90% | not measured |",
        "| step | 256x3x32x32 | published / ours, TD+EDM, tf32 | 1.30× | not measured |",
        "| sampler | 64x3x32x32 | eager / one graph | 2.0× | not measured |",
        "| tests | cuda and triton | of every op | all pass | not measured |",
        "| sanitizers | small | clean over every op | all | not measured |",
    ):
        assert line in short.splitlines()
    assert "TD+CT / CT" not in short
    assert comparison.markdown(None).startswith("Not measured yet:")
    assert comparison.markdown(tmp_path / "not there").startswith("Not measured yet:")


def test_proofs():
    """What failed or did not end is no clean run."""
    ops = {"rc": 0, "passed": 3000, "failed": {}, "timed_out": False, "skipped": 0}
    checks = {name: {"rc": 0, "done": True} for name in ("memcheck cuda", "racecheck triton")}
    stages = {"tests": {"ops": ops, "large": ops}, "sanitize": {"checks": checks}}
    texts = lambda: [line[-1] for line in comparison.proofs(stages)]
    assert texts() == ["3,000 passed, 0 failed"] * 2 + ["2 of 2"]
    stages["tests"]["large"] = ops | {
        "rc": -2,
        "timed_out": True,
        "failed": {"a": ""},
        "skipped": 2,
    }
    checks["racecheck triton"] = {"rc": 0, "done": False}
    missed = "3,000 passed, 1 failed, 2 skipped, out of time (missed)"
    assert texts() == ["3,000 passed, 0 failed", missed, "1 of 2 (missed)"]


def test_headlines_are_six_of_the_figures():
    """Of the README; what is measured and what is predicted are of the same figures."""
    headlines, every = comparison.headlines(H100), comparison.measured_alone(H100)
    assert len(headlines.splitlines()) == 5 + 6
    assert set(headlines.splitlines()) <= set(every.splitlines())
    predicted = [line.rpartition(" | ")[0] for line in comparison.markdown(None).splitlines()[2:]]
    notes = comparison.markdown(H100)
    assert len(predicted) > 25 and all(line in notes for line in predicted)
    assert notes.startswith("NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, commit ")


def test_tables(tmp_path):
    rows = [
        row("tdkern", 10, extra_bytes=1234, share_of_copy=0.5),
        row("other", 25),
        row("other", 30, threads=2),
        row("tdkern", 9, threads=2),
    ]
    growth = [
        {
            "op": "td_loss",
            "size": "",
            "competitor": "tdkern",
            "threads": 1,
            "elements": 10**k,
            "median_us": us,
            "share_of_copy": 0.9,
        }
        for k, us in ((7, 2e4), (8, 2.2e5))
    ]
    facts = {"device": "CPU", "date": "2026-11-25T", "versions": {"torch": "2"}}
    (tmp_path / "cpu.json").write_text(json.dumps(facts | {"rows": rows + growth}))
    text = table.of_benchmarks(tmp_path / "cpu.json")
    assert (
        "| `loss path` | 512x3x32x32 | tdkern | 10 µs | 1.00× | 50% | 9 µs | 0.90× |  | 1,234 B |"
    ) in text
    assert "| `td_loss` | 1 | 2.00, 90% | 2.20, 90% | +10% |" in text
    gpu = table.competitors([row("tdkern", 10, launches=4, syncs=0, graph_us=5.25)])
    assert "| tdkern | 10 µs | 1.00× |  | 5.2 µs | 4 | 0 |  |" in gpu


# ---- measuring ----------------------------------------------------------------------------------


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
        get_device_properties=lambda: types.SimpleNamespace(L2_cache_size=1000),
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 164,
        Event=Event,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=contextlib.nullcontext,
        CUDAGraph=Graph,
        graph=contextlib.nullcontext,
        set_sync_debug_mode=lambda mode: None,
    )
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
    assert row["median_us"] == pytest.approx(1000, rel=0.01) and row["rounds"] >= 3
    assert row["graph_us"] == pytest.approx(1000 / 3, rel=0.01)
    alone = measure.on_cuda(make, moved=1500, seconds=0.01, rotate=False)
    assert alone["sets"] == 1 and "graph_us" not in alone


def test_launches_are_counted(monkeypatch):
    """Kineto's events of the GPU alone: kernels, and beside them copies; no ranges, no calls."""

    def event(name, device="CUDA", annotation=False):
        kind = getattr(torch.autograd.DeviceType, device)
        return types.SimpleNamespace(
            name=lambda: name, device_type=lambda: kind, is_user_annotation=lambda: annotation
        )

    events = [
        event("void forward_kernel<float>(...)"),
        event("aten::copy_", "CPU"),
        event("Memcpy DtoD (Device -> Device)"),
        event("coef_kernel"),
        event("Memset (Device)"),
        event("ProfilerStep#1", annotation=True),
        event("cudaLaunchKernel", "CPU"),
        event("void at::native::vectorized_elementwise_kernel<4>()"),
    ]
    asked, calls = [], []

    @contextlib.contextmanager
    def profile(activities):
        asked.extend(activities)
        results = types.SimpleNamespace(events=lambda: events)
        yield types.SimpleNamespace(profiler=types.SimpleNamespace(kineto_results=results))

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    counts = measure.launches(lambda: calls.append("step"))
    assert counts == {"launches": 3, "copies": 2}
    assert asked == [torch.profiler.ProfilerActivity.CUDA]
    assert calls == ["synchronize", "step", "synchronize"]  # nothing before, and all of the step


def test_host_waits_are_counted(monkeypatch):
    modes = []

    def step():
        for text in ("called a synchronizing CUDA operation", "something else"):
            warnings.warn(text, stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # as often as it waits

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert measure.syncs(step) == 2 and modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        measure.syncs(lambda: 1 / 0)
    assert modes == ["warn", "default"] * 2


def test_peak_extra():
    """What a step holds at once beside what was there, and not what it releases of that or all that
    it allocates."""
    there, size = torch.zeros(1000), 4000

    def step():
        for _ in range(5):
            del_me = there + 1
        return del_me * 2

    assert 2 * size <= measure.peak_extra(step, "cpu") <= 3 * size
    assert measure.peak_extra(lambda: None, "cpu") == 0
