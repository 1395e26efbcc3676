"""Detectors: what gives the features in which two sets of images are compared."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.files import FileError, brief, check_file, read_file, write_atomic
from ..networks.saved import check_header, check_like
from .classifier import Classifier
from .fid import Inception

# by name, the detectors whose files lie beside this module
BUILT_IN = {path.stem: path for path in Path(__file__).parent.glob("*.safetensors")}
# the names under which Inception's numbers are known; no other detector's are called so
INCEPTION_KEYS = {"frechet": "fid", "kernel": "kid"}
FORMAT = 1  # of a detector's file
RECORD = "tdkern_detector"  # where in the file's metadata its record is, as JSON
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_FILE = 1 << 26  # bytes
# the whole numbers of a record by which the network is made, each with its least and greatest
NUMBERS = {"width": (1, 1024), "classes": (2, 100_000), "resolution": (8, 4096)}


class Detector(Protocol):
    """Images to features, without gradient."""

    dim: int  # features of an image
    name: str  # in the names of its numbers: "inception", or such as "cifar10"
    identity: str  # which files of statistics carry: statistics of another are refused

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 to [B, dim] float32."""


def make_detector(detector: str | Path | None, device: torch.device | str = "cpu") -> Detector:
    """The detector that `--detector` names.

    Args:
        detector: a name of BUILT_IN; a .safetensors file of `tdkern detector train`; another file
            for Inception-v3 with torch-fidelity's weights in it; None for Inception-v3 with
            torch.hub's copy of them.
        device: where it computes.

    Raises:
        ImportError: torch-fidelity or its torchvision does not work here.
        ValueError: the weights cannot be had, read or used.
    """
    path = BUILT_IN.get(str(detector), detector)
    if path is not None and Path(path).suffix == ".safetensors":
        return TrainedDetector(path, device)
    return Inception(path, device)


def key_of(measure: str, detector: Detector) -> str:
    """The name of a number, which says whose features it is of.

    "frechet" is "fid" with Inception, and "frechet_cifar10" with cifar10; "kernel_low" is "kid_low"
    and "kernel_cifar10_low".
    """
    first, line, rest = measure.partition("_")
    if detector.name == Inception.name:
        return INCEPTION_KEYS.get(first, first) + line + rest
    return f"{first}_{detector.name}{line}{rest}"


class TrainedDetector:
    """A classifier of `tdkern detector train`: images to the features before its last layer.

    Called with images [B, 3, R, R] uint8 of its resolution R it gives [B, dim] float32, none of
    them below 0. No gradient. Deterministic on a CPU.

    Args:
        path: the file.
        device: where it computes.

    Attributes:
        record: what the file says of it: among others `accuracy` on `test_images` images that it
            was not trained on, and the `command` that made it.
        net: the `Classifier`.

    Raises:
        FileError: the file cannot be read, or is none of `tdkern detector train`.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        self.record, net = _read(Path(path))
        self.net = net.to(device).eval().requires_grad_(False)
        self.dim, self.name = net.head.in_features, self.record["name"]
        digest = hashlib.sha256(read_file(path, MAX_FILE)).hexdigest()
        self.identity = f"{self.name}-{digest[:12]}"

    def __call__(self, images: Tensor) -> Tensor:
        size = self.record["resolution"]
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"detector {self.name}: takes images of {size}x{size} pixels, got "
                f"{'x'.join(map(str, images.shape[2:]))}; train one on such images with tdkern "
                "detector train"
            )
        return self.net.features(images)


def round_weights(net: Classifier) -> None:
    """Round the convolutions' weights to what a file holds of them, which is half precision."""
    for tensor in net.state_dict().values():
        if tensor.ndim == 4:
            tensor.copy_(tensor.half())


def write_detector(path: str | Path, net: Classifier, record: dict[str, Any]) -> None:
    """Write a detector whose weights are rounded, whole or not at all.

    Args:
        path: in a directory that exists; it must end in .safetensors.
        net: the network.
        record: `name`, `width`, `classes` and `resolution`, and what else is to be known of it.
    """
    import safetensors.torch

    tensors = {
        name: (tensor.half() if tensor.ndim == 4 else tensor).cpu().contiguous()
        for name, tensor in net.state_dict().items()
    }
    metadata = {RECORD: json.dumps({"format": FORMAT, **record})}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def _read(path: Path) -> tuple[dict[str, Any], Classifier]:
    """A file's record and network, on the CPU; no memory is taken before the tensors are known to
    be there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_file(path, MAX_FILE)
        check_header(path)
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})[RECORD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        _check_record(record)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(
            f"{path}: not a detector ({brief(error)}); make one with tdkern detector train"
        ) from error
    with torch.device("meta"):
        like = Classifier(record["width"], record["classes"])
    check_like(like.state_dict(), tensors, path)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise FileError(f"{path}: holds weights that are not finite; fetch or make it again")
    net = like.to_empty(device="cpu")
    net.load_state_dict(tensors)
    return record, net


def _check_record(record: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError for a record by which no network can be made."""
    if record["format"] != FORMAT:
        raise ValueError(f"in format {record['format']!r}, and this tdkern reads format {FORMAT}")
    if not NAME.fullmatch(record["name"]):
        raise ValueError("its name is not one of letters, digits, _ and -")
    for name, (least, most) in NUMBERS.items():
        value = record[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"its {name} must be in {least} .. {most}")
