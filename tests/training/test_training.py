import copy
import dataclasses
import json
import math
import re
import time

import numpy as np
import PIL.Image
import pytest
import torch

import tdkern.samplers as samplers
from helpers import ROOT
from helpers.tiny import TINY, in_two_processes, invoked, options_of, pixels, quick_pictures
from tdkern.data import derive_seed, step_indices, to_float
from tdkern.families import FAMILIES
from tdkern.schedules import EDM
from tdkern.training import Options, Trainer, loop, record, sample, sampling, train
from tdkern.training import trainer as trainer_module
from tdkern.training.checkpoint import STATE, find, read, read_options, write
from tdkern.training.distributed import joined, this_process
from tdkern.training.trainer import clip_factor, gradient_norm, learning_rate

pytestmark = pytest.mark.usefixtures("short_previews")

CPU = torch.device("cpu")


def batch(trainer, rank=0, world=1):
    """The images and labels of a trainer's next step."""
    size = trainer.options.batch // world
    chosen = step_indices(
        len(trainer.dataset), trainer.options.batch, trainer.options.seed, trainer.step
    )[rank * size : (rank + 1) * size]
    images, labels = zip(*(trainer.dataset[i] for i in chosen.tolist()), strict=True)
    return torch.stack(images), torch.stack(labels)


def test_gradients_are_a_sum_over_elements_and_a_mean_over_the_batch(data):
    trainer = Trainer(
        options_of(
            data=data, duration=1e-4, **TINY | {"td": False, "dropout": 0.0, "batch_gpu": 4}
        ),
        this_process(),
    )
    images, labels = batch(trainer)
    torch.manual_seed(derive_seed(0, "step", 0))
    x0 = to_float(images)
    pair = trainer.loss.pair(x0)
    sigma = pair.levels[:, 0].float()[:, None, None, None]
    D = trainer.net(pair.x_t, sigma.flatten())
    # EDM's loss, arXiv 2206.00364, written out, of the whole batch
    total = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (D - x0) ** 2).sum() / 8
    expected = torch.autograd.grad(total, list(trainer.net.parameters()))
    trainer.train_step(images, labels)
    for parameter, gradient in zip(trainer.net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_one_step_updates_network_and_averages(data):
    trainer = Trainer(
        options_of(data=data, duration=1e-3, **TINY | {"ema": 1e-4, "lr_rampup_kimg": 1.6}),
        this_process(),
    )
    trainer.train_step(*batch(trainer))
    assert trainer.nimg == 8
    trainer.step = 100
    modules = {"net": trainer.net, "ema": trainer.ema.module, "target": trainer.target.module}
    before = {
        name: [parameter.detach().clone() for parameter in module.parameters()]
        for name, module in modules.items()
    }
    trainer.train_step(*batch(trainer))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 800 / 1600)
    # half-life of 5 % of 800 images; (1 + j) / (10 + j) at j = 100
    decays = {
        "ema": 0.5 ** (8 / 40),
        "target": 101 / 110,
    }
    for i, parameter in enumerate(trainer.net.parameters()):
        for name, decay in decays.items():
            torch.testing.assert_close(
                list(modules[name].parameters())[i],
                decay * before[name][i] + (1 - decay) * parameter,
            )
    changes = torch.stack(
        [
            (parameter - old).abs().max()
            for parameter, old in zip(trainer.net.parameters(), before["net"], strict=True)
        ]
    )
    assert 1e-4 < changes.max() < 1e-3  # Adam's first steps are of the size of the learning rate


@pytest.mark.parametrize("family", ["vp", "ve"])
@pytest.mark.parametrize("td", [False, True], ids=["edm", "td"])
def test_other_families(data, family, td):
    trainer = Trainer(
        options_of(
            data=data, duration=1e-3, **TINY | {"family": family, "td": td, "lr_rampup_kimg": 0}
        ),
        this_process(),
    )
    assert type(trainer.loss).__name__ == ("TD" if td else "") + family.upper() + "Loss"
    assert trainer.loss.fits(trainer.net)  # the fused path
    before = [parameter.clone() for parameter in trainer.net.parameters()]
    trainer.train_step(*batch(trainer))
    assert any(
        not torch.equal(*pair) for pair in zip(trainer.net.parameters(), before, strict=True)
    )
    statistics = trainer.statistics()
    assert all(map(math.isfinite, statistics.values())) and statistics["skipped"] == 0
    assert not td or statistics["valid"] > 0
    if td:
        assert trainer.loss.one_idx == 1 and trainer.options.loss["one_idx"] == 1
    levels = sampling.preview_levels(trainer.net)[:-1]
    assert levels.min() == pytest.approx(max(trainer.net.sigma_min, 0.002), rel=1e-12)
    assert levels.max() == pytest.approx(min(trainer.net.sigma_max, 80), rel=1e-12)


