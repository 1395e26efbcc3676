"""What the networks are told beside the noisy data and its level."""

import copy
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What a call of a network has behind x and sigma, as far as it was given.

    Tensors begin with the batch, also inside lists, tuples and dicts; a tensor without dimensions
    and every other value is the same for all samples.
    """

    positional: tuple = ()  # the class labels
    named: dict = field(default_factory=dict)

    @classmethod
    def of(cls, loss: str, batch: int, labels, augment_labels, others: dict) -> "Conditions":
        """Those that were given; raises ValueError, which names `loss` and the argument."""
        augment = {} if augment_labels is None else {"augment_labels": augment_labels}
        named = augment | others
        for name, value in [("labels", labels), *named.items()]:
            _check(f"{loss}: {name}", value, batch)
        return cls(() if labels is None else (labels,), named)

    def with_(self, **named) -> "Conditions":
        """With more of them."""
        return replace(self, named=self.named | named)

    def of_samples(self, chosen: Tensor) -> "Conditions":
        """For the samples of these indices alone."""
        return Conditions(_rows(self.positional, chosen), _rows(self.named, chosen))


def _check(where: str, value, batch: int) -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            _check(f"{where}[{name!r}]", part, batch)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _check(f"{where}[{i}]", part, batch)
    elif isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] != batch:
        raise ValueError(
            f"{where} must begin with the batch, which is {batch}, got {list(value.shape)}"
        )


def _rows(value, chosen: Tensor):
    if isinstance(value, dict):
        rows = {name: _rows(part, chosen) for name, part in value.items()}
        if type(value) is dict:
            return rows
        own = copy.copy(value)  # of a class of its own, such as a text encoder's output
        for name, part in rows.items():
            own[name] = part
        return own
    if isinstance(value, list | tuple):
        parts = [_rows(part, chosen) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Tensor) and value.ndim > 0:
        return value[chosen.to(value.device)]
    return value
