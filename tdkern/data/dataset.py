"""EDM's image data sets: a folder or a zip of PNG and JPEG files, with labels in dataset.json."""
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .order import derive_seed

EXTENSIONS = (".png", ".jpg", ".jpeg")


class DatasetError(ValueError):
    """A data set that cannot be used; the message names the file and says what to do."""


class ImageDataset(torch.utils.data.Dataset):
    """A folder or zip of square RGB or grey images of one size, sorted by name, in EDM's layout.

    dataset.json, if there, is {"labels": [[name, label], ...]} or {"labels": null}; a label is a class (an integer,
    given out one-hot) or a vector of numbers.

    Args:
        path: the folder or zip.
        use_labels: give out labels; without it they have no elements.
        xflip: add every image's mirror image; index n + i is the mirror of i.
        max_size: keep this many images, chosen by `seed`; None keeps all.
        seed: chooses the images kept.

    Item: (image [C, H, W] uint8, label [label_dim] float32). Deterministic. Works in DataLoader's worker processes.

    Raises:
        DatasetError: the path, dataset.json or, when it is reached, an image cannot be used.
    """

    def __init__(self, path: str | Path, *, use_labels: bool = False, xflip: bool = False, max_size: int | None = None, seed: int = 0):
        self.path, self.xflip = Path(path), xflip
        self._zip, self._zip_pid = None, None
        self.names = sorted(name for name in self._files() if name.lower().endswith(EXTENSIONS) and not name.rpartition("/")[2].startswith("."))
        if not self.names:
            raise DatasetError(f"{self.path}: no {', '.join(EXTENSIONS)} file in it; give the folder or zip that holds the images")
        if max_size is not None:
            if max_size < 1:
                raise DatasetError(f"ImageDataset: max_size must be at least 1, got {max_size}")
            kept = torch.randperm(len(self.names), generator=torch.Generator().manual_seed(derive_seed(seed, "subset")))[:max_size]
            self.names = [self.names[i] for i in kept.sort().values]
        self.labels = self._read_labels() if use_labels else np.zeros((len(self.names), 0), np.float32)
        self.label_dim = self.labels.shape[1] if self.labels.ndim == 2 else int(self.labels.max()) + 1
        self.image_shape = None
        self.image_shape = self._read_image(0).shape

    @property
    def name(self) -> str:
        """The data set's name in run directories: the folder's or zip's, without .zip."""
        return self.path.resolve().name.removesuffix(".zip")

    def __len__(self) -> int:
        return len(self.names) * (2 if self.xflip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"ImageDataset: index must be in 0 .. {len(self) - 1}, got {index}")  # which also ends a for loop over the images
        mirrored, raw = divmod(index, len(self.names))
        image, label = self._read_image(raw), self.labels[raw]
        if self.labels.ndim == 1:
            label = np.eye(1, self.label_dim, label, dtype=np.float32)[0]
        return torch.from_numpy(image[:, :, ::-1].copy() if mirrored else image), torch.from_numpy(label)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None, "_zip_pid": None}

    def _files(self) -> list[str]:
        if self.path.is_dir():
            return [file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()]
        if not self.path.exists():
            raise DatasetError(f"{self.path}: no such folder or zip")
        return self._open_zip().namelist()

    def _open_zip(self) -> zipfile.ZipFile:
        if self._zip_pid != os.getpid():  # a forked worker shares the parent's file offset, so each process opens its own
            try:
                self._zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise DatasetError(f"{self.path}: not a readable zip ({error}); fetch or make it again") from error
            self._zip_pid = os.getpid()
        return self._zip

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes() if self.path.is_dir() else self._open_zip().read(name)
        except (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise DatasetError(f"{self.path}: {name} cannot be read ({error}); fetch or make the data set again") from error

    def _read_image(self, raw: int) -> np.ndarray:
        import PIL.Image

        name = self.names[raw]
        data = self._read(name)
        try:
            with PIL.Image.open(io.BytesIO(data)) as file:
                mode, image = file.mode, np.array(file)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # all that Pillow raises for a broken file
            raise DatasetError(f"{self.path}: {name} is not a readable image ({error}); remove or replace it") from error
        if mode not in ("RGB", "L"):
            raise DatasetError(f"{self.path}: {name} must be RGB or grey with 8 bits a channel, got Pillow mode {mode}; convert it")
        image = image[None] if mode == "L" else image.transpose(2, 0, 1).copy()
        if image.shape[1] != image.shape[2]:
            raise DatasetError(f"{self.path}: {name} must be square, got {image.shape[2]}x{image.shape[1]}; crop or resize the images")
        if self.image_shape is not None and image.shape != self.image_shape:
            raise DatasetError(f"{self.path}: {name} must have {self.names[0]}'s shape {list(self.image_shape)}, got {list(image.shape)}; make all alike")
        return image

    def _read_labels(self) -> np.ndarray:
        """Classes, int64 [N], or vectors, float32 [N, label_dim]."""
        data = self._read("dataset.json")
        try:
            table = {name.replace("\\", "/"): label for name, label in json.loads(data)["labels"] or ()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f'{self.path}: dataset.json must be {{"labels": [[name, label], ...]}} ({type(error).__name__}: {error})') from error
        if not table:
            raise DatasetError(f"{self.path}: dataset.json has no labels; train without labels or add them")
        missing = [name for name in self.names if name not in table]
        if missing:
            raise DatasetError(f"{self.path}: dataset.json has no label for {missing[0]} and {len(missing) - 1} more; add them")
        labels = [table[name] for name in self.names]
        if all(type(label) is int and label >= 0 for label in labels):
            return np.array(labels, np.int64)
        if all(type(label) is list and len(label) == len(labels[0]) > 0 and all(type(x) in (int, float) for x in label) for label in labels):
            return np.array(labels, np.float32)
        raise DatasetError(f"{self.path}: dataset.json: labels must all be classes (integers from 0) or all vectors of one length")
