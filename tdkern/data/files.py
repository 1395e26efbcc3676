"""Files that are never half-written: written beside, made durable, then renamed."""
import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def beside(path: Path) -> Path:
    """Where the new version of `path` is written until it is whole; `training.checkpoint.clean` removes what a killed run left."""
    return path.with_name(f".{path.name}.tmp")


def write_atomic(path: str | Path, data: bytes, *, durable: bool = True) -> None:
    """Replace the file `path` by `data`; a kill at any moment leaves the old file or the new one.

    Args:
        path: in a directory that exists.
        data: the file's new content.
        durable: whether it must also survive a power cut; costs some milliseconds.
    """
    path = Path(path)
    with open(beside(path), "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(beside(path), path)
    if durable:
        sync_directory(path.parent)
