"""CUDA's kernels as compiled for the host (csrc/host): no result depends on the order of threads
and blocks, no access is out of bounds, and the stand-in finds what it is there to find. That the
results are right is for the op tests, which run through it too.
"""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tdkern
from helpers import ROOT
from helpers import adam_ema as adam_lists
from helpers import ema_update as ema_lists
from helpers import heun_step as heun_cases
from helpers.cases import CASES, DTYPES, F64, inputs, offset, with_gradient
from tdkern.ops import OPS, _backends, adam_ema_

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")


# ---- what every .cu file computes ---------------------------------------------------------------


def td_coef():
    for batch in (0, 1, 1000):
        yield from tdkern.td_coef(torch.linspace(0.001, 90, batch, dtype=F64), backend="cuda")


def td_loss():
    for name in (
        "odd",
        "one odd sample",
        "several chunks",
        "a chunk and one",
        "misaligned",
        "channels_last of some",
        "no elements",
        "no samples",
        "odd, l1",
        "several chunks, l1",
        "odd, huber",
    ):
        for dtypes in DTYPES:
            args, case = inputs(name, dtypes), CASES[name]
            upstream = torch.tensor([[1, 1], [2, 2], [0, 1], [0.5, 0], [0, 0]])[: len(args[0])]
            yield from with_gradient(
                lambda *args, case=case: tdkern.td_loss(
                    *args, base=case.base, **case.norm, backend="cuda"
                ),
                args,
                upstream,
            )


def noise_pair():
    image, float32 = (3, 3, 20, 20), torch.float32
    for shape, dtype in (
        (image, F64),
        (image, float32),
        ((2, 1030), torch.bfloat16),
        ((20, 2), torch.float16),
        ((0, 3), float32),
    ):
        x0 = torch.linspace(-1, 1, math.prod(shape)).to(dtype).view(shape)
        level = torch.linspace(0.5, 2, shape[0], dtype=F64)
        for x in (
            (x0, x0.contiguous(memory_format=torch.channels_last)) if len(shape) == 4 else (x0,)
        ):
            yield from tdkern.noise_pair(
                x,
                level / 2,
                level,
                level / 3,
                level / 2,
                seed=1,
                backend="cuda",
            )
            yield from tdkern.noise_pair(
                x,
                level / 2,
                level,
                level / 3,
                level / 2,
                coupling="shared",
                seed=torch.tensor([1]),
                backend="cuda",
            )


def heun_step():
    for name in ("odd", "chunks and a bit", "misaligned", "channels_last of some", "no elements"):
        for dtypes in heun_cases.DTYPES:
            results = tdkern.heun_step(
                *heun_cases.inputs(name, dtypes=dtypes), net_dtype=dtypes[2], backend="cuda"
            )
            yield from (result for result in results if result is not None)


def ema_update():
    for dtypes in DTYPES:
        for lie in (torch.Tensor.contiguous, offset):
            averages, params = ema_lists.lists(dtypes, "cpu", lie=(lie, lie))
            tdkern.ema_update_(averages, params, ema_lists.DECAYS[:3], backend="cuda")
            yield from (average for column in averages for average in column)


def adam_ema():
    for dtypes in DTYPES:
        for lie in (torch.Tensor.contiguous, offset):
            lists = adam_lists.problem(dtypes, lie=(lie,) * 5)
            adam_ema_(*lists, lr=0.01, backend="cuda")
            yield from adam_lists.flatten(lists)


# Beside the example calls of every op: hard cases of layout, size and option.
HARD = {
    function.__name__: function
    for function in (adam_ema, ema_update, heun_step, noise_pair, td_coef, td_loss)
}
STEMS = sorted({op.stem for op in OPS.values() if "cuda" in op.backends})


def calls_of(stem):
    """The results of calls that run every branch of a .cu file."""
    for op in OPS.values():
        if op.stem == stem:
            for arguments in op.calls():
                yield from op.results(arguments, "cuda")
    if stem in HARD:
        yield from HARD[stem]()


