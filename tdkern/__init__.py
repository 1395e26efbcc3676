"""Fused kernels and a driver for training diffusion models with a temporal-difference loss (arXiv
2606.15048).
"""

from ._info import info
from ._version import __version__ as __version__
from .ops import _backends, ema_update_, heun_step, noise_pair, td_coef, td_loss
from .schedules import two_moment

if not _backends.MISSING["triton"]:
    from . import triton  # noqa: F401  (registers its kernels)

__all__ = ["ema_update_", "heun_step", "info", "noise_pair", "td_coef", "td_loss", "two_moment"]
