"""ema_update_: every backend against the reference in float64."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tdkern
from helpers.cases import DTYPES, device_of
from helpers.ema_update import DECAYS, LIE, LIE_4D, check, lists, oracle
from tdkern.ops import _backends


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("K", [1, 2, 5])
def test_equals_the_definition(backend, dtypes, K):
    averages, params = lists(dtypes, device_of(backend), K)
    before = copy.deepcopy(params)
    expected = oracle(averages, params, DECAYS[:K])
    tdkern.ema_update_(averages, params, DECAYS[:K], backend=backend)
    check(averages, expected, backend)
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param.nan_to_num(7), old.nan_to_num(7))


@pytest.mark.parametrize("lie", [*LIE, *LIE_4D])
def test_any_layout(backend, lie):
    """Tensors that lie alike are worked on in place, others through copies; what lies between
    elements stays NaN.
    """
    functions = {**LIE, **LIE_4D}[lie]
    averages, params = lists(
        "float32",
        device_of(backend),
        2,
        [(2, 3, 4, 5), (3, 2, 5, 1)] if lie in LIE_4D else [(7, 9), (33,)],
        functions,
    )
    addresses = [avg.data_ptr() for average in averages for avg in average]
    expected = oracle(averages, params, DECAYS[:2])
    tdkern.ema_update_(averages, params, DECAYS[:2], backend=backend)
    check(averages, expected, backend)
    assert addresses == [avg.data_ptr() for average in averages for avg in average]
    if "gaps" in lie:
        assert all(avg._base[..., 1::2].isnan().all() for average in averages for avg in average)


def test_mixed_dtypes_in_one_list(backend):
    averages, params = ([], []), []
    for seed, dtypes in enumerate(DTYPES):
        some, more = lists(dtypes, device_of(backend), 2, [(3, 5), (17,)], seed=seed)
        averages[0].extend(some[0])
        averages[1].extend(some[1])
        params.extend(more)
    params, *averages = (items[::2] + items[1::2] for items in (params, *averages))
    expected = oracle(averages, params, DECAYS[:2])
    tdkern.ema_update_(averages, params, DECAYS[:2], backend=backend)
    check(averages, expected, backend)


def test_decay_0_copies_and_1_keeps(backend):
    averages, params = lists("float64", device_of(backend), 2)
    old = copy.deepcopy(averages)
    tdkern.ema_update_(averages, params, [0.0, 1.0], backend=backend)
    for copied, _, before, param in zip(*averages, old[0], params, strict=True):
        assert torch.equal(copied, torch.where(param.isfinite(), param.detach(), before))
    assert all(torch.equal(*pair) for pair in zip(averages[1], old[1], strict=True))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_decay_0_copies_whatever_the_average_held(backend, dtypes):
    """NaN, infinity, and numbers whose difference from the parameter overflows."""
    net, wide = DTYPES[dtypes]
    largest = torch.finfo(wide).max
    held = torch.tensor(
        [math.nan, math.inf, -math.inf, -largest, 1.0] * 9, dtype=wide, device=device_of(backend)
    )
    param = torch.tensor(
        [1.0, -2.0, 0.0, torch.finfo(net).max, -0.0] * 9, dtype=net, device=device_of(backend)
    )
    averages = [[held.clone(), held[:3].clone()] for _ in range(3)]
    tdkern.ema_update_(averages, [param, param[:3]], [0.0, 0.5, 0.0], backend=backend)
    for k in (0, 2):
        assert torch.equal(averages[k][0], param.to(wide)) and torch.equal(
            averages[k][1], param[:3].to(wide)
        )
        assert averages[k][0][4].signbit().item()


def test_thousands_of_tiny_tensors_and_many_averages(backend):
    """More tensors than one launch's table holds, more averages than its arguments."""
    count = 20 if backend == "triton" and _backends.interpreted() else 400
    averages, params = lists("float32", device_of(backend), 19, [(i % 4,) for i in range(count)])
    decays = [i / 19 for i in range(19)]
    expected = oracle(averages, params, decays)
    tdkern.ema_update_(averages, params, decays, backend=backend)
    check(averages, expected, backend)


