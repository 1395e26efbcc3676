"""What holds for every op on every backend: any shapes, strides, dtypes and lists (Hypothesis),
PyTorch's own checks, bad arguments, and memory.
"""

import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tdkern
from helpers import ROOT, adam_ema, aot, ema_update, heun_step
from helpers.cases import (
    BF16,
    CASES,
    CLEAN,
    DTYPES,
    F32,
    F64,
    check,
    device_of,
    inputs,
    oracle,
    with_gradient,
)
from tdkern import reference
from tdkern.losses import EDMLoss, TDEDMLoss
from tdkern.ops import OPS, _backends, adam_ema_, found_inf
from tdkern.ops._dtypes import FLOATS
from tdkern.ops._schemas import SCHEMAS
from tdkern.ops.td_loss import BASES, NORMS
from tdkern.preconditioning import EDM
from tdkern.schedules import two_moment

sys.path.append(str(ROOT / "bench"))
from measure import peak_extra

# NumPy's, of Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# ---- Hypothesis ---------------------------------------------------------------------------------


@st.composite
def lies(draw, ndim: int):
    """How a tensor lies in memory: the order of its dimensions, the distance between elements of
    each, where it begins, what is expanded.
    """
    order = draw(st.permutations(range(ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(ndim)]
    expanded = draw(st.sampled_from([None, None, *range(ndim)]))
    return order, steps, draw(st.integers(0, 3)), expanded


def laid(values, lie, expand=True):
    """The values in that memory, with NaN between them; an expanded dimension has its first element
    everywhere.
    """
    order, steps, begin, expanded = lie
    if expanded is not None and expand and values.shape[expanded] > 0:
        return laid(values.narrow(expanded, 0, 1), lie, expand=False).expand_as(values)
    sizes = [values.shape[d] * steps[d] for d in order]
    memory = torch.full(
        (begin + math.prod(sizes),), math.nan, dtype=values.dtype, device=values.device
    )[begin:].view(sizes)
    view = memory[tuple(slice(None, None, steps[d]) for d in order)] if order else memory
    view = view.permute([order.index(d) for d in range(values.ndim)])
    return view.copy_(values)


shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(
    lambda shape: math.prod(shape) <= 1500
)
short_lists = st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=4)


def for_all(backend, **strategies):
    """Runs the test for examples of the strategies, the same ones every time; few where every one
    is slow.
    """
    count = 60 if backend == "cpp" else 25
    if backend == "triton" and _backends.interpreted():
        count = 6
    limits = settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: limits(given(**strategies)(test))


def drawn(shape, dtype, device, seed):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=F64).to(
        device, dtype
    )


def test_any_td_loss(compiled):
    device = device_of(compiled)

    @for_all(
        compiled,
        data=st.data(),
        shape=shapes,
        dtypes=st.sampled_from(list(DTYPES)),
        base=st.sampled_from(BASES),
        norm=st.sampled_from(NORMS),
        scale=st.sampled_from([1.0, 0.5]),
    )
    def holds(data, shape, dtypes, base, norm, scale):
        net, wide = DTYPES[dtypes]
        norm = {"base_norm": norm, **({"huber_c": 0.03} if norm == "huber" else {})}
        lie = st.one_of(
            st.just(([*range(len(shape))], [1] * len(shape), 0, None)), lies(len(shape))
        )
        sigma = torch.linspace(0.05, 90, shape[0], dtype=F64)
        out, out_target, x0, x_t, x_tp = (
            laid(drawn(shape, dtype, device, i), data.draw(lie))
            for i, dtype in enumerate((net, net, wide, wide, wide))
        )
        args = (
            out.requires_grad_(),
            out_target,
            x0,
            tdkern.td_coef(sigma, backend="reference")[0].to(device),
            x_t,
            x_tp,
        )
        upstream = torch.full((shape[0], 2), scale, dtype=F64)
        got = with_gradient(
            lambda *args: tdkern.td_loss(*args, base=base, **norm, backend=compiled), args, upstream
        )
        plain = with_gradient(lambda *args: reference.td_loss(*args, base, **norm), args, upstream)
        for actual, expected, other in zip(
            got, oracle(args, base, upstream, **norm), plain, strict=True
        ):
            check(
                *(t.reshape(1, -1) for t in (actual, expected, other)),
                truncates=compiled == "triton" and _backends.interpreted() and actual.dtype == BF16,
            )

    holds()


