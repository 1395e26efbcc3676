"""`tdkern fid`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from ..data import DatasetError, ImageDataset
from ..data.files import one_line
from ..evaluation.features import (
    Recorder,
    gathered,
    kernel_distance,
    precision_recall_density_coverage,
)
from ..evaluation.fid import (
    Inception,
    Statistics,
    feature_statistics,
    frechet_distance,
    read_features,
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
METRICS = ("fid", "kid", "prdc")
TITLES = {"fid": "FID", "kid": "KID", "prdc": "precision, recall, density, coverage"}


def _metrics(ctx, param, value: str) -> list[str]:
    chosen = value.split(",")
    for name in chosen:
        if name not in METRICS:
            raise click.BadParameter(f"must be a list of {', '.join(METRICS)}, got {value!r}")
    return [name for name in METRICS if name in chosen]


with_metrics = click.option(
    "--metrics",
    default="fid",
    show_default=True,
    metavar="LIST",
    callback=_metrics,
    help="Of fid, kid (kernel inception distance) and prdc (precision and recall, density and "
    "coverage). The last two need a reference of fid ref --features.",
)


@click.group()
def fid():
    """Frechet inception distance (FID) of images to reference statistics, and other distances.

    Compare only FIDs of as many images to one reference. For several GPUs: torchrun --standalone
    --nproc_per_node=8 -m tdkern.cli -- fid calc ...

    \b
    tdkern generate --network runs/00000-... --outdir images --seeds 0-49999 --subdirs
    tdkern fid ref --data cifar10-train-32x32.zip --dest cifar10.npz --features
    tdkern fid calc --images images --ref cifar10.npz --metrics fid,kid,prdc
    tdkern fid steps --network runs/00000-... --ref cifar10.npz --steps 4,6,9,12,18
    """


@dataclass
class Measure:
    """What is asked for, and the reference, which the first process alone has."""

    metrics: list[str]
    extract: Inception | Recorder
    process: Process
    reference: Statistics | None
    real: torch.Tensor | None  # [N, dim], the reference's features, for kid and prdc

    def __call__(self, batches: Iterable) -> dict[str, float] | None:
        """The metrics of a process's images, by name; None but on the first process."""
        device, extract = self.process.device, self.extract
        ours, generated = feature_statistics(batches, extract, device), None
        if isinstance(extract, Recorder):
            generated = gathered(extract.parts, extract.dim, device)
            extract.parts.clear()
        if self.process.rank > 0:
            return None
        found = {}
        if "fid" in self.metrics:
            found["fid"] = frechet_distance(ours, self.reference)
        if "kid" in self.metrics:
            kid = kernel_distance(generated, self.real)
            found |= {"kid": kid.mean, "kid_std": kid.std}
        if "prdc" in self.metrics:
            prdc = precision_recall_density_coverage(generated, self.real, device=device)
            found |= prdc._asdict()
        return found


def _measure(metrics: list[str], ref: str, detector, num: int, process: Process) -> Measure:
    reference = _reference(ref, num if "fid" in metrics else None, process)
    wants_features = metrics != ["fid"]
    real = read_features(ref) if wants_features and process.rank == 0 else None
    extract: Any = Inception(detector, process.device)
    if wants_features:
        extract = Recorder(extract)
    return Measure(metrics, extract, process, reference, real)


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
@with_metrics
@with_batch
@with_workers
@with_detector
def calc(images, ref, num, seed, metrics, batch, workers, detector):
    """FID, or other --metrics, of the images in a folder or zip.

    Prints the FID alone, or of other metrics a line each and the same as one line of JSON.
    """
    with joined() as process:
        dataset = ImageDataset(images, max_size=num, seed=seed)
        if len(dataset) < num:
            raise DatasetError(
                f"{images}: holds {len(dataset)} images, --num asks for {num}; generate more, or "
                f"give --num {len(dataset)}"
            )
        measure = _measure(metrics, ref, detector, num, process)
        _tell_left_out(dataset, process)
        with _images(dataset, batch, workers, process) as batches:
            found = measure(batches)
        if process.rank > 0:
            return
        label = _label(metrics, num, dataset.image_shape[0])
        click.echo(f"{label} in {images} against {ref}:", err=True)
        if metrics == ["fid"]:
            click.echo(f"{found['fid']:g}")
            return
        for name, value in found.items():
            click.echo(f"{name:<9} {value:g}")
        about = {"images": images, "ref": ref, "num": num, "seed": seed}
        click.echo(json.dumps(about | found))


