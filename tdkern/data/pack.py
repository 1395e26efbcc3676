"""Data sets made of other collections of images: in parallel, resumable, with a report."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .collect import Collection
from .files import (
    beside,
    first_of,
    open_new,
    read_file,
    remove_leftovers,
    sync_directory,
    write_atomic,
)
from .resize import LeftOut, resized
from .source import DatasetError, packed_name

CHUNK = 500  # images that are made, and kept from being made again, together
SAMPLED = 100  # images whose content tells what is done from other work
MAX_PLAN = 1 << 16  # bytes
MAX_LISTED = 20  # images left out that the report names, of a reason


class Settings(NamedTuple):
    """How images become alike; see `resize.resized`."""

    size: int | None
    fit: str
    grey: bool


class Report(NamedTuple):
    """What became of a collection."""

    count: int  # type: ignore[assignment]  # images in the data set; tuple.count is not needed
    shape: tuple[int, int, int]
    left_out: dict[str, list[str]]  # names by reason

    def lines(self) -> list[str]:
        """In words."""
        total = sum(map(len, self.left_out.values()))
        lines = [f"{self.count} images {list(self.shape)}; {total} left out"]
        for reason, names in sorted(self.left_out.items()):
            some = first_of(names, MAX_LISTED)
            lines.append(f"{len(names)} {reason}: {some}")
        return lines


def pack(
    collection: Collection,
    dest: Path,
    settings: Settings,
    *,
    workers: int = 1,
    most: int | None = None,
    progress: Callable[[Iterator, int], Iterator] = lambda parts, total: parts,
) -> Report:
    """Make a data set of a collection.

    What is done is kept in DEST.partial until all is, so that a call that was killed goes on.

    Args:
        collection: the images.
        dest: a new .zip, in EDM's layout, or a .npy file of pixels [N, C, H, W] uint8, which
            training maps into memory; its labels are in a .json beside it.
        settings: how images become alike.
        workers: processes.
        most: images to take, the first; None takes all.
        progress: wraps the parts as they are done, and gets their number.

    Raises:
        DatasetError: `dest` or the file of its labels is there, no image is left, or what is done
            is of other images or settings.
    """
    if dest.suffix not in (".zip", ".npy"):
        raise DatasetError(f"{dest}: must end in .zip or .npy")
    partial_dir = dest.with_name(f"{dest.name}.partial")
    # labels beside what is not done yet are those of a call that was killed at its end
    with_labels = dest.suffix == ".npy" and not partial_dir.exists()
    for path in (dest, dest.with_suffix(".json")) if with_labels else (dest,):
        if path.exists():
            raise DatasetError(f"{path}: is there already; remove it or give another name")
    count = min(len(collection.names), most or len(collection.names))
    spans = [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    work = (collection, partial_dir, settings)
    with multiprocessing.get_context("fork").Pool(workers, _begin_work, work) as pool:
        _begin(partial_dir, pool.apply(_digest, (count,)), settings)
        remove_leftovers(dest.parent, dest.name.__eq__)  # of a call that was killed
        todo = [span for span in spans if not _part(partial_dir, span).exists()]
        for _ in progress(pool.imap(_make_part, todo), len(todo)):
            pass
    report = _join(partial_dir, spans, collection, dest)
    shutil.rmtree(partial_dir)
    return report


def _begin(folder: Path, images: str, settings: Settings) -> None:
    """Make the folder of parts, or see that the parts in it are of the same work.

    images: a hash of them.
    """
    plan = json.dumps({"images": images, **settings._asdict()}).encode()
    file = folder / "plan.json"
    if not folder.exists():
        folder.mkdir(parents=True)
        write_atomic(file, plan)
    elif not file.exists() or read_file(file, MAX_PLAN) != plan:
        raise DatasetError(
            f"{folder}: holds parts of other work; remove it, or give the images and flags of then"
        )


def _part(folder: Path, span: tuple[int, int]) -> Path:
    return folder / f"part-{span[0]:09d}.npz"


_work: tuple  # what all parts of a process are made of


def _begin_work(*work) -> None:
    """In a new process, keep what all its parts are made of."""
    global _work
    _work = work


def _digest(count: int) -> str:
    """A hash of the first images' names and sizes, and of what is in some of them: CIFAR-10's names
    are CIFAR-100's too.
    """
    collection, _, _ = _work
    names = "\0".join(collection.names[:count])
    digest = hashlib.sha256(f"{names}\0{collection.sizes[:count]}".encode(errors="surrogateescape"))
    for i in range(0, count, -(-count // SAMPLED)):
        with suppress(DatasetError):  # it will be left out
            content = collection.read(i)
            digest.update(content if isinstance(content, bytes) else content.tobytes())
    return digest.hexdigest()


def _make_part(span: tuple[int, int]) -> None:
    """Write the images of a span, as far as they can be taken, by their shape, with why the others
    cannot.
    """
    collection, folder, settings = _work
    numbers, images, left_out = {}, {}, []
    for i in range(*span):
        try:
            image = resized(collection.read(i), *settings)
        except (LeftOut, DatasetError) as error:
            left_out.append([i, str(error) if isinstance(error, LeftOut) else "not readable"])
            continue
        numbers.setdefault(image.shape, []).append(i)
        images.setdefault(image.shape, []).append(image)
    arrays = {}
    for k, shape in enumerate(images):
        arrays |= {f"pixels{k}": np.stack(images[shape]), f"numbers{k}": np.array(numbers[shape])}
    file = io.BytesIO()
    np.savez(file, **arrays, shapes=len(images), left_out=json.dumps(left_out))
    write_atomic(_part(folder, span), file.getvalue())


def _parts(folder: Path, spans: list[tuple[int, int]]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Of every part, and of every shape in it, the pixels and the numbers of their images."""
    for span in spans:
        with np.load(_part(folder, span), allow_pickle=False) as part:
            for k in range(part["shapes"]):
                yield part[f"pixels{k}"], part[f"numbers{k}"].tolist()


