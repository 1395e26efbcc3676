"""`tdkern generate`."""

import math
import os
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from .._version import __version__
from ..data import save_grid
from ..data.drawn import DrawnFolder
from ..data.files import one_line, remove_leftovers
from ..families import default_sampler
from ..networks.precond import Preconditioned
from ..networks.saved import fingerprint
from ..samplers import SAMPLERS
from ..samplers.ddpm_ddim import VARIANCES
from ..samplers.generalised import RANGES, SCALINGS, SCHEDULES, SOLVERS
from ..training import load_network, sample
from ..training.distributed import Process, this_process
from ..training.sampling import choice, sampling_levels
from .types import Numbers, Real, boolean, on_command_line


@click.command()
@click.option(
    "--network",
    required=True,
    metavar="DIR",
    help="A network snapshot, a run directory, whose newest is taken, or a file of tdkern convert "
    "or of tdkern.save_network.",
)
@click.option("--outdir", metavar="DIR", help="Where the images go, one PNG for each seed.")
@click.option(
    "--seeds",
    type=Numbers(int),
    default="0-63",
    show_default=True,
    metavar="LIST",
    help="One image for each seed, such as 1,2,5-10.",
)
@click.option("--subdirs", is_flag=True, help="A subdirectory for every 1000 seeds.")
@click.option(
    "--class", "class_idx", type=click.IntRange(min=0), help="Class of all images. [default: drawn]"
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at once."
)
@click.option(
    "--sampler",
    type=click.Choice(list(SAMPLERS)),
    help="onestep and multistep are for consistency models, whose default is onestep, or "
    "multistep with --steps. [default: heun; ablation with --solver, --disc other than flow, "
    "--schedule or --scaling]",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=18, show_default=True, help="Sampling steps."
)
@click.option(
    "--sigma_min", type=Real(), help="Lowest noise level. [default: 0.002, or that of --disc]"
)
@click.option(
    "--sigma_max",
    type=Real(infinite=True),
    help="Highest noise level; inf is t = 1 of --disc flow. [default: 80, or that of --disc]",
)
@click.option("--rho", type=Real(), default=7.0, show_default=True, help="Exponent of the steps.")
@click.option(
    "--S_churn",
    "S_churn",
    type=Real(),
    default=0.0,
    show_default=True,
    help="Strength of added noise.",
)
@click.option(
    "--S_min",
    "S_min",
    type=Real(),
    default=0.0,
    show_default=True,
    help="Lowest noise level with added noise.",
)
@click.option(
    "--S_max",
    "S_max",
    type=Real(infinite=True),
    default=float("inf"),
    show_default=True,
    help="Highest noise level with added noise.",
)
@click.option(
    "--S_noise",
    "S_noise",
    type=Real(),
    default=1.0,
    show_default=True,
    help="Inflation of the added noise.",
)
@click.option(
    "--solver", type=click.Choice(SOLVERS), help="EDM's ablations: the solver. [default: heun]"
)
@click.option(
    "--disc",
    type=click.Choice(list(RANGES)),
    help="EDM's ablations: how the steps are placed; flow is flow matching's even times, in which "
    "heun and ablation then step. [default: edm]",
)
@click.option(
    "--schedule",
    type=click.Choice(list(SCHEDULES)),
    help="EDM's ablations: sigma(t). [default: linear, or flow with --disc flow]",
)
@click.option(
    "--scaling",
    type=click.Choice(list(SCALINGS)),
    help="EDM's ablations: s(t). [default: none, or flow with --disc flow]",
)
@click.option(
    "--eta",
    type=Real(),
    default=0.0,
    show_default=True,
    help="Share of new noise in a step of ddim.",
)
@click.option(
    "--order", type=click.IntRange(1, 3), default=2, show_default=True, help="Order of unipc."
)
@click.option(
    "--variance",
    type=click.Choice(VARIANCES),
    default="small",
    show_default=True,
    help="Variance of a step of ddpm: beta-tilde or beta.",
)
@boolean("--clip_denoised", "Clamp what onestep and multistep denoise to the images' range.")
@click.option("--grid", metavar="FILE.png", help="Also write all images into one file.")
def generate(
    network,
    outdir,
    seeds,
    subdirs,
    class_idx,
    batch,
    sampler,
    steps,
    sigma_min,
    sigma_max,
    rho,
    grid,
    disc,
    **options,
):
    """Draw images from a trained network, by default with EDM's second-order sampler.

    An image depends on its seed, not on the others. Its latent is drawn in float64, in which the
    samplers run; EDM's generate.py draws float32: there the same seed is another image. Start with
    torchrun to use several GPUs.

    Images that --outdir has already are not drawn again: what was killed goes on, in any number of
    processes, to the same files. Beside them generate.json says how they are drawn; a folder in
    which it says otherwise is refused.

    \b
    tdkern generate --network runs/00000-... --outdir images --seeds 0-63 --grid images.png
    tdkern generate --network model.safetensors --outdir images --sampler unipc --steps 8
    """
    if not outdir and not grid:
        raise click.UsageError("give --outdir, --grid or both")
    process = this_process()
    if grid and process.world > 1:
        raise click.UsageError("--grid needs all images in one process; start without torchrun")
    net, meta = load_network(network, process.device)
    sampler = sampler or _default_sampler(net, disc, options)
    options = _options(sampler, disc, options)
    _check_steps(sampler, steps)
    sigmas, follow = sampling_levels(
        net, sampler, steps, disc=disc or "edm", sigma_min=sigma_min, sigma_max=sigma_max, rho=rho
    )
    options = follow | options | choice(meta)
    every = [seeds[first : first + batch] for first in range(0, len(seeds), batch)]
    batches = every[process.rank :: process.world]
    folder = None
    if outdir:
        settings = {"sampler": sampler, "steps": steps, "class": class_idx, **options}
        settings |= {"batch": batch, "levels": sigmas.tolist(), "network": meta["network"]}
        settings |= {"weights": fingerprint(net.state_dict()), "tdkern": __version__}
        folder = DrawnFolder(outdir, _without_infinity(settings), subdirs=subdirs)
    _prepare(folder, seeds, batches, grid)
    options |= {"sampler": SAMPLERS[sampler].sample, "class_idx": class_idx}
    draw = partial(sample, net, meta["network"], sigmas=sigmas, **options)
    images = _draw_missing(draw, batches, folder, bool(grid), process)
    if grid:
        save_grid(grid, torch.cat(images), columns=round(len(seeds) ** 0.5))
    if process.world > 1:
        share = f"its {sum(map(len, batches))} of the {len(seeds)} images are there"
        click.echo(f"Process {process.rank} of {process.world}: {share}", err=True)


