"""The stable target field and the best of the power-function averages."""

import pytest
import torch

from tdkern.ablation.problems import PROBLEMS
from tdkern.ablation.rivals import WIDTHS, best_width, stable_target
from tdkern.ema import PowerFunctionEMA
from tdkern.losses import EDMLoss, TDEDMLoss


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
        for n in (0, 20_000)
    ]
    assert gap[1] < 1e-3 and gap[1] < 0.1 * gap[0]


def test_images_of_other_classes_have_no_weight(problem):
    x0, reference = draws(problem, 4), draws(problem, 4, seed=1)
    one_hot = torch.eye(2)[[0, 0, 1, 1]]
    batch = pair(EDMLoss(), x0, 2.0)
    of_class = stable_target(batch, reference, one_hot, one_hot).x0
    first = batch._replace(x0=x0[:2], x_t=batch.x_t[:2], levels=batch.levels[:2])
    torch.testing.assert_close(of_class[:2], stable_target(first, reference[:2]).x0)


def test_with_td_the_target_keeps_its_mean_and_loses_variance(problem):
    """Of many pairs whose x_t is the same: x0 is drawn from the posterior at x_t."""
    loss, many = TDEDMLoss(), draws(problem, 30_000)
    sigma, x_t = 0.8, draws(problem, 1, seed=3) + 0.3
    posterior = (-(x_t - many).square().sum((1, 2, 3)) / (2 * sigma**2)).softmax(0)
    torch.manual_seed(0)
    x0 = many[torch.multinomial(posterior, 2000, replacement=True)]
    batch = pair(loss, x0, sigma)
    batch = batch._replace(x_t=x_t.expand_as(x0))
    level, level_p = batch.sigma[:1].view(1, 1, 1, 1), batch.sigma_p.view(-1, 1, 1, 1)
    # x_t' on the path between them: the bridge of x0 and x_t
    share = (level_p / level) ** 2
    noise = (level_p * (1 - share).sqrt()) * torch.randn(x0.shape)
    batch = batch._replace(x_tp=(x0 + share * (x_t - x0) + noise).float())

    exact = lambda x, sigma: problem.denoise(x, sigma)
    A, A_p = (batch.coef[:, i].view(-1, 1, 1, 1) for i in (4, 5))

    def target(batch):
        """What A D is drawn to: A x0 - A' (x0 - D')."""
        ahead = batch.x0 - exact(batch.x_tp, batch.sigma_p)
        return A * batch.x0 - A_p * ahead

    plain, stable = target(batch), target(stable_target(batch, many[:512]))
    expected = A[0] * exact(x_t, sigma)[0]
    spread = plain.std(0) / len(x0) ** 0.5
    assert ((plain.mean(0) - expected).abs() < 4 * spread).all()
    assert ((stable.mean(0) - expected).abs() < 0.05 * plain.std(0)).all()
    assert (stable.var(0) < 0.8 * plain.var(0)).all()
    assert loss.evaluate(exact, exact, stable_target(batch, many[:512])).td.isfinite().all()


def test_the_best_width_is_the_one_of_the_least_score():
    net = torch.nn.Linear(1, 1, bias=False)
    averages = PowerFunctionEMA(net, WIDTHS)
    for step in range(1, 201):
        net.weight.data.fill_(float(step))
        averages.update(net, step)
    values = {width: each.module.weight.item() for width, each in averages.averages.items()}
    assert 190 < values[WIDTHS[0]] < 200 and values[WIDTHS[-1]] < 160
    score = lambda module: abs(module.weight.item() - values[0.085])
    width, module = best_width(averages, score)
    assert width == 0.085 and module.weight.item() == values[0.085]
