"""What is no dense tensor, no list and no number gets the op's own error, on one line; memory that
runs out stays recognisable."""

import numpy as np
import pytest
import torch

import tdkern
from helpers.cases import device_of
from tdkern.ema import EMA
from tdkern.ops import OPS
from tdkern.optim import AdamEMA

TENSORS = [
    (op, name)
    for op in OPS
    for name, value in OPS[op].example().items()
    if isinstance(value, torch.Tensor)
]
LISTS = [
    (op, name)
    for op in OPS
    for name, value in OPS[op].example().items()
    if isinstance(value, list) and name != "decays"
]
NUMBERS = [
    ("td_coef", name)
    for name in (
        "steps",
        "sigma_min",
        "sigma_max",
        "rho",
        "sigma_data",
        "k_idx",
        "one_idx",
        "lambda_base",
    )
]
NUMBERS += [
    ("noise_pair", "seed"),
    ("noise_pair", "offset"),
    ("adam_ema_", "lr"),
    ("adam_ema_", "eps"),
    ("adam_ema_", "weight_decay"),
]
LAYOUTS = {
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: (t if t.ndim == 2 else t.reshape(1, -1)).to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t.reshape(-1)[:1], t.reshape(-1)[:2]]),
    "jagged": lambda t: torch.nested.nested_tensor(
        [t.reshape(-1)[:1], t.reshape(-1)[:2]], layout=torch.jagged
    ),
}
KINDS = {
    "NumPy": lambda t: np.zeros(2, np.float32),
    "float": lambda t: 0.5,
    "list": lambda t: [0.5],
    "str": lambda t: "x",
}


def refuses(op, name, arguments, backend):
    with pytest.raises(ValueError) as error:
        OPS[op].results(arguments, backend)
    assert str(error.value).startswith(f"{op}: {name}") and "\n" not in str(error.value), (
        error.value
    )
    return str(error.value)


@pytest.mark.parametrize("kind", {**LAYOUTS, **KINDS})
@pytest.mark.parametrize("op, name", TENSORS)
def test_what_is_no_dense_tensor(backend, op, name, kind):
    if device_of(backend) != "cpu":
        pytest.skip("on the CPU alone")
    arguments = OPS[op].example()
    make = {**LAYOUTS, **KINDS}[kind]
    if name in ("seed", "offset") and kind == "float":
        pytest.skip("a number is taken")
    arguments[name] = make(arguments[name])
    refuses(op, name, arguments, backend)


@pytest.mark.parametrize("kind", {**LAYOUTS, **KINDS})
@pytest.mark.parametrize("op, name", LISTS)
def test_a_list_of_what_is_no_dense_tensor(backend, op, name, kind):
    arguments = OPS[op].example(device=device_of(backend))
    if name == "steps" and kind == "mkldnn":
        pytest.skip("there are no such scalars")
    inner = arguments[name][0] if name == "averages" else arguments[name]
    inner[1] = {**LAYOUTS, **KINDS}[kind](inner[1].cpu())
    refuses(op, f"{name}[0][1]" if name == "averages" else f"{name}[1]", arguments, backend)


@pytest.mark.parametrize(
    "wrong",
    [0.5, None, "generator", torch.ones(3), np.ones(3)],
    ids=lambda wrong: type(wrong).__name__,
)
@pytest.mark.parametrize("op, name", LISTS)
def test_what_is_no_list(backend, op, name, wrong):
    arguments = OPS[op].example(device=device_of(backend))
    arguments[name] = (part for part in arguments[name]) if isinstance(wrong, str) else wrong
    refuses(op, name, arguments, backend)
    if name == "averages":
        arguments[name] = [(part for part in ()) if isinstance(wrong, str) else wrong]
        refuses(op, "averages[0]", arguments, backend)


@pytest.mark.parametrize("wrong", ["x", None, [1.0], 1.5j], ids=str)
@pytest.mark.parametrize("op, name", NUMBERS)
def test_what_is_no_number(backend, op, name, wrong):
    refuses(op, name, {**OPS[op].example(device=device_of(backend)), name: wrong}, backend)


