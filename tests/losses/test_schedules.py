"""The noise schedules, and the two-moment mean against DDPM's textbook posterior, DDIM's formula
and Monte Carlo.
"""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helpers import golden_of
from tdkern.schedules import DDPM, EDM, VE, VP, FlowMatching, iDDPM, two_moment

CPU = torch.device("cpu")
PATHS = [
    DDPM(),
    DDPM(50, "cosine"),
    VP(),
    VP(17.5, -0.005, 1e-3),
    VP(-8.0, 10.0, 0.01),
    VE(),
    FlowMatching(),
]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_edm_levels():
    """The published table for 18 steps, from the formula by hand."""
    sigmas = EDM().sigmas()
    by_hand = [
        (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)
    ]
    torch.testing.assert_close(sigmas, f64(*by_hand, 0.0), rtol=1e-13, atol=0)
    assert sigmas.dtype == torch.float64 and len(sigmas) == 19
    assert sigmas[0] == pytest.approx(80, rel=1e-14) and sigmas[17] == pytest.approx(
        0.002, rel=1e-14
    )


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 300),
    st.floats(1e-4, 0.1),
    st.floats(1.0, 500.0),
    st.floats(1.0, 12.0),
    st.floats(0, 1),
)
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
        (
            {"sigma_min": 0.0},
            "EDM: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got 0.0 "
            "and 80.0",
        ),
        ({"sigma_max": 0.001}, "EDM: sigma_min and sigma_max must"),
        ({"rho": 0.0}, "EDM: rho must be positive, got 0.0"),
    ],
)
def test_edm_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDM(**arguments)


def ddpm(beta_schedule="linear", T=1000):
    """DDPM's betas, written out, as (beta, alpha_bar)."""
    if beta_schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    else:
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        beta = f64(*(min(1 - after / before, 0.999) for before, after in pairwise(f)))
    return beta, (1 - beta).cumprod(0)