@fid.command("ref")
@click.option("--data", required=True, metavar="DIR|ZIP", help="The images, in EDM's layout.")
@click.option(
    "--dest",
    required=True,
    type=click.Path(dir_okay=False),
    metavar="NPZ",
    help="Where the statistics go.",
)
@click.option(
    "--features",
    is_flag=True,
    help="Also write all images' features, for kid and prdc; 8 KB an image.",
)
@with_batch
@with_workers
@with_detector
def reference_statistics(data, dest, features, batch, workers, detector):
    """Write reference statistics: mean and covariance of all images' features."""
    with joined() as process:
        dataset = ImageDataset(data)
        extract: Any = Inception(detector, process.device)
        if features:
            extract = Recorder(extract)
        if process.rank == 0:
            Path(dest).parent.mkdir(parents=True, exist_ok=True)  # before the work
        _tell_left_out(dataset, process)
        with _images(dataset, batch, workers, process) as batches:
            statistics = feature_statistics(batches, extract, process.device)
        recorded = None
        if features:
            recorded = gathered(extract.parts, extract.dim, process.device)
        if process.rank == 0:
            write_statistics(dest, statistics, recorded)
            click.echo(f"{dest}: statistics of {len(dataset)} images of {data}", err=True)


@fid.command()
@click.option(
    "--network",
    required=True,
    metavar="DIR",
    help="A network snapshot, a run directory, whose newest is taken, or a file of tdkern convert "
    "or of tdkern.save_network.",
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
@with_metrics
@with_batch
@with_detector
def steps(network, ref, steps, num, seed, sampler, metrics, batch, detector):
    """FID of a network's images for several numbers of sampling steps, without writing them.

    The images are those of tdkern generate with the same seeds, --sampler, --steps and --batch; for
    its other flags use it and fid calc. Prints a table, where NFE is the number of network
    evaluations per image, then the same as one line of JSON.
    """
    with joined() as process:
        net, meta = load_network(network, process.device)
        sampler = sampler or default_sampler(net, steps_given=True)
        least = SAMPLERS[sampler].least_steps
        if min(steps) < least:
            raise click.UsageError(
                f"--steps must be at least {least} each with {sampler}, got {min(steps)}"
            )
        measure = _measure(metrics, ref, detector, num, process)
        batches = torch.arange(seed, seed + num).split(batch)[process.rank :: process.world]
        label = _label(metrics, num, meta["network"]["img_channels"])
        if process.rank == 0:
            click.echo(f"{label} of {network} against {ref}, {sampler}:", err=True)
        rows = []
        for count in steps:
            sigmas, options = sampling_levels(net, sampler, count)
            options |= {"sampler": SAMPLERS[sampler].sample} | choice(meta)
            with _bar(batches, process) as bar:
                found = measure(
                    sample(net, meta["network"], seeds.tolist(), sigmas, **options) for seeds in bar
                )
            if process.rank == 0:
                nfe = SAMPLERS[sampler].evaluations(len(sigmas) - 1)
                rows.append({"steps": count, "nfe": nfe} | found)
                _print_row(rows)
        if process.rank == 0:
            about = {"network": network, "ref": ref, "sampler": sampler, "num": num, "seed": seed}
            click.echo(json.dumps(about | {"results": rows}))


def _print_row(rows: list[dict]) -> None:
    """The last row of a table, and with the first one its head."""
    names = [name for name in rows[0] if name not in ("steps", "nfe")]
    if len(rows) == 1:
        titles = ["FID" if name == "fid" else name for name in names]
        click.echo(" ".join([f"{'steps':>5} {'NFE':>4}", *(f"{title:>10}" for title in titles)]))
    *_, row = rows
    numbers = [f"{row[name]:>10.{4 if name == 'fid' else 6}f}" for name in names]
    click.echo(" ".join([f"{row['steps']:>5} {row['nfe']:>4}", *numbers]))


def _tell_left_out(dataset: ImageDataset, process: Process) -> None:
    if dataset.left_out and process.rank == 0:
        click.echo(one_line(f"Left out of {dataset.path}: {dataset.left_out}"), err=True)


def _reference(ref: str, num: int | None, process: Process) -> Statistics | None:
    """The reference statistics, for the first process alone, which also warns of few images."""
    if process.rank > 0:
        return None
    reference = read_statistics(ref)
    if len(reference.mu) != Inception.dim:
        raise ValueError(
            f"{ref}: must have the {Inception.dim} features of Inception-v3, got "
            f"{len(reference.mu)}; make it with tdkern fid ref"
        )
    if num is not None and num < 10000:
        click.echo(
            f"Warning: the FID of {num} images is biased upwards; 50000 are usual, 10000 the least "
            "to compare",
            err=True,
        )
    return reference


@contextmanager
def _images(
    dataset: ImageDataset, batch: int, workers: int, process: Process
) -> Iterator[Iterable]:
    """A process's batches of all images of a data set, while the context lasts.

    They do not depend on the number of processes.
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
    with _bar(loader, process) as bar:
        yield (images for images, _ in bar)


def _bar(batches: Iterable, process: Process) -> tqdm:
    """A progress bar, to be entered: one that is left open would stand before an error's line."""
    return tqdm(batches, unit="batch", leave=False, disable=process.rank > 0)


def _label(metrics: list[str], num: int, channels: int) -> str:
    titles = ", ".join(TITLES[name] for name in metrics)
    return f"{titles} of {num} images{' (grey, as RGB)' if channels == 1 else ''}"
