"""A training state in parts small enough to come back from a lent machine.

OUT/state/meta.json        the checkpoint's, with the run that it is of
OUT/state/tensors-0 ...    its tensors' file, cut into pieces of PART bytes
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdkern.data.files import write_atomic
from tdkern.training import Trainer, checkpoint

PART = 12 << 20  # bytes: a file that comes back has at most 16 MiB
RUN = "run"  # of meta.json: the seed and the method


def pack(out: Path, run: list, trainer: Trainer) -> None:
    """Write a run's state in place of the one that is there; a kill leaves one of them whole."""
    new, old = out / "state.new", out / "state"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        meta = {"step": trainer.step, "data": trainer.data, RUN: run}
        path = checkpoint.write(
            Path(folder), checkpoint.STATE, trainer.nimg, trainer.tensors(), meta
        )
        data = (path / checkpoint.TENSORS).read_bytes()
        for i, first in enumerate(range(0, len(data), PART)):
            write_atomic(new / f"tensors-{i}", data[first : first + PART])
        write_atomic(new / checkpoint.META, (path / checkpoint.META).read_bytes())
    remove(out)
    os.rename(new, old)


@contextmanager
def unpacked(out: Path, run: list) -> Iterator[Path | None]:
    """The state of a run as the driver reads it; None where there is none of this run."""
    meta = out / "state" / checkpoint.META
    if not meta.exists() or json.loads(meta.read_text()).get(RUN) != run:
        yield None
        return
    parts = sorted(meta.parent.glob("tensors-*"), key=lambda path: int(path.name.split("-")[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        path.mkdir()
        shutil.copy(meta, path)
        (path / checkpoint.TENSORS).write_bytes(b"".join(part.read_bytes() for part in parts))
        yield path


def remove(out: Path) -> None:
    """Remove the state, if there is one."""
    shutil.rmtree(out / "state", ignore_errors=True)
