"""Checkpoints on disk: what is saved is whole or not there, and reading one executes nothing.

A run directory holds these kinds, each a directory named by its kimg, as EDM numbers them, to the
image:

    network-snapshot-002500.096/   the EMA network and how to rebuild it; small, all kept
    averages-snapshot-002500.096/  with --power-ema, the averages that `tdkern ema` needs; all kept
    training-state-002500.096/     what training needs to go on to the same weights, bit for bit

In each, `tensors.safetensors` holds the tensors and `meta.json` the rest, with the number of its
format and a checksum of the tensors' file and of itself. Only a directory of exactly such a name is
taken for a checkpoint, in the order of the numbers. `formats` has what makes an older format
today's.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..data.files import (
    beside,
    check_file,
    read_file,
    remove_leftovers,
    sha256,
    sync_directory,
    sync_file,
    write_atomic,
)
from ..integrations import load_converted
from ..networks.precond import Preconditioned
from ..networks.saved import CheckpointError, DescriptionError, check_header, load
from . import formats
from .formats import FORMAT, NEXT_FORMAT
from .options import FREE

SNAPSHOT, AVERAGES, STATE = "network-snapshot", "averages-snapshot", "training-state"
TENSORS, META = "tensors.safetensors", "meta.json"
NAME = re.compile(rf"({SNAPSHOT}|{AVERAGES}|{STATE})-(\d{{6,}})\.(\d{{3}})", re.ASCII)
PICTURE = re.compile(r"(fakes|curves)-(\d{6,})\.(\d{3})\.png", re.ASCII)
# the files of the snapshots of the lowest FIDs, which `best` writes, by the number of steps
BEST = re.compile(r"network-snapshot-best-(\d+)\.safetensors", re.ASCII)
UNFINISHED_FID = "fid-unfinished.safetensors"  # what is measured of a FID so far
ASIDE = "set-aside-"  # before the name of what is later than where training goes on from
# what tdkern writes into a run directory, beside checkpoints and grids
RECORDS = (
    "training_options.json",
    "stats.jsonl",
    "log.txt",
    "reals.png",
    "wandb-run.txt",
    UNFINISHED_FID,
)
EVENTS = re.compile(r"events\.out\.tfevents\..+", re.DOTALL)  # files that TensorBoard reads
MAX_META = 1 << 22  # bytes: a hundred times what a large network's take
# what comes of a damaged file, beside SafetensorError
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def kimg(nimg: int) -> str:
    """Thousands of images as names carry them; up to a billion, names sort as their numbers."""
    return f"{nimg // 1000:06d}.{nimg % 1000:03d}"


def images_of(path: Path, form: re.Pattern = NAME) -> int | None:
    """The images trained on that a name says; None if it is not one that tdkern gives."""
    match = form.fullmatch(path.name)
    if match is None:
        return None
    return int(match[match.re.groups - 1] + match[match.re.groups])


def checkpoints(run_dir: Path, kind: str) -> list[Path]:
    """A run's checkpoints of a kind, the oldest first."""
    found = [
        path for path in run_dir.glob(f"{kind}-*") if images_of(path) is not None and path.is_dir()
    ]
    return sorted(found, key=images_of)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant as a checkpoint, and not as a run directory."""
    return images_of(path.resolve()) is not None or (path / META).exists()


def write(run_dir: Path, kind: str, nimg: int, tensors: dict[str, Tensor], meta: dict) -> Path:
    """Save a checkpoint; a kill or a power cut at any moment leaves it whole or not there.

    One that is there already is kept: the same run saved it at the same image. What a run set aside
    when it went on from an earlier state is removed where this turns out to be the same.

    Args:
        run_dir: the run's directory.
        kind: SNAPSHOT, AVERAGES or STATE.
        nimg: images trained on, which names the checkpoint.
        tensors: by name, on any device.
        meta: anything JSON can hold.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    path = run_dir / f"{kind}-{kimg(nimg)}"
    if path.is_dir():
        return path
    meta = {
        "format": FORMAT,
        "kind": kind,
        "tdkern": __version__,
        "torch": torch.__version__,
        "nimg": nimg,
        **meta,
    }
    unfinished = beside(path)
    try:
        unfinished.mkdir()
        _write_files(unfinished, tensors, meta)
        os.rename(unfinished, path)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"{path} cannot be written ({error})") from error
        raise
    sync_directory(run_dir)
    forget_same(path)
    return path


