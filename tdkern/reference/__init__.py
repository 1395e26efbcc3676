"""Every op in plain PyTorch: literal, slow, the only oracle."""

from . import philox
from .adam_ema import adam_ema_, found_inf
from .ema_update import ema_update_
from .heun_step import heun_step
from .noise_pair import noise_pair
from .td_coef import td_coef
from .td_loss import td_loss, td_loss_gradient

__all__ = [
    "adam_ema_",
    "ema_update_",
    "found_inf",
    "heun_step",
    "noise_pair",
    "philox",
    "td_coef",
    "td_loss",
    "td_loss_gradient",
]
