"""Every command ends in one line, whatever was wrong."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..data.files import one_line

TRACEBACK = "TDKERN_TRACEBACK"  # the environment variable that asks for a traceback too
LOST = ("gloo", "NCCL", "TCPStore", "Connection closed by peer", "Connection reset by peer")
# what comes of wrong arguments, files, memory, devices and processes; anything else is our fault
FORESEEN = (ValueError, OSError, ImportError, RuntimeError, MemoryError, ArithmeticError)


def open_standard_streams() -> None:
    """Where a process was started without stdin, stdout or stderr, give it the null device.

    Else the next file that is opened would take the place, and what is printed would go there.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def sentence(error: BaseException) -> str:
    """An error as one line."""
    text = str(error).strip()
    lines = text.splitlines() or [""]
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        line = named + error.strerror
    elif "DataLoader worker" in lines[0] and text.startswith("Caught "):
        line = lines[-1]  # a whole traceback, which ends in the error
    elif isinstance(error, MemoryError) or "can't allocate memory" in text:
        line = f"out of memory {lines[0][:200]}; a smaller --batch-gpu or --batch needs less"
    elif isinstance(error, RuntimeError) and any(word in text for word in LOST):
        line = f"another process of the run ended or cannot be reached ({lines[0][:200]})"
    elif isinstance(error, FORESEEN) or type(error).__name__ == "SafetensorError":
        line = lines[0] or type(error).__name__
    else:
        line = f"unforeseen {type(error).__name__}: {lines[0]}; {TRACEBACK}=1 shows where"
        line += "; please report it"
    return one_line(line)


def _drop_unwritable_stdout() -> None:
    """Where nobody reads stdout, or its device is full, what waits to be written goes nowhere.

    Else Python would try again when it ends, and end with another message and exit code 120.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of a command end it with exit code 1 and one line; Ctrl-C with 130."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, SystemExit):
        raise
    except (KeyboardInterrupt, click.Abort):
        click.echo("Aborted!", err=True)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        _drop_unwritable_stdout()
        raise click.ClickException(sentence(error)) from error
