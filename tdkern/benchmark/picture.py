"""The rows of a benchmark as a picture."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .clock import PARTS

# Okabe and Ito's colours, which stay apart for colour-blind readers
COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C")


def draw_rows(rows: list[dict], title: str) -> bytes:
    """A PNG file: a bar for each step that was measured, and in it where its time goes."""
    rows = [row for row in rows if "ms" in row]
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    left = [0.0] * len(rows)
    names = [row["name"] for row in rows]
    for part, color in zip(PARTS, COLORS, strict=True):
        widths = [row["parts"][part] for row in rows]
        axis.barh(names, widths, left=left, color=color, label=part, height=0.7)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        text = f" {row['ms']:.3g} ms, {row['of_first']:.2f}x"
        axis.text(left[place], place, text, va="center", fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22 * max(left))
    axis.set_xlabel("median time of a step, ms")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