def _write_files(folder: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """A checkpoint's two files, durable when this returns."""
    from safetensors.torch import save_file

    file = folder / TENSORS
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    sync_file(file)
    meta = meta | {"checksums": {TENSORS: sha256(file), META: _digest(meta)}}
    write_atomic(folder / META, json.dumps(meta, indent=2).encode())
    shutil.copymode(folder / META, file)  # safetensors lets only the owner read
    sync_directory(folder)


def _digest(meta: dict) -> str:
    """A checksum of what meta.json says, beside the numbers that its name and tensors repeat."""
    repeated = ("format", "kind", "tdkern", "torch", "nimg", "step", "checksums")
    said = {name: value for name, value in meta.items() if name not in repeated}
    if type(said.get("options")) is dict:
        said["options"] = {
            name: value for name, value in said["options"].items() if name not in FREE
        }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def remove(path: Path) -> None:
    """Remove a checkpoint; a kill at any moment leaves it whole or as a leftover for `clean`."""
    unfinished = beside(path)
    os.rename(path, unfinished)
    shutil.rmtree(unfinished)


def keep_newest(
    run_dir: Path, kind: str, count: int = 1, kept: Callable[[int], bool] | None = None
) -> None:
    """Remove a run's checkpoints of a kind but the newest, and nothing else.

    Args:
        run_dir: the run's directory. All its checkpoints are whole, so nothing is lost at any
            moment.
        kind: SNAPSHOT, AVERAGES or STATE.
        count: so many stay.
        kept: of the images trained on, whether an older one stays too.
    """
    for older in checkpoints(run_dir, kind)[:-count]:
        if not older.is_symlink() and not (kept and kept(images_of(older))):
            remove(older)


def set_aside(run_dir: Path, nimg: int) -> list[str]:
    """Rename the checkpoints and pictures that are later than where training goes on from.

    They are another future of the run: under their names its own are to come.

    Returns:
        The new names.
    """
    found = [path for path in run_dir.iterdir() if (images_of(path) or 0) > nimg and path.is_dir()]
    found += [
        path
        for path in run_dir.iterdir()
        if (images_of(path, PICTURE) or 0) > nimg and path.is_file()
    ]
    return [rename_aside(path) for path in sorted(found)]


def rename_aside(path: Path) -> str:
    """Give a checkpoint or file the name of what is set aside, and return it."""
    aside = path.with_name(ASIDE + path.name)
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{ASIDE}{number}-{path.name}")
    os.rename(path, aside)
    return aside.name


def forget_same(path: Path) -> None:
    """Remove what was set aside under the name of `path`, if it is the same."""
    part = TENSORS if path.is_dir() else ""
    for aside in path.parent.glob(f"{ASIDE}*{path.name}"):
        if not re.fullmatch(rf"{ASIDE}(\d+-)?{re.escape(path.name)}", aside.name):
            continue
        if (aside / part).is_file() and sha256(aside / part) == sha256(path / part):
            remove(aside) if part else aside.unlink()


def clean(run_dir: Path) -> None:
    """Remove what killed runs left unfinished in their directory."""
    names = "|".join(map(re.escape, RECORDS))
    kinds = "|".join(kind.pattern for kind in (NAME, PICTURE, BEST))
    own = re.compile(rf"({ASIDE}(\d+-)?)?({kinds})|{names}", re.ASCII)
    remove_leftovers(run_dir, own.fullmatch)


def find(path: str | Path, kind: str) -> Path:
    """The checkpoint at `path`: it itself, or the newest of its kind in a run directory."""
    path = Path(path)
    if is_checkpoint(path):
        return path
    found = checkpoints(path, kind)
    if not found:
        raise CheckpointError(f"{path}: {_nothing_here(path, kind)}")
    return found[-1]


def _nothing_here(path: Path, kind: str) -> str:
    if ":/" in str(path):
        return f"no {kind}-* in it: it is an address; fetch the file and give its path"
    if not path.exists():
        return f"no {kind}-* in it: there is no such file or folder"
    if kind == SNAPSHOT and any(path.glob(f"{SNAPSHOT}-*.pkl")):
        return f"no {kind}-* of tdkern in it, but EDM's; make one of them a file by tdkern convert"
    return f"no {kind}-* in it; give a run directory that has one, or a {kind} itself"


def way_on(run_dir: Path) -> str:
    """In words, where and how training can go on."""
    states = checkpoints(run_dir, STATE) if run_dir.is_dir() else []
    if not states:
        return f"no state is saved in {run_dir} yet"
    return f"image {images_of(states[-1])} is saved; go on with: tdkern train --resume {run_dir}"


def _instead(path: Path, kind: str) -> str:
    """What to use in place of a checkpoint that cannot be: the next older one that is whole."""
    older = [
        other
        for other in checkpoints(path.parent, kind)
        if images_of(other) < (images_of(path) or 0)
    ]
    whole = next((other for other in reversed(older) if _is_whole(other, kind)), None)
    return f"give another {kind}" + (f": {whole} is whole" if whole else ", here is no older one")


def _is_whole(path: Path, kind: str) -> bool:
    try:
        _meta(path, kind)
    except Exception:  # whatever is wrong with it, it is not what to go on from
        return False
    return True


@contextmanager
def _reading(path: Path, kind: str):
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); {_instead(path, kind)}"
        ) from error
    except (*DAMAGE, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}); {_instead(path, kind)}"
        ) from error


