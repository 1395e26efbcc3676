"""Images as others keep them: folders, zips, CIFAR's pickles, lmdb, Hugging Face, WebDataset."""

import json
import os
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import labels as labels_of
from .source import MAX_IMAGE_FILE, DatasetError, left_out, open_source, read

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif")
LABEL_ENDINGS = (".cls", ".json")  # WebDataset's
LABELS = ("auto", "none", "file", "folders")


class Collection:
    """Images by number, each with a name and, where there are labels, a label.

    Attributes:
        names: of the images, in order.
        labels: of the images, classes or vectors; None where there are none.
        others: in words, what lies beside the images.
        sizes: bytes of the images' files, in order, where they are known before they are read.
    """

    names: list[str]
    labels: list | None = None
    sizes: Sequence[int] = ()
    others: str = ""

    def read(self, i: int) -> bytes | np.ndarray:
        """Image i: a file, or pixels [H, W, C] uint8."""
        raise NotImplementedError


class Files(Collection):
    """A folder or zip of image files.

    Labels are in dataset.json, or are the first folders of the names, numbered in their order.
    """

    def __init__(self, path: Path, labels: str):
        self.source = open_source(path)
        listing = self.source.listing()
        self.names = sorted(name for name in listing.sizes if name.lower().endswith(ENDINGS))
        self.sizes = [listing.sizes[name] for name in self.names]
        self.others = left_out(listing, ENDINGS)
        if labels == "file" or (labels == "auto" and "dataset.json" in listing.sizes):
            data = read(self.source, "dataset.json", labels_of.limit(len(listing.sizes)))
            if labels == "file" or json.loads(data).get("labels"):
                self.labels = _parsed(path, data, self.names)
        elif labels == "folders":
            self.labels = _folders(path, self.names)

    def read(self, i: int) -> bytes:
        return read(self.source, self.names[i], MAX_IMAGE_FILE)


def _parsed(path: Path, data: bytes, names: list[str]) -> list:
    try:
        return labels_of.parse(data, names).tolist()
    except ValueError as error:
        raise DatasetError(f"{path}: dataset.json: {error}") from error


def _folders(path: Path, names: list[str]) -> list[int]:
    folders = [name.partition("/")[0] for name in names if "/" in name]
    if len(folders) < len(names):
        raise DatasetError(
            f"{path}: labels by folders need every image in one; some are at the top"
        )
    number = {folder: i for i, folder in enumerate(sorted(set(folders)))}
    if len(number) == 1:
        raise DatasetError(
            f"{path}: labels by folders need two at the top; all images are in {folders[0]}"
        )
    return [number[folder] for folder in folders]


class Cifar(Collection):
    """CIFAR-10 or -100 in its Python version, a folder or a tar: pickles, read as data."""

    def __init__(self, path: Path, split: str):
        with tempfile.TemporaryDirectory() as folder:
            files = _cifar_files(path, Path(folder), split)
            parts = [_cifar_part(file) for file in files]
        self.images = np.concatenate([images for images, _ in parts])
        self.labels = [label for _, labels in parts for label in labels]
        self.names = [f"{split}/{i:05d}.png" for i in range(len(self.images))]

    def read(self, i: int) -> np.ndarray:
        return self.images[i].transpose(1, 2, 0)


CIFAR_FILES = {
    "train": (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "train",
    ),
    "test": ("test_batch", "test"),
}


def is_cifar(names: list[str]) -> bool:
    """Whether files of these names are CIFAR's."""
    found = {name.rpartition("/")[2] for name in names}
    return {"data_batch_1", "test_batch"} <= found or {"train", "test", "meta"} <= found


def _cifar_files(path: Path, folder: Path, split: str) -> list[Path]:
    """The files of a split, taken out of the tar where they are in one."""
    wanted = CIFAR_FILES[split]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.name in wanted and file.is_file())
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in wanted and member.isfile() and member.size <= MAX_IMAGE_FILE:
                content = archive.extractfile(member)
                assert content is not None  # which only what is no file has
                (folder / name).write_bytes(content.read())
    return sorted(folder.iterdir())


