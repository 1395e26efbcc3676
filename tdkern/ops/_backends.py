"""The backends: which of them are here, why one is missing, which one a call gets, and how an op is
defined for all of them.

An op `name` has one overload for each compiled backend, `tdkern::name.cpp`, `tdkern::name.cuda` and
`tdkern::name.triton`, and one, `tdkern::name`, that takes what fits the tensors' device, for a
graph that is saved and run elsewhere. They share one schema (`_schemas.py`), one fake and one
autograd formula, given to `define`; the implementations register against the overload. The
reference is plain PyTorch and is differentiated by PyTorch itself, which makes it the oracle of the
others.
"""

import ctypes
import importlib.util
import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ._modes import ordinary, transformed
from ._schemas import SCHEMAS, digest

library = torch.library.Library("tdkern", "DEF")
COMPILED = ("cuda", "triton", "cpp")  # the order in which "auto" takes them
BACKENDS = (*COMPILED, "reference")
BY_DEVICE = "by_device"  # the overload without a name
LIB_DIR = Path(__file__).parents[1] / "lib"
# for tests without a GPU: CUDA's kernels built for the host (csrc/host), on CPU tensors
CUDA_HOST = os.environ.get("TDKERN_CUDA_HOST")
BUILD_AGAIN = "build it again: `pip install --no-build-isolation .`"
# What a wrong argument may raise before the check that explains it, and torch 2.10 for a DTensor
# beside plain tensors.
REFUSED = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


# ---- which backends are here


def _missing_cpp() -> str:
    path = LIB_DIR / "libtdkern_cpu.so"
    if not path.exists():
        return (
            f"{path.name} was not built; run `pip install --no-build-isolation .` where g++ and "
            "torch are installed"
        )
    return _load(path)


def _missing_cuda() -> str:
    if CUDA_HOST:
        return (
            _load(Path(CUDA_HOST))
            if os.path.exists(CUDA_HOST)
            else f"{CUDA_HOST} was not built; run `python setup.py build_ext --inplace`"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    if torch.cuda.device_count() == 0:  # asks NVML, so a later fork stays possible
        return "torch sees no CUDA device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    path = LIB_DIR / "libtdkern_cuda.so"
    if not path.exists():
        return (
            f"{path.name} was not built; put nvcc on PATH and run `TDKERN_CUDA=1 pip install "
            "--no-build-isolation .`"
        )
    return _load(path)


def _missing_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed; run `pip install triton`"
    if interpreted() or torch.cuda.device_count() > 0:
        return ""
    return (
        "Triton needs a GPU; set TRITON_INTERPRET=1 before Python starts to run its kernels in the "
        "interpreter"
    )


def _load(path: Path) -> str:
    """Load a library if its kernels are those of these schemas: a kernel beside another schema
    would take one argument for another."""
    carried = _carried_digest(path)
    if carried is not None and carried != digest():
        return (
            f"{path.name} does not load (it was built from another version of tdkern than this "
            f"Python part); {BUILD_AGAIN}"
        )
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}); {BUILD_AGAIN}"
    return ""