def read_meta(path: Path, kind: str) -> dict:
    """A checkpoint's meta.json in today's format, once its files have been compared with its
    checksums.

    Raises:
        CheckpointError: it is damaged, of a later format, or not of this kind.
    """
    with _reading(path, kind):
        return _meta(path, kind)


def _meta(path: Path, kind: str) -> dict:
    """What `read_meta` returns; raises whatever comes of a damaged file."""
    meta = json.loads(read_file(path / META, MAX_META))
    if not isinstance(meta, dict) or meta.get("kind") != kind:
        raise CheckpointError(
            f"{path}: meta.json does not describe a {kind}; give one that tdkern saved"
        )
    if meta["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: in format {meta['format']} of tdkern {meta['tdkern']}; "
            f"tdkern {__version__} reads up to format {FORMAT}; update it"
        )
    if type(meta["format"]) is not int:
        raise TypeError(f"its format is {meta['format']!r}")
    _compare_checksums(path, meta)
    while meta["format"] < FORMAT:
        meta = NEXT_FORMAT[meta["format"]](meta)
    meta.pop("checksums", None)
    return meta


def _compare_checksums(path: Path, meta: dict) -> None:
    """Raises ValueError where a file is not what was written; formats 1 and 2 have no checksums."""
    if meta["format"] < 3 and "checksums" not in meta:
        return
    if meta["checksums"][META] != _digest(meta):
        raise ValueError(f"{META} is not what was written: its checksum is another")
    check_file(path / TENSORS)
    if meta["checksums"][TENSORS] != sha256(path / TENSORS):
        raise ValueError(f"{TENSORS} is not what was written: its checksum is another")


def read(path: Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """A checkpoint's (meta, tensors), on the CPU; raises CheckpointError as `read_meta`, and where
    the tensors are damaged.
    """
    from safetensors.torch import load_file

    meta = read_meta(path, kind)
    with _reading(path, kind):
        check_header(path / TENSORS)
        return meta, load_file(path / TENSORS)


def read_options(path: Path) -> dict:
    """The options in a file that a run wrote for its own, as `Options` takes them today.

    Raises:
        CheckpointError: the file is damaged, or of a later format.
    """
    try:
        options = json.loads(read_file(path, MAX_META))
        return formats.options_of_today(options.pop("format", 1), options)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give another file") from error
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: does not hold the options of a run ({type(error).__name__}: {error}); "
            "give one that tdkern train wrote"
        ) from error


def load_network(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Preconditioned, dict]:
    """The EMA network of a network snapshot, ready to sample from, and the snapshot's meta.

    Args:
        path: a network-snapshot directory, a run directory, whose newest is taken, or a file of
            `tdkern convert` or `save_network`.
        device: where the network goes.

    Returns:
        (net, meta): net(x, sigma, class_labels=None) -> D in evaluation mode without gradients;
        meta["network"] has img_resolution, img_channels and label_dim.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    if Path(path).is_file():
        return load_converted(path, device)
    path = find(path, SNAPSHOT)
    meta, tensors = read(path, SNAPSHOT)
    try:
        net = load(meta.get("network"), tensors, path)
    except DescriptionError as error:
        raise CheckpointError(
            f"{path}: {META} does not describe a network ({error}); give another {SNAPSHOT}"
        ) from error
    return net.to(device).eval().requires_grad_(False), meta