def _cifar_part(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images [N, 3, 32, 32] and labels of one of CIFAR's pickles."""
    from ..integrations.pickles import PickleFile

    file = PickleFile(path)
    try:
        pixels = file.array(file.value["data"])
        if pixels.dtype != np.uint8:
            raise ValueError(f"its data are {pixels.dtype}, not bytes")
        labels = file.plain(file.value.get("fine_labels", file.value.get("labels")))
        return pixels.reshape(len(labels), 3, 32, 32), [int(label) for label in labels]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DatasetError(f"{path}: is none of CIFAR's files ({error}); fetch it again") from error


class Lmdb(Collection):
    """An lmdb of image files by key, as LSUN's."""

    def __init__(self, path: Path):
        try:
            import lmdb
        except ModuleNotFoundError as error:
            raise DatasetError(f"{path}: an lmdb needs lmdb; run: pip install lmdb") from error
        self.path = path
        self.pid = None
        self.lmdb = lmdb
        with self._opened().begin() as transaction:
            self.keys = list(transaction.cursor().iternext(values=False))
        self.database.close()  # each process opens its own
        self.pid = None
        self.names = [key.decode(errors="backslashreplace") for key in self.keys]

    def _opened(self):
        if self.pid != os.getpid():  # lmdb must not be shared by a fork
            try:
                self.database = self.lmdb.open(str(self.path), readonly=True, lock=False)
            except self.lmdb.Error as error:
                raise DatasetError(f"{self.path}: not a readable lmdb ({error})") from error
            self.pid = os.getpid()
        return self.database

    def read(self, i: int) -> bytes:
        with self._opened().begin() as transaction:
            return bytes(transaction.get(self.keys[i]))


class HuggingFace(Collection):
    """A folder of Hugging Face `datasets.save_to_disk`, with a column of images, or classes too."""

    def __init__(self, path: Path, split: str):
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise DatasetError(
                f"{path}: a Hugging Face data set needs datasets; run: pip install datasets"
            ) from error
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise DatasetError(
                    f"{path}: has no split {split}, but {', '.join(table)}; give --split"
                )
            table = table[split]
        columns = {type(feature).__name__: name for name, feature in table.features.items()}
        if "Image" not in columns:
            raise DatasetError(f"{path}: has no column of images, but {', '.join(table.features)}")
        self.column = columns["Image"]
        self.table = table.cast_column(self.column, datasets.Image(decode=False))
        self.names = [f"{i:08d}" for i in range(len(table))]
        if "ClassLabel" in columns:
            self.labels = list(table[columns["ClassLabel"]])

    def read(self, i: int) -> bytes:
        image = self.table[i][self.column]
        return image["bytes"] or Path(image["path"]).read_bytes()


class Tar(Collection):
    """A tar in WebDataset's layout: files of one sample share their name up to the first dot."""

    def __init__(self, path: Path):
        self.path = path
        samples = {}
        others = 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    stem, _, ending = member.name.rpartition("/")[2].partition(".")
                    key = f"{member.name.rpartition('/')[0]}/{stem}".lstrip("/")
                    kind = f".{ending.lower()}"
                    if member.isfile() and (kind in ENDINGS or kind in LABEL_ENDINGS):
                        samples.setdefault(key, {})[kind] = (member.offset_data, member.size)
                    else:
                        others += member.isfile()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DatasetError(f"{path}: not a readable tar, not compressed ({error})") from error
        self.others = f"{others} of other endings" if others else ""
        self.names = sorted(
            key for key, parts in samples.items() if any(kind in ENDINGS for kind in parts)
        )
        self.parts = [samples[name] for name in self.names]
        found = [self._label(parts) for parts in self.parts]
        self.labels = found if found and None not in found else None

    def _file(self, place: tuple[int, int]) -> bytes:
        offset, size = place
        if size > MAX_IMAGE_FILE:
            raise DatasetError(f"{self.path}: a file of {size:,} bytes")
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def _label(self, parts: dict) -> int | list | None:
        try:
            if ".cls" in parts:
                return int(self._file(parts[".cls"]))
            if ".json" in parts:
                return json.loads(self._file(parts[".json"])).get("label")
        except (ValueError, AttributeError, RecursionError) as error:
            raise DatasetError(f"{self.path}: a label cannot be read ({error})") from error
        return None

    def read(self, i: int) -> bytes:
        return self._file(next(place for kind, place in self.parts[i].items() if kind in ENDINGS))


def open_collection(path: Path, labels: str = "auto", split: str = "train") -> Collection:
    """The images at a path, whatever keeps them; raises DatasetError.

    Args:
        path: a folder, a zip or a tar.
        labels: one of LABELS, for folders and zips.
        split: "train" or "test", where there are several.
    """
    collection = _opened(path, labels, split)
    if labels == "none":
        collection.labels = None
    if not collection.names:
        others = f" beside {collection.others}" if collection.others else ""
        raise DatasetError(f"{path}: no images in it{others}")
    return collection


def _opened(path: Path, labels: str, split: str) -> Collection:
    if path.is_dir():
        names = [entry.name for entry in os.scandir(path) if entry.is_file()]
        if "data.mdb" in names:
            return Lmdb(path)
        if {"state.json", "dataset_dict.json"} & set(names):
            return HuggingFace(path, split)
        if is_cifar(names):
            return Cifar(path, split)
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            first = [member for _, member in zip(range(20), archive, strict=False)]
        names = [member.name for member in first if member.isfile()]
        return Cifar(path, split) if is_cifar(names) else Tar(path)
    return Files(path, labels)
