"""What makes a run faster and nothing else: the same network comes out."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.runs import check_same, contents, start
from helpers.tiny import TINY, data_set, options_of, pixels
from tdkern.data import ImageDataset
from tdkern.networks import presets
from tdkern.training import Trainer
from tdkern.training import trainer as trainer_module
from tdkern.training.distributed import this_process

pytestmark = pytest.mark.usefixtures("short_previews")


RAISED = TINY | {"lr_rampup_kimg": 0}


def losses(run_dir):
    lines = (run_dir / "stats.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def without_options(files):
    """What a run leaves, but for the options that it was started with."""
    for name in files:
        if name.endswith("meta.json"):
            files[name].pop("options")
            files[name].pop("checksums")
    return files


@pytest.mark.parametrize("changes", [{}, {"clip": 0.5}, {"optim": "radam"}])
def test_a_power_of_two_as_loss_scaling_changes_no_bit(tmp_path, data, changes):
    make = functools.partial(options_of, data=data, duration=24e-6, **RAISED | changes)
    runs = [start(make(ls=ls), tmp_path / f"{ls:g}") for ls in (1.0, 1024.0)]
    check_same(*(without_options(contents(run_dir)) for run_dir in runs))


def test_another_loss_scaling_is_taken_out_again(tmp_path, data):
    make = functools.partial(options_of, data=data, duration=24e-6, **TINY)
    found = [losses(start(make(ls=ls), tmp_path / f"{ls:g}")) for ls in (1.0, 300.0)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["edm", "ct"])
def test_compiled_networks_train_alike(tmp_path, data, monkeypatch, family):
    """By a backend that takes no compiler: what is left is tracing, and who calls what."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(trainer_module.torch, "compile", compiled)
    changes = TINY | {"family": family, "total_training_steps": 1000 if family == "ct" else None}
    make = functools.partial(options_of, data=data, duration=24e-6, **changes)
    found = [losses(start(make(compile=on), tmp_path / str(on))) for on in (False, True)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_a_compiled_run_calls_what_it_compiled(data, monkeypatch):
    calls = []

    def compiled(module):
        module.register_forward_hook(lambda *_: calls.append(module))
        return module

    monkeypatch.setattr(trainer_module.torch, "compile", compiled)
    trainer = Trainer(options_of(data=data, duration=1e-3, compile=True, **TINY), this_process())
    images, labels = zip(*(trainer.dataset[i] for i in range(8)), strict=True)
    trainer.train_step(torch.stack(images), torch.stack(labels))
    assert calls == [trainer.net, trainer.target.module]


@pytest.mark.parametrize(
    "changes",
    [
        {"td_sigma": [0.3, 5.0], "batch_gpu": 4, "dropout": 0.3},
        {"family": "ct", "scale_mode": "exponential", "total_training_steps": 8},
    ],
    ids=["edm", "ct"],
)
def test_each_network_is_compiled_once(data, monkeypatch, changes):
    """Neither other noise levels nor accumulation nor a curriculum's next stage compiles anew."""
    monkeypatch.setitem(presets.DDPMPP, "num_blocks", 0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = functools.partial(torch.compile, backend=counter)
    monkeypatch.setattr(trainer_module.torch, "compile", compiled)
    options = options_of(data=data, duration=1e-3, compile=True, **TINY | changes)
    trainer = Trainer(options, this_process())
    images, labels = zip(*(trainer.dataset[i] for i in range(8)), strict=True)
    for _ in range(3):
        trainer.train_step(torch.stack(images), torch.stack(labels))
    assert counter.frame_count == 2


def test_bench_sets_what_it_says(data, monkeypatch):
    """On a stand-in: torch.testing locks the real ones in a process that has imported it."""
    cudnn = SimpleNamespace(benchmark=False, deterministic=True, allow_tf32=False)
    matmul = SimpleNamespace(allow_tf32=False)
    with monkeypatch.context() as patch:
        cuda = SimpleNamespace(matmul=matmul)
        patch.setattr(torch, "backends", SimpleNamespace(cudnn=cudnn, cuda=cuda))
        trainer_module.measure_kernels()
    assert cudnn.benchmark and cudnn.allow_tf32 and matmul.allow_tf32 and not cudnn.deterministic
    called = []
    monkeypatch.setattr(trainer_module, "measure_kernels", lambda: called.append(True))
    for bench in (False, True):
        Trainer(options_of(data=data, duration=1e-3, bench=bench, **TINY), this_process())
        assert called == ([True] if bench else [])


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_the_images_and_are_read_once(tmp_path, monkeypatch, workers):
    path = data_set(tmp_path / "images.zip", pixels(10), [i % 3 for i in range(10)])
    plain = ImageDataset(path, use_labels=True, xflip=True)
    cached = ImageDataset(path, use_labels=True, xflip=True, cache=True)
    loader = torch.utils.data.DataLoader(
        cached,
        batch_size=4,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    for _ in range(2):
        images = torch.cat([batch for batch, _ in loader])
        assert torch.equal(images, torch.stack([image for image, _ in plain]))
    monkeypatch.setattr(ImageDataset, "_decoded", lambda self, raw: pytest.fail("read again"))
    assert torch.equal(torch.stack([image for image, _ in cached]), images)


def test_what_a_user_does_to_an_image_does_not_change_the_cache(tmp_path):
    path = data_set(tmp_path / "images.zip", pixels(3))
    cached = ImageDataset(path, cache=True)
    image, _ = cached[1]
    kept = image.clone()
    image.zero_()
    assert torch.equal(cached[1][0], kept)
