"""The build: what was compiled, that it loads, that no kernel spills, and that the package lives
without it.
"""

import ctypes
import importlib
import inspect
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import tdkern
from helpers import ROOT
from tdkern import columns, reference, schedules
from tdkern.ops import _backends

PACKAGE = Path(tdkern.__file__).parent
CUDA = _backends.LIB_DIR / "libtdkern_cuda.so"
needs_cuda_build = pytest.mark.skipif(not CUDA.exists(), reason="built without nvcc")


def python(code: str, path: Path, **env) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=path,
        env={"PATH": "", "PYTHONPATH": str(path), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compiled_part_is_here():
    assert _backends.MISSING["cpp"] == "", _backends.MISSING["cpp"]
    if shutil.which("nvcc"):
        assert CUDA.exists(), "nvcc is here, but the CUDA library was not built"
    if _backends.CUDA_HOST:
        assert _backends.MISSING["cuda"] == "", _backends.MISSING["cuda"]


@needs_cuda_build
def test_cuda_library_loads_and_registers_without_a_gpu():
    """Every op's CUDA overload has a kernel once the library is loaded, which needs no GPU."""
    code = f"""
import ctypes, torch, tdkern
every = torch._C._dispatch_get_all_op_names()
names = [name for name in every if name.startswith("tdkern::") and name.endswith(".cuda")]
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
    reports = {path.stem: path.read_text() for path in (_backends.LIB_DIR / "ptxas").glob("*.txt")}
    assert sources <= reports.keys(), "a source without a report: build again"
    for stem in sources:
        spills = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            reports[stem],
        )
        # a kernel for each
        assert len(spills) >= len(tdkern.info()["build"]["cuda_architectures"].split())
        assert all(frame == ("0", "0", "0") for frame in spills), (stem, spills)
        # two blocks of 256 threads per SM at the least
        assert max(map(int, re.findall(r"Used (\d+) registers", reports[stem]))) <= 128


@cache
def sass():
    """bench/gpu/sass.py."""
    pytest.importorskip("triton")
    sys.path.append(str(PACKAGE.parent / "bench/gpu"))
    return importlib.import_module("sass")


def first_arch() -> str:
    """The first architecture that was built for."""
    archs = tdkern.info()["build"]["cuda_architectures"].split()
    return archs[0].removesuffix("+PTX").replace(".", "")


@cache
def machine_code() -> dict[str, str]:
    """Of every kernel, for the first architecture."""
    return sass().kernels(CUDA, first_arch())


@needs_cuda_build
def test_packed_cuda_kernels_store_whole_packs():
    """In 16 bytes, or in 8 for four halves: nvcc takes a pack's store apart where it does not like
    the address, and nothing else shows it.
    """
    kernels = machine_code()
    packed = [
        name
        for name in kernels
        if re.search(
            r"pair_kernelILb1|(forward|backward|heun_step)_kernelI\w*?Li[248]E|(ema|adam)_kernelI",
            name,
        )
    ]
    assert len(packed) >= 60
    for name in packed:
        assert "STG.E.128" in kernels[name] or (
            re.search("half|bfloat16", name) and "STG.E.64" in kernels[name]
        ), name


@needs_cuda_build
def test_noise_pair_is_short_enough_for_the_memory():
    """Its instructions, not its bytes, may be its time (bench/gpu/NOTES.md): at most a tenth more
    than there are.
    """
    rounds = sass().pair_rounds(machine_code())
    assert len(rounds) == 4
    for storage, ops in rounds.items():
        assert storage == "d" or len(ops) <= 4 * 92, (storage, len(ops))


@needs_cuda_build
def test_kernels_fill_a_multiprocessor_and_packed_loops_never_part():
    """Three blocks of each, two in float64; and no place in a loop over packs where threads may go
    different ways (bench/gpu/NOTES.md tells of the others).
    """
    papers = sass().papers(CUDA, first_arch())
    packed = 0
    for name, paper in papers.items():
        wide = "double" in sass().readable([name])[0]
        assert paper.blocks >= (2 if wide else 3), (name, paper)
        assert paper.occupancy == paper.blocks / 8
        if re.search(r"(forward|heun_step)_kernelI\w*?Li[248]E|ema_kernelI", name):
            assert paper.loads and paper.partings == 0, (name, paper)
            packed += 1
    assert packed >= 30


def test_python_part_alone_imports_and_trains(tmp_path):
    """A copy of the package without anything compiled falls back to the reference and takes
    gradient steps.
    """
    shutil.copytree(
        PACKAGE, tmp_path / "tdkern", ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__")
    )
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
    target = lambda x, sigma, **labels: x
    loss = TDEDMLoss()(lambda x, sigma, **labels: net(x), target, torch.randn(16, 2))
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()
assert torch.isfinite(loss).all() and not torch.equal(net.weight, before)
try:
    tdkern.td_loss(*(torch.zeros(1, 2),) * 3, torch.zeros(1, 8), backend="cpp")
except RuntimeError as error:
    print(error)
"""
    assert (
        "td_loss: backend 'cpp' is not available: libtdkern_cpu.so was not built; run `pip install"
        in python(code, tmp_path)
    )


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
    best, lesser = (
        json.loads(python(code, PACKAGE.parent, **env)) for env in ({}, {"TDKERN_CPU_ISA": isa})
    )
    for (loss, grad), (other_loss, other_grad), tolerance in zip(
        best, lesser, (1e-6, 1e-14, 8e-3, 1e-3), strict=True
    ):
        np.testing.assert_allclose(loss, other_loss, rtol=min(tolerance, 1e-6))
        np.testing.assert_allclose(
            grad, other_grad, rtol=tolerance, atol=tolerance * np.abs(grad).max()
        )


def test_info():
    facts = tdkern.info()
    assert facts["torch"] == torch.__version__ and facts["backends"]["reference"] == ""
    json.dumps(facts)
    done = subprocess.run([sys.executable, "-m", "tdkern.info"], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and f"torch      {torch.__version__}" in done.stdout
        and done.stderr == ""
    )


def struct_members(header: str, name: str) -> list[str]:
    text = (ROOT / "csrc/include" / header).read_text()
    return re.split(r",\s*", re.search(rf"struct {name} {{.*?double ([^;]*);", text, re.S)[1])


def test_csrcs_structs_are_the_columns_of_python():
    every = set()
    for struct, count in (("Coef", 8), ("Levels", 4)):
        members = [member.upper() for member in struct_members("columns.h", struct)]
        assert [getattr(columns, member) for member in members] == list(range(count))
        every.update(members)
    assert every == {name for name in vars(columns) if name.isupper()}
    order = ", ".join(struct_members("heun_step_math.h", "StepCoef"))
    assert f"{order} = coef.unbind(0)" in inspect.getsource(reference.heun_step)
    assert order in re.sub(r"\s+", " ", tdkern.heun_step.__doc__)


def parts_at_the_top(text: str) -> list[str]:
    """What commas part in `text` from behind a brace to the brace that closes it."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "{([") - (character in "})]")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def test_csrc_fills_no_more_than_four_members_by_place():
    """Add a member to a struct that is filled by place, and the compiler may not notice."""
    found = 0
    for path in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.c*")]:
        text = re.sub(r"//.*", "", path.read_text())
        for match in re.finditer(r"(?:return|[\w>]+ =) \{", text):
            parts = parts_at_the_top(text[match.end() :])
            found += len(parts) > 4
            by_name = parts[0].lstrip().startswith(".")
            assert by_name or len(parts) <= 4, (path, match[0], parts)
    assert found >= 10


def test_formulas_of_the_headers_over_numpy():
    """td_coef_math.h and td_loss_math.h themselves against the public definitions."""
    from tdkern import _C

    rng = np.random.default_rng(0)
    sigma = np.exp(rng.normal(size=50))
    tau = sigma * rng.uniform(0.1, 1, 50)
    for eta in (0.0, 0.4, 1.0):
        A, kappa = schedules.two_moment(0.8, sigma, 0.9, tau, eta=eta)
        np.testing.assert_allclose(_C.two_moment_A(0.8, sigma, 0.9, tau, eta), A, rtol=1e-13)
        np.testing.assert_allclose(
            _C.two_moment_kappa(0.8, sigma, 0.9, tau, eta), kappa, rtol=1e-13
        )
    coef = rng.uniform(0.1, 1, 8)
    arrays = rng.normal(size=(5, 21))
    for base, norm in itertools.product(("denoise", "consistency"), ("l2", "l1")):
        F, *rest = (torch.tensor(array)[None] for array in arrays)
        F.requires_grad_()
        loss = tdkern.td_loss(
            F,
            rest[0],
            rest[1],
            torch.tensor(coef)[None],
            rest[2],
            rest[3],
            base=base,
            base_norm=norm,
            backend="reference",
        )
        loss.sum().backward()
        td, other, dF = _C.td_sample(coef, *arrays, base == "consistency", norm == "l1")
        np.testing.assert_allclose([coef[6] * td, coef[7] * other], loss[0].detach(), rtol=1e-13)
        np.testing.assert_allclose(dF, F.grad[0], rtol=1e-12)


def test_a_library_that_does_not_load_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    message = _backends._load(tmp_path / "broken.so")
    assert message.startswith("broken.so does not load") and "pip install" in message
    with pytest.raises(OSError):
        ctypes.CDLL(str(tmp_path / "broken.so"))
    monkeypatch.setattr(_backends, "CUDA_HOST", "host.so")
    assert (
        _backends._missing_cuda()
        == "host.so was not built; run `python setup.py build_ext --inplace`"
    )


def test_backends_refuse_by_name(monkeypatch):
    zeros = torch.zeros(1, 2)
    with pytest.raises(
        ValueError,
        match="td_loss: backend must be one of auto, cuda, triton, cpp, reference, got 'fast'",
    ):
        tdkern.td_loss(zeros, zeros, zeros, torch.zeros(1, 8), backend="fast")
    monkeypatch.setattr(_backends, "CUDA_HOST", None)
    monkeypatch.setitem(_backends.MISSING, "cuda", _backends._missing_cuda())
    if _backends.MISSING["cuda"]:
        with pytest.raises(
            RuntimeError, match=r"td_loss: backend 'cuda' is not available: .*torch"
        ):
            tdkern.td_loss(zeros, zeros, zeros, torch.zeros(1, 8), backend="cuda")


# ---- a library and a Python part of two versions ------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        ('float k_idx, "\n        "float one_idx', 'float one_idx, "\n        "float k_idx'),
        ("(Tensor noise, bool", "(Tensor noise, bool extra, bool"),
        (", float td_hi)", ")"),
    ],
    ids=["two arguments change places", "one more", "one fewer"],
)
def test_a_library_of_other_schemas_is_refused(tmp_path, change):
    shutil.copytree(
        PACKAGE,
        tmp_path / "tdkern",
        ignore=shutil.ignore_patterns("__pycache__", "libtdkern_cuda.so"),
    )
    schemas = tmp_path / "tdkern/ops/_schemas.py"
    text = schemas.read_text()
    assert change[0] in text
    schemas.write_text(text.replace(*change))
    code = "import tdkern; print(tdkern.info()['backends']['cpp'])"
    said = python(code, tmp_path)
    assert (
        "libtdkern_cpu.so does not load (it was built from another version of tdkern" in said
        and "build it again: `pip install" in said
    )


@pytest.mark.parametrize(
    "name", ["libtdkern_cpu.so", pytest.param("libtdkern_cuda.so", marks=needs_cuda_build)]
)
def test_a_library_without_the_hash_is_refused(tmp_path, name):
    built, library = _backends.LIB_DIR / name, tmp_path / "old.so"
    assert _backends._carried_digest(built) == _backends.digest()
    library.write_bytes(built.read_bytes().replace(b"tdkern schemas: ", b"tdkern of before "[:16]))
    assert "old.so does not load (it was built from another version" in _backends._load(library)


# ---- what setup.py takes from the environment ---------------------------------------------------

NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;
  --list-gpu-arch)
    for number in 75 80 86 87 89 90 100 103 110 120 121; do echo compute_$number; done;;
esac
"""


@pytest.fixture
def cuda_options(tmp_path, monkeypatch):
    """setup.py's options for CMake, in an environment with an nvcc that only answers."""
    import setuptools

    for name in ("bin", "elsewhere"):
        nvcc = tmp_path / name / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(NVCC)
        nvcc.chmod(0o755)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "TDKERN_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/elsewhere")
    options = runpy.run_path(str(ROOT / "setup.py"))["cuda_options"]

    def call(**env):
        for name, value in env.items():
            monkeypatch.setenv(name, value.replace("TMP", str(tmp_path)))
        return options()

    return call


