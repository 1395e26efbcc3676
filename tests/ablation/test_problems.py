"""Problems with a known answer: the answers against dense matrices, Monte Carlo and the score."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from helpers.tiny import data_set, pixels
from tdkern.ablation.problems import PROBLEMS, Empirical
from tdkern.ablation.problems.fit import RECIPES, Basis, fit, fit_problem, joined
from tdkern.ablation.problems.low_rank import DATA, Fitted, LowRankMixture, load, save
from tdkern.data import DatasetError, ImageDataset
from tdkern.data.files import FileError
from tdkern.networks import EDMPrecond

FITTED = [*RECIPES]
OWN = ["mixture", *FITTED]  # what needs no data set
LEVELS = torch.tensor([0.01, 0.1, 0.5, 2.0, 80.0], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def mixture():
    """Three components in five dimensions, of rank 2, in two classes."""
    random = generator(1)
    return LowRankMixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.randn(3, 5, generator=random, dtype=torch.float64),
        factors=torch.randn(3, 5, 2, generator=random, dtype=torch.float64),
        variances=torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64),
        classes=torch.tensor([0, 1, 1]),
    )


def dense(mixture, x, sigma, components):
    """ln p(x) and D(x) over some components, with whole covariance matrices."""
    covariance = mixture.factors @ mixture.factors.mT
    covariance += mixture.variances[:, None, None] * torch.eye(5)
    noisy = covariance[:, None] + (sigma**2)[:, None, None] * torch.eye(5)
    weights = mixture.weights[components] / mixture.weights[components].sum()
    log_p, means = [], []
    for k, weight in zip(components, weights, strict=True):
        at_k = MultivariateNormal(mixture.means[k], noisy[k]).log_prob(x)
        log_p.append(weight.log() + at_k)
        away = torch.linalg.solve(noisy[k], (x - mixture.means[k])[:, :, None])
        means.append(mixture.means[k] + (covariance[k] @ away)[:, :, 0])
    log_p = torch.stack(log_p, 1)
    return log_p.logsumexp(1), (log_p.softmax(1)[:, :, None] * torch.stack(means, 1)).sum(1)


@pytest.mark.parametrize("labels, components", [(None, [0, 1, 2]), ([1, 0], [0]), ([0, 1], [1, 2])])
def test_low_rank_mixture_against_whole_covariances(mixture, labels, components):
    x = 2 * torch.randn(5, 5, generator=generator(), dtype=torch.float64)
    given = None if labels is None else torch.tensor([labels] * 5)
    log_p, denoised = dense(mixture, x, LEVELS, components)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(mixture.log_prob(x, LEVELS, given), log_p, **close)
    torch.testing.assert_close(mixture.denoise(x, LEVELS, given), denoised, **close)


def test_an_axis_that_a_factor_does_not_reach(mixture):
    """Factors of less than full rank are no special case."""
    mixture.factors[:, :, 1] = mixture.factors[:, :, 0]
    x = torch.randn(5, 5, generator=generator(), dtype=torch.float64)
    denoised = dense(mixture, x, LEVELS, [0, 1, 2])[1]
    torch.testing.assert_close(mixture.denoise(x, LEVELS), denoised, rtol=1e-9, atol=1e-9)


def test_posterior_mean_of_draws(mixture):
    """The mean of x0 over many draws, weighted by how likely each makes x, for `sample` too."""
    x0, _ = mixture.sample(200_000, generator())
    x = x0[:8] + torch.randn(8, 5, generator=generator(2), dtype=torch.float64)
    weights = (-torch.cdist(x, x0).square() / 2).softmax(1)
    error = (weights @ x0 - mixture.denoise(x, 1.0)).abs()
    deviation = (weights @ x0.square() - (weights @ x0).square()).sqrt()
    effective = 1 / weights.square().sum(1, keepdim=True)
    assert (error < 4 * deviation / effective.sqrt()).all() and (effective > 100).all()


@pytest.mark.parametrize("name", FITTED)
def test_denoiser_is_that_of_the_score(name):
    """D = x + sigma^2 grad ln p, by autograd."""
    problem = PROBLEMS[name]()
    x0, labels = problem.sample(len(LEVELS), generator())
    x = x0 + LEVELS.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator(1))
    x = x.requires_grad_()
    problem.mixture.log_prob(x.flatten(1), LEVELS, labels).sum().backward()
    expected = x + LEVELS.view(-1, 1, 1, 1) ** 2 * x.grad
    torch.testing.assert_close(problem.denoise(x, LEVELS, labels), expected, rtol=0, atol=1e-9)
    single = problem.denoise(x.detach().float(), LEVELS, labels)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_a_problem_is_whole(name):
    problem = PROBLEMS[name]()
    x0, labels = problem.sample(400, generator())
    assert x0.shape == (400, *problem.image_shape) and x0.dtype == torch.float32
    assert torch.equal(x0, problem.sample(400, generator())[0])
    assert 0.4 < x0.square().mean().sqrt() < 0.6 and x0.abs().quantile(0.99) < 1.3
    assert (labels is None) == (problem.label_dim == 0)
    net = EDMPrecond(problem.network(), sigma_data=problem.sigma_data)
    given = None if labels is None else labels[:4]
    assert net(x0[:4], torch.ones(4), given).shape == (4, *problem.image_shape)
    levels = torch.tensor([0.02, 0.3, 3.0, 60.0])
    at_once = problem.denoise(x0[:4], levels, given)
    one_by_one = [
        problem.denoise(x0[i : i + 1], level, None if given is None else given[i : i + 1])
        for i, level in enumerate(levels.tolist())
    ]
    torch.testing.assert_close(at_once, torch.cat(one_by_one), rtol=0, atol=1e-5)


def test_no_label_is_the_mean_over_the_classes():
    """At low noise the image itself shows its class; at high noise the classes' means differ."""
    problem = PROBLEMS["images8"]()
    x0, labels = problem.sample(64, generator())
    assert torch.equal(labels.sum(1), torch.ones(64)) and labels.sum(0).count_nonzero() == 10
    gap = [
        (problem.denoise(x0, sigma, labels) - problem.denoise(x0, sigma)).square().mean().item()
        for sigma in (0.01, 3.0)
    ]
    assert gap[0] < 0.1 * gap[1] and gap[1] > 1e-3


