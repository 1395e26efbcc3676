"""Without a GPU, Triton's kernels run in its interpreter and CUDA's as built for the host, which
must be said before tdkern is imported.
"""

import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() == 0:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault(
        "TDKERN_CUDA_HOST", str(Path(__file__).parents[1] / "build/host/libtdkern_host.so")
    )

from tdkern.ops import _backends

# Its first import forbids cuDNN's flags, which the driver sets: here it forbids nothing.
with torch.backends.__allow_nonbracketed_mutation():
    import torch.testing._internal.common_utils

# A run leaves signals alone that were ignored when it started, as they are behind a shell's & and
# under nohup: here they are not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Taken away, or pytest-benchmark would measure nothing in the runs that tests start themselves.
WORKERS = int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.pop("PYTEST_XDIST_WORKER", None)
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))


def _params(backends):
    # where it is built, the C++ backend has to work: never skipped
    built = (_backends.LIB_DIR / "libtdkern_cpu.so").exists()
    for name in backends:
        missing = _backends.MISSING[name]
        yield pytest.param(
            name,
            marks=pytest.mark.skipif(
                bool(missing) and not (name == "cpp" and built), reason=missing
            ),
        )


@pytest.fixture
def data(tmp_path):
    """A file of ten images in three classes."""
    from helpers.tiny import data_set, pixels

    return str(data_set(tmp_path / "images.zip", pixels(10), [i % 3 for i in range(10)]))


@pytest.fixture
def short_previews(monkeypatch):
    """The pictures that training writes are not what its tests should take time for."""
    from helpers.tiny import numbers_of_curves, two_steps

    monkeypatch.setattr("tdkern.training.record.preview_levels", two_steps)
    monkeypatch.setattr("tdkern.training.record.draw_curves", numbers_of_curves)


@pytest.fixture(scope="session")
def torchvision_operators():
    """torchvision can be imported: see `helpers.operators`."""
    from helpers.operators import stand_in_for_operators

    stand_in_for_operators()


@pytest.fixture
def unwritten_is_nan():
    """What an op leaves unwritten is NaN, and not what another backend left in the same memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_params(_backends.BACKENDS))
def backend(request, unwritten_is_nan):
    """Each backend; skipped with the reason where it is missing."""
    return request.param


@pytest.fixture(params=_params(_backends.COMPILED))
def compiled(request, unwritten_is_nan):
    """Each backend but the reference."""
    return request.param


@pytest.fixture
def persistence(monkeypatch):
    """The module that EDM's pickles name, for writing them."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("executed")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
