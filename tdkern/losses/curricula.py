"""Consistency training's noise levels over training: how many there are, or how far apart.

They are frozen objects, called with the step from 0 as `curriculum(step) -> num_scales`, a number
or, of `Easy`, a `Mapping`.

A fixed number is an int. The target's decay that goes with them is `ema.consistency_decay`.
"""

import math
from dataclasses import dataclass

from torch import Tensor


def _check(curriculum, least: dict) -> None:
    for name, value in least.items():
        if not getattr(curriculum, name) >= value:
            raise ValueError(
                f"{type(curriculum).__name__}: {name} must be at least {value}, got "
                f"{getattr(curriculum, name)}"
            )


@dataclass(frozen=True)
class Progressive:
    """Consistency training's (arXiv 2303.01469, appendix C).

    N(k) = max(ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1), 1) + 1.

    Args:
        start_scales, end_scales: s0 >= 1 and s1 >= s0.
        total_steps: K >= 1. The number goes on growing past it.
    """

    start_scales: int = 2
    end_scales: int = 150
    total_steps: int = 800_000

    def __post_init__(self):
        _check(self, {"start_scales": 1, "end_scales": self.start_scales, "total_steps": 1})

    def __call__(self, step: int) -> int:
        s0, s1 = self.start_scales, self.end_scales
        square = step / self.total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2
        return max(math.ceil(math.sqrt(square) - 1), 1) + 1


@dataclass(frozen=True)
class Exponential:
    """Improved consistency training's (arXiv 2310.14189, table 1).

    N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1)).

    Args:
        start_scales, end_scales: s0 >= 1 and s1 >= s0.
        total_steps: K, long enough for K' >= 1.
    """

    start_scales: int = 10
    end_scales: int = 1280
    total_steps: int = 400_000

    def __post_init__(self):
        _check(self, {"start_scales": 1, "end_scales": self.start_scales})
        _check(self, {"total_steps": math.ceil(self._lengths)})

    @property
    def _lengths(self) -> float:
        return math.log2(self.end_scales // self.start_scales) + 1

    def __call__(self, step: int) -> int:
        doublings = step // math.floor(self.total_steps / self._lengths)
        doublings = min(doublings, math.ceil(self._lengths))
        return min(self.start_scales << doublings, self.end_scales) + 1


@dataclass(frozen=True)
class Mapping:
    """Easy consistency tuning's map from t to the level t' that it is compared with.

    t' = t max(1 - n(t) / ratio, 0),  n(t) = 1 + k sigmoid(-b t)  (arXiv 2406.14548, section 3.3).

    Args:
        ratio: q^a > 1: the larger, the nearer t' is to t.
        k, b: k >= 0 widens the step at small t, b > 0 says how small.
    """

    ratio: float = 256.0
    k: float = 8.0
    b: float = 1.0

    def __post_init__(self):
        _check(self, {"k": 0})
        if not (1 < self.ratio < math.inf and 0 < self.b < math.inf):
            raise ValueError(
                f"Mapping: ratio must be above 1 and b above 0, got {self.ratio} and {self.b}"
            )

    def __call__(self, t: Tensor) -> Tensor:
        """t' of noise levels of any shape."""
        n = 1 + self.k * (-self.b * t).sigmoid()
        return t * (1 - n / self.ratio).clamp(min=0)


@dataclass(frozen=True)
class Easy:
    """Easy consistency tuning's (arXiv 2406.14548): t' comes nearer to t in stages.

    Stage a = floor(step / K') + 1 has the `Mapping` of ratio q^a.

    Args:
        start_scales: q > 1.
        end_scales: not used: the stages end with training.
        total_steps: K' >= 1, the length of a stage; the published run has 25,000 with q = 2.
        k, b: of `Mapping`.
    """

    start_scales: float = 2
    end_scales: None = None
    total_steps: int = 25_000
    k: float = 8.0
    b: float = 1.0

    def __post_init__(self):
        _check(self, {"total_steps": 1})
        self(0)  # checks the others

    def __call__(self, step: int) -> Mapping:
        stage = step // self.total_steps + 1
        # as far as a float goes: t' is t long before
        return Mapping(min(float(self.start_scales), 1e300 ** (1 / stage)) ** stage, self.k, self.b)