def test_options_of_other_families():
    assert Options(data="").loss["one_idx"] == 0.25
    with pytest.raises(ValueError, match="td_sigma is for family edm, got family vp"):
        options_of(data="", family="vp", td_sigma=[0.1, 1.0])
    with pytest.raises(ValueError, match=f"family must be one of {', '.join(FAMILIES)}, got 'no'"):
        Options(data="", family="no")


def test_hard_target_copies(data):
    trainer = Trainer(
        options_of(data=data, duration=1e-3, **TINY | {"target_copy": 2, "lr_rampup_kimg": 0}),
        this_process(),
    )
    for copied in (True, False, True, False):
        before = [parameter.clone() for parameter in trainer.target.module.parameters()]
        trainer.train_step(*batch(trainer))
        expected = trainer.net.parameters() if copied else before
        assert all(
            torch.equal(*pair)
            for pair in zip(trainer.target.module.parameters(), expected, strict=True)
        )


def test_the_targets_decay_is_reached_by_a_ramp(data):
    trainer = Trainer(
        options_of(
            data=data, duration=1e-3, **TINY | {"target_ema_tau": 0.15, "lr_rampup_kimg": 0}
        ),
        this_process(),
    )
    for decay in (0.1, 0.15, 0.15):
        before = [parameter.clone() for parameter in trainer.target.module.parameters()]
        trainer.train_step(*batch(trainer))
        for new, old, parameter in zip(
            trainer.target.module.parameters(), before, trainer.net.parameters(), strict=True
        ):
            torch.testing.assert_close(new, decay * old + (1 - decay) * parameter)


def test_a_copy_that_was_due_at_a_skipped_step_is_made_at_the_next(data):
    trainer = Trainer(
        options_of(data=data, duration=1e-3, **TINY | {"target_copy": 3, "lr_rampup_kimg": 0}),
        this_process(),
    )
    parameter = next(trainer.net.parameters())
    for step, copied in enumerate((True, False, False, False, True, False)):
        before = [parameter.clone() for parameter in trainer.target.module.parameters()]
        hook = parameter.register_hook(
            lambda gradient, step=step: gradient * math.nan if step == 3 else gradient
        )
        trainer.train_step(*batch(trainer))
        hook.remove()
        assert trainer.optimizer.skipped == (step >= 3)
        expected = trainer.net.parameters() if copied else before
        assert all(
            torch.equal(*pair)
            for pair in zip(trainer.target.module.parameters(), expected, strict=True)
        ), step


def test_the_target_network_on_a_share_and_in_another_precision(data):
    changes = {
        "batch_gpu": 4,
        "td_share": 0.5,
        "target_precision": "bf16",
        "lr_rampup_kimg": 0,
        "cond": True,
        "augment": 0.5,
    }
    trainer = Trainer(options_of(data=data, duration=1e-3, **TINY | changes), this_process())
    seen = {"net": [], "target": []}
    for name, module in (("net", trainer.net), ("target", trainer.target.module)):
        module.model.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append([args[0].dtype, *map(len, args)])
        )
    for _ in range(3):
        trainer.train_step(*batch(trainer))
    assert (
        seen["net"] == [[torch.float32, 4, 4, 4, 4]] * 6
        and seen["target"] == [[torch.bfloat16, 2, 2, 2, 2]] * 6
    )
    assert {parameter.dtype for parameter in trainer.target.module.parameters()} == {torch.float32}
    statistics = trainer.statistics()
    assert 0 < statistics["valid"] <= 0.5 and all(map(math.isfinite, statistics.values()))


