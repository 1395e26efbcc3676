"""AdamEMA and RAdamEMA as optimizers among optimizers: PyTorch's own test inputs, gradients that
they cannot take, added groups, compiled steps, parameters that moved; and RAdam's numbers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing._internal import common_optimizers

from tdkern.ema import EMA
from tdkern.ops import _backends
from tdkern.optim import OPTIMIZERS, AdamEMA, RAdamEMA

THEIRS = {AdamEMA: torch.optim.Adam, RAdamEMA: torch.optim.RAdam}
INPUTS = {
    AdamEMA: common_optimizers.optim_inputs_func_adam("cpu", torch.float32),
    RAdamEMA: common_optimizers.optim_inputs_func_radam("cpu", torch.float32),
}
ERRORS = {
    AdamEMA: common_optimizers.optim_error_inputs_func_adam("cpu", torch.float32),
    RAdamEMA: common_optimizers.optim_error_inputs_func_radam("cpu", torch.float32),
}
TAKEN = {"lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"}
every_kind = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)


def of(table):
    return [
        pytest.param(kind, each, id=f"{kind.__name__}-{i}")
        for kind, inputs in table.items()
        for i, each in enumerate(inputs)
    ]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def give_gradients(net, step):
    random = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=random).to(param)


def same(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-7)


# --- PyTorch's own inputs


@pytest.mark.parametrize(("kind", "given"), of(INPUTS))
def test_torchs_inputs(kind, given):
    """The options that are taken give torch's numbers; the others are refused by name."""
    options = dict(given.kwargs)
    net, other = network(), network()
    unknown = options.keys() - TAKEN
    if unknown:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '({'|'.join(unknown)})'"):
            kind(net.parameters(), **options)
        return
    theirs = THEIRS[kind](other.parameters(), **options)
    options["decoupled"] = options.pop("decoupled_weight_decay", False)
    ours = kind(net.parameters(), **options)
    for step in range(10):
        for each, optimizer in ((net, ours), (other, theirs)):
            give_gradients(each, step)
            optimizer.step()
    same(net.parameters(), other.parameters())


@pytest.mark.parametrize(("kind", "given"), of(ERRORS))
def test_torchs_wrong_inputs(kind, given):
    wrong = given.optimizer_error_input
    params = network().parameters() if wrong.params is None else wrong.params
    if given.error_type is UserWarning:
        with pytest.warns(UserWarning, match=given.error_regex):
            kind(params, **wrong.kwargs)
        return
    refused = TypeError if wrong.kwargs.keys() - TAKEN else given.error_type
    with pytest.raises(refused) as error:
        kind(params, **wrong.kwargs)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 200


# --- gradients


@every_kind
@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_sparse_and_complex_gradients_are_refused_in_one_sentence(kind, backend):
    if _backends.MISSING[backend]:
        pytest.skip(_backends.MISSING[backend])
    for value, grad, message in (
        (
            torch.zeros(3, 3),
            torch.eye(3).to_sparse(),
            "Adam does not support sparse gradients, please consider SparseAdam instead",
        ),
        (
            torch.zeros(2, dtype=torch.complex64),
            torch.ones(2, dtype=torch.complex64),
            "parameters must be real, got torch.complex64; give torch.view_as_real of them",
        ),
    ):
        param = nn.Parameter(value)
        param.grad = grad
        optimizer = kind([param], backend=backend)
        with pytest.raises(RuntimeError, match=f"^{kind.__name__}: {message}$"):
            optimizer.step()
        assert not param.any() and not optimizer.skipped


# --- groups


@every_kind
def test_an_added_group_brings_its_averages_and_may_have_other_decays(kind):
    net, added = network(), nn.Parameter(torch.zeros(3))
    ema, other = EMA(net), torch.zeros(3)
    optimizer = kind(net.parameters(), averages=[ema.module.parameters()], decays=[0.5])
    optimizer.add_param_group({"params": [added], "averages": [[other]]})
    alone = nn.Parameter(torch.zeros(3))
    its_average = torch.ones(3)
    optimizer.add_param_group({"params": [alone], "averages": [[its_average]], "decays": [1.0]})
    for param in (*net.parameters(), added, alone):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert added[0] < 0 and torch.equal(other, 0.5 * added.detach())
    assert alone[0] < 0 and its_average.tolist() == [1, 1, 1]
    optimizer.decays[0] = 0.0  # of every group but the one with its own
    optimizer.step()
    assert torch.equal(other, added.detach()) and its_average.tolist() == [1, 1, 1]
    same(ema.module.parameters(), net.parameters())


