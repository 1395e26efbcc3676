"""The ops' Python API: arguments checked, backend chosen, one launch."""

from collections.abc import Callable, Iterator
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
    variants: tuple[dict, ...] = ()  # changes of the example that run other code
    differentiable: str = ""  # the argument that gets a gradient
    backends: tuple[str, ...] = BACKENDS

    @property
    def name(self) -> str:
        return self.function.__name__

    def calls(self, *args: object, **kwargs: object) -> Iterator[dict]:
        """The arguments of the example and of its variants; takes what `example` takes."""
        for changes in ({}, *self.variants):
            yield {**self.example(*args, **kwargs), **changes}

    def results(self, arguments: dict, backend: str = "auto") -> list[Tensor]:
        """Call the op: the tensors that it returns or, of an op in place, those that it has
        changed."""
        returned = self.function(**arguments, backend=backend)
        return tensors_of([arguments[name] for name in self.written] if self.written else returned)

    def floor(self, arguments: dict) -> int:
        """Bytes that a call has to move at the least: every argument read once and every result
        written once."""
        if self.written:
            results = tensors_of([arguments[name] for name in self.written])
        else:
            results = self.results(arguments)
        return sum(tensor.nbytes for tensor in (*tensors_of(list(arguments.values())), *results))


def tensors_of(value: object) -> list[Tensor]:
    """The tensors of nested lists and tuples, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


_ADAM_WRITES = ("params", "exp_avgs", "exp_avg_sqs", "steps", "averages")
OPS = {
    op.name: op
    for op in (
        Op(td_coef, "td_coef", _examples.td_coef),
        Op(noise_pair, "noise_pair", _examples.noise_pair, variants=({"coupling": "shared"},)),
        Op(
            td_loss,
            "td_loss",
            _examples.td_loss,
            variants=({"base": "consistency"}, {"base_norm": "l1"}),
            differentiable="out",
        ),
        Op(heun_step, "heun_step", _examples.heun_step, variants=({"x_hat": None},)),
        Op(ema_update_, "ema_update", _examples.ema_update_, written=("averages",)),
        Op(found_inf, "adam_ema", _examples.found_inf),
        Op(
            adam_ema_,
            "adam_ema",
            _examples.adam_ema_,
            written=_ADAM_WRITES,
            variants=({"decoupled": False, "weight_decay": 0.1},),
        ),
    )
}
