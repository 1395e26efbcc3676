"""`tdkern report`."""

from pathlib import Path

import click

from ..data.files import one_line, write_atomic
from ..training.report import page, read_run


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    metavar="HTML",
    help="The page to write; an older one is replaced.",
)
def report(runs, out):
    """Compare runs in one HTML page.

    RUN is a run's directory, also of a run that is still training. The page has the curves of
    loss, TD term, base term and images per second, the last figures, the options that differ, and
    the newest pictures of each; it needs no other file.

    \b
    tdkern report runs/00000-... runs/00001-... --out report.html
    """
    if Path(out).suffix not in (".html", ".htm"):
        raise click.UsageError(f"--out must end in .html, got {one_line(out)}")
    text = page([read_run(Path(run).resolve()) for run in runs])
    write_atomic(out, text.encode(errors="backslashreplace"))
    click.echo(one_line(f"{out}: {len(runs)} runs compared"))
