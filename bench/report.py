"""Rebuilds every measured table and picture of the documents from bench/results: `make report`.

A table stands in a page between two comments,

    <!-- report: NAME -->
    <!-- /report: NAME -->

and NAME is an entry of TABLES; a picture is a file, and its path an entry of PICTURES. Each is made
of one file of bench/results, by a function of that file's path. So a new table is an entry here,
and its two comments in a page. tests/house/test_make_report.py compares what is committed.

What `tdkern report` makes of a file of `tdkern ablate` is two entries:

    "evidence-NAME": Table("evidence/NAME.jsonl", table.of_ablation)
    "docs/evidence-NAME-1.png": Picture("evidence/NAME.jsonl", chart.of_ablation)
"""

import hashlib
import io
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path += [str(ROOT), str(BENCH), str(BENCH / "gpu")]

import chart  # noqa: E402
import comparison  # noqa: E402
import evidence_table  # noqa: E402
import table  # noqa: E402

from tdkern.data.files import write_atomic  # noqa: E402


class Table(NamedTuple):
    """What stands between the comments of a page."""

    source: str  # a file of bench/results
    make: Callable[[Path], str]  # Markdown of it


class Picture(NamedTuple):
    """A PNG file that a page shows."""

    source: str  # a file of bench/results
    draw: Callable[[Path], bytes]  # a PNG file of it


H100 = "nvidia-h100-80gb-hbm3.json"
TABLES = {
    "ops-cpu": Table("amd-epyc.json", table.of_benchmarks),
    "steps-cpu": Table("intel-xeon.json", table.of_benchmarks),
    "ops-gpu": Table(H100, comparison.measured_alone),
    "ops-gpu-headlines": Table(H100, comparison.headlines),
    "predictions": Table(H100, comparison.markdown),
    "compiled-step": Table("compiled_step.json", table.of_compiled_step),
    "coupling": Table("coupling.json", table.of_couplings),
    "demo": Table("demo.json", table.of_demo),
    "evidence-cpu": Table("evidence/cpu.jsonl", table.of_ablation),
    "evidence-gpu": Table("evidence/gpu.jsonl", evidence_table.markdown),
    "loader": Table("loader.json", table.of_loader),
    "overlap": Table("overlap.json.gz", table.of_overlap),
}
PICTURES = {
    "docs/demo.png": Picture("demo.json", chart.of_demo),
    **{
        f"docs/evidence-cpu-{number}.png": Picture(
            "evidence/cpu.jsonl", partial(chart.of_ablation, number=number)
        )
        for number in range(1, 8)
    },
    "docs/performance.png": Picture(H100, chart.of_ops),
}
MARKED = re.compile(r"(<!-- report: ([\w-]+) -->\n).*?(<!-- /report: \2 -->)", re.S)
NOT_YET = "Not measured yet."
WIDTH = 100
SOURCE = "bench/results"  # the text of a picture's file that tells which results it shows
VISIBLE, LARGEST_SHARE = 48, 0.01  # of 255, and of all pixels


def pages() -> list[Path]:
    """The documents that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), BENCH / "gpu/NOTES.md"]


def filled(page: str, results: Path) -> str:
    """A page's text with its tables as the results have them now.

    Raises:
        KeyError: it names a table that is not in TABLES.
    """

    def fill(found: re.Match) -> str:
        source, make = TABLES[found[2]]
        path = results / source
        text = make(path) if path.exists() else NOT_YET
        return f"{found[1]}{wrapped(text)}\n{found[3]}"

    return MARKED.sub(fill, page)


def wrapped(text: str) -> str:
    """Markdown whose prose is within the columns of a document; nothing else is broken."""
    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        is_prose = not fenced and not line.startswith(("|", "#", "!"))
        fits = len(line) <= WIDTH or not is_prose
        lines += [line] if fits else textwrap.wrap(line, WIDTH, break_on_hyphens=False)
    return "\n".join(lines)


def drawn(name: str, results: Path) -> bytes:
    """A picture of PICTURES as the results have it now; the file says which results it shows."""
    source, draw = PICTURES[name]
    digest = hashlib.sha256((results / source).read_bytes()).hexdigest()
    info, file = PngInfo(), io.BytesIO()
    info.add_text(SOURCE, f"{source} {digest}")
    image = PIL.Image.open(io.BytesIO(draw(results / source))).convert("RGB")
    few_colours = image.quantize(256, dither=PIL.Image.Dither.NONE)  # a third of the bytes
    few_colours.save(file, "png", optimize=True, pnginfo=info)
    return file.getvalue()


def look_alike(ours: bytes, theirs: bytes) -> bool:
    """Whether two pictures show the same results, and but for single pixels in the same way.

    Versions of the library that draws them differ in how they smooth letters and lines.
    """
    one, other = (PIL.Image.open(io.BytesIO(data)) for data in (ours, theirs))
    if one.info.get(SOURCE) != other.info.get(SOURCE) or one.size != other.size:
        return False
    pixels = [np.asarray(image.convert("RGB"), dtype=np.int16) for image in (one, other)]
    differs = (np.abs(pixels[0] - pixels[1]) > VISIBLE).any(2)
    return bool(differs.mean() < LARGEST_SHARE)


def outdated(results: Path = BENCH / "results") -> dict[Path, bytes]:
    """The files that are not what the results make of them, and what these make."""
    found = {}
    for page in pages():
        text = page.read_text()
        new = filled(text, results)
        if new != text:
            found[page] = new.encode()
    for name in PICTURES:
        picture = drawn(name, results)
        path = ROOT / name
        if not path.exists() or not look_alike(path.read_bytes(), picture):
            found[path] = picture
    return found


if __name__ == "__main__":
    for path, data in outdated().items():
        write_atomic(path, data)
        print(path.relative_to(ROOT))
