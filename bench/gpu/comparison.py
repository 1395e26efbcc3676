"""What a campaign measured beside what NOTES.md predicts, as tables (bench/report.py).

Predictions are shares of the copy's bandwidth that the same run measured, ratios to
competitors of the same run, and counts.
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from table import table

LARGE = "1e+08"
PARAMETERS = "54 M parameters, K=2"
# (op, size, figure): figure is a share of the copy's GB/s, counts, or how many times slower a
# competitor is, in the stream or in graphs.
PREDICTIONS = {
    ("td_loss", LARGE, "share of a copy"): 0.95,
    ("noise_pair", LARGE, "share of a copy"): 0.85,
    ("ema_update_", LARGE, "share of a copy"): 0.95,
    ("heun_step", LARGE, "share of a copy"): 0.95,
    ("adam_ema_", LARGE, "share of a copy"): 0.98,
    ("adam_ema_", PARAMETERS, "share of a copy"): 0.85,
    ("td_loss", "1024x3x32x32", "launches"): 2,
    ("noise_pair", "512x3x32x32", "launches"): 1,
    ("ema_update_", PARAMETERS, "launches"): 1,
    ("adam_ema_", PARAMETERS, "launches"): 4,
    ("heun_step", "correction 512x3x32x32", "launches"): 1,
    ("loss path", "512x3x32x32", "launches"): 4,
    ("loss path", "512x3x32x32", "host waits"): 0,
    ("td_loss", LARGE, "extra memory in dF"): 1.0,
    ("loss path", "512x3x32x32", "torch.compile, both in graphs"): 2.2,
}
AIMS = {  # of issue 15: at least, or at most for the counts
    ("td_loss", LARGE, "share of a copy"): 0.9,
    ("ema_update_", LARGE, "share of a copy"): 0.9,
    ("adam_ema_", LARGE, "share of a copy"): 0.9,
    ("heun_step", LARGE, "share of a copy"): 0.9,
    ("loss path", "512x3x32x32", "launches"): 4,
    ("loss path", "512x3x32x32", "host waits"): 0,
    ("loss path", "512x3x32x32", "published-style eager"): 30,
    ("loss path", "512x3x32x32", "torch.compile"): 2,
    ("loss path", "512x3x32x32", "published-style eager, ours in a graph"): 30,
    ("loss path", "512x3x32x32", "torch.compile, both in graphs"): 2,
}
AT_MOST = ("launches", "host waits", "extra memory in dF")
WINDOWED = "TD+EDM window"
# what: (how many times the milliseconds of this case, are those of that one, predicted, aim,
# whether the aim is a most). What of a case is not given is DEFAULTS'.
STEPS = {
    "TD+EDM / EDM": ({"loss": "EDM"}, {"loss": "TD+EDM"}, 1.33, 1.25, True),
    "windowed TD on its share / EDM": ({"loss": "EDM"}, {"loss": WINDOWED}, 1.16, 1.12, True),
    "TD+EDM / EDM, both in graphs": (
        {"loss": "EDM", "mode": "graph"},
        {"loss": "TD+EDM", "mode": "graph"},
        1.33,
        1.25,
        True,
    ),
    "windowed TD on its share / EDM, both in graphs": (
        {"loss": "EDM", "mode": "graph"},
        {"loss": WINDOWED, "mode": "graph"},
        1.16,
        1.12,
        True,
    ),
    "TD+CT / CT": ({"loss": "CT"}, {"loss": "TD+CT"}, 1.0, None, True),
    "published / ours, TD+EDM, bf16": (
        {"loss": "TD+EDM"},
        {"loss": "TD+EDM", "style": "published"},
        2.0,
        1.3,
        False,
    ),
    "published / ours, TD+EDM, tf32": (
        {"loss": "TD+EDM", "precision": "tf32"},
        {"loss": "TD+EDM", "precision": "tf32", "style": "published"},
        None,
        1.3,
        False,
    ),
    "published / ours, TD+EDM, fp32": (
        {"loss": "TD+EDM", "precision": "fp32"},
        {"loss": "TD+EDM", "precision": "fp32", "style": "published"},
        None,
        1.3,
        False,
    ),
    "torch's norms / ours, TD+EDM": (
        {"loss": "TD+EDM"},
        {"loss": "TD+EDM", "style": "torch's norms"},
        1.7,
        None,
        False,
    ),
    "published fp32 / ours bf16 in a graph, TD+EDM": (
        {"loss": "TD+EDM", "mode": "graph"},
        {"loss": "TD+EDM", "precision": "fp32", "style": "published"},
        None,
        2.5,
        False,
    ),
    "published fp32 / ours bf16 compiled, TD+EDM": (
        {"loss": "TD+EDM", "mode": "compile"},
        {"loss": "TD+EDM", "precision": "fp32", "style": "published"},
        None,
        None,
        False,
    ),
}
HEADLINES = (
    "`td_loss` 1e+08 share of a copy",
    "`ema_update_` 1e+08 share of a copy",
    "`heun_step` 1e+08 share of a copy",
    "`loss path` 512x3x32x32 published-style eager, ours in a graph",
    "`loss path` 512x3x32x32 torch.compile, both in graphs",
    "step 256x3x32x32 TD+EDM / EDM",
)
DEFAULTS = {"style": "tdkern", "precision": "bf16", "mode": "eager", "batch": 256}


def measured(rows: list[dict], op: str, size: str, figure: str) -> float | None:
    """One figure of a run's rows; None where it was not measured."""
    found = {row["competitor"]: row for row in rows if (row["op"], row["size"]) == (op, size)}
    ours = found.get("tdkern", {})
    if figure == "share of a copy":
        return ours.get("share_of_copy")
    if figure == "extra memory in dF":
        return ours["extra_bytes"] / (4 * ours["elements"]) if "elements" in ours else None
    if figure in ("launches", "host waits"):
        return ours.get("syncs" if figure == "host waits" else "launches")
    other, _, graphs = figure.partition(", ")
    ours = ours.get("graph_us" if graphs else "median_us")
    other = found.get(other, {}).get("graph_us" if graphs == "both in graphs" else "median_us")
    return other / ours if ours and other else None


