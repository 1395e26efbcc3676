"""`tdkern fid`."""

import json
from collections.abc import Iterable
from pathlib import Path

import click
import torch
from tqdm import tqdm

from ..data import DatasetError, ImageDataset
from ..data.files import one_line
from ..evaluation.fid import (
    Inception,
    Statistics,
    feature_statistics,
    frechet_distance,
    read_statistics,
    write_statistics,
)
from ..families import default_sampler
from ..samplers import SAMPLERS
from ..training import load_network, sample
from ..training.distributed import Process, joined
from ..training.sampling import choice, sampling_levels
from ..training.signals import readers
from .types import Numbers

with_ref = click.option(
    "--ref",
    required=True,
    metavar="NPZ|URL",
    help="Reference statistics: of tdkern fid ref, or EDM's.",
)
with_num = click.option(
    "--num", type=click.IntRange(min=2), default=50000, show_default=True, help="Images."
)
with_batch = click.option(
    "--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at once."
)
with_workers = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Processes that read images.",
)
with_detector = click.option(
    "--detector",
    metavar="FILE",
    help="torch-fidelity's weights of Inception-v3. [default: torch.hub's copy, else downloaded]",
)


@click.group()
def fid():
    """Frechet inception distance (FID) of images to reference statistics.

    Compare only FIDs of as many images to one reference. For several GPUs: torchrun --standalone
    --nproc_per_node=8 -m tdkern.cli -- fid calc ...

    \b
    tdkern generate --network runs/00000-... --outdir images --seeds 0-49999 --subdirs
    tdkern fid ref --data cifar10-train-32x32.zip --dest cifar10.npz
    tdkern fid calc --images images --ref cifar10.npz
    tdkern fid steps --network runs/00000-... --ref cifar10.npz --steps 4,6,9,12,18
    """


@fid.command()
@click.option(
    "--images", required=True, metavar="DIR|ZIP", help="The images, as tdkern generate writes them."
)
@with_ref
@with_num
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Chooses the images, where there are more.",
)
@with_batch
@with_workers
@with_detector
def calc(images, ref, num, seed, batch, workers, detector):
    """FID of the images in a folder or zip."""
    with joined() as process:
        dataset = ImageDataset(images, max_size=num, seed=seed)
        if len(dataset) < num:
            raise DatasetError(
                f"{images}: holds {len(dataset)} images, --num asks for {num}; generate more, or "
                f"give --num {len(dataset)}"
            )
        extract, reference = Inception(detector, process.device), _reference(ref, num, process)
        _tell_left_out(dataset, process)
        ours = _of_dataset(dataset, extract, batch, workers, process)
        if process.rank == 0:
            click.echo(
                f"{_label(num, dataset.image_shape[0])} in {images} against {ref}:", err=True
            )
            click.echo(f"{frechet_distance(ours, reference):g}")


@fid.command("ref")
@click.option("--data", required=True, metavar="DIR|ZIP", help="The images, in EDM's layout.")
@click.option(
    "--dest",
    required=True,
    type=click.Path(dir_okay=False),
    metavar="NPZ",
    help="Where the statistics go.",
)
@with_batch
@with_workers
@with_detector
def reference_statistics(data, dest, batch, workers, detector):
    """Write reference statistics: mean and covariance of all images' features."""
    with joined() as process:
        dataset = ImageDataset(data)
        extract = Inception(detector, process.device)
        if process.rank == 0:
            Path(dest).parent.mkdir(parents=True, exist_ok=True)  # before the work
        _tell_left_out(dataset, process)
        statistics = _of_dataset(dataset, extract, batch, workers, process)
        if process.rank == 0:
            write_statistics(dest, statistics)
            click.echo(f"{dest}: statistics of {len(dataset)} images of {data}", err=True)


