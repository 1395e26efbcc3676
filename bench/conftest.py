"""Benchmarks: every competitor of an op in one run, medians; results as JSON beside the table that
is printed.

    make bench                          all; writes bench/results/<device>.json and prints the table
    pytest bench/bench_td_loss.py -k 1-thread

On the CPU everything is measured twice: in one thread, and in as many as torch takes by default. On
a GPU, if there is one, measure.py says how. A benchmark calls `compare(op, size, competitor, make,
moved=bytes)`: make() makes inputs and returns the step on them. `moved` counts by hand, in a
comment where it is given, the bytes that the operation cannot avoid moving: GB/s is of these, and
"copy" is a competitor that copies as many, "negation in place" one that reads half as many and
writes them back. Where ratios of whole steps count, `in_turn(op, size, {competitor: make})`
measures all of them in every round. TDKERN_BENCH_RESULTS names another folder for the results.
"""

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import pytest
import torch
from measure import DEVICE, TINY, copy_of, instructions, negation_of, on_cuda, peak_extra
from table import of_benchmarks, ratio

import tdkern

UNKEPT = tempfile.TemporaryDirectory()
OWN = UNKEPT.name if TINY else Path(__file__).parent / "results"  # small sizes are no results
RESULTS = Path(os.environ.get("TDKERN_BENCH_RESULTS", OWN))
THREADS = sorted({1, torch.get_num_threads()}) if DEVICE == "cpu" else [torch.get_num_threads()]
ROWS = []


def pytest_configure(config):
    config.option.benchmark_disable_gc = True
    # Once so much was freed, glibc keeps smaller blocks instead of returning their pages: the state
    # of any process that has run for a while, which otherwise comes in the middle of somebody's
    # rounds.
    torch.ones(31 * 2**18)


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda":  # the driver's steps last: they take longest, and no aim asks for them
        items.sort(key=lambda item: item.name.startswith("bench_driver_step"))
        return
    # first, since the others leave holes in the heap that outputs of 40 MB fit into, which then are
    # not fresh pages, and those of 400 MB do not
    items.sort(key=lambda item: item.path.stem != "bench_growth")


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        return next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.processor(),
        )


def results_file() -> Path:
    plain = re.sub(r"\((r|tm)\)|processor", "", device_name().lower())
    return RESULTS / f"{'-'.join(plain.split())}.json"


@pytest.fixture(params=THREADS, ids=lambda count: f"{count}-thread")
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture
def compare(request, threads):
    def run(
        op: str,
        size: str,
        competitor: str,
        make,
        *,
        moved: int | None,
        seconds: float = 1.0,
        rotate: bool = True,
        **facts: int,
    ):
        """Times make()'s step: the median of 10 to 500 rounds, as many as fit in `seconds`.

        rotate: whether a GPU may have several sets of inputs, and a graph of them. facts: of the
            row, for its table: "elements" of the op's arguments, "batch" and "batch_gpu" of a step.
        """
        tidy()
        row = row_of(request, op, size, competitor, threads) | {"moved": moved} | facts
        seconds = 0.01 if TINY else seconds
        floor = {"copy": copy_of, "negation in place": negation_of}.get(competitor)
        make = (lambda: floor(moved)) if floor else make
        if DEVICE == "cuda":
            row |= on_cuda(make, moved or 1, seconds / 4, rotate)
        else:
            row |= on_cpu(request.getfixturevalue("benchmark"), make(), seconds)
        ROWS.append(row | {"commit": commit()})
        write_results()  # now: a benchmark that hangs must not cost those before it

    return run


def row_of(request, op: str, size: str, competitor: str, threads: int) -> dict:
    return {
        "group": Path(request.node.fspath).stem,
        "op": op,
        "size": size,
        "competitor": competitor,
        "threads": threads,
    }


def tidy() -> None:
    """Leave memory to a benchmark as if it were the first."""
    # optimizers are reference cycles: those of the benchmarks before would fill memory
    gc.collect()
    if DEVICE == "cpu":
        # what they left free would make glibc return pages, and take them anew, in every round
        # of this one
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


