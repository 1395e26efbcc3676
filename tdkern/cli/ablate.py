"""`tdkern ablate`."""

import os
from dataclasses import replace
from pathlib import Path

import click

from ..ablation.ablate import Plan
from ..ablation.ablate import ablate as run
from ..ablation.grid import BUDGETS, preset_of
from ..ablation.presets import PRESETS, SIZES
from ..ablation.problems import PROBLEMS
from ..ablation.problems.empirical import DATA_VARIABLE
from ..ablation.results import opened
from ..data.files import one_line
from .types import Numbers
from .vary import Values

GRID = "grid"  # the name of a table that is no preset


@click.command()
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="A table. [default: every combination of --vary]",
)
@click.option(
    "--problem",
    "problems",
    type=click.Choice(list(PROBLEMS)),
    multiple=True,
    default=["patches8"],
    show_default=True,
    help="What is learned; may be given several times.",
)
@click.option(
    "--data",
    type=click.Path(exists=True),
    envvar=DATA_VARIABLE,
    show_envvar=True,
    help="The images of the empirical problems: a folder, a zip or .npy file.",
)
@click.option(
    "--vary",
    type=Values(),
    multiple=True,
    metavar="NAME=VALUE,…",
    help="In place of a preset: a method's or its loss's setting, and its values, such as "
    "weight=pairwise,online or td_sigma=none,0.3:5. May be given several times.",
)
@click.option(
    "--method", "methods", multiple=True, help="Of the preset only this, and what it is against."
)
@click.option(
    "--seeds", type=Numbers(int), metavar="SEEDS", help="Such as 0-15. [default: the preset's]"
)
@click.option(
    "--confirm",
    is_flag=True,
    help="The seeds are fresh ones: their table is apart from that which methods were chosen by.",
)
@click.option(
    "--budget",
    "budgets",
    type=click.Choice(BUDGETS),
    multiple=True,
    help="As many steps for all methods, or as much compute, by what a step is measured to cost; "
    "may be given twice. [default: the preset's]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Of the baseline. [default: by problem]")
@click.option("--batch", type=click.IntRange(min=1), help="Of a step. [default: by problem]")
@click.option(
    "--jobs",
    "workers",
    type=click.IntRange(min=1),
    default=os.cpu_count(),
    help="At a time, each on one thread. [default: one for each processor]",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="ablation.jsonl",
    show_default=True,
    metavar="JSONL",
    help="The results, a line for each job; jobs that are in it are not done again.",
)
def ablate(
    preset, problems, data, vary, methods, seeds, confirm, budgets, steps, batch, workers, out
):
    """Train methods side by side on problems with a known answer, and keep their numbers.

    \b
    tdkern ablate --preset paper-weights --problem patches8 --out weights.jsonl
    tdkern ablate --vary weight=pairwise,online --vary td_sigma=none,0.3:5 --problem mixture
    tdkern report weights.jsonl

    Methods have a seed's initial weights, data and noise in common. What a step of each costs is
    measured first. A killed call goes on where it was when it is given again.
    """
    if bool(preset) == bool(vary):
        raise click.UsageError("give either --preset or --vary")
    table = PRESETS[preset] if preset else preset_of(dict(vary))
    if data:
        os.environ[DATA_VARIABLE] = os.path.abspath(data)  # for the jobs' processes
    if methods:
        table = table.of(methods)
    sizes = {name: value for name, value in (("steps", steps), ("batch", batch)) if value}
    plans = [
        Plan(
            preset or GRID,
            table,
            problem,
            replace(SIZES[problem], **sizes),
            budgets or table.budgets,
            tuple(seeds or range(table.seeds)),
            confirm,
        )
        for problem in problems
    ]
    with opened(out) as results:
        for number in results.wrong:
            click.echo(one_line(f"Warning: {out}: line {number} holds no result"), err=True)
        failures = run(plans, results, workers)
    for failure in failures:
        click.echo(one_line(f"Failed: {failure}"), err=True)
    if failures:
        raise click.ClickException(f"{len(failures)} failed; the others are in {one_line(out)}")
    click.echo(one_line(f"All results are in {out}; tdkern report {out} makes a report of them"))
