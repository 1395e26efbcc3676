"""The former home of `ops/_backends.py`, `ops/_modes.py` and `_cache.py`, for what still imports it."""
from ._cache import tensor_cache
from .ops._backends import (
    BACKENDS,
    COMPILED,
    CUDA_HOST,
    LIB_DIR,
    MISSING,
    interpreted,
    library,
    op,
    resolve,
    triton_key,
)
from .ops._modes import can_check_values as readable

__all__ = ["BACKENDS", "COMPILED", "CUDA_HOST", "LIB_DIR", "MISSING", "interpreted", "library", "op", "readable", "resolve", "tensor_cache", "triton_key"]
