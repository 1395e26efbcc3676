"""Modules that remember what they were made with, so that a file can say how to make them again."""

import functools
import inspect

from torch import nn


class Remembered(nn.Module):
    """A module with `init_arguments`: what its class was called with, by name, without defaults.

    Modules among them are left out: they are the module's own parts. A subclass needs to do
    nothing for it; it is kept by `copy.deepcopy` and in pickles.
    """

    init_arguments: dict

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]  # its point


def _remembering(init):
    """A constructor that leaves its arguments in `init_arguments`, where no subclass's does."""

    @functools.wraps(init)
    def remembering(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self).__init__ is remembering:
            names = list(inspect.signature(init).parameters)[1:]
            given = dict(zip(names, args, strict=False)) | kwargs
            self.init_arguments = {
                name: value for name, value in given.items() if not isinstance(value, nn.Module)
            }

    return remembering
