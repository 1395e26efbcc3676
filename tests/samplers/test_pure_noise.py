"""An infinite noise level, where no signal is left: t = 1 of flow matching, zero terminal SNR.

The state there is the unit noise.
"""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.heun_step import Steps
from tdkern.losses import DDPMLoss, FlowLoss, TDDDPMLoss, TDFlowLoss
from tdkern.networks import CTPrecond, Denoiser, EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from tdkern.preconditioning import PREDICTIONS
from tdkern.samplers import (
    ablation,
    ddim,
    ddpm,
    dpmpp,
    euler,
    heun,
    multistep,
    onestep,
    unipc,
)
from tdkern.schedules import DDPM, FlowMatching
from tdkern.weighting import Uncertainty

BETAS = (0.1, 0.3, 0.6, 1.0)
ALL = [
    heun,
    partial(heun, time="flow"),
    euler,
    ddim,
    partial(ddim, eta=0.5),
    ddpm,
    partial(ddpm, variance="large"),
    dpmpp,
    unipc,
    partial(unipc, order=3),
    multistep,
    onestep,
]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


class Bent(torch.nn.Module):
    """A module of x_t and t, which it keeps."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x, t))
        return (self.slope * x + t[:, None].cos()).sin()


def networks():
    """Every network that knows pure noise."""
    squares = DDPM(4, BETAS).alphas_cumprod
    return [
        Denoiser(Bent(), "velocity", time_scale=1000.0),
        Denoiser(Bent(), "x0", alphas_cumprod=squares),
        Denoiser(Bent(), "v", alphas_cumprod=squares),
    ]


def test_schedules():
    ddpm_path, flow = DDPM(4, BETAS), FlowMatching(t_max=1)
    assert torch.equal(ddpm_path.alphas_cumprod[-1:], torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(
        ddpm_path.alphas_cumprod, (1 - torch.tensor(BETAS, dtype=torch.float64)).cumprod(0)
    )
    for path, end in ((ddpm_path, 4), (flow, 1.0), (FlowMatching(t_max=1, shift=3.0), 1.0)):
        assert (path.alpha(end), path.sigma(end), path.sigma_hat(end)) == (0, 1, math.inf)
        assert path.time(math.inf) == end and path.ends_in_noise
        levels = path.sigmas(4)
        assert levels[0] == math.inf and levels[1:].isfinite().all() and (levels.diff() < 0).all()
        t = path.times(4)
        torch.testing.assert_close(path.time(levels[:-1]), t)
        between = path.time(2.0 ** torch.arange(4, 40, dtype=torch.float64))
        assert (between.diff() > 0).all() and between.isfinite().all()
        assert between[-1] == pytest.approx(end, abs=1e-9)
    assert not (DDPM().ends_in_noise or DDPM(2, (0.1, 0.999999)).ends_in_noise)
    assert not FlowMatching().ends_in_noise


@pytest.mark.parametrize("kind", [tuple, list, torch.tensor])
def test_given_betas_are_kept(kind):
    """Above `beta_max` too, which bounds the schedules by name; D6's 1 - 1e-6."""
    betas = [0.01] * 4 + [1 - 1e-6]
    if kind is torch.tensor:
        kind = partial(torch.tensor, dtype=torch.float64)
    path = DDPM(5, kind(betas))
    assert path.alphas_cumprod[-1].item() == pytest.approx(0.99**4 * 1e-6, rel=1e-9)
    assert path == DDPM(5, tuple(betas)) and hash(path) == hash(DDPM(5, tuple(betas)))
    loss = DDPMLoss(5, beta_schedule=kind(betas))
    assert loss.schedule == path and loss == DDPMLoss(5, beta_schedule=tuple(betas))
    assert hash(loss) == hash(replace(loss, T=5)) and json.dumps(loss.beta_schedule)
    assert DDPM(5, "cosine").alphas_cumprod[-1] > 1e-6


