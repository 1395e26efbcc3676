"""Averages of a network's weights, and the decays that drive them."""

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .ops import ema_update_


class EMA:
    """An exponential moving average of a network: `average <- decay average + (1 - decay)
    parameter`.

    `module` is a frozen copy of the network, in evaluation mode; it is what to evaluate, to use as
    the target network and to save (`module.state_dict()`). Parameters are averaged in their own
    dtype, so keep them float32: in half precision a change of 1 - decay rounds away. An element
    that is not finite does not enter (`ema_update_`). Buffers are copied.
    """

    def __init__(self, net: nn.Module):
        self.module: Any = copy.deepcopy(net).eval().requires_grad_(False)

    def update(self, net: nn.Module, decay: float) -> None:
        """Take `net`'s parameters into the average, and its buffers as they are.

        Args:
            net: the network that was copied, or a wrapper with the same parameters in the same
                order, such as DDP.
            decay: in [0, 1]; 0 copies.

        Raises:
            ValueError: `decay` is out of its range.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA.update: decay must be in [0, 1], got {decay}")
        update([self], net, [decay])

    @torch.no_grad()
    def copy_buffers(self, net: nn.Module) -> None:
        """Take `net`'s buffers as they are: what is left to do where `optim.AdamEMA` averages the
        parameters.
        """
        for copied, buffer in zip(self.module.buffers(), net.buffers(), strict=True):
            copied.copy_(buffer)


@torch.no_grad()
def update(averages: Collection[EMA], net: nn.Module, decays: Sequence[float]) -> None:
    """Take `net` into several averages, each with its own decay, reading its parameters once."""
    ema_update_(
        [list(average.module.parameters()) for average in averages], list(net.parameters()), decays
    )
    for average in averages:
        average.copy_buffers(net)


class PowerFunctionEMA:
    """EDM2's averages with a power-function profile, any number at once (arXiv 2312.02696, section
    3.1).

    After update t the weight of an earlier update tau is proportional to tau^gamma: beta_t = (1 -
    1/t)^(gamma + 1). sigma_rel is the profile's standard deviation in units of t. `averages` maps
    each sigma_rel to an `EMA`.

    Args:
        net: the network to average.
        sigma_rel: widths, each in (0, 12^-0.5].

    Raises:
        ValueError: a width is out of its range.
    """

    def __init__(self, net: nn.Module, sigma_rel: tuple[float, ...] = (0.05, 0.10)):
        self.gammas = {width: power_function_gamma(width) for width in sigma_rel}
        self.averages = {width: EMA(net) for width in sigma_rel}

    def update(self, net: nn.Module, step: int) -> None:
        """Take `net` into every average.

        `step`: the count of updates so far with this one, from 1; the first copies.
        """
        if step < 1:
            raise ValueError(f"PowerFunctionEMA.update: step must be at least 1, got {step}")
        update(
            self.averages.values(),
            net,
            [(1 - 1 / step) ** (gamma + 1) for gamma in self.gammas.values()],
        )


def power_function_gamma(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of a power-function average of relative width sigma_rel.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for its largest root.
    """
    if not 0 < sigma_rel <= 12**-0.5:  # 12^-0.5 is gamma = 0, the plain mean
        raise ValueError(
            f"power_function_gamma: sigma_rel must be in (0, 12^-0.5], got {sigma_rel}"
        )
    # (gamma + 2)^2 (gamma + 3) - (gamma + 1) / sigma_rel^2
    cubic = [1, 7, 16 - 1 / sigma_rel**2, 12 - 1 / sigma_rel**2]
    return float(max(np.roots(cubic).real))


def target_decay(rate: float, step: int) -> float:
    """Decay of the target network at update `step`, from 0: min(rate, (1 + step) / (10 + step)).

    The ramp lets the target follow while the network still moves fast: TD bootstraps from it, and
    with a constant .999 in a run of 2,000 steps it lags so far behind that training fails.
    """
    return min(rate, (1 + step) / (10 + step))


def copy_decay(every: int, step: int | Tensor) -> float | Tensor:
    """Decay of a target network that is copied from the network at every `every`th update, from 0,
    and stays as it is between: 0 or 1.

    Adam's own count, a tensor, as `step` leaves out the steps that it skips: a copy that was due at
    one is made at the next.
    """
    return (step % every != 0) * 1.0


def consistency_decay(rate: float, start_scales: int, num_scales: int) -> float:
    """Decay of consistency training's target (arXiv 2303.01469): exp(s0 ln(mu0) / (N - 1)), as its
    code has it; N in place of N - 1 in its appendix C.

    It rises with a curriculum's number of scales N = `num_scales` >= 2, from mu0 = `rate` in (0, 1)
    at N = s0 + 1, s0 being `start_scales`. Improved consistency training needs no call: its decay
    is 0, a target that copies the network. Raises ValueError out of these ranges.
    """
    if not (0 < rate < 1 and num_scales >= 2):
        raise ValueError(
            f"consistency_decay: rate must be in (0, 1) and num_scales at least 2, got {rate} and "
            f"{num_scales}"
        )
    return math.exp(start_scales * math.log(rate) / (num_scales - 1))


def edm_decay(
    batch_size: int, halflife_img: float, cur_nimg: int, rampup_ratio: float = 0.05
) -> float:
    """EDM's decay of one update: the average's half-life is `halflife_img` images (arXiv
    2206.00364, appendix F.2).

    While fewer than halflife_img / rampup_ratio images were seen (`cur_nimg`), it is that share of
    them instead.
    """
    return 0.5 ** (batch_size / max(min(halflife_img, cur_nimg * rampup_ratio), 1e-8))
