"""Whether a training state is one that training can go on from."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ..fields import LARGEST
from .checkpoint import STATE, CheckpointError, images_of

# what Adam keeps for each parameter, and between what it is
RANGES = {"step": (0, LARGEST), "exp_avg": (-math.inf, math.inf), "exp_avg_sq": (0, math.inf)}
ADAM = tuple(RANGES)


def check_step(meta: dict, path: Path) -> None:
    """Raises CheckpointError where a state's step is none."""
    step = meta.get("step")
    if type(step) is not int or not 0 <= step <= LARGEST:
        raise CheckpointError(
            f"{path}: damaged: step must be an integer from 0 to {LARGEST}, got {str(step)[:50]}"
        )


def check_place(meta: dict, batch: int, path: Path) -> None:
    """Raises CheckpointError where a state's step, images and name do not agree."""
    step, nimg = meta["step"], meta.get("nimg")
    named = images_of(path.resolve())
    if nimg != step * batch or named not in (None, nimg):
        raise CheckpointError(
            f"{path}: damaged: step {step} of batch {batch} and {nimg} images do not agree, "
            "or not with its name"
        )


def check_tensors(own: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError where tensors are not of the dtypes of `own`, or not finite."""
    for name, tensor in tensors.items():
        if name in own and tensor.dtype != own[name].dtype:
            raise CheckpointError(
                f"{path}: damaged: {name} must be {own[name].dtype}, got {tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite; give an older {STATE}")


def check_adam(parts: dict[str, dict], params: dict[str, Tensor], step: int, path: Path) -> None:
    """Raises CheckpointError for moments that Adam cannot have after `step` steps.

    Args:
        parts: for each of ADAM, a tensor by parameter.
        params: by name.
        step: steps of training, of which Adam may have left some out.
        path: the state's.
    """
    for key in ADAM:
        like = {name: torch.zeros(()) if key == "step" else param for name, param in params.items()}
        for name in sorted(like.keys() | parts[key].keys()):
            if name not in like or name not in parts[key]:
                raise CheckpointError(
                    f"{path}: damaged: Adam's state of {name!r} is not there or not wanted; "
                    f"give another {STATE}"
                )
            tensor, wanted = parts[key][name], like[name]
            if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
                raise CheckpointError(
                    f"{path}: damaged: {key}.{name} must be {list(wanted.shape)} {wanted.dtype}, "
                    f"got {list(tensor.shape)} {tensor.dtype}"
                )
            low, high = RANGES[key][0], step if key == "step" else RANGES[key][1]
            if not (tensor.isfinite() & (low <= tensor) & (tensor <= high)).all():
                raise CheckpointError(
                    f"{path}: damaged: {key}.{name} has elements that are not finite or out of "
                    "range"
                )
