"""A results file as a report in Markdown and in HTML."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..pages import (
    Strong,
    html_image,
    html_page,
    html_table,
    markdown_table,
    markdown_text,
)
from .comparison import Comparison
from .picture import draw_differences
from .words import (
    caution,
    conclusion,
    differences_in_words,
    groups_of,
    heading,
    place_of,
    preface,
    title_of,
)

TITLE = "TD measured"


class Heading(NamedTuple):
    """A heading of level 2 or 3."""

    text: str
    level: int


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Grid(NamedTuple):
    """A table of texts."""

    head: list[str]
    rows: list[list[str]]


class Picture(NamedTuple):
    """A PNG file and what it shows."""

    text: str
    data: bytes


Block = Heading | Text | Grid | Picture


@dataclass(frozen=True)
class Report:
    """A report in both forms.

    Attributes:
        html: a page that needs no other file.
        markdown: text that refers to `pictures` by their names.
        pictures: PNG files by name.
    """

    html: str
    markdown: str
    pictures: dict[str, bytes]


def report(comparisons: list[Comparison], stem: str) -> Report:
    """The report of comparisons. Deterministic.

    Args:
        comparisons: of `comparisons_in`.
        stem: which the names of its pictures begin with.
    """
    blocks = [block for each in comparisons for block in _blocks(each)]
    pictures: dict[str, bytes] = {}
    lines, parts = [f"# {TITLE}\n\n"], []
    for block in blocks:
        parts.append(_as_html(block))
        name = ""
        if isinstance(block, Picture):
            name = f"{stem}-{len(pictures) + 1}.png"
            pictures[name] = block.data
        lines.append(_as_markdown(block, name))
    return Report(html_page(TITLE, parts), "".join(lines), pictures)


def _as_html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>\n"
    if isinstance(block, Grid):
        return html_table(block.head, block.rows)
    if isinstance(block, Picture):
        return f"<figure>{html_image(block.data, 'curves')}</figure>\n"
    return f"<p>{html.escape(block.text)}</p>\n"


def _as_markdown(block: Block, name: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {markdown_text(block.text)}\n\n"
    if isinstance(block, Grid):
        return markdown_table(block.head, block.rows)
    if isinstance(block, Picture):
        return f"![{markdown_text(block.text)}]({name})\n\n"
    return f"{markdown_text(block.text)}\n\n"


def _blocks(comparison: Comparison) -> Iterator[Block]:
    """A comparison's section: what follows first, then the numbers."""
    yield Heading(heading(comparison), 2)
    yield from map(Text, preface(comparison))
    if comparison.measures:
        yield from map(Text, conclusion(comparison))
        yield Picture(f"Differences of {heading(comparison)}", draw_differences(comparison))
        for group, measures in groups_of(comparison.measures).items():
            yield Heading(title_of(group), 3)
            yield _numbers(comparison, measures)
        yield from map(Text, differences_in_words(comparison))
        yield Text(caution(comparison))
    if comparison.costs:
        yield Heading("time and memory of a step", 3)
        yield _costs(comparison)


def _numbers(comparison: Comparison, measures: list[str]) -> Grid:
    """Means of every row, and the differences of every pair."""
    rows = []
    for name in comparison.table.rows:
        if comparison.numbers[name]:
            means = comparison.means(name, measures)
            rows.append([_with_gaps(comparison, name), *(f"{mean:.3g}" for mean in means)])
    for name, other in comparison.pairs():
        found = comparison.against(name, other, measures)
        cells = [Strong(each) if each.clear else str(each) for each in found]
        rows.append([f"{name} − {other}, %", *cells])
    return Grid(["", *map(place_of, measures)], rows)


def _with_gaps(comparison: Comparison, name: str) -> str:
    """A row's name, how many seeds it has where some are missing, and what was chosen for it."""
    notes = []
    seeds, every = len(comparison.numbers[name]), len(comparison.table.seeds)
    if seeds < every:
        notes.append(f"{seeds} of {every} seeds")
    widths = sorted({*comparison.widths[name].values()})
    if widths:
        notes.append(f"widths {', '.join(f'{width:g}' for width in widths)}")
    return f"{name} ({'; '.join(notes)})" if notes else name


def _costs(comparison: Comparison) -> Grid:
    rows, first = [], next(iter(comparison.costs.values()))
    for name, cost in comparison.costs.items():
        setting = comparison.table.rows[name].setting
        rows.append(
            [
                name,
                f"{cost['ms']:.3g}",
                f"{cost['of_baseline']:.2f}",
                f"{cost['memory_mib']:.3g}",
                f"{cost['memory_mib'] / first['memory_mib']:.2f}",
                f"{setting.get('batch')}",
                f"{setting.get('steps')}",
            ]
        )
    first_name = next(iter(comparison.costs))
    head = ["", "ms", f"of {first_name}", "MiB", f"of {first_name}", "batch", "steps"]
    return Grid(head, rows)
