"""What benchmarks make of what they measured."""

import gzip
import json
import sys

import pytest

from helpers import ROOT


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])


def row(competitor, times, op="training step", **more):
    common = {"group": "bench_step", "op": op, "size": "small", "threads": 1}
    own = {"competitor": competitor, "times_us": times, "median_us": sorted(times)[1]}
    return {**common, **own, **more}


def test_ratios_are_medians_over_rounds_and_aims_stand_beside_them():
    """A slow round, which both steps were in, is one of three."""
    import table

    rows = [
        row("tdkern", [130, 1400, 125]),
        row("EDM without TD", [100, 1000, 100]),
        row("published-style eager", [140, 1400, 131]),
        row(table.TD_ALONE, [120, 1200, 120]),
        row(table.PLAIN_ALONE, [96, 960, 96]),
    ]
    assert table.ratio(rows[0], rows[1]) == 1.3
    assert table.ratio(rows[0], {"median_us": 26}) == 5
    lines = table.aims(rows).splitlines()
    assert lines[2:] == [
        "| TD+EDM / EDM | small | 1 | at most 1.30 | 1.30 | 1.25 |",
        "| published style / tdkern | small | 1 | at least 1.10 | 1.05 (missed) | 1.17 |",
    ]
    rows[0]["times_us"] = [131, 1400, 131]
    assert "| at most 1.30 | 1.31 (missed) | 1.25 |" in table.aims(rows)
    assert table.aims([each for each in rows if each["competitor"] == "tdkern"]) == ""


def test_a_steps_growth_is_a_table_by_batch():
    import table

    rows = [
        row("", [1, 1000 * batch, 9e9], batch=batch, batch_gpu=part, extra_bytes=part * 2**20)
        for batch in (4, 8)
        for part in (4, 8)
        if part <= batch
    ]
    assert table.by_batch(rows).splitlines()[2:] == [
        "| 4 | 1.00 ms | 4.0 MiB |  |",
        "| 8 | 1.00 ms | 4.0 MiB | 8.0 MiB |",
    ]


SPANS = [
    ("training step", 0, 20_000),
    ("autograd::engine::evaluate_function: A", 2_000, 5_000),
    ("gloo:all_reduce", 4_000, 8_000),
    ("gloo:all_reduce", 6_000, 9_000),  # both at once count once
    ("autograd::engine::evaluate_function: B", 5_000, 10_000),
    ("gloo:all_reduce", 9_500, 14_000),
    ("Optimizer.step#AdamEMA.step", 14_000, 19_000),
]


def test_the_overlap_of_a_trace():
    import overlap

    found = overlap.summary(SPANS)
    assert found == {
        "step_ms": 20.0,
        "backward_ms": 8.0,
        "all_reduces": 3,
        "all_reduce_ms": 9.5,
        "share_within_backward": round(5.5 / 9.5, 3),
        "waited_ms": 4.0,
    }
    events = overlap.trace_events(1, SPANS)
    rows = {event["ts"]: event["tid"] for event in events if "all_reduce" in event["name"]}
    assert rows == {4_000: 1, 6_000: 2, 9_500: 1}
    assert {event["name"] for event in events} >= {"A", "B"} and len(events) == len(SPANS)


def summary_of(kept, rank):
    """What the events of a process in a kept file give."""
    import overlap

    others = (overlap.ALL_REDUCE, overlap.STEP, overlap.OPTIMIZER)
    spans = []
    for event in kept["traceEvents"]:
        name, begin = event["name"], event["ts"]
        if event["pid"] == rank:
            name = name if name.startswith(others) else overlap.NODE + name
            spans.append((name, begin, begin + event["dur"]))
    return overlap.summary(spans)


def test_a_kept_trace_says_what_its_events_do():
    import overlap

    kept = {"traceEvents": overlap.trace_events(0, SPANS) + overlap.trace_events(1, SPANS)}
    assert summary_of(kept, 1) == overlap.summary(SPANS)


def test_the_kept_trace_overlaps():
    """All-reduces begin long before the backward ends."""
    path = ROOT / "bench/results/overlap.json.gz"
    if not path.exists():  # as the page then says (test_report.py)
        return
    kept = json.loads(gzip.decompress(path.read_bytes()))
    assert path.stat().st_size < 300_000
    for rank, told in enumerate(kept["summary"]["by process"]):
        share = summary_of(kept, rank)["share_within_backward"]
        assert share == pytest.approx(told["share_within_backward"], abs=0.01)
        assert told["all_reduces"] > 4 and share > 0.5
