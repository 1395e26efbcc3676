"""`tdkern dataset`."""

from pathlib import Path

import click
from tqdm import tqdm

from ..data.collect import LABELS, open_collection
from ..data.files import one_line
from ..data.pack import CHUNK, Settings, pack
from ..data.resize import FITS


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--size",
    type=click.IntRange(1, 4096),
    help="Height and width in pixels. [default: as they are]",
)
@click.option(
    "--fit",
    type=click.Choice(FITS),
    default="crop",
    show_default=True,
    help="How images become square: their edges are cut off, they are stretched, or only squares "
    "are taken.",
)
@click.option("--grey", is_flag=True, help="Make grey images in place of RGB.")
@click.option(
    "--labels",
    type=click.Choice(LABELS),
    default="auto",
    show_default=True,
    help="Where the labels of a folder or zip come from: its dataset.json (file), the folders that "
    "its images are in, or nowhere. auto: its dataset.json, if there is one.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="train",
    show_default=True,
    help="Which part of CIFAR or of a Hugging Face data set.",
)
@click.option(
    "--max-images",
    type=click.IntRange(min=1),
    help="Take only the first images, this many at most.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=2,
    show_default=True,
    help="Processes that decode and resize.",
)
def dataset(source, dest, size, fit, grey, labels, split, max_images, workers):
    """Make a data set for training from images in other formats.

    SOURCE is a folder or zip of images, CIFAR-10 or -100 for Python (its folder or tar.gz), an
    lmdb, a folder of Hugging Face's save_to_disk, or a tar in WebDataset's layout. DEST is a new
    .zip, which EDM reads too, or a new .npy file, which is larger and needs no decoding.

    Images are turned as EXIF says and resized by Lanczos' filter. What cannot be taken is left
    out, and reported with the reason. After a kill, the same call goes on where it stopped.

    \b
    tdkern dataset cifar-10-python.tar.gz cifar10.zip
    tdkern dataset photos/ photos-64.npy --size 64 --labels folders --workers 8
    """
    collection = open_collection(source, labels, split)
    settings = Settings(size, fit, grey)

    def progress(parts, total):
        return tqdm(parts, total=total, unit=f"x{CHUNK} img")

    report = pack(collection, dest, settings, workers=workers, most=max_images, progress=progress)
    for text in report.lines():
        click.echo(one_line(text))
    if collection.others:
        click.echo(one_line(f"not images: {collection.others}"))
    if collection.labels is None:
        click.echo("no labels")
