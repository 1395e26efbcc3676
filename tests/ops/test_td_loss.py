"""td_loss: every backend against the reference in float64 on the table of hard cases, its
gradient, and its manners as an op.
"""

import gc
import math
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tdkern
from helpers import ROOT, TESTS, aot
from helpers.cases import (
    CASES,
    CLEAN,
    COEF,
    DTYPES,
    F32,
    F64,
    HUBER,
    L1,
    NAMES,
    OUT,
    SMALL,
    TARGET,
    X_T,
    X_TP,
    check,
    device_of,
    inputs,
    oracle,
    rows,
    with_gradient,
)
from tdkern import reference
from tdkern.ops import _backends
from tdkern.ops.td_loss import gradient_like

# NumPy's, of what Triton's interpreter masks out afterwards
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LAYOUTS = (
    "odd",
    "odd, consistency",
    "slices of channels",
    "channels_last of some",
    "batch inside",
    "a silent sample",
    "x0 prediction",
    "no samples",
    "odd, l1",
)


def loss_of(backend, base, **norm):
    return lambda *args: tdkern.td_loss(*args, base=base, **norm, backend=backend)


def judge(backend, name, dtypes, upstream=None, scale=1.0):
    """Both results of a case against the oracle. scale: a factor of both weights."""
    case = CASES[name]
    args = inputs(name, dtypes, device_of(backend))
    args[3][:, 6:] *= scale
    loss, dF = with_gradient(loss_of(backend, case.base, **case.norm), args, upstream)
    expected_loss, expected_dF = oracle(
        args, case.base, None if upstream is None else upstream.to("cpu"), **case.norm
    )
    plain_loss, plain_dF = with_gradient(
        lambda *a: reference.td_loss(*a, case.base, **case.norm), args, upstream
    )
    assert (
        loss.dtype == (F64 if dtypes == "float64" else F32)
        and dF.dtype == args[0].dtype
        and dF.shape == args[0].shape
    )
    assert dF.stride() == gradient_like(args[0]).stride()
    # Every sample by itself, unless it is too few elements to be judged by.
    n = math.prod(case.shape[1:])
    by_sample = (lambda t: t.reshape(len(t), n)) if n > 8 else (lambda t: t.reshape(1, -1))
    by_loss = (lambda t: t.reshape(-1, 1)) if n > 8 else (lambda t: t.T)
    check(*map(by_loss, (loss, expected_loss, plain_loss)))
    check(
        *map(by_sample, (dF, expected_dF, plain_dF)),
        truncates=backend == "triton" and _backends.interpreted() and dF.dtype == torch.bfloat16,
    )


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_td_loss_and_its_gradient(compiled, name, dtypes):
    if CASES[name].large and compiled == "triton" and _backends.interpreted():
        pytest.skip("too large for Triton's interpreter")
    judge(compiled, name, dtypes)


def test_td_loss_reference_is_the_cancelled_form():
    """The oracle itself, against the equations of docs/mathematics.md written out by hand."""
    for name in ("odd", "odd, consistency", "a silent sample"):
        args, base = inputs(name, "float64"), CASES[name].base
        F, F_p, x0, coef, x_t, x_tp = (arg.detach() for arg in args)
        for b, (skip, scale, skip_p, scale_p, A, A_p, w_td, w_base) in enumerate(coef.tolist()):
            e = x0[b] - (skip * x_t[b] + scale * F[b])
            e_p = x0[b] - (skip_p * x_tp[b] + scale_p * F_p[b])
            delta, error = A * e - A_p * e_p, e if base == "denoise" else e - e_p
            loss, dF = oracle(args, base)
            torch.testing.assert_close(
                loss[b],
                torch.stack([w_td * delta.square().mean(), w_base * error.square().mean()]),
                rtol=1e-12,
                atol=0,
            )
            torch.testing.assert_close(
                dF[b],
                -2 * scale / x0[b].numel() * (w_td * A * delta + w_base * error),
                rtol=1e-11,
                atol=1e-13,
            )
            norms = {
                "l1": (error.abs().sum(), error.sign()),
                "huber": ((total := (error.square().sum() + 0.04).sqrt()) - 0.2, error / total),
            }
            for norm, (value, slope) in norms.items():
                loss, dF = oracle(args, base, base_norm=norm, huber_c=0.2)
                torch.testing.assert_close(
                    loss[b, 1], w_base * value / x0[b].numel(), rtol=1e-12, atol=0
                )
                torch.testing.assert_close(
                    dF[b],
                    -scale / x0[b].numel() * (2 * w_td * A * delta + w_base * slope),
                    rtol=1e-11,
                    atol=1e-13,
                )


