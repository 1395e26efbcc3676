"""The order of images and every other random choice, each a pure function of the seed and where it
is used: resuming needs no generator's state.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .._cache import tensor_cache

STREAMS = {"order": 0, "init": 1, "step": 2, "subset": 3, "dropout": 4}


def derive_seed(seed: int, stream: str, *numbers: int) -> int:
    """A 64-bit seed for one use of randomness, unrelated to those of other streams and numbers.

    Args:
        seed: the run's seed, >= 0.
        stream: a name in STREAMS.
        numbers: what tells this use from the stream's others, each >= 0, e.g. the training step.
    """
    return int(
        np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], *numbers)).generate_state(
            1, np.uint64
        )[0]
    )


# a step touches two epochs at most, unless its batch is larger than the data set
@tensor_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(
        size, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    )


def step_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """The image indices [batch] of training step `step`: consecutive places in the sequence of
    every epoch's own permutation.

    Args:
        size: images in the data set, > 0.
        batch: images per step; it may straddle epochs.
        seed: the run's seed.
        step: counted from 0.
    """
    first, end = step * batch, (step + 1) * batch
    parts = []
    while first < end:
        epoch, start = divmod(first, size)
        parts.append(_permutation(size, seed, epoch)[start : start + end - first])
        first += len(parts[-1])
    return torch.cat(parts)


class StepBatches:
    """A batch sampler for `DataLoader`: the indices of steps first_step .. last_step - 1, of them
    this rank's share.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.size = size
        self.batch = batch
        self.seed = seed
        self.steps = range(first_step, last_step)
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield step_indices(self.size, self.batch, self.seed, step)[self.share].tolist()
