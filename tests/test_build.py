"""The build: what was compiled, that it loads, that no kernel spills, and that the package lives without it."""
import ctypes
import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import tdkern
from tdkern import _library, schedules

PACKAGE = Path(tdkern.__file__).parent
CUDA = _library.LIB_DIR / "libtdkern_cuda.so"
needs_cuda_build = pytest.mark.skipif(not CUDA.exists(), reason="built without nvcc")


def python(code: str, path: Path, **env) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path, env={"PATH": "", "PYTHONPATH": str(path), **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compiled_part_is_here():
    assert _library.MISSING["cpp"] == "", _library.MISSING["cpp"]
    if shutil.which("nvcc"):
        assert CUDA.exists(), "nvcc is here, but the CUDA library was not built"
    if _library.CUDA_HOST:
        assert _library.MISSING["cuda"] == "", _library.MISSING["cuda"]


@needs_cuda_build
def test_cuda_library_loads_and_registers_without_a_gpu():
    """Every op's CUDA overload has a kernel once the library is loaded, which needs no GPU."""
    code = f"""
import ctypes, torch, tdkern
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tdkern::") and name.endswith(".cuda")]
assert names
ctypes.CDLL({str(CUDA)!r})
for name in names:
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
"""
    lines = python(code, PACKAGE.parent).split("\n")[:-1]
    assert len(lines) >= 3 and all(line.endswith("True") for line in lines), lines


@needs_cuda_build
def test_no_cuda_kernel_spills():
    """ptxas' own report, kept by the build for every kernel and architecture."""
    sources = {path.stem for path in (PACKAGE.parent / "csrc/cuda").glob("*.cu")}
    reports = {path.stem: path.read_text() for path in (_library.LIB_DIR / "ptxas").glob("*.txt")}
    assert sources <= reports.keys(), "a source without a report: build again"
    for stem in sources:
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", reports[stem])
        assert len(spills) >= len(tdkern.info()["build"]["cuda_architectures"].split())  # a kernel for each
        assert all(frame == ("0", "0", "0") for frame in spills), (stem, spills)
        assert max(map(int, re.findall(r"Used (\d+) registers", reports[stem]))) <= 128  # two blocks of 256 threads an SM at the least


@cache
def machine_code() -> dict[str, str]:
    """Of every kernel, for the first architecture that was built for."""
    pytest.importorskip("triton")
    sys.path.append(str(PACKAGE.parent / "bench/gpu"))
    import sass

    return sass.kernels(CUDA, tdkern.info()["build"]["cuda_architectures"].split()[0].removesuffix("+PTX").replace(".", ""))


@needs_cuda_build
def test_packed_cuda_kernels_store_whole_packs():
    """In 16 bytes, or in 8 for four halves: nvcc takes a pack's store apart where it does not like the address, and nothing else shows it."""
    kernels = machine_code()
    packed = [name for name in kernels if re.search(r"pair_kernelILb1|(forward|backward|heun_step)_kernelI\w*?Li[248]E|(ema|adam)_kernelI", name)]
    assert len(packed) >= 60
    for name in packed:
        assert "STG.E.128" in kernels[name] or (re.search("half|bfloat16", name) and "STG.E.64" in kernels[name]), name


@needs_cuda_build
def test_noise_pair_is_short_enough_for_the_memory():
    """Its instructions, not its bytes, may be its time (bench/gpu/NOTES.md): at most a tenth more than there are."""
    code = machine_code()
    import sass

    rounds = sass.pair_rounds(code)
    assert len(rounds) == 6
    for types, ops in rounds.items():
        assert types == "dd" or len(ops) <= 4 * 92, (types, len(ops))


def test_python_part_alone_imports_and_trains(tmp_path):
    """A copy of the package without anything compiled falls back to the reference and takes gradient steps."""
    shutil.copytree(PACKAGE, tmp_path / "tdkern", ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__"))
    code = """
import sys
sys.modules["tdkern._C"] = None  # an editable install's finder would find it beside the copy
import torch, tdkern
from tdkern.losses import TDEDMLoss
facts = tdkern.info()
assert facts["build"] is None and "pip install" in facts["backends"]["cpp"], facts
torch.manual_seed(0)
net = torch.nn.Linear(2, 2)
before = net.weight.clone()
optimizer = torch.optim.Adam(net.parameters(), 1e-2)
for _ in range(3):
    loss = TDEDMLoss()(lambda x, sigma, **labels: net(x), lambda x, sigma, **labels: x, torch.randn(16, 2))
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()
assert torch.isfinite(loss).all() and not torch.equal(net.weight, before)
try:
    tdkern.td_loss(*(torch.zeros(1, 2),) * 3, torch.zeros(1, 8), backend="cpp")
except RuntimeError as error:
    print(error)
"""
    assert "td_loss: backend 'cpp' is not available: libtdkern_cpu.so was not built; run `pip install" in python(code, tmp_path)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_td_loss_on_lesser_processors(isa):
    """Each instruction set's kernels give what the best one gives, to rounding."""
    code = """
import json, torch, tdkern
torch.manual_seed(0)
coef, _ = tdkern.td_coef(torch.randn(5, dtype=torch.float64).exp())
result = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    F, *rest = (torch.randn(5, 3, 7, 5).to(dtype) for _ in range(5))
    F.requires_grad_()
    loss = tdkern.td_loss(F, rest[0], rest[1], coef, rest[2], rest[3], backend="cpp")
    loss.backward(torch.rand(loss.shape, dtype=loss.dtype) + 1)
    result.append([loss.double().tolist(), F.grad.double().tolist()])
print(json.dumps(result))
"""
    best, lesser = (json.loads(python(code, PACKAGE.parent, **env)) for env in ({}, {"TDKERN_CPU_ISA": isa}))
    for (loss, grad), (other_loss, other_grad), tolerance in zip(best, lesser, (1e-6, 1e-14, 8e-3, 1e-3), strict=True):
        np.testing.assert_allclose(loss, other_loss, rtol=min(tolerance, 1e-6))
        np.testing.assert_allclose(grad, other_grad, rtol=tolerance, atol=tolerance * np.abs(grad).max())


def test_info():
    facts = tdkern.info()
    assert facts["torch"] == torch.__version__ and facts["backends"]["reference"] == ""
    json.dumps(facts)
    done = subprocess.run([sys.executable, "-m", "tdkern.info"], capture_output=True, text=True)
    assert done.returncode == 0 and f"torch      {torch.__version__}" in done.stdout and done.stderr == ""


def test_td_math_header_over_numpy():
    """td_math.h itself against the public definitions."""
    from tdkern import _C

    rng = np.random.default_rng(0)
    sigma = np.exp(rng.normal(size=50))
    tau = sigma * rng.uniform(0.1, 1, 50)
    for eta in (0.0, 0.4, 1.0):
        A, kappa = schedules.two_moment(0.8, sigma, 0.9, tau, eta=eta)
        np.testing.assert_allclose(_C.two_moment_A(0.8, sigma, 0.9, tau, eta), A, rtol=1e-13)
        np.testing.assert_allclose(_C.two_moment_kappa(0.8, sigma, 0.9, tau, eta), kappa, rtol=1e-13)
    coef = rng.uniform(0.1, 1, 8)
    arrays = rng.normal(size=(5, 21))
    for base, norm in itertools.product(("denoise", "consistency"), ("l2", "l1")):
        F, *rest = (torch.tensor(array)[None] for array in arrays)
        F.requires_grad_()
        loss = tdkern.td_loss(F, rest[0], rest[1], torch.tensor(coef)[None], rest[2], rest[3], base=base, base_norm=norm, backend="reference")
        loss.sum().backward()
        td, other, dF = _C.td_sample(coef, *arrays, base == "consistency", norm == "l1")
        np.testing.assert_allclose([coef[6] * td, coef[7] * other], loss[0].detach(), rtol=1e-13)
        np.testing.assert_allclose(dF, F.grad[0], rtol=1e-12)


def test_a_library_that_does_not_load_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    message = _library._load(tmp_path / "broken.so")
    assert message.startswith("broken.so does not load") and "pip install" in message
    with pytest.raises(OSError):
        ctypes.CDLL(str(tmp_path / "broken.so"))
    monkeypatch.setattr(_library, "CUDA_HOST", "host.so")
    assert _library._missing_cuda() == "host.so was not built; run `python setup.py build_ext --inplace`"


def test_backends_refuse_by_name(monkeypatch):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="td_loss: backend must be one of auto, cuda, triton, cpp, reference, got 'fast'"):
        tdkern.td_loss(zeros, zeros, zeros, torch.zeros(1, 8), backend="fast")
    monkeypatch.setattr(_library, "CUDA_HOST", None)
    monkeypatch.setitem(_library.MISSING, "cuda", _library._missing_cuda())
    if _library.MISSING["cuda"]:
        with pytest.raises(RuntimeError, match=r"td_loss: backend 'cuda' is not available: .*torch"):
            tdkern.td_loss(zeros, zeros, zeros, torch.zeros(1, 8), backend="cuda")
