"""The noise schedules, and the two-moment mean against DDPM's textbook posterior, DDIM's formula and Monte Carlo."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkern.schedules import EDM, two_moment


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_edm_levels():
    """The published table for 18 steps, from the formula by hand."""
    sigmas = EDM().sigmas()
    by_hand = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(sigmas, f64(*by_hand, 0.0), rtol=1e-13, atol=0)
    assert sigmas.dtype == torch.float64 and len(sigmas) == 19
    assert sigmas[0] == pytest.approx(80, rel=1e-14) and sigmas[17] == pytest.approx(0.002, rel=1e-14)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.floats(1e-4, 0.1), st.floats(1.0, 500.0), st.floats(1.0, 12.0), st.floats(0, 1))
def test_edm_index_inverts_sigma(steps, sigma_min, sigma_max, rho, share):
    schedule = EDM(steps, sigma_min, sigma_max, rho)
    index = share * (steps - 1)
    sigma = schedule.sigma(index)
    assert sigma_min * (1 - 1e-12) <= sigma <= sigma_max * (1 + 1e-12)
    assert schedule.sigma(schedule.index(sigma)).item() == pytest.approx(sigma.item(), rel=1e-9)
    assert schedule.index(sigma).item() == pytest.approx(index, abs=1e-9 * steps)


def test_edm_index_is_held_at_the_ends():
    schedule = EDM()
    assert torch.equal(schedule.index(f64(1000.0, 80.0, 0.002, 1e-5)), f64(0, 0, 17, 17))
    torch.testing.assert_close(schedule.sigma(f64(-3.0, 20.0)), f64(80.0, 0.002))
    assert torch.equal(schedule.alpha(torch.arange(3)), torch.ones(3, dtype=torch.float64))
    assert schedule.sigma([[1, 2], [3, 4]]).shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "EDM: steps must be at least 2, got 1"),
        ({"sigma_min": 0.0}, "EDM: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got 0.0 and 80.0"),
        ({"sigma_max": 0.001}, "EDM: sigma_min and sigma_max must"),
        ({"rho": 0.0}, "EDM: rho must be positive, got 0.0"),
    ],
)
def test_edm_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDM(**arguments)


def ddpm(T=1000):
    """DDPM's linear betas as (beta, alpha_bar)."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return beta, (1 - beta).cumprod(0)


def test_two_moment_is_ddpms_posterior_mean():
    """arXiv 2006.11239, eq. 7: sqrt(abar_{t-1}) beta_t / (1 - abar_t) x0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t."""
    beta, abar = ddpm()
    t, tau = slice(1, None), slice(None, -1)
    A, kappa = two_moment(abar[t].sqrt(), (1 - abar[t]).sqrt(), abar[tau].sqrt(), (1 - abar[tau]).sqrt())
    torch.testing.assert_close(A, abar[tau].sqrt() * beta[t] / (1 - abar[t]), rtol=1e-9, atol=0)
    torch.testing.assert_close(kappa, (1 - beta[t]).sqrt() * (1 - abar[tau]) / (1 - abar[t]), rtol=1e-9, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 999), st.integers(0, 998), st.floats(0, 1))
def test_two_moment_is_ddims_mean(t, tau, eta):
    """The design's own form, with s^2 written out: kappa = sqrt(sigma_tau^2 - s^2) / sigma_t."""
    tau = min(tau, t - 1)
    _, abar = ddpm()
    alpha_t, alpha_tau, sigma_t, sigma_tau = abar[t].sqrt(), abar[tau].sqrt(), (1 - abar[t]).sqrt(), (1 - abar[tau]).sqrt()
    s2 = eta**2 * sigma_tau**2 / sigma_t**2 * (sigma_t**2 - (alpha_t / alpha_tau) ** 2 * sigma_tau**2)
    A, kappa = two_moment(alpha_t, sigma_t, alpha_tau, sigma_tau, eta=eta)
    assert kappa.item() == pytest.approx(((sigma_tau**2 - s2).sqrt() / sigma_t).item(), rel=1e-7)
    assert (A + kappa * alpha_t).item() == pytest.approx(alpha_tau.item(), rel=1e-14)


def test_two_moment_without_signal_decay():
    """VE, EDM and CT: kappa is the ratio of the levels, squared for Markov."""
    sigma, sigma_tau = f64(0.5, 3.0, 80.0), f64(0.1, 2.9, 0.002)
    for coupling, power in (("markov", 2), ("shared", 1)):
        A, kappa = two_moment(1, sigma, 1, sigma_tau, coupling=coupling)
        torch.testing.assert_close(kappa, (sigma_tau / sigma) ** power, rtol=1e-14, atol=0)
        torch.testing.assert_close(A, 1 - kappa, rtol=1e-14, atol=0)


def test_eta_lies_between_the_couplings():
    point = (0.6, 0.8, 0.9, math.sqrt(1 - 0.81))
    kappas = [two_moment(*point, eta=eta)[1].item() for eta in (0, 0.25, 0.5, 0.75, 1)]
    assert kappas == sorted(kappas, reverse=True) and len(set(kappas)) == 5
    assert kappas[0] == two_moment(*point, coupling="shared")[1] == pytest.approx(point[3] / point[1])
    assert kappas[-1] == two_moment(*point, coupling="markov")[1]
    assert two_moment(*point, coupling="markov", eta=0.0)[1] == kappas[0]


@pytest.mark.parametrize("point", [(0.6, 0.8, 0.9, math.sqrt(0.19)), (1.0, 2.0, 1.0, 0.7)])
def test_markov_mean_by_monte_carlo(point):
    """Regress x_tau of a simulated Markov path on (x0, x_t): the coefficients are A and kappa, within 4 standard errors."""
    alpha_t, sigma_t, alpha_tau, sigma_tau = point
    torch.manual_seed(0)
    B = 400_000
    x0, n, step = torch.randn(3, B, dtype=torch.float64)
    x_tau = alpha_tau * x0 + sigma_tau * n
    x_t = alpha_t / alpha_tau * x_tau + math.sqrt(sigma_t**2 - (alpha_t / alpha_tau * sigma_tau) ** 2) * step
    inputs = torch.stack([x0, x_t], 1)
    fit = torch.linalg.lstsq(inputs, x_tau[:, None]).solution[:, 0]
    covariance = torch.linalg.inv(inputs.T @ inputs) * (x_tau - inputs @ fit).var()
    expected = torch.stack(two_moment(*point))
    assert ((fit - expected).abs() < 4 * covariance.diagonal().sqrt()).all()
    assert covariance.diagonal().sqrt().max() < 2e-3


def test_shared_mean_is_exact():
    """With one noise for both levels the mean is x_tau itself."""
    alpha_t, sigma_t, alpha_tau, sigma_tau = 0.6, 0.8, 0.9, math.sqrt(0.19)
    torch.manual_seed(0)
    x0, n = torch.randn(2, 100, dtype=torch.float64)
    A, kappa = two_moment(alpha_t, sigma_t, alpha_tau, sigma_tau, coupling="shared")
    torch.testing.assert_close(A * x0 + kappa * (alpha_t * x0 + sigma_t * n), alpha_tau * x0 + sigma_tau * n)


def test_two_moment_bad_arguments():
    with pytest.raises(ValueError, match="coupling must be 'markov' or 'shared', got 'ode'"):
        two_moment(1, 1, 1, 0.5, coupling="ode")
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"two_moment: eta must be in \[0, 1\]"):
            two_moment(1, 1, 1, 0.5, eta=eta)
