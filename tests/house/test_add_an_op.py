"""The op that docs/add_an_op.md adds: built from the page, it passes its own tests and those over
all ops, and every run over the registry has it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT, TESTS
from tdkern.ops import _backends

PAGE = (ROOT / "docs" / "add_an_op.md").read_text()
FILES = dict(re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
LINES = re.findall(
    r"^```(?:python|text)\n((?: {4}| {8}|from).*?)^```$", PAGE, re.MULTILINE | re.DOTALL
)
PLACES = (  # of LINES: the file, and what stands before them there
    ("tdkern/ops/_schemas.py", "SCHEMAS = {\n"),
    ("tdkern/ops/__init__.py", "from .adam_ema import adam_ema_, found_inf\n"),
    ("tdkern/ops/__init__.py", "    for op in (\n"),
)

OVER_ALL_OPS = [
    f"tests/ops/test_{name}.py"
    for name in ("cuda_host", "surface", "transforms", "wrong_arguments")
]

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not _backends.CUDA_HOST, reason="needs g++, and no GPU"
)


def test_an_op_is_eleven_files():
    assert len(FILES) == 9 and len(LINES) == len(PLACES)
    assert len({*FILES, *(path for path, _ in PLACES)}) == 11
    named = re.findall(r"^\| `([\w/.]+)` \|", PAGE, re.MULTILINE)
    assert {*named} == {*FILES, *(path for path, _ in PLACES)}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the package with the page's files; its libraries hold this op alone."""
    root = tmp_path_factory.mktemp("axpy")
    for name in ("tdkern", "csrc", "cmake", "bench"):
        unwanted = shutil.ignore_patterns("*.so", "__pycache__", "lib", "results")
        shutil.copytree(ROOT / name, root / name, ignore=unwanted)
    for path in (*root.glob("csrc/cpu/*.cpp"), *root.glob("csrc/cuda/*.cu")):
        path.unlink()  # compiled they would take minutes
    shutil.copy(ROOT / "CMakeLists.txt", root)
    shutil.copytree(TESTS / "helpers", root / "tests/helpers")
    (root / "tests/ops").mkdir()
    for path in ("pyproject.toml", "tests/conftest.py", *OVER_ALL_OPS):
        shutil.copy(ROOT / path, root / path)
    for path, text in FILES.items():
        (root / path).write_text(text)
    for (path, before), text in zip(PLACES, LINES, strict=True):
        old = (root / path).read_text()
        assert old.count(before) == 1, path
        (root / path).write_text(old.replace(before, before + text))
    build(root)
    return root


def build(root: Path) -> None:
    import pybind11

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    settings = {
        "TDKERN_TORCH": Path(torch.__file__).parent,
        "TDKERN_CUDA": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_BUILD_TYPE": "Debug",  # of which -O3 is a part for csrc/cpu alone
    }
    configure = ["cmake", "-S", root, "-B", root / "build", "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    targets = ["cmake", "--build", root / "build", "--target", "tdkern_cpu", "tdkern_host"]
    for command in (configure, targets):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout, done.stdout


def python(root, *args):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), str(root / "bench/gpu")]),
        "TDKERN_CUDA_HOST": str(root / "build/host/libtdkern_host.so"),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *args], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_its_tests_and_those_over_all_ops(checkout):
    printed = python(
        checkout, "-m", "pytest", "tests/ops", "-k", "axpy", "-vv", "-p", "no:cacheprovider"
    )
    ran = {
        re.sub(r"\[.*", "", line.partition("::")[2])
        for line in printed.splitlines()
        if "axpy" in line and " PASSED" in line
    }
    assert ran == {
        "test_axpy",
        "test_gradient",
        "test_fake_tensors",
        "test_jit_trace_takes_the_backend_by_device",
        "test_make_fx",
        "test_export_with_a_dynamic_batch",
        "test_no_result_depends_on_the_order_of_threads",
        "test_opcheck_of_every_op",
        "test_defaults_of_torch_change_nothing",
        "test_vmap",
        "test_what_is_no_dense_tensor",
    }
    assert "SKIPPED" not in printed and "FAILED" not in printed


def test_the_runs_over_the_registry_have_it(checkout):
    code = """
import profile_ops, selection
from tdkern.ops import OPS

axpy = {"axpy": OPS["axpy"]}
for run in (lambda: selection.run("cpp", axpy), lambda: profile_ops.run("cpp", 10_000, axpy)):
    run()
    print("ran")
"""
    assert python(checkout, "-c", code).split() == ["ran", "ran"]
    code = """
from helpers import aot
aot.CHOSEN = {stem: lambda capability: () for stem in aot.CHOSEN}
print(*(name for name, facts in aot.builds(90) if not facts["local"]), sep=";")
"""
    built = python(checkout, "-c", f"import os; os.environ['TRITON_INTERPRET'] = '0'{code}")
    assert "axpy axpy_kernel torch.bfloat16" in built
    tiny = "import os; os.environ['TDKERN_BENCH_TINY'] = '1'; "
    tiny += "os.environ['TDKERN_BENCH_RESULTS'] = 'results'; import pytest; "
    tiny += "raise SystemExit(pytest.main(['bench', '-k', 'axpy and not compile', '-q']))"
    assert "axpy" in python(checkout, "-c", tiny)
