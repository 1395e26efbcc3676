"""`--uncertainty`: EDM2's learned u of a noise level, trained beside the network."""

import math

import pytest
import torch

from helpers.tiny import TINY, options_of, pixels
from tdkern.data import derive_seed, to_float
from tdkern.training import Trainer
from tdkern.training.distributed import this_process

LABELS = torch.zeros(8, 0)


def trainer_of(data, **changes):
    options = options_of(data=data, duration=1e-3, **TINY | {"lr_rampup_kimg": 0} | changes)
    return Trainer(options, this_process())


def step(trainer):
    trainer.train_step(torch.from_numpy(pixels(8)), LABELS)


def same(ours, theirs):
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", ["edm", "ct", "ddpm", "flow"])
def test_where_u_is_0_the_step_is_the_one_without_it(data, family):
    """So the first is, bit for bit, also in the averages, and no later one."""
    total = {"total_training_steps": 1000} if family == "ct" else {}
    plain, ours = (trainer_of(data, family=family, uncertainty=on, **total) for on in (False, True))
    for first in (True, False):
        step(plain), step(ours)
        for mine, other in zip(ours.averages, plain.averages, strict=True):
            assert same(mine.parameters(), other.parameters()) == first
        assert same(ours.net.parameters(), plain.net.parameters()) == first
    weight = ours.uncertainty.weight
    assert weight.abs().max() > 0 and ours.optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("changes", [{}, {"batch_gpu": 4}, {"ls": 1024.0}])
def test_its_gradient_is_that_of_the_whole_batch(data, changes):
    """A sum over elements and a mean over the batch, as the network's is."""
    trainer = trainer_of(data, td=False, dropout=0.0, uncertainty=True, **changes)
    u = trainer.uncertainty
    torch.nn.init.normal_(u.weight)
    torch.manual_seed(derive_seed(0, "step", 0))
    x0 = to_float(torch.from_numpy(pixels(8)))
    pair = trainer.loss.pair(x0)
    plain = trainer.loss.evaluate(trainer.net, None, pair).loss
    total = ((-u(pair.sigma)).exp() * plain + u(pair.sigma)).sum() * x0[0].numel() / 8
    parameters = [u.weight, *trainer.net.parameters()]
    expected = torch.autograd.grad(total * changes.get("ls", 1), parameters)
    step(trainer)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_no_average_has_it_and_no_weight_decay_pulls_at_it(data):
    trainer = trainer_of(data, uncertainty=True, weight_decay=0.5, power_ema=[0.1])
    weight = trainer.uncertainty.weight
    torch.nn.init.constant_(weight, 0.5)
    names = [name for name, _ in trainer.net.named_parameters()]
    for average in trainer.averages:
        assert [name for name, _ in average.module.named_parameters()] == names
    step(trainer)
    # Adam's first step is of the learning rate's size, and a decay's would come on top
    assert 0 < (weight - 0.5).abs().max() < 1.1 * trainer.options.lr
    assert {name for name in trainer.tensors() if "uncertainty" in name} == {
        f"{part}uncertainty.{name}"
        for part, name in (
            ("", "weight"),
            ("", "freqs"),
            ("", "phases"),
            ("step.", "weight"),
            ("exp_avg.", "weight"),
            ("exp_avg_sq.", "weight"),
        )
    }


@pytest.mark.parametrize("where", ["net", "uncertainty"])
def test_a_gradient_that_is_not_finite_holds_both(data, where):
    trainer = trainer_of(data, uncertainty=True)
    step(trainer)
    parameters = [trainer.uncertainty.weight, *trainer.net.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[where == "net"].register_hook(lambda gradient: gradient * math.nan)
    step(trainer)
    assert same(parameters, before) and trainer.optimizer.skipped == 1


def test_it_is_part_of_a_run(data):
    options = options_of(data=data, duration=1e-3, **TINY)
    assert options.uncertainty is False
    with pytest.raises(ValueError, match="uncertainty is False in the run to resume, got True"):
        options.resumed(uncertainty=True)