@pytest.mark.parametrize("op", ["ema_update_", "adam_ema_"])
@pytest.mark.parametrize(
    "wrong", [0.5, None, "x", np.ones(1)], ids=lambda wrong: type(wrong).__name__
)
def test_what_are_no_decays(backend, op, wrong):
    refuses(op, "decays", {**OPS[op].example(device=device_of(backend)), "decays": wrong}, backend)


def test_more_wrong_kinds(backend):
    arguments = OPS["adam_ema_"].example(device=device_of(backend))
    for name, wrong in {
        "clip": 0.5,
        "grad_scale": 1.0,
        "found_inf": 0.0,
        "skipped": 0,
        "betas": 0.9,
    }.items():
        refuses("adam_ema_", name, {**arguments, name: wrong}, backend)
    arguments = OPS["found_inf"].example(device=device_of(backend))
    for name, wrong in {"clip": 0.5, "grad_scale": 1.0}.items():
        refuses("found_inf", name, {**arguments, name: wrong}, backend)
    refuses(
        "td_coef",
        "td_sigma",
        {**OPS["td_coef"].example(device=device_of(backend)), "td_sigma": 3.0},
        backend,
    )
    refuses(
        "noise_pair",
        "seed",
        {**OPS["noise_pair"].example(device=device_of(backend)), "seed": 1.5},
        backend,
    )


def test_the_optimizer_and_the_average():
    net = torch.nn.Linear(2, 2)
    ema = EMA(net)
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(
        ValueError, match="AdamEMA: decays must be a list or tuple of K numbers, or a tensor"
    ):
        AdamEMA(net.parameters(), averages=[ema.module.parameters()], decays=0.5)
    with pytest.raises(ValueError, match="AdamEMA: averages must hold K lists of tensors"):
        AdamEMA(net.parameters(), averages=[0.5], decays=[0.5])
    with pytest.raises(ValueError, match="AdamEMA: clip must be a tensor, got float"):
        AdamEMA(net.parameters()).step(clip=0.5)
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError,
        match="Adam does not support sparse gradients, please consider SparseAdam instead",
    ):
        AdamEMA(embedding.parameters()).step()


@pytest.mark.parametrize("op", ["heun_step", "td_loss", "noise_pair"])
def test_out_of_memory_stays_out_of_memory(backend, op):
    """As torch itself says it, which is what callers that halve their batch look for."""
    if device_of(backend) != "cpu":
        pytest.skip("a GPU's error is tested in bench/gpu/test_large.py")
    wide = torch.zeros(1).expand(1, 2**44)  # 64 TiB of results
    one, six = torch.ones(1, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    calls = {
        "heun_step": lambda: tdkern.heun_step(wide, wide, six, backend=backend),
        "td_loss": lambda: tdkern.td_loss(
            wide.detach().requires_grad_(),
            wide,
            wide,
            torch.ones(1, 8),
            wide,
            wide,
            backend=backend,
        ),
        "noise_pair": lambda: tdkern.noise_pair(
            wide[:, : 2**34], one, one, one, one, seed=1, backend=backend
        ),
    }
    with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate"):
        calls[op]()


@pytest.mark.parametrize("op", OPS)
def test_defaults_of_torch_change_nothing(backend, op):
    arguments = OPS[op].example(device=device_of(backend))
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        results = OPS[op].results(arguments, backend)
        AdamEMA(
            [torch.nn.Parameter(torch.ones(3, device="cpu", dtype=torch.float32))],
            averages=[[torch.ones(3, device="cpu", dtype=torch.float32)]],
            decays=[0.5],
        )
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for actual, expected in zip(
        results, OPS[op].results(OPS[op].example(device=device_of(backend)), backend), strict=True
    ):
        assert actual.device.type == device_of(backend) and torch.equal(actual, expected)


def test_defaults_of_torch_and_the_optimizer():
    param = torch.nn.Parameter(torch.ones(3))
    ema = EMA(torch.nn.Linear(2, 2))
    try:
        torch.set_default_device("meta")
        optimizer = AdamEMA([param], averages=[[torch.ones(3, device="cpu")]], decays=[0.5])
        param.grad = torch.ones(3, device="cpu")
        optimizer.step()
        ema.update(ema.module, 0.5)
    finally:
        torch.set_default_device(None)
    assert optimizer.decays.device.type == "cpu" and (param < 1).all()
