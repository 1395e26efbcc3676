"""Where the device need not be waited for, the target network runs on just the samples that have a
TD term; everywhere else on as many as the shapes say.
"""

import math
import os

import pytest
import torch
import torch.distributed as dist

from helpers.losses import Linear
from helpers.tiny import in_two_processes
from tdkern.ema import EMA
from tdkern.losses import CTLoss, DDPMLoss, TDCTLoss, TDDDPMLoss, TDEDMLoss, TDFlowLoss
from tdkern.networks import MLP, EDMPrecond
from tdkern.training.distributed import leave

F64 = torch.float64
SIGMA = torch.tensor([0.05, 2.0, 0.001, 0.4, 30.0, 100.0], dtype=F64)  # four have a TD term
PUBLISHED = TDEDMLoss(k_idx=3.0, one_idx=0.2, weight="online")


class Counted(torch.nn.Module):
    """A denoiser that counts the samples of each call."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, x, sigma, *labels, **named):
        self.sizes.append(len(x))
        return self.net(x, sigma)


def counted(seed):
    return Counted(Linear(seed=seed).double())


def everywhere(net):
    """The same denoiser as a callable of which nothing is known: it is given every sample."""
    return lambda x, sigma: net(x, sigma)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("loss", [TDEDMLoss(), TDEDMLoss(td_sigma=(0.3, 5.0)), PUBLISHED])
def test_it_is_the_same_loss(loss, share):
    torch.manual_seed(0)
    loss = type(loss)(**vars(loss) | {"td_share": share})
    net, target = counted(1), counted(2)
    batch = loss.pair(torch.randn(6, 3, 4, 4, dtype=F64), sigma=SIGMA)
    exact = loss.evaluate(net, EMA(target), batch)
    full = loss.evaluate(net, everywhere(target), batch)
    assert torch.equal(exact.valid, full.valid) and 0 < exact.valid.sum() < 6
    for ours, theirs in zip(exact[:3], full[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(each.loss.sum(), net.parameters()) for each in (exact, full)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert net.sizes == [6, 6] and target.sizes == [math.ceil(share * 6)]


@pytest.mark.parametrize(
    ("sigma", "size"),
    [
        (SIGMA, 4),
        (SIGMA[:2], 2),
        (SIGMA[5:], 1),  # none has a TD term: the call is made all the same
        (torch.full((3,), 100.0, dtype=F64), 1),
        (SIGMA[:0], 0),
    ],
)
def test_how_many_the_target_sees(sigma, size):
    loss, target = TDEDMLoss(), counted(2)
    batch = loss.pair(torch.randn(len(sigma), 3, 4, 4, dtype=F64), sigma=sigma)
    terms = loss.evaluate(counted(1), target, batch)
    assert target.sizes == [size] and terms.loss.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "valid"),
    [(TDFlowLoss(), 2), (TDDDPMLoss(100, 30), 2), (CTLoss(), 3), (TDCTLoss(), 3)],
)
def test_other_families(loss, valid):
    """Consistency training compares every sample with its target."""
    times = {TDFlowLoss: {"t": [0.9, 0.02, 0.5]}, TDDDPMLoss: {"t": [80, 20, 50]}}.get(type(loss))
    times = times or {"index": [0, 10, 38]}
    target = counted(2)
    draws = {name: torch.tensor(value) for name, value in times.items()}
    loss.evaluate(counted(1), target, loss.pair(torch.randn(3, 3, 4, 4, dtype=F64), **draws))
    assert target.sizes == [valid]


def test_models_of_one_network_run_on_as_many_samples():
    """As many as the model that needs most: the batched matrices have one size."""
    torch.manual_seed(0)
    net, seen = EDMPrecond(MLP(2, 8, 1, 2)).double(), []
    target = EMA(net)
    target.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    sigma = torch.tensor([0.001, 1.0, 2.0, 0.001, 0.001, 1.0], dtype=F64)
    loss = TDEDMLoss()
    batch = loss.pair(torch.randn(6, 2, dtype=F64), sigma=sigma)
    ours = loss.evaluate(net, target, batch)
    theirs = loss.evaluate(net, lambda *args, **named: target.module(*args, **named), batch)
    assert seen == [4, 6] and ours.valid.tolist() == theirs.valid.tolist()
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_where_the_number_must_not_depend_on_the_values():
    """A compiled target would be compiled for every number; a compiled loss, a transform and a
    device that is waited for cannot tell.
    """
    torch._dynamo.reset()
    loss, net = TDEDMLoss(), counted(1)
    x = torch.randn(6, 3, 4, 4, dtype=F64)
    batch = loss.pair(x, sigma=SIGMA)
    expected = loss.evaluate(net, counted(2), batch).loss
    target = counted(2)
    inner = EDMPrecond(torch.compile(MLP(), backend="eager"))
    sizes = []
    inner.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    loss.evaluate(inner, inner, loss.pair(torch.randn(6, 2), sigma=SIGMA))
    assert sizes == [6, 6]
    compiled = torch.compile(target, backend="eager")
    torch.testing.assert_close(loss.evaluate(net, compiled, batch).loss, expected)
    own = counted(2)
    own.compile(backend="eager")
    torch.testing.assert_close(loss.evaluate(net, own, batch).loss, expected)
    assert target.sizes == own.sizes == [6]
    step = lambda net, target: loss.evaluate(net, target, batch).loss
    whole = torch.compile(step, backend="eager", fullgraph=True)
    plain = Linear(seed=1).double(), Linear(seed=2).double()
    torch.testing.assert_close(whole(*plain), expected)
    mapped = torch.vmap(lambda target_sigma: target_sigma * step(*plain))(torch.ones(2, dtype=F64))
    torch.testing.assert_close(mapped, expected.expand(2, -1))
    with torch.device("meta"):
        blank = loss.pair(torch.empty(6, 3, 4, 4))
    seen = Counted(lambda x, sigma: x)
    loss.evaluate(seen, seen, blank)
    assert seen.sizes == [6, 6]


# ---- the share of a batch -----------------------------------------------------------------------


def test_window_share_knows_where_the_schedule_ends():
    """At the published settings, .88 and a standard deviation, without a window worked out."""
    torch.manual_seed(0)
    coef = PUBLISHED.pair(torch.zeros(100_000, 1)).coef
    p = (coef[:, 6] != 0).double().mean().item()
    share = PUBLISHED.window_share(512)
    assert p == pytest.approx(0.88, abs=0.01)
    assert share == pytest.approx(p + (p * (1 - p) / 512) ** 0.5, abs=4e-3)
    assert PUBLISHED.window_share(64) < 0.95 and PUBLISHED.window_share(16) == 1
    assert TDEDMLoss().window_share(512) == 1  # .998: no sample would be left out
    cut = TDEDMLoss(k_idx=3.0, one_idx=0.2, td_sigma=(1e-6, 1.0))
    inside = (cut.pair(torch.zeros(100_000, 1)).coef[:, 6] != 0).double().mean().item()
    assert cut.window_share(10**9) == pytest.approx(inside, abs=0.01)


@pytest.mark.parametrize("loss", [TDFlowLoss(), TDFlowLoss(k_idx=4.0), TDDDPMLoss(100, 30)])
def test_window_share_of_a_path(loss):
    torch.manual_seed(0)
    valid = (loss.pair(torch.zeros(100_000, 1)).coef[:, 6] != 0).double().mean().item()
    assert loss.window_share(10**9) == pytest.approx(valid, abs=0.01) and valid < 0.9


# ---- settings without a TD term ------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: TDEDMLoss(k_idx=30.0),
        lambda: TDEDMLoss(k_idx=16.75),
        lambda: TDEDMLoss(steps=2),
        lambda: TDEDMLoss(td_sigma=(81.0, 90.0)),
        lambda: TDEDMLoss(td_sigma=(-1.0, 0.005)),
        lambda: TDEDMLoss(P_mean=5.0, P_std=0.0),
        lambda: TDFlowLoss(k_idx=16.5),
        lambda: TDFlowLoss(steps=3),
        lambda: TDCTLoss(2),
        lambda: TDCTLoss(10, one_idx=8.5),
    ],
)
def test_a_setting_without_any_td_term_is_refused(make):
    with pytest.raises(
        ValueError, match=r"^TD\w+Loss: some sample must have a TD term, and"
    ) as told:
        make()
    assert len(str(told.value)) < 250


@pytest.mark.parametrize(
    "loss",
    [
        TDEDMLoss(k_idx=16.5),
        TDEDMLoss(td_sigma=(79.0, 90.0)),
        TDFlowLoss(k_idx=15.5),
        TDDDPMLoss(10, 9),
        TDCTLoss(10, one_idx=8.0),
    ],
)
def test_a_setting_with_some_is_not(loss):
    torch.manual_seed(0)
    times = {TDEDMLoss: ("sigma", 80.0), TDFlowLoss: ("t", 0.999), TDDDPMLoss: ("t", 10)}
    name, value = times.get(type(loss), ("index", 0))
    coef = loss.pair(torch.zeros(1, 2), **{name: torch.tensor([value])}).coef
    assert coef[0, 6] > 0


def test_whole_numbers_may_be_floats():
    assert TDEDMLoss(steps=18.0).pair(torch.zeros(2, 3)).coef.shape == (2, 8)
    assert CTLoss(40.0).pair(torch.zeros(2, 3)).coef.shape == (2, 8)
    with pytest.raises(ValueError, match=r"TDEDMLoss: steps must be a whole number, got 18\.5"):
        TDEDMLoss(steps=18.5)
    with pytest.raises(ValueError, match=r"CTLoss: num_scales must be a whole number, got 40\.5"):
        CTLoss(40.5)


# ---- processes ----------------------------------------------------------------------------------


def _sharded(rank, results):
    """Of two processes one has no sample with a TD term: the sharded target is gathered by both."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    try:
        torch.manual_seed(0)
        net, target, loss = Linear(seed=1), Linear(seed=2), TDEDMLoss()
        x = torch.randn(4, 3, 4, 4)
        sigma = [torch.tensor([100.0, 90.0, 0.001, 200.0]), torch.tensor([1.0, 0.5, 0.001, 2.0])]
        batch = loss.pair(x, sigma=sigma[rank])
        expected = loss.evaluate(net, everywhere(target), batch).loss.detach()
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        sharded, sharded_target = fully_shard(net, mesh=mesh), fully_shard(target, mesh=mesh)
        sizes = []
        sharded_target.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        terms = loss.evaluate(sharded, sharded_target, batch)
        terms.loss.sum().backward()
        torch.testing.assert_close(terms.loss, expected)
        assert sizes == [1 if rank == 0 else 3]
        assert all(each.grad.full_tensor().isfinite().all() for each in sharded.parameters())
    finally:
        leave()
    (results / f"{rank}").touch()


def test_a_process_without_td_terms_calls_a_sharded_target(tmp_path):
    in_two_processes(_sharded, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def test_without_a_td_term_there_is_no_target():
    net = counted(1)
    DDPMLoss()(net, None, torch.randn(3, 3, 4, 4, dtype=F64))
    assert net.sizes == [3]