def _left_out(folder: Path, spans: list[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """The numbers of the images that cannot be taken, with the reason."""
    for span in spans:
        with np.load(_part(folder, span), allow_pickle=False) as part:
            yield from json.loads(str(part["left_out"]))


def _join(folder: Path, spans: list, collection: Collection, dest: Path) -> Report:
    """Write the data set of all parts: of the most common shape, if there are several."""
    left_out, shapes = {}, Counter()
    for i, reason in _left_out(folder, spans):
        left_out.setdefault(reason, []).append(collection.names[i])
    for pixels, numbers in _parts(folder, spans):
        shapes[pixels.shape[1:]] += len(numbers)
    if not shapes:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
        raise DatasetError(f"{dest}: no image is left: {reasons}")
    shape = shapes.most_common(1)[0][0]
    kept = []
    for pixels, numbers in _parts(folder, spans):
        if pixels.shape[1:] == shape:
            kept += numbers
        else:
            reason = f"of the size {pixels.shape[3]}x{pixels.shape[2]}"
            left_out.setdefault(reason, []).extend(collection.names[i] for i in numbers)
    chosen = (pixels for pixels, _ in _parts(folder, spans) if pixels.shape[1:] == shape)
    labels = None if collection.labels is None else [collection.labels[i] for i in kept]
    write = _write_zip if dest.suffix == ".zip" else _write_npy
    write(dest, chosen, len(kept), shape, labels)
    return Report(len(kept), shape, left_out)


def _table(labels: list | None) -> bytes:
    """dataset.json."""
    pairs = None if labels is None else [[packed_name(i), label] for i, label in enumerate(labels)]
    return json.dumps({"labels": pairs}).encode()


def _png(image: np.ndarray) -> bytes:
    """An image [C, H, W] as a PNG file."""
    import PIL.Image

    png = io.BytesIO()
    array = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    PIL.Image.fromarray(array).save(png, format="png", compress_level=4)
    return png.getvalue()


def _write_zip(dest: Path, parts: Iterator, count: int, shape: tuple, labels: list | None) -> None:
    unfinished, images = beside(dest), chain.from_iterable(parts)
    try:
        with open(open_new(unfinished), "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for i, image in enumerate(images):
                    archive.writestr(packed_name(i), _png(image))
                archive.writestr("dataset.json", _table(labels))
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, dest)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(dest.parent)


def _write_npy(dest: Path, parts: Iterator, count: int, shape: tuple, labels: list | None) -> None:
    unfinished = beside(dest)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    try:
        with open(open_new(unfinished), "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for pixels in parts:
                file.write(np.ascontiguousarray(pixels).data)
            file.flush()
            os.fsync(file.fileno())
        write_atomic(dest.with_suffix(".json"), _table(labels))
        os.rename(unfinished, dest)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(dest.parent)