def test_td_loss_l1_at_its_kink(compiled):
    """Where the error is exactly 0 so is dF; where it is NaN both are NaN, so that a step of it
    can be seen and skipped.
    """
    F = torch.randn(2, 9)
    F_p = F.clone()
    F[1, 3:5] += torch.tensor([1.0, math.nan])
    coef = torch.tensor([0.0, 1, 0, 1, 0, 0, 0, 1]).repeat(2, 1)
    loss, dF = with_gradient(
        lambda *a: tdkern.td_loss(*a, base="consistency", base_norm="l1", backend=compiled),
        [
            t.to(device_of(compiled))
            for t in (F.requires_grad_(), F_p, F.detach().nan_to_num(), coef)
        ],
    )
    assert (loss[0] == 0).all() and loss[1].isnan().tolist() == [False, True]
    torch.testing.assert_close(
        dF.cpu(), torch.tensor([[0.0] * 9, [0, 0, 0, 1 / 9, math.nan, 0, 0, 0, 0]]), equal_nan=True
    )


def test_td_loss_huber_is_that_of_improved_consistency_training(backend):
    """n times the loss is w (sqrt(||b||^2 + c^2) - c), c = 0.00054 sqrt(n); a small error loses
    no digits.
    """
    F, other = (torch.randn(4, 3, 8, 8, device=device_of(backend)) for _ in range(2))
    coef = torch.tensor([0.0, 1, 0, 1, 0, 0, 0, 2], device=F.device).repeat(4, 1)
    c = 0.00054 * 192**0.5
    for target in (other, F + 1e-5 * other):
        loss = tdkern.td_loss(
            F,
            target,
            torch.zeros_like(F),
            coef,
            base="consistency",
            base_norm="huber",
            backend=backend,
        )
        error = (F.double() - target.double()).flatten(1).norm(dim=1)
        if backend != "reference" or target is other:
            torch.testing.assert_close(
                192 * loss[:, 1].double(), 2 * ((error**2 + c**2).sqrt() - c), rtol=1e-5, atol=0
            )


# ---- upstream gradients -------------------------------------------------------------------------


def upstreams(batch):
    mixed = torch.tensor([[1, 1], [2, 2], [0, 1], [1, 0], [0, 0], [-3, 0.5]])[
        torch.arange(batch) % 6
    ]
    return {
        "zeros": torch.zeros(batch, 2),
        "halves": torch.full((batch, 2), 0.5),
        "base alone": torch.tensor([0.0, 1.0]).expand(batch, 2),
        "mixed": mixed,
        "differing": torch.linspace(0.3, 4, batch)[:, None].expand(batch, 2),
        "large": torch.full((batch, 2), 65536.0),
    }


@pytest.mark.parametrize("dtypes", ["float32", "float64", "float16", "bfloat16 of float32"])
@pytest.mark.parametrize("kind", upstreams(1))
@pytest.mark.parametrize("name", ["odd", "odd, consistency"])
def test_td_loss_upstream(compiled, name, kind, dtypes):
    judge(compiled, name, dtypes, upstreams(CASES[name].shape[0])[kind].to(device_of(compiled)))


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "several chunks",
        "channels_last of some",
        "slices of channels",
        "batch inside of one",
        "a silent sample",
        "x0 prediction",
        "odd, l1",
        "odd, huber",
        "several chunks, l1",
        "several chunks, huber",
        "a silent sample, l1",
        "a silent sample, huber",
    ],
)
def test_td_loss_upstream_in_every_layout(compiled, name, dtypes):
    judge(
        compiled,
        name,
        dtypes,
        upstreams(CASES[name].shape[0])["mixed"].flip(0).to(device_of(compiled)),
    )


