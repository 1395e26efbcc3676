"""A step as a CUDA graph holds it, without a GPU.

`helpers.capture` has the step on a device that nobody can read, and on the CPU as recorded
operations: what these take from the host is what it was at the capture, as in a graph.
"""

from collections import Counter

import pytest
import torch

from helpers.capture import OnDevice, Watched, graphed
from helpers.tiny import TINY, options_of, tdkern_
from tdkern.networks import presets
from tdkern.ops import _backends
from tdkern.training import Trainer, graph
from tdkern.training.distributed import Process, this_process
from tdkern.training.graph import CaptureError

FAST = TINY | {"lr_rampup_kimg": 0.1, "duration": 1e-3}
CT = {"family": "ct", "scale_mode": "fixed"}
# every family, and options that change what a step does
STEPS = {
    "edm": {"td": False},
    "edm-td": {},
    "edm-window": {"td_sigma": [0.3, 5.0], "td_share": 0.5},
    "edm-parts": {"augment": 0.5, "cond": True, "batch_gpu": 4, "dropout": 0.3},
    "edm-half": {"precision": "bf16", "target_precision": "fp16"},
    "edm-radam": {
        "optim": "radam",
        "weight_decay": 0.1,
        "lr_rampup_kimg": 0,
        "uncertainty": True,
    },
    "ct": CT | {"td": False, "dropout": 0.3, "lognormal": [-1.1, 2.0]},
    "ct-td": CT,
    "ddpm-u": {"family": "ddpm", "uncertainty": True},
    "vp-clip": {"family": "vp", "clip": 0.5, "ls": 300.0, "uncertainty": True},
    "ve-copy": {"family": "ve", "target_copy": 2},
    "flow-power": {"family": "flow", "power_ema": [0.05, 0.1], "lr_decay": "cosine"},
}


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Few blocks: how many there are changes nothing here but the time."""
    monkeypatch.setitem(presets.DDPMPP, "num_blocks", 0)


every_step = pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)


def trainer_of(data, **changes):
    return Trainer(options_of(data=data, **FAST | changes), this_process())


def batch(trainer):
    """Images and labels that are others in every step."""
    place = [(trainer.step + i) % 10 for i in range(8)]
    images, labels = zip(*(trainer.dataset[i] for i in place), strict=True)
    return torch.stack(images), torch.stack(labels)


def train(trainer, steps):
    for _ in range(steps):
        images, labels = batch(trainer)
        with Watched():
            trainer.train_step(images, labels)


def check_same(ours, theirs):
    found, expected = (
        trainer.tensors() | {"sums": trainer.sums, "skipped": trainer.optimizer.skipped}
        for trainer in (ours, theirs)
    )
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# ---- on a device that nobody can read


@pytest.fixture
def on_device(data, monkeypatch):
    """Makes trainers on the device "meta", where the ops are those of the C++ backend."""
    monkeypatch.setitem(_backends.FITTING, "meta", ("cpp",))

    def make(**changes):
        device = torch.device("meta")
        with device:
            return Trainer(options_of(data=data, **FAST | changes), Process(0, 1, device))

    return make


@every_step
def test_no_step_waits_for_the_device_and_all_have_the_same_shapes(on_device, changes):
    trainer = on_device(**changes)
    images, labels = (tensor.to("meta") for tensor in batch(trainer))
    trainer.train_step(images, labels)  # which makes Adam's state, and tables that are kept
    steps = []
    for _ in range(2):
        with OnDevice() as mode:
            trainer.train_step(images, labels)
        steps.append(mode.seen)
    assert len(steps[0]) > 100 and steps[0] == steps[1]


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_what_waits_is_seen(on_device, wait):
    trainer = on_device()
    real = trainer._accumulate

    def accumulate(*args):
        sums = real(*args)
        wait(sums)
        return sums

    trainer._accumulate = accumulate
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OnDevice():
        trainer.train_step(*(tensor.to("meta") for tensor in batch(trainer)))


# ---- recorded and done again


@every_step
def test_replayed_steps_are_the_steps(data, monkeypatch, changes):
    monkeypatch.setattr(graph, "WARM_UP", 1)
    eager, ours = trainer_of(data, **changes), trainer_of(data, **changes)
    graphs = graphed(ours, monkeypatch)
    for trainer in (eager, ours):
        train(trainer, 4)
    assert [each.replays for each in graphs] == [3]
    check_same(ours, eager)


def test_steps_go_on_from_a_tick_and_a_skipped_step(data, monkeypatch):
    """The statistics are taken in place; a step that is not taken is counted, and no other."""
    monkeypatch.setattr(graph, "WARM_UP", 1)
    eager, ours = trainer_of(data, lr_rampup_kimg=0), trainer_of(data, lr_rampup_kimg=0)
    graphed(ours, monkeypatch)
    told = []
    for trainer in (eager, ours):
        train(trainer, 3)
        told.append([trainer.statistics()])
        weight = trainer.net.model.map_layer0.weight.detach()[0, 0]
        kept = weight.clone()
        weight.fill_(torch.nan)
        train(trainer, 1)
        weight.copy_(kept)
        train(trainer, 1)
        told[-1].append(trainer.statistics())
    assert repr(told[0]) == repr(told[1])  # NaN is no NaN
    assert [each["skipped"] for each in told[0]] == [0, 1]
    check_same(ours, eager)


def test_a_curriculum_s_next_stage_is_captured_anew(data, monkeypatch):
    monkeypatch.setattr(graph, "WARM_UP", 2)
    changes = {"family": "ct", "scale_mode": "exponential", "total_training_steps": 40}
    eager, ours = trainer_of(data, **changes), trainer_of(data, **changes)
    graphs = graphed(ours, monkeypatch)
    stages = Counter(eager.loss.at(step).num_scales for step in range(12))
    for trainer in (eager, ours):
        train(trainer, 12)
    assert len(stages) > 2
    assert [each.replays for each in graphs] == [n - 2 for n in stages.values() if n > 2]
    check_same(ours, eager)


def test_a_step_that_cannot_be_captured_ends_the_run_with_what_it_has(data, monkeypatch):
    trainer, straight = trainer_of(data), trainer_of(data)
    graphed(trainer, monkeypatch)
    train(straight, graph.WARM_UP)
    train(trainer, graph.WARM_UP)
    monkeypatch.setattr(trainer, "_augmented", lambda x0, *_: (x0 * x0.sum().item(), None))
    with pytest.raises(CaptureError, match=r"cuda_graph: the step cannot be captured \(.*; go on"):
        train(trainer, 1)
    assert trainer.whole and trainer.step == graph.WARM_UP
    check_same(trainer, straight)


# ---- asked for


def test_a_graph_needs_a_gpu(data, tmp_path):
    args = ("train", "--data", data, "--outdir", tmp_path, "--cuda-graph", 1)
    output = tdkern_(*args, code=1)
    assert output == "Error: cuda_graph must be False where there is no GPU, got True\n"


def test_a_graph_is_one_process_s(data):
    with pytest.raises(ValueError, match="cuda_graph must be False with 2 processes, got True"):
        options_of(data=data, cuda_graph=True, gpus=2, **FAST)
