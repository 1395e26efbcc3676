"""Measured tables of the documents as Markdown, each of one file of bench/results (report.py)."""

import json
from pathlib import Path


def of_benchmarks(path: Path) -> str:
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


def of_demo(path: Path) -> str:
    """What `tdkern demo` printed, of the numbers that it wrote."""
    from tdkern.demo import from_json, report

    text = report(from_json(json.loads(Path(path).read_text())))
    return f"```text\n{text}\n```"


def of_ablation(path: Path) -> str:
    """What `tdkern report` says of a file of results of `tdkern ablate`, under no title."""
    from tdkern.ablation.comparison import comparisons_in
    from tdkern.ablation.report import report

    text = report(comparisons_in(path), f"evidence-{path.stem}").markdown
    return text.partition("\n\n")[2].rstrip()


def of_couplings(path: Path) -> str:
    """What the noise of the pair does to TD's target, for each loss of coupling.py."""
    result = json.loads(Path(path).read_text())
    levels = ", ".join(f"{sigma:g}" for sigma in result["sigma"])
    head = ["loss", 'r, "markov"', 'variance, "markov"', f'bias of "shared" at sigma {levels}']
    body = []
    for name, numbers in result["losses"].items():
        spans = ["{:.2f} to {:.2f}".format(*numbers[key]) for key in ("r", "variance")]
        digits = 0 if max(numbers["bias_percent"]) > 1 else 1
        bias = ", ".join(f"{value:+.{digits}f}" for value in numbers["bias_percent"])
        body.append([name, *spans, f"{bias} %"])
    return table(head, body, left=4)


def of_loader(path: Path) -> str:
    """Images a second of the loader, by number of readers (reliability/loader.py)."""
    result = json.loads(Path(path).read_text())
    head = ["", "no reader", "1 reader", "2 readers", f"MB for {result['images']}"]
    body = []
    for kind, rates in result["rates"].items():
        readers = [f"{rates[f'{count} readers']:,}" for count in range(3)]
        body.append([kind, *readers, f"{rates['MB']}"])
    return table(head, body, left=1)


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
