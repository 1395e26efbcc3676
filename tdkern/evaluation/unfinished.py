"""Measurements that go on after a kill: turns, and the file that keeps what they have found."""

import json
import os
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.files import brief, check_file, write_atomic
from ..networks.saved import check_header, fingerprint
from .fid import MAX_STATISTICS, FeatureSums

FORMAT = 1  # of the file
EVERY = 30.0  # seconds between two versions of the file, at least
PATIENCE = 20  # times what writing it takes lie between two versions, at least
KEY = "tdkern_unfinished"  # where in the file's metadata its inputs are, as JSON
# what comes of a damaged file, beside SafetensorError
DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, RecursionError)


def default_folder() -> Path:
    """Where the command line keeps such files, unless it is told otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "tdkern")


def named(folder: Path, inputs: dict) -> Path:
    """The file of a measurement of these inputs in a folder."""
    return folder / f"fid-{sha256(_text(inputs).encode()).hexdigest()[:16]}.safetensors"


def _text(inputs: dict) -> str:
    return json.dumps(inputs, sort_keys=True)


class Unfinished:
    """The file of a measurement that is not over, from which one of the same inputs goes on.

    It is written so rarely that it costs next to no time, whole or not at all. One that cannot be
    written or read is told of, and the measurement goes on without it.

    Args:
        path: the file, in a folder that need not exist; None in all processes but the first.
        inputs: all that the numbers depend on, as JSON holds it.
        tell: what is told, in a line.
    """

    def __init__(self, path: Path | None, inputs: dict, tell: Callable[[str], object]):
        self.path, self.inputs, self.tell = path, _text(inputs), tell
        self.late = self.due = time.monotonic() + EVERY

    def load(self, sums: FeatureSums) -> None:
        """Go on from the file, in all processes; `sums` is new."""
        if self.path and self.path.exists():
            self._read(self.path, sums)
        if dist.is_initialized():
            dist.broadcast(sums.sums, 0)

    def _read(self, path: Path, sums: FeatureSums) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            check_file(path, 2 * MAX_STATISTICS)
            check_header(path)
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if record["format"] != FORMAT or record["inputs"] != self.inputs:
                return  # of another measurement, which was left for this one
            if record["fingerprint"] != fingerprint(tensors):
                raise ValueError("its checksum is another")
            sums.sums.copy_(tensors["sums"])
            sums.features = [tensors["features"]] if sums.keep else []
        except (
            OSError,
            SafetensorError,
            ValueError,
            LookupError,
            TypeError,
            RuntimeError,
        ) as error:
            self.tell(f"{path}: damaged ({brief(error)}), so it is measured from the beginning")
            sums.sums.zero_()
            return
        self.tell(f"Going on behind image {sums.count}, from {path}")

    def after_turn(self, sums: FeatureSums) -> None:
        """Write the file, where it is time to."""
        if self.path and time.monotonic() >= self.due:
            self.save(sums)

    def after_all(self, sums: FeatureSums) -> None:
        """Write the file behind the last turn, if to measure it again would take long."""
        if self.path and time.monotonic() >= self.late:
            self.save(sums)

    def save(self, sums: FeatureSums) -> None:
        """Write the file."""
        if self.path is None:
            return
        import safetensors.torch

        began = time.monotonic()
        tensors = {"sums": sums.sums.cpu()}
        if sums.keep:
            tensors["features"] = torch.cat(sums.features)
        record = {"format": FORMAT, "inputs": self.inputs, "fingerprint": fingerprint(tensors)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = safetensors.torch.save(tensors, {KEY: json.dumps(record)})
            write_atomic(self.path, data)
        except OSError as error:
            self.tell(
                f"Warning: {self.path} cannot be written ({error}), so a kill would cost what is "
                "measured"
            )
            self.path = None
            return
        now = time.monotonic()
        self.due = now + max(EVERY, PATIENCE * (now - began))

    def remove(self) -> None:
        """The measurement is over."""
        if self.path:
            self.path.unlink(missing_ok=True)


def add_up(
    sums: FeatureSums,
    features: Iterable[Tensor],
    turns: int,
    after_turn: Callable[[FeatureSums], object],
) -> bool:
    """Add the features of this process's batches to the sums of all.

    Args:
        sums: of all processes.
        features: [B, dim] for each batch of this process, of which there are `turns` at most.
        turns: the same in all processes.
        after_turn: called behind each turn; a true value, the same in all processes, ends it.

    Returns:
        Whether all turns were taken.
    """
    own, none = iter(features), torch.empty(0, sums.dim, device=sums.device)
    for _ in range(turns):
        sums.add(next(own, none))
        if after_turn(sums):
            return False
    return True
