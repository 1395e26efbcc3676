"""`tdkern report`: the page that compares runs."""

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest

from helpers.tiny import TINY, options_of, pixels, png, tdkern_
from tdkern.training.formats import as_json
from tdkern.training.report import page, read_run

HOSTILE = "<script>alert(1)</script>&\"'$\\frac$"


class Tags(HTMLParser):
    """The tags of a page, and the text in its table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, sorted(name for name, _ in attrs)))
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def run_of(path, ticks=3, grid=True, **options):
    """What a run leaves, as far as a report reads it."""
    path.mkdir(parents=True)
    saved = as_json(options_of(data="images.zip", duration=1e-3, **TINY | options))
    (path / "training_options.json").write_text(json.dumps(saved))
    lines = [
        {"kimg": kimg, "loss": 1 / kimg, "td": 0.5, "base": 0.25, "images_per_s": 10.0}
        for kimg in range(1, ticks + 1)
    ]
    (path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if grid:
        names = ("fakes-000001.000.png", "fakes-000002.000.png", "curves-000002.000.png")
        for i, name in enumerate(names):
            (path / name).write_bytes(png(pixels(1, seed=i)[0]))
    return path


def pictures(text):
    return [
        base64.b64decode(data)
        for data in re.findall(r'src="data:image/png;base64,([A-Za-z0-9+/=]*)"', text)
    ]


def test_the_page_compares_runs_and_needs_no_other_file(tmp_path):
    runs = [run_of(tmp_path / "a"), run_of(tmp_path / "b", lr=0.25, td_sigma=[0.5, 2.0], ticks=5)]
    out = tmp_path / "page.html"
    assert "2 runs compared" in tdkern_("report", *runs, "--out", out)
    text = out.read_text()
    cells = Tags(text).cells
    assert str(runs[0]) in cells and str(runs[1]) in cells
    row = cells.index("lr", cells.index("option"))
    assert cells[row : row + 3] == ["lr", "0.001", "0.25"]
    row = cells.index("td_sigma")
    assert cells[row + 2] == "[0.5, 2.0]"
    assert "batch" not in cells  # the same in both
    last = [cells[i + 1] for i, cell in enumerate(cells) if cell == "[2] b"]
    assert last[:2] == [str(runs[1]), "5"]
    curves, *grids = pictures(text)
    assert curves.startswith(b"\x89PNG")
    newest = ("fakes-000002.000.png", "curves-000002.000.png")
    assert grids == [(run / name).read_bytes() for run in runs for name in newest]
    assert not re.search(r'(src|href)="(?!data:)', text) and "url(" not in text


def fid_line(kimg, value, steps=5, changes=()):
    line = {"kimg": kimg, "metric": "fid", "steps": steps, "nfe": 2 * steps - 1, "value": value}
    return json.dumps(line | {"num": 100, "against": "ab"} | dict(changes)) + "\n"


def test_fids_have_curves_and_their_best_and_last(tmp_path):
    """Those that were measured as the last one was; of a run that has none, no row."""
    measured, plain = run_of(tmp_path / "measured", grid=False), run_of(tmp_path / "plain")
    lines = [fid_line(0.1, 1.0, changes={"num": 50})]  # of fewer images
    lines += [fid_line(0.2 + i / 100, 30.0 - i) for i in range(20)]
    lines += [fid_line(0.5, 40.0), fid_line(0.5, 12.5, steps=18), fid_line(0.6, None, steps=18)]
    text = "".join(lines) + (measured / "stats.jsonl").read_text()
    (measured / "stats.jsonl").write_text(text)
    page_of_both = page([read_run(measured), read_run(plain)])
    cells = Tags(page_of_both).cells
    row = cells.index("fid")
    assert cells[row - 1] == "[1] measured"
    assert cells[row : row + 8] == ["fid", "100", "5", "9", "40", "11", "0.39", "21"]
    assert cells[row + 9 : row + 17] == ["fid", "100", "18", "35", "12.5", "12.5", "0.5", "12.5"]
    assert "[2] plain" not in cells[row : row + 17]
    assert len(pictures(page_of_both)) == len(pictures(page([read_run(plain)] * 2))) - 2 + 1
    last = [cells[i + 1] for i, cell in enumerate(cells) if cell == "[1] measured"]
    assert last[1] == "3"  # a FID is no tick


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": HOSTILE},
        {"metric": ["fid"]},
        {"steps": "5"},
        {"steps": True},
        {"num": None},
        {"value": 10**400},
        {"value": "low"},
    ],
)
def test_fids_that_are_none_are_left_out(tmp_path, changes):
    run = run_of(tmp_path / "a")
    with open(run / "stats.jsonl", "a") as file:
        file.write(fid_line(3.0, 7.5, changes=changes))
    text = page([read_run(run)])
    assert "7.5" not in Tags(text).cells and len(pictures(text)) <= 4 and HOSTILE not in text


def test_names_and_options_of_strangers_are_text(tmp_path):
    run = run_of(tmp_path / HOSTILE.replace("/", "|"))
    options = json.loads((run / "training_options.json").read_text())
    options |= {"arch": HOSTILE, HOSTILE: HOSTILE, "loss": {HOSTILE: "</td>"}}
    (run / "training_options.json").write_text(json.dumps(options))
    plain = run_of(tmp_path / "plain")
    text = page([read_run(run), read_run(plain)])
    tags = Tags(text)
    assert HOSTILE in tags.cells and json.dumps(HOSTILE) in tags.cells
    theirs = {tag for tag, _ in Tags(page([read_run(plain), read_run(plain)])).tags}
    assert {tag for tag, _ in tags.tags} == theirs and "script" not in theirs
    assert all(len(names) <= 2 for tag, names in tags.tags if tag == "img")
    assert html.escape(HOSTILE) in text


@pytest.mark.parametrize(
    "lines, last",
    [
        (b'{"kimg": 4, "loss": 0.125}\n{"kimg": 5, "lo', "4"),
        (b'\xff\xfe\0\n[1]\n{"kimg": "9"}\n{"kimg": NaN}\n{"kimg": 1e999}\n{"kimg": 2}\n', "3"),
        (b'{"kimg": 4, "loss": "x", "td": null, "base": [], "lr": 1' + b"0" * 400 + b"}\n", "4"),
        (b"[" * 100_000 + b"\n", "3"),
    ],
    ids=["torn", "not lines of ours", "not numbers", "deep"],
)
def test_lines_that_are_not_whole_are_left_out(tmp_path, lines, last):
    run = run_of(tmp_path / "a")
    with open(run / "stats.jsonl", "ab") as file:
        file.write(lines)
    cells = Tags(page([read_run(run)])).cells
    assert cells[cells.index("[1] a", cells.index("kimg")) + 1] == last


def test_a_run_that_has_no_tick_yet_is_in_the_page(tmp_path):
    run = run_of(tmp_path / "new", ticks=0, grid=False)
    (run / "stats.jsonl").unlink()
    text = page([read_run(run), read_run(run_of(tmp_path / "old"))])
    assert "[1] new: no pictures yet" in text and len(pictures(text)) == 3


def test_what_is_no_run_or_no_page_is_refused_in_a_line(tmp_path):
    run = run_of(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    damaged = run_of(tmp_path / "damaged")
    (damaged / "training_options.json").write_text("[" * 100_000)
    grid = run_of(tmp_path / "grid")
    (grid / "fakes-000003.000.png").write_text("secret")
    for path in (tmp_path / "none", tmp_path / "empty", damaged, grid):
        output = tdkern_("report", run, path, "--out", tmp_path / "page.html", code=1)
        assert output.startswith("Error: ") and str(path) in output and output.count("\n") == 1
    before = (run / "stats.jsonl").read_bytes()
    assert "--out must end in .html" in tdkern_("report", run, "--out", run / "stats.jsonl", code=2)
    assert (run / "stats.jsonl").read_bytes() == before
    assert not (tmp_path / "page.html").exists()