def test_share_by_default():
    assert Options(data="").loss["td_share"] == 1  # as in runs from before there was one
    assert options_of(data="", td_share=None).loss["td_share"] == 1
    window = options_of(data="", batch=512, gpus=4, td_sigma=[0.3, 5.0], td_share=None)
    assert window.loss["td_share"] == pytest.approx(
        0.4917 + (0.4917 * 0.5083 / 128) ** 0.5, abs=1e-4
    )
    # next to none, nearly all
    for td_sigma, share in (
        ([70.0, 80.0], 1e-4),
        ([-1.0, 80.0], 1),
    ):
        assert options_of(data="", batch=512, td_sigma=td_sigma, td_share=None).loss[
            "td_share"
        ] == pytest.approx(share, abs=1e-12)
    with pytest.raises(
        ValueError, match="target_precision must be one of fp32, fp16, bf16, got 'fp8'"
    ):
        Options(data="", target_precision="fp8")


@pytest.mark.parametrize("value", [math.nan, 1e25])
def test_a_gradient_whose_square_is_not_finite_does_not_reach_the_weights(data, value):
    trainer = Trainer(
        options_of(data=data, duration=1e-3, **TINY | {"lr_rampup_kimg": 0}), this_process()
    )
    parameter = next(trainer.net.parameters())
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
    before = {name: tensor.clone() for name, tensor in trainer.net.state_dict().items()}
    trainer.train_step(*batch(trainer))
    # the whole step is left out
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in trainer.net.state_dict().items()
    )
    assert all(torch.isfinite(tensor).all() for tensor in trainer.tensors().values())
    assert trainer.statistics()["skipped"] == 1
    assert trainer.optimizer.skipped == 0  # it counts from tick to tick


@pytest.mark.parametrize("optim", ["adam", "radam"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_optimizers_with_weight_decay_and_clipping(data, optim, clip):
    """Each step is torch's, on gradients clipped by torch, and its skipped steps leave no trace."""
    options = {"optim": optim, "weight_decay": 0.1, "clip": clip, "lr_rampup_kimg": 0, "lr": 0.01}
    trainer = Trainer(options_of(data=data, duration=1e-3, **TINY | options), this_process())
    other = copy.deepcopy(trainer.net)
    if optim == "adam":
        theirs = torch.optim.AdamW(other.parameters(), 0.01, weight_decay=0.1)
    else:
        theirs = torch.optim.RAdam(
            other.parameters(), 0.01, weight_decay=0.1, decoupled_weight_decay=True
        )
    spoil = []
    last = list(trainer.net.parameters())[-1]
    last.register_hook(lambda gradient: gradient * math.nan if spoil else gradient)
    for step in range(8):  # RAdam's first five are not rectified
        spoil[:] = [True] if step == 2 else []
        trainer.train_step(*batch(trainer))
        if spoil:
            continue
        for param, same in zip(trainer.net.parameters(), other.parameters(), strict=True):
            same.grad = param.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), clip or math.inf)
        assert clip is None or norm > 2 * clip
        theirs.step()
    for param, same in zip(trainer.net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, same, rtol=1e-4, atol=1e-5)
    assert trainer.statistics()["skipped"] == 1


@pytest.mark.parametrize(
    ("grads", "factor"),
    [([3.0, 4.0], 0.2), ([0.3, 0.4], 1.0), ([0.0, 0.0], 1.0), ([1e30, 1e30], math.nan)],
)
def test_clip_factor(grads, factor):
    """A norm that overflows, although no gradient does, skips the step in place of stopping it."""
    found = clip_factor(gradient_norm([torch.tensor([grad]) for grad in grads]), 1.0)
    assert found.item() == pytest.approx(factor, nan_ok=True)


