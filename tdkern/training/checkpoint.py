"""Checkpoints on disk: what is saved is whole or not there, and reading one executes nothing.

A run directory holds two kinds, each a directory named by its kimg, as EDM numbers them, to the image:

    network-snapshot-002500.096/   the EMA network and how to rebuild it; small, all kept
    training-state-002500.096/     what training needs to go on to the same weights, bit for bit; only the newest is kept

In each, `tensors.safetensors` holds the tensors and `meta.json` the rest, with the number of its format; `formats` has what makes an older one today's.
"""
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..data.files import beside, sync_directory, write_atomic
from ..integrations import load_converted
from ..networks.saved import CheckpointError, NetworkSpec, restore
from . import formats
from .formats import FORMAT, NEXT_FORMAT

SNAPSHOT, STATE = "network-snapshot", "training-state"


def kimg(nimg: int) -> str:
    """Thousands of images as names carry them: sorted as text they are sorted as numbers."""
    return f"{nimg / 1000:010.3f}"


def write(run_dir: Path, kind: str, nimg: int, tensors: dict[str, Tensor], meta: dict) -> Path:
    """Save a checkpoint; a kill at any moment leaves it whole or not there.

    One that is there already is kept: it is what the same run saved at the same image before it was killed and resumed.

    Args:
        run_dir: the run's directory.
        kind: SNAPSHOT or STATE.
        nimg: images trained on, which names the checkpoint.
        tensors: by name, on any device.
        meta: anything JSON can hold.

    Returns:
        The checkpoint's directory.
    """
    from safetensors.torch import save_file

    path = run_dir / f"{kind}-{kimg(nimg)}"
    if path.exists():
        return path
    unfinished = beside(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    meta = {"format": FORMAT, "kind": kind, "tdkern": __version__, "torch": torch.__version__, "nimg": nimg, **meta}
    write_atomic(unfinished / "meta.json", json.dumps(meta, indent=2).encode())
    file = unfinished / "tensors.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    shutil.copymode(unfinished / "meta.json", file)  # safetensors lets only the owner read
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    sync_directory(unfinished)
    os.rename(unfinished, path)
    sync_directory(run_dir)
    return path


def remove(path: Path) -> None:
    """Remove a checkpoint; a kill at any moment leaves it whole or as a leftover for `clean`."""
    os.rename(path, beside(path))
    shutil.rmtree(beside(path))


def keep_newest(run_dir: Path, kind: str) -> None:
    """Remove a run's checkpoints of a kind but the newest; all are whole, so nothing is lost at any moment."""
    for older in sorted(run_dir.glob(f"{kind}-*"))[:-1]:
        remove(older)


def clean(run_dir: Path) -> None:
    """Remove what killed runs left unfinished in their directory."""
    for path in run_dir.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def find(path: str | Path, kind: str) -> Path:
    """The checkpoint at `path`: it itself, or the newest of its kind in a run directory."""
    path = Path(path)
    if path.resolve().name.startswith(kind + "-"):
        return path
    found = sorted(path.glob(f"{kind}-*"))
    if not found:
        raise CheckpointError(f"{path}: no {kind}-* in it; give a run directory that has one, or a {kind} itself")
    return found[-1]


@contextmanager
def _reading(path: Path, kind: str):
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give another {kind}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}); give another {kind}") from error


def read_meta(path: Path, kind: str) -> dict:
    """A checkpoint's meta.json in today's format; raises CheckpointError where it is damaged, of a later format or not of this kind."""
    with _reading(path, kind):
        meta = json.loads((path / "meta.json").read_bytes())
        if not isinstance(meta, dict) or meta.get("kind") != kind:
            raise CheckpointError(f"{path}: meta.json does not describe a {kind}; give one that tdkern saved")
        if meta["format"] > FORMAT:
            raise CheckpointError(f"{path}: in format {meta['format']} of tdkern {meta['tdkern']}; tdkern {__version__} reads up to format {FORMAT}; update it")
        try:
            while meta["format"] < FORMAT:
                meta = NEXT_FORMAT[meta["format"]](meta)
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged ({error}); give another {kind}") from error
        return meta


def read(path: Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """A checkpoint's (meta, tensors), on the CPU; raises CheckpointError as `read_meta`, and where the tensors are damaged."""
    from safetensors.torch import load_file

    meta = read_meta(path, kind)
    with _reading(path, kind):
        return meta, load_file(path / "tensors.safetensors")


def read_options(path: Path) -> dict:
    """The options in a file that a run wrote for its own, as `Options` takes them today.

    Raises:
        CheckpointError: the file is damaged, or of a later format.
    """
    try:
        options = json.loads(path.read_bytes())
        return formats.options_of_today(options.pop("format", 1), options)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give another file") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: does not hold the options of a run ({type(error).__name__}: {error}); "
            "give one that tdkern train wrote"
        ) from error


def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[torch.nn.Module, dict]:
    """The EMA network of a network snapshot, ready to sample from, and the snapshot's meta.

    Args:
        path: a network-snapshot directory, a run directory, whose newest is taken, or a file of `tdkern convert`.
        device: where the network goes.

    Returns:
        (net, meta): net(x, sigma, class_labels=None) -> D in evaluation mode without gradients; meta["network"] has
        img_resolution, img_channels and label_dim.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    if Path(path).is_file():
        return load_converted(path, device)
    path = find(path, SNAPSHOT)
    meta, tensors = read(path, SNAPSHOT)
    try:
        net = NetworkSpec.from_json(meta["network"]).build()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: meta.json does not describe a network ({type(error).__name__}: {error}); give another {SNAPSHOT}") from error
    restore(net, tensors, path)
    return net.to(device).eval().requires_grad_(False), meta