@pytest.mark.parametrize(
    "given, numbers",
    [
        ("", "8.0;9.0;10.0+PTX"),
        ("9.0", "9.0"),
        ("8.0 9.0a+PTX", "8.0;9.0a+PTX"),
        ("8.0;9.0;", "8.0;9.0"),
        ("Hopper", "9.0+PTX"),
        ("Ampere;Hopper", "8.0;8.6+PTX;9.0+PTX"),
        ("Ada 8.9+PTX", "8.9+PTX"),
        ("Blackwell", "10.0;10.3;12.0;12.1+PTX"),
        ("10.0f", "10.0f"),
    ],
)
def test_architectures_in_pytorchs_forms(cuda_options, given, numbers):
    assert cuda_options(TORCH_CUDA_ARCH_LIST=given)[-1] == f"-DTDKERN_CUDA_ARCHS={numbers}"


def test_native_architectures(cuda_options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 0), (9, 0))[i])
    assert cuda_options(TORCH_CUDA_ARCH_LIST="native")[-1] == "-DTDKERN_CUDA_ARCHS=8.0;9.0"


@pytest.mark.parametrize(
    "env, found",
    [
        ({}, "TMP/elsewhere/nvcc"),
        ({"CUDA_HOME": "TMP"}, "TMP/bin/nvcc"),
        ({"CUDA_HOME": "TMP", "PATH": ""}, "TMP/bin/nvcc"),
        ({"CUDACXX": "TMP/bin/nvcc", "CUDA_HOME": "/nowhere"}, "TMP/bin/nvcc"),
        ({"PATH": "/nowhere"}, None),
    ],
)
def test_which_nvcc(cuda_options, tmp_path, env, found):
    options = cuda_options(**env)
    assert (
        options == ["-DTDKERN_CUDA=OFF"]
        if found is None
        else f"-DCMAKE_CUDA_COMPILER={found.replace('TMP', str(tmp_path))}" in options
    )


