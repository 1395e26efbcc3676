"""The base loss's weights by name, by callable and learned, against formulas written by hand."""

import dataclasses

import pytest
import torch

from helpers.losses import Linear
from helpers.tiny import options_of
from tdkern.columns import SCALE, W_BASE, W_TD
from tdkern.losses import (
    CTLoss,
    DDPMLoss,
    EDMLoss,
    FlowLoss,
    TDCTLoss,
    TDDDPMLoss,
    TDEDMLoss,
    TDFlowLoss,
)
from tdkern.weighting import P2, MinSNR, SoftMinSNR, Uncertainty

F64 = torch.float64
SIGMA = torch.tensor([0.03, 0.2, 0.447, 0.5, 1.0, 7.0, 90.0], dtype=F64)


def of_eps(name, snr):
    """The papers' weights of mean((eps - eps_net)^2)."""
    return {
        "min-snr": torch.minimum(snr, torch.tensor(5.0)) / snr,  # arXiv 2303.09556
        "soft-min-snr": 4 / (snr + 4),  # arXiv 2401.11605: 1 / (sigma^2 + 1/4) over SNR
        "p2": 1 / (1 + snr),  # arXiv 2204.00227 with k = gamma = 1
    }[name]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ["min-snr", "soft-min-snr", "p2"])
def test_what_ddpm_pays_for_each_prediction(name, prediction):
    """min(SNR, gamma) / SNR of eps, min(SNR, gamma) of x0 and min(SNR, gamma) / (SNR + 1) of v are
    one weight, and likewise the others'.
    """
    loss = DDPMLoss(prediction=prediction, base_weight=name)
    torch.manual_seed(0)
    x0, noise, F = torch.randn(3, 5, 4, dtype=F64)
    t = torch.tensor([1, 40, 300, 700, 1000])
    batch = loss.pair(x0, t=t, noise=noise)
    abar = loss.schedule.alphas_cumprod[t - 1]
    alpha, sigma, snr = abar.sqrt(), (1 - abar).sqrt(), abar / (1 - abar)
    aim = {
        "eps": noise,
        "x0": x0,
        "v": alpha[:, None] * noise - sigma[:, None] * x0,
    }[prediction]
    of_prediction = {"eps": 1, "x0": snr, "v": snr / (snr + 1)}[prediction]

    class Net:
        preconditioning = loss.preconditioning

        def __call__(self, x, sigma, raw):
            return F

    expected = of_eps(name, snr) * of_prediction * (aim - F).square().mean(1)
    torch.testing.assert_close(loss.evaluate(Net(), None, batch).loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("weight", "by_hand"),
    [
        ("own", lambda s: (s**2 + 0.25) / (0.5 * s) ** 2),
        ("karras", lambda s: s**-2 + 4),
        ("uniform", lambda s: 0 * s + 1),
        ("snr", lambda s: s**-2),
        ("snr+1", lambda s: s**-2 + 1),
        ("truncated-snr", lambda s: (s**-2).clamp(min=1)),
        ("min-snr", lambda s: (s**-2).clamp(max=5)),
        (MinSNR(3.0), lambda s: (s**-2).clamp(max=3)),
        ("soft-min-snr", lambda s: 1 / (s**2 + 0.25)),
        (SoftMinSNR(2.0), lambda s: 1 / (s**2 + 0.5)),
        ("p2", lambda s: s**-2 / (1 + s**-2)),
        (P2(0.5, 2.0), lambda s: s**-2 / (0.5 + s**-2) ** 2),
        (lambda s: s + 1, lambda s: s + 1),
    ],
)
def test_edm(weight, by_hand):
    """w, lambda w, and (1 + lambda) w where there is no TD term, which it does not touch."""
    images, w = torch.randn(len(SIGMA), 3, dtype=F64), by_hand(SIGMA)
    alone = EDMLoss(base_weight=weight).pair(images, sigma=SIGMA)
    torch.testing.assert_close(alone.coef[:, W_BASE], w)
    loss = TDEDMLoss(base_weight=weight, lambda_base=0.25)
    coef = loss.pair(images, sigma=SIGMA).coef
    without = (coef[:, W_TD] == 0).double()
    assert 0 < without.sum() < len(SIGMA)
    torch.testing.assert_close(coef[:, W_BASE], (0.25 + without) * w)
    own = dataclasses.replace(loss, base_weight="own").pair(images, sigma=SIGMA).coef
    assert torch.equal(coef[:, : W_TD + 1], own[:, : W_TD + 1])


@pytest.mark.parametrize("make", [TDFlowLoss, TDDDPMLoss])
def test_paths(make):
    loss, own = make(base_weight="min-snr", lambda_base=0.25), make(lambda_base=0.25)
    t = torch.tensor([0.05, 0.5, 0.9] if make is TDFlowLoss else [1, 400, 1000])
    images = torch.randn(3, 2, dtype=F64)
    batch, plain = loss.pair(images, t=t), own.pair(images, t=t)
    w = (batch.sigma**-2).clamp(max=5)
    expected = 0.25 * w
    if make is TDFlowLoss:
        expected[0] = 1.25 * w[0]
    else:  # where the whole return is known it has the TD term's weight
        expected[0] += plain.coef[0, SCALE] ** -2
    torch.testing.assert_close(batch.coef[:, W_BASE], expected)
    assert torch.equal(batch.coef[:, :W_BASE], plain.coef[:, :W_BASE])


