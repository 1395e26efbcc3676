"""The ops' Python API: arguments checked, backend chosen, one launch."""
from .td_coef import td_coef
from .td_loss import td_loss

__all__ = ["td_coef", "td_loss"]
