"""Builds tdkern on a CUDA machine, proves it there and measures it.

    bench/gpu/campaign.sh [--dry] [--seconds S] OUT [--again STAGE ...]

    build      for the GPU at hand, in place; at once where a library that was carried here works
    smoke      a call of every op, cuda's and triton's, against the reference
    tests      the op tests on cuda and triton in every dtype; then every op on 2^31 elements
    sanitize   memcheck, racecheck, initcheck and synccheck over a call of every op
    warm       compiles what `compile` times, beside the tests
    bench      pytest bench/ in CUDA events and graph replays, launches, host waits, peak memory
    step       whole training steps, published style against ours, and the sampler (steps.py)
    compile    the same training steps under torch.compile
    profile    ncu over the kernels: bandwidth, occupancy, registers, stalls
    confirm    this machine's own build, where `build` took a carried library

Without --again all of them, in this order, tests, sanitize and warm side by side, inside nine
minutes; none takes the time that those after it need. OUT/campaign.json is written anew after each
stage, with the failure of one that failed, and the next still runs. OUT/log.txt has what the
commands printed, OUT/comparison.md the figures beside the predictions (comparison.py; NOTES.md
argues them), OUT/<device>.json what bench/results keeps. --dry needs no GPU: it builds for sm_90
into build/dry and runs the other stages on the C++ backend at tiny sizes.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import comparison

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "torch",
    "numpy",
    "setuptools",
    "cmake",
    "ninja",
    "pybind11",
    "pytest",
    "pytest_benchmark",
    "hypothesis",
    "scipy",
)
# By their files, since tdkern may not be built yet; tests/house/test_registry.py says that they are
# the ops of tdkern.ops.OPS.
STEMS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
OP_TESTS = [f"tests/ops/test_{name}.py" for name in (*STEMS, "unet", "surface")]
CUDA = Path("/usr/local/cuda/bin")
GRACE = 10  # seconds from an interrupt to the kill
START = 25  # seconds that a process of steps.py takes until its first case is measured
TOTAL = 530  # seconds, of which these are the shares; what a stage leaves over is the next ones'
SHARES = {
    "build": 70,
    "smoke": 40,
    "tests": 150,
    "sanitize": 150,
    "warm": 150,
    "bench": 95,
    "step": 125,
    "compile": 10,
    "profile": 30,
    "confirm": 10,
}
WHAT = ("op", "size", "competitor", "threads", "loss", "style", "precision", "mode", "batch")
SIDE_BY_SIDE = ("tests", "sanitize", "warm")
KERNELS = "regex:({})".format(
    "|".join(
        sorted(
            name
            for path in (ROOT / "csrc/cuda").glob("*.cu")
            for name in re.findall(r"\b(\w+_kernel)\(", path.read_text())
        )
    )
)
METRICS = {  # ncu's name: ours
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "memory_stalls",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
}


class Failed(Exception):
    """A stage that did not do what it is there for; `facts` go into its JSON."""

    def __init__(self, message: str, **facts):
        super().__init__(message)
        self.facts = facts


def with_time(text: str, done: dict) -> str:
    """What is said of a command that failed, and whether it was out of time."""
    return f"{text} (out of time)" if done["timed_out"] else text


@dataclass
class Campaign:
    out: Path
    dry: bool
    ends: float = field(default_factory=lambda: time.monotonic() + TOTAL)  # of the running stage

    @property
    def left(self) -> float:
        return max(0.1, self.ends - time.monotonic())

    def run(self, *command, limit: float = math.inf, **env: str) -> dict:
        """Runs a command in the repository's root until the limit or the stage's end, and then
        stops it. Never raises for what the command does."""
        limit, start = min(limit, self.left), time.monotonic()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **env}
        if not shutil.which("nvcc") and (CUDA / "nvcc").exists():
            env["PATH"] += f":{CUDA}"
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            timed_out = False
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                timed_out = True
                stop(process)
            log.seek(0)
            text = log.read()
        result = {
            "command": " ".join(map(str, command)),
            # None of one that even a kill does not end, as what waits in the GPU's driver
            "rc": -signal.SIGKILL if process.returncode is None else process.returncode,
            "seconds": round(time.monotonic() - start, 1),
            "timed_out": timed_out,
        }
        with suppress(OSError), open(self.out / "log.txt", "a") as every:  # a full disk
            every.write(f"==== {result}\n{text[-1_000_000:]}\n")
        return {**result, "text": text}

    def pytest(self, *arguments, limit: float = math.inf, **env: str) -> dict:
        """Runs pytest; returns counts, failures and what took longest."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            done = self.run(
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
                *arguments,
                limit=limit,
                **env,
            )
            cases = []
            with suppress(OSError, ElementTree.ParseError):  # none, or one cut off
                cases = list(ElementTree.parse(report).iter("testcase"))
        bad = {
            f"{case.get('classname')}::{case.get('name')}": part.get("message", "")[:500]
            for case in cases
            for part in case
            if part.tag in ("failure", "error")
        }
        skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
        times = sorted(
            ((float(case.get("time")), str(case.get("name"))) for case in cases), reverse=True
        )
        facts = {key: done[key] for key in ("rc", "seconds", "timed_out")}
        facts |= {
            "passed": len(cases) - len(bad) - skipped,
            "skipped": skipped,
            "failed": bad,
            "slowest": times[:5],
        }
        return facts if cases else {**facts, "tail": done["text"][-2000:]}


