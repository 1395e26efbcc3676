"""The measured tables and pictures of the documents are what bench/results gives."""

import io
import json
import re
import shutil
import sys
from itertools import pairwise

import PIL.Image
import pytest

from helpers import ROOT
from helpers.ablation import write_results

sys.path.append(str(ROOT / "bench"))

import report

RESULTS = ROOT / "bench/results"
NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+ ?(%|×|s|ms|µs|MB|GB)?")


def test_nothing_is_outdated():
    assert sorted(path.name for path in report.outdated()) == []


def test_every_entry_is_shown_once():
    texts = [page.read_text() for page in report.pages()]
    shown = [found[2] for text in texts for found in report.MARKED.finditer(text)]
    assert sorted(shown) == sorted(report.TABLES)
    marks = sum(text.count("<!-- report:") + text.count("<!-- /report:") for text in texts)
    assert marks == 2 * len(shown)  # none is left open
    pictures = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.png")}
    assert pictures == set(report.PICTURES)
    for name in pictures:
        assert any(f"({name})" in text or f"({name.rpartition('/')[2]})" in text for text in texts)


def by_hand(text):
    """The rows of three numbers or more of tables that stand between no comments."""
    lines = report.MARKED.sub("", text).splitlines()
    for line, after in pairwise([*lines, ""]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [cell for cell in cells if NUMBER.fullmatch(cell)]
        if line.startswith("|") and len(numbers) > 2 and not after.startswith("| ---"):
            yield line


def test_no_measured_table_is_written_by_hand():
    pages = [page for page in report.pages() if page.name != "NOTES.md"]
    assert [(page.name, line) for page in pages for line in by_hand(page.read_text())] == []
    rows = "| what | 1 | 2 | 3 |\n| --- | --- | --- | --- |\n| ours | 1.5 ms | 20 % | 1,000 |\n"
    assert list(by_hand(rows)) == ["| ours | 1.5 ms | 20 % | 1,000 |"]
    assert list(by_hand(f"<!-- report: demo -->\n{rows}<!-- /report: demo -->")) == []


@pytest.fixture
def copies(tmp_path):
    """A copy of the results, for a test to change."""
    return shutil.copytree(RESULTS, tmp_path / "results")


def test_a_changed_number_is_seen(copies):
    """In the page and in the picture, however small it is there."""
    path = copies / "nvidia-h100-80gb-hbm3.json"
    run = json.loads(path.read_text())
    for row in run["stages"]["bench"]["rows"]:
        if row["op"] == "td_loss" and row["size"] == "1e+08":
            row["share_of_copy"] = 0.98
    path.write_text(json.dumps(run))
    page = (ROOT / "README.md").read_text()
    assert "| 90% | 98% |" in report.filled(page, copies) and "| 90% | 98% |" not in page
    ours = (ROOT / "docs/performance.png").read_bytes()
    assert not report.look_alike(ours, report.drawn("docs/performance.png", copies))
    assert report.look_alike(ours, report.drawn("docs/performance.png", RESULTS))


def test_what_is_not_measured_is_said(copies):
    (copies / "demo.json").unlink()
    page = report.filled((ROOT / "docs/demo.md").read_text(), copies)
    assert "<!-- report: demo -->\nNot measured yet.\n<!-- /report: demo -->" in page


def test_a_table_that_nobody_makes_is_an_error():
    with pytest.raises(KeyError, match="unknown"):
        report.filled("<!-- report: unknown -->\n<!-- /report: unknown -->\n", RESULTS)


def png(image, source="a.json 1"):
    info, file = report.PngInfo(), io.BytesIO()
    info.add_text(report.SOURCE, source)
    image.save(file, "png", pnginfo=info)
    return file.getvalue()


def test_pictures_that_look_alike():
    """Single pixels may differ; lines, what they are of and their size may not."""
    plain = PIL.Image.new("RGB", (100, 100), "white")
    dotted, lined = plain.copy(), plain.copy()
    dotted.putpixel((3, 3), (0, 0, 0))
    lined.paste((0, 0, 0), (0, 50, 100, 52))
    assert report.look_alike(png(plain), png(dotted))
    assert not report.look_alike(png(plain), png(lined))
    assert not report.look_alike(png(plain), png(plain, "a.json 2"))
    assert not report.look_alike(png(plain), png(PIL.Image.new("RGB", (100, 99), "white")))


def test_an_ablation_is_shown_as_its_report_has_it(tmp_path):
    """Its text without a title and within the columns, its picture under the name in the text."""

    def numbers(name, seed):
        return {"error/all": 1 + 0.1 * seed + 0.01 * len(name)}

    path = write_results(tmp_path / "mixture.jsonl", numbers)
    text = report.wrapped(report.table.of_ablation(path))
    assert text.startswith("## paper-weights on mixture, equal steps\n")
    assert text.count("](evidence-mixture-1.png)") == 1 and "evidence-mixture-2" not in text
    assert all(len(line) <= 100 for line in text.splitlines() if line[:1] != "|")
    picture = PIL.Image.open(io.BytesIO(report.chart.of_ablation(path)))
    assert picture.format == "PNG" and picture.width > 300


def test_prose_alone_is_wrapped():
    prose = "words " * 30
    kept = f"| {prose}|\n\n```text\n{prose}\n```\n## {prose}"
    assert report.wrapped(kept) == kept
    lines = report.wrapped(f"short\n\n{prose}").splitlines()
    assert lines[:2] == ["short", ""] and len(lines) == 4 and max(map(len, lines)) <= 100
