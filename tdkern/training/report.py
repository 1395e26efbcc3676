"""Runs compared in one HTML page, which needs no other file.

Whatever a run's files and names hold is text in the page: it is escaped, and the page allows
itself nothing but the pictures in it.
"""

import html
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..data.files import read_file
from ..pages import COLORS, html_image, html_page, html_table
from . import checkpoint, statistics
from .statistics import FidCurve, number_of

MARKERS = "os^Dv*xP"  # of the numbers of sampling steps
CURVES = {"loss": "loss", "td": "TD term", "base": "base term", "images_per_s": "images a second"}
LAST = ("kimg", *CURVES, "valid", "grad_norm", "skipped", "lr", "host_gib", "gpu_gib")
DASHES = ("-", "--", ":", "-.")  # one for each time that the colours have gone round
FID = ("measured", "images", "steps", "NFE", "last", "lowest", "at kimg", "mean of the last 15 %")
LONGEST = 200  # characters of an option
MAX_PICTURE = 1 << 26  # bytes
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Run:
    """A run as its directory tells of it.

    Attributes:
        path: its directory.
        options: by name, those of the loss among them.
        ticks: what the lines of stats.jsonl say, the oldest first.
        fids: what was measured by --fid-every, by the number of sampling steps.
        pictures: the newest grid of images and the newest curves by noise level, as far as there
            are any, each (its name, a PNG file's bytes).
    """

    path: Path
    options: dict
    ticks: list[dict]
    fids: list[FidCurve]
    pictures: list[tuple[str, bytes]]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """(kimg, values) of the ticks that have a finite number of that name."""
        points = [(number_of(tick["kimg"]), number_of(tick.get(name))) for tick in self.ticks]
        points = [point for point in points if all(map(math.isfinite, point))]
        return [kimg for kimg, _ in points], [value for _, value in points]


def read_run(path: Path) -> Run:
    """A run, from its directory.

    Raises:
        CheckpointError: the directory does not hold a run, or its options cannot be read.
        OSError: another of its files cannot be read.
    """
    options = checkpoint.read_options(path / "training_options.json")
    loss = options.pop("loss", {})
    options |= loss if isinstance(loss, dict) else {"loss": loss}
    lines = statistics.read_lines(path / statistics.FILE)
    fids = statistics.curves_of(statistics.fids_of(lines))
    return Run(path, options, statistics.ticks_of(lines), fids, _newest_pictures(path))


def _newest_pictures(run_dir: Path) -> list[tuple[str, bytes]]:
    newest: dict[str, Path] = {}
    for path in run_dir.glob("*.png"):
        match = checkpoint.PICTURE.fullmatch(path.name)
        if match and _image_of(path) >= _image_of(newest.get(match[1], path)):
            newest[match[1]] = path
    return [(newest[kind].name, _read_png(newest[kind])) for kind in sorted(newest, reverse=True)]


def _image_of(path: Path) -> int:
    return checkpoint.images_of(path, checkpoint.PICTURE)


def _read_png(path: Path) -> bytes:
    data = read_file(path, MAX_PICTURE)
    if not data.startswith(PNG):
        raise checkpoint.CheckpointError(f"{path}: is no PNG file; remove it")
    return data


def page(runs: list[Run]) -> str:
    """The HTML page that compares runs."""
    names = [f"{_style(i)[2]} {run.path.name or run.path}" for i, run in enumerate(runs)]
    paths = [[name, str(run.path)] for name, run in zip(names, runs, strict=True)]
    last = [[name, *_last(run)] for name, run in zip(names, runs, strict=True)]
    parts = [html_table(["run", "directory"], paths), _curves(runs)]
    parts += ["<h2>Last figures</h2>\n", html_table(["run", *LAST], last)]
    if any(run.fids for run in runs):
        fids = [[name, *row] for name, run in zip(names, runs, strict=True) for row in _fids(run)]
        parts += ["<h2>FID</h2>\n", _fid_curves(runs), html_table(["run", *FID], fids)]
    if len(runs) > 1:
        parts += [
            "<h2>Options that differ</h2>\n",
            html_table(["option", *names], _differing(runs)),
        ]
    parts.append("<h2>Images</h2>\n")
    parts += [_images(name, run) for name, run in zip(names, runs, strict=True)]
    return html_page("Runs compared", parts)


def _style(i: int) -> tuple[str, str, str]:
    """The colour, the dashes and the short name of a run's curves."""
    return COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)], f"[{i + 1}]"


def _last(run: Run) -> list[str]:
    tick = run.ticks[-1] if run.ticks else {}
    numbers = [number_of(tick.get(name)) for name in LAST]
    return [format(number, ".5g") if math.isfinite(number) else "" for number in numbers]


def _fids(run: Run) -> list[list[str]]:
    """The rows of a run in the table of FIDs, without its name."""
    rows = []
    for curve in run.fids:
        fid, (lowest, kimg) = curve.fid, curve.best
        counts = [str(count)[:LONGEST] for count in (fid.num, fid.steps, fid.nfe)]
        numbers = [*curve.values[-1:], lowest, kimg, curve.last_mean]
        rows.append([fid.metric, *counts, *(format(number, ".5g") for number in numbers)])
    return [row for row, curve in zip(rows, run.fids, strict=True) if curve.values]


def _differing(runs: list[Run]) -> list[list[str]]:
    """The options that are not the same in all runs, each with its value in every one."""
    rows = []
    for name in sorted({name for run in runs for name in run.options}):
        values = [json.dumps(run.options[name]) if name in run.options else "" for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *(value[:LONGEST] for value in values)])
    return rows


def _images(name: str, run: Run) -> str:
    """The newest pictures of a run, under its name."""
    figures = [
        f"<figure>{html_image(data, kind='of-a-run')}"
        f"<figcaption>{html.escape(f'{name}: {file}')}</figcaption></figure>\n"
        for file, data in run.pictures
    ]
    return "".join(figures) or f"<p>{html.escape(name)}: no pictures yet</p>\n"


def _curves(runs: list[Run]) -> str:
    """The curves of all runs. A run is called by its number: matplotlib takes signs in a name for
    its own.
    """
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        lowest = math.inf
        for i, run in enumerate(runs):
            kimg, values = run.curve(name)
            color, dashes, label = _style(i)
            few = "." if len(values) < 50 else ""
            axis.plot(kimg, values, dashes, color=color, label=label, linewidth=1, marker=few)
            lowest = min([lowest, *values])
        axis.set(title=title, xlabel="kimg")
        if name != "images_per_s" and 0 < lowest < math.inf:
            axis.set_yscale("log")
        axis.grid(alpha=0.25, linewidth=0.6)
    return _drawn(figure, columns=10)


def _fid_curves(runs: list[Run]) -> str:
    """The FIDs of all runs: a run's colour, and a marker for each number of steps."""
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    numbers = sorted({curve.fid.steps for run in runs for curve in run.fids})
    for i, run in enumerate(runs):
        color, dashes, label = _style(i)
        for curve in run.fids:
            marker = MARKERS[numbers.index(curve.fid.steps) % len(MARKERS)]
            axis.plot(
                curve.kimg,
                curve.values,
                f"{dashes}{marker}",
                color=color,
                label=f"{label} {curve.fid.steps} steps",
                linewidth=1,
                markersize=4,
            )
    axis.set(title="FID, by the number of sampling steps", xlabel="kimg")
    axis.grid(alpha=0.25, linewidth=0.6)
    return _drawn(figure, columns=8)


def _drawn(figure: Figure, columns: int) -> str:
    """A figure with the legend of its first axis."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return html_image(file.getvalue(), "curves") + "\n"
