"""Problems with a known answer, by name."""

from collections.abc import Callable

from .base import Problem
from .mixture import Ring

PROBLEMS: dict[str, Callable[..., Problem]] = {
    Ring.name: Ring,
}

__all__ = ["PROBLEMS", "Problem"]
