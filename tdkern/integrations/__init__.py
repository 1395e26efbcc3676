"""Networks that other programs saved, and what other programs read."""

from .convert import convert, load_converted
from .diffusers import export_diffusers
from .pickles import PickleError, PickleFile

__all__ = ["PickleError", "PickleFile", "convert", "export_diffusers", "load_converted"]
