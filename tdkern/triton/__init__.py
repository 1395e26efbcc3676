"""The ops in Triton.

Importing this registers the `.triton` overloads, for CUDA tensors or, in Triton's interpreter, for
CPU tensors.
"""

from . import adam_ema, ema_update, heun_step, noise_pair, td_coef, td_loss

__all__ = ["adam_ema", "ema_update", "heun_step", "noise_pair", "td_coef", "td_loss"]
