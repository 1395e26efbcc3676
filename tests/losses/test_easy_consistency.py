"""Easy consistency tuning (arXiv 2406.14548): its mapping, its norm and its stages."""

import math

import pytest
import torch

from helpers.losses import Linear
from helpers.tiny import TINY, options_of, pixels
from tdkern.losses import CTLoss, TDCTLoss
from tdkern.losses.curricula import Easy, Mapping
from tdkern.networks import EDMPrecond
from tdkern.preconditioning import EDM
from tdkern.training import Trainer
from tdkern.training.distributed import this_process
from tdkern.training.options import Options
from tdkern.training.presets import PRESETS

F64 = torch.float64
T = torch.tensor([1e-3, 0.1, 0.5, 3.0, 60.0], dtype=F64)


def easy(num_scales, **given):
    settings = {"base_norm": "huber", "huber_c": 0.0, "base_weight": "inverse-step"}
    return CTLoss(num_scales, lognormal=(-1.1, 2.0), **settings | given)


def mapped(t, ratio, k=8.0, b=1.0):
    """r of one t, as the paper has it."""
    n = 1 + k / (1 + math.exp(b * t))
    return max(t * (1 - n / ratio), 0.0)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 256.0])
def test_mapping(ratio):
    for k, b in ((8.0, 1.0), (2.0, 3.0), (0.0, 1.0)):
        expected = [mapped(t, ratio, k, b) for t in T.tolist()]
        torch.testing.assert_close(Mapping(ratio, k, b)(T), torch.tensor(expected, dtype=F64))
    assert (Mapping(2.0)(T[:3]) == 0).all() and (Mapping(256.0)(T) > 0.95 * T).all()


def test_stages():
    """Of the published run: q = 2 to the power of the stage, each 25,000 steps long."""
    steps = (0, 24_999, 25_000, 199_999)
    assert [Easy()(step) for step in steps] == [Mapping(2.0**a) for a in (1, 1, 2, 8)]
    assert Easy(256.0, total_steps=10, k=2.0, b=3.0)(5) == Mapping(256.0, 2.0, 3.0)
    far = Easy(256.0, total_steps=1)(10**6)
    assert math.isfinite(far.ratio) and torch.equal(far(T), T * (1 - far(T) * 0))
    loss = easy(Easy())
    assert loss.at(30_000) == easy(Mapping(4.0)) and loss.at(30_000).at(7) == easy(Mapping(4.0))


@pytest.mark.parametrize("ratio", [2.0, 256.0])
@pytest.mark.parametrize("c", [0.0, 0.06])
def test_loss(ratio, c):
    """(sqrt(||D - D'||^2 + c^2) - c) / (t - t'), with D' = x0 where t' is 0; over the elements."""
    torch.manual_seed(0)
    net, target = Linear(seed=1).double(), Linear(seed=2).double()
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=F64) / 2
    loss = easy(Mapping(ratio), huber_c=c)
    batch = loss.pair(x0, t=T, noise=noise)
    assert loss.preconditioning == EDM(0.5)
    r = torch.tensor([mapped(t, ratio) for t in T.tolist()], dtype=F64)
    D = net(x0 + T.view(-1, 1, 1, 1) * noise, T)
    x_p = x0 + r.view(-1, 1, 1, 1) * noise
    D_p = torch.where(r.view(-1, 1, 1, 1) > 0, target(x_p, r.clamp(min=1e-9)), x0).detach()
    distance = ((D - D_p).square().sum((1, 2, 3)) + c**2).sqrt() - c
    expected = distance / (T - r) / x0[0].numel()
    plain = [lambda x, s, each=each: each(x, s) for each in (net, target)]
    for nets in ((net, target), plain):
        ours = loss.evaluate(*nets, batch).loss
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)
        (grad,) = torch.autograd.grad(ours.sum(), net.conv.weight, retain_graph=True)
        (other,) = torch.autograd.grad(expected.sum(), net.conv.weight, retain_graph=True)
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_norm_s_gradient_at_0_is_finite(dtype):
    """Where D = D', its slope is 0 and not NaN."""
    out = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    same = lambda x, sigma: out
    loss = easy(Mapping())
    value = loss.evaluate(same, same, loss.pair(torch.zeros(3, 2, dtype=dtype))).loss
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value)) and torch.equal(out.grad, 0 * out)


