"""The target network on a share of the batch: which samples keep their TD term, what the others
get, and what the networks see.
"""

import math

import pytest
import torch

from helpers.losses import Linear, error, plain
from tdkern.losses import DDPMLoss, EDMLoss, FlowLoss, TDDDPMLoss, TDEDMLoss, TDFlowLoss
from tdkern.networks import MLP, Denoiser, EDMPrecond

# of eight samples; two have no pair on the schedule
SIGMA = [
    0.05,
    2.0,
    0.001,
    0.4,
    30.0,
    100.0,
    0.31,
    0.2,
]


class Seen(torch.nn.Module):
    """A network, and what it was called with."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        self.calls.append((x, sigma, class_labels, augment_labels))
        return self.net(x, sigma)


def eight(loss):
    torch.manual_seed(0)
    return loss.pair(torch.randn(8, 3, 4, 4, dtype=torch.float64) / 2, sigma=torch.tensor(SIGMA))


def kept(full, sigma, room):
    """The valid samples of the largest sigma, as many as there is room for."""
    order = sorted((i for i in range(len(sigma)) if full.valid[i]), key=lambda i: -sigma[i])
    return torch.tensor([i in order[:room] for i in range(len(sigma))])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("wrap", [plain, lambda net: net], ids=["plain", "raw"])
@pytest.mark.parametrize(("td_sigma", "room"), [(None, 4), (None, 1), ((0.3, 5.0), 2)])
def test_the_largest_sigma_keep_their_td_term(td_sigma, room, wrap, backend):
    whole, share = (
        TDEDMLoss(td_sigma=td_sigma, td_share=share, backend=backend) for share in (1.0, room / 8)
    )
    net, target = Linear(seed=1).double(), Linear(seed=2).double()
    full_batch, batch = eight(whole), eight(share)
    assert torch.equal(full_batch.coef, batch.coef)  # the pair knows nothing of the share
    full = whole.evaluate(wrap(net), wrap(target), full_batch)
    keep = kept(full, SIGMA, room)
    assert keep.sum() == room < full.valid.sum()
    # the target network does not see the others, or is not listened to
    batch.x_tp[~keep] = torch.nan
    terms = share.evaluate(wrap(net), wrap(target), batch)
    edm = (
        1.5
        * EDMLoss(backend=backend)
        .evaluate(
            net, None, EDMLoss().pair(batch.x0, sigma=batch.levels[:, 0])._replace(x_t=batch.x_t)
        )
        .loss
    )
    assert torch.equal(terms.valid, keep) and (terms.td[~keep] == 0).all()
    for ours, theirs in (
        (terms.td[keep], full.td[keep]),
        (terms.base[keep], full.base[keep]),
        (terms.loss[~keep], edm[~keep]),
    ):
        assert error(ours, theirs) <= 1
    ours, theirs = (
        torch.autograd.grad(loss.sum(), net.conv.weight)
        for loss in (terms.loss, torch.where(keep, full.loss, edm))
    )
    assert error(ours[0][None], theirs[0][None]) <= 1


@pytest.mark.parametrize(
    ("make", "alone", "times"),
    [(TDFlowLoss, FlowLoss, [0.3, 0.9, 0.01, 0.5]), (TDDDPMLoss, DDPMLoss, [20, 900, 1, 300])],
)
@pytest.mark.parametrize("lambda_base", [0.0, 0.5])
def test_paths(make, alone, times, lambda_base):
    """What is left over has the base loss, also where that has no weight beside a TD term; the end
    of the path stays as it is.
    """
    net, t = plain(Linear(seed=1).double()), torch.tensor(times)
    torch.manual_seed(0)
    batch = make(lambda_base=lambda_base).pair(torch.randn(4, 3, 4, 4, dtype=torch.float64), t=t)
    full, terms = (
        make(lambda_base=lambda_base, td_share=share).evaluate(net, net, batch)
        for share in (1.0, 0.25)
    )
    base = (1 + lambda_base) * alone().evaluate(
        net, None, alone().pair(batch.x0, t=t)._replace(x_t=batch.x_t)
    ).loss
    assert full.valid.tolist() == [True, True, False, True] and terms.valid.tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert error(terms.loss, torch.stack([base[0], full.loss[1], full.loss[2], base[3]])) <= 1


def test_what_the_networks_are_given():
    """The online network everything, the target network its share, with their own labels; no TD
    term is lost where there is room.
    """
    loss = TDEDMLoss(td_share=0.55)
    batch, labels, augment_labels = eight(loss), torch.eye(8), torch.randn(8, 9)
    net, target = Seen(Linear(seed=1).double()), Seen(Linear(seed=2).double())
    keep = loss.evaluate(net, target, batch, labels, augment_labels).valid
    (given,), (part,) = net.calls, target.calls
    assert keep.sum() == len(part[0]) == 5 == math.ceil(0.55 * 8) and torch.equal(
        given[0], batch.x_t
    )
    rows = part[2].argmax(1)  # which samples they are
    assert torch.equal(rows.sort().values, keep.nonzero().flatten())
    for ours, theirs in zip(
        part, (batch.x_tp, batch.levels[:, 2], labels, augment_labels), strict=True
    ):
        assert torch.equal(ours, theirs[rows])
    roomy, target = TDEDMLoss(td_share=0.8), Seen(target.net)
    assert (
        error(
            roomy.evaluate(net, target, batch).loss, TDEDMLoss().evaluate(net, target, batch).loss
        )
        <= 1
    )
    # of seven places six are needed
    assert len(target.calls[0][0]) == 6 and target.calls[0][2] is None


@pytest.mark.parametrize("B", [0, 1])
def test_small_batches(B):
    value = TDEDMLoss(td_share=0.1)(Linear(), Linear(seed=1), torch.randn(B, 3, 4, 4))
    assert value.shape == (B,) and value.isfinite().all()


def test_models_of_one_network_keep_to_their_own_samples():
    """A batched MLP takes its batch model by model: each has its own share, and its loss is what it
    would be alone.
    """
    torch.manual_seed(0)
    nets = [EDMPrecond(MLP(2, 8, 1, 3)).double() for _ in range(2)]
    for net in nets:
        torch.nn.init.normal_(net.model.output.weight)
    loss = TDEDMLoss(td_share=0.5)
    batch = loss.pair(
        torch.randn(12, 2, dtype=torch.float64),
        sigma=torch.tensor([0.1, 0.2, 0.3, 0.4] * 2 + [5.0] * 4),
    )
    terms = loss.evaluate(*nets, batch)
    for i in range(3):
        alone = [EDMPrecond(MLP(2, 8, 1)).double() for _ in nets]
        for net, together in zip(alone, nets, strict=True):
            net.load_state_dict(
                {name: tensor[i : i + 1] for name, tensor in together.state_dict().items()}
            )
        part = slice(4 * i, 4 * i + 4)
        of_model = type(batch)(*(None if each is None else each[part] for each in batch))
        own = loss.evaluate(*alone, of_model)
        assert torch.equal(own.valid, terms.valid[part]) and own.valid.sum() == 2
        torch.testing.assert_close(own.loss, terms.loss[part], rtol=1e-10, atol=0)
    assert Denoiser(MLP(2, 8, 1, 3), "velocity").num_models == 3


def test_compiles_in_one_graph():
    net, target = EDMPrecond(MLP(2, 8, 1)), EDMPrecond(MLP(2, 8, 1, 1))
    loss = TDEDMLoss(td_sigma=(0.3, 5.0), td_share=0.3)
    labels = torch.zeros(10, 0)
    for nets in ((net, target), (plain(net), plain(target))):
        compiled = torch.compile(
            lambda images, nets=nets: loss(*nets, images, labels),
            fullgraph=True,
            backend="aot_eager",
        )
        torch.manual_seed(0)
        images = torch.randn(10, 2)
        torch.manual_seed(1)
        ours = compiled(images)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, loss(*nets, images, labels))


def test_share_of_a_window():
    loss = TDEDMLoss(-1.0, 1.4, td_sigma=(0.3, 5.0))
    torch.manual_seed(0)
    sigma = (-1.0 + 1.4 * torch.randn(20_000, 64, dtype=torch.float64)).exp()
    count = ((sigma > 0.3) & (sigma < 5)).double().sum(1)
    share = loss.window_share(64)
    assert 64 * share == pytest.approx((count.mean() + count.std()).item(), rel=2e-3)
    left_over = (count - math.ceil(64 * share)).clamp(min=0).sum() / count.sum()
    assert 0 < left_over < 0.01
    assert loss.window_share(10**9) == pytest.approx(count.mean().item() / 64, rel=5e-3)
    assert (
        TDEDMLoss().window_share(16) == 1 and TDEDMLoss(td_sigma=(1e-6, 1e3)).window_share(4) <= 1
    )


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(share):
    for make in (TDEDMLoss, TDFlowLoss):
        with pytest.raises(
            ValueError,
            match=f"{make.__name__}: td_share must be above 0 and at most 1, got {share}",
        ):
            make(td_share=share)