def test_any_noise_pair(compiled):
    """Layout and batch change nothing: the same bits as for a contiguous x0."""
    device = device_of(compiled)

    @for_all(
        compiled,
        data=st.data(),
        shape=shapes,
        dtype=st.sampled_from(FLOATS),
        coupling=st.sampled_from(["markov", "shared"]),
    )
    def holds(data, shape, dtype, coupling):
        x0 = laid(drawn(shape, dtype, device, 0), data.draw(lies(len(shape))))
        columns = [
            laid(
                torch.linspace(low, high, shape[0], dtype=F64).to(device),
                data.draw(lies(1)),
                expand=False,
            )
            for low, high in ((0.9, 0.4), (0.1, 2), (1, 0.8), (0.05, 1))
        ]
        options = {"coupling": coupling, "seed": 3, "offset": 2**40, "backend": compiled}
        for got, plain in zip(
            *(tdkern.noise_pair(x, *columns, **options) for x in (x0, x0.contiguous())), strict=True
        ):
            assert got.shape == x0.shape and torch.equal(got, plain)

    holds()


def test_any_heun_step(compiled):
    device = device_of(compiled)

    @for_all(
        compiled,
        data=st.data(),
        shape=shapes,
        dtypes=st.sampled_from(heun_step.DTYPES),
        x_hat=st.booleans(),
        noise=st.booleans(),
    )
    def holds(data, shape, dtypes, x_hat, noise):
        net, state, net_dtype = dtypes
        tensors = [
            laid(drawn(shape, dtype, device, i), data.draw(lies(len(shape))))
            for i, dtype in enumerate((net, state, state, state))
        ]
        coef = torch.tensor(heun_step.COEF, dtype=F64, device=device)
        args = (
            tensors[0],
            tensors[1],
            coef,
            tensors[2] if x_hat else None,
            tensors[3] if noise else None,
        )
        result = tdkern.heun_step(*args, net_dtype=net_dtype, backend=compiled)
        if math.prod(shape) > 0:
            heun_step.judge(
                *result, args, net_dtype, truncates=compiled == "triton" and _backends.interpreted()
            )

    holds()


def lists_of(data, shapes, dtypes, columns, device):
    """`columns` lists of a tensor a shape, each in a layout of its own; dtypes: of each shape's
    first and other columns.
    """
    return [
        [
            laid(
                drawn(shape, dtypes[i][min(c, 1)], device, 10 * i + c),
                data.draw(lies(len(shape))),
                expand=False,
            )
            for i, shape in enumerate(shapes)
        ]
        for c in range(columns)
    ]


def test_any_ema_update(compiled):
    device = device_of(compiled)

    @for_all(compiled, data=st.data(), shapes=short_lists, K=st.integers(0, 3))
    def holds(data, shapes, K):
        dtypes = [DTYPES[data.draw(st.sampled_from(list(DTYPES)))] for _ in shapes]
        params, *averages = lists_of(data, shapes, dtypes, 1 + K, device)
        decays = [0.999, 0.3, 0.0][:K]
        expected = ema_update.oracle(averages, params, decays)
        tdkern.ema_update_(averages, params, decays, backend=compiled)
        ema_update.check(averages, expected, compiled)

    holds()