@pytest.mark.parametrize("make", [CTLoss, TDCTLoss])
def test_consistency_training(make):
    images, index = torch.randn(4, 3, dtype=F64), torch.tensor([0, 5, 20, 38])
    for weight, by_hand in (
        ("soft-min-snr", lambda t, p: 1 / (t**2 + 0.25)),
        ("inverse-step", lambda t, p: 1 / (t - p)),
        (lambda t: t**0.5, lambda t, p: t**0.5),
    ):
        batch = make(base_weight=weight).pair(images, index=index)
        plain = make().pair(images, index=index).coef[:, W_BASE]
        w = by_hand(batch.sigma, batch.sigma_p)
        torch.testing.assert_close(batch.coef[:, W_BASE], w * plain)


def test_a_sample_without_room_for_its_td_term_has_the_weight():
    loss = TDEDMLoss(base_weight="p2", td_share=0.4)
    net = Linear(seed=1).double()
    x0 = torch.randn(5, 3, 4, 4, dtype=F64)
    batch = loss.pair(x0, sigma=SIGMA[:5])
    terms = loss.evaluate(net, net, batch)
    assert terms.valid.tolist() == [False, False, False, True, True]
    D = net(batch.x_t, SIGMA[:5])
    expected = 1.5 / (1 + SIGMA[:5] ** 2) * (x0 - D).square().mean((1, 2, 3))
    torch.testing.assert_close(terms.base[:3], expected[:3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(0.0), "MinSNR: gamma must be a positive number, got 0.0"),
        (lambda: SoftMinSNR(-1.0), "SoftMinSNR: gamma must be a positive number, got -1.0"),
        (lambda: P2(gamma=float("nan")), "P2: gamma must be a positive number, got nan"),
        (lambda: P2(k=0.0), "P2: k must be a positive number, got 0.0"),
        (lambda: EDMLoss(base_weight="inverse-step"), "EDMLoss: base_weight must be one of own,"),
        (lambda: FlowLoss(base_weight="karras"), "FlowLoss: base_weight must be one of own, uni"),
        (lambda: CTLoss(base_weight="own"), "CTLoss: base_weight must be one of karras, uniform"),
        (
            lambda: EDMLoss(base_weight=lambda s: 1.0).pair(torch.zeros(2, 3)),
            r"EDMLoss: base_weight must give a tensor \[2\] for as many noise levels, got float",
        ),
        (
            lambda: TDFlowLoss(base_weight=lambda s: s[:, None]).pair(torch.zeros(2, 3)),
            r"TDFlowLoss: base_weight must give a tensor \[2\] .* got \[2, 1\]",
        ),
        (
            lambda: options_of(data="", base_weight=MinSNR()),
            r"base_weight must be text, got MinSNR\(gamma=5.0\)",  # a run's file could not hold it
        ),
    ],
)
def test_wrong_weights_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_takes_no_other_argument_s_place():
    """The losses keep the order of their arguments, EDM's and the published code's."""
    assert CTLoss(7, 0.25).num_scales == TDCTLoss(7, 0.25).num_scales == 7
    assert CTLoss(7, 0.25, 0.01, 50.0, 5.0, "l1", "snr").base_weight == "snr"
    assert EDMLoss(-1.0, 1.0, 0.25).sigma_data == TDEDMLoss(-1.0, 1.0, 0.25).sigma_data == 0.25
    assert TDDDPMLoss(50, 2).k == 2


@pytest.mark.parametrize("family", ["edm", "ddpm", "flow", "ct"])
def test_a_run_has_it(family):
    options = options_of(data="", family=family, base_weight="soft-min-snr")
    assert options.make_loss().base_weight == "soft-min-snr"
    assert options_of(data="", family=family).loss["base_weight"] == (
        "uniform" if family == "ct" else "own"
    )


# ---- learned ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [EDMLoss(), TDEDMLoss(), TDEDMLoss(td_share=0.5), CTLoss(), TDFlowLoss()]
)
def test_uncertainty(loss):
    """exp(-u) L + u, and its gradients in the network and in u."""
    torch.manual_seed(0)
    u, net = Uncertainty(16).double(), Linear(seed=1).double()
    torch.nn.init.normal_(u.weight)
    batch = loss.pair(torch.randn(6, 3, 4, 4, dtype=F64))
    terms = loss.evaluate(net, net, batch, uncertainty=u, gradient_scale=3.0)
    plain = loss.evaluate(net, net, batch).loss
    expected = 3 * ((-u(batch.sigma)).exp() * plain + u(batch.sigma))
    torch.testing.assert_close(terms.loss, expected)
    parameters = [net.conv.weight, u.weight]
    ours, theirs = (torch.autograd.grad(each.sum(), parameters) for each in (terms.loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_uncertainty_starts_at_0_and_finds_the_loss_s_logarithm():
    torch.manual_seed(0)
    u, net, loss = Uncertainty(), Linear(seed=1), EDMLoss()
    images = torch.randn(256, 3, 4, 4) / 2
    sigma = torch.tensor([0.1, 1.0, 10.0, 50.0]).repeat(64)
    batch = loss.pair(images, sigma=sigma)
    terms = [loss.evaluate(net, None, batch, uncertainty=each).loss for each in (u, None)]
    assert torch.equal(*terms)
    optimizer = torch.optim.Adam(u.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss.evaluate(net, None, batch, uncertainty=u).loss.mean().backward()
        optimizer.step()
    expected = terms[1].detach().view(64, 4).mean(0).log()
    torch.testing.assert_close(u(sigma[:4]).detach(), expected, rtol=0, atol=0.05)