def case_ms(rows: list[dict], wanted: dict) -> float | None:
    """The milliseconds of the case of steps.py that is so."""
    wanted = DEFAULTS | wanted
    fitting = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return fitting[-1].get("ms") if fitting else None


def step_ratio(rows: list[dict], what: str) -> float | None:
    under, over = (case_ms(rows, case) for case in STEPS[what][:2])
    return over / under if under and over else None


def sampler_ratio(rows: list[dict]) -> float | None:
    """How many times faster the sampler is in one CUDA graph."""
    ms = {row["mode"]: row.get("ms") for row in rows if row["op"] == "sampler"}
    return ms["eager"] / ms["graph"] if ms.get("eager") and ms.get("graph") else None


def driver_figures(rows: list[dict]) -> dict[str, float | None]:
    """Of a step of `tdkern train`: waits of the host, times faster in a graph, the same bits."""
    found = {row["mode"]: row for row in rows if row["op"] == "driver"}
    eager, graph = found.get("eager", {}), found.get("graph", {})
    both = eager.get("ms") and graph.get("ms")
    return {
        "host waits": eager.get("host_waits"),
        "host waits, in a graph": graph.get("host_waits"),
        "eager / graph": eager["ms"] / graph["ms"] if both else None,
        "same bits twice": eager.get("same_bits"),
        "same bits in a graph": graph.get("same_bits"),
    }


def cells(form: str, predicted, aim, value, at_most: bool) -> list[str]:
    texts = ["" if number is None else form.format(number) for number in (predicted, aim, value)]
    if value is not None and aim is not None and (value > aim if at_most else value < aim):
        texts[2] += " (missed)"
    return texts