def test_any_adam_ema(compiled):
    device = device_of(compiled)

    @for_all(
        compiled,
        data=st.data(),
        shapes=short_lists,
        dtypes=st.sampled_from(list(DTYPES)),
        K=st.integers(0, 2),
        decoupled=st.booleans(),
    )
    def holds(data, shapes, dtypes, K, decoupled):
        net, wide = DTYPES[dtypes]
        columns = lists_of(data, shapes, [(net, net)] * len(shapes), 4, device)
        for tensor in columns[3]:
            tensor.abs_()
        steps = [torch.tensor(1.0 + i, device=device) for i in range(len(shapes))]
        lists = [
            *columns,
            steps,
            lists_of(data, shapes, [(wide, wide)] * len(shapes), K, device),
            [0.9, 0.5][:K],
        ]
        expected = adam_ema.widened(lists)
        adam_ema_(*expected, lr=0.01, decoupled=decoupled, backend="reference")
        adam_ema_(*lists, lr=0.01, decoupled=decoupled, backend=compiled)
        adam_ema.close(lists, expected, compiled)

    holds()


# ---- PyTorch's own checks; each op's own test file has more cases of its own --------------------


def further(op, device):
    """Arguments that an op's example leaves out."""
    if op == "adam_ema_":
        return {"skipped": torch.zeros((), dtype=torch.int64, device=device)}
    return {"net_dtype": BF16} if op == "heun_step" else {}


def overloads_called(op, backend, monkeypatch):
    """(name, arguments) of the overloads that an op's example calls reach, forward and backward."""
    called = []
    call = _backends.call

    def recorded(name, backend, arguments):
        called.append((name, copied(arguments)))
        return call(name, backend, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_backends, "call", recorded)
        for arguments in op.calls(device=device_of(backend)):
            arguments |= further(op.name, device_of(backend))
            if op.differentiable:
                arguments[op.differentiable].requires_grad_()
            results = op.results(arguments, backend)
            if op.differentiable:
                sum(result.sum() * 2 for result in results).backward()
    return called


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_every_op(compiled, op, monkeypatch):
    """Schema, autograd registration, fake tensors and AOT dispatch with dynamic shapes, of every
    overload that there is.
    """
    called = overloads_called(OPS[op], compiled, monkeypatch)
    assert op in {name for name, _ in called}
    for name, arguments in called:
        torch.library.opcheck(_backends.op(name, compiled), arguments)


def test_every_schema_is_of_an_op_that_is_called(monkeypatch):
    if _backends.MISSING["cpp"]:
        pytest.skip(_backends.MISSING["cpp"])
    called = {name for op in OPS.values() for name, _ in overloads_called(op, "cpp", monkeypatch)}
    assert called == SCHEMAS.keys()


@pytest.mark.parametrize("base", BASES)
def test_reference_td_loss_is_differentiable_twice(base):
    """gradcheck and gradgradcheck of the oracle, whose numbers the compiled backends have
    (test_transforms.py).
    """
    F, *rest = (drawn((2, 3), F64, "cpu", i) for i in range(5))
    coef = tdkern.td_coef(torch.tensor([0.7, 3.0], dtype=F64), backend="reference")[0]

    def loss(F):
        return tdkern.td_loss(
            F, rest[0], rest[1], coef, rest[2], rest[3], base=base, backend="reference"
        )

    assert torch.autograd.gradcheck(loss, F.requires_grad_()) and torch.autograd.gradgradcheck(
        loss, F
    )


def test_two_moment_is_differentiable_twice():
    args = [
        torch.tensor([value, value + 0.1], dtype=F64, requires_grad=True)
        for value in (0.5, 0.8, 0.7, 0.3)
    ]
    for eta in (0.0, 0.6, 1.0):
        assert torch.autograd.gradcheck(lambda *a, eta=eta: two_moment(*a, eta=eta), args)
        assert torch.autograd.gradgradcheck(lambda *a, eta=eta: two_moment(*a, eta=eta), args)


# ---- bad arguments: those of one op alone are in its own file -----------------------------------

