"""stats.jsonl, a line for every tick and for every FID: what a line is, and what of a file is one.

A FID's line has a `metric`, a tick's has none. It stands behind the tick at whose end it was
measured, and has the same kimg.
"""

import json
import math
import re
import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..data.files import read_file

FILE = "stats.jsonl"
LIMIT = 1 << 30  # bytes
# what a line says of the machine and the time of day: another run of the same bits has other values
OF_THE_MACHINE = ("time", "images_per_s", "seconds_left", "host_gib", "gpu_gib")
METRIC = re.compile(r"[A-Za-z0-9_-]{1,100}")  # the name of what is measured
LAST = 0.15  # the share of a run's FIDs whose mean is reported, as in arXiv 2606.15048


def read_lines(path: Path, until: float = sys.float_info.max) -> dict[str, dict]:
    """The lines of a run's stats.jsonl, each with what it says, in the order of their kimg.

    Args:
        path: the file; where there is none, there is no line.
        until: the kimg of the last line that is wanted.

    A line that is torn, another's, or before the one above it is left out.

    Raises:
        OSError: the file cannot be read, or has more than LIMIT bytes.
    """
    lines: dict[str, dict] = {}
    if not path.exists():
        return lines
    last = -1.0
    for line in read_file(path, LIMIT).decode(errors="replace").split("\n")[:-1]:
        said = _said_by(line)
        if said is None or not last <= said["kimg"] <= until:
            continue
        if said["kimg"] > last or "metric" in said:
            lines[line] = said
            last = said["kimg"]
    return lines


def _said_by(line: str) -> dict | None:
    """What a line of stats.jsonl says; None if it is not one."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or type(said.get("kimg")) not in (int, float):
        return None
    return said


def number_of(value) -> float:
    """A number from a file as a float; NaN for what is none, or too large for one."""
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.nan


def ticks_of(lines: dict[str, dict]) -> list[dict]:
    """What the lines of ticks say, of those of `read_lines`."""
    return [said for said in lines.values() if "metric" not in said]


@dataclass(frozen=True)
class Fid:
    """A FID, or another distance, of the averaged network's images.

    Attributes:
        metric: what it is: "fid", or with another detector than Inception such as
            "frechet_cifar10".
        steps, nfe: of the sampler, and how often it calls the network for an image.
        value: NaN where images were not finite.
        num: how many images.
        against: a hash of the reference.
    """

    metric: str
    steps: int
    nfe: int
    value: float
    num: int
    against: str

    def to_json(self) -> dict:
        """What a line says of it, as JSON holds it, which knows no NaN."""
        return asdict(self) | {"value": self.value if math.isfinite(self.value) else None}

    @property
    def name(self) -> str:
        """In words, what was measured."""
        return f"{self.metric} with {self.steps} step{'s' if self.steps > 1 else ''}"

    @property
    def kind(self) -> tuple:
        """What FIDs that can be compared, and make a curve, have in common."""
        return self.metric, self.num, self.against, self.steps


def fids_of(lines: dict[str, dict]) -> "list[tuple[float, Fid]]":
    """The kimg and FID of the lines that have one, of those of `read_lines`."""
    found = []
    for said in lines.values():
        kinds = {"metric": str, "steps": int, "nfe": int, "num": int, "against": str}
        if not all(type(said.get(name)) is kind for name, kind in kinds.items()):
            continue
        if METRIC.fullmatch(said["metric"]):
            values = {name: said[name] for name in kinds}
            fid = Fid(**values, value=number_of(said.get("value")))
            found.append((number_of(said["kimg"]), fid))
    return found


@dataclass(frozen=True)
class FidCurve:
    """The FIDs of a run at one number of steps, measured alike; `fid` is the last of them."""

    fid: Fid
    kimg: list[float]
    values: list[float]  # finite

    @property
    def best(self) -> tuple[float, float]:
        """The lowest FID, and the kimg at which it was measured."""
        return min(zip(self.values, self.kimg, strict=True), default=(math.nan, math.nan))

    @property
    def last_mean(self) -> float:
        """The mean over the last 15 % of the FIDs, at least one."""
        count = max(round(LAST * len(self.values)), 1)
        last = self.values[-count:]
        return sum(last) / len(last) if last else math.nan


def curves_of(fids: "Iterable[tuple[float, Fid]]") -> list[FidCurve]:
    """The curves of what was measured as the last FID was, by its number of steps."""
    fids = list(fids)
    newest: dict[int, FidCurve] = {}
    for _, last in reversed(fids):
        alike = last.kind[:-1] == fids[-1][1].kind[:-1]
        if alike and last.steps not in newest:
            own = [(at, fid.value) for at, fid in fids if fid.kind == last.kind]
            own = [(at, value) for at, value in own if math.isfinite(value)]
            at, values = [at for at, _ in own], [value for _, value in own]
            newest[last.steps] = FidCurve(last, at, values)
    return [newest[steps] for steps in sorted(newest)]


def memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has had so far, in GiB: of the host and of its GPU."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes in one of ru_maxrss
    most = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        most["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return most
