"""Networks that other programs saved, what other programs read, and their training loops.

`edm`, `published`, `consistency_models`, `diffusers` and `lightning` are imported by their own
names; docs/swap_in.md shows each in its loop.
"""

from .conversion import convert, load_converted
from .export import export_diffusers
from .pickles import PickleError, PickleFile
from .targets import attach_target

__all__ = [
    "PickleError",
    "PickleFile",
    "attach_target",
    "convert",
    "export_diffusers",
    "load_converted",
]
