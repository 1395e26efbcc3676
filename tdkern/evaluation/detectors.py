"""Detectors: what gives the features in which two sets of images are compared."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .fid import Inception

# the names under which Inception's numbers are known; no other detector's are called so
INCEPTION_KEYS = {"frechet": "fid", "kernel": "kid"}


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
        detector: None for Inception-v3, with torch.hub's copy of its weights; a file of its
            weights of torch-fidelity's.
        device: where it computes.

    Raises:
        ImportError: torch-fidelity or its torchvision does not work here.
        ValueError: the weights cannot be had, read or used.
    """
    return Inception(detector, device)


def key_of(measure: str, detector: Detector) -> str:
    """The name of a number: "fid" of "frechet" with Inception, else such as "frechet_cifar10"."""
    if detector.name == Inception.name:
        return INCEPTION_KEYS.get(measure, measure)
    return f"{measure}_{detector.name}"
