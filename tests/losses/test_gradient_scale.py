"""The gradient is handed out as the launch wrote it: no second pass over it in the driver, the demo
and README's example.
"""

import math
import re

import pytest
import torch

from helpers import ROOT
from helpers.tiny import TINY, options_of, pixels
from tdkern.demo import families, study
from tdkern.evaluation.mixture import GaussianMixture
from tdkern.losses import CTLoss, DDPMLoss, EDMLoss, FlowLoss, TDCTLoss, TDEDMLoss, TDFlowLoss
from tdkern.networks import EDMPrecond, SongUNet
from tdkern.ops import _backends
from tdkern.training import Trainer
from tdkern.training.distributed import this_process


@pytest.fixture
def upstreams(monkeypatch):
    """The upstream gradient of every call of `td_loss_backward_`; samples where it is not 1 are a
    second pass over dF.
    """
    seen, real = [], _backends.call

    def call(name, backend, args):
        if name == "td_loss_backward_":
            seen.append(args[1].clone())
        return real(name, backend, args)

    monkeypatch.setattr(_backends, "call", call)
    return seen


def passes(upstreams):
    """How many samples were passed over again, of the calls so far, of which there must be some."""
    assert upstreams
    return sum(int((upstream != 1).any(1).sum()) for upstream in upstreams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_where_upstream_is_1_nothing_of_dF_is_read_or_written(compiled, dtype):
    """A dF of NaN stays as it is, though the op could compute it anew from what it is given."""
    images = torch.randn(3, 2, 5).to(dtype)
    coef = torch.rand(3, 8, dtype=torch.float64) + 0.5
    grad = torch.full_like(images, math.nan)
    call = _backends.op("td_loss_backward_", compiled)
    call(
        grad,
        torch.ones(3, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        *[images] * 3,
        coef,
        images,
        images,
        False,
        False,
    )
    assert grad.isnan().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "changes", [{}, {"td_share": 0.5}, {"td": False}, {"family": "flow"}, {"family": "ct"}]
)
def test_driver(data, upstreams, precision, changes):
    trainer = Trainer(
        options_of(
            data=data, duration=1e-3, **TINY | {"precision": precision, "batch_gpu": 4} | changes
        ),
        this_process(),
    )
    trainer.train_step(torch.from_numpy(pixels(8)), torch.zeros(8, 0))
    assert len(upstreams) == 2 and passes(upstreams) == 0


@pytest.mark.parametrize("name", ["edm", "ct", "flow"])
def test_demo(upstreams, name):
    family = families.FAMILIES[name]
    config = study.Config(seeds=2, iterations=2, width=8, batch=4, compute=1.0)
    study.train(config, GaussianMixture.ring(), family, family.losses, 2, "")
    assert passes(upstreams) == 0


def test_readme(upstreams):
    """The example as it stands in README."""
    text = ROOT.joinpath("README.md").read_text()
    (code,) = re.findall(r"```python\n(from tdkern\.integrations.*?)```", text, re.DOTALL)
    net = EDMPrecond(SongUNet(8, 3, 3, model_channels=4, channel_mult=[1], num_blocks=1))
    names = {
        "net": net,
        "ddp": net,
        "images": torch.randn(4, 3, 8, 8),
        "labels": None,
        "augment_pipe": None,
        "loss_scaling": 1,
        "batch_gpu_total": 4,
        "optimizer": torch.optim.Adam(net.parameters()),
    }
    exec(code, names)
    assert passes(upstreams) == 0
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_a_factor_behind_the_loss_is_a_second_pass(upstreams):
    loss = TDEDMLoss()
    net = EDMPrecond(SongUNet(8, 3, 3, model_channels=4, channel_mult=[1], num_blocks=1))
    (loss(net, net, torch.randn(4, 3, 8, 8)).sum() * 2).backward()
    assert passes(upstreams) == 4


LOSSES = [
    EDMLoss(),
    TDEDMLoss(),
    TDEDMLoss(td_sigma=(0.3, 5.0), td_share=0.5),
    CTLoss(20),
    TDCTLoss(20),
    CTLoss(20, base_norm="huber"),
    TDCTLoss(20, base_norm="l1"),
    DDPMLoss(),
    FlowLoss(),
    TDFlowLoss(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_it_scales_loss_terms_and_gradient(loss):
    """To rounding it is the factor behind the loss, and what is valid stays so."""
    torch.manual_seed(0)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def net(x, sigma, class_labels=None, augment_labels=None):
        return torch.tanh(weight * x)

    batch = loss.pair(torch.randn(16, 3, dtype=torch.float64))
    plain = loss.evaluate(net, net, batch)
    scaled = loss.evaluate(net, net, batch, gradient_scale=6.5)
    for name in ("loss", "td", "base"):
        torch.testing.assert_close(
            getattr(scaled, name), 6.5 * getattr(plain, name), rtol=1e-12, atol=0
        )
    assert torch.equal(scaled.valid, plain.valid)
    (expected,) = torch.autograd.grad(6.5 * plain.loss.sum(), weight)
    (grad,) = torch.autograd.grad(scaled.loss.sum(), weight)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)