@every_kind
def test_decays_are_reached_by_groups_and_are_not_in_the_state(kind):
    net, ema = network(), EMA(network())
    optimizer = kind(net.parameters(), averages=[ema.module.parameters()], decays=[1.0])
    optimizer.param_groups[0]["decays"][0] = 0.0
    give_gradients(net, 0)
    optimizer.step()
    same(ema.module.parameters(), net.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    assert "decays" not in state["param_groups"][0] and set(state["state"][0]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    # what a state brings does not replace the decays and averages of the optimizer that loads it
    again, target = network(1), EMA(network(2))
    loaded = kind(again.parameters(), averages=[target.module.parameters()], decays=[0.0])
    decays = loaded.decays
    loaded.load_state_dict(state)
    decays[0] = 1.0
    before = copy.deepcopy(target.state_dict())
    give_gradients(again, 0)
    loaded.step()
    assert loaded.decays is loaded.param_groups[0]["decays"] is decays
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())


@every_kind
def test_parameters_that_a_wrapper_exchanges_keep_their_averages(kind):
    """Accelerate puts other tensors in the place of those in the groups, as FSDP and XLA need."""
    net, ema = network(), EMA(network())
    optimizer = kind(net.parameters(), averages=[ema.module.parameters()], decays=[0.0])
    other = network(1)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    give_gradients(other, 0)
    optimizer.step()
    same(ema.module.parameters(), other.parameters())


# --- where they run


@every_kind
def test_a_compiled_step(kind):
    nets, steps, averages = [network(), network()], [], []
    for net in nets:
        averages.append([param.detach().clone() for param in net.parameters()])
        optimizer = kind(net.parameters(), averages=[averages[-1]], decays=[0.5])
        steps.append(optimizer.step)
    steps[1] = torch.compile(steps[1], backend="aot_eager", fullgraph=True)
    for number in range(8):
        for net, step in zip(nets, steps, strict=True):
            give_gradients(net, number)
            if number == 3:
                next(net.parameters()).grad[0, 0] = math.nan
            step()
    same(nets[1].parameters(), nets[0].parameters())
    same(averages[1], averages[0])


@every_kind
def test_parameters_that_moved_to_another_dtype_before_the_first_step(kind):
    system = nn.ModuleDict({"net": network(), "ema": EMA(network())})
    averages = [system["ema"].module.parameters()]
    optimizer = kind(system["net"].parameters(), averages=averages, decays=[0.0])
    system.double()
    give_gradients(system["net"], 0)
    optimizer.step()
    params = list(system["net"].parameters())
    assert params[0].dtype == torch.float64
    same(system["ema"].module.parameters(), params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_kind
def test_parameters_that_moved_to_the_gpu(kind):
    """The count of skipped steps, made beside the parameters, follows them."""
    systems = []
    for device in ("cpu", "cuda"):
        system = nn.ModuleDict({"net": network(), "ema": EMA(network())})
        averages = [system["ema"].module.parameters()]
        optimizer = kind(system["net"].parameters(), averages=averages, decays=[0.5])
        system.to(device)
        for step in range(8):
            give_gradients(system["net"], step)
            if step == 3:
                next(system["net"].parameters()).grad[0, 0] = math.nan
            optimizer.step()
        assert optimizer.skipped.item() == 1 and optimizer.skipped.device.type == device
        systems.append(system.cpu())
    same(systems[1].parameters(), systems[0].parameters())


# --- RAdam


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.95), (0.9, 0.5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_radam_is_torchs(dtype, decoupled, betas, weight_decay):
    """Through steps that are not rectified and those that are; a step that is skipped, the first
    one too, is as if it were not; a parameter without a gradient keeps its own count."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((7, 5), (3,), (), (0,))]
    theirs, averages = copy.deepcopy(ours), [[param.detach().clone() for param in ours]]
    expected = copy.deepcopy(averages[0])
    options = {"lr": 0.01, "betas": betas, "weight_decay": weight_decay}
    optimizer = RAdamEMA(ours, **options, decoupled=decoupled, averages=averages, decays=[0.9])
    other = torch.optim.RAdam(theirs, **options, decoupled_weight_decay=decoupled)
    for step in range(20):
        for i, (param, same_param) in enumerate(zip(ours, theirs, strict=True)):
            param.grad = None if i == 1 and step % 4 == 0 else torch.randn_like(param)
            same_param.grad = copy.deepcopy(param.grad)
        if step in (0, 3, 11):
            ours[0].grad[1, 2] = math.inf
            optimizer.step()
            continue
        optimizer.step()
        other.step()
        for average, param in zip(expected, theirs, strict=True):
            if param.grad is not None:
                average.lerp_(param.detach(), 0.1)
    assert optimizer.skipped.item() == 3
    close = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    )
    for i, (param, same_param) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(param, same_param, **close)
        torch.testing.assert_close(averages[0][i], expected[i], **close)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[param][name], other.state[same_param][name], **close
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_radam_in_half_precision_loses_no_more_than_torchs(dtype):
    """Against float64, from the same gradients."""
    errors = []
    for kind in (RAdamEMA, torch.optim.RAdam):
        nets = [network().to(dtype), network().to(dtype).double()]
        optimizers = [
            kind(nets[0].parameters(), 0.01),
            torch.optim.RAdam(nets[1].parameters(), 0.01),
        ]
        for step in range(40):
            for net, optimizer in zip(nets, optimizers, strict=True):
                random = torch.Generator().manual_seed(step)
                for param in net.parameters():
                    scale = 1.0 if step < 10 else 0.1
                    drawn = scale * torch.randn(param.shape, generator=random).to(dtype)
                    param.grad = drawn.to(param.dtype)
                optimizer.step()
        pairs = zip(*(net.parameters() for net in nets), strict=True)
        errors.append(max((half.double() - wide).abs().max().item() for half, wide in pairs))
    assert errors[0] < 1.5 * errors[1]


def test_radams_state_is_torchs_both_ways():
    net, other, third = network(), network(), network()
    ours = RAdamEMA(net.parameters(), 0.01, weight_decay=0.1)
    theirs = torch.optim.RAdam(
        other.parameters(), 0.01, weight_decay=0.1, decoupled_weight_decay=True
    )

    def train(pairs, steps):
        for step in steps:
            for each, optimizer in pairs:
                give_gradients(each, step)
                optimizer.step()

    train([(net, ours), (other, theirs)], range(7))
    again = RAdamEMA(third.parameters(), decoupled=False)
    third.load_state_dict(other.state_dict())
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train([(net, ours), (other, theirs), (third, again)], range(7, 12))
    same(other.parameters(), net.parameters())
    same(third.parameters(), net.parameters())


@pytest.mark.parametrize(("clip", "taken"), [(0.25, True), (math.nan, False), (math.inf, False)])
def test_radam_clips_and_unscales_as_adam_does(clip, taken):
    net, other = network(), network()
    before = copy.deepcopy(net.state_dict())
    ours = RAdamEMA(net.parameters(), 0.01, takes_grad_scale=True)
    theirs = torch.optim.RAdam(other.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.ones(3, 4)
    for _ in range(7):
        ours.zero_grad()
        scaler.scale(net(x).square().sum()).backward()
        ours.grad_scale = torch.tensor(8.0)  # as GradScaler's step gives it
        ours.step(clip=torch.tensor(clip))
        theirs.zero_grad()
        (other(x).square().sum() * 0.25).backward()
        theirs.step()
    if taken:
        return same(net.parameters(), other.parameters())
    assert ours.skipped.item() == 7
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