@pytest.mark.parametrize("name", PREDICTIONS)
def test_preconditionings(name):
    """skip sigma and scale tend to what they are at an infinite level; gradients stay finite."""
    kind = PREDICTIONS[name]
    sigma = torch.tensor([1e12, math.inf], dtype=torch.float64)
    skip, scale = kind.skip_scale(sigma)
    if kind.reaches_noise:
        assert skip[1] == pytest.approx(1e12 * skip[0].item(), abs=1e-9)
        assert scale[1] == pytest.approx(scale[0].item(), abs=1e-9)
    else:
        assert scale[0].abs() > 1e11


@pytest.mark.parametrize("i", range(3))
def test_networks(i):
    """D of the unit noise is the limit of D(sigma noise, sigma), in float32 too."""
    net, noise = networks()[i], random(3, 4)
    at_noise = net(noise, math.inf)
    (x, t) = net.model.module.seen[-1]
    assert torch.equal(x, noise) and (t == (1000.0 if i == 0 else 3.0)).all()
    torch.testing.assert_close(at_noise, net(1e9 * noise, 1e9), rtol=1e-6, atol=1e-6)
    single = net(noise.float(), torch.tensor(math.inf))
    torch.testing.assert_close(single.double(), at_noise, rtol=1e-5, atol=1e-5)
    mixed = net(noise, torch.tensor([2.0, math.inf, 0.1], dtype=torch.float64))
    assert torch.equal(mixed[1], at_noise[1]) and mixed.isfinite().all()


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("sampler", ALL)
def test_samplers(sampler, i):
    """From unit noise at an infinite level as from sigma noise at a very high one.

    Where the step from there has another order, it is D(noise) + sigma noise that both go on from.
    """
    net, noise, seen = networks()[i], random(3, 4), []
    rest = [3.0, 1.0, 0.3, 0.0]
    torch.manual_seed(1)
    x = sampler(net, noise, [math.inf, *rest], callback=seen.append)
    assert x.isfinite().all() and seen[0]["sigma"] == math.inf
    assert torch.equal(seen[0]["denoised"], net(noise, math.inf))
    kind = getattr(sampler, "func", sampler)
    if kind in (euler, ddim, ddpm, onestep, multistep) or "flow" in str(sampler):
        torch.manual_seed(1)
        high = sampler(net, 1e9 * noise, [1e9, *rest])
        torch.testing.assert_close(x, high, rtol=1e-6, atol=1e-6)
    else:
        begun = net(noise, math.inf) + 3.0 * noise
        expected = sampler(net, begun, rest)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    assert sampler(net, noise, [math.inf, 0.0]).isfinite().all()


def test_churn_leaves_pure_noise_alone():
    net, noise, draws = networks()[0], random(3, 4), []

    def randn_like(x):
        draws.append(x)
        return random(3, 4, seed=len(draws))

    x = heun(net, noise, [math.inf, 3.0, 1.0, 0.0], S_churn=1.0, randn_like=randn_like)
    assert x.isfinite().all() and len(draws) == 3 and torch.equal(draws[0], noise)


def test_the_fused_path_is_kept_below():
    """A sampler that begins in pure noise takes the plain path, and no other."""
    net = networks()[0]
    for sigmas, launches in (([5.0, 1.0, 0.0], 2), ([math.inf, 1.0, 0.0], 0)):
        with Steps() as calls:
            euler(net, random(3, 4), sigmas)
        assert calls.count == launches


REFUSED = [
    EDMPrecond(Bent()),
    CTPrecond(Bent()),
    VPPrecond(Bent()),
    VEPrecond(Bent()),
    iDDPMPrecond(Bent()),
    Denoiser(Bent(), "eps", alphas_cumprod=[0.9, 0.1]),
]