@fid.command()
@click.option(
    "--network",
    required=True,
    metavar="DIR",
    help="A network snapshot, a run directory, whose newest is taken, or a file of tdkern convert.",
)
@with_ref
@click.option(
    "--steps",
    type=Numbers(int),
    default="4,6,9,12,18",
    show_default=True,
    metavar="LIST",
    help="Numbers of sampling steps, each at least 2; 1 is for multistep.",
)
@with_num
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the first image; those of the others count up from it.",
)
@click.option(
    "--sampler",
    type=click.Choice([name for name, kind in SAMPLERS.items() if not kind.choices]),
    help="With its defaults. [default: multistep of a consistency model, else heun]",
)
@with_batch
@with_detector
def steps(network, ref, steps, num, seed, sampler, batch, detector):
    """FID of a network's images for several numbers of sampling steps, without writing them.

    The images are those of tdkern generate with the same seeds, --sampler, --steps and --batch; for
    its other flags use it and fid calc. Prints a table, where NFE is the number of network
    evaluations an image, then the same as one line of JSON.
    """
    with joined() as process:
        net, meta = load_network(network, process.device)
        sampler = sampler or default_sampler(net, steps_given=True)
        least = SAMPLERS[sampler].least_steps
        if min(steps) < least:
            raise click.UsageError(
                f"--steps must be at least {least} each with {sampler}, got {min(steps)}"
            )
        extract, reference = Inception(detector, process.device), _reference(ref, num, process)
        batches = torch.arange(seed, seed + num).split(batch)[process.rank :: process.world]
        if process.rank == 0:
            click.echo(
                f"{_label(num, meta['network']['img_channels'])} of {network} against {ref}, "
                f"{sampler}:",
                err=True,
            )
            click.echo(f"{'steps':>5} {'NFE':>4} {'FID':>10}")
        rows = []
        for count in steps:
            sigmas, options = sampling_levels(net, sampler, count)
            options |= {"sampler": SAMPLERS[sampler].sample} | choice(meta)
            images = (
                sample(net, meta["network"], seeds.tolist(), sigmas, **options)
                for seeds in _bar(batches, process)
            )
            ours = feature_statistics(images, extract, process.device)
            if process.rank == 0:
                nfe = SAMPLERS[sampler].evaluations(len(sigmas) - 1)
                rows.append({"steps": count, "nfe": nfe, "fid": frechet_distance(ours, reference)})
                click.echo(f"{count:>5} {nfe:>4} {rows[-1]['fid']:>10.4f}")
        if process.rank == 0:
            click.echo(
                json.dumps(
                    {
                        "network": str(network),
                        "ref": ref,
                        "sampler": sampler,
                        "num": num,
                        "seed": seed,
                        "results": rows,
                    }
                )
            )


def _tell_left_out(dataset: ImageDataset, process: Process) -> None:
    if dataset.left_out and process.rank == 0:
        click.echo(one_line(f"Left out of {dataset.path}: {dataset.left_out}"), err=True)


def _reference(ref: str, num: int, process: Process) -> Statistics | None:
    """The reference statistics, for the first process alone, which also warns."""
    if process.rank > 0:
        return None
    reference = read_statistics(ref)
    if len(reference.mu) != Inception.dim:
        raise ValueError(
            f"{ref}: must have the {Inception.dim} features of Inception-v3, got "
            f"{len(reference.mu)}; make it with tdkern fid ref"
        )
    if num < 10000:
        click.echo(
            f"Warning: the FID of {num} images is biased upwards; 50000 are usual, 10000 the least "
            "to compare",
            err=True,
        )
    return reference


def _of_dataset(
    dataset: ImageDataset, extract: Inception, batch: int, workers: int, process: Process
) -> Statistics:
    """Statistics of all images of a data set.

    The batches do not depend on the number of processes.
    """
    order = [indices.tolist() for indices in torch.arange(len(dataset)).split(batch)][
        process.rank :: process.world
    ]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        pin_memory=process.device.type == "cuda",
        **readers(workers),
    )
    return feature_statistics(
        (images for images, _ in _bar(loader, process)), extract, process.device
    )


def _bar(batches: Iterable, process: Process) -> Iterable:
    return tqdm(batches, unit="batch", leave=False, disable=process.rank > 0)


def _label(num: int, channels: int) -> str:
    return f"FID of {num} images{' (grey, as RGB)' if channels == 1 else ''}"
