"""Builds tdkern on a CUDA machine, proves it there and measures it.

    bench/gpu/campaign.sh [--dry] OUT [stage ...]

    build      for the GPU at hand, in place
    tests      the op tests on cuda and triton in every dtype; then every op on more than 2^31 elements
    sanitize   memcheck, racecheck, initcheck and synccheck over a call of every op, cuda's and triton's kernels apart
    bench      pytest bench/ in CUDA events and graph replays, with launches, host waits and peak memory
    step       the whole loss path and a training step against the published style and torch.compile

Without a stage all of them, in this order and inside nine minutes; none takes the time that those after it need. Each writes
OUT/<stage>.json, with its failure if it fails, and the next still runs. OUT/log.txt has what the commands printed, OUT/comparison.md the
figures beside the predictions (comparison.py; NOTES.md argues them). --dry needs no GPU: it builds for sm_90 into build/dry and runs the
other stages on the C++ backend at tiny sizes.
"""
import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import comparison

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "numpy", "setuptools", "cmake", "ninja", "pybind11", "pytest", "pytest_benchmark", "hypothesis", "scipy")
OPS = ("td_loss", "td_coef", "noise_pair", "heun_step", "ema_update", "adam_ema")
TOTAL = 530  # seconds
SHARES = {"build": 110, "tests": 150, "sanitize": 80, "bench": 120, "step": 70}  # of TOTAL; what a stage leaves over is the next ones'


class Failed(Exception):
    """A stage that did not do what it is there for; `facts` go into its JSON."""

    def __init__(self, message: str, **facts):
        super().__init__(message)
        self.facts = facts


