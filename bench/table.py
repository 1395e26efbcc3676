"""Measured tables of the documents as Markdown, each of one file of bench/results (report.py)."""

import gzip
import json
import statistics
from functools import cache
from pathlib import Path
from typing import NamedTuple

TD, SHARE = "training step", "TD at .3<sigma<5, a share"
STYLE = "published-style eager"
PLAIN_ALONE, TD_ALONE = "the networks alone, without TD", "the networks alone, TD"
SHARE_ALONE = "the networks alone, a share"
WHOLE = "published training step"


class Aim(NamedTuple):
    """A ratio of the times of two steps on a CPU, and what it should be."""

    op: str
    step: str
    beside: str
    bound: float | None
    is_most: bool = True
    floors: tuple[str, str] | None = None  # the same ratio of the networks' calls alone


AIMS = {
    "TD+EDM / EDM": Aim(TD, "tdkern", "EDM without TD", 1.30, floors=(TD_ALONE, PLAIN_ALONE)),
    "TD+EDM / EDM, bf16": Aim(TD, "tdkern, bf16", "EDM without TD, bf16", 1.30),
    "windowed TD on its share / EDM": Aim(
        TD, SHARE, "EDM without TD", 1.15, floors=(SHARE_ALONE, PLAIN_ALONE)
    ),
    "windowed TD on its share / EDM, bf16": Aim(TD, f"{SHARE}, bf16", "EDM without TD, bf16", 1.15),
    "published style / tdkern": Aim(TD, STYLE, "tdkern", 1.10, False, (STYLE, TD_ALONE)),
    "published style / tdkern --compile": Aim(TD, STYLE, "tdkern, --compile", None, False),
    "published style / tdkern --compile --bf16": Aim(
        TD, STYLE, "tdkern, --compile, bf16", 1.50, False
    ),
    "tdkern on EDM's network / published style": Aim(
        WHOLE,
        "tdkern, EDM's network",
        "published style",
        1.00,
        floors=("EDM's networks alone, TD", "published style"),
    ),
    "tdkern, its network and AdamEMA / published style": Aim(
        WHOLE,
        "tdkern, its network and AdamEMA",
        "published style",
        0.92,
        floors=("tdkern's networks alone, TD", "published style"),
    ),
}


def of_benchmarks(path: Path) -> str:
    """The tables of one results file: the competitors, side by side for each number of threads, and
    how tdkern's time grows.
    """
    result = json.loads(Path(path).read_text())
    about = (
        f"{result['device']}, torch {result['versions']['torch']}, {result['date'][:10]}; "
        f"from `bench/results/{Path(path).name}`"
    )
    if "instructions" in result:
        about += f". Of its instructions: {', '.join(result['instructions']) or 'none of these'}"
    rows = result["rows"]
    tables = [
        aims(rows),
        competitors([row for row in rows if "elements" not in row and "batch" not in row]),
        growth([row for row in rows if "elements" in row]),
        by_batch([row for row in rows if "batch" in row]),
    ]
    return "\n\n".join([about, *filter(None, tables)])


def ratio(row: dict, other: dict) -> float:
    """How many times as long a row's step takes as another's: in the rounds that both were in,
    their median.
    """
    pairs = zip(row.get("times_us", []), other.get("times_us", []), strict=False)
    found = [own / theirs for own, theirs in pairs]
    return statistics.median(found) if found else row["median_us"] / other["median_us"]


def aims(rows: list[dict]) -> str:
    """Ratios of whole steps that were measured in turn, the aim, and what the networks alone take
    of it.
    """
    found = {
        (row["op"], row["size"], row["threads"], row["competitor"]): row
        for row in rows
        if "times_us" in row
    }
    body = []
    for what, aim in AIMS.items():
        for place in sorted({key[:3] for key in found if key[0] == aim.op}):
            names = (aim.step, aim.beside, *(aim.floors or ()))
            step, beside, *floors = (found.get((*place, name)) for name in names)
            if step and beside:
                cells = [what, place[1], str(place[2]), *judged(aim, ratio(step, beside))]
                body.append([*cells, f"{ratio(*floors):.2f}" if floors else ""])
    head = ["whole steps, in turn", "size", "threads", "aim", "measured", "by the networks alone"]
    return table(head, body, left=2)


