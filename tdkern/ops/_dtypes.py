"""The storage types that the ops take."""

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, float64, bfloat16 or float16"
WIDE = (torch.float32, torch.float64)
# (what may be narrow, what goes with it): a network's output and the data, a parameter and its
# averages. The same list is `by_storage` in csrc/include/checks.h.
STORAGE_PAIRS = frozenset(
    {
        *((dtype, dtype) for dtype in FLOATS),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    }
)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes in words, without "torch."."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
