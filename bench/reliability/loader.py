"""Images a second of the loader: PNG zip, JPEG zip and packed array, by number of readers.

    PYTHONPATH=. python bench/reliability/loader.py DATA.zip bench/results/loader.json \\
        [--images 10000] [--batch 256]

DATA is a zip of images; all are made of it. Beside it stands how long the training loop waits for
the loader in a step of the tiny network of the tests, and of the CIFAR-10 preset.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

import PIL.Image
import torch
from torch.utils.data import DataLoader

from tdkern.data import ImageDataset, StepBatches
from tdkern.data.collect import open_collection
from tdkern.data.pack import Settings, pack
from tdkern.training import Options, Trainer
from tdkern.training.distributed import this_process
from tdkern.training.signals import readers


def as_jpeg(source: Path, dest: Path) -> Path:
    """The same images as JPEG files of quality 95."""
    with zipfile.ZipFile(source) as images, zipfile.ZipFile(dest, "w") as archive:
        for name in images.namelist():
            if name.endswith(".png"):
                file = io.BytesIO()
                PIL.Image.open(io.BytesIO(images.read(name))).save(file, "jpeg", quality=95)
                archive.writestr(name.replace(".png", ".jpg"), file.getvalue())
    return dest


def batches(dataset: ImageDataset, batch: int, steps: int, workers: int) -> DataLoader:
    """The training loop's loader."""
    order = StepBatches(len(dataset), batch, 0, 0, steps)
    return DataLoader(dataset, batch_sampler=order, **readers(workers))


def rate(path: Path, batch: int, workers: int, seconds: float = 1.5) -> float:
    """Images a second after the readers have started: the median of three."""
    rates = []
    for _ in range(3):
        loader = iter(batches(ImageDataset(path), batch, 10**6, workers))
        for _ in range(4):
            next(loader)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(loader)
            count += batch
        rates.append(count / (time.perf_counter() - began))
        del loader
    return round(statistics.median(rates))


def waits(path: Path, steps: int, workers: int, **options) -> dict:
    """How long a training step takes, and how much of it the loop waits for the loader."""
    trainer = Trainer(
        Options(data=str(path), workers=workers, duration=1.0, **options), this_process()
    )
    loader = iter(batches(trainer.dataset, trainer.options.batch, steps + 2, workers))
    waited, trained = [], []
    for _ in range(steps + 2):
        began = time.perf_counter()
        images, labels = next(loader)
        loaded = time.perf_counter()
        trainer.train_step(images, labels)
        waited.append(loaded - began)
        trained.append(time.perf_counter() - loaded)
    wait, train = statistics.median(waited[2:]), statistics.median(trained[2:])
    return {
        "images a second": round(trainer.options.batch / (wait + train), 1),
        "waiting, % of a step": round(100 * wait / (wait + train), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        png, npy = Path(folder, "a.zip"), Path(folder, "a.npy")
        for dest in (png, npy):
            pack(
                open_collection(args.data),
                dest,
                Settings(None, "none", False),
                workers=2,
                most=args.images,
            )
        files = {
            "PNG zip": png,
            "JPEG zip": as_jpeg(png, Path(folder, "b.zip")),
            "packed array": npy,
        }
        results = {
            "images": args.images,
            "shape": list(ImageDataset(png).image_shape),
            "batch": args.batch,
            "rates": {},
            "training": {},
        }
        for kind, path in files.items():
            results["rates"][kind] = {
                f"{workers} readers": rate(path, args.batch, workers) for workers in (0, 1, 2)
            }
            results["rates"][kind]["MB"] = round(path.stat().st_size / 1e6, 1)
            print(kind, results["rates"][kind], flush=True)
        tiny = {"cbase": 8, "cres": [1, 1], "batch": 64}
        for workers in (0, 1):
            for kind in ("PNG zip", "packed array"):
                results["training"][f"tiny network, {kind}, {workers} readers"] = waits(
                    files[kind], 20, workers, **tiny
                )
        results["training"]["CIFAR-10 preset, PNG zip, 1 readers"] = waits(png, 1, 1, batch=16)
        for name, found in results["training"].items():
            print(name, found)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
