"""The compiled backends: which of them are here, why one is missing, and which one a call gets.

An op `name` has one overload for each compiled backend: `tdkern::name.cpp`, `tdkern::name.cuda`,
`tdkern::name.triton`. They share one schema, one fake and one autograd formula, given to `define`; the
implementations register against the overload. The reference is plain PyTorch, has no overload and is
differentiated by PyTorch itself, which makes it the oracle of the others.
"""
import ctypes
import importlib.util
import os
from functools import cache, partial
from pathlib import Path

import torch

library = torch.library.Library("tdkern", "DEF")
COMPILED = ("cuda", "triton", "cpp")  # the order in which "auto" takes them
BACKENDS = (*COMPILED, "reference")
LIB_DIR = Path(__file__).parent / "lib"
CUDA_HOST = os.environ.get("TDKERN_CUDA_HOST")  # for tests without a GPU: CUDA's kernels built for the host (csrc/host), on CPU tensors


def _missing_cpp() -> str:
    path = LIB_DIR / "libtdkern_cpu.so"
    if not path.exists():
        return f"{path.name} was not built; run `pip install --no-build-isolation .` where g++ and torch are installed"
    return _load(path)


def _missing_cuda() -> str:
    if CUDA_HOST:
        return _load(Path(CUDA_HOST)) if os.path.exists(CUDA_HOST) else f"{CUDA_HOST} was not built; run `python setup.py build_ext --inplace`"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    if torch.cuda.device_count() == 0:  # asks NVML, so a later fork stays possible
        return "torch sees no CUDA device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    path = LIB_DIR / "libtdkern_cuda.so"
    if not path.exists():
        return f"{path.name} was not built; put nvcc on PATH and run `TDKERN_CUDA=1 pip install --no-build-isolation .`"
    return _load(path)


def _missing_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed; run `pip install triton`"
    if interpreted() or torch.cuda.device_count() > 0:
        return ""
    return "Triton needs a GPU; set TRITON_INTERPRET=1 before Python starts to run its kernels in the interpreter"


def _load(path: Path) -> str:
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}); build it again: `pip install --no-build-isolation .`"
    return ""


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_key() -> str:
    """The dispatch key under which Triton's kernels are registered."""
    return "CPU" if interpreted() else "CUDA"


@cache
def missing() -> dict[str, str]:
    """For each backend, why it cannot be used here and how to get it; "" where it can."""
    return {"cuda": _missing_cuda(), "triton": _missing_triton(), "cpp": _missing_cpp(), "reference": ""}


_OPS: dict[tuple[str, str], torch._ops.OpOverload] = {}
MISSING = missing()  # read at import, so that a traced call only looks things up


def resolve(op: str, backend: str, device: torch.device) -> str:
    """The backend that a call of `op` on `device` uses: the one asked for, or for "auto" the first that fits."""
    if backend == "auto":
        fitting = ("cuda", "triton") if device.type == "cuda" else ("cpp",) if device.type == "cpu" else ()
        for name in fitting:
            if not MISSING[name]:
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if MISSING[backend]:
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {MISSING[backend]}")
    wanted = {"cpp": "cpu", "cuda": "cpu" if CUDA_HOST else "cuda", "triton": "cpu" if interpreted() else "cuda"}.get(backend, device.type)
    if device.type != wanted:
        raise ValueError(f"{op}: backend {backend!r} takes tensors on {wanted}, got {device.type}")
    return backend


def readable(values: torch.Tensor) -> bool:
    """Whether the values may be looked at, as a check does: they lie on the CPU, so no device is waited for, and the call is not traced."""
    return values.is_cpu and not torch.compiler.is_compiling()


def define(name: str, signature: str, fake, backward=None, setup_context=None) -> None:
    """Give every compiled backend's overload of op `name` its schema, its fake and its autograd formula.

    `backward` gets the backend's name before its usual arguments.
    """
    for backend in COMPILED:
        library.define(f"{name}.{backend}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"tdkern::{name}.{backend}", fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(f"tdkern::{name}.{backend}", partial(backward, backend), setup_context=setup_context, lib=library)
        _OPS[name, backend] = getattr(getattr(torch.ops.tdkern, name), backend)


def op(name: str, backend: str):
    """The overload of op `name` that `backend` implements."""
    return _OPS[name, backend]
