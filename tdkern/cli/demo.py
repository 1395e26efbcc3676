"""`tdkern demo`."""
import json
from pathlib import Path

import click

from ..data.files import write_atomic
from ..demo import Config, draw_picture, report, run_study, to_json


@click.command()
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", default="demo", show_default=True,
              help="For the picture and numbers.")
@click.option("--seeds", type=click.IntRange(min=2), default=Config.seeds, show_default=True, help="Paired seeds.")
@click.option("--iterations", type=click.IntRange(min=1), default=Config.iterations, show_default=True, help="Training steps.")
@click.option("--seed", type=click.IntRange(min=0), default=Config.seed, show_default=True, help="Of all randomness.")
@click.option("--compute", type=click.FloatRange(min=1), help="Iterations of EDM at equal compute, as a multiple. [default: measured]")
def demo(outdir, **values):
    """Train with and without the TD term on a problem whose exact denoiser is known, and compare.

    It takes about two minutes on a CPU, prints tables, and draws a picture. With --compute, one --seed gives the same numbers again.
    """
    try:
        outdir.mkdir(parents=True, exist_ok=True)  # before the work
        study = run_study(Config(**values))
        text = report(study)
        click.echo(f"\n{text}\n")
        write_atomic(outdir / "demo.txt", f"{text}\n".encode())
        write_atomic(outdir / "demo.json", json.dumps(to_json(study), indent=1).encode())
        write_atomic(outdir / "demo.png", draw_picture(study))
    except (OSError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"The picture is {outdir / 'demo.png'}, the tables are in {outdir / 'demo.txt'}, the numbers in {outdir / 'demo.json'}.")
