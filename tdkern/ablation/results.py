"""The results file: JSON lines, each whole or left out, of one writer at a time."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._version import __version__
from ..data.files import NO_LOCKS, FileError, read_file

LIMIT = 1 << 28  # bytes of a results file
# what a line may be, and the names that it then has with their types
KINDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "table": {
        "table": str,
        "problem": str,
        "budget": str,
        "confirm": bool,
        "rows": dict,
        "seeds": list,
    },
    "cost": {"baseline": str, "costs": dict},
    "job": {"key": str, "seed": int, "measures": dict, "setting": dict},
    "failed": {"key": str, "seed": int, "error": str},
}


def read_results(path: Path) -> tuple[list[dict], list[int]]:
    """The lines of a results file, and the numbers of those that are none.

    A kill may leave the last line torn, and what was added behind it stands in a line of its own.

    Raises:
        OSError: it cannot be read, or is larger than LIMIT.
        FileError: nothing in it is a line of results.
    """
    lines, wrong = [], []
    for number, text in enumerate(read_file(path, LIMIT).decode(errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        line = _line_of(text)
        if line is None:
            wrong.append(number)
        else:
            lines.append(line)
    if wrong and not lines:
        raise FileError(f"{path}: holds no results of tdkern ablate; give another file")
    return lines, wrong


def _line_of(text: str) -> dict | None:
    """What a line says; None if it is not one of ours."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    names = KINDS.get(line["kind"])
    if names is None or not all(isinstance(line.get(name), kind) for name, kind in names.items()):
        return None
    return line


class Results:
    """A results file that is written to.

    Attributes:
        lines: what it holds.
        wrong: the numbers of its lines that hold nothing.
    """

    def __init__(self, path: Path, descriptor: int):
        self.path, self.descriptor = path, descriptor
        self.lines, self.wrong = read_results(path)

    def append(self, line: dict) -> None:
        """Add a line, on the disk when this returns; a kill leaves it whole or torn at the end."""
        versions = {"tdkern": __version__}
        data = json.dumps(line | versions, allow_nan=False).encode() + b"\n"
        if self._is_torn():
            data = b"\n" + data
        written = os.write(self.descriptor, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self.descriptor)
        self.lines.append(line)

    def _is_torn(self) -> bool:
        size = os.fstat(self.descriptor).st_size
        return size > 0 and os.pread(self.descriptor, 1, size - 1) != b"\n"


@contextmanager
def opened(path: Path) -> Iterator[Results]:
    """A results file to write to, which is made where there is none.

    Raises:
        FileError: another process writes to it, or it holds something else.
        OSError: it cannot be read or written.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        _lock(path, descriptor)
        yield Results(path, descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    """Keep others from writing until the file is closed; a file system may have no locks."""
    try:
        # not lockf, whose lock would end when `read_results` closes its own descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return
        raise FileError(
            f"{path}: another process writes results here; wait for it, or give another --out"
        ) from error