def test_td_loss_upstream_lifts_what_half_precision_would_lose(compiled):
    """dF for an upstream gradient of 1 is below float16's least number; the loss scale is
    applied before it is rounded.
    """
    args = inputs("odd", "float16", device_of(compiled))
    args[COEF][:, 6:] *= 1e-6
    assert with_gradient(loss_of(compiled, "denoise"), args)[1].abs().max() < 2e-7
    judge(
        compiled,
        "odd",
        "float16",
        torch.full((5, 2), 65536.0, device=device_of(compiled)),
        scale=1e-6,
    )


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_td_loss_upstream_of_one_leaves_what_forward_wrote(compiled, dtypes):
    args = [arg.detach() for arg in inputs("odd", dtypes, device_of(compiled))]
    marked = torch.full_like(args[0], 7.0)
    upstream = torch.ones(5, 2, device=marked.device)
    upstream[3] = 0
    _backends.op("td_loss_backward_", compiled)(marked, upstream, *args, False, False)
    assert (marked[[0, 1, 2, 4]] == 7).all() and (marked[3] == 0).all()


@pytest.mark.parametrize("name", ["odd", "channels_last of some"])
def test_td_loss_backward_twice(compiled, name):
    args = inputs(name, device=device_of(compiled))
    loss = loss_of(compiled, CASES[name].base)(*args)
    upstream = upstreams(len(loss))["mixed"].to(loss)
    (first,) = torch.autograd.grad(loss, args[0], upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, args[0], upstream, retain_graph=True)
    (other,) = torch.autograd.grad(loss, args[0], 2 * upstream)
    assert (
        torch.equal(first, second)
        and torch.equal(first, kept)
        and first.data_ptr() != second.data_ptr()
    )
    torch.testing.assert_close(other, 2 * kept)


def test_td_loss_of_part_of_the_loss(compiled):
    """A column or a sample that is not used has an upstream gradient of 0."""
    args = inputs("odd", device=device_of(compiled))
    for take in (lambda loss: loss[:, 0].sum(), lambda loss: loss[2:4].sum()):
        _, dF = with_gradient(lambda *a, take=take: take(loss_of(compiled, "denoise")(*a)), args)
        _, plain = with_gradient(
            lambda *a, take=take: take(loss_of("reference", "denoise")(*a)), args
        )
        torch.testing.assert_close(dF, plain, rtol=1e-4, atol=1e-6)


# ---- what must not be touched -------------------------------------------------------------------


def poisoned(args, which, at, value):
    return tuple(
        arg
        if i not in which or arg is None
        else arg.detach()
        .index_fill(0, torch.tensor(at, device=arg.device), value)
        .requires_grad_(i == 0)
        for i, arg in enumerate(args)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_td_loss_reads_no_target_without_td(backend, value):
    """denoise, w_td = 0: out_target and x_tp may hold anything. Mixed validity: samples 1 and 3
    are invalid.
    """
    args = inputs("odd", device=device_of(backend))
    clean, poison = (
        with_gradient(loss_of(backend, "denoise"), a)
        for a in (args, poisoned(args, (TARGET, X_TP), [1, 3], value))
    )
    assert torch.equal(clean[0], poison[0]) and torch.equal(clean[1], poison[1])


@pytest.mark.parametrize(
    ("base", "norm"),
    [("denoise", {}), ("consistency", {}), ("consistency", L1), ("consistency", HUBER)],
)
def test_td_loss_reads_nothing_of_a_silent_sample(backend, base, norm):
    args = inputs("a silent sample", device=device_of(backend))
    loss, dF = with_gradient(
        loss_of(backend, base, **norm),
        poisoned(args, (OUT, TARGET, CLEAN, X_T, X_TP), [1, 2], math.nan),
    )
    assert (loss[1:3] == 0).all() and (dF[1:3] == 0).all()
    clean = with_gradient(loss_of(backend, base, **norm), args)
    assert torch.equal(loss, clean[0]) and torch.equal(dF, clean[1])


def test_td_loss_coef_of_a_term_that_is_off(compiled):
    """denoise, w_td = 0: skip', scale', A and A' may be NaN."""
    args = inputs("odd", device=device_of(compiled))
    bad = args[COEF].clone()
    bad[[1, 3], 2:6] = math.nan
    clean, poison = (
        with_gradient(loss_of(compiled, "denoise"), [*args[:3], coef, *args[4:]])
        for coef in (args[COEF], bad)
    )
    assert torch.equal(clean[0], poison[0]) and torch.equal(clean[1], poison[1])


@pytest.mark.parametrize(
    ("base", "norm"), [("denoise", {}), ("consistency", {}), ("denoise", L1), ("denoise", HUBER)]
)
@pytest.mark.parametrize("term", [0, 1])
def test_td_loss_term_of_weight_zero_is_zero_for_a_nan_error(backend, base, norm, term):
    args = poisoned(inputs("all valid", device=device_of(backend)), (OUT,), [2], math.nan)
    args[COEF][:, 6 + term] = 0
    loss = loss_of(backend, base, **norm)(*args).detach()
    assert (loss[:, term] == 0).all() and loss[:, 1 - term].isnan().tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_td_loss_upstream_zero_skips_a_nan_term(compiled):
    """A NaN in the target reaches no gradient of the base loss: upstream 0 leaves the TD term
    out.
    """
    args = inputs("all valid", device=device_of(compiled))
    upstream = torch.tensor([0.0, 1.0], device=device_of(compiled)).repeat(5, 1)
    _, clean = with_gradient(loss_of(compiled, "denoise"), args, upstream)
    _, dF = with_gradient(
        loss_of(compiled, "denoise"), poisoned(args, (TARGET,), [0, 4], math.nan), upstream
    )
    assert torch.equal(clean, dF) and clean.abs().sum() > 0


def test_td_loss_upstream_zero_gives_zero_for_a_nan_sample(compiled):
    args = poisoned(inputs("all valid", device=device_of(compiled)), (OUT,), [2], math.nan)
    _, dF = with_gradient(
        loss_of(compiled, "denoise"),
        args,
        torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0])[:, None].repeat(1, 2),
    )
    assert (
        (dF[2] == 0).all()
        and dF.isfinite().all()
        and (dF[[0, 1, 3, 4]].flatten(1).norm(dim=1) > 0).all()
    )


