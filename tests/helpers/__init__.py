"""What several test modules share: where things are, and the golden numbers."""

from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"


def golden_of(name):
    """The arrays of a file of golden numbers, as tensors."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}