@pytest.mark.parametrize("net", REFUSED, ids=lambda net: type(net).__name__)
@pytest.mark.parametrize("sampler", ALL)
def test_networks_that_do_not_know_pure_noise_are_refused(sampler, net):
    for denoiser in (net, partial(net, class_labels=None)):
        with pytest.raises(ValueError, match=r"sigmas must begin at a finite level with \w+, as"):
            sampler(denoiser, random(3, 4), [math.inf, 1.0, 0.0])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(
        ValueError, match="Denoiser: prediction must be 'x0' or 'v' where alphas_cu"
    ):
        Denoiser(Bent(), "eps", alphas_cumprod=[0.9, 0.0])
    for loss in (DDPMLoss, TDDDPMLoss):
        with pytest.raises(ValueError, match=f"{loss.__name__}: prediction must be one that gives"):
            loss(4, beta_schedule=BETAS)
    with pytest.raises(
        ValueError, match=r'ablation: sigmas must be finite; .* heun with time="flow"'
    ):
        ablation(networks()[0], random(3, 4), [math.inf, 1.0, 0.0])


LOSSES = [
    (FlowLoss(t_max=1), 0),
    (TDFlowLoss(t_max=1), 0),
    (TDFlowLoss(t_max=1, coupling="shared"), 0),
    (DDPMLoss(4, prediction="x0", beta_schedule=BETAS), 1),
    (DDPMLoss(4, prediction="v", beta_schedule=BETAS), 2),
    (TDDDPMLoss(4, prediction="v", beta_schedule=BETAS), 2),
    (TDDDPMLoss(4, prediction="v", beta_schedule=BETAS, coupling="shared"), 2),
    (TDDDPMLoss(4, k=2, prediction="x0", beta_schedule=BETAS), 1),
]


@pytest.mark.parametrize(("loss", "i"), LOSSES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_losses(loss, i, fused):
    """At the end, x_t is the noise and the base loss the plain mean square error of the output."""
    net, target = networks()[i], networks()[i]
    x0, noise = random(5, 4), random(5, 4, seed=1)
    end = loss.schedule.t_max
    t = torch.full((5,), end, dtype=torch.float64)
    t[0] = 0.5 * end
    batch = loss.pair(x0, t=t, noise=noise)
    assert torch.equal(batch.x_t[1:], noise[1:]) and (batch.sigma[1:] == math.inf).all()
    call = net if fused else lambda *args, **kw: net(*args, **kw)
    target_call = target if fused else lambda *args, **kw: target(*args, **kw)
    terms = loss.evaluate(call, target_call, batch)
    F = net(noise, math.inf, raw=True)
    truth = {"velocity": noise - x0, "x0": x0, "v": -x0}[loss.prediction]
    expected = (F - truth).square().mean(1)[1:]
    factor = torch.where(terms.valid, getattr(loss, "lambda_base", 1.0), 1.0)[1:]
    torch.testing.assert_close(terms.base[1:], factor * expected)
    assert terms.loss.isfinite().all()
    terms.loss.sum().backward()
    assert net.model.module.slope.grad.isfinite()


@pytest.mark.parametrize(("loss", "i"), LOSSES, ids=lambda value: type(value).__name__)
def test_losses_draw_for_themselves(loss, i):
    torch.manual_seed(0)
    net, target = networks()[i], networks()[i]
    for dtype in (torch.float32, torch.float64):
        assert loss(net, target, random(64, 4).to(dtype)).isfinite().all()


@pytest.mark.parametrize("weight", FlowLoss.base_weights)
@pytest.mark.parametrize(("loss", "i"), LOSSES, ids=lambda value: type(value).__name__)
def test_every_base_weight_is_finite_there(loss, i, weight):
    """EDM2's learned uncertainty too, and so are all gradients."""
    torch.manual_seed(0)
    net, target, uncertainty = networks()[i], networks()[i], Uncertainty(8).double()
    loss = replace(loss, base_weight=weight)
    end = torch.full((5,), loss.schedule.t_max, dtype=torch.float64)
    terms = loss.evaluate(net, target, loss.pair(random(5, 4), t=end), uncertainty=uncertainty)
    assert terms.loss.isfinite().all()
    terms.loss.sum().backward()
    assert net.model.module.slope.grad.isfinite() and uncertainty.weight.grad.isfinite().all()
