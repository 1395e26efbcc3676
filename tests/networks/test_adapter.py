"""Denoiser: networks of every prediction as EDM denoisers, against a data distribution whose exact
predictions are known.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tdkern.losses import EDMLoss, TDEDMLoss
from tdkern.networks import Denoiser
from tdkern.samplers import heun
from tdkern.schedules import EDM

MEAN, STD = 0.3, 0.7
SQUARES = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)  # DDPM's alpha_bar


def exact(x, sigma):
    """D of data N(MEAN, STD^2)."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


class Exact(nn.Module):
    """The best prediction of its kind for that data, from its own input x_t and time alone."""

    def __init__(self, prediction, time_scale=1.0):
        super().__init__()
        self.prediction, self.time_scale, self.calls = prediction, time_scale, []
        self.weight = nn.Parameter(torch.ones(()))

    def levels(self, t):
        """alpha and sigma at a real time: ln(sigma/alpha) is linear between the table's times."""
        if self.prediction == "velocity":
            return 1 - t / self.time_scale, t / self.time_scale
        table = (1 / SQUARES - 1).log().to(t) / 2
        left = t.floor().long().clamp(max=len(table) - 2)
        ratio = (table[left] + (t - left) * (table[left + 1] - table[left])).exp()
        return (1 + ratio**2).rsqrt(), ratio * (1 + ratio**2).rsqrt()

    def forward(self, x, t, **labels):
        self.calls.append((x, t, labels))
        alpha, sigma = (
            level.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) for level in self.levels(t)
        )
        x0 = exact(x / alpha, sigma / alpha)
        eps = (x - alpha * x0) / sigma
        return (
            self.weight
            * {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[
                self.prediction
            ]
        )


def denoiser(prediction, **kwargs):
    module = Exact(prediction, **kwargs)
    return Denoiser(
        module, prediction, alphas_cumprod=None if prediction == "velocity" else SQUARES, **kwargs
    ), module


PREDICTIONS = ("x0", "eps", "v", "velocity")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoises(prediction):
    net, _ = denoiser(prediction)
    net.double()
    sigma = torch.tensor([0.02, 0.1, 0.5, 1.7, 10.0, 100.0], dtype=torch.float64)
    x = (
        MEAN
        + torch.randn(6, 3, 4, 4, dtype=torch.float64)
        * (STD**2 + sigma**2).sqrt()[:, None, None, None]
    )
    torch.testing.assert_close(net(x, sigma), exact(x, sigma), atol=1e-9, rtol=1e-9)
    c_skip, c_out = (c[:, None, None, None] for c in net.preconditioning.skip_scale(sigma))
    torch.testing.assert_close(
        c_skip * x + c_out * net(x, sigma, raw=True), exact(x, sigma), atol=1e-9, rtol=1e-9
    )
    single = net.float()(x, sigma)
    assert single.dtype == torch.float32
    # eps: x - 100 F cancels
    torch.testing.assert_close(
        single.double(), exact(x, sigma), atol=2e-2 if prediction == "eps" else 1e-3, rtol=1e-3
    )


def test_times_of_the_table():
    """At the levels of the table the module is asked at its own integer times, and sees unit
    variance.
    """
    net, module = denoiser("eps")
    at = torch.tensor([0, 1, 499, 998, 999])
    sigma = (1 / SQUARES - 1).sqrt()[at]
    net.double()(torch.ones(5, 2, dtype=torch.float64), sigma)
    x, t, labels = module.calls[0]
    torch.testing.assert_close(t, at.double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(x, SQUARES[at].sqrt()[:, None].expand(5, 2))
    assert labels == {}
    assert (net.sigma_min, net.sigma_max) == pytest.approx((sigma[0].item(), sigma[-1].item()))
    net(torch.ones(3, 2, dtype=torch.float64), torch.tensor([1e-4, 1e4, 1.0], dtype=torch.float64))
    t = module.calls[1][1]
    assert t[0] == 0 and t[1] == 999 and 0 < t[2] < 999


def test_times_of_a_flow():
    net, module = denoiser("velocity", time_scale=1000.0)
    net(torch.ones(2, 2), torch.tensor([1.0, 4.0]))
    x, t, _ = module.calls[0]
    torch.testing.assert_close(t, torch.tensor([500.0, 800.0]))
    torch.testing.assert_close(x, torch.tensor([[0.5, 0.5], [0.2, 0.2]]))
    assert (net.sigma_min, net.sigma_max) == (0, math.inf)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samples_the_data(prediction):
    net, _ = denoiser(prediction)
    torch.manual_seed(0)
    sigmas = EDM(sigma_min=0.02, sigma_max=80).sigmas()
    x = heun(net, torch.randn(4000, 1, dtype=torch.float64) * sigmas[0], sigmas)
    assert abs(x.mean() - MEAN) < 0.05 and abs(x.std() - STD) < 0.03


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_take_it(prediction):
    torch.manual_seed(0)
    net, module = denoiser(prediction)
    images = MEAN + STD * torch.randn(64, 1, 2, 2)
    batch = TDEDMLoss().pair(images)
    loss = TDEDMLoss().evaluate(net, net, batch).loss
    plain = (
        TDEDMLoss()
        .evaluate(
            lambda x, sigma, **_: exact(x, sigma), lambda x, sigma, **_: exact(x, sigma), batch
        )
        .loss
    )
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=1e-3)
    EDMLoss()(net, None, images).sum().backward()
    assert module.weight.grad.isfinite() and module.weight.grad != 0


class Diffusers(nn.Module):
    """A module that is called, and answers, as diffusers' UNet2DModel."""

    def __init__(self, answer):
        super().__init__()
        self.conv, self.answer, self.labels = nn.Conv2d(3, 6, 1), answer, None

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.labels, self.dtype = class_labels, sample.dtype
        out = self.conv(sample)
        return {"object": SimpleNamespace(sample=out), "tuple": (out,), "tensor": out}[self.answer]


@pytest.mark.parametrize("answer", ["object", "tuple", "tensor"])
def test_answers_of_a_module(answer):
    module = Diffusers(answer)
    net, x = Denoiser(module, "x0", alphas_cumprod=SQUARES), torch.randn(2, 3, 4, 4)
    D = net(x, 1.0)
    assert D.shape == x.shape  # the last three channels are a learned variance
    torch.testing.assert_close(D, module.conv(x * 0.5**0.5)[:, :3])
    assert set(net.state_dict()) == {"model.module.conv.weight", "model.module.conv.bias"}


def test_labels():
    module = Diffusers("object")
    net, x = Denoiser(module, "x0", alphas_cumprod=SQUARES), torch.randn(2, 3, 4, 4)
    net(x, 1.0, torch.eye(5)[[3, 1]])
    assert module.labels.tolist() == [3, 1] and module.labels.dtype == torch.int64
    net(x, 1.0, torch.zeros(2, 0))  # a data set without labels
    assert module.labels is None
    with pytest.raises(ValueError, match="Denoiser: augment_labels must be None"):
        net(x, 1.0, None, torch.zeros(2, 9))


def test_low_precision():
    module = Diffusers("object").bfloat16()
    D = Denoiser(module, "v", alphas_cumprod=SQUARES, dtype=torch.bfloat16)(
        torch.randn(2, 3, 4, 4, dtype=torch.float64), 1.0
    )
    assert module.dtype == torch.bfloat16 and D.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"prediction": "score"},
            "Denoiser: prediction must be one of x0, eps, v, velocity, got 'score'",
        ),
        ({"prediction": "eps"}, "Denoiser: alphas_cumprod must be given with prediction 'eps'"),
        (
            {"prediction": "velocity", "alphas_cumprod": SQUARES},
            "Denoiser: alphas_cumprod must be None with prediction 'velocity'",
        ),
        (
            {"alphas_cumprod": SQUARES.flip(0)},
            r"Denoiser: alphas_cumprod must be \[T\] falling numbers from below 1 to 0 or more, "
            r"got \[1000\] from",
        ),
        (
            {"alphas_cumprod": [0.5, 0.0]},
            "prediction must be 'x0' or 'v' where alphas_cumprod ends in 0, as eps says nothing",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(nn.Identity(), **arguments)