def judged(aim: Aim, value: float) -> tuple[str, str]:
    """An aim in words, and what was measured."""
    if aim.bound is None:
        return "", f"{value:.2f}"
    missed = value > aim.bound if aim.is_most else value < aim.bound
    bound = f"{'at most' if aim.is_most else 'at least'} {aim.bound:.2f}"
    return bound, f"{value:.2f}{' (missed)' * missed}"


def by_batch(rows: list[dict]) -> str:
    """The driver's step by batch, and by how much of it is in one forward pass."""
    threads = sorted({row["threads"] for row in rows})
    parts = sorted({row["batch_gpu"] for row in rows})
    body = []
    for batch in sorted({row["batch"] for row in rows}):
        own = {(row["threads"], row["batch_gpu"]): row for row in rows if row["batch"] == batch}
        times = [own.get((count, batch)) for count in threads]
        cells = [f"{row['median_us'] / 1e3 / batch:.2f} ms" if row else "" for row in times]
        memory = [own.get((threads[0], part)) for part in parts]
        cells += [f"{row['extra_bytes'] / 2**20:.1f} MiB" if row else "" for row in memory]
        body.append([str(batch), *cells])
    head = ["`tdkern train`'s step: batch"]
    head += [f"an image, {count} thread{'s' * (count > 1)}" for count in threads]
    head += [f"memory beside, `--batch-gpu {part}`" for part in parts]
    return table(head, body, left=0)


def of_demo(path: Path) -> str:
    """What `tdkern demo` printed, of the numbers that it wrote."""
    from tdkern.demo import from_json, report

    text = report(from_json(json.loads(Path(path).read_text())))
    return f"```text\n{text}\n```"


def of_ablation(path: Path) -> str:
    """What `tdkern report` says of a file of results of `tdkern ablate`, under no title."""
    return ablation_report(path).markdown.partition("\n\n")[2].rstrip()


def ablation_report(path: Path):
    """What `tdkern report` makes of a file of `tdkern ablate`, made once of each content."""
    return _ablation_report(path, path.read_bytes())


@cache
def _ablation_report(path: Path, content: bytes):
    from tdkern.ablation.comparison import comparisons_in
    from tdkern.ablation.report import report

    return report(comparisons_in(path), f"evidence-{path.stem}")


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


COMPILED = {
    "eager": "nothing",
    "networks_compiled": "the networks, as `--compile` does",
    "with_the_loss": "the networks and the loss",
    "with_the_backward": "their backward too",
}


def of_compiled_step(path: Path) -> str:
    """What a step costs by how much of it is compiled (compiled_step.py)."""
    result = json.loads(Path(path).read_text())
    head = ["what is compiled", "a step", "of the driver's", "the first step"]
    body = []
    for name, way in result["ways"].items():
        times = [f"{way['ms']} ms", f"{way['of_the_driver']:.2f}×", f"{way['first_s']} s"]
        body.append([COMPILED[name], *times])
    return table(head, body, left=1)


def of_loader(path: Path) -> str:
    """Images a second of the loader, by number of readers (reliability/loader.py)."""
    result = json.loads(Path(path).read_text())
    head = ["", "no reader", "1 reader", "2 readers", f"MB for {result['images']}"]
    body = []
    for kind, rates in result["rates"].items():
        readers = [f"{rates[f'{count} readers']:,}" for count in range(3)]
        body.append([kind, *readers, f"{rates['MB']}"])
    return table(head, body, left=1)


def of_overlap(path: Path) -> str:
    """How much of the gradients' exchange lies within the backward (overlap.py)."""
    told = json.loads(gzip.decompress(Path(path).read_bytes()))["summary"]
    about = (
        f"{told['parameters'] / 1e6:.1f} M parameters, {told['batch']} images of "
        f"{told['resolution']} pixels, {told['processes']} processes of one thread, gloo, torch "
        f"{told['torch']}; from `bench/results/{Path(path).name}`"
    )
    head = ["process", "step", "backward", "all-reduces", "they take", "within the backward"]
    body = []
    for rank, own in enumerate(told["by process"]):
        times = [f"{own[key]:,.0f} ms" for key in ("step_ms", "backward_ms", "all_reduce_ms")]
        share = f"{own['share_within_backward']:.0%}"
        body.append([str(rank), *times[:2], str(own["all_reduces"]), times[2], share])
    return f"{about}:\n\n{table(head, body, left=1)}"


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