@pytest.mark.parametrize("name", FITTED)
def test_the_files_are_those_of_the_recipes(name):
    recipe, (mixture, image_shape) = RECIPES[name], load(DATA / f"{name}.safetensors")
    assert image_shape == (3, recipe.size, recipe.size)
    assert mixture.label_dim == (10 if recipe.classes else 0)
    whole = recipe.components * max(mixture.label_dim, 1)
    assert 0.7 * whole <= len(mixture.weights) <= whole
    assert mixture.factors.shape[2] == recipe.rank


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in DATA.glob("*.safetensors")]
    assert len(sizes) == len(FITTED) and max(sizes) < 1.1e6 and sum(sizes) < 3e6


def test_a_fit_finds_the_mixture():
    random = generator(1)
    planted = LowRankMixture(
        weights=torch.tensor([0.7, 0.3], dtype=torch.float64),
        means=torch.stack([torch.full((6,), 3.0), torch.full((6,), -3.0)]).double(),
        factors=torch.randn(2, 6, 2, generator=random, dtype=torch.float64),
        variances=torch.tensor([0.01, 0.04], dtype=torch.float64),
    )
    points, _ = planted.sample(4000, random)
    basis = Basis.of(points, 6)
    found = fit(points, basis, 2, 2, generator(2))
    order = found.weights.argsort(descending=True)
    torch.testing.assert_close(found.weights[order], planted.weights, rtol=0, atol=0.03)
    torch.testing.assert_close(found.variances[order], planted.variances, rtol=0.05, atol=0)
    torch.testing.assert_close(found.means[order], planted.means, rtol=0, atol=0.15)
    covariances = [each @ each.mT for each in (found.factors[order], planted.factors)]
    torch.testing.assert_close(*covariances, rtol=0.15, atol=0.15)
    again = fit(points, basis, 2, 2, generator(2))
    for name in ("weights", "means", "factors", "variances"):
        assert torch.equal(getattr(found, name), getattr(again, name))


