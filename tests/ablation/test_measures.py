"""The measures: the exact denoiser has nothing to lose, and known errors are found."""

from functools import partial

import pytest
import torch

from tdkern.ablation.measures import BANDS, Measures, RandomFeatures
from tdkern.ablation.problems import PROBLEMS


@pytest.fixture(scope="module")
def measures():
    return Measures(PROBLEMS["mixture"](), points=64, samples=200)


def test_the_exact_denoiser_has_no_excess(measures):
    numbers = measures(measures.problem.denoise)
    assert len(numbers) == len(BANDS) + 1 + 2 * 3
    assert all(value < 1e-9 for name, value in numbers.items() if name.startswith("error/"))
    assert numbers["map/5"] > 2 * numbers["map/9"] > 4 * numbers["map/18"] > 0
    assert numbers["map/18"] < 0.02
    assert numbers["frechet/18"] < 0.2 * numbers["frechet/5"]
    assert numbers == measures(measures.problem.denoise)
    other = Measures(measures.problem, points=64, samples=200, seed=1)
    assert other.few_steps(measures.problem.denoise)["map/9"] != numbers["map/9"]


def test_a_known_error_is_found(measures):
    """D + c has the excess w c^2, whatever the data: its mean in ln sigma is an integral."""
    shifted = lambda x, sigma, labels=None: measures.problem.denoise(x, sigma) + 0.01
    errors = measures.errors(shifted)
    for low, high in BANDS:
        of_sigma = (low**-2 - high**-2) / 2 / torch.tensor(high / low).log().item()
        assert errors[f"error/{low:g}-{high:g}"] == pytest.approx(1e-4 * (of_sigma + 4), rel=2e-2)
    # E[1 / sigma^2] of a log-normal sigma, cut at the bands' ends
    normal = torch.distributions.Normal(0.0, 1.0)
    ends = (torch.tensor([BANDS[0][0], BANDS[-1][1]]).log() + 1.2) / 1.2
    mass, moved = (normal.cdf(ends + shift).diff().item() for shift in (0.0, 2.4))
    expected = 1e-4 * (torch.tensor(2.4 + 2.88).exp().item() * moved / mass + 4)
    assert errors["error/all"] == pytest.approx(expected, rel=2e-2)


def test_the_flow_is_solved_well_enough(measures, monkeypatch):
    """With three times the steps it ends where it did."""
    monkeypatch.setattr("tdkern.ablation.measures.EXACT_STEPS", 144)
    finer = Measures(measures.problem, samples=200)
    gap = (finer.flow.end - measures.flow.end).square().mean().sqrt()
    assert torch.equal(finer.flow.x, measures.flow.x) and gap < 3e-3


def test_labels_reach_the_network():
    problem = PROBLEMS["images8"]()
    measures = Measures(problem, points=2, samples=2)
    seen = []

    def net(x, sigma, class_labels):
        seen.append(class_labels)
        return problem.denoise(x, sigma, class_labels)

    numbers = measures(net)
    assert all(value < 1e-9 for name, value in numbers.items() if name.startswith("error/"))
    assert numbers["map/18"] < numbers["map/5"] < 0.5
    assert all(labels.shape[1] == 10 for labels in seen)
    unaware = measures.errors(lambda x, sigma, class_labels: problem.denoise(x, sigma))
    assert unaware["error/all"] > 1e-3


def test_random_features_are_fixed_and_tell_noise_from_images():
    problem = PROBLEMS["patches8"]()
    features = RandomFeatures(3)
    x0, _ = problem.sample(100, torch.Generator().manual_seed(0))
    assert features(x0).shape == (100, 64)
    assert torch.equal(features(x0), RandomFeatures(3)(x0))
    real, again, noisy = (
        features.statistics(each)
        for each in (x0, problem.sample(100, torch.Generator().manual_seed(1))[0], x0 + 0.1)
    )
    from tdkern.evaluation.fid import frechet_distance

    assert frechet_distance(real, noisy) > 0 and partial(frechet_distance, real)(again) > 0