@pytest.mark.parametrize("T", [50, 1000])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_ddpm_levels(beta_schedule, T):
    beta, abar = ddpm(beta_schedule, T)
    for schedule in (DDPM(T, beta_schedule), DDPM(T, tuple(beta.tolist()))):
        t = torch.arange(T + 1)
        torch.testing.assert_close(schedule.alphas_cumprod, abar, rtol=1e-11, atol=0)
        torch.testing.assert_close(schedule.alpha(t)[1:], abar.sqrt(), rtol=1e-11, atol=0)
        torch.testing.assert_close(
            schedule.sigma(t.double())[1:], (1 - abar).sqrt(), rtol=1e-10, atol=0
        )
        torch.testing.assert_close(
            schedule.sigma_hat(t)[1:], (1 / abar - 1).sqrt(), rtol=1e-10, atol=0
        )
        assert schedule.alpha(0) == 1 and schedule.sigma(0) == 0 and schedule.sigma_hat(0) == 0


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_two_moment_is_ddpms_posterior_mean(beta_schedule):
    """arXiv 2006.11239, eq.

    7: sqrt(abar_{t-1}) beta_t / (1 - abar_t) x0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)
    x_t.
    """
    beta, abar = ddpm(beta_schedule)
    before = torch.cat([f64(1.0), abar[:-1]])
    schedule, t = DDPM(1000, beta_schedule), torch.arange(1, 1001)
    A, kappa = two_moment(
        schedule.alpha(t), schedule.sigma(t), schedule.alpha(t - 1), schedule.sigma(t - 1)
    )
    torch.testing.assert_close(A, before.sqrt() * beta / (1 - abar), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        kappa, (1 - beta).sqrt() * (1 - before) / (1 - abar), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_paths(path):
    """Levels rise with the time, `time` inverts them, and a sampler's fall from the most noise to
    0.
    """
    t = torch.linspace(path.t_min, path.t_max, 50, dtype=torch.float64)
    sigma_hat = path.sigma_hat(t)
    assert (sigma_hat.diff() > 0).all() and sigma_hat.dtype == torch.float64
    torch.testing.assert_close(sigma_hat, path.sigma(t) / path.alpha(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        path.time(sigma_hat), t.floor() if isinstance(path, DDPM) else t, rtol=1e-11, atol=1e-11
    )
    assert (
        path.sigma_hat(t.reshape(5, 10)).shape
        == path.time(sigma_hat.reshape(5, 10)).shape
        == (5, 10)
    )
    sigmas = path.sigmas(7)
    assert (
        len(sigmas) == 8
        and sigmas[0] == sigma_hat[-1]
        and sigmas[-2] >= sigma_hat[0]
        and sigmas[-1] == 0
        and (sigmas.diff() < 0).all()
    )
    squares = path.alpha(t) ** 2 + path.sigma(t) ** 2
    if isinstance(path, (DDPM, VP)):
        torch.testing.assert_close(squares, torch.ones_like(t))
    else:
        torch.testing.assert_close(
            path.alpha(t), torch.ones_like(t) if isinstance(path, VE) else 1 - path.sigma(t)
        )


def test_ddpm_real_times():
    """Between whole times ln sigma_hat is linear; beyond the ends the time is held."""
    schedule = DDPM(1000)
    middle = (schedule.sigma_hat(41) * schedule.sigma_hat(42)).sqrt()
    torch.testing.assert_close(schedule.time([middle, 1e-9, 1e9]), f64(41.5, 1.0, 1000.0))
    assert torch.equal(schedule.times(5), f64(1000, 750, 500, 251, 1))


def test_tables_made_under_fake_tensors_are_not_kept():
    """What is cached is real, and not mixed with fake tensors either, in whatever order the two
    come.
    """
    for T in (37, 38):
        for fake in (T == 37, T == 38, T == 37):
            with FakeTensorMode() if fake else nullcontext():
                alpha = DDPM(T).alpha(torch.tensor([1, T]))
            assert type(alpha) is (FakeTensor if fake else torch.Tensor)
        torch.testing.assert_close(
            alpha if T == 38 else DDPM(T).alpha(torch.tensor([1, T])),
            DDPM(T).alphas_cumprod[[0, -1]].sqrt(),
        )
    compiled = torch.compile(lambda t: DDPM(39).alpha(t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(torch.tensor([1, 39])), DDPM(39).alphas_cumprod[[0, -1]].sqrt()
    )
    assert type(DDPM(39).alphas_cumprod) is torch.Tensor
    assert DDPM(40)._table(CPU) is DDPM(40)._table(CPU)


def test_golden_levels():
    vp = golden_of("precond_vp")
    iddpm = golden_of("precond_iddpm")
    ablation = golden_of("heun_ablation")
    torch.testing.assert_close(VP().sigma_hat(vp["t_grid"]), vp["sigma_of_t"], rtol=1e-10, atol=0)
    torch.testing.assert_close(VP().time(vp["sigma"]), vp["t_of_sigma"], rtol=1e-10, atol=0)
    torch.testing.assert_close(iDDPM().u, iddpm["u"], rtol=1e-10, atol=0)
    steps = int(ablation["num_steps"])
    with torch.device("meta"):  # of another default device
        assert iDDPM().sigmas(steps).device.type == "cpu"
    for name, sigmas in (
        ("vp", VP().sigmas(steps)),
        ("ve", VE().sigmas(steps)),
        ("iddpm", iDDPM().sigmas(steps)),
        ("edm", EDM(steps).sigmas()),
    ):
        torch.testing.assert_close(
            sigmas[:-1], ablation[f"sigma_steps__{name}"], rtol=1e-10, atol=0
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPM(1), "DDPM: T must be a whole number, at least 2, got 1"),
        (
            lambda: DDPM(10, "sigmoid"),
            r"DDPM: beta_schedule must be 'linear', 'cosine' or 10 numbers in \(0, 1\), the last "
            "of which may be 1, got 'sigmoid'",
        ),
        (
            lambda: DDPM(2, (1.0, 0.1)),
            "DDPM: beta_schedule must be .* got numbers from 0.1 to 1.0$",
        ),
        (lambda: DDPM(2, (0.1, 1.1)), "DDPM: beta_schedule must be"),
        (lambda: DDPM(2, (0.1, math.nan)), "DDPM: beta_schedule must be"),
        (lambda: DDPM(10).times(11), "DDPM: steps must be from 1 to T = 10, got 11"),
        (
            lambda: iDDPM().sigmas(2000),
            "iDDPM: steps must be from 1 to 9.., the levels between 0.002 and 81.0, got 2000",
        ),
        (lambda: DDPM(10.0), "DDPM: T must be a whole number, at least 2, got 10.0"),
        (
            lambda: DDPM(10, torch.full((1000,), 0.1)),
            r"DDPM: beta_schedule must be .* got numbers of shape \[1000\]$",
        ),
        (
            lambda: VP(beta_min=-0.1),
            "VP: beta_min must be above -beta_d epsilon_t / 2 and -beta_d, got -0.1 with beta_d "
            "19.9",
        ),
        (lambda: VP(-1.0, 0.9), "VP: beta_min must be above .*, got 0.9 with beta_d -1.0"),
        (lambda: VP(math.inf), "VP: beta_min must be above"),
        (lambda: VP(epsilon_t=1.0), "VP: epsilon_t must be between 0 and 1, got 1.0"),
        (
            lambda: VE(sigma_min=0.0),
            "VE: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got 0.0 and "
            "100.0",
        ),
        (lambda: VE(sigma_max=math.inf), "VE: sigma_min and sigma_max must satisfy"),
        (lambda: VE().sigmas(0), "VE: steps must be at least 1, got 0"),
        (lambda: FlowMatching().sigmas(-1), "FlowMatching: steps must be at least 1, got -1"),
        (
            lambda: FlowMatching(t_max=1.1),
            "FlowMatching: t_min and t_max must satisfy 0 < t_min < t_max <= 1, got 0.001 and 1.1",
        ),
    ],
)
def test_path_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 999), st.integers(0, 998), st.floats(0, 1))
def test_two_moment_is_ddims_mean(t, tau, eta):
    """The design's own form, with s^2 written out: kappa = sqrt(sigma_tau^2 - s^2) / sigma_t."""
    tau = min(tau, t - 1)
    _, abar = ddpm()
    alpha_t = abar[t].sqrt()
    alpha_tau = abar[tau].sqrt()
    sigma_t = (1 - abar[t]).sqrt()
    sigma_tau = (1 - abar[tau]).sqrt()
    s2 = (
        eta**2
        * sigma_tau**2
        / sigma_t**2
        * (sigma_t**2 - (alpha_t / alpha_tau) ** 2 * sigma_tau**2)
    )
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
    assert (
        kappas[0] == two_moment(*point, coupling="shared")[1] == pytest.approx(point[3] / point[1])
    )
    assert kappas[-1] == two_moment(*point, coupling="markov")[1]
    assert two_moment(*point, coupling="markov", eta=0.0)[1] == kappas[0]


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    "point", [(0.6, 0.8, 0.9, math.sqrt(0.19)), (1.0, 2.0, 1.0, 0.7), (0.2, 0.8, 0.5, 0.5)]
)
def test_mean_by_monte_carlo(point, eta):
    """Regress a simulated x_tau on (x0, x_t): the coefficients are A and kappa, within 4 standard
    errors.

    For eta = 1 a Markov path is simulated. DDIM's inference process has that step's fresh noise eta
    times as large and keeps the marginals, so the rest of x_tau's noise is x_t's own.
    """
    alpha_t, sigma_t, alpha_tau, sigma_tau = point
    torch.manual_seed(0)
    B = 200_000
    x0, n, step = torch.randn(3, B, dtype=torch.float64)
    if eta == 1:
        x_tau = alpha_tau * x0 + sigma_tau * n
        x_t = (
            alpha_t / alpha_tau * x_tau
            + math.sqrt(sigma_t**2 - (alpha_t / alpha_tau * sigma_tau) ** 2) * step
        )
    else:
        # the posterior's variance over sigma_tau^2
        beta = 1 - (alpha_t / alpha_tau * sigma_tau / sigma_t) ** 2
        fresh = eta * sigma_tau * math.sqrt(beta)
        x_t = alpha_t * x0 + sigma_t * n
        x_tau = alpha_tau * x0 + math.sqrt(sigma_tau**2 - fresh**2) * n + fresh * step
    inputs = torch.stack([x0, x_t], 1)
    fit = torch.linalg.lstsq(inputs, x_tau[:, None]).solution[:, 0]
    covariance = torch.linalg.inv(inputs.T @ inputs) * (x_tau - inputs @ fit).var()
    expected = torch.stack(two_moment(*point, eta=eta))
    assert ((fit - expected).abs() < 4 * covariance.diagonal().sqrt() + 1e-10).all()
    assert covariance.diagonal().sqrt().max() < 4e-3


def test_shared_mean_is_exact():
    """With one noise for both levels the mean is x_tau itself."""
    alpha_t, sigma_t, alpha_tau, sigma_tau = 0.6, 0.8, 0.9, math.sqrt(0.19)
    torch.manual_seed(0)
    x0, n = torch.randn(2, 100, dtype=torch.float64)
    A, kappa = two_moment(alpha_t, sigma_t, alpha_tau, sigma_tau, coupling="shared")
    torch.testing.assert_close(
        A * x0 + kappa * (alpha_t * x0 + sigma_t * n), alpha_tau * x0 + sigma_tau * n
    )


def test_two_moment_bad_arguments():
    with pytest.raises(ValueError, match="coupling must be 'markov' or 'shared', got 'ode'"):
        two_moment(1, 1, 1, 0.5, coupling="ode")
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"two_moment: eta must be in \[0, 1\]"):
            two_moment(1, 1, 1, 0.5, eta=eta)
