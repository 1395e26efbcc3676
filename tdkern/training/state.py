"""Whether a training state is one that training can go on from."""
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import STATE, CheckpointError, images_of

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps for each parameter


def check_meta(meta: dict, batch: int, path: Path) -> None:
    """Raises CheckpointError where a state's step, images and name do not agree."""
    step, nimg = meta.get("step"), meta.get("nimg")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: damaged: step must be an integer >= 0, got {step!r}")
    named = images_of(path.resolve())
    if nimg != step * batch or named not in (None, nimg):
        raise CheckpointError(f"{path}: damaged: step {step} of batch {batch} and {nimg} images do not agree, or not with its name")


def check_tensors(own: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError where tensors are not of the dtypes of `own`, or not finite."""
    for name, tensor in tensors.items():
        if name in own and tensor.dtype != own[name].dtype:
            raise CheckpointError(f"{path}: damaged: {name} must be {own[name].dtype}, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite; give an older {STATE}")


def check_adam(parts: dict[str, dict], params: dict[str, Tensor], step: int, path: Path) -> None:
    """Raises CheckpointError for moments that Adam cannot have after `step` steps.

    Args:
        parts: for each of ADAM, a tensor by parameter.
        params: by name.
        step: steps of training, of which Adam may have left some out; whatever meta.json says.
        path: the state's.
    """
    for key in ADAM:
        like = {name: torch.zeros(()) if key == "step" else param for name, param in params.items()}
        for name in sorted(like.keys() | parts[key].keys()):
            if name not in like or name not in parts[key]:
                raise CheckpointError(f"{path}: damaged: Adam's state of {name!r} is not there or not wanted; give another {STATE}")
            tensor, wanted = parts[key][name], like[name]
            if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
                raise CheckpointError(f"{path}: damaged: {key}.{name} must be {list(wanted.shape)} {wanted.dtype}, "
                                      f"got {list(tensor.shape)} {tensor.dtype}")
            low, high = (float("-inf") if key == "exp_avg" else 0, float("inf"))
            if key == "step" and type(step) is int:
                high = step
            if not (tensor.isfinite() & (low <= tensor) & (tensor <= high)).all():
                raise CheckpointError(f"{path}: damaged: {key}.{name} has elements that are not finite or out of range")
