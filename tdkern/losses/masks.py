"""One set of random masks for two calls of a network, as consistency training needs it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ..preconditioning import unwrapped

# While a CUDA graph is captured there is no state to read. Who captures may say here how draws
# begin again where the last `net` began: by entering what this makes.
masks_begin_again: ContextVar[Callable[[], AbstractContextManager] | None] = ContextVar(
    "masks_begin_again", default=None
)
State = list[Tensor] | Callable[[], AbstractContextManager]


def random_state(net, device: torch.device) -> State | None:
    """The state of the generators that a call of `net` on a device draws its masks from.

    They are torch's global ones, of the CPU and of the device. None where the call draws nothing,
    which is looked for only where the states could not be read in vain: `torch.compile` breaks its
    graph there (and `fullgraph=True` refuses), and a CUDA graph's capture has no state to read.

    Raises:
        RuntimeError: a CUDA graph is being captured without `masks_begin_again`, and the network
            draws.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and masks_begin_again.get() is not None:
        return masks_begin_again.get()
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if (compiling or capturing) and not draws(net):
        return None
    if capturing:
        raise RuntimeError(
            "CTLoss: the two networks cannot share their dropout masks while a CUDA graph is "
            "captured; set the dropout to 0, or capture the step without the loss"
        )
    return _read(device)


@contextmanager
def drawing_from(states: State | None, device: torch.device):
    """Inside, the generators begin at `states`; behind it they are as before."""
    if states is None:
        yield
        return
    if callable(states):
        with states():
            yield
        return
    before = _read(device)
    _set(states, device)
    try:
        yield
    finally:
        _set(before, device)


def _read(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def in_mode_of(net, other):
    """Inside, `other` is in training where `net` is: an average rests in evaluation, without masks.

    Both are modules, else nothing is done.
    """
    modules = []
    if isinstance(net, nn.Module) and isinstance(other, nn.Module):
        training = unwrapped(net).training
        modules = [each for each in other.modules() if each.training != training]
    for each in modules:
        each.training = training
    try:
        yield
    finally:
        for each in modules:
            each.training = not training


def draws(net) -> bool:
    """Whether a network's module draws random numbers, by what is known: it is in training, and
    some part of it has a dropout above 0.
    """
    net = unwrapped(net)
    return isinstance(net, nn.Module) and any(
        each.training and _dropout(each) > 0 for each in net.modules()
    )


def _dropout(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    style = getattr(module, "style", module)
    found = (getattr(module, "label_dropout", 0), getattr(style, "dropout", 0))
    return max([each for each in found if isinstance(each, int | float)], default=0)
