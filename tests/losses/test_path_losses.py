"""The losses along a schedule's time, DDPM, VP, VE and flow matching: golden vectors, draws, ends
of the path, networks.
"""

import dataclasses
import math

import pytest
import torch

from helpers.losses import check_path_golden
from tdkern.columns import W_BASE
from tdkern.losses import (
    DDPMLoss,
    EDMLoss,
    FlowLoss,
    TDDDPMLoss,
    TDEDMLoss,
    TDFlowLoss,
    TDVELoss,
    TDVPLoss,
    VELoss,
    VPLoss,
)
from tdkern.networks import MLP, Denoiser, EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from tdkern.ops import _backends
from tdkern.schedules import DDPM

BASELINES = [DDPMLoss(), VPLoss(), VELoss(), FlowLoss()]
TD = [TDDDPMLoss(), TDVPLoss(), TDVELoss(), TDFlowLoss()]
LEVELS = DDPM().alphas_cumprod


def name(loss):
    return type(loss).__name__


@pytest.mark.parametrize("family", ["vp", "ve"])
def test_golden(family):
    check_path_golden(family)


@pytest.mark.parametrize("loss", BASELINES + TD, ids=name)
def test_draws(loss):
    """Times are uniform over the schedule, and each state has its level's noise; markov states are
    a Markov path's.
    """
    B = 100_000
    torch.manual_seed(0)
    t = loss._time(None, torch.zeros(B, 1))
    low, high = loss.schedule.t_min, loss.schedule.t_max
    assert (
        t.min() >= low
        and t.max() <= high
        and abs(t.mean() - (low + high) / 2) < 4 * (high - low) / (12 * B) ** 0.5
    )
    assert isinstance(loss, DDPMLoss) <= bool(
        (t == t.round()).all() and t.min() == low and t.max() == high
    )
    batch = loss.pair(torch.zeros(B, 1, dtype=torch.float64), t=t[:1].expand(B))
    sigma, _, sigma_p, _ = batch.levels[0]
    torch.testing.assert_close(sigma, loss.schedule.sigma_hat(t[0]))
    products = [(batch.x_t**2, sigma**2)]
    if batch.x_tp is not None:
        products += [(batch.x_tp**2, sigma_p**2), (batch.x_t * batch.x_tp, sigma_p**2)]
    for product, mean in products:
        assert abs(product.mean() - mean) < 4 * product.std() / B**0.5


def matching(loss):
    """Networks whose raw output is the F of a loss."""
    torch.manual_seed(1)
    mlp = lambda: MLP(2, 8, 1)
    for _ in range(2):  # the online and the target network
        if loss.prediction == "score":
            yield VEPrecond(mlp()).double()
        elif loss.prediction == "velocity":
            yield Denoiser(Time(mlp()), "velocity").double()
        elif isinstance(loss, DDPMLoss):
            yield Denoiser(Time(mlp()), loss.prediction, alphas_cumprod=LEVELS).double()
        else:
            yield VPPrecond(mlp()).double()


class Time(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x, t / 1000)


def plain(net):
    """The same denoiser as a bare callable, which gives D only."""
    return lambda x, sigma, class_labels=None, augment_labels=None: net(
        x, sigma, class_labels, augment_labels
    )


