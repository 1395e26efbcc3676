"""The snapshots of a run's lowest FIDs, one for each number of sampling steps.

Each is a file as `tdkern.save_network` writes it, which `tdkern generate` and `tdkern fid` take;
its metadata says the FID. None is removed: it is replaced by a better one, or set aside.
"""

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ..data.files import write_atomic
from ..networks.saved import check_header, file_metadata
from . import checkpoint
from .statistics import Fid


def path_of(run_dir: Path, steps: int) -> Path:
    """The file of the lowest FID at so many steps."""
    return run_dir / f"network-snapshot-best-{steps}.safetensors"


def said_by(path: Path) -> dict:
    """What a file says beside the network; nothing if it is none of ours, or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["tdkern"])
        fid = Fid(**said["fid"])
        return {"nimg": int(said["nimg"]), "kind": fid.kind, "value": float(fid.value)}
    except (OSError, SafetensorError, *checkpoint.DAMAGE):
        return {}


def set_aside(run_dir: Path, nimg: int) -> list[str]:
    """Rename the files that are later than where training goes on from, or damaged.

    Returns:
        The new names.
    """
    found = [path for path in run_dir.iterdir() if checkpoint.BEST.fullmatch(path.name)]
    later = [path for path in sorted(found) if not said_by(path).get("nimg", nimg + 1) <= nimg]
    return [checkpoint.rename_aside(path) for path in later]


def keep(
    run_dir: Path, fid: Fid, nimg: int, network: dict, weights: dict[str, Tensor], classes
) -> bool:
    """Write a network's file, if its FID is below that of the file that is there.

    A file of what was measured otherwise is set aside.

    Args:
        run_dir: the run's directory.
        fid: finite.
        nimg: images trained on.
        network: the network's description.
        weights: its state dict.
        classes: those that it was trained on; None for all.

    Returns:
        Whether it was written.

    Raises:
        OSError: it cannot be.
    """
    import safetensors.torch

    path = path_of(run_dir, fid.steps)
    said = said_by(path)
    if said.get("kind") == fid.kind and said["value"] <= fid.value:
        return False
    if path.exists() and said.get("kind") != fid.kind:
        checkpoint.rename_aside(path)
    about = {"nimg": nimg, "fid": asdict(fid)} | ({} if classes is None else {"classes": classes})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # one entry alone: of several, safetensors writes now one first and now another
    metadata = {"tdkern": file_metadata(network, path.name, **about)["tdkern"]}
    write_atomic(path, safetensors.torch.save(tensors, metadata))
    checkpoint.forget_same(path)
    return True
