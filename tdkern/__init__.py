"""Fused kernels and a driver for training diffusion models with a temporal-difference loss (arXiv 2606.15048)."""
from ._info import info
from .ops import ema_update_, td_coef, td_loss
from .schedules import two_moment

__version__ = "0.1.0"
__all__ = ["ema_update_", "info", "td_coef", "td_loss", "two_moment"]