def _carried_digest(path: Path) -> str | None:
    """The hash of the schemas that a library was built with, "" if it has none; None for a file
    that is no library."""
    with open(path, "rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            mark = b"tdkern schemas: "
            at = memory.find(mark)
            return (
                ""
                if at < 0
                else memory[at + len(mark) : at + len(mark) + len(digest())].decode(
                    "ascii", "replace"
                )
            )


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_key() -> str:
    """The dispatch key under which Triton's kernels are registered."""
    return "CPU" if interpreted() else "CUDA"


@cache
def missing() -> dict[str, str]:
    """For each backend, why it cannot be used here and how to get it; "" where it can."""
    return {
        "cuda": _missing_cuda(),
        "triton": _missing_triton(),
        "cpp": _missing_cpp(),
        "reference": "",
    }


MISSING = missing()  # read at import, so that a traced call only looks things up


# ---- which one a call gets


def resolve(op: str, backend: str, device: torch.device) -> str:
    """The backend that a call of `op` on `device` uses: the one asked for, or for "auto" the first
    that fits.

    Under a transform, which has to see through the op, it is the reference; where `torch.jit.trace`
    records the call, "auto" leaves the choice to the device on which it is replayed.
    """
    if backend == "auto":
        backend = _first_that_fits(device)
        if ordinary():
            return backend
        return "reference" if transformed() else BY_DEVICE
    if backend not in BACKENDS:
        raise ValueError(
            f"{op}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}"
        )
    if MISSING[backend]:
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {MISSING[backend]}")
    wanted = {
        "cpp": "cpu",
        "cuda": "cpu" if CUDA_HOST else "cuda",
        "triton": "cpu" if interpreted() else "cuda",
    }.get(backend, device.type)
    if device.type != wanted:
        raise ValueError(f"{op}: backend {backend!r} takes tensors on {wanted}, got {device.type}")
    return "reference" if transformed() else backend


def resolve_lists(op: str, backend: str, params: Sequence[Tensor]) -> str:
    """`resolve` for an op that writes to lists, which TorchScript drops from a trace: there it is
    the reference."""
    device = params[0].device if len(params) > 0 else torch.device("cpu")
    backend = resolve(op, backend, device)
    return "reference" if backend == BY_DEVICE else backend


FITTING = {"cuda": ("cuda", "triton"), "cpu": ("cpp",)}  # backends by device, the best first


def _first_that_fits(device: torch.device) -> str:
    for name in FITTING.get(device.type, ()):
        if not MISSING[name]:
            return name
    return "reference"


# ---- ops

_OPS: dict[tuple[str, str], torch._ops.OpOverload] = {}
_FAKES: dict[str, Callable] = {}


def define(
    name: str,
    fake: Callable,
    reference: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Give every overload of op `name` its schema, its fake and its autograd formula.

    `reference` computes the op with the schema's arguments where no compiled backend fits.
    `backward` gets the backend's name before its usual arguments.
    """
    # TorchScript, which knows no overloads by name, takes the first.
    for backend in (BY_DEVICE, *COMPILED):
        overload = name if backend == BY_DEVICE else f"{name}.{backend}"
        library.define(overload + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"tdkern::{overload}", fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(
                f"tdkern::{overload}",
                partial(backward, backend),
                setup_context=setup_context,
                lib=library,
            )
        _OPS[name, backend] = getattr(
            getattr(torch.ops.tdkern, name), "default" if backend == BY_DEVICE else backend
        )
    for key in ("CPU", "CUDA"):
        library.impl(name, partial(_by_device, name, reference), key)
    _FAKES[name] = fake


def _by_device(name: str, reference: Callable, *args):
    first = next(
        tensor
        for arg in args
        for tensor in (arg if isinstance(arg, list) else [arg])
        if isinstance(tensor, Tensor)
    )
    backend = _first_that_fits(first.device)
    return reference(*args) if backend == "reference" else _OPS[name, backend](*args)


def op(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of op `name` that `backend` implements."""
    return _OPS[name, backend]


def call(name: str, backend: str, args: tuple):
    """Run `backend`'s overload of op `name`. Where memory runs out, the error is torch's own."""
    try:
        return _OPS[name, backend](*args)
    except RuntimeError as error:
        if "API call failed" in str(error):  # all that the stable ABI lets through
            _allocate(name, args)
        raise


def _allocate(name: str, args: tuple) -> None:
    """Allocate once what the op does, its outputs and its copies: torch's own error says what
    memory is missing."""
    tensors = [
        tensor
        for arg in args
        for tensor in (arg if isinstance(arg, list | tuple) else [arg])
        if isinstance(tensor, Tensor)
    ]
    kept = [tensor.contiguous() for tensor in tensors]
    kept.append(_FAKES[name](*args))
