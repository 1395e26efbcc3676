"""The files of a data set, in a folder or a zip: which there are, and what is in them."""

import hashlib
import lzma
import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import FileError, check_file, read_file

EXTENSIONS = (".png", ".jpg", ".jpeg")
MAX_IMAGE_FILE = 1 << 28  # bytes
# what lies beside images and belongs to them: their labels, and how tdkern generate drew them
BESIDE = ("dataset.json", "generate.json")
# folders of systems, not of users
SERVICE = (
    "__MACOSX",
    "@eaDir",
    "@Recycle",
    "$RECYCLE.BIN",
    "lost+found",
)
SAMPLED = 1000  # files whose content a fingerprint covers


class DatasetError(FileError):
    """A data set that cannot be used; the message names the file and says what to do."""


class Listing(NamedTuple):
    """What a folder or zip holds."""

    sizes: dict[str, int]  # bytes of each file that is no image of a hidden place, by name
    hidden: int  # files left out because their name, or that of a folder above, is hidden


def is_image(name: str) -> bool:
    """Whether a file's ending is that of an image."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Whether a part of a path is hidden, or a folder in which a system keeps its own files."""
    return any(part.startswith(".") or part in SERVICE for part in name.split("/"))


def left_out(listing: Listing, wanted: tuple[str, ...] = EXTENSIONS) -> str:
    """In words, the files that are no images, by their endings; empty if there are none."""
    others = [
        name
        for name in listing.sizes
        if not name.lower().endswith(wanted) and name.rpartition("/")[2] not in BESIDE
    ]
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in others)
    words = [f"{count} {ending}" for ending, count in sorted(endings.items())][:10]
    words += [f"{listing.hidden} hidden"] if listing.hidden else []
    return ", ".join(words)


class Folder:
    """The files of a folder. Links to folders are followed once each."""

    def __init__(self, path: Path):
        self.path = path

    def listing(self) -> Listing:
        """Raises DatasetError for what cannot be read: half a data set is not one."""
        sizes, hidden = {}, 0
        for name, entry in self._walk():
            if is_hidden(name):
                hidden += 1
                continue
            try:
                status = os.stat(entry)
            except OSError as error:
                if not is_image(name):
                    continue
                raise DatasetError(
                    f"{self.path}: {name} cannot be read ({error}); remove or restore it"
                ) from error
            if not stat.S_ISREG(status.st_mode) and is_image(name):
                raise DatasetError(f"{self.path}: {name} is not a regular file; remove it")
            sizes[name] = status.st_size
        return Listing(sizes, hidden)

    def _walk(self) -> Iterator[tuple[str, str]]:
        """The name and path of every file; a hidden folder is not entered, and counts as one."""
        seen, todo = set(), [""]
        while todo:
            folder = todo.pop()
            try:
                status = os.stat(self.path / folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(self.path / folder), key=lambda entry: entry.name)
            except OSError as error:
                raise DatasetError(
                    f"{self.path}: the folder {folder or '.'} cannot be read ({error}); "
                    "allow it, or remove it"
                ) from error
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir() and not is_hidden(name):
                    todo.append(name)
                else:
                    yield name, entry.path

    def read(self, name: str, limit: int) -> bytes:
        """A file's content, of at most `limit` bytes."""
        return read_file(self.path / name, limit)

    def checksum(self, name: str) -> int:
        """The CRC-32 of a file's content."""
        return zlib.crc32(self.read(name, MAX_IMAGE_FILE))


class Zip:
    """The files of a zip; every process opens its own."""

    def __init__(self, path: Path):
        self.path = path
        self._file: zipfile.ZipFile | None = None
        self._pid: int | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None, "_pid": None}

    def opened(self) -> zipfile.ZipFile:
        """This process' zip: a forked one would share its parent's place in the file."""
        if self._file is None or self._pid != os.getpid():
            try:
                if not stat.S_ISREG(os.stat(self.path).st_mode):
                    raise OSError("it is not a regular file")
                self._file = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise DatasetError(
                    f"{self.path}: not a readable zip ({error}); fetch or make it again"
                ) from error
            self._pid = os.getpid()
        return self._file

    def listing(self) -> Listing:
        """Raises DatasetError where two files have one name."""
        sizes, hidden = {}, 0
        for info in self.opened().infolist():
            if info.is_dir():
                continue
            if is_hidden(info.filename):
                hidden += 1
            elif info.filename in sizes:
                raise DatasetError(f"{self.path}: holds {info.filename} twice; make the zip again")
            else:
                sizes[info.filename] = info.file_size
        return Listing(sizes, hidden)

    def read(self, name: str, limit: int) -> bytes:
        """A file's content, of at most `limit` bytes."""
        size = self.opened().getinfo(name).file_size
        if size > limit:
            raise OSError(f"it has {size:,} bytes, more than the {limit:,} allowed")
        return self.opened().read(name)

    def checksum(self, name: str) -> int:
        """The CRC-32 of a file's content, as the zip says."""
        return self.opened().getinfo(name).CRC


