"""`tdkern fid`."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from tqdm import tqdm

from .._version import __version__
from ..data import DatasetError, ImageDataset
from ..data.files import one_line
from ..evaluation.detectors import Detector, key_of, make_detector
from ..evaluation.features import (
    kernel_distance,
    precision_recall_density_coverage,
    squared_mmd,
)
from ..evaluation.fid import (
    FeatureSums,
    Inception,
    Statistics,
    features_of,
    frechet_distance,
    read_features,
    read_statistics,
    write_statistics,
)
from ..evaluation.intervals import (
    frechet_floor,
    frechet_interval,
    kernel_floor,
    kernel_interval,
    some_images,
)
from ..evaluation.unfinished import Unfinished, add_up, default_folder, named
from ..families import default_sampler
from ..networks.saved import fingerprint
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
    metavar="NAME|FILE",
    help="What gives the features: a .safetensors file of tdkern detector train, the name of one "
    "that comes with tdkern, or torch-fidelity's weights of Inception-v3. [default: Inception-v3, "
    "of torch.hub's copy, else downloaded]",
)
with_state = click.option(
    "--state",
    metavar="DIR",
    help="Where a measurement that is not over is kept: killed, the same command goes on from it, "
    "in any number of processes. [default: ~/.cache/tdkern]",
)
with_metrics = click.option(
    "--metrics",
    metavar="LIST",
    help="Of fid, kid (kernel inception distance) and prdc (precision and recall, density and "
    "coverage); with another detector than Inception of frechet, kernel and prdc. All but the "
    "first need a reference of fid ref --features. [default: the first]",
)
with_bootstrap = click.option(
    "--bootstrap",
    type=click.IntRange(min=50),
    metavar="N",
    help="Add 95 % intervals of frechet and kernel from so many resamples, 200 say, and their "
    "noise floor. Not with Inception, of whose features a resample takes many seconds; needs a "
    "reference of fid ref --features.",
)
MEASURES = ("frechet", "kernel", "prdc")
TITLES = {"fid": "FID", "kid": "KID", "prdc": "precision, recall, density, coverage"}


@click.group()
def fid():
    """Frechet inception distance (FID) of images to reference statistics, and other distances.

    Compare only FIDs of as many images to one reference. With another --detector than Inception
    these are Frechet and kernel distances on its features, and no FIDs. For several GPUs: torchrun
    --standalone --nproc_per_node=8 -m tdkern.cli -- fid calc ...

    \b
    tdkern generate --network runs/00000-... --outdir images --seeds 0-49999 --subdirs
    tdkern fid ref --data cifar10-train-32x32.zip --dest cifar10.npz --features
    tdkern fid calc --images images --ref cifar10.npz --metrics fid,kid,prdc
    tdkern fid steps --network runs/00000-... --ref cifar10.npz --steps 4,6,9,12,18
    tdkern fid ref --data images.zip --dest own.npz --features --detector mine.safetensors
    tdkern fid calc --images images --ref own.npz --detector mine.safetensors --bootstrap 200
    """


@dataclass
class Measure:
    """What is asked for, and the reference, which the first process alone has."""

    measures: list[str]  # of MEASURES
    detector: Detector
    process: Process
    resamples: int | None  # None leaves out intervals and floors
    reference: Statistics | None = None
    real: torch.Tensor | None = None  # [N, dim], its features, where they are needed

    def __call__(self, sums: FeatureSums) -> dict[str, float]:
        """The numbers of images, by name; for the first process."""
        found = {}
        generated = torch.cat(sums.features) if self.needs_features else None
        if "frechet" in self.measures:
            found["frechet"] = frechet_distance(sums.statistics(), self.reference)
            if self.resamples:
                interval = frechet_interval(generated, self.reference, resamples=self.resamples)
                found |= {"frechet_low": interval.low, "frechet_high": interval.high}
        if "kernel" in self.measures:
            found |= self._kernel(generated)
        if "prdc" in self.measures:
            prdc = precision_recall_density_coverage(
                generated, self.real, device=self.process.device
            )
            found |= prdc._asdict()
        return self._named(found)

    @property
    def names(self) -> list[str]:
        return [key_of(measure, self.detector) for measure in self.measures]

    @property
    def needs_features(self) -> bool:
        return self.measures != ["frechet"] or bool(self.resamples)

    def floor(self, num: int) -> dict[str, float]:
        """The noise floor of the distances of so many images, by name; of the first process."""
        floors = {}
        if self.resamples and "frechet" in self.measures:
            floors["frechet"] = frechet_floor(self.real, num, splits=self.resamples)
        if self.resamples and "kernel" in self.measures:
            floors["kernel"] = kernel_floor(some_images(self.real), num, splits=self.resamples)
        found = {}
        for measure, floor in floors.items():
            found[f"{measure}_floor"] = floor.mean
            found |= {f"{measure}_floor_low": floor.low, f"{measure}_floor_high": floor.high}
        return self._named(found)

    def _kernel(self, generated: torch.Tensor) -> dict[str, float]:
        if self.detector.name == Inception.name:  # KID's subsets
            kid = kernel_distance(generated, self.real)
            return {"kernel": kid.mean, "kernel_std": kid.std}
        sets = some_images(generated), some_images(self.real)
        found = {"kernel": squared_mmd(*sets).item()}
        if self.resamples:
            interval = kernel_interval(*sets, resamples=self.resamples)
            found |= {"kernel_low": interval.low, "kernel_high": interval.high}
        return found

    def _named(self, found: dict[str, float]) -> dict[str, float]:
        return {key_of(name, self.detector): value for name, value in found.items()}


def _measure(
    metrics: str | None,
    ref: str,
    name: str | None,
    num: int,
    resamples: int | None,
    process: Process,
) -> Measure:
    """What flags ask for of `num` images; `name` is the detector's. Warns if they are too few."""
    detector = make_detector(name, process.device)
    if resamples and detector.name == Inception.name:
        raise click.UsageError(
            "--bootstrap needs a small detector: give --detector a file of tdkern detector train"
        )
    measure = Measure(_measures(metrics, detector), detector, process, resamples)
    if process.rank > 0:
        return measure
    measure.reference = read_statistics(ref, detector)
    if measure.needs_features:
        measure.real = read_features(ref)
    if "fid" in measure.names and num < 10000:
        click.echo(
            f"Warning: the FID of {num} images is biased upwards; 50000 are usual, 10000 the least "
            "to compare",
            err=True,
        )
    return measure