def stop(process: subprocess.Popen) -> None:
    """An interrupt, so that it writes what it has; later a kill of what is left of its group."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


# ---- the stages -------------------------------------------------------------------------------


def build(at: Campaign) -> dict:
    """In place. A library that was carried here and loads spares the wait; `confirm` builds."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Failed(
            f"python3 lacks {', '.join(missing)}: carry their wheels and name the folder "
            "in TDKERN_WHEELS"
        )
    if not at.dry:
        capability()
        facts = library_facts(at)
        if works(facts):
            return {"carried": True, **facts}
    return {"carried": False, **build_into(at, "build/dry" if at.dry else None)}


def confirm(at: Campaign) -> dict:
    """The build of this machine, into a folder of its own."""
    return build_into(at, "build/confirm")


def build_into(at: Campaign, folder: str | None) -> dict:
    """Builds into the folder, or in place without one."""
    where = ["--inplace"]
    if folder:
        where = ["--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/temp"]
    arch = "9.0" if at.dry else capability()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = at.run(
        sys.executable,
        "setup.py",
        "build_ext",
        *where,
        TDKERN_CUDA="1",
        TORCH_CUDA_ARCH_LIST=arch,
        PATH=path,
    )
    facts = {"seconds": done["seconds"], "architecture": arch}
    if done["rc"]:
        raise Failed(with_time("the build failed", done), **facts, tail=done["text"][-3000:])
    reports = ROOT / (f"{folder}/lib/tdkern" if folder else "tdkern") / "lib/ptxas"
    used = {
        path.stem: re.findall(r"Used (\d+) registers", path.read_text())
        for path in sorted(reports.glob("*.txt"))
    }
    facts |= {"registers": {stem: max(map(int, counts)) for stem, counts in used.items()}}
    facts |= library_facts(at)
    if not folder and not works(facts):
        raise Failed("built, but a backend is missing", **facts)
    return facts


def library_facts(at: Campaign) -> dict:
    done = at.run(sys.executable, "-c", "import json, tdkern; print(json.dumps(tdkern.info()))")
    for line in reversed(done["text"].splitlines()):  # what a library says at its end is behind it
        with suppress(ValueError):
            info = json.loads(line)
            if isinstance(info, dict):
                return {"info": info}
    return {"info": None, "tail": done["text"][-2000:]}


def works(facts: dict) -> bool:
    backends = (facts["info"] or {}).get("backends")
    return bool(backends) and not backends["cuda"] and not backends["triton"]


