"""What a campaign measured beside what NOTES.md predicts: python bench/gpu/comparison.py OUT puts the table into the notes.

Predictions are shares of the copy's bandwidth that the same run measured, ratios to competitors of the same run, and counts.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
LARGE = "1e+08"
# (op, size, figure): figure is a share of the copy's GB/s, counts, or how many times slower a competitor is, in the stream or in graphs.
PREDICTIONS = {
    ("td_loss", LARGE, "share of a copy"): 0.95,
    ("noise_pair", LARGE, "share of a copy"): 0.85,
    ("ema_update_", LARGE, "share of a copy"): 0.95,
    ("heun_step", LARGE, "share of a copy"): 0.95,
    ("adam_ema_", "54 M parameters, K=2", "share of a copy"): 0.85,
    ("td_loss", "1024x3x32x32", "launches"): 2,
    ("noise_pair", "512x3x32x32", "launches"): 1,
    ("ema_update_", "54 M parameters, K=2", "launches"): 1,
    ("adam_ema_", "54 M parameters, K=2", "launches"): 4,
    ("heun_step", "correction 512x3x32x32", "launches"): 1,
    ("loss path", "512x3x32x32", "launches"): 4,
    ("loss path", "512x3x32x32", "host waits"): 0,
    ("td_loss", LARGE, "extra memory in dF"): 1.0,
}
AIMS = {  # issue 3's: at least, or at most for the counts
    ("td_loss", LARGE, "share of a copy"): 0.9,
    ("noise_pair", LARGE, "share of a copy"): 0.9,
    ("ema_update_", LARGE, "share of a copy"): 0.9,
    ("heun_step", LARGE, "share of a copy"): 0.9,
    ("loss path", "512x3x32x32", "launches"): 4,
    ("loss path", "512x3x32x32", "host waits"): 0,
    ("loss path", "512x3x32x32", "published-style eager"): 30,
    ("loss path", "512x3x32x32", "torch.compile"): 2,
    ("loss path", "512x3x32x32", "published-style eager, ours in a graph"): 30,
    ("loss path", "512x3x32x32", "torch.compile, both in graphs"): 2,
}
AT_MOST = ("launches", "host waits", "extra memory in dF")


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
    ours, other = ours.get("graph_us" if graphs else "median_us"), found.get(other, {}).get("graph_us" if graphs == "both in graphs" else "median_us")
    return other / ours if ours and other else None


def markdown(out: Path | None = None) -> str:
    """The table; without results, or where a stage failed, with empty cells."""
    stages = {name: json.loads((out / f"{name}.json").read_text()) for name in ("bench", "step") if out and (out / f"{name}.json").exists()}
    rows = [row for stage in stages.values() for row in (stage.get("results") or {}).get("rows", [])]
    whose = next((f"{stage.get('device', 'no GPU')}, torch {stage['torch']}, commit {stage['commit']}" for stage in stages.values() if "torch" in stage), None)
    lines = [f"{whose}{', a dry run' if any(stage['dry'] for stage in stages.values()) else ''}:" if whose else "Not measured yet:", "",
             "| op | size | figure | predicted | aim | measured |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for key in dict.fromkeys([*PREDICTIONS, *AIMS]):
        form = "{:.0%}" if "share" in key[2] else "{:g}" if key[2] in AT_MOST[:2] else "{:.2f}" if key[2] in AT_MOST else "{:.1f}×"
        value, aim = measured(rows, *key), AIMS.get(key)
        cells = ["" if number is None else form.format(number) for number in (PREDICTIONS.get(key), aim, value)]
        if value is not None and aim is not None:
            cells[2] += "" if (value <= aim if key[2] in AT_MOST else value >= aim) else " (missed)"
        lines.append("| " + " | ".join([f"`{key[0]}`", *key[1:], *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    from table import fill

    fill(HERE / "NOTES.md", "comparison", markdown(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
