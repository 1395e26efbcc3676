"""The Markov reward process: returns telescope, the true value solves Bellman's equation, and the
four means cancel, in every family.
"""

import pytest
import torch

from helpers.families import FAMILIES, SD, Raw, denoised, drift
from tdkern import mrp
from tdkern.schedules import two_moment

PATHS = [family for family in FAMILIES if family.base == "denoise"]
ids = [family.name for family in PATHS]


def chain(family, k):
    """alpha, sigma, A, kappa [k + 1] along k steps from t down the path, and the path's own states
    [k + 1, 5] of one Markov path, with their x0.
    """
    times = family.times[0] + family.steps[1] * torch.arange(k + 1, dtype=torch.float64)
    alpha, sigma = family.levels(times)
    A, kappa = two_moment(alpha, sigma, *family.levels(times + family.steps[0]))
    torch.manual_seed(0)
    x0, noise = SD * torch.randn(5, dtype=torch.float64), torch.randn(k + 1, 5, dtype=torch.float64)
    hat = sigma / alpha
    # from noise to data: independent increments of EDM's state
    steps = torch.cat([hat[:-1] ** 2 - hat[1:] ** 2, hat[-1:] ** 2]).sqrt()
    x = (x0 + (steps[:, None] * noise).flip(0).cumsum(0).flip(0)) * alpha[:, None]
    return alpha[:, None], sigma[:, None], A[:, None], kappa[:, None], x, x0


def posterior(x, alpha, sigma):
    """E[x0 | x_t] for data N(0, SD^2)."""
    return alpha * SD**2 / (alpha**2 * SD**2 + sigma**2) * x


@pytest.mark.parametrize("family", PATHS, ids=ids)
def test_k_step_returns_telescope(family):
    alpha, sigma, A, kappa, x, x0 = chain(family, 4)
    mu = mrp.mean(x0, x, A, kappa)
    V = mrp.value(posterior(x, alpha, sigma), x, A, kappa)
    rewards = [mrp.reward(mu[j], mu[j + 1]) for j in range(4)]
    for k in (1, 2, 4):
        torch.testing.assert_close(mrp.k_step_return(rewards[:k], V[k]), mu[0] - mu[k] + V[k])
        errors = [mrp.td_error(rewards[j], V[j], V[j + 1]) for j in range(k)]
        # TD(k)'s error is the sum of TD(0)'s
        torch.testing.assert_close(mrp.k_step_return(rewards[:k], V[k]) - V[0], sum(errors))
    # a last state whose value is its own mean
    torch.testing.assert_close(mrp.k_step_return(rewards, mu[4]), mu[0])


@pytest.mark.parametrize("family", PATHS, ids=ids)
def test_bellman_residual_of_the_true_value(family):
    """E[R + V(x_t') - V(x_t) | x_t] for Gaussian data, where every expectation is linear in x_t: 0
    for Markov states, not for shared noise.
    """
    alpha, sigma, A, kappa, _, _ = chain(family, 1)
    (a, a_p), (s, s_p), (A, A_p), (kappa, kappa_p) = alpha[:, 0], sigma[:, 0], A[:, 0], kappa[:, 0]
    c, c_p = posterior(1, a, s), posterior(1, a_p, s_p)  # E[x0 | x] = c x
    residual = {}
    # the covariance is that of the noises of x_t and x_t'
    for coupling, covariance in (
        ("markov", a / a_p * s_p**2),
        ("shared", s * s_p),
    ):
        x_p = (a * a_p * SD**2 + covariance) / (a**2 * SD**2 + s**2)  # E[x_t' | x_t = 1]
        R = mrp.reward(mrp.mean(c, 1, A, kappa), mrp.mean(c, x_p, A_p, kappa_p))
        residual[coupling] = mrp.td_error(
            R, mrp.value(c, 1, A, kappa), mrp.value(c_p * x_p, x_p, A_p, kappa_p)
        ).item()
        torch.testing.assert_close(
            residual[coupling], (A_p * (c_p * x_p - c)).item(), rtol=1e-6, atol=1e-14
        )
    assert abs(residual["markov"]) < 1e-13 < 1e-9 < abs(residual["shared"])


@pytest.mark.parametrize("eta", [1, 0.5, 0])
@pytest.mark.parametrize("family", PATHS, ids=ids)
def test_four_means_cancel(family, eta):
    alpha, sigma, _, _, x, x0 = chain(family, 1)
    times = family.times[0] + torch.tensor([0, family.steps[1]], dtype=torch.float64)
    A, kappa = (
        part[:, None]
        for part in two_moment(
            alpha[:, 0], sigma[:, 0], *family.levels(times + family.steps[0]), eta=eta
        )
    )
    D = torch.randn(2, 5, dtype=torch.float64)
    mu, V = mrp.mean(x0, x, A, kappa), mrp.value(D, x, A, kappa)
    four = (mu[0] - mu[1]) - (V[0] - V[1])
    torch.testing.assert_close(mrp.td_error(mrp.reward(*mu), *V), four)
    torch.testing.assert_close(four, A[0] * (x0 - D[0]) - A[1] * (x0 - D[1]), rtol=1e-7, atol=1e-12)
    if eta != 0.5:
        torch.testing.assert_close(
            A[0],
            drift(
                alpha[0],
                sigma[0],
                *(level[None] for level in family.levels(times[0] + family.steps[0])),
                eta,
            )[0],
        )


@pytest.mark.parametrize("coupling", ["markov", "shared"])
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_the_losses_td_term_is_the_td_error(family, coupling):
    """mean(delta^2), unweighted, of the pair that a loss gives, against this module's TD error of
    the path's own states.
    """
    loss = family.loss(coupling, weight="none")
    t = torch.tensor(family.times[:-1], dtype=torch.float64)
    F, F_p, x0 = torch.randn(3, len(t), 4, dtype=torch.float64)
    batch = family.pair(loss, x0, t)
    alpha, sigma = (levels[..., None] for levels in family.four(t))
    mu, V = [], []
    for side, (state, out) in enumerate(((batch.x_t, F), (batch.x_tp, F_p))):
        at, after = 2 * side, 2 * side + 1
        A, kappa = two_moment(alpha[at], sigma[at], alpha[after], sigma[after], coupling=coupling)
        x = alpha[at] * state
        mu.append(mrp.mean(x0, x, A, kappa))
        V.append(
            mrp.value(denoised(family.predictions[0], x, out, alpha[at], sigma[at])[0], x, A, kappa)
        )
    delta = mrp.td_error(mrp.reward(*mu), *V)
    torch.testing.assert_close(
        loss.evaluate(Raw(F, loss), Raw(F_p, loss), batch).td,
        delta.square().mean(1),
        rtol=1e-7,
        atol=0,
    )
