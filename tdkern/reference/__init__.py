"""Every op in plain PyTorch: literal, slow, the only oracle."""
from .ema_update import ema_update_
from .td_coef import td_coef
from .td_loss import td_loss

__all__ = ["ema_update_", "td_coef", "td_loss"]
