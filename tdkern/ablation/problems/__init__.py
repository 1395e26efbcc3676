"""Problems with a known answer, by name."""

from collections.abc import Callable
from functools import partial

from .base import Problem
from .empirical import Empirical, empirical_of
from .low_rank import Fitted
from .mixture import Ring

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "mixture": Ring,
    "patches8": partial(Fitted, "patches8"),
    "images8": partial(Fitted, "images8"),
    "images16": partial(Fitted, "images16"),
    "empirical8": partial(empirical_of, "empirical8", size=8, n=5000),
    "empirical": empirical_of,
}

__all__ = ["PROBLEMS", "Empirical", "Problem"]
