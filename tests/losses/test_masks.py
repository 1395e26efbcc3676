"""Consistency training compares two calls of networks with dropout: both have the same masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.tiny import TINY, pixels
from tdkern.ema import EMA
from tdkern.losses import CTLoss, TDCTLoss, TDEDMLoss
from tdkern.losses.masks import draws
from tdkern.networks import CTPrecond, EDMPrecond, SongUNet, layers
from tdkern.training import Options, Trainer
from tdkern.training.distributed import this_process
from tdkern.training.presets import PRESETS

ICT = CTLoss(151, base_norm="huber", base_weight="inverse-step", lognormal=(-1.1, 2.0))
LOSSES = [ICT, CTLoss(151), TDCTLoss(151), CTLoss(151, base_norm="l1")]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def unet(dropout=0.3, label_dropout=0.0, wrapper=CTPrecond):
    torch.manual_seed(0)
    model = SongUNet(
        8,
        3,
        3,
        4,
        model_channels=8,
        channel_mult=[1],
        num_blocks=1,
        dropout=dropout,
        label_dropout=label_dropout,
    )
    net = wrapper(model)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


class Drops(nn.Module):
    """A model of one dropout, with activation checkpointing if it is asked for."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.dropout, self.checkpointed = 0.5, checkpointed

    def inner(self, x):
        return F.dropout(torch.tanh(self.conv(x)), self.dropout, self.training)

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        x = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return self.last(x)


def one_mask(loss, net, batch, labels=None):
    """What the published codes do, by hand: the generator's state is put back between the calls."""
    device = batch.x_t.device
    module = torch.cuda if device.type == "cuda" else torch
    state = module.get_rng_state()

    def same(x, sigma, *args, **named):
        module.set_rng_state(state)
        return net(x, sigma, *args, **named)

    return loss.evaluate(same, same, batch, labels).loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__} {loss.base_norm}")
@pytest.mark.parametrize("target", ["itself", "its average", "an average in training"])
def test_both_calls_have_one_mask(target, loss, device):
    net = unet(label_dropout=0.5).to(device)
    torch.manual_seed(1)
    batch = loss.pair(torch.randn(16, 3, 8, 8, device=device) / 2)
    labels = torch.eye(4, device=device).repeat(4, 1)
    average = EMA(net)
    average.module.train(target == "an average in training")
    other = net if target == "itself" else average
    torch.manual_seed(2)
    expected = one_mask(loss, net, batch, labels)
    torch.manual_seed(2)
    value = loss.evaluate(net, other, batch, labels).loss
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    # masks of their own add their noise
    torch.manual_seed(2)
    own = loss.evaluate(net, lambda *args: _fresh(net, *args), batch, labels).loss
    assert own.mean() > 1.1 * value.mean()
    assert average.module.training == (target == "an average in training")
    assert {each.training for each in average.module.modules()} == {average.module.training}


def _fresh(net, *args):
    torch.rand(1, device=args[0].device)
    return net(*args)


def test_the_generator_goes_on_behind_the_online_network():
    """What is drawn next is what it would be had the target network drawn nothing."""
    net, batch = unet(), ICT.pair(torch.randn(4, 3, 8, 8))
    torch.manual_seed(2)
    net(batch.x_t, batch.sigma.float())
    expected = torch.rand(3)
    torch.manual_seed(2)
    ICT.evaluate(net, EMA(net), batch)
    assert torch.equal(torch.rand(3), expected)


def test_other_losses_leave_the_target_in_evaluation():
    net = unet(wrapper=EDMPrecond)
    target, seen = EMA(net), []
    target.module.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    TDEDMLoss()(net, target, torch.randn(4, 3, 8, 8))
    assert seen == [False]


def test_an_error_of_the_target_leaves_its_mode_and_the_generator():
    net, batch = unet(), ICT.pair(torch.randn(4, 3, 8, 8))
    target = EMA(net)
    target.module.register_forward_pre_hook(lambda *_: 1 / 0)
    torch.manual_seed(2)
    net(batch.x_t, batch.sigma.float())
    expected = torch.rand(3)
    torch.manual_seed(2)
    with pytest.raises(ZeroDivisionError):
        ICT.evaluate(net, target, batch)
    assert not target.module.training and torch.equal(torch.rand(3), expected)


def test_under_activation_checkpointing():
    """Recomputed in the backward pass, the online network has the masks that its loss had."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = CTPrecond(Drops(checkpointed))
        batch = ICT.pair(torch.randn(8, 3, 4, 4))
        loss = ICT.evaluate(net, EMA(net), batch).loss
        torch.rand(5)
        loss.sum().backward()
        results.append((loss.detach(), net.model.conv.weight.grad))
    assert results[0][1].abs().max() > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("what", ["networks", "loss"])
def test_compiled(what):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = CTPrecond(Drops())
    target = EMA(net).module
    batch = ICT.pair(torch.randn(8, 3, 4, 4))
    torch.manual_seed(2)
    expected = ICT.evaluate(net, target, batch).loss
    step = lambda net, target: ICT.evaluate(net, target, batch).loss
    if what == "networks":
        net, target = (torch.compile(each, backend="aot_eager") for each in (net, target))
    else:
        step = torch.compile(step, backend="aot_eager")
    torch.manual_seed(2)
    torch.testing.assert_close(step(net, target), expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="rng_state"):
        torch._dynamo.reset()
        torch.compile(
            lambda net, target: ICT.evaluate(net, target, batch).loss,
            backend="aot_eager",
            fullgraph=True,
        )(CTPrecond(Drops()), target)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (lambda: unet(0.3), True),
        (lambda: unet(0.0), False),
        (lambda: unet(0.0, label_dropout=0.1), True),
        (lambda: unet(0.3).eval(), False),
        (lambda: torch.compile(unet(0.3), backend="eager"), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout2d(0.1)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.0)), False),
        (lambda: lambda x, sigma: x, False),
    ],
)
def test_what_draws(net, expected):
    assert draws(net()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_s_capture_says_that_it_cannot():
    net = unet().cuda()
    batch = ICT.pair(torch.randn(4, 3, 8, 8, device="cuda"))
    with pytest.raises(RuntimeError, match="CTLoss: the two networks cannot share their dropout"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ICT.evaluate(net, net, batch)


@pytest.mark.parametrize("preset", ["ict-cifar10", "ect-cifar10"])
def test_improved_consistency_training_of_the_driver_has_one_mask(data, monkeypatch, preset):
    """With the dropout of its preset, in every part of a step, and another mask in the next."""
    own = PRESETS[preset]
    changes = {name: TINY[name] for name in ("cbase", "cres", "batch", "workers")}
    options = Options(**own | changes | {"data": data, "duration": 1e-3, "batch_gpu": 4})
    trainer = Trainer(options, this_process())
    assert trainer.options.dropout == own["dropout"] > 0
    masks, real = [], layers.dropout

    def watched(x, p):
        out = real(x, p)
        masks.append(out == 0)
        return out

    monkeypatch.setattr(layers, "dropout", watched)
    trainer.train_step(torch.from_numpy(pixels(8)), torch.zeros(8, 0))
    calls = len(masks) // 4  # of one network, in each of two parts
    online, target, later, later_target = (masks[i * calls :][:calls] for i in range(4))
    assert calls > 0 and len(masks) == 4 * calls
    assert all(map(torch.equal, online, target)) and all(map(torch.equal, later, later_target))
    assert not all(map(torch.equal, online, later))
    assert 0 < torch.cat([mask.flatten() for mask in online]).float().mean() < 0.5
