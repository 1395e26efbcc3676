"""Tensors that are made once."""

from functools import lru_cache, wraps
from typing import Any

import torch


def tensor_cache(maxsize: int | None = None):
    """A decorator: `lru_cache` for a function that makes tensors.

    Where it is traced it makes them anew, since fake tensors and real ones do not mix.
    """

    def decorate(make):
        kept = lru_cache(maxsize)(make)

        def call(*args):
            real = (
                not torch.compiler.is_compiling()
                and type(torch.empty(0, device="cpu")) is torch.Tensor
            )
            return kept(*args) if real else make(*args)

        cached: Any = wraps(make)(call)
        cached.cache_clear = kept.cache_clear
        return cached

    return decorate