def lines(run: dict) -> list[list[str]]:
    """A line for each figure: op, size, figure, predicted, aim, measured; empty where it is not."""
    rows = {name: stage.get("rows", []) for name, stage in run["stages"].items()}
    every = []
    for key in dict.fromkeys([*PREDICTIONS, *AIMS]):
        form = "{:.1f}×"
        if "share" in key[2]:
            form = "{:.0%}"
        elif key[2] in AT_MOST:
            form = "{:.2f}" if "memory" in key[2] else "{:g}"
        value = measured(rows.get("bench", []), *key)
        texts = cells(form, PREDICTIONS.get(key), AIMS.get(key), value, key[2] in AT_MOST)
        every.append([f"`{key[0]}`", *key[1:], *texts])
    steps = [*rows.get("step", []), *rows.get("compile", [])]
    for what, (*_, predicted, aim, at_most) in STEPS.items():
        texts = cells("{:.2f}×", predicted, aim, step_ratio(steps, what), at_most)
        every.append(["step", "256x3x32x32", what, *texts])
    texts = cells("{:.1f}×", None, 2, sampler_ratio(steps), False)
    every.append(["sampler", "64x3x32x32", "eager / one graph", *texts])
    for what, value in driver_figures(steps).items():
        aim = None if "/" in what else float("bits" in what)
        texts = cells("{:.2f}×" if "/" in what else "{:g}", aim, aim, value, "waits" in what)
        every.append(["driver", "256x3x32x32", what, *texts])
    return every + proofs(run["stages"])


def proofs(stages: dict) -> list[list[str]]:
    """The op tests and the sanitizers, as lines like those of the figures."""
    every = []
    for size, part in (("cuda and triton", "ops"), ("2^31 elements", "large")):
        found, text = stages.get("tests", {}).get(part), ""
        if found:
            text = f"{found['passed']:,} passed, {len(found['failed'])} failed"
            text += f", {found['skipped']} skipped" if found["skipped"] else ""
            text += ", out of time" if found["timed_out"] else ""
            text += " (missed)" if found["rc"] or found["failed"] or not found["passed"] else ""
        every.append(["tests", size, "of every op", "", "all pass", text])
    checks, text = stages.get("sanitize", {}).get("checks", {}), ""
    if checks:
        clean = sum(check["done"] and not check["rc"] for check in checks.values())
        text = f"{clean} of {len(checks)}" + ("" if clean == len(checks) else " (missed)")
    return [*every, ["sanitizers", "small", "clean over every op", "", "all", text]]


def about(run: dict) -> str:
    dry = ", a dry run" if run["dry"] else ""
    return f"{run.get('device', 'no GPU')}, torch {run['torch']}, commit {run['commit']}{dry}"


def markdown(file: Path | None = None) -> str:
    """Every figure; without results, or where a stage failed, with empty cells."""
    run = json.loads(file.read_text()) if file and file.exists() else {"stages": {}}
    head = about(run) if "torch" in run else "Not measured yet"
    columns = ["op", "size", "figure", "predicted", "aim", "measured"]
    return f"{head}:\n\n{table(columns, lines(run), left=3)}"


def measured_alone(file: Path, only: Collection[str] | None = None) -> str:
    """The figures that were measured, and those that were to be; those of `only`, by op, size and
    figure."""
    run = json.loads(file.read_text())
    body = [
        [*what, aim, value or "not measured"]
        for *what, _, aim, value in lines(run)
        if (value or aim) and (only is None or " ".join(what) in only)
    ]
    head = f"{about(run)};\nfrom `bench/results/{file.name}`, where each row says its commit:"
    return f"{head}\n\n{table(['op', 'size', 'figure', 'aim', 'measured'], body, left=3)}"


def headlines(file: Path) -> str:
    """The figures of the README."""
    return measured_alone(file, HEADLINES)
