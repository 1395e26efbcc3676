"""`tdkern demo`."""

import json
from pathlib import Path

import click

from ..data.files import write_atomic
from ..demo import FAMILIES, STUDY, Config, draw_picture, report, run_study, to_json


@click.command()
@click.option(
    "--family",
    type=click.Choice(list(FAMILIES)),
    help="One way to train and sample, with and without TD. [default: EDM, with more kinds of TD]",
)
@click.option(
    "--outdir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default="demo",
    show_default=True,
    help="Where to write the picture and numbers.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=2),
    default=Config.seeds,
    show_default=True,
    help="Paired seeds.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=Config.iterations,
    show_default=True,
    help="Training steps.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=Config.seed,
    show_default=True,
    help="Random seed.",
)
@click.option(
    "--compute",
    type=click.FloatRange(min=1),
    help="Iterations without TD at equal compute, as a multiple. [default: measured]",
)
def demo(family, outdir, **values):
    """Train with and without the TD term on a problem whose exact denoiser is known, and compare.

    \b
    tdkern demo
    tdkern demo --family flow

    It takes about two minutes on a CPU, prints tables, and draws a picture. With --compute, one
    --seed gives the same numbers again.
    """
    outdir.mkdir(parents=True, exist_ok=True)  # before the work
    study = run_study(Config(**values), FAMILIES[family] if family else STUDY)
    text, path = report(study), outdir / (f"demo-{family}" if family else "demo")
    click.echo(f"\n{text}\n")
    write_atomic(path.with_suffix(".txt"), f"{text}\n".encode())
    write_atomic(path.with_suffix(".json"), f"{json.dumps(to_json(study, family))}\n".encode())
    write_atomic(path.with_suffix(".png"), draw_picture(study))
    click.echo(
        f"The picture is {path}.png, the tables are in {path}.txt, the numbers in {path}.json."
    )
