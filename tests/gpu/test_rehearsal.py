"""The campaign of a GPU machine (bench/gpu) rehearsed without one, through its script: every stage
on the C++ backend, what its files import, and that the rest reports when something fails.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from helpers.imports import SITE, check_imports

sys.path += [str(ROOT / "bench"), str(ROOT / "bench/gpu")]

import campaign
import comparison
import steps

BUILT = (ROOT / "tdkern/lib/libtdkern_cpu.so").exists()
pytestmark = [
    pytest.mark.skipif(not BUILT, reason="the C++ backend was not built"),
    pytest.mark.xdist_group("rehearsal"),
]
STAGES = [stage for stage in campaign.STAGES if stage not in ("build", "confirm")]  # minutes each


def rehearse(folder: Path, *arguments, python=sys.executable, **env: str):
    """(exit code, the stages' results, what was printed) of a dry run into folder/out.

    On PATH are what the script itself needs and nothing else: no git, no sanitizer, no compiler.
    """
    tools = folder / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    command = [ROOT / "bench/gpu/campaign.sh", "--dry", folder / "out", *arguments]
    env = {
        **os.environ,
        "PYTHON": str(python),
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": str(tools),
        "PYTHONPATH": str(SITE),
        **env,
    }
    env.pop("TDKERN_COMMIT", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert (folder / "out/campaign.json").exists(), done.stdout + done.stderr
    run = json.loads((folder / "out/campaign.json").read_text())
    return done.returncode, run, done.stdout + done.stderr


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Every stage but the builds, under the hook that refuses what a GPU machine lacks."""
    folder = tmp_path_factory.mktemp("dry")
    rc, run, text = rehearse(
        folder, "--seconds", "1500", "--again", *STAGES, TDKERN_IMPORTS=str(folder / "imports")
    )
    assert rc == 0, text + (folder / "out/log.txt").read_text()
    return folder, run, text


def test_dry_run(dry):
    folder, run, text = dry
    assert run["dry"] and run["torch"] == torch.__version__ and run["commit"] is None
    assert list(run["stages"]) == STAGES and all(stage["ok"] for stage in run["stages"].values())
    assert {line.split()[0] for line in text.splitlines() if "  (" in line} == set(STAGES)
    assert {path.name for path in (folder / "out").iterdir()} == {
        "campaign.json",
        "comparison.md",
        "log.txt",
    }


def test_dry_run_proves(dry):
    stages = dry[1]["stages"]
    assert stages["smoke"]["cpp"]["rc"] == 0
    assert stages["tests"]["large"]["passed"] == 8 and not stages["tests"]["large"]["failed"]
    assert stages["sanitize"]["checks"]["none cpp"]["done"]
    log = (dry[0] / "out/log.txt").read_text()
    assert log.count("every op ran") == 3  # smoke, sanitize, profile


def test_dry_run_benchmarks(dry):
    rows = dry[1]["stages"]["bench"]["rows"]
    assert {(row["op"], row["competitor"]) for row in rows} == {
        ("td_loss", "tdkern"),
        ("td_loss", "copy as an autograd node"),
        ("td_loss", "copy"),
        ("loss path", "tdkern"),
    }
    assert all(row["median_us"] > 0 and row["extra_bytes"] >= 0 for row in rows)
    assert all(row["threads"] == 1 for row in rows)
    growth = {row["elements"] for row in rows if row["group"] == "bench_growth"}
    assert growth == {1000, 10000}


def test_dry_run_steps(dry):
    """A row for each case in its order, with what describes the case beside what was measured."""
    stages = dry[1]["stages"]
    assert len(stages["warm"]["took_s"]) == len(stages["compile"]["rows"]) == 2
    for part in ("step", "compile"):
        rows, cases = stages[part]["rows"], steps.cases(part)
        assert len(rows) == len(cases)
        for row, case in zip(rows, cases, strict=True):
            assert row["op"] == steps.OPS[type(case)]
            assert all(row[name] == value for name, value in vars(case).items())
            assert row["ms"] > 0 and row["rounds"] == 1 and row["took_s"] >= 0
    text = (dry[0] / "out/comparison.md").read_text()
    assert text.startswith(f"no GPU, torch {torch.__version__}, commit None, a dry run:")
    same = [row["same_bits"] for row in stages["step"]["rows"] if row["op"] == "driver"]
    assert same == [True, True]  # two runs without a graph, which a CPU has not
    lines = [line for line in text.splitlines() if line.startswith(("| step ", "| sampler "))]
    assert len(lines) == len(comparison.STEPS) + 1
    assert all(line.split(" | ")[-1].rstrip(" |") for line in lines)  # each was measured


# ---- what the stages' files import --------------------------------------------------------------


def test_a_stage_imports_only_what_a_gpu_machine_has(dry, tmp_path):
    """The stages and, as far as collecting them goes, the op tests that run on a GPU alone."""
    log = dry[0] / "imports"
    env = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}", "TDKERN_IMPORTS": str(log)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        *campaign.OP_TESTS,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    needed = (
        "bench/conftest.py",
        "bench/measure.py",
        "bench/bench_growth.py",
        "bench/gpu/campaign.py",
        "bench/gpu/steps.py",
        "bench/gpu/profile_ops.py",
        "bench/gpu/selection.py",
        "bench/gpu/test_large.py",
        "tests/conftest.py",
        "tdkern/networks/unet.py",
        *campaign.OP_TESTS,
    )
    check_imports(log, needed)


