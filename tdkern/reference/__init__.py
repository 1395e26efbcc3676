"""Every op in plain PyTorch: literal, slow, the only oracle."""
from .heun_step import heun_step
from .td_coef import td_coef
from .td_loss import td_loss

__all__ = ["heun_step", "td_coef", "td_loss"]
