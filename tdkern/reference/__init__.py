"""Every op in plain PyTorch: literal, slow, the only oracle."""
from .td_coef import td_coef
from .td_loss import td_loss

__all__ = ["td_coef", "td_loss"]
