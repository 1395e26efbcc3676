"""A step as a CUDA graph holds it, without a GPU.

`helpers.capture` records the operations of one step on the CPU and does them again: what a replay
takes from the host is what it was at the capture, as in a graph.
"""

import pytest
import torch

from helpers.capture import Watched, graphed
from helpers.tiny import TINY, options_of
from tdkern.training import Trainer
from tdkern.training.distributed import this_process
from tdkern.training.graph import WARM_UP

FAST = TINY | {"lr_rampup_kimg": 0.1, "duration": 1e-3}
STEPS = {
    "edm": {"td": False},
    "edm-td": {},
    "edm-window": {"td_sigma": [0.3, 5.0], "td_share": 0.5},
    "ct": {"family": "ct", "td": False, "scale_mode": "fixed"},
    "ct-td": {"family": "ct", "scale_mode": "fixed"},
    "ct-dropout": {"family": "ct", "td": False, "scale_mode": "fixed", "dropout": 0.3},
    "ct-lognormal": {"family": "ct", "td": False, "scale_mode": "fixed", "lognormal": [-1.1, 2.0]},
    "ddpm": {"family": "ddpm", "td": False},
    "ddpm-td": {"family": "ddpm"},
    "iddpm": {"family": "iddpm"},
    "vp": {"family": "vp"},
    "ve": {"family": "ve"},
    "flow": {"family": "flow"},
    "flow-end": {"family": "flow", "td": False},
    "clip": {"clip": 0.5, "ls": 300.0},
    "power": {"power_ema": [0.05, 0.1], "lr_decay": "cosine"},
    "augment": {"augment": 0.5, "cond": True, "batch_gpu": 4},
    "copy": {"target_copy": 2, "dropout": 0.3, "batch_gpu": 2},
    "radam": {"optim": "radam", "weight_decay": 0.1, "lr_rampup_kimg": 0},
    "bf16": {"precision": "bf16", "target_precision": "fp16"},
}


def trainer_of(data, **changes):
    return Trainer(options_of(data=data, **FAST | changes), this_process())


def train(trainer, steps):
    """Steps on images that differ from step to step."""
    for _ in range(steps):
        first = trainer.step
        images, labels = zip(*(trainer.dataset[(first + i) % 10] for i in range(8)), strict=True)
        with Watched():
            trainer.train_step(torch.stack(images), torch.stack(labels))


def check_same(ours, theirs):
    expected = theirs.tensors() | {"sums": theirs.sums, "skipped": theirs.optimizer.skipped}
    found = ours.tensors() | {"sums": ours.sums, "skipped": ours.optimizer.skipped}
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_replayed_steps_are_the_steps(data, monkeypatch, changes):
    eager, ours = trainer_of(data, **changes), trainer_of(data, **changes)
    graphs = graphed(ours, monkeypatch)
    for trainer in (eager, ours):
        train(trainer, WARM_UP + 3)
    (graph,) = graphs
    assert graph.replays == 3
    check_same(ours, eager)
