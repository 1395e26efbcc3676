"""`tdkern report`."""

from pathlib import Path

import click

from ..ablation.comparison import comparisons_in
from ..ablation.report import report as report_of_results
from ..data.files import one_line, write_atomic
from ..training.report import page, read_run

RESULTS = ".jsonl"


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    metavar="HTML",
    help="The page to write; an older one is replaced.",
)
def report(inputs, out):
    """Compare runs, or make a report of results of `tdkern ablate`.

    Where INPUT is a run's directory, one that is being trained too, the page has the curves of
    loss, TD term, base term and images a second, the last figures, the options that differ, and the
    newest pictures of each run. Where it is a file of results, the page has their means, their
    paired differences with bootstrap intervals, and what they say; beside it stand the same as
    Markdown, and its pictures. A page needs no other file.

    \b
    tdkern report runs/00000-... runs/00001-... --out report.html
    tdkern report ablation.jsonl --out ablation.html
    """
    if Path(out).suffix not in (".html", ".htm"):
        raise click.UsageError(f"--out must end in .html, got {one_line(out)}")
    are_results = {Path(each).suffix == RESULTS for each in inputs}
    if len(are_results) > 1:
        raise click.UsageError(f"INPUT must be all runs, or all results that end in {RESULTS}")
    write = _of_results if are_results == {True} else _of_runs
    click.echo(one_line(f"{out}: {write([Path(each) for each in inputs], Path(out))}"))


def _of_runs(paths: list[Path], out: Path) -> str:
    text = page([read_run(path.resolve()) for path in paths])
    write_atomic(out, text.encode(errors="backslashreplace"))
    return f"{len(paths)} runs compared"


def _of_results(paths: list[Path], out: Path) -> str:
    comparisons = [each for path in paths for each in comparisons_in(path)]
    made = report_of_results(comparisons, out.stem)
    for name, data in made.pictures.items():
        write_atomic(out.with_name(name), data)
    write_atomic(out.with_suffix(".md"), made.markdown.encode(errors="backslashreplace"))
    write_atomic(out, made.html.encode(errors="backslashreplace"))
    return f"{len(comparisons)} tables"