COLUMN = torch.ones(2, dtype=F64)
SIX = torch.ones(6, dtype=F64)
PAIR = torch.zeros(2, 3)
COEF = torch.ones(2, 8)
META = {dtype: torch.zeros(2, 3, dtype=dtype, device="meta") for dtype in (F32, F64)}
LEVELS = dict.fromkeys(("alpha", "sigma", "alpha_p", "sigma_p"), COLUMN)
CALLS = {
    "td_coef": lambda backend, noise=COLUMN, **kw: tdkern.td_coef(noise, **kw, backend=backend),
    "td_loss": lambda backend, out=PAIR, out_target=PAIR, x0=PAIR, coef=COEF, x_t=PAIR, x_tp=PAIR: (
        tdkern.td_loss(out, out_target, x0, coef, x_t, x_tp, backend=backend)
    ),
    "noise_pair": lambda backend, x0=PAIR, **columns: tdkern.noise_pair(
        x0, **LEVELS | columns, seed=1, backend=backend
    ),
    "heun_step": lambda backend, F=PAIR, x=PAIR, coef=SIX, x_hat=PAIR, noise=PAIR: tdkern.heun_step(
        F, x, coef, x_hat, noise, backend=backend
    ),
    "ema_update_": lambda backend, averages=((PAIR,),), params=(PAIR,), decays=(0.5,): (
        tdkern.ema_update_(
            [list(map(torch.clone, average)) for average in averages],
            params,
            decays,
            backend=backend,
        )
    ),
    "found_inf": lambda backend, grads=(PAIR,): found_inf(list(grads), backend=backend),
    "adam_ema_": lambda backend, grad=PAIR, m=PAIR, average=PAIR, decays=(0.5,), lr=0.1, **kw: (
        adam_ema_(
            [PAIR.clone()],
            [grad],
            [m.clone()],
            [PAIR.clone()],
            [torch.zeros(())],
            [[average.clone()]],
            decays,
            lr=lr,
            **kw,
            backend=backend,
        )
    ),
}
BAD = [  # op, what is wrong, its message
    # values, which are looked at where no device has to be waited for
    (
        "td_coef",
        {"noise": torch.tensor([0.5, -1.0])},
        "noise must be finite and > 0, got values from -1.0 to 0.5",
    ),
    (
        "td_coef",
        {"noise": torch.tensor([0, 3])},
        "noise must be finite and > 0, got values from 0 to 3",
    ),
    (
        "td_coef",
        {"noise": torch.tensor([0.5, math.nan])},
        "noise must be finite and > 0, got values from nan to nan",
    ),
    (
        "td_coef",
        {"noise": torch.tensor([0.5, math.inf])},
        "noise must be finite and > 0, got values from 0.5 to inf",
    ),
    (
        "td_coef",
        {"noise": torch.tensor([math.nan]), "from_index": True},
        "noise must be finite, got values from nan to nan",
    ),
    # tau later than t
    (
        "td_coef",
        {"one_idx": -0.25},
        "one_idx must be a positive number, got -0.25",
    ),
    ("td_coef", {"k_idx": -1.0}, "k_idx must be a positive number, got -1.0"),  # t' later than t
    ("noise_pair", {"sigma": torch.tensor([1.0, -2.0], dtype=F64)}, "sigma must be >= 0, got -2.0"),
    (
        "noise_pair",
        {"sigma_p": torch.tensor([-1.0, 2.0], dtype=F64)},
        "sigma_p must be >= 0, got -1.0",
    ),
    (
        "heun_step",
        {"coef": torch.tensor([-1.0, 0, 0, 0, 0, 0], dtype=F64)},
        "coef[0], which is sigma, must be > 0, got -1.0",
    ),
    (
        "heun_step",
        {"coef": torch.full((6,), math.nan, dtype=F64)},
        "coef[0], which is sigma, must be > 0, got nan",
    ),
    ("ema_update_", {"decays": torch.tensor([1.5])}, "decays must be in [0, 1], got [1.5]"),
    ("ema_update_", {"decays": torch.tensor([math.nan])}, "decays must be in [0, 1], got [nan]"),
    ("adam_ema_", {"decays": torch.tensor([-0.5])}, "decays must be in [0, 1], got [-0.5]"),
    ("adam_ema_", {"lr": -1.0}, "lr must be in [0, inf), got -1.0"),
    ("adam_ema_", {"lr": torch.tensor(math.nan)}, "lr must be in [0, inf), got nan"),
    ("adam_ema_", {"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0"),
    ("adam_ema_", {"betas": (math.nan, 0.9)}, "betas[0] must be in [0, 1), got nan"),
    ("adam_ema_", {"eps": -1e-8}, "eps must be in [0, inf), got -1e-08"),
    ("adam_ema_", {"weight_decay": -0.1}, "weight_decay must be in [0, inf), got -0.1"),
    # dtypes and ranks
    ("td_coef", {"noise": torch.ones(())}, "noise must have shape [B], got []"),
    (
        "td_coef",
        {"noise": torch.ones(2, dtype=torch.complex64)},
        "noise must be of a float dtype or int64, got torch.complex64",
    ),
    (
        "td_coef",
        {"noise": torch.ones(2, dtype=torch.bool)},
        "noise must be of a float dtype or int64, got torch.bool",
    ),
    (
        "found_inf",
        {"grads": [PAIR, PAIR.long()]},
        "grads[1] must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    # devices
    ("td_loss", {"out_target": META[F32]}, "out_target must be on cpu, got meta"),
    (
        "noise_pair",
        {"sigma_p": torch.ones(2, dtype=F64, device="meta")},
        "sigma_p must be on cpu, got meta",
    ),
    ("heun_step", {"F": META[F32]}, "F must be on cpu, got meta"),
    (
        "ema_update_",
        {"params": [PAIR, META[F32]], "averages": [[PAIR, PAIR]]},
        "params[1] must be on cpu as params[0] is, got meta",
    ),
    ("ema_update_", {"averages": [[META[F32]]]}, "averages[0][0] must be on cpu, got meta"),
    (
        "ema_update_",
        {"decays": torch.ones(1, device="meta")},
        "decays must be on the CPU or on the parameters' device cpu, got meta",
    ),
    ("found_inf", {"grads": [PAIR, META[F32]]}, "grads[1] must be on cpu as grads[0] is, got meta"),
    ("adam_ema_", {"grad": META[F32]}, "grads[0] must be on cpu, got meta"),
    ("adam_ema_", {"m": META[F32]}, "exp_avgs[0] must be on cpu, got meta"),
    ("adam_ema_", {"average": META[F32]}, "averages[0][0] must be on cpu, got meta"),
    ("adam_ema_", {"lr": torch.zeros((), device="meta")}, "lr must be on cpu, got meta"),
]


@pytest.mark.parametrize(
    "op, wrong, message", BAD, ids=[f"{op}-{message.split(', got')[0]}" for op, _, message in BAD]
)
def test_bad_arguments(backend, op, wrong, message):
    if device_of(backend) != "cpu":
        pytest.skip("the values are looked at on the CPU alone, and the backend takes none there")
    with pytest.raises(ValueError) as error:
        CALLS[op](backend, **wrong)
    assert str(error.value) == f"{op}: {message}"


@pytest.mark.parametrize("op", CALLS)
def test_good_arguments(backend, op):
    """The calls of the table above, with nothing wrong: what it refuses is what it changes."""
    if device_of(backend) == "cpu":
        CALLS[op](backend)


@pytest.mark.parametrize("column", range(8))
def test_a_nan_coefficient_is_seen_in_the_loss(backend, column):
    """td_loss does not look at its coefficients; a NaN among them that is used makes its sample's
    loss NaN, and no other's.
    """
    device = device_of(backend)
    coef = torch.full((3, 8), 0.5, dtype=F64, device=device)
    coef[1, column] = math.nan
    loss = tdkern.td_loss(
        *(drawn((3, 4), F32, device, i) for i in range(3)),
        coef,
        *(drawn((3, 4), F32, device, i) for i in (3, 4)),
        base="consistency",
        backend=backend,
    ).sum(1)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_ahead_of_time(capability):
    """The kernels that work on flat tensors; the other ops have tests of their own."""
    pytest.importorskip("triton")
    report = {
        name: facts
        for name, facts in aot.report(capability).items()
        if name.startswith(("heun_step", "lists"))
    }
    assert len(report) == 9
    assert all(
        facts["stack"] == facts["local"] == 0 and facts["registers"] <= 128
        for facts in report.values()
    ), report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["several chunks", "odd, l1", "odd, huber"])
def test_td_loss_in_a_cuda_graph(name):
    """Forward and backward in one graph; a replay takes the tensors as they are then."""
    case = CASES[name]
    for backend in ("cuda", "triton"):
        if not _backends.MISSING[backend]:
            args = inputs(name, device="cuda")
            upstream = torch.linspace(0, 2, 2 * case.shape[0], device="cuda").view(-1, 2)
            loss = lambda *a, b=backend: tdkern.td_loss(*a, base=case.base, **case.norm, backend=b)
            with_gradient(loss, args, upstream)  # Triton compiles before the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = with_gradient(loss, args, upstream)
            args[CLEAN].mul_(0.5)
            graph.replay()
            assert all(map(torch.equal, captured, with_gradient(loss, args, upstream)))


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes, norm",
    [
        ("float32", "l2"),
        ("bfloat16 of float32", "l2"),
        ("float32", "l1"),
        ("bfloat16 of float32", "huber"),
    ],
)
def test_the_loss_path_takes_one_dF(compiled, dtypes, norm):
    """Forward and backward, whatever the upstream gradient: the gradient itself, and some numbers a
    sample.
    """
    device, (net, wide) = device_of(compiled), DTYPES[dtypes]
    F, F_p, x0, x_t, x_tp = (
        drawn((4, 3, 32, 32), dtype, device, i)
        for i, dtype in enumerate((net, net, wide, wide, wide))
    )
    coef = tdkern.td_coef(torch.tensor([0.7, 3.0, 90.0, 0.1], dtype=F64, device=device))[0]
    F.requires_grad_()
    for upstream in (torch.ones(4, 2, device=device), torch.rand(4, 2, device=device)):

        def step(upstream=upstream):
            loss = tdkern.td_loss(
                F,
                F_p,
                x0,
                coef,
                x_t,
                x_tp,
                base_norm=norm,
                huber_c=0.03 if norm == "huber" else None,
                backend=compiled,
            )
            return torch.autograd.grad(loss, F, upstream)

        step()
        dF = F.numel() * F.element_size()
        # a GPU's allocations are multiples of 512 bytes
        assert dF <= peak_extra(step, device) <= dF + (2048 if device == "cpu" else 16 * 512)


