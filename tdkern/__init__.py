"""Fused kernels and a driver for training diffusion models with a temporal-difference loss (arXiv
2606.15048).
"""

from ._info import info
from ._version import __version__ as __version__
from .ops import _backends, ema_update_, heun_step, noise_pair, td_coef, td_loss
from .schedules import two_moment

if not _backends.MISSING["triton"]:
    from . import triton  # noqa: F401  (registers its kernels)

__all__ = [
    "ema_update_",
    "heun_step",
    "info",
    "load_network",
    "noise_pair",
    "save_network",
    "td_coef",
    "td_loss",
    "two_moment",
]


def __getattr__(name: str):
    """`save_network` and `load_network` come with the driver: imported when they are asked for."""
    if name == "save_network":
        from .networks.saved import save_network

        return save_network
    if name == "load_network":
        from .training import load_network

        return load_network
    raise AttributeError(f"module 'tdkern' has no attribute {name!r}")
