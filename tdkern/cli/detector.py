"""`tdkern detector`."""

import json
import shlex
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from .._version import __version__
from ..data import DatasetError, ImageDataset
from ..data.files import check_new, one_line
from ..evaluation.classifier import accuracy, train_classifier
from ..evaluation.detectors import (
    BUILT_IN,
    NAME,
    TrainedDetector,
    round_weights,
    write_detector,
)
from ..training.distributed import this_process


@click.group()
def detector():
    """Small classifiers, whose features tdkern fid --detector compares images in.

    \b
    tdkern detector train --data cifar10-train-32x32.zip --test cifar10-test-32x32.zip \\
        --dest mine.safetensors
    tdkern detector test --detector mine.safetensors --data cifar10-test-32x32.zip
    tdkern fid ref --data cifar10-train-32x32.zip --dest ref.npz --detector mine.safetensors
    """


@detector.command()
@click.option(
    "--data", required=True, metavar="DIR|ZIP", help="Images with classes, to be trained on."
)
@click.option("--test", required=True, metavar="DIR|ZIP", help="Others, whose accuracy is stated.")
@click.option(
    "--dest",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A new .safetensors file; its name is the detector's.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Passes over the images.",
)
@click.option(
    "--width",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Channels of the first layer; four times as many are the features.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the weights, the order of the images and their augmentation.",
)
def train(data, test, dest, epochs, width, seed):
    """Train a detector: a small convolutional network that tells the classes of images apart.

    The file holds its accuracy, the command and the seed too. The same command makes the same file
    on one machine, on the CPU with one number of threads (OMP_NUM_THREADS).
    """
    if dest.suffix != ".safetensors" or not NAME.fullmatch(dest.stem):
        raise click.UsageError(
            f"--dest must end in .safetensors and be named in letters, digits, _ and -, got {dest}"
        )
    check_new("--dest", dest)
    images, labels = _classes_of(data)
    others, classes = _classes_of(test)
    if others.shape[1:] != images.shape[1:] or classes.max() > labels.max():
        raise DatasetError(
            f"{test}: must have images {list(images.shape[1:])} of the {labels.max() + 1} classes "
            f"of {data}, got {list(others.shape[1:])} of {classes.max() + 1}"
        )
    dest.parent.mkdir(parents=True, exist_ok=True)  # before the work
    with tqdm(unit="step", leave=False) as bar:
        net = train_classifier(images, labels, width=width, epochs=epochs, seed=seed, bar=bar)
    round_weights(net)
    flags = {"data": Path(data).name, "test": Path(test).name, "dest": dest.name}
    flags |= {"epochs": str(epochs), "width": str(width), "seed": str(seed)}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    record = {
        "name": dest.stem,
        "width": width,
        "classes": net.head.out_features,
        "resolution": images.shape[2],
        "accuracy": accuracy(net, others, classes),
        "test_images": len(others),
        "train_images": len(images),
        "command": shlex.join(["tdkern", "detector", "train", *words]),
        "seed": seed,
        "versions": {"tdkern": __version__, "torch": torch.__version__},
    }
    write_detector(dest, net, record)
    count = sum(parameter.numel() for parameter in net.parameters())
    size = f"{dest}: {count:,} weights in {dest.stat().st_size:,} bytes"
    click.echo(f"{size}, {_stated(record['accuracy'], len(others))}")


@detector.command()
@click.option(
    "--detector",
    "source",
    required=True,
    metavar="NAME|FILE",
    help="A file of tdkern detector train, or the name of one that comes with tdkern.",
)
@click.option("--data", required=True, metavar="DIR|ZIP", help="Images with classes.")
def test(source, data):
    """Measure a detector's accuracy, and show its file's record as JSON."""
    trained = TrainedDetector(BUILT_IN.get(source, source), this_process().device)
    images, classes = _classes_of(data)
    click.echo(json.dumps(trained.record, indent=1))
    click.echo(_stated(accuracy(trained.net, images, classes), len(images)))


def _classes_of(path: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] uint8 and their classes [N] int64 of a data set, where training is."""
    dataset = ImageDataset(path, use_labels=True)
    if dataset.labels.ndim != 1:
        raise DatasetError(f"{path}: has vectors for labels; a detector is trained on classes")
    if dataset.left_out:
        click.echo(one_line(f"Left out of {path}: {dataset.left_out}"), err=True)
    bar = tqdm(range(len(dataset)), unit="img", leave=False)
    with bar:
        images = torch.stack([dataset[i][0] for i in bar]).expand(-1, 3, -1, -1)
    device = this_process().device
    return images.to(device), torch.from_numpy(dataset.labels).long().to(device)


def _stated(share: float, count: int) -> str:
    return f"accuracy {100 * share:.2f} % of {count:,} test images"
