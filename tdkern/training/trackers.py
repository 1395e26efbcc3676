"""The numbers of a run in the tools that people watch runs with: TensorBoard, Weights & Biases."""

import importlib.util
import re
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from ..data.files import brief, open_new, read_file, sync_file, write_atomic
from .formats import as_json
from .options import Options

WANDB_RUN = "wandb-run.txt"  # in a run directory, what the run is called at Weights & Biases
WANDB_ID = re.compile(r"[0-9a-f]{16}")


class Tracker(Protocol):
    """Where the numbers of ticks go beside stats.jsonl."""

    name: str

    def tick(self, nimg: int, numbers: dict[str, float]) -> None:
        """Add the numbers of the tick that ended at an image."""

    def sync(self) -> None:
        """Make durable what was added."""

    def close(self) -> None:
        """Nothing more is added."""


def trackers(options: Options, run_dir: Path, nimg: int) -> list[Tracker]:
    """TensorBoard where it is installed, and Weights & Biases where it is asked for.

    Args:
        options: the run's.
        run_dir: its directory.
        nimg: the images trained on; what is recorded of later ones does not count any more.

    Raises:
        ImportError: wandb is asked for and not installed.
        RuntimeError: wandb cannot start.
    """
    found: list[Tracker] = []
    if importlib.util.find_spec("tensorboard"):
        found.append(TensorBoard(run_dir, nimg))
    if options.wandb:
        found.append(WandB(options, run_dir))
    return found


class TensorBoard:
    """An event file in the run directory; its steps are images.

    It is written here rather than by SummaryWriter, whose thread prints a traceback and makes
    `flush` wait for ever where the disk is full. A process has a file of its own, which is made at
    the first tick: TensorBoard reads all of a directory, in the order of the times in their names.
    """

    name = "TensorBoard"

    def __init__(self, run_dir: Path, nimg: int):
        self.run_dir, self.nimg = run_dir, nimg
        self.path: Path | None = None

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # in the order of time; the end cannot be foreseen, so nobody can have put a link there
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{secrets.token_hex(4)}"
        path = self.run_dir / name
        self.writer = RecordWriter(open(open_new(path), "wb"))
        self.path = path
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard forgets what older files have from this step on: it comes again
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=self.nimg + 1, session_log=start))

    def _write(self, event: Any) -> None:
        self.writer.write(event.SerializeToString())

    def tick(self, nimg: int, numbers: dict[str, float]) -> None:
        """Add the numbers of the tick that ended at an image."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self.path is None:
            self._open()
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(Event(wall_time=time.time(), step=nimg, summary=Summary(value=values)))
        self.writer.flush()

    def sync(self) -> None:
        """Make durable what was added."""
        if self.path is not None:
            sync_file(self.path)

    def close(self) -> None:
        """Nothing more is added."""
        if self.path is not None:
            self.writer.close()


class WandB:
    """A run at Weights & Biases; its steps are images.

    What it is called there is in WANDB_RUN, so that a run that goes on is the same one.
    """

    name = "Weights & Biases"

    def __init__(self, options: Options, run_dir: Path):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"wandb is not installed ({error}); run: pip install 'tdkern[wandb]'"
            ) from error

        name = _wandb_id(run_dir / WANDB_RUN)
        try:
            self.run = wandb.init(
                project=options.wandb,
                id=name,
                name=run_dir.resolve().name,
                dir=str(run_dir),
                config=as_json(options),
                resume="allow",
            )
        except Exception as error:  # it has many of its own
            raise RuntimeError(
                f"Weights & Biases cannot start ({brief(error)}); wandb login helps, or "
                "WANDB_MODE=offline, or leave out --wandb"
            ) from error

    def tick(self, nimg: int, numbers: dict[str, float]) -> None:
        """Add the numbers of the tick that ended at an image.

        Those of an image that is there already, as a run that goes on from an earlier state has
        them again, are left out by wandb.
        """
        self.run.log(numbers, step=nimg)

    def sync(self) -> None:
        """Nothing: its own process sends what was added."""

    def close(self) -> None:
        """Nothing more is added."""
        self.run.finish()


def _wandb_id(path: Path) -> str:
    """What the run is called at Weights & Biases: as the file says, or a new name."""
    if path.exists():
        name = read_file(path, 100).decode(errors="replace").strip()
        if not WANDB_ID.fullmatch(name):
            raise ValueError(f"{path}: does not hold 16 hexadecimal digits; remove it")
        return name
    name = secrets.token_hex(8)
    write_atomic(path, f"{name}\n".encode())
    return name