@pytest.mark.parametrize(
    "loss",
    [*BASELINES, *TD, TDDDPMLoss(prediction="v"), TDDDPMLoss(prediction="x0")],
    ids=lambda loss: f"{name(loss)}-{loss.prediction}",
)
def test_raw_and_plain_networks_agree(loss):
    """F through the fused path and D from any callable: one value, one gradient, and no sample's
    NaN spreads.
    """
    t = torch.tensor(
        [loss.schedule.t_min, *torch.linspace(1.5 * loss.schedule.t_min, loss.schedule.t_max, 5)],
        dtype=torch.float64,
    )
    batch = loss.pair(
        torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2,
        t=t.floor() if isinstance(loss, DDPMLoss) else t,
    )
    results = []
    for wrap in (lambda net: net, plain):
        net, target = matching(loss)
        assert loss.fits(net) and not loss.fits(EDMPrecond(net.model))
        for parameter in (*net.parameters(), *target.parameters()):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
        if batch.x_tp is not None:
            batch.x_tp[~loss.evaluate(net, target, batch).valid] = torch.nan
        terms = loss.evaluate(wrap(net), wrap(target) if batch.x_tp is not None else None, batch)
        terms.loss.sum().backward()
        assert all(parameter.grad is None for parameter in target.parameters())
        results.append((terms.loss.detach(), *(parameter.grad for parameter in net.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all() and ours.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_denoiser_is_asked_at_the_schedules_own_time():
    """Times 1 .. T here are 0 ..

    T - 1 in a network's own count, and its input is the path's own state.
    """

    class Record(torch.nn.Module):
        def forward(self, x, t):
            self.call = x, t
            return torch.zeros_like(x)

    loss, module, t = TDDDPMLoss(50, beta_schedule="cosine"), Record(), torch.arange(1, 51)
    net = Denoiser(module, alphas_cumprod=loss.schedule.alphas_cumprod).double()
    batch = loss.pair(torch.randn(50, 2, dtype=torch.float64), t=t)
    loss.evaluate(net, net, batch)
    x, times = module.call  # of t' = t - 1, the last call, where there is a TD term
    t = t[1:].flip(0)  # the largest level first
    torch.testing.assert_close(times, (t - 2).double())
    torch.testing.assert_close(x, loss.schedule.alpha(t - 1)[:, None] * batch.x_tp[t - 1])


@pytest.mark.parametrize(
    "loss",
    [*BASELINES, *TD, TDDDPMLoss(20, 3, coupling="shared"), EDMLoss(), TDEDMLoss()],
    ids=name,
)
def test_nothing_waits_for_the_device(loss):
    """On the device "meta" there are no values, so whatever asked for one would raise."""
    images = torch.zeros(4, 3, device="meta")
    batch = loss.pair(images)
    assert (
        batch.coef.shape == (4, 8)
        and batch.levels.shape == (4, 4)
        and batch.x_t.shape == (4, 3)
        and batch.coef.device.type == "meta"
    )
    assert loss.evaluate(lambda x, *_, **__: x, lambda x, *_, **__: x, batch).loss.shape == (4,)


@pytest.mark.parametrize("make", [EDMLoss, TDEDMLoss, FlowLoss, TDFlowLoss, DDPMLoss, TDDDPMLoss])
def test_the_backend_reaches_every_op(make, monkeypatch):
    asked, resolve = set(), _backends.resolve
    monkeypatch.setattr(
        _backends,
        "resolve",
        lambda op, backend, device: asked.add((op, backend)) or resolve(op, backend, device),
    )
    make(backend="reference")(lambda x, *_, **__: x, lambda x, *_, **__: x, torch.zeros(2, 3))
    ops = (
        ("noise_pair", "td_loss", "td_coef")
        if issubclass(make, EDMLoss)
        else ("noise_pair", "td_loss")
    )
    assert asked == {(op, "reference") for op in ops}


def test_iddpm_networks_predict_eps():
    assert DDPMLoss().fits(iDDPMPrecond(MLP(2, 8, 1))) and not DDPMLoss(prediction="v").fits(
        iDDPMPrecond(MLP(2, 8, 1))
    )


@pytest.mark.parametrize("loss", TD, ids=name)
def test_without_a_target_it_is_the_base_loss(loss):
    """Where the pair leaves the path the loss is (1 + lambda) the baseline's; DDPM's mean matching,
    with this weight, is the same.
    """
    baseline = BASELINES[TD.index(loss)]
    x0, noise, noise_p = torch.randn(3, 1, 2, dtype=torch.float64)
    t = torch.tensor([loss.schedule.t_min], dtype=torch.float64)
    batch = loss.pair(x0, t=t, noise=noise, noise_p=noise_p)
    D = torch.randn(1, 2, dtype=torch.float64)
    denoiser = lambda *_, **__: D
    terms = loss.evaluate(denoiser, denoiser, batch)
    expected = baseline.evaluate(denoiser, None, baseline.pair(x0, t=t)).loss
    assert not terms.valid.any() and terms.td == 0
    torch.testing.assert_close(terms.loss, 1.5 * expected)


def test_td_k_reaches_the_data_where_t_is_k():
    loss = TDDDPMLoss(10, 3)
    batch = loss.pair(torch.zeros(10, 1), t=torch.arange(1, 11))
    assert torch.equal(batch.coef[:, 6] != 0, torch.arange(1, 11) > 3)
    path = DDPM(10)
    for column, t in enumerate(
        (torch.arange(4, 11), torch.arange(3, 10), torch.arange(1, 8), torch.arange(7))
    ):
        torch.testing.assert_close(batch.levels[3:, column], path.sigma_hat(t))


@pytest.mark.parametrize("weight", ["pairwise", "pairwise_x0", "online", "none"])
def test_mean_matching(weight):
    """At t <= k the mean's whole error, w A^2 |x0 - D|^2 with w the weight of a pair without a
    second term, or the simple loss.
    """
    T, t = 20, torch.tensor([1, 2, 3])
    beta, x0, D = (
        torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T,
        *torch.randn(2, 3, 4, dtype=torch.float64),
    )
    abar = torch.cat([torch.ones(1), (1 - beta).cumprod(0)])
    A = abar[t - 1].sqrt() * beta[t - 1] / (1 - abar[t])  # DDPM's own, of the posterior mean
    error = (x0 - D).square().mean(1)
    simple = error * abar[t] / (1 - abar[t])
    w = {
        "pairwise": simple / error / A**2,
        "pairwise_x0": 1 / A**2,
        "online": simple / error / A**2,
        "none": torch.ones(3),
    }[weight]
    for terminal, end in (("mean", w * A**2 * error), ("simple", simple)):
        loss = TDDDPMLoss(T, k=3, weight=weight, terminal=terminal, lambda_base=0.25)
        terms = loss.evaluate(lambda *_, **__: D, lambda *_, **__: D, loss.pair(x0, t=t))
        torch.testing.assert_close(terms.loss, end + 0.25 * simple, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", TD, ids=name)
def test_couplings_and_eta(loss):
    """ "shared" has one noise and DDIM's mean; `eta` changes the mean alone."""
    x0, noise, noise_p = torch.randn(3, 4, 2, dtype=torch.float64)
    t = torch.linspace(0.3, 1, 4, dtype=torch.float64) * loss.schedule.t_max
    t = t.round() if isinstance(loss, DDPMLoss) else t
    shared = dataclasses.replace(loss, coupling="shared").pair(x0, t=t, noise=noise)
    torch.testing.assert_close((shared.x_t - x0) / shared.levels[:, :1], noise)
    torch.testing.assert_close((shared.x_tp - x0) / shared.levels[:, 2:3], noise)
    markov, ode = (
        dataclasses.replace(loss, eta=eta).pair(x0, t=t, noise=noise, noise_p=noise_p)
        for eta in (None, 0.0)
    )
    assert torch.equal(markov.x_t, ode.x_t) and torch.equal(markov.x_tp, ode.x_tp)
    assert (
        torch.equal(ode.coef[:, 4:6], shared.coef[:, 4:6])
        and (ode.coef[:, 4] < markov.coef[:, 4]).all()
    )
    alpha_tau = loss.schedule.alpha(loss.schedule.time(shared.levels[:, 1]))
    torch.testing.assert_close(
        shared.coef[:, 4],
        alpha_tau * (1 - shared.levels[:, 1] / shared.levels[:, 0]),
        rtol=1e-7,
        atol=0,
    )


@pytest.mark.parametrize("loss", TD, ids=name)
def test_small_batches(loss):
    for B in (0, 1):
        net, target = matching(loss)
        value = loss(net, target, torch.zeros(B, 2, dtype=torch.float64))
        assert value.shape == (B,) and value.isfinite().all()
        value.sum().backward()


@pytest.mark.parametrize("loss", BASELINES + TD, ids=name)
def test_times_off_the_path_are_refused(loss):
    """Where A, the weights or the state would be infinite or another time's; the ends themselves
    are on it, in single precision too.
    """
    path = loss.schedule
    for t in (path.t_min, path.t_max):
        batch = loss.pair(torch.zeros(1, 2), t=torch.tensor([t], dtype=torch.float32))
        assert batch.coef.isfinite().all() and batch.x_t.isfinite().all()
        # tau and tau' are on it too
        assert (batch.levels >= 0.999 * path.sigma_hat(path.t_end)).all()
    for t in (path.t_min - 0.5, path.t_max + 0.5, math.nan):
        with pytest.raises(
            ValueError,
            match=f"{name(loss)}: t must be from {path.t_min:g} to {path.t_max:g}, got values from",
        ):
            loss.pair(torch.zeros(2, 2), t=torch.tensor([path.t_max, t]))
    if isinstance(loss, DDPMLoss):
        with pytest.raises(ValueError, match=f"{name(loss)}: t must be whole numbers, got 1.5"):
            loss.pair(torch.zeros(2, 2), t=torch.tensor([1.0, 1.5]))


IMAGES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: VPLoss(beta_min=-1.0),
            "VP: beta_min must be above -beta_d epsilon_t / 2 and -beta_d",
        ),
        (lambda: TDVELoss(sigma_min=200.0), "VE: sigma_min and sigma_max must satisfy"),
        (lambda: FlowLoss(t_min=0.0), "FlowMatching: t_min and t_max must satisfy"),
        (
            lambda: DDPMLoss(prediction="score"),
            "DDPMLoss: prediction must be one of eps, x0, v, got 'score'",
        ),
        (lambda: TDDDPMLoss(1), "DDPM: T must be a whole number, at least 2, got 1"),
        (
            lambda: TDDDPMLoss(10, k=10),
            "TDDDPMLoss: k must be a whole number from 1 to T - 1 = 9, got 10",
        ),
        (
            lambda: TDDDPMLoss(10, k=1.5),
            "TDDDPMLoss: k must be a whole number from 1 to T - 1 = 9, got 1.5",
        ),
        (
            lambda: TDDDPMLoss(terminal="none"),
            "TDDDPMLoss: terminal must be one of mean, simple, got 'none'",
        ),
        (
            lambda: TDVPLoss(lambda_base=-1.0),
            "TDVPLoss: lambda_base must be a number >= 0, got -1.0",
        ),
        (
            lambda: TDVPLoss(lambda_base=math.inf),
            "TDVPLoss: lambda_base must be a number >= 0, got inf",
        ),
        (lambda: TDVPLoss(steps=math.nan), "TDVPLoss: steps must be at least 2, got nan"),
        (
            lambda: TDVPLoss(k_idx=math.inf),
            "TDVPLoss: k_idx and one_idx must be positive numbers, got inf and 1.0",
        ),
        (
            lambda: TDVPLoss(weight="both"),
            "TDVPLoss: weight must be one of pairwise, pairwise_x0, online, none, got 'both'",
        ),
        (lambda: TDVPLoss(coupling="none"), "coupling must be 'markov' or 'shared', got 'none'"),
        (lambda: TDVPLoss(eta=2.0), r"TDVPLoss: eta must be in \[0, 1\], got 2.0"),
        (lambda: TDVPLoss(steps=1), "TDVPLoss: steps must be at least 2, got 1"),
        (
            lambda: TDVPLoss(one_idx=0.0),
            "TDVPLoss: k_idx and one_idx must be positive numbers, got 1.0 and 0.0",
        ),
        (
            lambda: TDFlowLoss().pair(IMAGES.byte()),
            r"TDFlowLoss: images must be \[B, ...\] of float32 or float64",
        ),
        (
            lambda: TDFlowLoss().pair(IMAGES, t=torch.ones(3)),
            r"TDFlowLoss: t must have shape \[2\], got \[3\]",
        ),
        (
            lambda: TDFlowLoss().pair(IMAGES, noise=torch.ones(2)),
            r"TDFlowLoss: noise must have shape \[2, 3\], got \[2\]",
        ),
        (
            lambda: TDFlowLoss(coupling="shared").pair(IMAGES, noise_p=IMAGES),
            "noise_p must be None with shared coupling",
        ),
        (
            lambda: TDFlowLoss()(lambda x, sigma, **_: x, None, IMAGES),
            "TDFlowLoss: target_net must be a network, got None",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", [TDVPLoss, TDVELoss, TDFlowLoss, TDDDPMLoss])
def test_every_weight_that_a_loss_takes(kind):
    """By the noise level alone: a path loss knows no standard deviation of the data."""
    for name in kind.base_weights:
        torch.manual_seed(0)
        coef = kind(base_weight=name).pair(torch.zeros(64, 3)).coef
        assert coef[:, W_BASE].isfinite().all() and (coef[:, W_BASE] > 0).all(), name
