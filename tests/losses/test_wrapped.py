"""The fused path holds, with the same numbers, for a network that torch's own wrappers hold."""

import copy
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tdkern.samplers.base
from helpers.tiny import in_two_processes
from tdkern.losses import CTLoss, EDMLoss, TDCTLoss, TDDDPMLoss, TDEDMLoss, TDFlowLoss
from tdkern.networks import MLP, CTPrecond, Denoiser, EDMPrecond, SongUNet, VPPrecond
from tdkern.preconditioning import unwrapped
from tdkern.samplers import heun
from tdkern.training.distributed import leave
from tdkern.weighting import Uncertainty


def compiled(net):
    return torch.compile(net, backend="eager")


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "compile": compiled,
    "compile of DDP": lambda net: compiled(DistributedDataParallel(net)),
    "DDP of compile": lambda net: DistributedDataParallel(compiled(net)),
    "DataParallel": torch.nn.DataParallel,
}
LOSSES = {
    "edm": (EDMLoss(), EDMPrecond),
    "td edm": (TDEDMLoss(), EDMPrecond),
    "share": (TDEDMLoss(td_sigma=(0.3, 5.0), td_share=0.5), EDMPrecond),
    "ct": (CTLoss(20), CTPrecond),
    "td ct": (TDCTLoss(20), CTPrecond),
    "ddpm": (TDDDPMLoss(), VPPrecond),
    "flow": (TDFlowLoss(), partial(Denoiser, prediction="velocity")),
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """A gloo group of this process alone."""
    torch._dynamo.reset()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    leave()


class Plain(torch.nn.Module):
    """A network of points whose parameters say nothing of how it is called."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP(2, 8, 1)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))

    def forward(self, x, t, class_labels=None, augment_labels=None):
        return self.mlp(x, t / 1000 if t.abs().max() > 10 else t)


class Spy:
    """Counts the calls of a network's forward by whether they asked for the raw output."""

    def __init__(self, net):
        self.raw = []
        net.register_forward_pre_hook(
            lambda _, args, kwargs: self.raw.append(kwargs.get("raw", False)), with_kwargs=True
        )


def results(loss, wrap, make):
    """The loss's terms and gradients for networks that `wrap` wraps, and how they were called."""
    net, target = make(Plain()), make(Plain())
    spies = Spy(net), Spy(target)
    batch = loss.pair(*images())
    with torch.random.fork_rng():
        wrapped, wrapped_target = wrap(net), wrap(target)
    terms = loss.evaluate(wrapped, wrapped_target, batch)
    terms.loss.sum().backward()
    asked = [*spies[0].raw, *spies[1].raw]
    return [*terms, *(parameter.grad for parameter in net.parameters())], asked


def images():
    torch.manual_seed(3)
    return (torch.randn(8, 2) / 2,)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_losses(wrapper, name):
    torch._dynamo.reset()
    loss, make = LOSSES[name]
    expected, asked = results(loss, lambda net: net, make)
    ours, wrapped_asked = results(loss, WRAPPERS[wrapper], make)
    assert wrapped_asked == asked and all(asked) and asked
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_samplers(wrapper, monkeypatch):
    """`heun_step` makes the network's next input, as it does for the network alone."""
    torch._dynamo.reset()
    steps, real = [], tdkern.samplers.base.heun_step
    monkeypatch.setattr(
        tdkern.samplers.base, "heun_step", lambda *args, **kw: steps.append(1) or real(*args, **kw)
    )
    net, x = EDMPrecond(Plain()), torch.randn(4, 2, dtype=torch.float64)
    expected = heun(net, 10 * x, [10.0, 2.0, 0.5, 0.0])
    assert len(steps) == 5
    got = heun(WRAPPERS[wrapper](net), 10 * x, [10.0, 2.0, 0.5, 0.0])
    assert len(steps) == 10
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_learned_uncertainty(wrapper):
    """EDM2's, whose gradients several processes must average as the network's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    loss, net, u = TDEDMLoss(), EDMPrecond(Plain()), Uncertainty(8)
    torch.nn.init.normal_(u.weight)
    batch, found = loss.pair(*images()), []
    for each in (u, WRAPPERS[wrapper](u)):
        u.zero_grad()
        value = loss.evaluate(net, net, batch, uncertainty=each).loss
        value.sum().backward()
        found.append((value.detach(), u.weight.grad.clone()))
    for ours, alone in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, alone)
    assert found[0][1].abs().max() > 0


def test_other_callables_keep_their_denoised_output():
    """What only looks like a wrapper is called as it is."""

    class Doubled(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, sigma, class_labels=None, augment_labels=None):
            return 2 * self.module(x, sigma, class_labels, augment_labels)

    loss, net = EDMLoss(), Doubled(EDMPrecond(Plain()))
    assert unwrapped(net) is net and not loss.fits(net)
    batch = loss.pair(*images())
    terms = loss.evaluate(net, None, batch)
    again = loss.evaluate(lambda x, sigma, *labels, **_: net(x, sigma), None, batch)
    assert torch.equal(terms.loss, again.loss)


class Clamped(EDMPrecond):
    """Hands everything on, and changes what comes back: the denoised image, as it understands."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).clamp(-1, 1)


class ClampedImage(EDMPrecond):
    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return super().forward(x, sigma, class_labels, augment_labels).clamp(-1, 1)


@pytest.mark.parametrize("kind", [Clamped, ClampedImage])
@pytest.mark.parametrize("wrapper", [lambda net: net, DistributedDataParallel, compiled])
def test_a_call_of_the_networks_own_is_the_denoised_image(kind, wrapper):
    torch.manual_seed(0)
    net = kind(Plain())
    loss = TDEDMLoss()
    assert not loss.fits(net) and loss.fits(EDMPrecond(Plain()))
    batch = loss.pair(*images())
    terms = loss.evaluate(wrapper(net), copy.deepcopy(net), batch)
    plain = lambda x, sigma, *labels, **_: net(x, sigma)
    again = loss.evaluate(plain, plain, batch)
    torch.testing.assert_close(terms.loss, again.loss, rtol=1e-5, atol=0)


def _sharded(rank, results):
    """One of two processes: a U-Net under fully_shard against the same one alone."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    try:
        torch.manual_seed(0)
        unet = SongUNet(8, 3, 3, model_channels=4, channel_mult=[1], num_blocks=1, dropout=0.0)
        net = EDMPrecond(unet)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        target = copy.deepcopy(net)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        sharded, sharded_target = copy.deepcopy(net), copy.deepcopy(target)
        for each in (sharded, sharded_target):
            fully_shard(each, mesh=mesh)
        loss = TDEDMLoss()
        batch = loss.pair(torch.randn(4, 3, 8, 8))
        spy = Spy(sharded)
        expected = loss.evaluate(net, target, batch)
        terms = loss.evaluate(sharded, sharded_target, batch)
        assert spy.raw == [True]
        for ours, theirs in zip(terms, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        expected.loss.sum().backward()
        # both processes have the same samples: their mean is each one's
        terms.loss.sum().backward()
        for ours, theirs in zip(sharded.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6)
        seen = heun(sharded, torch.randn(2, 3, 8, 8), [2.0, 1.0, 0.0])
        assert seen.isfinite().all()
    finally:
        leave()
    (results / f"{rank}").touch()


def test_fully_shard(tmp_path):
    in_two_processes(_sharded, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
