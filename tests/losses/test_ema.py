"""The weight averages and their decays."""

import copy
import io
import math
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

from tdkern.ema import (
    EMA,
    PowerFunctionEMA,
    edm_decay,
    posthoc,
    posthoc_weights,
    power_function_gamma,
    target_decay,
)
from tdkern.optim import AdamEMA


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


@pytest.mark.parametrize("kind", [EMA, PowerFunctionEMA])
def test_a_copy_takes_what_is_there_whatever_the_average_held(kind):
    """By decay 0, and by the first step of a power function."""
    net, ema = network(), kind(network(1))
    averages = [ema] if kind is EMA else [*ema.averages.values()]
    with torch.no_grad():
        for average in averages:
            for parameter in average.module.parameters():
                parameter.fill_(math.nan)
    ema.update(net, 0 if kind is EMA else 1)
    for average in averages:
        assert equal_states(average.module, net)


def mixed(seed):
    """A network with complex parameters, and frozen ones of whole numbers (quantised)."""
    torch.manual_seed(seed)
    net = nn.Linear(3, 4)
    net.spectrum = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))
    net.quantised = nn.Parameter(torch.randint(255, (5,), dtype=torch.uint8), requires_grad=False)
    return net


def test_complex_parameters_are_averaged_and_whole_numbers_copied():
    net, other = mixed(0), mixed(1)
    ema, reference = EMA(net), torch.optim.swa_utils.AveragedModel(net, avg_fn=None)
    reference.multi_avg_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    reference.update_parameters(net)
    ema.update(other, 0.75)
    reference.update_parameters(other)
    for name in ("weight", "spectrum"):
        expected = reference.module.get_parameter(name)
        torch.testing.assert_close(ema.module.get_parameter(name), expected)
    assert torch.equal(ema.module.quantised, other.quantised)
    power = PowerFunctionEMA(net)
    power.update(other, 1)
    power.update(net, 2)
    found = posthoc([power.state_dict()], 0.05)
    expected = power.averages[0.05].module.state_dict()
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    torch.testing.assert_close(found, dict(expected), rtol=1e-4, atol=1e-5)


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


class System(nn.Module):
    """A module that owns a network and its averages, as a LightningModule does."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = network(seed)
        self.target, self.power = EMA(self.net), PowerFunctionEMA(self.net)

    def step(self, number):
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(torch.randn_like(parameter))
        self.target.update(self.net, 0.9)
        self.power.update(self.net, number)


def equal_states(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_averages_move_with_their_owner():
    system = System()
    held = list(system.target.module.parameters())  # by an optimizer, which must go on with them
    system.double()
    averages = [system.target, *system.power.averages.values()]
    for average in averages:
        assert all(p.dtype == torch.float64 for p in average.module.parameters())
    assert all(a is b for a, b in zip(held, system.target.module.parameters(), strict=True))
    system.to("meta")
    assert all(p.is_meta for average in averages for p in average.module.parameters())


def test_averages_are_in_their_owners_state_and_load_strictly():
    system, again = System(), System(seed=5)
    for number in (1, 2, 3):
        system.step(number)
    state = system.state_dict()
    again.load_state_dict(through_a_file(state))
    assert equal_states(again, system) and again.power.step == 3
    for each in (system, again):
        torch.manual_seed(1)
        each.step(4)
    assert equal_states(again, system)
    for gone in ("target.module.0.weight", "power.profiles.0_05.module.0.bias"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{gone}"'):
            again.load_state_dict({name: state[name] for name in state if name != gone})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"profiles.0_1.module.0.weight"'):
        PowerFunctionEMA(network(), (0.05, 0.2)).load_state_dict(system.power.state_dict())


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda system: pickle.loads(pickle.dumps(system)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_averages_go_on_by_themselves(how):
    system = System()
    system.step(1)
    before = copy.deepcopy(system.state_dict())
    copied = how(system)
    assert equal_states(copied, system)
    copied.step(2)
    assert copied.power.step == 2 and system.power.step == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.state_dict().items())


def test_an_owners_optimizer_and_mode_leave_averages_alone():
    """`Adam(self.parameters())` has the averages' parameters among its own."""
    system = System()
    averages = nn.ModuleList([system.target, system.power])
    for kind in (torch.optim.AdamW, AdamEMA):
        before = copy.deepcopy(averages.state_dict())
        optimizer = kind(system.parameters(), lr=0.1, weight_decay=0.5)
        system.train()
        assert system.net.training and not any(each.training for each in averages[0].modules())
        x = torch.randn(8, 3)
        (system.net(x) - system.target(x)).square().sum().backward()
        optimizer.step()
        assert all(p.grad is None and not p.requires_grad for p in averages.parameters())
        assert all(torch.equal(t, before[name]) for name, t in averages.state_dict().items())
    system.target.module.train()  # a target whose dropout is wanted, until the owner evaluates
    system.train()
    assert system.target.module.training
    system.eval()
    assert not system.target.module.training


