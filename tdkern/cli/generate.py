"""`tdkern generate`."""
from pathlib import Path

import click
import torch
from tqdm import tqdm

from ..data import save_grid, save_image
from ..schedules import EDM
from ..training import load_network, sample
from ..training.distributed import this_process
from .types import Numbers


@click.command()
@click.option("--network", required=True, metavar="DIR", help="A network snapshot, a run directory, whose newest is taken, or a file of tdkern convert.")
@click.option("--outdir", metavar="DIR", help="Where the images go, one PNG a seed.")
@click.option("--seeds", type=Numbers(int), default="0-63", show_default=True, metavar="LIST", help="One image a seed, such as 1,2,5-10.")
@click.option("--subdirs", is_flag=True, help="A subdirectory for every 1000 seeds.")
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Class of all images. [default: drawn]")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at once.")
@click.option("--steps", type=click.IntRange(min=2), default=18, show_default=True, help="Sampling steps.")
@click.option("--sigma_min", type=float, default=0.002, show_default=True, help="Lowest noise level.")
@click.option("--sigma_max", type=float, default=80.0, show_default=True, help="Highest noise level.")
@click.option("--rho", type=float, default=7.0, show_default=True, help="Exponent of the steps.")
@click.option("--S_churn", "S_churn", type=float, default=0.0, show_default=True, help="Strength of added noise.")
@click.option("--S_min", "S_min", type=float, default=0.0, show_default=True, help="Lowest noise level with added noise.")
@click.option("--S_max", "S_max", type=float, default=float("inf"), show_default=True, help="Highest noise level with added noise.")
@click.option("--S_noise", "S_noise", type=float, default=1.0, show_default=True, help="Inflation of the added noise.")
@click.option("--grid", metavar="FILE.png", help="Also write all images into one file.")
def generate(network, outdir, seeds, subdirs, class_idx, batch, steps, sigma_min, sigma_max, rho, grid, **churn):
    """Draw images from a trained network with EDM's second-order sampler.

    An image depends on its seed, not on the others. Start with torchrun to use several GPUs.

    \b
    tdkern generate --network runs/00000-... --outdir images --seeds 0-63 --grid images.png
    """
    if not outdir and not grid:
        raise click.UsageError("give --outdir, --grid or both")
    process = this_process()
    if grid and process.world > 1:
        raise click.UsageError("--grid needs all images in one process; start without torchrun")
    try:
        net, meta = load_network(network, process.device)
        sigmas = net.round_sigma(EDM(steps, max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max), rho).sigmas())  # the levels that it knows
        batches = torch.tensor(seeds).split(batch)[process.rank :: process.world]
        images = []
        for part in tqdm(batches, unit="batch", disable=process.rank > 0):
            images.append(sample(net, meta["network"], part.tolist(), sigmas, class_idx=class_idx, **churn))
            for seed, image in zip(part.tolist(), images[-1] if outdir else (), strict=bool(outdir)):
                folder = Path(outdir, f"{seed - seed % 1000:06d}" if subdirs else "")
                folder.mkdir(parents=True, exist_ok=True)
                save_image(folder / f"{seed:06d}.png", image, durable=False)
            if not grid:
                images.clear()
        if grid:
            images = torch.cat(images)
            save_grid(grid, images, columns=round(len(images) ** 0.5))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