PROTECTED = """
import ctypes, mmap, sys
import torch
from helpers.cases import COEF, TARGET, X_TP, inputs, with_gradient
import tdkern

def unreadable(tensor):
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    held = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    address = ctypes.c_void_p(held.data_ptr())
    assert ctypes.CDLL(None).mprotect(address, mmap.PAGESIZE, 0) == 0  # PROT_NONE
    return held

args = list(inputs("none valid"))
loss = lambda *a: tdkern.td_loss(*a, backend=sys.argv[1])
upstream = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 3.0], [0.0, 0.0]])
expected = with_gradient(loss, args, upstream)
args[TARGET], args[X_TP] = unreadable(args[TARGET]), unreadable(args[X_TP])
actual = with_gradient(loss, args, upstream)
assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
args[COEF][:, 6:] = 0
args = [arg if i == COEF else unreadable(arg).requires_grad_(i == 0) for i, arg in enumerate(args)]
zero = with_gradient(loss, args, upstream)
assert (zero[0] == 0).all() and (zero[1] == 0).all()
print("done")
"""


def test_td_loss_reads_only_what_it_needs(compiled):
    """Targets of samples without TD, and all of silent samples, on pages that cannot be read."""
    if device_of(compiled) != "cpu":
        pytest.skip("pages are protected on the CPU only")
    env = {**os.environ, "PYTHONPATH": f"{TESTS}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", PROTECTED, compiled], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and done.stdout == "done\n", (
        done.stderr or f"ended by signal {-done.returncode}"
    )


def test_td_loss_inputs_stay_as_they_were(compiled):
    for name in ("odd", "channels_last of some"):
        args = inputs(name, device=device_of(compiled))
        copies = [arg.detach().clone() for arg in args]
        with_gradient(
            loss_of(compiled, CASES[name].base), args, torch.full((args[0].shape[0], 2), 3.0)
        )
        assert all(torch.equal(arg.detach(), copy) for arg, copy in zip(args, copies, strict=True))


# ---- autograd -----------------------------------------------------------------------------------


def test_td_loss_gradient_to_nothing_but_out(backend):
    args = inputs("odd", device=device_of(backend))
    others = [arg.requires_grad_() for arg in args[1:]]
    grads = torch.autograd.grad(
        loss_of(backend, "consistency")(*args).sum(), [args[0], *others], allow_unused=True
    )
    assert grads[0] is not None and grads[1:] == (None,) * 5
    args[0].requires_grad_(False)
    assert not loss_of(backend, "consistency")(*args).requires_grad


