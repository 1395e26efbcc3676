"""Differences and their intervals as a picture."""

import io
import math

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..pages import COLORS
from .bootstrap import CONFIDENCE
from .comparison import Comparison
from .words import groups_of, place_of, title_of

CLEAR, UNCLEAR = COLORS[0], COLORS[7]


def draw_differences(comparison: Comparison) -> bytes:
    """A PNG file: a panel for each measure, in it a line for each pair of rows compared."""
    pairs = list(comparison.pairs())
    groups = groups_of(comparison.measures)
    columns = max(map(len, groups.values()))
    height = 0.9 + 0.24 * len(pairs)
    figure = Figure(figsize=(2.6 + 1.9 * columns, height * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), columns, squeeze=False, sharey=True)
    for line, (group, measures) in zip(axes, groups.items(), strict=True):
        for axis in line[len(measures) :]:
            axis.set_axis_off()
        for axis, measure in zip(line, measures, strict=False):
            _panel(comparison, pairs, measure, axis)
        line[0].set_title(f"{title_of(group)}\n{place_of(measures[0])}", fontsize=9)
    names = [_short(name, other, comparison.table.baseline) for name, other in pairs]
    for line in axes:
        line[0].set_yticks(range(len(pairs)), names, fontsize=8)
        line[0].set_ylim(len(pairs) - 0.5, -0.5)
    figure.supxlabel(f"difference in %, with {CONFIDENCE:.0%} intervals over seeds", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()


def _panel(comparison: Comparison, pairs: list[tuple[str, str]], measure: str, axis) -> None:
    axis.axvline(0, color="#000000", linewidth=0.8)
    for place, (name, other) in enumerate(pairs):
        (found,) = comparison.against(name, other, [measure])
        color = CLEAR if found.clear else UNCLEAR
        axis.plot(found.percent, place, "o", color=color, markersize=4)
        if math.isfinite(found.low):
            axis.plot([found.low, found.high], [place, place], color=color, linewidth=1.5)
    axis.set_title(place_of(measure), fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _short(name: str, other: str, baseline: str) -> str:
    """A pair's name; matplotlib takes a $ for the beginning of a formula."""
    text = name if other == baseline else f"{name} − {other}"
    return text.replace("$", "\\$")
