"""The ops' Python API: arguments checked, backend chosen, one launch."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import _examples
from ._backends import BACKENDS
from .adam_ema import adam_ema_, found_inf
from .ema_update import ema_update_
from .heun_step import heun_step
from .noise_pair import noise_pair
from .td_coef import td_coef
from .td_loss import td_loss

__all__ = [
    "OPS",
    "Op",
    "adam_ema_",
    "ema_update_",
    "found_inf",
    "heun_step",
    "noise_pair",
    "td_coef",
    "td_loss",
]


@dataclass(frozen=True)
class Op:
    """What is known of an op beside what it computes."""

    function: Callable
    stem: str  # of its files
    example: Callable[..., dict]  # (shape, dtype, device) -> keyword arguments of a call
    written: tuple[str, ...] = ()  # the arguments that it changes in place
    backends: tuple[str, ...] = BACKENDS

    @property
    def name(self) -> str:
        return self.function.__name__

    def results(self, arguments: dict, backend: str = "auto") -> list[Tensor]:
        """Call the op: the tensors that it returns or, of an op in place, those that it has
        changed."""
        returned = self.function(**arguments, backend=backend)
        return tensors_of([arguments[name] for name in self.written] if self.written else returned)

    def floor(self, arguments: dict) -> int:
        """Bytes that a call has to move at the least: every argument read once and every result
        written once."""
        results = (
            tensors_of([arguments[name] for name in self.written])
            if self.written
            else self.results(arguments)
        )
        return sum(tensor.nbytes for tensor in (*tensors_of(list(arguments.values())), *results))


def tensors_of(value: object) -> list[Tensor]:
    """The tensors of nested lists and tuples, in their order."""
    if isinstance(value, Tensor):
        return [value]
    return (
        [tensor for part in value for tensor in tensors_of(part)]
        if isinstance(value, list | tuple)
        else []
    )


_ADAM_WRITES = ("params", "exp_avgs", "exp_avg_sqs", "steps", "averages")
OPS = {
    op.name: op
    for op in (
        Op(td_coef, "td_coef", _examples.td_coef),
        Op(noise_pair, "noise_pair", _examples.noise_pair),
        Op(td_loss, "td_loss", _examples.td_loss),
        Op(heun_step, "heun_step", _examples.heun_step),
        Op(ema_update_, "ema_update", _examples.ema_update_, ("averages",)),
        Op(found_inf, "adam_ema", _examples.found_inf),
        Op(adam_ema_, "adam_ema", _examples.adam_ema_, _ADAM_WRITES),
    )
}
