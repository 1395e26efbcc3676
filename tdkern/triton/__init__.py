"""The ops in Triton. Importing this registers the `.triton` overloads, for CUDA tensors or, in Triton's interpreter, for CPU tensors."""
from . import td_coef, td_loss

__all__ = ["td_coef", "td_loss"]