@dataclass
class Campaign:
    out: Path
    dry: bool
    ends: float = field(default_factory=lambda: time.monotonic() + TOTAL)  # of the campaign, then of the stage that runs

    def run(self, *command, limit: float = TOTAL, **env: str) -> dict:
        """Runs a command in the repository's root until the limit or the stage's end: then an interrupt, so that it writes what it has; ten seconds
        later a kill of its whole group. Never raises for what the command does."""
        limit, start = max(0.1, min(limit, self.ends - time.monotonic())), time.monotonic()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "PYTHONUNBUFFERED": "1", **env}
        if not shutil.which("nvcc") and Path("/usr/local/cuda/bin/nvcc").exists():
            env["PATH"] += ":/usr/local/cuda/bin"
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            timed_out = False
            for number, wait in ((signal.SIGINT, limit), (signal.SIGKILL, 10), (signal.SIGKILL, None)):
                try:
                    process.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    timed_out = True
                    os.killpg(process.pid, number)
            log.seek(0)
            text = log.read()
        result = {"command": " ".join(map(str, command)), "rc": process.returncode, "seconds": round(time.monotonic() - start, 1), "timed_out": timed_out}
        with open(self.out / "log.txt", "a") as every:
            every.write(f"==== {result}\n{text[-1_000_000:]}\n")
        return {**result, "text": text}

    def pytest(self, *arguments, limit: float = TOTAL, **env: str) -> dict:
        """Runs pytest; returns counts, failures and what took longest."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            done = self.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments, limit=limit, **env)
            cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
        bad = {f"{case.get('classname')}::{case.get('name')}": part.get("message", "")[:500]
               for case in cases for part in case if part.tag in ("failure", "error")}
        skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
        slowest = sorted(((float(case.get("time")), case.get("name")) for case in cases), reverse=True)[:5]
        facts = {key: done[key] for key in ("command", "rc", "seconds", "timed_out")}
        facts |= {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": bad, "slowest": slowest}
        return facts if cases else {**facts, "tail": done["text"][-2000:]}


# ---- the stages -----------------------------------------------------------------------------------------------------


def build(at: Campaign) -> dict:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Failed(f"python3 lacks {', '.join(missing)}: carry their wheels and name the folder in TDKERN_WHEELS")
    where = ["--build-lib", "build/dry/lib", "--build-temp", "build/dry/temp"] if at.dry else ["--inplace"]
    arch = "9.0" if at.dry else capability()
    done = at.run(sys.executable, "setup.py", "build_ext", *where, TDKERN_CUDA="1", TORCH_CUDA_ARCH_LIST=arch,
                  PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    facts = {"seconds": done["seconds"], "architecture": arch}
    if done["rc"]:
        raise Failed("the build failed" + " by its time limit" * done["timed_out"], **facts, tail=done["text"][-3000:])
    reports = (ROOT / ("build/dry/lib/tdkern" if at.dry else "tdkern") / "lib/ptxas").glob("*.txt")
    registers = {path.stem: max(map(int, re.findall(r"Used (\d+) registers", path.read_text()))) for path in sorted(reports)}
    info = json.loads(at.run(sys.executable, "-c", "import json, tdkern; print(json.dumps(tdkern.info()))")["text"].splitlines()[-1])
    if not at.dry and (info["backends"]["cuda"] or info["backends"]["triton"]):
        raise Failed("built, but a backend is missing", **facts, info=info)
    return {**facts, "registers": registers, "info": info}


def tests(at: Campaign) -> dict:
    """Triton compiles hundreds of specialisations: with pytest-xdist in parallel."""
    if at.dry:
        facts = {"large": at.pytest("bench/gpu/test_large.py", OMP_NUM_THREADS="1", TDKERN_LARGE="10007")}
    else:
        spread = ["-n", "12"] if importlib.util.find_spec("xdist") else []
        files = [*(f"tests/test_{op}.py" for op in OPS), "tests/test_surface.py"]
        facts = {"ops": at.pytest(*spread, *files, "-k", "(cuda or triton) and not ahead_of_time", limit=at.ends - time.monotonic() - 45),
                 "large": at.pytest("bench/gpu/test_large.py")}
    if any(part["failed"] or part["rc"] or not part["passed"] for part in facts.values()):
        raise Failed("tests failed", **facts)
    return facts


def sanitize(at: Campaign) -> dict:
    """All tools at once, each a process of its own. In the dry run the calls alone, without a tool."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not at.dry and not tool:
        raise Failed("compute-sanitizer is not here")
    backends, tools = (["cpp"], ["none"]) if at.dry else (["cuda", "triton"], ["memcheck", "racecheck", "initcheck", "synccheck"])

    def check(name: str, backend: str) -> dict:
        under = [] if at.dry else [tool, "--tool", name, "--error-exitcode", "86", "--print-limit", "10"]
        if name == "memcheck":  # an error that CUDA returns is raised where it matters; torch and Triton also call to see whether something works
            under += ["--report-api-errors", "no"]
        # an allocation of its own for every tensor, so that one read past its end is found
        done = at.run(*under, sys.executable, "bench/gpu/selection.py", backend, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
        errors = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", done["text"])
        facts = {"rc": done["rc"], "seconds": done["seconds"], "timed_out": done["timed_out"], "errors": int(errors[-1]) if errors else None,
                 "done": "every op ran" in done["text"]}
        return facts if facts["done"] and not done["rc"] else {**facts, "tail": done["text"][-3000:]}

    with ThreadPoolExecutor() as pool:
        running = {f"{name} {backend}": pool.submit(check, name, backend) for name in tools for backend in backends}
        facts = {name: each.result() for name, each in running.items()}
    if any(each["rc"] or not each["done"] for each in facts.values()):
        raise Failed("not clean: " + ", ".join(name + " (out of time)" * each["timed_out"] for name, each in facts.items() if each["rc"] or not each["done"]),
                     checks=facts)
    return {"checks": facts}


def measured(at: Campaign, files: list[str], dry_arguments: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        env = {"TDKERN_BENCH_RESULTS": folder, **({"TDKERN_BENCH_TINY": "1", "OMP_NUM_THREADS": "1"} if at.dry else {})}
        facts = at.pytest(*(f"bench/bench_{name}.py" for name in files), *(dry_arguments if at.dry else []), **env)
        facts["results"] = next((json.loads(path.read_text()) for path in Path(folder).glob("*.json")), None)
    if facts["rc"] or not facts["results"]:
        raise Failed("benchmarks failed" + " by their time limit" * facts["timed_out"], **facts)
    return facts


def bench(at: Campaign) -> dict:
    return measured(at, ["growth", "td_loss", "noise_pair", "ema_update", "adam_ema", "heun_step"], ["-k", "td_loss and (tdkern or copy)"])


def step(at: Campaign) -> dict:
    return measured(at, ["loss_path", "step"], ["-k", "not compile"])


STAGES = {stage.__name__: stage for stage in (build, tests, sanitize, bench, step)}


# ---- around them ----------------------------------------------------------------------------------------------------


def capability() -> str:
    import torch

    if not torch.cuda.is_available():
        raise Failed("torch sees no GPU here; --dry needs none")
    return "{}.{}".format(*torch.cuda.get_device_capability())


def machine() -> dict:
    """What the figures belong to."""
    import torch

    def said(*command) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip() or None
        except (OSError, subprocess.TimeoutExpired):
            return None

    facts = {"commit": said("git", "describe", "--always", "--dirty"), "python": sys.version.split()[0], "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        facts |= {"device": properties.name, "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
                  "memory_bytes": properties.total_memory, "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
    return facts


def run_stage(name: str, stage, at: Campaign) -> bool:
    """Runs a stage and writes its JSON, whatever becomes of it."""
    start, result = time.monotonic(), {"stage": name, "ok": True, "dry": at.dry}
    try:
        result |= machine() | stage(at)
    except Failed as failure:
        result |= {"ok": False, "failure": str(failure), **failure.facts}
    except Exception as error:  # a stage's own fault must not cost the others their turn
        result |= {"ok": False, "failure": f"{type(error).__name__}: {error}"}
    result["stage_seconds"] = round(time.monotonic() - start, 1)
    (at.out / f"{name}.json.new").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(at.out / f"{name}.json.new", at.out / f"{name}.json")
    print(f"{name:<9} {'ok' if result['ok'] else 'FAILED: ' + result['failure']}  ({result['stage_seconds']} s)", flush=True)
    return result["ok"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="without a GPU: the plumbing, on the C++ backend at tiny sizes")
    parser.add_argument("out", type=Path, help="a folder for the results")
    parser.add_argument("stage", nargs="*", help=f"of {', '.join(STAGES)}; all if none is given")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.stage if name not in STAGES]
    if unknown:
        parser.error(f"stage must be one of {', '.join(STAGES)}, got {unknown[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    at = Campaign(args.out.resolve(), args.dry)
    ends, ok, stages = at.ends, True, args.stage or list(STAGES)
    for i, name in enumerate(stages):
        at.ends = time.monotonic() + TOTAL if args.dry else ends - sum(SHARES[later] for later in stages[i + 1:])
        ok = run_stage(name, STAGES[name], at) and ok
    table = comparison.markdown(at.out)
    (at.out / "comparison.md").write_text(table + "\n")
    print(table)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
