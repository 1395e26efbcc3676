"""Puts measured tables into the README, between their markers.

    python bench/table.py bench/results/<device>.json --demo demo/demo.txt
"""
import argparse
import json
import re
from pathlib import Path


def markdown(path: Path) -> str:
    """The table of one results file: a row an op, size and competitor; ratios are to tdkern's median in the same run."""
    result = json.loads(Path(path).read_text())
    lines = [
        f"{result['device']}, {result['threads']} thread(s), torch {result['versions']['torch']}, {result['date'][:10]}; "
        f"from `bench/results/{Path(path).name}`",
        "",
        "| op | size | what | median | slower than tdkern | GB/s | of a copy's |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        times = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}×"
        share = "" if row["share_of_copy"] is None else f"{100 * row['share_of_copy']:.0f} %"
        lines.append(f"| `{row['op']}` | {row['size']} | {row['competitor']} | {row['median_us']:,.0f} µs | {times} | {row['gb_per_s']:.1f} | {share} |")
    return "\n".join(lines)


def fill(readme: Path, marker: str, text: str) -> None:
    """Put `text` between the markers of a README."""
    whole = readme.read_text()
    marked = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.S)
    if not marked.search(whole):
        raise SystemExit(f"{readme}: has no <!-- {marker} --> … <!-- /{marker} --> to put the text between")
    readme.write_text(marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="results files, for the bench tables")
    parser.add_argument("--demo", type=Path, help="the demo's demo.txt")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    if args.results:
        fill(args.readme, "bench", "\n\n".join(map(markdown, args.results)))
    if args.demo:
        fill(args.readme, "demo", f"```text\n{args.demo.read_text().rstrip()}\n```")


if __name__ == "__main__":
    main()
