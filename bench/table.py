"""Puts measured tables into docs/performance.md and docs/demo.md, between their markers.

python bench/table.py bench/results/<device>.json --demo demo/demo.txt
"""

import argparse
import json
import re
from pathlib import Path


def markdown(path: Path) -> str:
    """The tables of one results file: the competitors, side by side for each number of threads, and
    how tdkern's time grows.
    """
    result = json.loads(Path(path).read_text())
    about = (
        f"{result['device']}, torch {result['versions']['torch']}, {result['date'][:10]}; "
        f"from `bench/results/{Path(path).name}`"
    )
    tables = [
        competitors([row for row in result["rows"] if "elements" not in row]),
        growth([row for row in result["rows"] if "elements" in row]),
    ]
    return "\n\n".join([about, *filter(None, tables)])


def competitors(rows: list[dict]) -> str:
    """One row per op, size and competitor; ratios are to tdkern's median in the same run."""
    on_gpu = any("launches" in row for row in rows)
    columns = [
        ("slower than tdkern", "times_ours", "{:.2f}×"),
        ("of a copy's GB/s", "share_of_copy", "{:.0%}"),
    ]
    columns += (
        [
            ("in a CUDA graph", "graph_us", "{:,.1f} µs"),
            ("launches", "launches", "{}"),
            ("waits", "syncs", "{}"),
        ]
        if on_gpu
        else []
    )
    threads = sorted({row["threads"] for row in rows})
    head, lines = ["op", "size", "what"], {}
    for count in threads:
        threads_title = "1 thread" if count == 1 else f"{count} threads"
        head += [
            "median" if on_gpu else threads_title,
            *(title for title, _, _ in columns),
        ]
    for row in rows:
        lines.setdefault((row["op"], row["size"]), {}).setdefault(row["competitor"], {})[
            row["threads"]
        ] = row
    body = []
    for (op, size), competitors in lines.items():
        for competitor, by_threads in competitors.items():
            cells = [f"`{op}`", size, competitor]
            for row in (by_threads.get(count, {}) for count in threads):
                cells += [
                    cell(row, "median_us", "{:,.0f} µs"),
                    *(cell(row, name, form) for _, name, form in columns),
                ]
            body.append([*cells, cell(next(iter(by_threads.values())), "extra_bytes", "{:,} B")])
    return table([*head, "memory beside"], body, left=3)


def growth(rows: list[dict]) -> str:
    """tdkern's time of an element by their number, and what that is beside a copy that moves as
    much.
    """
    lines = {}
    for row in rows:
        if row["competitor"] == "tdkern":
            lines.setdefault((row["op"], row["threads"]), {})[row["elements"]] = row
    elements = sorted({count for line in lines.values() for count in line})
    body = []
    for (op, threads), line in lines.items():
        times = [
            line[count]["median_us"] * 1e3 / count if count in line else None for count in elements
        ]
        cells = [
            "" if time is None else f"{time:.2f}, {line[count]['share_of_copy']:.0%}"
            for count, time in zip(elements, times, strict=True)
        ]
        last = (
            f"{times[-1] / times[-2] - 1:+.0%}"
            if len(times) > 1 and times[-1] and times[-2]
            else ""
        )
        body.append([f"`{op}`", str(threads), *cells, last])
    return table(
        [
            "ns an element, share of a copy's GB/s",
            "threads",
            *map("{:.0e}".format, elements),
            "from the last but one",
        ],
        body,
        left=1,
    )


def cell(row: dict, name: str, form: str) -> str:
    return "" if row.get(name) is None else form.format(row[name])


def table(head: list[str], body: list[list[str]], left: int) -> str:
    """Markdown; the first `left` columns are text, the others numbers. Empty without a body."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if body else ""


def fill(page: Path, marker: str, text: str) -> None:
    """Put `text` between the markers of a page."""
    whole = page.read_text()
    marked = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.S)
    if not marked.search(whole):
        raise SystemExit(
            f"{page}: has no <!-- {marker} --> … <!-- /{marker} --> to put the text between"
        )
    page.write_text(marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", whole))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*", help="results files, for the bench tables")
    parser.add_argument("--demo", type=Path, help="the demo's demo.txt")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if args.results:
        fill(args.docs / "performance.md", "bench", "\n\n".join(map(markdown, args.results)))
    if args.demo:
        fill(args.docs / "demo.md", "demo", f"```text\n{args.demo.read_text().rstrip()}\n```")


if __name__ == "__main__":
    main()
