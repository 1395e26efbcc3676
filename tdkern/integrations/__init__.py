"""Networks that other programs saved."""
from .convert import convert, load_converted
from .pickles import PickleError, PickleFile

__all__ = ["PickleError", "PickleFile", "convert", "load_converted"]