def _draw_missing(
    draw: Callable[..., Tensor],
    batches: list[list[int]],
    folder: DrawnFolder | None,
    grid: bool,
    process: Process,
) -> list[Tensor]:
    """Draw the batches that are not in the folder, or for a grid all, and write what is missing.

    A batch is drawn whole, as it would have been without a kill: rounding depends on the batch.

    Returns:
        With `grid` the images, [B, C, H, W] uint8 each.
    """
    there = {seed for part in batches for seed in part if folder and folder.is_there(seed)}
    if there:
        share = f"{len(there)} of {sum(map(len, batches))} images are in {folder.folder} already"
        click.echo(one_line(share), err=True)
    images = []
    todo = [part for part in batches if grid or not there.issuperset(part)]
    for part in tqdm(todo, unit="batch", disable=process.rank > 0):
        drawn = draw(part)
        for seed, image in zip(part, drawn, strict=True):
            if folder and seed not in there:
                folder.save(seed, image)
        if grid:
            images.append(drawn)
    return images


def _without_infinity(value):
    """A setting as JSON holds it, which has no infinite numbers."""
    if isinstance(value, dict):
        return {name: _without_infinity(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_infinity(each) for each in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _default_sampler(net: Preconditioned, disc: str | None, options: dict) -> str:
    ablated = disc not in (None, "flow")
    if ablated or options["solver"] or options["schedule"] or options["scaling"]:
        return "ablation"
    return default_sampler(net, on_command_line("steps"))


def _check_steps(sampler: str, steps: int) -> None:
    least = SAMPLERS[sampler].least_steps
    if steps < least:
        raise click.UsageError(f"--steps must be at least {least} with {sampler}, got {steps}")


def _prepare(
    folder: DrawnFolder | None, seeds: list[int], batches: list[list[int]], grid: str | None
) -> None:
    """Before the work, make the folders and see that all images can be written to them.

    What a killed process left of this one's images is removed.
    """
    paths = [folder.path(seed) for part in batches for seed in part] if folder else []
    paths += [Path(grid)] if grid else []
    names = {path.name for path in paths}
    for parent in sorted({path.parent for path in paths}):
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{parent} cannot be written to")
        remove_leftovers(parent, names.__contains__)
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a folder; give the name of a file, such as {path}/grid.png"
            )
    if folder:
        folder.check(seeds)


def _options(sampler: str, disc: str | None, values: dict) -> dict:
    """The sampler's own options; a flag given on the command line that does nothing is refused."""
    kind = SAMPLERS[sampler]
    known = signature(kind.sample).parameters
    idle = {name: f"--sampler {sampler}" for name in values if name not in known}
    if kind.from_one_level:
        idle |= dict.fromkeys(("steps", "sigma_min", "rho", "disc"), f"--sampler {sampler}")
    if disc not in (None, "edm"):
        idle["rho"] = f"--disc {disc}"
    for name, reason in idle.items():
        if on_command_line(name):
            raise click.UsageError(f"--{name} does nothing with {reason}")
    return {name: value for name, value in values.items() if name in known and value is not None}