def smoke(at: Campaign) -> dict:
    """Every op once, each backend in a process of its own."""

    def call(backend: str) -> dict:
        done = at.run(sys.executable, "bench/gpu/selection.py", backend, OMP_NUM_THREADS="1")
        facts = {key: done[key] for key in ("rc", "seconds", "timed_out")}
        return facts if not done["rc"] else {**facts, "tail": done["text"][-3000:]}

    backends = ["cpp"] if at.dry else ["cuda", "triton"]
    with ThreadPoolExecutor() as pool:
        facts = dict(zip(backends, pool.map(call, backends), strict=True))
    bad = [with_time(backend, facts[backend]) for backend in backends if facts[backend]["rc"]]
    if bad:
        raise Failed(f"an op fails on {', '.join(bad)}", **facts)
    return facts


def tests(at: Campaign) -> dict:
    """Triton compiles hundreds of specialisations: with pytest-xdist in parallel."""
    if at.dry:
        large = at.pytest("bench/gpu/test_large.py", OMP_NUM_THREADS="1", TDKERN_LARGE="10007")
        facts = {"large": large}
    else:
        spread = ["-n", "12"] if importlib.util.find_spec("xdist") else []
        chosen = "(cuda or triton or unet) and not ahead_of_time and not host"
        facts = {
            "ops": at.pytest(*spread, *OP_TESTS, "-k", chosen, limit=at.left - 35),
            "large": at.pytest("bench/gpu/test_large.py"),
        }
    bad = [
        with_time(name, part)
        for name, part in facts.items()
        if part["failed"] or part["rc"] or not part["passed"]
    ]
    if bad:
        raise Failed(f"tests failed: {', '.join(bad)}", **facts)
    return facts


def sanitize(at: Campaign) -> dict:
    """All tools at once, each a process of its own. In the dry run the calls alone, without one."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(CUDA))
    if not at.dry and not tool:
        raise Failed("compute-sanitizer is not here")
    backends, tools = ["cuda", "triton"], ["memcheck", "racecheck", "initcheck", "synccheck"]
    if at.dry:
        backends, tools = ["cpp"], ["none"]

    def check(name: str, backend: str) -> dict:
        under = [tool, "--tool", name, "--error-exitcode", "86", "--print-limit", "10"]
        if name == "memcheck":
            # An error that CUDA returns is raised where it matters; torch and Triton also call
            # to see whether something works.
            under += ["--report-api-errors", "no"]
        command = [sys.executable, "bench/gpu/selection.py", backend]
        # An allocation of its own for every tensor, so that one read past its end is found.
        done = at.run(
            *([] if at.dry else under),
            *command,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            OMP_NUM_THREADS="1",
        )
        errors = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", done["text"])
        facts = {
            "rc": done["rc"],
            "seconds": done["seconds"],
            "timed_out": done["timed_out"],
            "errors": int(errors[-1]) if errors else None,
            "done": "every op ran" in done["text"],
        }
        clean = facts["done"] and not done["rc"]
        return facts if clean else {**facts, "tail": done["text"][-3000:]}

    with ThreadPoolExecutor() as pool:
        running = {
            f"{name} {backend}": pool.submit(check, name, backend)
            for backend in backends
            for name in tools
        }
        facts = {name: each.result() for name, each in running.items()}
    bad = [with_time(name, each) for name, each in facts.items() if each["rc"] or not each["done"]]
    if bad:
        raise Failed("not clean: " + ", ".join(bad), checks=facts)
    return {"checks": facts}


def bench(at: Campaign) -> dict:
    names = ["loss_path", "growth", "adam_ema", "td_loss", "ema_update", "heun_step", "noise_pair"]
    with tempfile.TemporaryDirectory() as folder:
        env, arguments = {"TDKERN_BENCH_RESULTS": folder}, []
        if at.dry:
            env |= {"TDKERN_BENCH_TINY": "1", "OMP_NUM_THREADS": "1"}
            arguments = ["-k", "(td_loss or loss_path) and (tdkern or copy)"]
        facts = at.pytest(*(f"bench/bench_{name}.py" for name in names), *arguments, **env)
        results = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    facts["rows"] = results[0]["rows"] if results else []
    if facts["rc"] or not results:
        raise Failed(with_time("benchmarks failed", facts), **facts)
    return facts


def steps(at: Campaign, part: str) -> dict:
    """steps.py writes a line a case, so that a limit costs the last case alone; where a case has
    ended its process, another goes on behind it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        extra, env = (["--tiny"], {"OMP_NUM_THREADS": "1"}) if at.dry else ([], {})
        while True:
            done = at.run(
                sys.executable,
                "bench/gpu/steps.py",
                lines,
                "--part",
                part,
                "--seconds",
                str(round(at.left - 12)),
                "--skip",
                str(len(rows)),
                *extra,
                **env,
            )
            before, text = len(rows), lines.read_text() if lines.exists() else ""
            rows = [json.loads(line) for line in text.splitlines()]
            again = done["rc"] and not done["timed_out"] and len(rows) > before
            if not again or at.left < START:
                break
    measured = commit()
    facts = {"rc": done["rc"], "rows": [row | {"commit": measured} for row in rows]}
    bad = sum("failure" in row for row in rows)
    if bad or done["rc"] or not rows:
        reason = with_time(f"{bad} of {len(rows)} cases failed", done)
        raise Failed(reason, **facts, tail=done["text"][-3000:])
    return facts