def test_augmentation(data, monkeypatch):
    """The networks see augmented images and the labels that say how, both the same; the pipe's
    probability is the option's.
    """
    trainer = Trainer(
        options_of(data=data, duration=1e-3, **TINY | {"augment": 0.6, "batch_gpu": 4}),
        this_process(),
    )
    assert (
        trainer.network["model_arguments"]["augment_dim"] == 9
        and trainer.augment_pipe.p == 0.6
        and trainer.augment_pipe.xflip > 1e6
    )
    seen = {"net": [], "target": [], "ema": []}
    piped = []
    noised = []
    real = type(trainer.loss).pair
    for name, module in (
        ("net", trainer.net),
        ("target", trainer.target.module),
        ("ema", trainer.ema.module),
    ):
        module.model.map_augment.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0])
        )
    trainer.augment_pipe.register_forward_hook(lambda _, args, out: piped.append((args[0], *out)))
    monkeypatch.setattr(
        type(trainer.loss), "pair", lambda self, images: noised.append(images) or real(self, images)
    )
    images, labels = batch(trainer)
    trainer.train_step(images, labels)
    torch.manual_seed(derive_seed(0, "step", 0))
    expected, expected_labels = trainer.augment_pipe(to_float(images))  # of the whole batch
    torch.testing.assert_close(torch.cat([out for _, out, _ in piped[:2]]), expected)
    assert torch.equal(torch.cat(seen["net"]), expected_labels) and expected_labels.any()
    assert len(piped) - 1 == 2 and len(seen["net"]) == len(seen["target"]) == 2
    for i, (given, out, out_labels) in enumerate(piped[:2]):
        assert torch.equal(given, to_float(images.split(4)[i])) and torch.equal(noised[i], out)
        assert torch.equal(seen["net"][i], out_labels) and torch.equal(
            seen["target"][i], out_labels
        )
    assert trainer.net.model.map_augment.weight.grad.any()
    sample(trainer.ema.module, trainer.network, [0], EDM(steps=2).sigmas())
    assert not seen["ema"]  # sampling passes none
    assert (
        Trainer(options_of(data=data, duration=1e-3, **TINY), this_process()).network[
            "model_arguments"
        ]["augment_dim"]
        == 0
    )


def test_statistics_stay_json_where_a_loss_is_not_finite(data, tmp_path):
    trainer = Trainer(options_of(data=data, duration=1e-3, **TINY), this_process())
    trainer.train_step(*batch(trainer))
    trainer.sums[0] = math.nan
    record.Record(trainer, tmp_path).tick(trainer.statistics())
    line = json.loads(
        (tmp_path / "stats.jsonl").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert line["loss"] is None and line["td"] > 0
    assert line["seconds_left"] is None  # no image since the record began
    assert "loss none" in (tmp_path / "log.txt").read_text()


def test_learning_rate():
    options = Options(data="", duration=100, lr=0.01)
    assert options.lr_rampup_kimg == 5000
    assert [learning_rate(options, nimg) for nimg in (0, 2_500_000, 5_000_000, 99_000_000)] == [
        0,
        0.005,
        0.01,
        0.01,
    ]
    options = Options(data="", duration=100, lr=0.01, lr_decay="cosine", lr_rampup_kimg=0)
    assert [learning_rate(options, nimg) for nimg in (0, 50_000_000, 100_000_000)] == pytest.approx(
        [0.01, 0.005, 0]
    )
    assert Options(data="").lr_rampup_kimg == 10_000
    assert Options(data="").tick == 50


@pytest.mark.parametrize(
    "duration, size, steps",
    [(200, 512, 390625), (1e-3, 8, 125), (1.1e-3, 100, 11), (1.01e-3, 100, 11), (1e-6, 512, 1)],
)
def test_steps_of_a_duration(duration, size, steps):
    assert Options(data="", duration=duration, batch=size).total_steps == steps


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"duration": 0}, "duration must be positive, got 0"),
        ({"batch": -1}, "batch must be positive"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"augment": 1.2}, r"augment must be in \[0, 1\], got 1.2"),
        (
            {"batch": 8, "batch_gpu": 3},
            "batch must be a multiple of batch_gpu x processes, got batch 8, batch_gpu 3, 1 "
            "processes",
        ),
        ({"batch": 9, "gpus": 2}, "batch must be a multiple of batch_gpu x processes"),
        ({"target_ema_tau": 1.0}, r"target_ema_tau must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"data": "", **changes})


@pytest.mark.parametrize(
    "decay, changes, message",
    [
        ("none", {"batch": 16}, "batch is 8 in the run to resume, got 16"),
        ("none", {"lr_decay": "cosine"}, "lr_decay is 'none' in the run to resume, got 'cosine'"),
        ("cosine", {"duration": 2.0}, "duration is 1.0 in the run to resume, got 2.0"),
    ],
)
def test_a_resumed_run_keeps_the_options_that_make_its_weights(decay, changes, message):
    options = Options(data="a", duration=1.0, lr_decay=decay, **TINY)
    with pytest.raises(ValueError, match=message):
        options.resumed(**changes)
    moved = options.resumed(data="b", workers=3, snap=1, batch=8)
    assert (moved.data, moved.workers, moved.snap, moved.lr_rampup_kimg) == (
        "b",
        3,
        1,
        options.lr_rampup_kimg,
    )


def test_statistics_are_means_over_the_tick(tmp_path, data):
    options = options_of(
        data=data, duration=32e-6, **TINY | {"tick": 0.016, "lr": 1e-12, "dropout": 0.0}
    )
    (tmp_path / "run").mkdir()
    train(Trainer(options, this_process()), tmp_path / "run")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    ]
    assert [line["kimg"] for line in lines] == [0.016, 0.032]
    trainer, values = Trainer(options, this_process()), []
    for _ in range(4):
        trainer.train_step(*batch(trainer))
        values.append(trainer.statistics())
    for line, pair in zip(lines, (values[:2], values[2:]), strict=True):
        for name in ("loss", "td", "base", "valid"):
            assert line[name] == pytest.approx(sum(value[name] for value in pair) / 2)
        assert line["loss"] == pytest.approx(line["td"] + line["base"])
        assert line["td"] > 0
        assert line["base"] > 0
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2