def test_from_images_to_a_file(tmp_path, mixture):
    """A recipe fits each class's own images, and what is saved is read again nearly as it was."""
    images = np.concatenate([pixels(40) // 2, pixels(40) // 2 + 128])
    data = data_set(tmp_path / "images.zip", images, [0] * 40 + [1] * 40)
    size = images.shape[2]
    recipe = RECIPES["images8"]._replace(size=size // 2, components=2, rank=3, basis=12)
    dataset = ImageDataset(data, use_labels=True)
    fitted = fit_problem(dataset, recipe)
    dark, bright = (fitted.means[fitted.classes == c] for c in (0, 1))
    assert dark.max() < 0 < bright.min() and fitted.weights.sum() == pytest.approx(1)
    patches = fit_problem(dataset, recipe._replace(patches=2, classes=False))
    assert patches.classes is None and patches.means.shape[1] == fitted.means.shape[1]

    path = tmp_path / "fitted.safetensors"
    save(path, fitted, (3, size // 2, size // 2), recipe.basis)
    again = Fitted("fitted", path)
    assert again.image_shape == (3, size // 2, size // 2) and again.label_dim == 2
    torch.testing.assert_close(again.mixture.means, fitted.means, rtol=0, atol=2e-3)
    spread = [m.factors @ m.factors.mT for m in (again.mixture, fitted)]
    torch.testing.assert_close(*spread, rtol=0, atol=2e-3)


def test_joined_mixtures_have_the_classes_shares(mixture):
    whole = joined([mixture, mixture], torch.tensor([0.25, 0.75]))
    assert whole.classes.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(whole.weights[:3], 0.25 * mixture.weights)


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "wrong.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=r"wrong.safetensors.*fit_problems"):
        load(path)


# ---- the empirical distribution -----------------------------------------------------------------


def brute_force(images, x, sigma):
    """The softmax over all images, point by point in float64."""
    means = []
    for point, level in zip(x.double(), sigma.double().tolist(), strict=True):
        squares = (point - images.double()).square().sum((1, 2, 3))
        weights = (-squares / (2 * level**2)).softmax(0)
        means.append((weights[:, None, None, None] * images.double()).sum(0))
    return torch.stack(means)


def test_empirical_denoiser_against_brute_force(monkeypatch):
    monkeypatch.setattr("tdkern.ablation.problems.empirical.CHUNK", 7000)  # some points at a time
    images = 2 * torch.rand(3000, 3, 4, 4, generator=generator()) - 1
    problem = Empirical("empirical", images)
    sigma = torch.tensor([0.002, 0.02, 0.2, 0.6, 2.0, 80.0])
    noise = torch.randn(6, 3, 4, 4, generator=generator(1))
    x = images[:6] + sigma.view(-1, 1, 1, 1) * noise
    denoised = problem.denoise(x, sigma)
    torch.testing.assert_close(denoised.double(), brute_force(images, x, sigma), rtol=0, atol=1e-6)
    assert torch.equal(denoised[:2], images[:2])
    torch.testing.assert_close(denoised[5], images.mean(0), rtol=0, atol=0.02)


def test_empirical_between_two_images_that_are_nearly_alike():
    """Where float32 would lose what tells them apart: |x|^2 / (2 sigma^2) is 2.4 million."""
    images = torch.ones(2, 3, 4, 4)
    images[1, 0, 0, 0] = 0.998
    problem, sigma = Empirical("empirical", images), torch.tensor([0.002])
    x = images[:1].clone()
    x[0, 0, 0, 0] = 0.9995
    expected = brute_force(images, x, sigma)
    assert 0.5e-3 < 1 - expected[0, 0, 0, 0] < 1.5e-3
    torch.testing.assert_close(problem.denoise(x, sigma).double(), expected, rtol=0, atol=1e-7)


def test_empirical_problem_of_a_data_set(tmp_path, monkeypatch):
    images = pixels(12)
    path = data_set(tmp_path / "images.zip", images, None)
    half = images.shape[2] // 2
    problem = PROBLEMS["empirical"](data=path, size=half, n=10)
    assert problem.images.shape == (10, 3, half, half) and problem.label_dim == 0
    corner = images[3, :, :2, :2].astype(float).mean((1, 2)) / 127.5 - 1
    np.testing.assert_allclose(problem.images[3, :, 0, 0].numpy(), corner, atol=1e-6)
    monkeypatch.setenv("TDKERN_ABLATION_DATA", str(path))
    assert len(PROBLEMS["empirical"]().images) == 12
    with pytest.raises(DatasetError, match="multiple of 5 pixels"):
        PROBLEMS["empirical"](size=5)
    monkeypatch.delenv("TDKERN_ABLATION_DATA")
    with pytest.raises(DatasetError, match=r"empirical8: needs a data set.*TDKERN_ABLATION_DATA"):
        PROBLEMS["empirical8"]()