MISTAKES = {
    "an unknown name": (
        {"TORCH_CUDA_ARCH_LIST": "Hoper"},
        "TORCH_CUDA_ARCH_LIST is 'Hoper', but 'Hoper' is none of 8.0, 9.0a, ",
    ),
    "too old": (
        {"TORCH_CUDA_ARCH_LIST": "7.0"},
        "TORCH_CUDA_ARCH_LIST is '7.0', but .* does not build for 7.0: take it out",
    ),
    "native without a GPU": (
        {"TORCH_CUDA_ARCH_LIST": "native"},
        "TORCH_CUDA_ARCH_LIST is native, but torch sees no GPU here",
    ),
    "CUDACXX": (
        {"CUDACXX": "/nonexistent/nvcc"},
        "CUDACXX is '/nonexistent/nvcc', where no nvcc is: set it to one",
    ),
    "CUDA_HOME": (
        {"CUDA_HOME": "/nonexistent"},
        "CUDA_HOME is '/nonexistent', which has no bin/nvcc",
    ),
    "no nvcc": (
        {"TDKERN_CUDA": "1", "PATH": "/nowhere"},
        "TDKERN_CUDA=1, but nvcc was not found: put it on PATH, or set CUDA_HOME or CUDACXX",
    ),
    "TDKERN_CUDA": ({"TDKERN_CUDA": "yes"}, "TDKERN_CUDA must be 0, 1 or unset, got 'yes'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_the_environment_is_one_line(cuda_options, what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    env, message = MISTAKES[what]
    with pytest.raises(SystemExit, match=f"^tdkern: {message}") as error:
        cuda_options(**env)
    assert "\n" not in str(error.value)
    if what != "TDKERN_CUDA":
        # nothing of it is looked at
        assert cuda_options(**{**env, "TDKERN_CUDA": "0"}) == ["-DTDKERN_CUDA=OFF"]


def test_another_version_of_nvcc(cuda_options, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(
        SystemExit,
        match=r"tdkern: nvcc is CUDA 13.0, torch was built with CUDA 12.8: put an nvcc 12.8 first "
        r"on PATH",
    ):
        cuda_options()
    assert cuda_options(TDKERN_CUDA="0") == ["-DTDKERN_CUDA=OFF"]


# ---- distributions ------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the repository holds, without what was built in it."""
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "build",
        "dist",
        "*.egg-info",
        "lib",
        "*.so",
        "__pycache__",
        ".*_cache",
        "runs",
        "demo.*",
    )
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignore))


