"""What TD does to the regression target of D where both networks are the exact denoiser: by Monte
Carlo, with 4 standard errors.

The target is x0 - r (x0 - D'(x_t')), r = A' / A. With Markov states it has D's mean and less
variance; with shared noise it is off.
"""

from itertools import pairwise

import pytest
import torch

from helpers.families import BIASED, FAMILIES, SD
from tdkern.evaluation.mixture import GaussianMixture
from tdkern.losses import TDCTLoss, TDDDPMLoss, TDEDMLoss, TDFlowLoss, TDVELoss, TDVPLoss
from tdkern.schedules import EDM

DATA = {
    "gaussian": GaussianMixture(
        *(torch.tensor(part, dtype=torch.float64) for part in ([1.0], [[0.0, 0.0]], [SD]))
    ),
    "mixture": GaussianMixture.ring(SD),
}
PATHS = [family for family in FAMILIES if family.base == "denoise"]
B = 12_000


def time_of(family, sigma):
    """The family's time of a noise level, whole for DDPM."""
    if family.name == "edm":
        return EDM().index(sigma)
    time = family.loss().schedule.time(sigma)
    return time.round() if family.name.startswith("ddpm") else time


def at_the_optimum(loss, data, pair, optimum=None):
    """Of [B, d]: x_t, TD's residual D - target, and the denoising errors x0 - D and x0 - D', with
    the pair's numbers [8] and levels [4].
    """
    optimum = optimum or data.denoise
    torch.manual_seed(0)
    batch = pair(data.sample(B))
    D = optimum(batch.x_t, batch.levels[:, 0]).requires_grad_()
    D_p = optimum(batch.x_tp, batch.levels[:, 2])
    terms = loss.evaluate(lambda *_, **__: D, lambda *_, **__: D_p, batch)
    (grad,) = torch.autograd.grad(terms.td.sum(), D)
    assert terms.valid.all()
    coef = batch.coef[0]
    residual = grad * D.shape[1] / (2 * coef[6] * coef[4] ** 2)
    return batch.x_t, residual, batch.x0 - D.detach(), batch.x0 - D_p, coef, batch.levels[0]


def z_scores(x_t, residual):
    """Mean over its standard error of the gradient in three directions of D, for each coordinate: a
    constant, a slope, a curve.
    """
    u = x_t / x_t.std()
    products = torch.cat([residual, residual * u, residual * torch.tanh(u) ** 2], 1)
    return (products.mean(0) / (products.std(0) / len(products) ** 0.5)).abs()


def z_score(values):
    return abs(values.mean() / values.std() * len(values) ** 0.5)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("family", PATHS, ids=lambda family: family.name)
def test_markov_target_is_unbiased_and_varies_less(family, data):
    """Its variance is 1 - (2 r - r^2) v'/v of the baseline's, v and v' the mean squares of the
    denoising errors, whatever the data.
    """
    for sigma in (0.5, 2.0):
        for eta in family.etas if data == "gaussian" else (None,):
            loss = family.loss(eta=eta)
            t = time_of(family, sigma).expand(B)
            x_t, residual, e, e_p, coef, _ = at_the_optimum(
                loss, DATA[data], lambda x0, loss=loss, t=t: family.pair(loss, x0, t)
            )
            assert (z_scores(x_t, residual) < 4).all(), (sigma, eta)
            r = coef[5] / coef[4]
            assert 0 < r < 2
            assert z_score((residual**2 - e**2 + (2 * r - r**2) * e_p**2).sum(1)) < 4, (sigma, eta)
            assert residual.var() < 0.9 * e.var(), (sigma, eta)


