"""The picture that a run draws beside every snapshot."""

import io
import math

from .sums import middles


def draw_curves(levels: list[list[float]], ticks: list[dict]) -> bytes:
    """A PNG file: loss and TD term by noise level, and the norm of the gradient over training.

    Args:
        levels: of the last tick, `Sums.levels`.
        ticks: what the lines of stats.jsonl say.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    by_level, by_kimg = figure.subplots(1, 2)
    for i, name in ((1, "loss"), (2, "TD term")):
        means = [row[i] / row[0] if row[0] else math.nan for row in levels]
        by_level.plot(middles(), means, ".-", label=name)
    by_level.set(title="of the last tick, weighted", xlabel="noise level", xscale="log")
    by_level.legend(frameon=False)
    norms = [tick.get("grad_norm") for tick in ticks]
    known = [norm if type(norm) in (int, float) else math.nan for norm in norms]
    by_kimg.plot([tick["kimg"] for tick in ticks], known, ".-")
    by_kimg.set(title="norm of the gradient", xlabel="kimg")
    for axis in (by_level, by_kimg):
        axis.grid(alpha=0.25, linewidth=0.6)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
