"""Bootstrap intervals and noise floors: against closed forms, and against what they are to hold, in
many draws of the same.
"""

import numpy as np
import pytest
import torch

from tdkern.evaluation import features, intervals
from tdkern.evaluation.features import squared_mmd
from tdkern.evaluation.fid import Statistics, frechet_distance
from tdkern.evaluation.intervals import (
    frechet_floor,
    frechet_interval,
    kernel_floor,
    kernel_interval,
    some_images,
)

MEAN, SCALES = torch.tensor([0.3, 0.0]), torch.tensor([1.0, 0.6])  # of what is generated
UNIT = Statistics(np.zeros(2), np.eye(2))


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generated(count, seed):
    return MEAN + SCALES * normal(count, 2, seed=seed)


def statistics(x):
    return Statistics(x.mean(0).numpy(), np.cov(x.numpy().T))


@pytest.mark.parametrize("chunk", [1, 30, 1 << 24])
def test_squared_mmd_of_resamples_is_the_loop_over_pairs(monkeypatch, chunk):
    """Of sets of unlike sizes, however many pairs are held at once."""
    monkeypatch.setattr(features, "CHUNK", chunk)
    x, y = normal(5, 3, seed=0), normal(7, 3, seed=1)
    u = torch.tensor([[1.0, 1, 1, 1, 1], [2, 0, 1, 0, 2]])
    v = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1], [0, 3, 1, 1, 1, 0, 1]])

    def mean(a, b, u, v, same):
        pairs = [
            (u[i] * v[j], (a[i] @ b[j] / 3 + 1) ** 3)
            for i in range(len(a))
            for j in range(len(b))
            if not (same and i == j)
        ]
        return sum(weight * k for weight, k in pairs) / sum(weight for weight, _ in pairs)

    expected = [
        mean(x, x, u[b], u[b], True) + mean(y, y, v[b], v[b], True) - 2 * mean(x, y, u[b], v[b], 0)
        for b in range(2)
    ]
    torch.testing.assert_close(squared_mmd(x, y, u, v), torch.stack(expected).double())
    torch.testing.assert_close(squared_mmd(x, y), expected[0][None].double())
    torch.testing.assert_close(squared_mmd(x, y, u, v[:1])[0], expected[0].double())


def test_interval_holds_the_closed_form():
    """|mu|^2 + sum (s - 1)^2 with many images, whose bias is far below the interval's width."""
    interval = frechet_interval(generated(20_000, 0), UNIT, resamples=100)
    closed = 0.3**2 + (0.6 - 1) ** 2
    assert interval.low < closed < interval.high and interval.high - interval.low < 0.1 * closed


MEASURED = {  # of a sample of 80: the distance, its interval
    "frechet": (
        lambda x: frechet_distance(statistics(x), UNIT),
        lambda x: frechet_interval(x, UNIT, resamples=60),
    ),
    "kernel": (
        lambda x: squared_mmd(x, REAL).item(),
        lambda x: kernel_interval(x, REAL, resamples=60),
    ),
}
REAL = normal(300, 2, seed=9)


@pytest.mark.parametrize("measure", MEASURED)
def test_intervals_hold_the_mean_distance_of_as_many_images(measure):
    distance, interval = MEASURED[measure]
    scores = np.array([distance(generated(80, seed)) for seed in range(2000, 2800)])
    found = np.array([interval(generated(80, seed)) for seed in range(80)])
    held = (found[:, 0] < scores.mean()) & (scores.mean() < found[:, 1])
    assert 0.87 <= held.mean() <= 0.99, held.mean()
    widths = found[:, 1] - found[:, 0]
    assert widths.mean() == pytest.approx(2 * 1.96 * scores.std(), rel=0.15)


@pytest.mark.parametrize(
    "floor, distance",
    [
        (frechet_floor, lambda x, y: frechet_distance(statistics(x), statistics(y))),
        (kernel_floor, lambda x, y: squared_mmd(x, y).item()),
    ],
)
def test_floor_is_what_other_real_images_score(floor, distance):
    """100 images against 300: as 100 of 400 against the other 300."""
    scores = np.array(
        [distance(normal(100, 2, seed=i), normal(300, 2, seed=5000 + i)) for i in range(300)]
    )
    floors = np.array([floor(normal(400, 2, seed=9000 + i), 100, splits=60) for i in range(10)])
    mean, low, high = floors.mean(0)
    assert mean == pytest.approx(scores.mean(), abs=4 * scores.std() / 300**0.5)
    expected = np.quantile(scores, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected, abs=0.25 * (expected[1] - expected[0]))


def test_floor_of_many_images_compares_halves():
    real = normal(40, 2, seed=0)
    for floor in (frechet_floor, kernel_floor):
        assert floor(real, 50_000, splits=5) == floor(real, 20, splits=5)
        assert floor(real, 19, splits=5) != floor(real, 20, splits=5)
        assert floor(real, 20, splits=5) != floor(real, 20, splits=5, seed=1)
    first, rest = real[:20], real[20:]
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(torch, "randperm", lambda total, generator: torch.arange(total))
        expected = frechet_distance(statistics(first), statistics(rest))
        assert frechet_floor(real, 20, splits=2).mean == pytest.approx(expected, rel=1e-10)


def test_intervals_are_the_same_again(monkeypatch):
    x = generated(50, 0)
    for of in (
        lambda **k: frechet_interval(x, UNIT, **k),
        lambda **k: kernel_interval(x, REAL, **k),
    ):
        assert of(resamples=50) == of(resamples=50) != of(resamples=50, seed=1)
    monkeypatch.setattr(intervals, "MOST_IMAGES", 20)
    some = some_images(x)
    assert (
        some.shape == (20, 2)
        and len({*map(tuple, some.tolist())} & {*map(tuple, x.tolist())}) == 20
    )


def test_too_few_images():
    one, three = normal(1, 2, seed=0), normal(3, 2, seed=0)
    with pytest.raises(ValueError, match="bootstrap: needs at least 2 images, got 1"):
        kernel_interval(one, three, resamples=2)
    for floor in (frechet_floor, kernel_floor):
        with pytest.raises(ValueError, match=r"needs at least 4 real images and 2 .*, got 3 and 2"):
            floor(three, 2, splits=2)
