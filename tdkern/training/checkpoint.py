"""Checkpoints on disk: what is saved is whole or not there, and reading one executes nothing.

A run directory holds two kinds, each a directory named by its kimg, as EDM numbers them, to the image:

    network-snapshot-002500.096/   the EMA network and how to rebuild it; small, all kept
    training-state-002500.096/     what training needs to go on to the same weights, bit for bit; only the newest is kept

In each, `tensors.safetensors` holds the tensors and `meta.json` the rest, with the number of its format. What an older tdkern wrote is read; a change
of what is written gets a new number here, a function in `NEXT_FORMAT`, and an example of the old format in tests/data.
"""
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..data.files import beside, sync_directory, write_atomic
from ..networks import CTPrecond, Denoiser, EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond, unet
from ..schedules import DDPM

FORMAT = 2
SNAPSHOT, STATE = "network-snapshot", "training-state"
PRECONDS = {"edm": EDMPrecond, "ct": CTPrecond, "ddpm": Denoiser, "iddpm": iDDPMPrecond, "vp": VPPrecond, "ve": VEPrecond, "flow": Denoiser}
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the image inside the network


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and says what to do."""


def kimg(nimg: int) -> str:
    """Thousands of images as names carry them: sorted as text they are sorted as numbers."""
    return f"{nimg / 1000:010.3f}"


def build_network(network: dict) -> torch.nn.Module:
    """The network, newly initialised, that a checkpoint's meta.json describes under "network"."""
    arguments = dict(network)
    precond, sigma_data, dtype = arguments.pop("precond"), arguments.pop("sigma_data"), PRECISIONS[arguments.pop("precision")]
    if precond not in PRECONDS:
        raise ValueError(f"build_network: precond must be one of {', '.join(PRECONDS)}, got {precond!r}")
    fourier = arguments["arch"] == "ncsnpp"  # its embedding is made for c_noise around 1, the others' for DDPM's times
    times = 1.0 if fourier else 1000.0
    settings = {}
    if precond == "edm":
        settings = {"sigma_data": sigma_data}
    elif precond == "ct":
        settings = {"sigma_data": sigma_data, "time_scale": times / 4}
    elif precond == "ddpm":
        path = DDPM(arguments.pop("diffusion_steps"), arguments.pop("noise_schedule"))
        settings = {"prediction": arguments.pop("prediction"), "alphas_cumprod": path.alphas_cumprod, "time_scale": 1 / path.T if fourier else 1.0}
    elif precond == "flow":
        settings = {"prediction": "velocity", "time_scale": times}
    return PRECONDS[precond](unet(**arguments), dtype=dtype, **settings)


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


def _format_2(meta: dict) -> dict:
    """Format 1 knew no augmentation."""
    return meta | {"format": 2, "network": {"augment_dim": 0, **meta["network"]}, "options": {"augment": 0.0, **meta["options"]}}


NEXT_FORMAT = {1: _format_2}  # what makes a format's meta that of the next


def read_meta(path: Path, kind: str) -> dict:
    """A checkpoint's meta.json in today's format; raises CheckpointError where it is damaged, of a later format or not of this kind."""
    with _reading(path, kind):
        meta = json.loads((path / "meta.json").read_bytes())
        if not isinstance(meta, dict) or meta.get("kind") != kind:
            raise CheckpointError(f"{path}: meta.json does not describe a {kind}; give one that tdkern saved")
        if meta["format"] > FORMAT:
            raise CheckpointError(f"{path}: in format {meta['format']} of tdkern {meta['tdkern']}; tdkern {__version__} reads up to format {FORMAT}; update it")
        while meta["format"] < FORMAT:
            meta = NEXT_FORMAT[meta["format"]](meta)
        return meta


def read(path: Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """A checkpoint's (meta, tensors), on the CPU; raises CheckpointError as `read_meta`, and where the tensors are damaged."""
    from safetensors.torch import load_file

    meta = read_meta(path, kind)
    with _reading(path, kind):
        return meta, load_file(path / "tensors.safetensors")


def restore(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a module's tensors; raises CheckpointError naming the first that is missing, unknown or of another shape."""
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        ours, theirs = (list(state[name].shape) if name in state else "nothing" for state in (own, tensors))
        if ours != theirs:
            raise CheckpointError(f"{path}: does not match the network: {name} must be {ours}, got {theirs}")
    module.load_state_dict(tensors)


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
        from ..integrations import load_converted

        return load_converted(path, device)
    path = find(path, SNAPSHOT)
    meta, tensors = read(path, SNAPSHOT)
    try:
        net = build_network(meta["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: meta.json does not describe a network ({type(error).__name__}: {error}); give another {SNAPSHOT}") from error
    restore(net, tensors, path)
    return net.to(device).eval().requires_grad_(False), meta