def pip(*arguments, cwd, **env) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PATH": path, **env},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_holds_what_its_build_made(checkout, tmp_path):
    """Not what an earlier build left in the package or in build/lib; nor does a build in place that
    leaves C++ out keep the old libraries.
    """
    in_place = ("tdkern/lib/libtdkern_cuda.so", "tdkern/_C.cpython-311-x86_64-linux-gnu.so")
    in_build = ("build/lib/tdkern/lib/libtdkern_cpu.so", "build/lib/tdkern/gone.py")
    for left in (*in_place, *in_build):
        (checkout / left).parent.mkdir(parents=True, exist_ok=True)
        (checkout / left).write_text("left")
    pip(
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ".",
        cwd=checkout,
        TDKERN_CPP="0",
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"tdkern-{tdkern.__version__}-py3-none-any.whl"
    assert {"tdkern/ops/_schemas.py", "tdkern/py.typed"} <= {*names}
    assert not [
        name
        for name in names
        if name.endswith(".so") or "gone" in name or not name.startswith("tdkern")
    ]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=checkout,
        check=True,
        env={**os.environ, "TDKERN_CPP": "0"},
    )
    assert not list(checkout.glob("tdkern/**/*.so"))


CMAKE = """#!/bin/sh
case $1 in
  -S)
    mkdir -p "$4" && echo "[]" > "$4/compile_commands.json"
    for option in "$@"; do
      case $option in
        -DTDKERN_PACKAGE=*) echo "${option#*=}" > "$4/package";;
        -DTDKERN_CUDA=*) echo "$option" > "$4/cuda";;
      esac
    done;;
  --build)
    package=$(cat "$2/package") && mkdir -p "$package/lib"
    grep -q OFF "$2/cuda" && echo new | tee "$package/_C.so" > "$package/lib/libtdkern_cpu.so";;
esac
"""