@pytest.mark.parametrize(
    ("base", "norm"),
    [("denoise", {}), ("consistency", {}), ("consistency", L1), ("consistency", HUBER)],
)
def test_td_loss_gradcheck(compiled, base, norm):
    args = [
        arg.detach()[:3].flatten(1)[:, :2] for arg in inputs("odd", "float64", device_of(compiled))
    ]
    args[COEF] = inputs("odd", "float64", device_of(compiled))[COEF][:3]
    assert torch.autograd.gradcheck(
        lambda F: loss_of(compiled, base, **norm)(F, *args[1:]),
        args[0].contiguous().requires_grad_(),
        atol=1e-6,
    )


def test_td_loss_second_derivative_of_the_op_itself(compiled):
    """The formula that torch.library has of it is differentiated again, too, as the Python
    API's is (test_transforms.py).
    """
    args = inputs("odd", "float64", device_of(compiled))
    losses = (
        _backends.op("td_loss", compiled)(*args, False, False, True)[0],
        loss_of("reference", "denoise")(*args),
    )
    results = []
    for loss in losses:
        (dF,) = torch.autograd.grad(loss.sum(), args[0], create_graph=True)
        results.append(torch.autograd.grad(dF.square().sum(), args[0])[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert results[0].abs().max() > 0


def test_td_loss_graph_is_freed_without_the_collector(compiled):
    args = inputs("odd", device=device_of(compiled))
    gc.collect()
    gc.disable()
    try:
        for loss in (
            loss_of(compiled, "denoise")(*args),
            _backends.op("td_loss", compiled)(*args, False, False, True)[0],
        ):
            node = weakref.ref(loss.grad_fn)
            del loss
        assert node() is None
        loss = loss_of(compiled, "denoise")(*args)
        node = weakref.ref(loss.grad_fn)
        loss.sum().backward()
        del loss
        assert node() is None
    finally:
        gc.enable()


class Calls(TorchDispatchMode):
    """The calls of tdkern's ops as (overload, arguments)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tdkern":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def test_td_loss_computes_a_gradient_only_where_one_is_wanted(compiled):
    args = inputs("odd", device=device_of(compiled))
    with Calls() as calls:
        with torch.no_grad():
            quiet = loss_of(compiled, "denoise")(*args)
        loss_of(compiled, "denoise")(args[0].detach(), *args[1:])
        loss = loss_of(compiled, "denoise")(*args)
    op = _backends.op("td_loss", compiled)
    assert [func for func, _ in calls.seen] == [op] * 3 and [
        arguments[-1] for _, arguments in calls.seen
    ] == [False, False, True]
    assert not quiet.requires_grad and loss.requires_grad and torch.equal(quiet, loss)
    dF = op(*args, False, False, False)[1]
    assert dF.shape == (0,)


# ---- the op under PyTorch's own checks, and compiled --------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_td_loss_opcheck(compiled, name):
    args = inputs(name, device=device_of(compiled))
    kind = (CASES[name].base == "consistency", CASES[name].norm == L1)
    torch.library.opcheck(_backends.op("td_loss", compiled), (*args, *kind, True))
    loss, dF = _backends.op("td_loss", compiled)(
        *(None if arg is None else arg.detach() for arg in args), *kind, True
    )
    inner = (
        dF,
        upstreams(len(loss))["mixed"].to(loss),
        *(None if arg is None else arg.detach() for arg in args),
        *kind,
    )
    torch.library.opcheck(_backends.op("td_loss_backward_", compiled), inner)


def test_td_loss_opcheck_half_precision_and_no_gradient(compiled):
    args = inputs("odd", "bfloat16 of float32", device_of(compiled))
    torch.library.opcheck(
        _backends.op("td_loss", compiled),
        (*args, False, False, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        _backends.op("td_loss", compiled),
        (*args, False, False, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    "name", [*(name for name in LAYOUTS if name != "no samples"), "odd, huber"]
)
def test_td_loss_in_torch_compile(compiled, name):
    torch._dynamo.reset()
    loss = loss_of(compiled, CASES[name].base, **CASES[name].norm)
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for upstream in (None, upstreams(CASES[name].shape[0])["mixed"]):
        args = inputs(name, device=device_of(compiled))
        eager, other = with_gradient(loss, args, upstream), with_gradient(traced, args, upstream)
        assert (
            torch.equal(eager[0], other[0])
            and torch.equal(eager[1], other[1])
            and eager[1].stride() == other[1].stride()
        )


def test_td_loss_in_torch_compile_with_dynamic_shapes(compiled):
    torch._dynamo.reset()
    loss = loss_of(compiled, "denoise")
    traced = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        with_gradient(traced, inputs("odd", device=device_of(compiled)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("all valid", "a silent sample", "image"):
            args = inputs(name, device=device_of(compiled))
            eager, other = with_gradient(loss, args), with_gradient(traced, args)
            assert torch.equal(eager[0], other[0]) and torch.equal(eager[1], other[1])


@pytest.mark.skipif(
    shutil.which("g++") is None and not torch.cuda.is_available(),
    reason="torch.compile's default backend needs a compiler",
)
def test_td_loss_in_torch_compile_in_the_middle_of_a_graph(compiled):
    """With PyTorch's default compiler, what comes before and after the op fused by it."""
    torch._dynamo.reset()
    F, *rest = inputs("odd", device=device_of(compiled))

    def step(F):
        return (tdkern.td_loss(F.tanh() * 2, *rest, backend=compiled).sum(1) * 3).mean()

    eager, other = (with_gradient(fn, (F,)) for fn in (step, torch.compile(step, fullgraph=True)))
    torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-7)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "several chunks"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_td_loss_twice_is_bit_equal(compiled, name, dtypes):
    args = inputs(name, dtypes, device_of(compiled))
    upstream = upstreams(CASES[name].shape[0])["mixed"]
    first, second = (
        with_gradient(loss_of(compiled, CASES[name].base), args, upstream) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_td_loss_sample_does_not_depend_on_its_batch(compiled):
    args = inputs("odd", device=device_of(compiled))
    loss, dF = with_gradient(loss_of(compiled, "denoise"), args)
    one = with_gradient(
        loss_of(compiled, "denoise"),
        [arg.detach()[2:3].requires_grad_(i == 0) for i, arg in enumerate(args)],
    )
    assert torch.equal(loss[2:3], one[0]) and torch.equal(dF[2:3], one[1])


@pytest.mark.parametrize("name", ["odd", "several chunks", "a million and one"])
def test_td_loss_does_not_depend_on_threads(name):
    if _backends.MISSING["cpp"] and not (_backends.LIB_DIR / "libtdkern_cpu.so").exists():
        pytest.skip(_backends.MISSING["cpp"])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                with_gradient(
                    loss_of("cpp", CASES[name].base),
                    inputs(name),
                    upstreams(CASES[name].shape[0])["mixed"],
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][i], other[i]) for other in results[1:] for i in (0, 1))