class Clock:
    """In place of the module `time`: only what is told to take time takes it."""

    time, strftime = staticmethod(time.time), staticmethod(time.strftime)

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def slow(self, real, seconds):
        """A function that takes so many seconds."""

        def call(*args, **kwargs):
            self.now += seconds
            return real(*args, **kwargs)

        return call


def test_images_per_second_leave_out_what_is_saved(tmp_path, data, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(record, "time", clock)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(Trainer, "train_step", clock.slow(Trainer.train_step, 2.0))
    for name in ("snapshot", "state"):
        monkeypatch.setattr(record.Record, name, clock.slow(getattr(record.Record, name), 100.0))
    options = options_of(data=data, duration=40e-6, **TINY | {"snap": 2})
    train(Trainer(options, this_process()), tmp_path)
    ticks = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert clock.now == 5 * 2 + 3 * 100 + 5 * 100  # snapshots after 2, 4 and 5 steps
    assert [tick["images_per_s"] for tick in ticks] == [4.0] * 5


def test_a_run_directory_holds_options_and_grids(tmp_path, data):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    options = options_of(data=data, duration=8e-6, **TINY)
    train(Trainer(options, this_process()), run_dir)
    assert Options(**read_options(run_dir / "training_options.json")) == options
    reals = np.array(PIL.Image.open(run_dir / "reals.png"))
    assert (
        reals.shape
        == np.array(PIL.Image.open(run_dir / "fakes-000000.008.png")).shape
        == (32, 32, 3)
    )
    chosen = step_indices(10, 16, 0, 0).tolist()
    assert np.array_equal(reals[8:16, 16:24].transpose(2, 0, 1), pixels(10)[chosen[6]])


def test_a_state_of_another_network_is_refused(tmp_path, data):
    small = Trainer(options_of(data=data, duration=1e-3, **TINY), this_process())
    small.train_step(*batch(small))
    path = write(tmp_path, STATE, 8, small.tensors(), {"step": 1})
    with pytest.raises(
        ValueError, match=r"does not match the network: model\.dec\.8x8_aux_conv\.weight must be"
    ):
        Trainer(options_of(data=data, duration=1e-3, **TINY | {"cbase": 8}), this_process(), path)
    path = write(
        tmp_path,
        STATE,
        16,
        {
            name: tensor
            for name, tensor in small.tensors().items()
            if not name.startswith("exp_avg.")
        },
        {"step": 1},
    )
    with pytest.raises(ValueError, match="damaged: Adam's state"):
        Trainer(options_of(data=data, duration=1e-3, **TINY), this_process(), path)


def test_an_image_depends_on_its_seed_alone(data, monkeypatch):
    trainer = Trainer(options_of(data=data, duration=1e-3, **TINY | {"cond": True}), this_process())
    net = trainer.ema.module
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    sigmas = EDM(steps=4).sigmas()
    churn = {"S_churn": 10.0, "S_noise": 1.01}
    fused, heun_step = [], samplers.base.heun_step
    monkeypatch.setattr(
        samplers.base,
        "heun_step",
        lambda *args, **kwargs: fused.append(1) or heun_step(*args, **kwargs),
    )
    together = sample(net, trainer.network, [5, 6, 7], sigmas, **churn)
    assert len(fused) == 7  # samples take the samplers' fused path
    assert together.shape == (3, 3, 8, 8)
    assert together.dtype == torch.uint8
    torch.rand(3)
    for i, seed in enumerate([5, 6, 7]):
        alone = sample(net, trainer.network, [seed], sigmas, **churn)
        # a batch of another size may round otherwise
        assert (alone[0].int() - together[i].int()).abs().max() <= 1
    assert (together[0].int() - together[1].int()).abs().max() > 10
    given = [sample(net, trainer.network, [5], sigmas, class_idx=c) for c in range(3)]
    assert (
        sum(torch.equal(image, sample(net, trainer.network, [5], sigmas)) for image in given) == 1
    )
    with pytest.raises(
        ValueError, match="class must be one of the network's 3 classes, counted from 0, got 3"
    ):
        sample(net, trainer.network, [5], sigmas, class_idx=3)


def test_latents_are_drawn_in_float64(data):
    """By a generator of the seed's own, so another than EDM's float32 of the same seed: what the
    help and docs/swap_in.md say.
    """
    trainer = Trainer(options_of(data=data, duration=1e-3, **TINY), this_process())
    begun = []

    def sampler(denoiser, x, sigmas):
        begun.append(x)
        return x.clamp(-1, 1)

    sample(trainer.ema.module, trainer.network, [5, 6], EDM(steps=4).sigmas(), sampler=sampler)
    for i, seed in enumerate((5, 6)):
        draws = [
            torch.randn(3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))
            for dtype in (torch.float64, torch.float32)
        ]
        torch.testing.assert_close(begun[0][i] / 80, draws[0], rtol=1e-12, atol=0)
        assert (begun[0][i] / 80 - draws[1]).abs().max() > 1
    said = re.sub(r"\s+", " ", invoked("generate", "--help").output)
    assert "latent is drawn in float64" in said and "EDM's generate.py draws float32" in said
    page = re.sub(r"\s+", " ", (ROOT / "docs/swap_in.md").read_text())
    assert "A seed is another image here than in EDM's `generate.py`" in page


