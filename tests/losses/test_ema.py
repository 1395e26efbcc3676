"""The weight averages and their decays."""

import math

import pytest
import torch
from torch import nn

from tdkern.ema import EMA, PowerFunctionEMA, edm_decay, power_function_gamma, target_decay


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2, bias=False)
    )
    net(torch.randn(8, 3))  # moves BatchNorm's buffers, an integer one among them
    return net


def test_update():
    net, other = network(0), network(1)
    ema = EMA(net)
    before = {name: parameter.clone() for name, parameter in ema.module.named_parameters()}
    ema.update(other, 0.75)
    parameters, buffers = dict(other.named_parameters()), dict(other.named_buffers())
    for name, average in ema.module.named_parameters():
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * parameters[name])
        assert torch.equal(net.get_parameter(name), before[name])
    for name, average in ema.module.named_buffers():
        assert torch.equal(average, buffers[name])
        assert average.data_ptr() != buffers[name].data_ptr()
    assert ema.module[1].num_batches_tracked == 1 and ema.module[1].running_mean.abs().max() > 0


def test_decay_0_copies_and_1_keeps():
    net, other = network(0), network(1)
    ema = EMA(net)
    ema.update(other, 1.0)
    assert all(
        torch.equal(*pair) for pair in zip(ema.module.parameters(), net.parameters(), strict=True)
    )
    ema.update(other, 0.0)
    assert all(
        torch.equal(*pair) for pair in zip(ema.module.parameters(), other.parameters(), strict=True)
    )


def test_module_is_frozen():
    net = network()
    ema = EMA(net)
    assert net.training and not any(module.training for module in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    ema.update(net, 0.5)
    assert all(
        parameter.grad_fn is None and not parameter.requires_grad
        for parameter in ema.module.parameters()
    )


def test_state_dict_round_trip():
    ema = EMA(network(0))
    ema.update(network(1), 0.9)
    again = EMA(network(2))
    again.module.load_state_dict(ema.module.state_dict())
    for average in (ema, again):
        average.update(network(3), 0.9)
    assert all(
        torch.equal(*pair)
        for pair in zip(
            ema.module.state_dict().values(), again.module.state_dict().values(), strict=True
        )
    )


def test_update_from_a_wrapper():
    """DDP and torch.compile wrap a network: other names, the same parameters in the same order."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    ema, other = EMA(network(0)), network(1)
    ema.update(Wrapper(other), 0.0)
    assert all(
        torch.equal(*pair)
        for pair in zip(ema.module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_bad_arguments():
    net = network()
    for decay in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"EMA\.update: decay must be in \[0, 1\]"):
            EMA(net).update(net, decay)
    with pytest.raises(
        ValueError, match=r"PowerFunctionEMA\.update: step must be at least 1, got 0"
    ):
        PowerFunctionEMA(net).update(net, 0)
    for sigma_rel in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match="power_function_gamma: sigma_rel must be in"):
            power_function_gamma(sigma_rel)


def test_target_decay():
    assert [target_decay(0.999, step) for step in (0, 8, 90)] == [0.1, 0.5, 0.91]
    assert (
        target_decay(0.999, 8990) == 0.999 == target_decay(0.999, 10**6)
    )  # (1 + step) / (10 + step) reaches .999 at 8990
    assert target_decay(0.999, 8989) < 0.999


def test_edm_decay():
    assert edm_decay(512, 500_000, 10**9) ** (500_000 / 512) == pytest.approx(0.5)
    assert edm_decay(512, 500_000, 1_000_000) ** (50_000 / 512) == pytest.approx(
        0.5
    )  # ramp: 5 % of the images seen
    assert edm_decay(512, 500_000, 1_000_000, rampup_ratio=0.1) ** (100_000 / 512) == pytest.approx(
        0.5
    )
    assert edm_decay(512, 500_000, 0) == 0.0
    assert (
        edm_decay(64, 500_000, 10**7 - 64)
        < edm_decay(64, 500_000, 10**7)
        == edm_decay(64, 500_000, 10**8)
    )


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_power_function_profile(sigma_rel):
    """The weights that the updates leave have the width asked for, and follow tau^gamma."""
    T = 4000
    t = torch.arange(1, T + 1, dtype=torch.float64)
    gamma = power_function_gamma(sigma_rel)
    beta = (1 - 1 / t) ** (gamma + 1)
    later = (
        torch.cat([beta, torch.ones(1)]).flip(0).cumprod(0).flip(0)[1:]
    )  # product of the betas after t
    weight = (1 - beta) * later
    mean = (weight * t).sum()
    assert weight.sum().item() == pytest.approx(1)
    assert (weight * (t - mean) ** 2).sum().sqrt().item() / T == pytest.approx(sigma_rel, rel=2e-3)
    profile = ((t - 0.5) / T) ** gamma
    torch.testing.assert_close(weight, profile / profile.sum(), rtol=0.02, atol=1e-6)


def test_power_function_ema():
    """Several widths at once, each as its own average; the first update copies."""
    net = nn.Linear(1, 1, bias=False).double()
    ema = PowerFunctionEMA(net, (0.05, 12**-0.5))
    values = [3.0, -1.0, 4.0, 2.0]
    for step, value in enumerate(values, 1):
        nn.init.constant_(net.weight, value)
        ema.update(net, step)
        if step == 1:
            assert all(average.module.weight == value for average in ema.averages.values())
    assert ema.averages[12**-0.5].module.weight.item() == pytest.approx(
        sum(values) / 4
    )  # gamma = 0, the plain mean
    gamma = power_function_gamma(0.05)
    expected = values[0]
    for step in (2, 3, 4):
        beta = (1 - 1 / step) ** (gamma + 1)
        expected = beta * expected + (1 - beta) * values[step - 1]
    assert ema.averages[0.05].module.weight.item() == pytest.approx(expected)