def test_a_build_without_cuda_holds_no_cuda_library_of_an_earlier_one(checkout, tmp_path):
    """With C++, in a wheel and in place, wherever the earlier build left it; cmake only writes
    files here."""
    cmake = tmp_path / "bin/cmake"
    cmake.parent.mkdir()
    cmake.write_text(CMAKE)
    cmake.chmod(0o755)
    env = {"TDKERN_CUDA": "0", "TDKERN_CPP": "1", "PATH": f"{cmake.parent}:{os.environ['PATH']}"}
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    left = ("lib/libtdkern_cuda.so", "lib/ptxas/td_loss.txt")
    folders = ("tdkern", "build/lib/tdkern", f"build/lib.{platform}/tdkern", "build/inplace")

    def leave():
        for folder, name in itertools.product(folders, left):
            (checkout / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / folder / name).write_text("left")

    leave()
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ".", cwd=checkout, **env)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith(".py")}
    assert {name for name in names if name.startswith("tdkern/lib/")} == {
        "tdkern/lib/libtdkern_cpu.so"
    }
    leave()
    subprocess.run(
        [sys.executable, *"setup.py -q build_ext --inplace --build-temp build/inplace".split()],
        cwd=checkout,
        check=True,
        env={**os.environ, **env},
    )
    built = {path.name for path in checkout.glob("tdkern/lib/**/*")}
    assert built == {"libtdkern_cpu.so"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
def test_a_source_distribution_builds_and_runs(checkout, tmp_path):
    """Installed without CUDA from the archive alone, and used from outside the checkout."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"tdkern-{tdkern.__version__}.tar.gz"
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert {
        "CMakeLists.txt",
        "csrc/schemas.cpp",
        "csrc/host/cuda_runtime.h",
        "cmake/ptxas_report.py",
        "tdkern/py.typed",
        "tests/helpers/cases.py",
        "tests/data/unet2d.json",
    } <= names
    assert not [name for name in names if name.endswith(".so")]
    empty, site = tmp_path / "empty", tmp_path / "site"
    empty.mkdir()
    pip(
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        site,
        archive,
        cwd=empty,
        TDKERN_CUDA="0",
    )
    code = """
import torch, tdkern
assert tdkern.info()["backends"]["cpp"] == "", tdkern.info()
out = torch.zeros(2, 3, requires_grad=True)
coef, _ = tdkern.td_coef(torch.tensor([0.5, 2.0], dtype=torch.float64), backend="cpp")
one = torch.ones(2, 3)
tdkern.td_loss(out, one, one, coef, one, one, backend="cpp").sum().backward()
print(tdkern.__file__, out.grad.abs().sum().item() > 0)
"""
    assert python(code, site).split() == [str(site / "tdkern/__init__.py"), "True"]


def test_the_version_stands_in_one_place():
    sources = [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("CMakeLists.txt")]
    sources += PACKAGE.rglob("*.py")
    holding = [path.name for path in sources if f'"{tdkern.__version__}"' in path.read_text()]
    assert holding == ["_version.py"]
