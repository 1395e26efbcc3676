"""EDM's image data sets: a folder or zip of PNG and JPEG files and dataset.json; or packed."""

import math
import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import labels as labels_of
from .decode import ImageError, decode
from .order import derive_seed
from .source import (
    EXTENSIONS,
    MAX_IMAGE_FILE,
    DatasetError,
    Packed,
    fingerprint,
    is_image,
    left_out,
    open_source,
    read,
)

__all__ = ["DatasetError", "ImageDataset"]


def _shared(*shape: int) -> np.ndarray:
    """Bytes that are 0, shared with the processes that are forked from this one.

    Not by torch, whose shared memory is a file in /dev/shm, of which containers have little.
    """
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)


class ImageDataset(torch.utils.data.Dataset):
    """A folder or zip of square RGB or grey images of one size, sorted by name, in EDM's layout.

    dataset.json, if there, is {"labels": [[name, label], ...]} or {"labels": null}; a label is a
    class (an integer, given out one-hot) or a vector of numbers.

    Hidden files and what lies in hidden folders are no part of it. Links to folders are followed.
    What cannot be read is an error, and so is an image that says more than its pixels do: of 16
    bits, turned by EXIF, with a transparent colour or several frames.

    Args:
        path: the folder or zip; or a .npy file of `tdkern dataset`, which is mapped into memory.
        use_labels: give out labels; without it they have no elements.
        xflip: add every image's mirror image; index n + i is the mirror of i.
        cache: keep the decoded images in memory, which forked worker processes share. What is
            mapped into memory needs none.
        max_size: keep this many images, chosen by `seed`; None keeps all.
        seed: chooses the images kept.

    Attributes:
        names: the images'.
        left_out: in words, the files that are no images.
        classes: those that have images; None if all of 0 .. label_dim - 1 do; [] where labels are
            vectors.

    Item: (image [C, H, W] uint8, label [label_dim] float32). Deterministic. Works in DataLoader's
    worker processes.

    Raises:
        DatasetError: the path, dataset.json or, when it is reached, an image cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        use_labels: bool = False,
        xflip: bool = False,
        cache: bool = False,
        max_size: int | None = None,
        seed: int = 0,
    ):
        self.path, self.xflip = Path(path), xflip
        self._source = open_source(self.path)
        listing = self._source.listing()
        self.left_out = left_out(listing)
        self.names = sorted(filter(is_image, listing.sizes))
        if not self.names:
            others = f" beside {self.left_out}" if self.left_out else ""
            raise DatasetError(
                f"{self.path}: no {', '.join(EXTENSIONS)} file in it{others}; "
                "give the folder or zip that holds the images"
            )
        if max_size is not None:
            if max_size < 1:
                raise DatasetError(f"ImageDataset: max_size must be at least 1, got {max_size}")
            generator = torch.Generator().manual_seed(derive_seed(seed, "subset"))
            kept = torch.randperm(len(self.names), generator=generator)[:max_size]
            self.names = [self.names[i] for i in kept.sort().values]
        self._sizes = {name: listing.sizes[name] for name in self.names}
        self.labels = np.zeros((len(self.names), 0), np.float32)
        if use_labels:
            self.labels = self._read_labels(listing.sizes)
        vectors = self.labels.ndim == 2
        self.label_dim = self.labels.shape[1] if vectors else int(self.labels.max()) + 1
        self.image_shape = None
        self._cached: dict[str, np.ndarray] | None = None
        self.image_shape = self._read_image(0).shape
        if cache and not isinstance(self._source, Packed):
            count = len(self.names)
            self._cached = {"there": _shared(count), "images": _shared(count, *self.image_shape)}

    @property
    def name(self) -> str:
        """The data set's name in run directories: the folder's or file's, without .zip or .npy."""
        return self.path.resolve().name.removesuffix(".zip").removesuffix(".npy")

    @property
    def classes(self) -> list[int] | None:
        """The classes that have images; None if all have, [] where labels are vectors."""
        if self.label_dim == 0:
            return None
        if self.labels.ndim == 2:
            return []
        found = np.unique(self.labels).tolist()
        return None if len(found) == self.label_dim else found

    def fingerprint(self) -> str:
        """A hash that is another where the images or labels are others."""
        return fingerprint(self._source, self._sizes, self.names, self.labels.tobytes())

    def __len__(self) -> int:
        return len(self.names) * (2 if self.xflip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):  # which also ends a for loop over the images
            raise IndexError(f"ImageDataset: index must be in 0 .. {len(self) - 1}, got {index}")
        mirrored, raw = divmod(index, len(self.names))
        image, label = self._read_image(raw), self.labels[raw]
        if self.labels.ndim == 1:
            label = np.zeros(self.label_dim, np.float32)
            label[self.labels[raw]] = 1
        if mirrored:
            image = image[:, :, ::-1].copy()
        return torch.from_numpy(image), torch.from_numpy(label)

    def _read_image(self, raw: int) -> np.ndarray:
        if self._cached is None:
            return self._decoded(raw)
        if not self._cached["there"][raw]:
            self._cached["images"][raw] = self._decoded(raw)
            self._cached["there"][raw] = 1
        return self._cached["images"][raw].copy()

    def _decoded(self, raw: int) -> np.ndarray:
        name = self.names[raw]
        if isinstance(self._source, Packed):
            return self._source.image(name)
        data = read(self._source, name, MAX_IMAGE_FILE)
        try:
            return decode(data, self.image_shape, self.names[0])
        except ImageError as error:
            raise DatasetError(f"{self.path}: {name} {error}") from error

    def _read_labels(self, sizes: dict[str, int]) -> np.ndarray:
        """Classes, int64 [N], or vectors, float32 [N, label_dim]."""
        if "dataset.json" not in sizes:
            elsewhere = next((name for name in sizes if name.endswith("/dataset.json")), None)
            found = f"; it must not be in {elsewhere.rpartition('/')[0]}" if elsewhere else ""
            raise DatasetError(
                f"{self.path}: dataset.json cannot be read: there is none at the top{found}; "
                "add it, or train without labels"
            )
        data = read(self._source, "dataset.json", labels_of.limit(len(sizes)))
        try:
            return labels_of.parse(data, self.names)
        except ValueError as error:
            colon = ": " if str(error).startswith("labels") else " "
            raise DatasetError(f"{self.path}: dataset.json{colon}{error}") from error
