"""`tdkern ema`."""

import warnings
from pathlib import Path

import click

from ..data.files import check_new, one_line
from ..ema import posthoc
from ..networks.saved import load, save_network
from ..training import CheckpointError, checkpoint
from .types import Real


@click.command()
@click.argument("run")
@click.argument("dst")
@click.option(
    "--sigma-rel",
    type=Real(),
    required=True,
    metavar="WIDTH",
    help="Relative width of the average, above 0 and at most 12^-0.5.",
)
@click.option(
    "--kimg",
    type=Real(),
    help="Where in training the average ends, in thousands of images. [default: at the newest]",
)
def ema(run, dst, sigma_rel, kimg):
    """Make the average of any width from the snapshots of a run with --power-ema.

    EDM2's post-hoc EMA: RUN is the run's directory, DST a new .safetensors file. More snapshots
    (a smaller --snap in training) and two widths give a truer average; a poor one is reported.

    \b
    tdkern train --outdir runs --data images.zip --power-ema 0.05,0.10 --snap 10
    tdkern ema runs/00000-... model.safetensors --sigma-rel 0.075
    tdkern generate --network model.safetensors --outdir images
    """
    check_new("ema: DST", Path(dst))
    found = checkpoint.checkpoints(Path(run), checkpoint.AVERAGES)
    if not found:
        raise CheckpointError(
            f"{run}: no {checkpoint.AVERAGES}-* in it; give a run that was trained with --power-ema"
        )
    for path in found:  # every one is checked; the last one's are used
        meta, newest = checkpoint.read(path, checkpoint.AVERAGES)
    step = None
    if kimg is not None:  # all batches of a run are alike
        step = float(newest["_extra_state"]) * 1000 * kimg / meta["nimg"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        average = posthoc([path / checkpoint.TENSORS for path in found], sigma_rel, step)
    for warning in told:
        click.echo(one_line(f"Warning: {warning.message}"), err=True)
    save_network(load(meta.get("network"), average, found[-1]), dst)
    click.echo(
        one_line(f"{dst}: the average of width {sigma_rel} of {len(found)} snapshots in {run}")
    )