@pytest.fixture
def in_turn(request, threads):
    def run(op: str, size: str, makes: dict, *, seconds: float = 60.0):
        """Times the steps of {competitor: make} in rounds, each of which runs all of them, so that
        what else the machine does falls on all alike: 10 to 100 rounds, as many as fit in
        `seconds`. Their times are kept by round, as a ratio is the median over rounds. On a GPU
        they are measured one by one.
        """
        tidy()
        rows = [
            row_of(request, op, size, competitor, threads) | {"moved": None} for competitor in makes
        ]
        if DEVICE == "cuda":
            for row, make in zip(rows, makes.values(), strict=True):
                row |= on_cuda(make, 1, seconds / 4 / len(makes), rotate=False)
        else:
            for row, found in zip(rows, rounds_of(list(makes.values()), seconds), strict=True):
                row |= found
        ROWS.extend(row | {"commit": commit()} for row in rows)
        write_results()

    return run


def rounds_of(makes: list, seconds: float) -> list[dict]:
    """What was measured of each step, on the CPU."""
    steps = [make() for make in makes]
    for step in steps:  # compiles, and makes optimizers' states
        step(), step()
    start = time.perf_counter()
    for step in steps:
        step()
    once = time.perf_counter() - start
    rounds = 1 if TINY else int(min(100, max(10, seconds / once)))
    times = [[] for _ in steps]
    for number in range(rounds):
        first = number % len(steps)
        for i in [*range(first, len(steps)), *range(first)]:
            torch.manual_seed(number)  # of as many samples with a TD term for all
            start = time.perf_counter()
            steps[i]()
            times[i].append(round(1e6 * (time.perf_counter() - start)))
    return [
        {
            "median_us": statistics.median(own),
            "min_us": min(own),
            "rounds": rounds,
            "times_us": own,
            "extra_bytes": peak_extra(step, "cpu"),
        }
        for own, step in zip(times, steps, strict=True)
    ]


def on_cpu(benchmark, step, seconds: float) -> dict:
    step()
    start = time.perf_counter()
    step()
    once = max(time.perf_counter() - start, 1e-6)
    rounds = int(min(500, max(1 if TINY else 10, seconds / once)))
    benchmark.pedantic(
        step, rounds=rounds, warmup_rounds=max(1 if TINY else 3, rounds // 10), iterations=1
    )
    stats = benchmark.stats.stats
    return {
        "median_us": stats.median * 1e6,
        "min_us": stats.min * 1e6,
        "rounds": stats.rounds,
        "extra_bytes": peak_extra(step, "cpu"),
    }


def with_ratios(rows: list[dict]) -> list[dict]:
    """The rows with GB/s, and beside tdkern's and the copy's of the same op, size and threads."""
    found = {
        (row["group"], row["op"], row["size"], row["threads"], row["competitor"]): row
        for row in rows
    }
    for *key, _ in found:
        ours, copy = found.get((*key, "tdkern")), found.get((*key, "copy"))
        for row in (row for (*other, _), row in found.items() if other == key):
            row["times_ours"] = ratio(row, ours) if ours else None
            row["gb_per_s"] = row["moved"] / row["median_us"] / 1e3 if row["moved"] else None
            row["share_of_copy"] = copy["median_us"] / row["median_us"] if copy else None
    return list(found.values())


@cache
def commit() -> str:
    if os.environ.get("TDKERN_COMMIT"):  # of a copy that came without its .git
        return os.environ["TDKERN_COMMIT"]
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
        return done.stdout.strip()
    except OSError:  # no git here
        return ""


def write_results() -> None:
    path = results_file()
    # replaced whole: its rows belong to one run
    ran = {(row["group"], row["op"], row["threads"]) for row in ROWS}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in kept if (row["group"], row["op"], row["threads"]) not in ran]
    facts = tdkern.info()
    result = {
        "device": device_name(),
        "instructions": instructions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: facts[name] for name in ("tdkern", "torch", "triton", "python")},
        "build": facts["build"],
        "rows": with_ratios(kept + ROWS),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.write_line("\n" + of_benchmarks(results_file()))
