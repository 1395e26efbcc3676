"""Networks that other programs saved, what other programs read, and their training loops.

Each of `edm`, `published`, `consistency_models`, `diffusers` and `lightning` is a module of its
own, imported by its name; docs/swap_in.md shows them in their loops.
"""

from .convert import convert, load_converted
from .export import export_diffusers
from .pickles import PickleError, PickleFile

__all__ = ["PickleError", "PickleFile", "convert", "export_diffusers", "load_converted"]