def _measures(metrics: str | None, detector: Detector) -> list[str]:
    """Those of MEASURES that a list names by their names with a detector; the first of None."""
    names = {key_of(measure, detector).partition("_")[0]: measure for measure in MEASURES}
    chosen = next(iter(names)) if metrics is None else metrics
    for name in chosen.split(","):
        if name not in names:
            raise click.UsageError(
                f"--metrics must be a list of {', '.join(names)} with the detector "
                f"{detector.name}, got {metrics!r}"
            )
    return [measure for name, measure in names.items() if name in chosen.split(",")]


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
@with_bootstrap
@with_batch
@with_workers
@with_detector
@with_state
def calc(images, ref, num, seed, metrics, bootstrap, batch, workers, detector, state):
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
        measure = _measure(metrics, ref, detector, num, bootstrap, process)
        _tell_left_out(dataset, process)
        run = Summing(measure.detector, measure.needs_features, num, batch, process, state)
        sums = run(partial(_images, dataset, workers), command="calc", images=dataset.fingerprint())
        if process.rank > 0:
            return
        found = measure(sums)
        label = _label(measure, num, dataset.image_shape[0])
        click.echo(f"{label} in {images} against {ref}:", err=True)
        if len(found) == 1:
            click.echo(f"{found[measure.names[0]]:g}")
        else:
            found |= measure.floor(num)
            _print_lines(found)
            about = {"images": images, "ref": ref, "detector": measure.detector.identity}
            click.echo(json.dumps(about | {"num": num, "seed": seed} | found))
        run.over()


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
    help="Also write all images' features, for all but fid and frechet; 4 bytes a feature of an "
    "image, 8 KB an image of Inception's.",
)
@with_batch
@with_workers
@with_detector
@with_state
def reference_statistics(data, dest, features, batch, workers, detector, state):
    """Write reference statistics: mean and covariance of all images' features."""
    with joined() as process:
        dataset = ImageDataset(data)
        extract = make_detector(detector, process.device)
        if process.rank == 0:
            Path(dest).parent.mkdir(parents=True, exist_ok=True)  # before the work
        _tell_left_out(dataset, process)
        run = Summing(extract, features, len(dataset), batch, process, state)
        sums = run(partial(_images, dataset, workers), command="ref", images=dataset.fingerprint())
        statistics = sums.statistics()
        if process.rank == 0:
            write_statistics(dest, statistics, torch.cat(sums.features) if features else None)
            run.over()
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
@with_bootstrap
@with_batch
@with_detector
@with_state
def steps(network, ref, steps, num, seed, sampler, metrics, bootstrap, batch, detector, state):
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
        measure = _measure(metrics, ref, detector, num, bootstrap, process)
        run = Summing(measure.detector, measure.needs_features, num, batch, process, state)
        inputs = {"network": meta["network"], "weights": fingerprint(net.state_dict())}
        label = _label(measure, num, meta["network"]["img_channels"])
        if process.rank == 0:
            click.echo(f"{label} of {network} against {ref}, {sampler}:", err=True)
        rows = []
        for count in steps:
            sigmas, options = sampling_levels(net, sampler, count)
            options |= choice(meta)
            inputs |= {"levels": [float(level) for level in sigmas], "options": options}
            options = options | {"sampler": SAMPLERS[sampler].sample}
            draw = partial(sample, net, meta["network"], sigmas=sigmas, **options)
            batches = partial(_drawn, draw, seed)
            sums = run(batches, command="steps", sampler=sampler, seed=seed, **inputs)
            if process.rank == 0:
                nfe = SAMPLERS[sampler].evaluations(len(sigmas) - 1)
                rows.append({"steps": count, "nfe": nfe} | measure(sums))
                _print_row(rows)
        if process.rank == 0:
            floor = measure.floor(num)
            _print_lines(floor)
            about = {"network": network, "ref": ref, "detector": measure.detector.identity}
            about |= {"sampler": sampler, "num": num, "seed": seed}
            click.echo(json.dumps(about | floor | {"results": rows}))
            run.over()