def test_an_average_is_called_as_its_module():
    ema, x = EMA(network()), torch.randn(2, 3)
    assert torch.equal(ema(x), ema.module(x))


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
    with pytest.raises(ValueError, match=r"PowerFunctionEMA: step must be at least 1, got 0"):
        PowerFunctionEMA(net).update(net, 0)
    for sigma_rel in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match="power_function_gamma: sigma_rel must be in"):
            power_function_gamma(sigma_rel)


def test_target_decay():
    assert [target_decay(0.999, step) for step in (0, 8, 90)] == [0.1, 0.5, 0.91]
    # (1 + step) / (10 + step) reaches .999 at 8990
    assert target_decay(0.999, 8990) == 0.999 == target_decay(0.999, 10**6)
    assert target_decay(0.999, 8989) < 0.999


def test_edm_decay():
    assert edm_decay(512, 500_000, 10**9) ** (500_000 / 512) == pytest.approx(0.5)
    # ramp: 5 % of the images seen
    assert edm_decay(512, 500_000, 1_000_000) ** (50_000 / 512) == pytest.approx(0.5)
    assert edm_decay(512, 500_000, 1_000_000, rampup_ratio=0.1) ** (100_000 / 512) == pytest.approx(
        0.5
    )
    assert edm_decay(512, 500_000, 0) == 0.0
    without_ramp = edm_decay(512, 500_000, 0, rampup_ratio=None)
    assert without_ramp == edm_decay(512, 500_000, 10**9) == 0.5 ** (512 / 500_000)
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
    # product of the betas after t
    later = torch.cat([beta, torch.ones(1)]).flip(0).cumprod(0).flip(0)[1:]
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
    # gamma = 0, the plain mean
    assert ema.averages[12**-0.5].module.weight.item() == pytest.approx(sum(values) / 4)
    gamma = power_function_gamma(0.05)
    expected = values[0]
    for step in (2, 3, 4):
        beta = (1 - 1 / step) ** (gamma + 1)
        expected = beta * expected + (1 - beta) * values[step - 1]
    assert ema.averages[0.05].module.weight.item() == pytest.approx(expected)


def test_a_power_function_counts_images_where_the_batch_changes():
    """EDM2's beta is (1 - batch / images)^(gamma + 1), images with this batch's."""
    net = nn.Linear(1, 1, bias=False).double()
    ema = PowerFunctionEMA(net, (0.1,))
    gamma, images, expected = power_function_gamma(0.1), 0, None
    for value, batch in enumerate([32, 32, 256, 256, 64]):
        nn.init.constant_(net.weight, value)
        images += batch
        ema.update(net, images / batch)
        beta = (1 - batch / images) ** (gamma + 1)
        expected = beta * expected + (1 - beta) * value if expected is not None else value
    assert ema.averages[0.1].module.weight.item() == pytest.approx(expected, rel=1e-12)


