"""heun_step: every backend against the reference in float64, algorithm 2 by hand, and its manners
as an op.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tdkern
from helpers.cases import (
    BF16,
    F16,
    F32,
    F64,
    device_of,
)
from helpers.heun_step import CASES, COEF, DTYPES, KINDS, inputs, judge
from tdkern.ops import _backends

# NumPy's, of what Triton's interpreter masks out afterwards
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtypes",
    DTYPES,
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
@pytest.mark.parametrize("name", CASES)
def test_heun_step(compiled, name, dtypes, kind):
    if (
        compiled == "triton"
        and _backends.interpreted()
        and name not in ("odd", "misaligned")
        and dtypes not in (DTYPES[0], DTYPES[5])
    ):
        pytest.skip(
            "the interpreter takes its time: every layout with two dtypes, every dtype with two "
            "layouts"
        )
    args = inputs(name, kind, dtypes, device_of(compiled))
    copies = [arg if arg is None else arg.clone() for arg in args]
    x_next, net_input = tdkern.heun_step(*args, net_dtype=dtypes[2], backend=compiled)
    judge(
        x_next,
        net_input,
        args,
        dtypes[2],
        truncates=compiled == "triton" and _backends.interpreted(),
    )
    assert all(
        arg is copy or torch.equal(arg, copy) for arg, copy in zip(args, copies, strict=True)
    )


@pytest.mark.parametrize("net", [F32, F64, BF16, F16])
@pytest.mark.parametrize("net_dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("state", [F32, F64])
def test_heun_step_every_combination_of_dtypes(compiled, net, state, net_dtype):
    args = inputs(dtypes=(net, state, net_dtype), device=device_of(compiled))
    judge(
        *tdkern.heun_step(*args, net_dtype=net_dtype, backend=compiled),
        args,
        net_dtype,
        truncates=compiled == "triton" and _backends.interpreted(),
    )


def test_heun_step_is_algorithm_2(backend):
    """Two calls against lines 6 to 11 of the algorithm, then line 6 of the next step."""
    random = torch.Generator().manual_seed(1)
    F, F_p, x_hat, noise = torch.randn(4, 3, 8, generator=random, dtype=F64).to(device_of(backend))
    sigma_data, sigma_hat, sigma_next, raised, S_noise = 0.5, 5.0, 2.0, 2.6, 1.007

    def numbers(sigma, behind, churn=0.0):
        total = sigma**2 + sigma_data**2
        return torch.tensor(
            [
                sigma,
                sigma_data**2 / total,
                sigma * sigma_data / total**0.5,
                sigma_next - sigma_hat,
                churn,
                (behind**2 + sigma_data**2) ** -0.5,
            ],
            dtype=F64,
            device=F.device,
        )

    def denoised(x, F, sigma):
        total = sigma**2 + sigma_data**2
        return sigma_data**2 / total * x + sigma * sigma_data / total**0.5 * F

    d = (x_hat - denoised(x_hat, F, sigma_hat)) / sigma_hat
    euler = x_hat + (sigma_next - sigma_hat) * d
    d_p = (euler - denoised(euler, F_p, sigma_next)) / sigma_next
    x = x_hat + (sigma_next - sigma_hat) * (d + d_p) / 2
    churn = S_noise * (raised**2 - sigma_next**2) ** 0.5

    x_next, net_input = tdkern.heun_step(
        F, x_hat, numbers(sigma_hat, sigma_next), net_dtype=F64, backend=backend
    )
    torch.testing.assert_close(x_next, euler, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        net_input, euler / (sigma_next**2 + sigma_data**2) ** 0.5, rtol=1e-13, atol=1e-13
    )
    corrected, net_input = tdkern.heun_step(
        F_p,
        x_next,
        numbers(sigma_next, raised, churn),
        x_hat,
        noise,
        net_dtype=F64,
        backend=backend,
    )
    torch.testing.assert_close(corrected, x + churn * noise, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        net_input, (x + churn * noise) / (raised**2 + sigma_data**2) ** 0.5, rtol=1e-13, atol=1e-13
    )


def test_heun_step_takes_a_row_of_a_table(backend):
    """Also a row whose numbers do not lie side by side."""
    F, x, coef, *rest = inputs(device=device_of(backend))
    table = torch.stack(
        [torch.full_like(coef, float("nan")), coef, torch.full_like(coef, float("nan"))]
    )
    expected = tdkern.heun_step(F, x, coef, *rest, net_dtype=F32, backend=backend)
    for row in (table[1], table.T.contiguous().T[1]):
        assert all(
            map(
                torch.equal,
                tdkern.heun_step(F, x, row, *rest, net_dtype=F32, backend=backend),
                expected,
            )
        )


def test_heun_step_has_no_gradient(backend):
    args = [arg.requires_grad_() for arg in inputs(device=device_of(backend))]
    assert not any(
        out.requires_grad for out in tdkern.heun_step(*args, net_dtype=F32, backend=backend)
    )


@pytest.mark.parametrize(
    "name", ["odd", "no samples", "slices of channels", "batch inside", "channels_last of some"]
)
def test_heun_step_opcheck(compiled, name):
    for kind, net_dtype in (("euler", BF16), ("correction, noise", None)):
        args = (*inputs(name, kind, device=device_of(compiled)), net_dtype)
        torch.library.opcheck(
            _backends.op("heun_step", compiled), args, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("net_dtype", [F32, None])
def test_heun_step_in_torch_compile(compiled, net_dtype):
    torch._dynamo.reset()

    def step(*args):
        x_next, net_input = tdkern.heun_step(
            args[0].tanh(), *args[1:], net_dtype=net_dtype, backend=compiled
        )
        return x_next * 2, net_input

    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    for name in ("odd", "channels_last of some", "slices of channels"):
        args = inputs(name, device=device_of(compiled))
        for eager, other in zip(step(*args), traced(*args), strict=True):
            assert eager is other is None or (
                torch.equal(eager, other) and eager.stride() == other.stride()
            )


def test_heun_step_does_not_depend_on_threads():
    if _backends.MISSING["cpp"] and not (_backends.LIB_DIR / "libtdkern_cpu.so").exists():
        pytest.skip(_backends.MISSING["cpp"])
    threads, results = torch.get_num_threads(), []
    random = torch.Generator().manual_seed(0)
    F, x, x_hat, noise = torch.randn(4, 1_000_001, generator=random, dtype=F64)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                tdkern.heun_step(
                    F.float(),
                    x,
                    torch.tensor(COEF, dtype=F64),
                    x_hat,
                    noise,
                    net_dtype=BF16,
                    backend="cpp",
                )
            )
    finally:
        torch.set_num_threads(threads)
    judge(*results[0], (F.float(), x, torch.tensor(COEF, dtype=F64), x_hat, noise), BF16)
    assert all(torch.equal(results[0][i], other[i]) for other in results[1:] for i in (0, 1))


def test_heun_step_on_lesser_processors():
    """Each instruction set's kernels give what the best one gives, to rounding."""
    code = """
import json, torch, tdkern
torch.manual_seed(0)
coef, result = torch.tensor([2.0, 0.06, 0.48, -0.7, 0.9, 0.37], dtype=torch.float64), []
for state in (torch.float32, torch.float64):
    for net in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        F, x, x_hat, noise = (torch.randn(5, 3, 7, 5, dtype=torch.float64) for _ in range(4))
        states = x.to(state), coef, x_hat.to(state), noise.to(state)
        out = tdkern.heun_step(F.to(net), *states, net_dtype=net, backend="cpp")
        result.append([tensor.double().flatten().tolist() for tensor in out])
print(json.dumps(result))
"""
    root = str(Path(tdkern.__file__).parent.parent)

    def run(**env):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=root,
            env={"PATH": "", "PYTHONPATH": root, **env},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    most = run()
    for isa in ("base", "avx2"):
        for i, (best, lesser) in enumerate(zip(most, run(TDKERN_CPU_ISA=isa), strict=True)):
            state, net = (1e-6, 1e-14)[i // 4], (2e-6, 1e-14, 8e-3, 1e-3)[i % 4]
            torch.testing.assert_close(
                torch.tensor(lesser[0], dtype=F64),
                torch.tensor(best[0], dtype=F64),
                rtol=state,
                atol=state,
            )
            torch.testing.assert_close(
                torch.tensor(lesser[1], dtype=F64),
                torch.tensor(best[1], dtype=F64),
                rtol=max(state, net),
                atol=state,
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_heun_step_in_a_cuda_graph():
    """A replay takes the numbers that coef has then."""
    for backend in ("cuda", "triton"):
        if not _backends.MISSING[backend]:
            args = inputs(device="cuda")
            step = lambda args=args, backend=backend: tdkern.heun_step(
                *args, net_dtype=BF16, backend=backend
            )
            step()  # Triton compiles before the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            for factor in (1.0, 0.5):
                args[2].mul_(factor)
                graph.replay()
                assert all(map(torch.equal, captured, step()))


# ---- bad arguments ------------------------------------------------------------------------------

GOOD = {"F": (2, 3, 4), "x": (2, 3, 4), "x_hat": (2, 3, 4), "noise": (2, 3, 4)}
BAD = {
    "x of half precision": (
        {"x": torch.zeros(2, 3, 4, dtype=BF16)},
        "x must be one of float32, float64, got torch.bfloat16",
    ),
    "F of integers": (
        {"F": torch.zeros(2, 3, 4, dtype=torch.int64)},
        "F must be one of float32, float64, bfloat16, float16, got torch.int64",
    ),
    "net_dtype of integers": (
        {"net_dtype": torch.int8},
        "net_dtype must be None or one of float32, float64, bfloat16, float16, got torch.int8",
    ),
    "F of another shape": (
        {"F": torch.zeros(2, 6, 4)},
        "F must have x's shape [2, 3, 4], got [2, 6, 4]",
    ),
    "x_hat to be broadcast": (
        {"x_hat": torch.zeros(1, 3, 4)},
        "x_hat must have x's shape [2, 3, 4], got [1, 3, 4]",
    ),
    "noise of a dimension more": (
        {"noise": torch.zeros(2, 3, 4, 1)},
        "noise must have x's shape [2, 3, 4], got [2, 3, 4, 1]",
    ),
    "x_hat of another dtype": (
        {"x_hat": torch.zeros(2, 3, 4, dtype=F64)},
        "x_hat must be torch.float32, got torch.float64",
    ),
    "noise of another dtype": (
        {"noise": torch.zeros(2, 3, 4, dtype=F16)},
        "noise must be torch.float32, got torch.float16",
    ),
    "coef of eight": ({"coef": torch.zeros(8, dtype=F64)}, "coef must have shape [6], got [8]"),
    "a table of coef": (
        {"coef": torch.zeros(2, 6, dtype=F64)},
        "coef must have shape [6], got [2, 6]",
    ),
    "coef of float32": ({"coef": torch.zeros(6)}, "coef must be float64, got torch.float32"),
    "noise elsewhere": (
        {"noise": torch.zeros(2, 3, 4, device="meta")},
        "noise must be on cpu, got meta",
    ),
    "coef elsewhere": (
        {"coef": torch.zeros(6, dtype=F64, device="meta")},
        "coef must be on cpu, got meta",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_heun_step_bad_arguments(backend, what):
    device = device_of(backend)
    wrong, message = BAD[what]
    arguments = (
        {name: torch.zeros(shape) for name, shape in GOOD.items()}
        | {"coef": torch.tensor(COEF, dtype=F64)}
        | wrong
    )
    arguments = {
        name: a.to(device) if isinstance(a, torch.Tensor) and a.device.type == "cpu" else a
        for name, a in arguments.items()
    }
    with pytest.raises(ValueError) as error:
        tdkern.heun_step(**arguments, backend=backend)
    assert str(error.value).replace("cuda:0", "cpu") == f"heun_step: {message}"