def _print_row(rows: list[dict]) -> None:
    """The last row of a table, and with the first one its head."""
    names = [name for name in rows[0] if name not in ("steps", "nfe")]
    if len(rows) == 1:
        titles = ["FID" if name == "fid" else name for name in names]
        click.echo(" ".join([f"{'steps':>5} {'NFE':>4}", *(f"{title:>10}" for title in titles)]))
    *_, row = rows
    numbers = [f"{row[name]:>{max(10, len(name))}.{4 if name == 'fid' else 6}f}" for name in names]
    click.echo(" ".join([f"{row['steps']:>5} {row['nfe']:>4}", *numbers]))


def _print_lines(found: dict[str, float]) -> None:
    width = max([9, *map(len, found)])
    for name, value in found.items():
        click.echo(f"{name:<{width}} {value:g}")


def _tell_left_out(dataset: ImageDataset, process: Process) -> None:
    if dataset.left_out and process.rank == 0:
        click.echo(one_line(f"Left out of {dataset.path}: {dataset.left_out}"), err=True)


Batches = Callable[[Process, list[torch.Tensor]], AbstractContextManager[Iterable[torch.Tensor]]]


class Summing:
    """Sums over the features of images, each kept in a file until `over`.

    Args:
        detector: whose features they are.
        keep: whether to keep the features too.
        num: of the images.
        batch: images at once.
        process: this one.
        state: the folder of the files; None is that of `default_folder`.
    """

    def __init__(
        self, detector: Detector, keep: bool, num: int, batch: int, process: Process, state
    ):
        self.detector, self.keep, self.num, self.batch = detector, keep, num, batch
        self.process, self.folder = process, Path(state) if state else default_folder()
        self.files: list[Unfinished] = []

    def __call__(self, batches: Batches, **inputs) -> FeatureSums:
        """The sums over all images of all processes.

        Args:
            batches: of some image numbers each, to be entered; this process's.
            inputs: what the images depend on, as JSON holds it.
        """
        rank, world, device = self.process
        inputs |= {"num": self.num, "batch": self.batch, "features": self.keep}
        inputs |= {"detector": self.detector.identity, "tdkern": __version__}
        path = named(self.folder, inputs) if rank == 0 else None
        self.files.append(Unfinished(path, inputs, tell))
        sums = FeatureSums(self.detector, device, keep=self.keep)
        self.files[-1].load(sums)
        numbers = torch.arange(self.num).split(self.batch)[-(-sums.count // self.batch) :]
        with batches(self.process, list(numbers[rank::world])) as own:
            features = (features_of(images, self.detector, device) for images in own)
            add_up(sums, features, -(-len(numbers) // world), self.files[-1].after_turn)
        self.files[-1].after_all(sums)
        return sums

    def over(self) -> None:
        """All is told: the files are not needed any more."""
        for file in self.files:
            file.remove()


def tell(text: str) -> None:
    """Print a line to stderr."""
    click.echo(one_line(text), err=True)


@contextmanager
def _images(
    dataset: ImageDataset, workers: int, process: Process, numbers: list[torch.Tensor]
) -> Iterator[Iterable]:
    """Batches of the images of these numbers of a data set, while the context lasts.

    It ends the readers, which an error's traceback would keep: they leave signals to this process,
    which at its end would wait for them for ever.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[some.tolist() for some in numbers],
        pin_memory=process.device.type == "cuda",
        **readers(workers),
    )
    with _bar(loader, process) as bar, closing(images for images, _ in bar) as batches:
        yield batches


@contextmanager
def _drawn(
    draw: Callable, seed: int, process: Process, numbers: list[torch.Tensor]
) -> Iterator[Iterable]:
    """Batches of the images that are drawn of `seed` plus these numbers, in the context."""
    with _bar(numbers, process) as bar:
        yield (draw(seeds=(some + seed).tolist()) for some in bar)


def _bar(batches: Iterable, process: Process) -> tqdm:
    """A progress bar, to be entered: one that is left open would stand before an error's line."""
    return tqdm(batches, unit="batch", leave=False, disable=process.rank > 0)


def _label(measure: Measure, num: int, channels: int) -> str:
    titles = ", ".join(TITLES.get(name, name) for name in measure.names)
    return f"{titles} of {num} images{' (grey, as RGB)' if channels == 1 else ''}"
