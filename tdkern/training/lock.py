"""One run, one writer."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.files import NO_LOCKS, FileError, one_line, read_file

NAME = "run.lock"


class LockedError(FileError):
    """A run directory in which another process writes; the message names the process."""


@contextmanager
def locked(run_dir: Path) -> Iterator[bool]:
    """Keep other processes from writing into a run directory while the context lasts.

    The lock belongs to the process, not to a file that could be left behind: it ends with the
    process, however that ends, and the readers that the process starts do not have it.

    Args:
        run_dir: the directory, which exists.

    Yields:
        Whether the file system could lock it.

    Raises:
        LockedError: another process holds the lock.
    """
    path = run_dir / NAME
    fd, held = _acquire(path)
    try:
        os.ftruncate(fd, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
        os.write(fd, json.dumps(owner).encode())
        yield held
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _acquire(path: Path) -> tuple[int, bool]:
    """A descriptor of the file at `path`, and whether it is locked."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        fd = os.open(path, flags, 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return fd, False
            os.close(fd)
            raise LockedError(f"{path.parent}: {_holder(path)}; wait for it, or end it") from error
        if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd, True
        os.close(fd)  # the process that had it ended in between, and removed it


def _holder(path: Path) -> str:
    """In words, the process that wrote itself into a lock."""
    try:
        owner = json.loads(read_file(path, 10_000))
        return one_line(
            f"process {owner['pid']} of {owner['host']} trains here since {owner['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process trains here"
