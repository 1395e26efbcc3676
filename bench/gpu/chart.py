"""Pictures of the documents as PNG files, each of one file of bench/results (bench/report.py)."""

import io
import json
from pathlib import Path

from comparison import LARGE, about, measured
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from table import ablation_report

OPS = ("td_loss", "ema_update_", "heun_step", "noise_pair", "adam_ema_")
COMPETITORS = {  # of the loss path, which the figure is made of
    "published style": "published-style eager",
    "published style,\nours in a graph": "published-style eager, ours in a graph",
    "torch.compile": "torch.compile",
    "torch.compile,\nboth in graphs": "torch.compile, both in graphs",
}
OURS, OTHERS, FLOOR = "#0072b2", "#999999", "#444444"


def bars(axes, names, values, form, fill, **label):
    """Horizontal bars, the first on top, each with its value."""
    places = range(len(names))
    drawn = axes.barh(places, values, color=fill, height=0.62)
    axes.bar_label(drawn, [form.format(value) for value in values], padding=4, **label)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def of_demo(file: Path) -> bytes:
    """The picture of `tdkern demo`."""
    from tdkern.demo import draw_picture, from_json

    return draw_picture(from_json(json.loads(file.read_text())))


def of_ablation(file: Path, number: int = 1) -> bytes:
    """A picture of what `tdkern report` says of a file of `tdkern ablate`, counted from 1."""
    return list(ablation_report(file).pictures.values())[number - 1]


def of_ops(file: Path) -> bytes:
    """What a campaign measured: each op against a copy, and the loss path against others."""
    run = json.loads(file.read_text())
    rows = run["stages"]["bench"]["rows"]
    shares = {op: measured(rows, op, LARGE, "share of a copy") for op in OPS}
    shares = {op: share for op, share in shares.items() if share is not None}
    ratios = {
        name: measured(rows, "loss path", "512x3x32x32", figure)
        for name, figure in COMPETITORS.items()
    }
    ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    figure = Figure(figsize=(10, 3.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{about(run)}; bench/results/{file.name}", fontsize=9)
    bars(
        left,
        list(shares),
        [100 * share for share in shares.values()],
        "{:.0f} %  ",
        OURS,
        label_type="center",
        color="white",
    )
    left.axvline(100, color=FLOOR, linestyle="--", linewidth=1)
    left.set(xlim=(0, 118), xlabel="% of a copy's bandwidth, $10^8$ float32 elements")
    left.set_title("An op against a copy", fontsize=11)
    bars(right, list(ratios), list(ratios.values()), "{:.1f}×", OTHERS)
    right.axvline(1, color=OURS, linestyle="--", linewidth=1)
    right.set(
        xscale="log", xlim=(0.9, 600), xlabel="time, in times of tdkern's; 512 images of 3x32x32"
    )
    right.set_title("The loss path: how many times slower", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
