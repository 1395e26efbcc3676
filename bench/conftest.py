"""Benchmarks: one thread, every competitor of an op in one run, medians; results as JSON beside the table that is printed.

    pytest bench/                 all; writes bench/results/<device>.json
    pytest bench/ -k td_loss      one op; updates its rows there

A benchmark calls `compare(op, size, competitor, fn, moved=bytes)`. `moved` counts by hand, in a comment where it is
given, the bytes that the operation cannot avoid moving: GB/s and the share of the copy's are of these.
"""
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

import tdkern

RESULTS = Path(__file__).parent / "results"


def pytest_configure(config):
    config.option.benchmark_disable_gc = True
    torch.set_num_threads(int(os.environ.get("TDKERN_BENCH_THREADS", "1")))


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


@pytest.fixture
def compare(benchmark):
    def run(op: str, size: str, competitor: str, fn, *, moved: int, seconds: float = 1.0):
        """Times fn(): warmed up, then as many rounds as fit in `seconds`, 10 to 500; the median counts."""
        fn()
        start = datetime.now()
        fn()
        once = max((datetime.now() - start).total_seconds(), 1e-6)
        rounds = int(min(500, max(10, seconds / once)))
        benchmark.extra_info.update(op=op, size=size, competitor=competitor, moved=moved)
        benchmark.group = f"{op} {size}"
        benchmark.pedantic(fn, rounds=rounds, warmup_rounds=max(3, rounds // 10), iterations=1)

    return run


def pytest_sessionfinish(session):
    benches = [b for b in session.config._benchmarksession.benchmarks if b.extra_info and not b.has_error]
    if not benches:
        return
    device = device_name()
    path = RESULTS / f"{device.lower().replace(' ', '-')}.json"
    rows = {(r["op"], r["size"], r["competitor"]): r for r in (json.loads(path.read_text())["rows"] if path.exists() else [])}
    for op in {b.extra_info["op"] for b in benches}:  # an op that was run is replaced whole: its rows belong to one run
        rows = {key: row for key, row in rows.items() if key[0] != op}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    for b in benches:
        info = dict(b.extra_info)
        rows[info["op"], info["size"], info["competitor"]] = info | {
            "median_us": b.stats.median * 1e6, "min_us": b.stats.min * 1e6, "rounds": b.stats.rounds,
            "gb_per_s": info["moved"] / b.stats.median / 1e9, "commit": commit,
        }
    for (op, size, _), row in rows.items():
        ours, copy = rows.get((op, size, "tdkern")), rows.get((op, size, "copy"))
        row["times_ours"] = row["median_us"] / ours["median_us"] if ours else None
        row["share_of_copy"] = row["gb_per_s"] / copy["gb_per_s"] if copy else None
    facts = tdkern.info()
    result = {"device": device, "threads": torch.get_num_threads(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "versions": {name: facts[name] for name in ("tdkern", "torch", "triton", "python")}, "build": facts["build"], "rows": list(rows.values())}
    RESULTS.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


def pytest_terminal_summary(terminalreporter, config):
    from table import markdown

    path = RESULTS / f"{device_name().lower().replace(' ', '-')}.json"
    if path.exists():
        terminalreporter.write_line("\n" + markdown(path))