def step(at: Campaign) -> dict:
    return steps(at, "step")


def warm(at: Campaign) -> dict:
    return {"took_s": [row["took_s"] for row in steps(at, "compile")["rows"]]}


def compile(at: Campaign) -> dict:
    return steps(at, "compile")


def profile(at: Campaign) -> dict:
    """ncu's figures of each kernel at 10^8 elements; in the dry run the calls alone."""
    command = [sys.executable, "bench/gpu/profile_ops.py"]
    if at.dry:
        done = at.run(*command, "cpp", "10007", OMP_NUM_THREADS="1")
        return finished(done, {"seconds": done["seconds"]})
    tool = shutil.which("ncu") or shutil.which("ncu", path=str(CUDA))
    if not tool:
        raise Failed("ncu is not here")
    ncu = [
        tool,
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--kernel-name",
        KERNELS,
        "--metrics",
        ",".join(METRICS),
    ]
    done = at.run(*ncu, *command, "cuda", str(10**8))
    facts = {"seconds": done["seconds"], "kernels": profiled(done["text"])}
    if not done["rc"] and not facts["kernels"]:  # it may run a program and be allowed no counters
        raise Failed("ncu profiled no kernel", **facts, tail=done["text"][-3000:])
    return finished(done, facts)


def profiled(text: str) -> list[dict]:
    """The rows of ncu's CSV, which begins behind whatever the program printed."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(line for line in lines[start:] if line.startswith('"')))
    # the first names the units
    return [
        {"kernel": row["Kernel Name"][:120]}
        | {ours: row.get(name) for name, ours in METRICS.items()}
        for row in rows[1:]
    ]


def finished(done: dict, facts: dict) -> dict:
    if done["rc"]:
        raise Failed(with_time("the profile failed", done), **facts, tail=done["text"][-3000:])
    return facts


STAGES = {
    stage.__name__: stage
    for stage in (build, smoke, tests, sanitize, warm, bench, step, compile, profile, confirm)
}


# ---- around them ------------------------------------------------------------------------------


def capability() -> str:
    import torch

    if not torch.cuda.is_available():
        raise Failed("torch sees no GPU here; --dry needs none")
    return "{}.{}".format(*torch.cuda.get_device_capability())


def said(*command: str) -> str | None:
    """What a command prints; None where it is not here or says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def commit() -> str | None:
    return os.environ.get("TDKERN_COMMIT") or said("git", "describe", "--always", "--dirty")


def machine() -> dict:
    """What the figures belong to."""
    facts = {
        "commit": commit(),
        "python": sys.version.split()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        import torch
    except ImportError as error:  # `build` says what is missing, and every stage how it failed
        return facts | {"torch": f"does not import: {error}"}
    facts["torch"] = torch.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": driver,
        }
    return facts