class Packed:
    """Pixels in a .npy file [N, C, H, W] uint8, mapped into memory; labels in a .json beside it."""

    def __init__(self, path: Path):
        self.path = path
        self._array: np.ndarray | None = None
        self._pid: int | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None, "_pid": None}

    @property
    def array(self) -> np.ndarray:
        """This process' view of the file."""
        if self._array is None or self._pid != os.getpid():
            try:
                check_file(self.path)
                self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except (
                OSError,
                ValueError,
                EOFError,
                SyntaxError,
                MemoryError,
                RecursionError,
            ) as error:
                raise DatasetError(
                    f"{self.path}: not a readable .npy file ({error}); "
                    "make it again by tdkern dataset"
                ) from error
            self._pid = os.getpid()
        return self._array

    def listing(self) -> Listing:
        """As many names as the file has images."""
        array = self.array
        if (
            array.dtype != np.uint8
            or array.ndim != 4
            or array.shape[1] not in (1, 3)
            or array.shape[2] != array.shape[3]
        ):
            raise DatasetError(
                f"{self.path}: must be [N, 1 or 3, H, H] uint8, got {list(array.shape)} "
                f"{array.dtype}; tdkern dataset makes such files"
            )
        sizes = {packed_name(i): array[0].nbytes for i in range(len(array))}
        labels = self.path.with_suffix(".json")
        return Listing(
            sizes | ({"dataset.json": labels.stat().st_size} if labels.exists() else {}), 0
        )

    def image(self, name: str) -> np.ndarray:
        """The pixels of an image."""
        return self.array[int(name.rpartition("img")[2].partition(".")[0])].copy()

    def read(self, name: str, limit: int) -> bytes:
        """The labels, which are the only file."""
        return read_file(self.path.with_suffix(".json"), limit)

    def checksum(self, name: str) -> int:
        """The CRC-32 of an image's pixels."""
        return zlib.crc32(self.image(name).data)


def packed_name(i: int) -> str:
    """Image i's name in EDM's layout."""
    return f"{i // 1000:05d}/img{i:08d}.png"


Source = Folder | Zip | Packed

# what comes of a file or zip that is damaged, gone or not allowed
UNREADABLE = (
    OSError,
    KeyError,
    EOFError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def read(source: Source, name: str, limit: int) -> bytes:
    """A file's content, of at most `limit` bytes; raises DatasetError."""
    try:
        return source.read(name, limit)
    except DatasetError:
        raise
    except UNREADABLE as error:
        raise DatasetError(
            f"{source.path}: {name} cannot be read ({error}); fetch or make the data set again"
        ) from error


def open_source(path: Path) -> Source:
    """The folder, zip or .npy file at a path; raises DatasetError if there is none."""
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise DatasetError(f"{path}: no such folder or zip")
    return Packed(path) if path.suffix == ".npy" else Zip(path)


def fingerprint(source: Source, sizes: dict[str, int], names: list[str], labels: bytes) -> str:
    """A hash of the files' names and sizes, of labels, and of what is in up to 1000 of the files.

    The same for a folder and for a zip of it, whatever the zip's compression.
    """
    digest = hashlib.sha256(labels)
    every = -(-len(names) // SAMPLED)
    for i, name in enumerate(names):
        checksum = 0
        if i % every == 0:
            try:
                checksum = source.checksum(name)
            except UNREADABLE as error:
                raise DatasetError(
                    f"{source.path}: {name} cannot be read ({error}); "
                    "fetch or make the data set again"
                ) from error
        digest.update(f"{name}\0{sizes[name]}\0{checksum}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
