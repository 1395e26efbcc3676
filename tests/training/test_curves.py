"""What is told of noise levels and of gradients, and the picture of it."""

import io
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch

from helpers.tiny import TINY, options_of
from tdkern.losses import TDTerms
from tdkern.training import Trainer, train
from tdkern.training.curves import draw_curves
from tdkern.training.distributed import this_process
from tdkern.training.sums import LEVELS, SIZE, Sums, add_norm, middles, of_samples


def test_terms_are_summed_by_noise_level():
    sigma = torch.tensor([0.0, 1.1, 1.2, 1e9, math.inf], dtype=torch.float64)
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    valid = torch.tensor([True, False, True, True, True])
    sums = Sums.of(of_samples(TDTerms(loss, loss / 4, loss * 3 / 4, valid), sigma, 2.0))
    assert sums.terms.tolist() == [15.5, 3.875, 11.625, 4]
    at_one = LEVELS // 2
    assert 1 < middles()[at_one] < 10 ** (1 / 4)
    rows = {0: [1, 0.5, 0.125, 0.375, 1], at_one: [2, 3, 0.75, 2.25, 1]}
    rows[LEVELS - 1] = [2, 12, 3, 9, 2]
    for i, row in enumerate(sums.levels.tolist()):
        assert row == rows.get(i, [0.0] * 5)


def test_a_loss_that_is_not_finite_is_at_its_own_level_alone():
    sigma = torch.tensor([0.1, 1.1], dtype=torch.float64)
    loss = torch.tensor([math.nan, 1.0])
    levels = Sums.of(of_samples(TDTerms(loss, loss, loss, loss == 1), sigma, 1.0)).levels
    assert levels[:, 1].isnan().sum() == 1 and levels[LEVELS // 2].tolist() == [1.0] * 5


def test_the_norm_is_a_mean_over_the_steps_whose_norm_is_finite():
    sums = torch.zeros(SIZE, dtype=torch.float64)
    for norm in (1.0, math.nan, math.inf, 2.0):
        add_norm(sums, torch.tensor(norm))
    assert Sums.of(sums).norm.tolist() == [3.0, 2.0]


def test_the_norm_in_the_statistics_is_the_gradients(data):
    trainer = Trainer(options_of(data=data, duration=1e-3, ls=4.0, **TINY), this_process())
    images, labels = zip(*(trainer.dataset[i] for i in range(8)), strict=True)
    trainer.train_step(torch.stack(images), torch.stack(labels))
    grads = [param.grad.double().flatten() / 4 for param in trainer.net.parameters()]
    expected = torch.cat(grads).norm().item()
    terms = trainer.statistics()
    assert terms["grad_norm"] == pytest.approx(expected, rel=1e-5) and expected > 0
    rows = torch.tensor(trainer.levels, dtype=torch.float64).sum(0) / 8
    means = [1.0, *(terms[name] for name in ("loss", "td", "base", "valid"))]
    assert rows.tolist() == pytest.approx(means)


def test_every_snapshot_has_the_picture(tmp_path, data, monkeypatch):
    monkeypatch.setattr("tdkern.training.record.preview_levels", lambda net: torch.ones(2))
    monkeypatch.setattr("tdkern.training.record.Record._images", _grid)
    options = options_of(data=data, duration=16e-6, **TINY | {"snap": 1})
    train(Trainer(options, this_process()), tmp_path)
    drawn = [tmp_path / f"curves-000000.0{nimg}.png" for nimg in ("08", "16")]
    first, second = (np.array(PIL.Image.open(path)) for path in drawn)
    assert first.shape == second.shape and (first != second).any()


def _grid(record, weights):
    return torch.zeros(record.side**2, 3, 8, 8, dtype=torch.uint8)


def test_the_picture_is_the_same_for_the_same_numbers_and_takes_any():
    rows = [[0.0] * 5 for _ in range(LEVELS)]
    rows[3] = [2.0, math.nan, 1.0, 1.0, 1.0]
    ticks = [{"kimg": 1.0}, {"kimg": 2, "grad_norm": None}, {"kimg": 3.5, "grad_norm": 0.5}]
    picture = draw_curves(rows, ticks)
    assert picture == draw_curves(rows, json.loads(json.dumps(ticks)))
    assert PIL.Image.open(io.BytesIO(picture)).size == (880, 288)