def test_an_optimizer_averages_with_a_power_function():
    net, other = network(0), network(0)
    ema, expected = PowerFunctionEMA(net), PowerFunctionEMA(other)
    optimizer = AdamEMA(
        net.parameters(),
        averages=[average.module.parameters() for average in ema.averages.values()],
        decays=ema.decays(1),
    )
    plain = AdamEMA(other.parameters())
    for step in (1, 2, 3):
        for parameter, same in zip(net.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        net[1].running_mean.add_(1)
        other[1].running_mean.add_(1)
        optimizer.decays.copy_(torch.tensor(ema.decays(step)))
        optimizer.step()
        ema.copy_buffers(net, step)
        plain.step()
        expected.update(other, step)
    assert equal_states(ema, expected)


def walk(updates, every, *emas):
    """Averages of a random walk, and copies of the first's state on the way."""
    torch.manual_seed(0)
    net, snapshots = network().double(), []
    emas = [PowerFunctionEMA(net, widths) for widths in emas]
    for step in range(1, updates + 1):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        for ema in emas:
            ema.update(net, step)
        if step % every == 0:
            snapshots.append(copy.deepcopy(emas[0].state_dict()))
    return snapshots, *emas


def distance(state, module):
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    return max((state[name] - expected[name]).abs().max().item() for name in expected)


def test_posthoc_is_the_direct_average():
    """Of any width between those stored, and one ending where no snapshot is."""
    snapshots, _, direct = walk(300, 10, (0.05, 0.10), (0.06, 0.075, 0.15))
    for width, average in direct.averages.items():
        assert distance(posthoc(snapshots, width), average.module) < 2e-4, width
    _, early = walk(245, 245, (0.10,))
    assert distance(posthoc(snapshots, 0.10, step=245), early.averages[0.10].module) < 0.01
    # a profile that is stored is itself
    assert (
        distance(posthoc(snapshots, 0.05), walk(300, 300, (0.05,))[1].averages[0.05].module) < 1e-9
    )


def test_posthoc_weights():
    """Least squares between the profiles, as integrals over time say; their sum is 1."""
    profiles = [(width, step) for step in (200.0, 300.0) for width in (0.05, 0.10)]
    weights, error = posthoc_weights(profiles, 0.075, 300.0)
    t = (torch.arange(300_000, dtype=torch.float64) + 0.5) / 1000

    def profile(width, step):
        gamma = power_function_gamma(width)
        return torch.where(t <= step, (gamma + 1) / step * (t / step) ** gamma, 0.0)

    made = torch.stack([profile(*each) for each in profiles], 1)
    wanted = profile(0.075, 300.0)
    solved = torch.linalg.lstsq(made, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(
        torch.from_numpy(weights), solved / solved.sum(), rtol=1e-4, atol=1e-5
    )
    assert weights.sum() == pytest.approx(1)
    gap = (made @ torch.from_numpy(weights) - wanted).norm() / wanted.norm()
    assert error == pytest.approx(gap.item(), rel=1e-3)


def test_posthoc_reads_files(tmp_path):
    snapshots, ema = walk(6, 3, (0.05, 0.10))
    torch.save(snapshots[0], tmp_path / "3.pt")
    safetensors.torch.save_file(snapshots[1], tmp_path / "6.safetensors")
    found = posthoc([tmp_path / "3.pt", str(tmp_path / "6.safetensors")], 0.075)
    expected = posthoc(snapshots, 0.075)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = network().double()
    again.load_state_dict(found)
    assert found["1.num_batches_tracked"] == 1 and found["0.weight"].dtype == torch.float64
    assert ema.step == 6


def test_posthoc_refuses_what_it_cannot_use(tmp_path):
    snapshots, _ = walk(4, 2, (0.05, 0.10))
    other = PowerFunctionEMA(nn.Linear(1, 1))
    other.update(nn.Linear(1, 1), 3)
    (tmp_path / "no.pt").write_bytes(b"nothing")
    for given, message in (
        (([], 0.05), "posthoc: snapshots must hold at least one state of a PowerFunctionEMA"),
        (([{"0.weight": torch.ones(1)}], 0.05), r"posthoc: snapshots\[0\] must be the state dict"),
        (([PowerFunctionEMA(network()).state_dict()], 0.05), r"snapshots\[0\] holds no average"),
        ((snapshots, 0.05, 5), "posthoc: step must be above 0 and at most the newest snapshot's 4"),
        ((snapshots, 0.5), "power_function_gamma: sigma_rel must be in"),
        (([*snapshots, other.state_dict()], 0.05), r"snapshots\[2\] is of another network"),
        (([tmp_path / "no.pt"], 0.05), r"no.pt: cannot be read \(.*\); give another"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            posthoc(*given)
        assert len(str(error.value).splitlines()) == 1


def test_posthoc_warns_where_no_sum_of_snapshots_is_near():
    snapshots, _ = walk(4, 2, (0.05, 0.10))
    with pytest.warns(UserWarning, match="give width 0.28 only to .*% of its profile"):
        posthoc(snapshots[-1:], 0.28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posthoc(snapshots, 0.07)