def test_nothing_to_do(backend):
    tdkern.ema_update_([], [], [], backend=backend if device_of(backend) == "cpu" else "auto")
    tdkern.ema_update_(
        [[], []], [], [0.5, 0.5], backend=backend if device_of(backend) == "cpu" else "auto"
    )
    _, params = lists("float32", device_of(backend), 1)
    tdkern.ema_update_([], params, [], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decays_as_a_tensor(backend, dtype):
    """On the CPU or on the device, of any stride."""
    device = device_of(backend)
    for where in {"cpu", device}:
        averages, params = lists("float64", device, 2)
        decays = torch.tensor([[0.9, 0.0], [0.25, 0.0]], dtype=dtype, device=where)[:, 0]
        expected = oracle(averages, params, decays.tolist())
        tdkern.ema_update_(averages, params, decays, backend=backend)
        check(averages, expected, backend)


def test_autograd_notices_the_write(backend):
    averages, params = lists("float32", device_of(backend), 1, [(3,)])
    versions = [avg._version for avg in averages[0]]
    tdkern.ema_update_(averages, params, [0.5], backend=backend)
    assert all(avg._version > version for avg, version in zip(averages[0], versions, strict=True))
    assert all(avg.grad_fn is None and not avg.requires_grad for avg in averages[0])


def test_opcheck(compiled):
    averages, params = lists("float32", device_of(compiled), 2, [(3, 5), (0,), (7,)])
    flat = [avg for average in averages for avg in average]
    torch.library.opcheck(
        _backends.op("ema_update_", compiled),
        (flat, [param.detach() for param in params], torch.tensor([0.5, 0.9])),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles(backend):
    averages, params = lists("float32", device_of(backend), 2, [(3, 5), (7,)])
    expected = oracle(averages, params, DECAYS[:2])
    decays = torch.tensor(DECAYS[:2])

    def step(averages, params, decays):
        tdkern.ema_update_(averages, params, decays, backend=backend)
        return averages[0][0] * 2

    doubled = torch.compile(step, fullgraph=True, backend="aot_eager")(averages, params, decays)
    check(averages, expected, backend)
    torch.testing.assert_close(doubled, 2 * averages[0][0])


def run(code: str, **env) -> list:
    package = Path(tdkern.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(package), **env},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_thread_count_and_instruction_set():
    """The same bits on any number of threads; on lesser processors to rounding."""
    code = """
import hashlib, json, os, torch, tdkern
torch.manual_seed(0)
torch.set_num_threads(int(os.environ["THREADS"]))
result = []
for net, wide in (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
):
    params = [torch.randn(n).to(net) for n in (1, 5, 70_000, 0, 333)]
    averages = [[torch.randn(p.shape).to(wide) for p in params] for _ in range(3)]
    tdkern.ema_update_(averages, params, [0.9, 0.2, 0.999], backend="cpp")
    every = torch.cat([avg.double() for average in averages for avg in average])
    result.append((hashlib.sha256(every.numpy().tobytes()).hexdigest(), every[::1001].tolist()))
print(json.dumps(result))
"""
    one = run(code, THREADS="1")
    assert one == run(code, THREADS="3")
    for isa in ("base", "avx2"):
        for (_, some), (_, best) in zip(
            run(code, THREADS="1", TDKERN_CPU_ISA=isa), one, strict=True
        ):
            torch.testing.assert_close(torch.tensor(some), torch.tensor(best), rtol=1e-3, atol=1e-4)


ZEROS = [torch.zeros(2, 3), torch.zeros(4)]
BAD = {
    "decay": (([ZEROS], ZEROS, [1.5]), "decays must be in [0, 1], got [1.5]"),
    "decay NaN": (([ZEROS], ZEROS, [math.nan]), "decays must be in [0, 1], got [nan]"),
    "decays 2-D": (
        ([ZEROS], ZEROS, torch.zeros(1, 1)),
        "decays must be float32 or float64 of shape [K], got torch.float32 of shape [1, 1]",
    ),
    "decays integer": (
        ([ZEROS], ZEROS, torch.zeros(1, dtype=torch.int64)),
        "decays must be float32 or float64 of shape [K], got torch.int64 of shape [1]",
    ),
    "decays count": (
        ([ZEROS], ZEROS, [0.5, 0.5]),
        "decays must hold one decay for each of the 1 averages, got 2",
    ),
    "averages count": (
        ([ZEROS, ZEROS[:1]], ZEROS, [0.5, 0.5]),
        "averages[1] must hold 2 tensors, one for each parameter, got 1",
    ),
    "average shape": (
        ([[ZEROS[0], torch.zeros(5)]], ZEROS, [0.5]),
        "averages[0][1] must have params[1]'s shape [4], got [5]",
    ),
    "average dtype": (
        ([[ZEROS[0], torch.zeros(4).half()]], ZEROS, [0.5]),
        "averages[0][1] must have params[1]'s dtype, or float32 beside a bfloat16 or float16 "
        "parameter, got torch.float16 beside torch.float32",
    ),
    "average dtypes": (
        ([[torch.zeros(2).half()], [torch.zeros(2)]], [torch.zeros(2).half()], [0.5, 0.5]),
        "averages[1][0] must have averages[0][0]'s dtype torch.float16, got torch.float32",
    ),
    "integers": (
        ([[torch.zeros(2, dtype=torch.int64)]], [torch.zeros(2, dtype=torch.int64)], [0.5]),
        "averages[0][0] must have params[0]'s dtype, or float32 beside a bfloat16 or float16 "
        "parameter, got torch.int64 beside torch.int64",
    ),
    "average device": (
        ([[torch.zeros(4, device="meta")]], [torch.zeros(4)], [0.5], "reference"),
        "averages[0][0] must be on cpu, got meta",
    ),
    "param device": (
        ([ZEROS], [ZEROS[0], torch.zeros(4, device="meta")], [0.5], "reference"),
        "params[1] must be on cpu as params[0] is, got meta",
    ),
    "decays device": (
        ([ZEROS], ZEROS, torch.zeros(1, device="meta"), "reference"),
        "decays must be on the CPU or on the parameters' device cpu, got meta",
    ),
    "backend": (
        ([ZEROS], ZEROS, [0.5], "fast"),
        "backend must be one of auto, cuda, triton, cpp, reference, got 'fast'",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    (averages, params, decays, *rest), message = BAD[what]
    for backend in rest or [name for name in ("cpp", "reference") if not _backends.MISSING[name]]:
        with pytest.raises(ValueError) as error:
            tdkern.ema_update_(averages, params, decays, backend=backend)
        assert str(error.value) == f"ema_update_: {message}"
    assert all((zero == 0).all() for zero in ZEROS)


@pytest.mark.parametrize("shape", [(), (0,), (3,)])
def test_triton_takes_scalars_of_the_cpu_to_a_device(shape):
    """None of them too, as adam_ema_'s decays without averages are.

    No copy, which a graph's capture would refuse.
    """
    if _backends.MISSING["triton"]:
        pytest.skip(_backends.MISSING["triton"])
    from tdkern.triton.lists import on_device

    with torch.profiler.profile() as trace:
        there = on_device(torch.ones(shape), torch.device("meta"))
    assert there.shape == shape and there.dtype == torch.float64 and there.is_meta
    assert not any("copy" in event.name for event in trace.events())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_cuda_graph_reads_decays_anew(backend):
    averages, params = lists("float32", "cuda", 2)
    decays = torch.tensor([0.5, 0.9], dtype=torch.float64, device="cuda")
    tdkern.ema_update_(averages, params, decays, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tdkern.ema_update_(averages, params, decays, backend=backend)
    decays.copy_(torch.tensor([0.25, 1.0]))
    expected = oracle(averages, params, [0.25, 1.0])
    graph.replay()
    check(averages, expected, backend)