def test_draws():
    """t is log-normal, without ends."""
    torch.manual_seed(0)
    B = 100_000
    batch = easy(Mapping(4.0)).pair(torch.zeros(B, 1, dtype=F64))
    z = (batch.sigma.log() + 1.1) / 2
    assert abs(z.mean()) < 4 * B**-0.5 and abs(z.var() - 1) < 4 * (2 / B) ** 0.5
    noise = batch.x_t[:, 0] / batch.sigma
    torch.testing.assert_close(batch.x_tp[:, 0], Mapping(4.0)(batch.sigma) * noise)


def test_the_driver_trains_it(data):
    """From EDM's network: fused, with one mask for both calls, and reported by the ratio."""
    settings = {name: value for name, value in PRESETS["ect-cifar10"].items() if name not in TINY}
    own = settings.pop("loss") | {"duration": 16e-6, "total_training_steps": 1, "start_scales": 2}
    trainer = Trainer(options_of(data=data, **TINY | settings | own), this_process())
    assert trainer.loss.fits(trainer.net) and trainer.net.preconditioning == EDM(0.5)
    x, sigma = torch.randn(8, 3, 8, 8), torch.linspace(0.1, 50, 8)
    edm = EDMPrecond(trainer.net.model)
    torch.testing.assert_close(trainer.net.eval()(x, sigma), edm(x, sigma))
    trainer.net.train()
    for _ in range(2):
        trainer.train_step(torch.from_numpy(pixels(8)), torch.zeros(8, 0))
    statistics = trainer.statistics()
    assert statistics["scales"] == 4.0 and 0 < statistics["loss"] < math.inf
    assert statistics["skipped"] == 0 and not trainer.not_finite()


def test_preset():
    options = Options(data="", **PRESETS["ect-cifar10"])
    assert options.make_loss() == easy(Easy(256.0, total_steps=options.total_steps))
    assert (options.batch, options.dropout, options.lr, options.arch) == (128, 0.2, 1e-4, "ddpmpp")
    assert options.make_loss().at(options.total_steps - 1).num_scales == Mapping(256.0)
    published = Options(
        data="", **PRESETS["ect-cifar10"] | {"start_scales": 2, "total_training_steps": 25_000}
    )
    assert published.make_loss().at(199_999).num_scales == Mapping(256.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mapping(1.0), "Mapping: ratio must be above 1 and b above 0, got 1.0 and 1.0"),
        (lambda: Mapping(k=-1.0), "Mapping: k must be at least 0, got -1.0"),
        (lambda: Mapping(b=0.0), "Mapping: ratio must be above 1 and b above 0"),
        (lambda: Easy(1.0), "Mapping: ratio must be above 1"),
        (lambda: Easy(total_steps=0), "Easy: total_steps must be at least 1, got 0"),
        (lambda: CTLoss(Mapping()), "CTLoss: lognormal must be given with a Mapping"),
        (lambda: CTLoss(Easy()), "CTLoss: lognormal must be given with a Mapping"),
        (lambda: easy(Mapping(), huber_c=-1.0), "huber_c must be a positive number, got -1.0"),
        (lambda: easy(Easy()).pair(torch.zeros(2, 3)), "num_scales must be a number, got a curri"),
        (
            lambda: easy(Mapping()).pair(torch.zeros(2, 3), index=torch.zeros(2).long()),
            "CTLoss: index must be None here, where there is t",
        ),
        (
            lambda: CTLoss().pair(torch.zeros(2, 3), t=torch.ones(2)),
            "CTLoss: t must be None here, where there is index",
        ),
        (
            lambda: easy(Mapping()).pair(torch.zeros(2, 3), t=torch.ones(3)),
            r"CTLoss: t must have shape \[2\], got \[3\]",
        ),
        (
            lambda: TDCTLoss(Mapping(), lognormal=(-1.1, 2.0)),
            "TDCTLoss: num_scales must be a number of noise levels, or a curriculum of them",
        ),
        (
            lambda: TDCTLoss(Easy(), lognormal=(-1.1, 2.0)),
            "TDCTLoss: num_scales must be a number of noise levels, or a curriculum of them",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
