"""Files that are never half-written, and reads that are bounded whatever lies at a path."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

UNFINISHED = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?\.tmp", re.DOTALL)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without them
LISTED = 10  # words of a list in a message


def one_line(text: object) -> str:
    """Text that may come from a file, as one line: what does not print is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text).strip())


def brief(error: Exception) -> str:
    """An error's class and the beginning of its message, in one line whatever it holds."""
    return f"{type(error).__name__}: {one_line(str(error)[:100])}"


def first_of(words: list[str], most: int = LISTED) -> str:
    """A list in a message: its first words, and dots for the others."""
    others = ["..."] if len(words) > most else []
    return ", ".join([*words[:most], *others])


class FileError(ValueError):
    """A file that cannot be used: the message, of one line, names it and says what to do."""

    def __init__(self, message: object = ""):
        message = str(message)
        # DataLoader's, with a worker's whole traceback before ours
        if message.startswith("Caught "):
            last = message.strip().rpartition("\n")[2]
            message = last.partition("Error: ")[2] or last
        super().__init__(one_line(message))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def beside(path: Path) -> Path:
    """A name that nobody can foresee, where the new version of `path` is written until it is whole.

    `remove_leftovers` knows such names, and removes what a killed process left under them.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove(path: Path) -> None:
    """Remove a file or a folder; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, own: Callable[[str], object]) -> None:
    """Remove from a folder what killed processes left of files whose names are our own."""
    for path in folder.iterdir():
        match = UNFINISHED.fullmatch(path.name)
        if match and own(match["name"]):
            remove(path)


def open_new(path: Path, flags: int = os.O_WRONLY) -> int:
    """A descriptor of a file that was not there, and is not a link."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_atomic(path: str | Path, data: bytes, *, durable: bool = True) -> None:
    """Replace the file `path` by `data`; a kill at any moment leaves the old file or the new one.

    Args:
        path: in a directory that exists. A link there is replaced, not followed.
        data: the file's new content.
        durable: whether it must also survive a power cut; costs some milliseconds.
    """
    path = Path(path)
    if durable:
        remove_leftovers(path.parent, path.name.__eq__)
    unfinished = beside(path)
    try:
        with open(open_new(unfinished), "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a regular file, which is made where there is none; a link is not followed."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "a") as file:
        _check_regular(path, os.fstat(file.fileno()))
        file.write(line + "\n")


def _check_regular(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")


def check_file(path: str | Path, limit: int | None = None) -> None:
    """Raises OSError unless `path` is a regular file, of at most `limit` bytes; never waits."""
    status = os.stat(path)
    _check_regular(path, status)
    if limit is not None and status.st_size > limit:
        raise OSError(f"{path} has {status.st_size:,} bytes, more than the {limit:,} allowed")


def check_new(argument: str, path: Path) -> None:
    """Raises FileError where something is at a path that is to become a new file."""
    if path.exists():
        raise FileError(
            f"{argument} must not be there yet, got {path}; remove it or give another name"
        )


def read_file(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is larger, or is no regular file: a pipe is not waited for.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check_regular(path, os.fstat(file.fileno()))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"{path} has more than the {limit:,} bytes allowed")
    return data


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