def run_stage(name: str, at: Campaign) -> dict:
    """A stage's results, whatever becomes of it."""
    start, result = time.monotonic(), {"ok": True, "commit": commit()}
    try:
        result |= STAGES[name](at)
    except Failed as failure:
        result |= {"ok": False, "failure": str(failure), **failure.facts}
    except Exception as error:  # a stage's own fault must not cost the others their turn
        result |= {"ok": False, "failure": f"{type(error).__name__}: {error}"}
    result["stage_seconds"] = round(time.monotonic() - start, 1)
    said = "ok" if result["ok"] else "FAILED: " + result["failure"]
    print(f"{name:<9} {said}  ({result['stage_seconds']} s)", flush=True)
    return result


def write(path: Path, facts: dict) -> None:
    """The file anew; where the disk is full its text is printed, and the stages go on."""
    new, text = path.with_name(path.name + ".new"), json.dumps(facts, indent=1) + "\n"
    try:
        new.write_text(text)
        os.replace(new, path)
    except OSError as error:
        print(f"{path}: {error}\n{json.dumps(facts)}", flush=True)


def groups_of(stages: list[str]) -> list[list[str]]:
    """The stages in their order; those that may share the machine run together."""
    groups = []
    for name in stages:
        if groups and name in SIDE_BY_SIDE and groups[-1][-1] in SIDE_BY_SIDE:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def with_earlier(result: dict, earlier: dict) -> dict:
    """A stage's results with those rows of its run before that it did not come to again."""
    if "rows" not in earlier:
        return result
    found = {what_of(row) for row in result.get("rows", []) if "failure" not in row}
    old = [row for row in earlier["rows"] if what_of(row) not in found]
    return result | {"rows": old + result.get("rows", [])}


def what_of(row: dict) -> tuple:
    """What was measured, of a row of bench or of steps.py."""
    return tuple(row.get(key) for key in WHAT)


def kept(result: dict) -> dict:
    """What bench/results keeps of a campaign: all but what it printed."""
    return {key: value for key, value in result.items() if key != "tail"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="without a GPU: the plumbing, on the C++ backend at tiny sizes",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=TOTAL,
        help="for all stages together, in a dry run for each",
    )
    parser.add_argument("out", type=Path, help="a folder for the results")
    parser.add_argument(
        "--again",
        nargs="+",
        metavar="STAGE",
        choices=list(STAGES),
        help=f"these alone, of {', '.join(STAGES)}",
    )
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    at = Campaign(args.out.resolve(), args.dry)
    stages = [name for name in STAGES if name in (args.again or STAGES)]
    groups = groups_of(stages)
    shares = [max(SHARES[name] for name in group) for group in groups]
    ends = time.monotonic() + args.seconds
    file = at.out / "campaign.json"
    results = json.loads(file.read_text())["stages"] if file.exists() else {}
    facts = machine() | {"dry": args.dry}
    for i, group in enumerate(groups):
        later = sum(shares[i + 1 :]) * args.seconds / sum(shares)
        end = time.monotonic() + args.seconds if args.dry else ends - later
        limits = dict.fromkeys(group, end)
        if not args.dry and len(group) > 1 and "warm" in group:
            # no aim asks for what it makes: it does not take what others left over
            share = SHARES["warm"] * args.seconds / sum(shares)
            limits["warm"] = min(end, time.monotonic() + share)
        with ThreadPoolExecutor() as pool:
            running = {
                name: pool.submit(run_stage, name, replace(at, ends=limits[name])) for name in group
            }
        for name, each in running.items():
            results[name] = with_earlier(each.result(), results.get(name, {}))
        write(file, facts | {"stages": results})
    if "device" in facts:
        name = re.sub(r"\W+", "-", facts["device"].lower())
        stages_kept = {stage: kept(result) for stage, result in results.items()}
        write(at.out / f"{name}.json", facts | {"stages": stages_kept})
    table = comparison.markdown(file)
    with suppress(OSError):
        (at.out / "comparison.md").write_text(table + "\n")
    print(table)
    return 0 if all(results[name]["ok"] for name in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