@pytest.mark.skipif(not _backends.CUDA_HOST, reason="there is a GPU, on which the CUDA kernels run")
@pytest.mark.parametrize("op", STEMS)
def test_no_result_depends_on_the_order_of_threads(op, monkeypatch):
    """A kernel without one of the barriers it needs, or whose blocks write one place, gives other
    bits in another order.
    """
    by_index = list(calls_of(op))
    for seed in "12":
        monkeypatch.setenv("TDKERN_HOST_ORDER", seed)
        assert all(
            torch.equal(one, other) for one, other in zip(by_index, calls_of(op), strict=True)
        )


# ---- the sanitizers -----------------------------------------------------------------------------


def library_of_compiler(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@needs_compiler
def test_address_and_undefined_behaviour_sanitizers():
    """The calls above under both. The build is kept: only what changed is compiled again."""
    if not Path(library_of_compiler("libasan.so")).is_absolute():
        pytest.skip("g++ has no libasan")
    import pybind11

    build = ROOT / "build/sanitized"
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    options = {
        "TDKERN_TORCH": Path(torch.__file__).parent,
        "TDKERN_CUDA": "OFF",
        "TDKERN_HOST_DIR": build,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_BUILD_TYPE": "Debug",
        # a null pointer crashes anyway, and to look for it doubles the compilation
        "CMAKE_CXX_FLAGS_DEBUG": "-O0 -g1 -fsanitize=address,undefined "
        "-fno-sanitize=null,vptr -fno-sanitize-recover=all",
    }
    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        build,
        "-G",
        "Ninja",
        *(f"-D{name}={value}" for name, value in options.items()),
    ]
    for command in (configure, ["cmake", "--build", build, "--target", "tdkern_host"]):
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    env |= {
        "TDKERN_CUDA_HOST": str(build / "libtdkern_host.so"),
        "CUDA_VISIBLE_DEVICES": "",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python leaves much behind; a fake stack knows no fibers
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        # libstdc++ too: python itself does not have it, and libasan looks for its functions when it
        # starts
        "LD_PRELOAD": " ".join(map(library_of_compiler, ("libasan.so", "libstdc++.so.6"))),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "order_of_threads"],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0 and f"{len(STEMS)} passed" in done.stdout, done.stdout + done.stderr


# ---- the stand-in -------------------------------------------------------------------------------

KERNELS = """
#include <cuda_runtime.h>

__global__ void reverse(float* data, bool meet) {
  __shared__ float shared[64];
  shared[threadIdx.x] = data[threadIdx.x];
  if (meet) __syncthreads();
  data[threadIdx.x] = shared[63 - threadIdx.x];
}
extern "C" void run_reverse(float* data, bool meet) {
  cuda_host::run(1, 64, [=] { reverse(data, meet); });
}

__global__ void part(unsigned threads) {
  if (threadIdx.x < threads) __syncthreads();
}
extern "C" bool run_part(unsigned threads) {
  try {
    cuda_host::run(2, 64, [=] { part(threads); });
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}
"""


@needs_compiler
def test_the_stand_in_finds_missing_and_parted_barriers(tmp_path, monkeypatch):
    (tmp_path / "kernels.cpp").write_text(KERNELS)
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{ROOT / 'csrc/host'}",
            "kernels.cpp",
            "-o",
            "kernels.so",
        ],
        cwd=tmp_path,
        check=True,
    )
    kernels = ctypes.CDLL(str(tmp_path / "kernels.so"))
    kernels.run_part.restype = ctypes.c_bool
    for meet in (True, False):
        data = torch.arange(64.0)
        right = []
        for seed in "1234":
            monkeypatch.setenv("TDKERN_HOST_ORDER", seed)
            result = data.clone()
            kernels.run_reverse(ctypes.c_void_p(result.data_ptr()), ctypes.c_bool(meet))
            right.append(torch.equal(result, data.flip(0)))
        assert all(right) if meet else not any(right)
    assert [kernels.run_part(threads) for threads in (0, 1, 63, 64)] == [True, False, False, True]