@pytest.mark.parametrize(
    "loss",
    [TDDDPMLoss(k=10), TDVPLoss(one_idx=0.25), TDFlowLoss(one_idx=0.25)],
    ids=lambda loss: type(loss).__name__,
)
def test_markov_target_varies_more_where_r_is_above_2(loss):
    """Just before the data, with k > 1 or one_idx < 1: unbiased still, and no gain."""
    t = (
        torch.tensor(11.0)
        if isinstance(loss, TDDDPMLoss)
        else loss.schedule.t_min + 1.35 * loss.distances[1]
    )
    x_t, residual, e, _, coef, _ = at_the_optimum(
        loss, DATA["gaussian"], lambda x0: loss.pair(x0, t=torch.as_tensor(t).expand(B))
    )
    assert coef[5] / coef[4] > 2.6
    assert (z_scores(x_t, residual) < 4).all()
    assert residual.var() > 1.05 * e.var()


@pytest.mark.parametrize(
    ("loss", "r", "variance"),
    [
        (TDDDPMLoss(), (1.00, 1.83), (0.00, 0.86)),
        (TDDDPMLoss(beta_schedule="cosine"), (1.00, 1.89), (0.00, 0.91)),
        (TDDDPMLoss(eta=0.0), (1.00, 3.07), (0.00, 2.50)),
        (TDDDPMLoss(k=2), (1.01, 2.57), (0.00, 1.41)),
        (TDDDPMLoss(k=10), (1.04, 7.34), (0.00, 2.80)),
        (TDVPLoss(), (1.21, 1.65), (0.07, 0.69)),
        (TDVPLoss(eta=0.0), (1.21, 2.03), (0.07, 1.02)),
        (TDVPLoss(steps=13), (1.30, 2.00), (0.13, 0.99)),
        (TDVPLoss(one_idx=0.25), (1.23, 2.92), (0.08, 1.20)),
        (TDVPLoss(k_idx=3.0), (1.80, 4.03), (0.68, 9.18)),
        (TDVELoss(), (1.00, 1.00), (0.00, 0.63)),
        (TDFlowLoss(), (1.10, 1.54), (0.02, 0.80)),
        (TDFlowLoss(eta=0.0), (1.06, 1.98), (0.00, 0.99)),
        (TDFlowLoss(one_idx=0.25), (1.09, 2.82), (0.01, 1.13)),
        (TDFlowLoss(k_idx=3.0), (1.33, 2.38), (0.16, 1.07)),
        (TDEDMLoss(), (1.04, 1.14), (0.00, 0.92)),
    ],
    ids=repr,
)
def test_ratio_and_variance_over_all_times(loss, r, variance):
    """Least and most, over the times with a TD term, of r and of the target's variance over the
    baseline's: the numbers of docs/families.md.
    """
    if isinstance(loss, TDEDMLoss):
        times = {"index": torch.linspace(0, loss.steps - 1, 4001, dtype=torch.float64)}
    elif isinstance(loss, TDDDPMLoss):
        times = {"t": torch.arange(1, loss.T + 1)}
    else:
        times = {
            "t": torch.linspace(loss.schedule.t_min, loss.schedule.t_max, 4001, dtype=torch.float64)
        }
    batch = loss.pair(torch.zeros(len(*times.values()), 1), **times)
    valid = batch.coef[:, 6] != 0
    ratio = (batch.coef[:, 5] / batch.coef[:, 4])[valid]
    (v, v_p) = (
        SD**2 * sigma**2 / (SD**2 + sigma**2)
        for sigma in (batch.levels[valid, 0], batch.levels[valid, 2])
    )
    share = 1 - (2 * ratio - ratio**2) * v_p / v
    for seen, rounded in ((ratio, r), (share, variance)):
        assert (seen.min().item(), seen.max().item()) == pytest.approx(rounded, abs=0.006)
    if isinstance(loss, TDDDPMLoss) and loss.k > 1 and loss.eta is None:
        above = loss.k + 1 + (ratio > 2).nonzero()
        assert (above.min(), above.max()) == {2: (3, 3), 10: (11, 17)}[loss.k]


