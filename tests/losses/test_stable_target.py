"""The stable target field, without and with TD."""

import pytest
import torch

from tdkern.ablation.problems import PROBLEMS
from tdkern.columns import W_TD, A
from tdkern.losses import EDMLoss, TDBatch, TDCTLoss, TDEDMLoss, stable_target
from tdkern.networks import EDMPrecond


@pytest.fixture
def problem():
    return PROBLEMS["mixture"]()


def draws(problem, n, seed=0):
    return problem.sample(n, torch.Generator().manual_seed(seed))[0]


def pair(loss, x0, sigma):
    torch.manual_seed(0)
    return loss.pair(x0, sigma=torch.full((len(x0),), sigma))


def test_target_is_the_posterior_mean_over_the_given_images(problem):
    x0, reference = draws(problem, 4), draws(problem, 6, seed=1)
    batch = pair(EDMLoss(), x0, 0.7)
    stable = stable_target(batch, reference)
    y = torch.cat([x0, reference]).double()
    for x, target in zip(batch.x_t.double(), stable.x0.double(), strict=True):
        weights = (-(x - y).square().sum((1, 2, 3)) / (2 * 0.7**2)).exp()
        mean = (weights[:, None, None, None] * y).sum(0) / weights.sum()
        torch.testing.assert_close(target, mean, rtol=0, atol=1e-6)
    assert stable.x_t is batch.x_t and stable.coef is batch.coef


def test_without_noise_the_target_is_the_image(problem):
    x0 = draws(problem, 4)
    stable = stable_target(pair(EDMLoss(), x0, 1e-3), draws(problem, 64, seed=1))
    torch.testing.assert_close(stable.x0, x0, rtol=0, atol=1e-3)


def test_a_large_reference_gives_the_exact_denoiser(problem):
    batch = pair(EDMLoss(), draws(problem, 200), 1.0)
    exact = problem.denoise(batch.x_t, 1.0)
    gap = [
        (stable_target(batch, draws(problem, n, seed=1)).x0 - exact).square().mean().item()
        for n in (1, 20_000)
    ]
    assert gap[1] < 1e-3 and gap[1] < 0.1 * gap[0]


def test_images_of_other_classes_have_no_weight(problem):
    x0, reference = draws(problem, 4), draws(problem, 4, seed=1)
    one_hot = torch.eye(2)[[0, 0, 1, 1]]
    batch = pair(EDMLoss(), x0, 2.0)
    of_class = stable_target(batch, reference, one_hot, one_hot).x0
    first = batch._replace(x0=x0[:2], x_t=batch.x_t[:2], levels=batch.levels[:2])
    torch.testing.assert_close(of_class[:2], stable_target(first, reference[:2]).x0)


@pytest.fixture
def pairs(problem):
    """Many pairs on Markov paths that end in one x_t, as they are and with stable targets."""
    many = draws(problem, 30_000)
    sigma, x_t = 0.8, draws(problem, 1, seed=3) + 0.3
    posterior = (-(x_t - many).square().sum((1, 2, 3)) / (2 * sigma**2)).softmax(0)
    torch.manual_seed(0)
    x0 = many[torch.multinomial(posterior, 400, replacement=True)]
    batch = pair(TDEDMLoss(), x0, sigma)
    share = (batch.sigma_p / batch.sigma).float().view(-1, 1, 1, 1) ** 2
    spread = (share * (1 - share)).sqrt() * sigma  # of x_t' between x0 and x_t
    x_tp = x0 + share * (x_t - x0) + spread * torch.randn(x0.shape)
    batch = batch._replace(x_t=x_t.expand_as(x0).contiguous(), x_tp=x_tp)
    # each alone: what they have in common is x_t, so that they are no draws of the data
    parts = [TDBatch(*(each[i : i + 1] for each in batch[:5])) for i in range(len(x0))]
    stable = [stable_target(part, many[:8192]) for part in parts]
    return batch, TDBatch(*(torch.cat(each) for each in zip(*stable, strict=True)))


def test_with_td_the_target_keeps_its_mean_and_loses_variance(problem, pairs):
    """At the exact denoiser the gradient's mean is 0, and the loss is the variance alone."""
    shift = torch.zeros(2, 1, 1, requires_grad=True)
    net = lambda x, sigma: problem.denoise(x, sigma) + shift
    losses = []
    for each in pairs:
        td = TDEDMLoss().evaluate(net, problem.denoise, each).td.mean()
        (gradient,) = torch.autograd.grad(td, shift)
        scale = (each.coef[0, A] * each.coef[0, W_TD].sqrt()).item()
        losses.append(td.item())
        allowed = 4 * scale * (losses[0] / len(each.x0)) ** 0.5  # 4 standard errors of the mean
        assert (gradient.abs() < allowed).all()
    assert losses[1] < 0.2 * losses[0]


def test_one_estimate_at_both_points_would_raise_the_variance(problem, pairs):
    batch, stable = pairs
    one = stable._replace(x0_p=None)
    td = [
        TDEDMLoss().evaluate(problem.denoise, problem.denoise, each).td.mean().item()
        for each in (batch, one)
    ]
    assert td[1] > 1.05 * td[0]


def test_the_fused_path_has_the_same_loss(problem):
    net = EDMPrecond(problem.network())
    for parameter in net.parameters():
        parameter.data += 0.1
    batch = stable_target(pair(TDEDMLoss(), draws(problem, 8), 1.5), draws(problem, 8, seed=1))
    plain = lambda x, sigma: net(x, sigma)
    fused, denoised = (TDEDMLoss().evaluate(each, each, batch) for each in (net, plain))
    assert fused.valid.all()
    for ours, theirs in zip(fused[:3], denoised[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_consistency_training_has_one_x0(problem):
    batch = TDCTLoss().pair(draws(problem, 4))
    stable = stable_target(batch, draws(problem, 4, seed=1))
    net = lambda x, sigma: x
    with pytest.raises(ValueError, match=r"TDCTLoss: batch\.x0_p must be None"):
        TDCTLoss().evaluate(net, net, stable)


def test_labels_keep_to_their_class_as_indices_and_one_hot():
    torch.manual_seed(0)
    loss = TDEDMLoss()
    batch = loss.pair(torch.randn(4, 1, 2, 2), sigma=torch.full((4,), 2.0))
    reference = torch.randn(6, 1, 2, 2)
    indices, others = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 2, 2, 0])
    hot = [torch.nn.functional.one_hot(each, 3).float() for each in (indices, others)]
    by_index = stable_target(batch, reference, indices, others)
    by_hot = stable_target(batch, reference, *hot)
    assert torch.equal(by_index.x0, by_hot.x0) and torch.equal(by_index.x0_p, by_hot.x0_p)
    of_class = torch.tensor([2])  # sample 2 has two others of its class, and is alone with them
    alone = type(batch)(*(None if each is None else each[of_class] for each in batch))
    expected = stable_target(alone, reference[others == 2])
    torch.testing.assert_close(by_index.x0[of_class], expected.x0)
    assert not torch.allclose(by_index.x0, stable_target(batch, reference).x0)