def _rank(rank, run_dir, options, state):
    """One of two processes."""
    quick_pictures()
    derive = trainer_module.derive_seed
    # only the first's start may count
    trainer_module.derive_seed = lambda seed, stream, *numbers: derive(
        seed + (rank if stream == "init" else 0), stream, *numbers
    )
    with joined() as process:
        trainer = Trainer(options, process, state)
        train(trainer, run_dir if rank == 0 else None)
        write(
            run_dir / f"rank{rank}", STATE, trainer.nimg, trainer.tensors(), {"step": trainer.step}
        )


def _two_processes(run_dir, options, state=None):
    for rank in range(2):
        (run_dir / f"rank{rank}").mkdir(parents=True, exist_ok=True)
    in_two_processes(_rank, run_dir, options, state)
    return [read(find(run_dir / f"rank{rank}", STATE), STATE)[1] for rank in range(2)]


def _same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in child processes: torch's own gradients differ in their last bits between numbers
    of threads.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_train_one_network(tmp_path, data, one_thread):
    changes = {"lr_rampup_kimg": 0, "td_share": 0.5, "augment": 0.5}
    options = options_of(data=data, duration=24e-6, gpus=2, **TINY | changes)
    first, second = _two_processes(tmp_path / "run", options)
    assert first.keys() >= {
        "target.model.map_layer0.weight",
        "ema.model.map_layer0.weight",
        "exp_avg.model.map_layer0.weight",
    }
    assert _same(first, second)

    resumed = tmp_path / "resumed"
    _two_processes(
        resumed,
        options_of(data=data, duration=8e-6, gpus=2, **TINY | changes),
    )
    assert _same(_two_processes(resumed, options, find(resumed, STATE))[1], first)

    # and those of one process that takes the batch in the same parts
    alone = Trainer(dataclasses.replace(options, gpus=1), this_process())
    for _ in range(3):
        alone.train_step(*batch(alone))
    assert _same(alone.tensors(), first)