@pytest.mark.parametrize("family", PATHS, ids=lambda family: family.name)
def test_shared_target_is_biased(family):
    """Its slope is off by r s' (s - s') / (sd^2 + s'^2) of the optimal one, as docs/families.md
    says.
    """
    for sigma, rounded in zip(BIASED, family.bias, strict=True):
        loss = family.loss("shared")
        t = time_of(family, sigma).expand(B)
        x_t, residual, _, _, coef, levels = at_the_optimum(
            loss, DATA["gaussian"], lambda x0, loss=loss, t=t: family.pair(loss, x0, t)
        )
        sigma_t, _, sigma_p, _ = levels
        expected = coef[5] / coef[4] * sigma_p * (sigma_t - sigma_p) / (SD**2 + sigma_p**2)
        assert abs(100 * expected - rounded) < (0.55 if rounded > 1 else 0.06), (sigma, expected)
        optimal = SD**2 / (SD**2 + sigma_t**2) * x_t
        slope = -(residual * optimal).mean() / (optimal**2).mean()
        assert z_score(((residual + expected * optimal) * optimal).sum(1)) < 4, (
            sigma,
            slope,
            expected,
        )
        assert z_scores(x_t, residual).max() > 10, sigma


def test_shared_target_is_biased_for_a_mixture():
    for family in PATHS:
        loss, t = family.loss("shared"), time_of(family, 1.0).expand(B)
        x_t, residual, *_ = at_the_optimum(
            loss,
            DATA["mixture"],
            lambda x0, loss=loss, t=t, family=family: family.pair(loss, x0, t),
        )
        assert z_scores(x_t, residual).max() > 10, family.name


# CT's states share their noise whatever its kappa. In %, at sigma .5, 1, 2 and 4 with 40 levels:
# off the exact denoiser, and off the consistency function
CT_BIAS = {"markov": ((13, 22, 26, 25), (0, 1, 2, 3)), "shared": ((13, 22, 26, 25), (0, 1, 2, 3))}


@pytest.mark.parametrize("coupling", CT_BIAS)
def test_ct_target_is_biased(coupling):
    """Off the denoiser, as shared noise is in every family; off CT's own optimum, the consistency
    function x sd / sqrt(sd^2 + s^2), by much less.
    """
    loss, data = TDCTLoss(coupling=coupling), DATA["gaussian"]
    consistency = lambda x, sigma: SD * x / (SD**2 + sigma[:, None] ** 2).sqrt()
    for sigma, off_D, off_f in zip(BIASED, *CT_BIAS[coupling], strict=True):
        index = EDM(loss.num_scales).index(sigma).expand(B)
        for optimum, rounded in ((data.denoise, off_D), (consistency, off_f)):
            x_t, residual, _, _, coef, (s, _, s_p, _) = at_the_optimum(
                loss, data, lambda x0, index=index: loss.pair(x0, index=index), optimum
            )
            r, one = coef[5] / coef[4], torch.ones(1, 2)  # at x_t = 1:
            D, exact, D_p = (
                f(x, level[None])[0, 0]
                for f, x, level in (
                    (optimum, one, s),
                    (data.denoise, one, s),
                    (optimum, (SD**2 + s * s_p) / (SD**2 + s**2) * one, s_p),
                )
            )
            expected = (exact - r * (exact - D_p)) / D - 1
            assert abs(100 * expected - rounded) < 0.51, (sigma, expected)
            assert z_score(((residual + expected * D * x_t) * x_t).sum(1)) < 4, sigma


def test_shared_noise_in_small_steps_trains_a_consistency_model():
    """With r = 1 (VE) the shared target's fixed point, D = E[D'(x_t') | x_t] from level to level,
    is the ODE's end: slope 1 / sqrt(1 + s^2/sd^2).
    """
    sigma = TDVELoss(steps=4000).schedule.sigmas(4000)[:-1].flip(0)
    slope = SD**2 / (SD**2 + sigma[0] ** 2)
    for lower, upper in pairwise(sigma):
        slope = slope * (SD**2 + lower * upper) / (SD**2 + upper**2)
        if upper in (sigma[2000], sigma[-1]):
            assert abs(slope * (1 + upper**2 / SD**2).sqrt() - 1) < 0.01
