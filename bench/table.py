"""Turns a results file into Markdown, and puts it into the README between its markers.

    python bench/table.py bench/results/<device>.json [--readme README.md]
"""
import argparse
import json
import re
from pathlib import Path


def markdown(path: Path) -> str:
    """The table of one results file: a row an op, size and competitor; ratios are to tdkern's median in the same run."""
    result = json.loads(Path(path).read_text())
    lines = [
        f"{result['device']}, {result['threads']} thread(s), torch {result['versions']['torch']}, {result['date'][:10]}; from `bench/results/{Path(path).name}`",
        "",
        "| op | size | what | median | slower than tdkern | GB/s | of a copy's |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        times = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}×"
        share = "" if row["share_of_copy"] is None else f"{100 * row['share_of_copy']:.0f} %"
        lines.append(f"| `{row['op']}` | {row['size']} | {row['competitor']} | {row['median_us']:,.0f} µs | {times} | {row['gb_per_s']:.1f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args()
    table = markdown(args.results)
    if args.readme is None:
        print(table)
        return
    text = args.readme.read_text()
    marked = re.compile(r"(<!-- bench -->\n).*?(\n<!-- /bench -->)", re.S)
    if not marked.search(text):
        raise SystemExit(f"{args.readme}: has no <!-- bench --> … <!-- /bench --> to put the table between")
    args.readme.write_text(marked.sub(lambda found: found[1] + table + found[2], text))


if __name__ == "__main__":
    main()