@pytest.mark.parametrize("loss", [EDMLoss(), TDEDMLoss()], ids=lambda loss: type(loss).__name__)
def test_evaluating_a_loss_takes_one_dF(loss):
    """The same through a loss, with networks whose outputs are there already."""

    class Net:
        preconditioning = EDM(0.5)

        def __init__(self, F):
            self.F = F

        def __call__(self, x, sigma, *, raw, **conditions):
            assert raw
            return self.F

    batch = loss.pair(drawn((4, 3, 16, 16), F32, "cpu", 0))
    net = Net(drawn((4, 3, 16, 16), F32, "cpu", 1).requires_grad_())
    target = Net(drawn((4, 3, 16, 16), F32, "cpu", 2))
    step = lambda: torch.autograd.grad(loss.evaluate(net, target, batch).loss.mean(), net.F)
    step()
    dF = net.F.numel() * 4
    assert dF <= peak_extra(step, "cpu") <= dF + 4096


def test_a_large_output_lies_on_large_pages():
    """A mapping's flags, hg among them, stand in smaps behind its range."""
    if _backends.MISSING["cpp"] or not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        pytest.skip(_backends.MISSING["cpp"] or "this system has no transparent huge pages")
    out = torch.ones(3, 3 * 2**20, requires_grad=True)  # 36 MB
    coef = torch.tensor([[0.0, 1, 0, 1, 1, 1, 0, 1]]).expand(3, 8).contiguous()
    (dF,) = torch.autograd.grad(
        tdkern.td_loss(
            out,
            torch.zeros(()).expand(out.shape),
            torch.zeros(()).expand(out.shape),
            coef,
            backend="cpp",
        ).sum(),
        out,
    )
    assert torch.equal(dF, torch.full_like(dF, 2 / dF[0].numel()))
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= dF.data_ptr() + dF.nbytes // 2 < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags
