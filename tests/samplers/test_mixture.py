"""The exact denoiser and the distances that the demo's numbers rest on."""

import math

import pytest
import torch

from tdkern.evaluation.mixture import GaussianMixture, denoiser_error, normal_points, sliced_w2

RING = GaussianMixture.ring()
SIGMAS = [0.02, 0.3, 1.0, 7.0, 80.0]


def noisy(n, sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = RING.sample(n, generator)
    return x0, x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


def test_ring_is_scaled_and_centred():
    assert RING.sigma_data == pytest.approx(0.5, abs=1e-12)
    assert GaussianMixture.ring(2.0).sigma_data == pytest.approx(2.0, abs=1e-12)
    assert (RING.weights @ RING.means).abs().max() < 1e-12
    assert len(RING.weights.unique()) == len(RING.stds.unique()) == 4


@pytest.mark.parametrize("sigma", SIGMAS)
def test_denoiser_is_the_score(sigma):
    """D(x, sigma) = x + sigma^2 grad ln p(x; sigma), by automatic differentiation of the
    density.
    """
    x = noisy(200, sigma)[1].requires_grad_()
    score = torch.autograd.grad(RING.log_prob(x, sigma).sum(), x)[0]
    denoised = RING.denoise(x.detach(), torch.full((200,), sigma, dtype=torch.float64))
    torch.testing.assert_close(
        denoised, (x + sigma**2 * score).detach(), rtol=1e-9, atol=1e-9 * max(1, sigma)
    )


def test_density_integrates_to_one():
    ticks = torch.linspace(-4, 4, 401, dtype=torch.float64)
    for sigma in (0.0, 0.4):
        assert RING.log_prob(
            torch.cartesian_prod(ticks, ticks), sigma
        ).exp().sum() * 0.02**2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_denoiser_is_the_posterior_mean(sigma):
    """Against E[x0 | x] = sum_i x0_i p(x | x0_i) / sum_i p(x | x0_i), by brute force over draws of
    the data.
    """
    x = noisy(20, sigma, seed=1)[1]
    x0 = RING.sample(400_000, torch.Generator().manual_seed(2))
    for point, denoised in zip(x, RING.denoise(x, sigma), strict=True):
        weight = (-(x0 - point).square().sum(1) / (2 * sigma**2)).exp()
        mean = weight @ x0 / weight.sum()
        # standard error of the mean
        error = ((weight[:, None] * (x0 - mean)).square().sum(0)).sqrt() / weight.sum()
        assert ((denoised - mean).abs() < 5 * error).all()


def test_sample_and_points_have_the_mixture_s_moments():
    covariance = (RING.means.T * RING.weights) @ RING.means + (
        RING.weights @ RING.stds**2
    ) * torch.eye(2, dtype=torch.float64)
    for x, tolerance in (
        (RING.sample(100_000, torch.Generator().manual_seed(3)), 5e-3),
        (RING.points(4096), 2e-3),
    ):
        assert x.mean(0).abs().max() < tolerance
        assert (x.T.cov() - covariance).abs().max() < tolerance


def test_normal_points_are_even_and_depend_on_the_seed():
    points = normal_points(1024, 2)
    assert points.dtype == torch.float64 and points.isfinite().all()
    # random draws: 3e-2
    assert (points.mean(0).abs() < 5e-3).all() and (points.std(0) - 1).abs().max() < 5e-3
    assert (points.T.cov()[0, 1]).abs() < 2e-2
    assert points.equal(normal_points(1024, 2)) and not points.equal(normal_points(1024, 2, seed=1))


def test_denoiser_error_is_the_excess_of_edm_s_loss():
    """The excess is E w (|D - x0|^2 - |D* - x0|^2): by Monte Carlo over fresh draws, for a denoiser
    that is wrong in a known way.
    """
    sigmas = torch.tensor([0.3, 2.0], dtype=torch.float64)
    error = denoiser_error(
        lambda x, sigma: 0.9 * RING.denoise(x, sigma) + 0.02, RING, sigmas, n=200_000
    )[0]
    for sigma, value in zip(sigmas.tolist(), error.tolist(), strict=True):
        x0, x = noisy(200_000, sigma, seed=4)
        exact = RING.denoise(x, sigma)
        excess = (
            ((0.9 * exact + 0.02 - x0).square() - (exact - x0).square()).mean(1)
            * (sigma**2 + 0.25)
            / (0.5 * sigma) ** 2
        )
        assert value == pytest.approx(
            excess.mean().item(), abs=5 * excess.std().item() / len(x0) ** 0.5
        )


def test_denoiser_error_of_several_models():
    """Model by model, on the same points: the exact denoiser, and one that is off by a constant c,
    whose error is w c^2.
    """

    def denoiser(x, sigma):
        offset = torch.tensor([0.0, 0.1]).repeat_interleave(len(x) // 2)[:, None]
        return RING.denoise(x, sigma) + offset

    sigmas = torch.tensor([0.05, 1.0, 30.0])
    error = denoiser_error(denoiser, RING, sigmas, num_models=2, n=64)
    assert error.shape == (2, 3) and error[0].abs().max() < 1e-12
    torch.testing.assert_close(error[1], (0.01 * (1 / sigmas**2 + 4)).double(), rtol=1e-5, atol=0)


def test_sliced_w2_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    x = normal_points(128, 3)
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    assert sliced_w2(x, x + shift, projections=20_000).item() == pytest.approx(
        1.3 / math.sqrt(3), rel=0.01
    )


def test_sliced_w2_is_a_distance():
    x, y, z = (
        RING.sample(100, torch.Generator().manual_seed(seed)) * scale
        for seed, scale in ((0, 1), (1, 2), (2, 1))
    )
    assert sliced_w2(x, x[torch.randperm(100)]) < 1e-12
    assert sliced_w2(x, y) == sliced_w2(y, x) > 0.1
    assert sliced_w2(x, y) <= sliced_w2(x, z) + sliced_w2(z, y)
    torch.testing.assert_close(sliced_w2(3 * x, 3 * y), 3 * sliced_w2(x, y))


def test_sliced_w2_matches_sorting_on_a_line_and_takes_batches():
    x, y = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[2.0], [2.0], [5.0]])
    assert sliced_w2(x, y).item() == pytest.approx(math.sqrt((1 + 0 + 4) / 3))
    torch.testing.assert_close(
        sliced_w2(torch.stack([x, y, x]), y),
        torch.stack([sliced_w2(x, y), sliced_w2(y, y), sliced_w2(x, y)]),
    )


def test_errors_name_the_argument():
    with pytest.raises(
        ValueError, match=r"sliced_w2: y must have shape \[\.\.\., 4, 2\] as x has, got \[5, 2\]"
    ):
        sliced_w2(torch.zeros(4, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="GaussianMixture: weights must sum to 1"):
        GaussianMixture(torch.ones(2), torch.zeros(2, 1), torch.ones(2))
