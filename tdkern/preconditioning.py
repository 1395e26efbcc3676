"""What a network's raw output F stands for, as the two numbers of D = skip x + scale F.

x is EDM's state, x = x_t / alpha_t = x0 + sigma eps, and sigma = sigma_t / alpha_t its noise level.
Preconditionings are values: a network has one, a loss has one, and where the two are equal the loss
reads the network's raw output, so that the preconditioning is part of its one launch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Preconditioning(ABC):
    """A kind of raw output; equal to another of its class with the same settings."""

    # whether D is known at an infinite noise level, where no signal is left in x_t. The state there
    # is the unit noise x / sigma, and skip the limit of skip sigma.
    reaches_noise = False

    @abstractmethod
    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(skip, scale) of D = skip x + scale F at noise levels of any shape, in their dtype.

        Differentiable and deterministic, without host synchronisation.
        """


@dataclass(frozen=True)
class EDM(Preconditioning):
    """EDM's (arXiv 2206.00364, eq. 7 and table 1); sd is `sigma_data`, the data's deviation.

    skip = sd^2 / (s^2 + sd^2), scale = s sd / sqrt(s^2 + sd^2).
    """

    sigma_data: float = 0.5

    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt()


@dataclass(frozen=True)
class CT(Preconditioning):
    """Consistency models' (arXiv 2303.01469, appendix C): EDM's, with D(x, sigma_min) = x.

    skip = sd^2 / ((s - s_min)^2 + sd^2), scale = (s - s_min) sd / sqrt(s^2 + sd^2).
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        above = sigma - self.sigma_min
        skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return skip, above * self.sigma_data * (sigma**2 + self.sigma_data**2).rsqrt()


@dataclass(frozen=True)
class X0(Preconditioning):
    """F predicts x0, on any path: D = F."""

    reaches_noise = True

    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(sigma), torch.ones_like(sigma)


@dataclass(frozen=True)
class Eps(Preconditioning):
    """F predicts eps, on any path: D = x - sigma F."""

    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), -sigma


@dataclass(frozen=True)
class V(Preconditioning):
    """F predicts v = alpha_t eps - sigma_t x0 on a VP path (arXiv 2202.00512).

    D = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) F, which is -F at an infinite level.
    """

    reaches_noise = True

    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        scale = -sigma * (1 + sigma**2).rsqrt()
        return 1 / (1 + sigma**2), torch.where(sigma.isinf(), -1.0, scale)


@dataclass(frozen=True)
class Velocity(Preconditioning):
    """F predicts flow matching's velocity eps - x0: D = (x - sigma F) / (1 + sigma).

    (arXiv 2210.02747.) At an infinite level, where x is the unit noise, it is x - F.
    """

    reaches_noise = True

    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        noise = sigma.isinf()
        skip, scale = 1 / (1 + sigma), -sigma / (1 + sigma)
        return torch.where(noise, 1.0, skip), torch.where(noise, -1.0, scale)


@dataclass(frozen=True)
class Score(Preconditioning):
    """F predicts sigma times the score, which is -eps (arXiv 2011.13456): D = x + sigma F."""

    def skip_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma


PREDICTIONS = {"x0": X0(), "eps": Eps(), "v": V(), "velocity": Velocity(), "score": Score()}


def _with_inner(net) -> list:
    """A network and, in turn, what torch's own wrappers around it hold, such as
    DistributedDataParallel and what torch.compile returns, which hand their arguments on.
    """
    found = [net]
    while isinstance(net, nn.Module) and net.__module__.startswith("torch."):
        children = dict(net.named_children())
        net = children.get("_orig_mod", children.get("module"))
        if net is None:
            break
        found.append(net)
    return found


def unwrapped(net):
    """The network inside torch's own wrappers, or `net` itself where it is in none.

    `fully_shard` changes a network in place and wraps nothing.
    """
    return _with_inner(net)[-1]


def knows_raw(net) -> bool:
    """Whether a network's own call has the argument `raw`.

    One that only hands it on, as `forward(self, *args, **kwargs)` of a subclass does, may change
    what comes back, and means the denoised image.
    """
    call = type(net).forward if isinstance(net, nn.Module) else type(net).__call__
    return not hasattr(call, "__code__") or "raw" in call.__code__.co_varnames


def is_compiled(net) -> bool:
    """Whether `torch.compile` holds a network, or the model in its preconditioning: a batch of
    another size would be compiled anew.
    """
    layers = [*_with_inner(net), *_with_inner(getattr(unwrapped(net), "model", None))]
    return any(
        "_orig_mod" in layer._modules or layer._compiled_call_impl is not None
        for layer in layers
        if isinstance(layer, nn.Module)
    )


def tensor_of(answer, who: str) -> Tensor:
    """The tensor in what a network answered.

    It is the answer itself, the first of a tuple or a list, or the `sample` of an object or a dict,
    as diffusers' models have it. Raises ValueError, which begins with `who`, where there is none.
    """
    found = answer
    if isinstance(answer, dict):
        found = answer.get("sample")
    elif isinstance(answer, tuple | list):
        found = answer[0] if answer else None
    elif not isinstance(answer, Tensor):
        found = getattr(answer, "sample", None)
    if isinstance(found, Tensor):
        return found
    raise ValueError(
        f"{who} must return a tensor, a tuple that begins with one, or an object or a dict that "
        f"has one as `sample`, got {type(answer).__name__}"
    )


def append_dims(values: Tensor, ndim: int) -> Tensor:
    """[B] numbers as [B, 1, ...] of so many dimensions, so that they multiply a batch."""
    return values.reshape(-1, *[1] * (ndim - 1))