@pytest.mark.parametrize(
    "code",
    [
        "import click",
        "from click import echo",
        "import distutils.core",
        "import diffusers",
        "import importlib; importlib.import_module('click')",
        "import pytest; pytest.importorskip('click')",
        "import importlib.util as util; util.find_spec('click')",
    ],
)
def test_the_hook_refuses(tmp_path, code):
    """Or the test above could not fail. A script is named as a stage's command names it."""
    (tmp_path / "tests/site").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    shutil.copy(SITE / "sitecustomize.py", tmp_path / "tests/site")
    (tmp_path / "bench/script.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": "tests/site", "TDKERN_IMPORTS": str(tmp_path / "imports")}
    script = str(tmp_path / "bench/script.py")
    for command, name in ((["-c", code], "<string>"), (["bench/script.py"], script)):
        (tmp_path / "imports").write_text("")
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=env, cwd=tmp_path
        )
        assert done.returncode
        refused = json.loads((tmp_path / "imports").read_text().splitlines()[0])
        assert refused["to"] == name and refused["refused"] in code


# ---- failures -----------------------------------------------------------------------------------


def environment_without(package: str, folder: Path) -> Path:
    """The interpreter of an environment that has this one's packages but one."""
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    target = folder / "lib" / version / "site-packages"
    for item in Path(torch.__file__).parents[1].iterdir():
        if item.name.partition("-")[0] not in (package, f"_{package}_pytestplugin.py"):
            (target / item.name).symlink_to(item)
    return folder / "bin/python"


def test_a_missing_package(tmp_path):
    """The build names it; what does without it runs and reports, what does not says why."""
    python = environment_without("hypothesis", tmp_path / "venv")
    rc, run, text = rehearse(tmp_path, "--again", "build", "smoke", "profile", python=python)
    build, smoke, profile = run["stages"].values()
    assert rc == 1 and not build["ok"] and smoke["ok"] and profile["ok"]
    assert build["failure"].startswith("python3 lacks hypothesis: carry their wheels and name")
    assert "build     FAILED: python3 lacks hypothesis" in text


def test_no_torch(tmp_path):
    python = environment_without("torch", tmp_path / "venv")
    rc, run, _ = rehearse(tmp_path, "--again", "build", "smoke", "bench", python=python)
    assert rc == 1 and run["torch"] == "does not import: No module named 'torch'"
    build, smoke, bench = run["stages"].values()
    assert build["failure"].startswith("python3 lacks torch: ")
    assert smoke["failure"] == "an op fails on cpp"
    assert "No module named 'torch'" in smoke["cpp"]["tail"]
    assert bench["failure"] == "benchmarks failed" and "'torch'" in bench["tail"]


def test_a_kernel_that_fails_to_launch(tmp_path):
    rc, run, text = rehearse(
        tmp_path,
        "--again",
        "smoke",
        "sanitize",
        "profile",
        TDKERN_INJECT="launch:bench/gpu/selection.py",
    )
    smoke, sanitize, profile = run["stages"].values()
    assert rc == 1 and profile["ok"]
    assert smoke["failure"] == "an op fails on cpp" and smoke["cpp"]["rc"] == 1
    check = sanitize["checks"]["none cpp"]
    assert sanitize["failure"] == "not clean: none cpp" and not check["done"]
    for part in (smoke["cpp"], check):
        assert "RuntimeError: CUDA error: invalid configuration argument" in part["tail"]
    assert "smoke     FAILED: an op fails on cpp" in text


def test_a_hang(tmp_path):
    """A command deaf to its interrupt is killed with what it started, and the next stage runs."""
    lock = tmp_path / "lock"
    rc, run, text = rehearse(
        tmp_path,
        "--seconds",
        "30",
        "--again",
        "smoke",
        "profile",
        TDKERN_INJECT="hang:bench/gpu/selection.py",
        TDKERN_LOCK=str(lock),
    )
    smoke, profile = run["stages"].values()
    assert rc == 1 and profile["ok"]
    assert smoke["failure"] == "an op fails on cpp (out of time)"
    assert "waiting" in smoke["cpp"]["tail"] and 30 <= smoke["cpp"]["seconds"] < 90
    assert "smoke     FAILED: an op fails on cpp (out of time)" in text
    with open(lock) as file:  # nobody holds it any more
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_memory_for_a_step(tmp_path):
    """The row of the case has its failure, and the next case runs."""
    rc, run, text = rehearse(
        tmp_path, "--seconds", "40", "--again", "step", TDKERN_INJECT="memory:bench/gpu/steps.py"
    )
    step = run["stages"]["step"]
    first, second = step["rows"][:2]
    assert rc == 1 and (first["loss"], second["loss"]) == ("EDM", "TD+EDM")
    assert first["failure"] == ("OutOfMemoryError: CUDA out of memory. Tried to allocate 80.00 GiB")
    assert "ms" not in first and second["ms"] > 0 and "failure" not in second
    failures = sum("failure" in row for row in step["rows"])
    assert step["failure"].startswith(f"{failures} of {len(step['rows'])} cases failed")
    assert f"step      FAILED: {step['failure']}" in text


def test_no_memory_for_a_benchmark(tmp_path):
    """It is named among the failed, and the others have their rows."""
    rc, run, _ = rehearse(
        tmp_path, "--again", "bench", TDKERN_INJECT="memory:bench/bench_td_loss.py"
    )
    bench = run["stages"]["bench"]
    assert rc == 1 and bench["failure"] == "benchmarks failed"
    assert any(name.startswith("bench.bench_td_loss::bench_td_loss[") for name in bench["failed"])
    assert all("OutOfMemoryError: CUDA out of memory." in why for why in bench["failed"].values())
    found = {(row["op"], row["competitor"]) for row in bench["rows"]}
    assert ("td_loss", "copy") in found and ("td_loss", "tdkern") not in found
