"""What this installation is and can do."""

import platform
from importlib import import_module

import numpy
import torch

from ._version import __version__
from .ops import _backends


def info() -> dict:
    """What this installation can do: versions, backends (and why one is missing), architectures
    built for, devices.

    Returns:
        {"tdkern", "torch", "triton", "python": versions; "backends": {name: "" or why it is missing
        and how to get it}; "build": what the compiled part was made with and for, or None;
        "devices": names}. Plain values, ready for JSON.
    """
    try:
        build = import_module("._C", __package__).build()
    except ImportError:
        build = None
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "tdkern": __version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "backends": dict(_backends.MISSING),
        "build": build,
        "devices": ["cpu"]
        + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