# ---- bad arguments ------------------------------------------------------------------------------

GOOD = {
    "out": (2, 3, 4),
    "out_target": (2, 3, 4),
    "x0": (2, 3, 4),
    "coef": (2, 8),
    "x_t": (2, 3, 4),
    "x_tp": (2, 3, 4),
}
BESIDE = "x0 must have out's dtype, or float32 beside a bfloat16 or float16 out, got"
BAD = {
    "a scalar": (dict.fromkeys(GOOD, torch.zeros(())), "out must have shape [B, ...], got []"),
    "x0 of another dtype": (
        {"x0": torch.zeros(2, 3, 4, dtype=torch.float16)},
        f"{BESIDE} torch.float16 beside torch.float32",
    ),
    "integers": (
        dict.fromkeys(GOOD, torch.zeros(2, 3, 4, dtype=torch.int64)),
        f"{BESIDE} torch.int64 beside torch.int64",
    ),
    "a target of another shape": (
        {"out_target": torch.zeros(2, 6, 4)},
        "out_target must have out's shape [2, 3, 4], got [2, 6, 4]",
    ),
    "x0 to be broadcast": (
        {"x0": torch.zeros(1, 3, 4)},
        "x0 must have out's shape [2, 3, 4], got [1, 3, 4]",
    ),
    "x_t with a dimension more": (
        {"x_t": torch.zeros(2, 3, 4, 1)},
        "x_t must have out's shape [2, 3, 4], got [2, 3, 4, 1]",
    ),
    "x_tp of another batch": (
        {"x_tp": torch.zeros(3, 3, 4)},
        "x_tp must have out's shape [2, 3, 4], got [3, 3, 4]",
    ),
    "a target of another dtype": (
        {"out_target": torch.zeros(2, 3, 4, dtype=torch.float16)},
        "out_target must be torch.float32, got torch.float16",
    ),
    "x_t of another dtype": (
        {"x_t": torch.zeros(2, 3, 4, dtype=F64)},
        "x_t must be torch.float32, got torch.float64",
    ),
    "coef of three columns": (
        {"coef": torch.zeros(2, 3)},
        "coef must have shape [2, 8], got [2, 3]",
    ),
    "coef of another batch": (
        {"coef": torch.zeros(3, 8)},
        "coef must have shape [2, 8], got [3, 8]",
    ),
    "coef with a dimension more": (
        {"coef": torch.zeros(2, 8, 1)},
        "coef must have shape [2, 8], got [2, 8, 1]",
    ),
    "coef of integers": (
        {"coef": torch.zeros(2, 8, dtype=torch.int64)},
        "coef must be float32 or float64, got torch.int64",
    ),
    "x_t elsewhere": ({"x_t": torch.zeros(2, 3, 4, device="meta")}, "x_t must be on cpu, got meta"),
    "coef elsewhere": ({"coef": torch.zeros(2, 8, device="meta")}, "coef must be on cpu, got meta"),
    "no such base": ({"base": "eps"}, "base must be one of denoise, consistency, got 'eps'"),
    "no such norm": ({"base_norm": "l3"}, "base_norm must be one of l2, l1, huber, got 'l3'"),
    "huber_c of another norm": (
        {"huber_c": 0.1},
        "huber_c must be None with base_norm 'l2', got 0.1",
    ),
    "huber_c of 0": (
        {"base_norm": "huber", "huber_c": 0.0},
        "huber_c must be a positive number, got 0.0",
    ),
    "huber, coef of three columns": (
        {"base_norm": "huber", "coef": torch.zeros(2, 3)},
        "coef must have shape [2, 8], got [2, 3]",
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_td_loss_bad_arguments(backend, what, grad):
    device = device_of(backend)
    wrong, message = BAD[what]
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | wrong
    arguments = {
        name: a.to(device) if isinstance(a, torch.Tensor) and a.device.type == "cpu" else a
        for name, a in arguments.items()
    }
    if arguments["out"].dtype.is_floating_point:
        arguments["out"].requires_grad_(grad)
    with pytest.raises(ValueError) as error:
        tdkern.td_loss(**arguments, backend=backend)
    assert str(error.value).replace("cuda:0", "cpu") == f"td_loss: {message}"


# ---- Triton -------------------------------------------------------------------------------------


def test_td_loss_triton_copies_only_what_lies_otherwise():
    if _backends.MISSING["triton"]:
        pytest.skip(_backends.MISSING["triton"])
    from tdkern.triton.td_loss import _rows

    for name in SMALL:
        if CASES[name].shape[0] > 1:
            out, *_ = inputs(name)
            layout = torch.empty_like(out)
            for key, arg in zip(NAMES, (out, *inputs(name)[1:3], *inputs(name)[4:]), strict=True):
                if arg is not None:
                    same = all(
                        size == 1 or a == b
                        for size, a, b in zip(
                            out.shape[1:], arg.stride()[1:], layout.stride()[1:], strict=True
                        )
                    )
                    kept, row = _rows(arg, layout)
                    assert (kept is arg) == same, (name, key)
                    assert torch.equal(kept, arg) and row == kept.stride(0)
    assert _rows(rows(torch.ones(2, 3, 5)), torch.ones(2, 3, 5))[1] == 30


@pytest.mark.xdist_group("ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_td_loss_triton_ahead_of_time(capability):
    """Every kernel compiles to a cubin for the architecture, without a GPU, and spills nothing."""
    pytest.importorskip("triton")
    report = {name: facts for name, facts in aot.report(capability).items() if "td_loss" in name}
    assert len(report) == 9
    assert all(facts["stack"] == 0 and facts["local"] == 0 for facts in report.values()), report
    assert all(facts["registers"] <= 128 or "float64" in name for name, facts in report.items()), (
        report
    )
