"""Averages of a network's weights, and the decays that drive them."""

import copy
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .ops import ema_update_

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

POOR_FIT = 0.25  # of the norm of the profile that was asked for


class EMA(nn.Module):
    """An exponential moving average of a network: `average <- decay average + (1 - decay)
    parameter`.

    `module` is a frozen copy of the network, in evaluation mode; it is what to evaluate, to use as
    the target network and to save (`module.state_dict()`); a call of the EMA calls it. As a part of
    a larger module it moves and is saved with it. Its parameters require no gradient, so an
    optimizer of all the larger module's parameters leaves them alone, and the larger module's
    `train()` leaves it in evaluation mode.

    Parameters are averaged in their own dtype, so keep them float32: in half precision a change of
    1 - decay rounds away. An element that is not finite does not enter (`ema_update_`). Buffers are
    copied, and so are parameters of whole numbers, such as frozen quantised ones.

    FSDP2: make it before `fully_shard`, then shard `net` and `module` alike.

    Raises:
        ValueError: `net` is sharded already.
    """

    module: Any  # of the class that `net` has

    def __init__(self, net: nn.Module):
        super().__init__()
        if _sharded(net):
            raise ValueError(
                "EMA: net must be copied before fully_shard; make the EMA first, then shard net "
                "and the EMA's module alike"
            )
        self.module = copy.deepcopy(net).requires_grad_(False)
        self.eval()

    def forward(self, *args, **kwargs):
        """What `module` gives for these."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "EMA":
        """Leaves `module` as it is, but for `train(False)`: an average is not trained."""
        return self if mode else super().train(False)

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

        Under FSDP2 it also has the next call of `module` gather what the optimizer wrote.
        """
        for sharded in _sharded(self.module):
            sharded.reshard()
        for copied, buffer in zip(self.module.buffers(), net.buffers(), strict=True):
            copied.copy_(buffer)


def _sharded(net: nn.Module) -> "list[FSDPModule]":
    """The modules of `net` that FSDP2 shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # where nobody imported it nothing is sharded, and a walk takes time
        return []
    return [module for module in net.modules() if isinstance(module, fsdp.FSDPModule)]


@torch.no_grad()
def update(averages: Collection[EMA], net: nn.Module, decays: Sequence[float] | Tensor) -> None:
    """Take `net` into several averages, each with its own decay, reading its parameters once."""
    for module in (net, *averages):
        for sharded in _sharded(module):
            sharded.reshard()  # after a forward pass alone, FSDP2's root keeps whole parameters
    modules = (net, *(average.module for average in averages))
    lists, whole = [list(module.parameters()) for module in modules], []
    if not all(dtype.is_floating_point for dtype in {param.dtype for param in lists[0]}):
        lists, whole = map(list, zip(*map(_parted, lists), strict=True))
    params, *columns = lists
    ema_update_(columns, params, decays)
    for copies in whole[1:]:
        for copied, param in zip(copies, whole[0], strict=True):
            copied.copy_(param)
    for average in averages:
        average.copy_buffers(net)


def _parted(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that are averaged, complex ones as pairs of real numbers, and those of whole
    numbers, which are copied.
    """
    averaged: list[Tensor] = []
    whole: list[Tensor] = []
    for param in params:
        if param.is_complex():
            averaged.append(torch.view_as_real(param))
        else:
            (averaged if param.is_floating_point() else whole).append(param)
    return averaged, whole


class PowerFunctionEMA(nn.Module):
    """EDM2's averages with a power-function profile, any number at once (arXiv 2312.02696, section
    3.1).

    After update t the weight of an earlier update tau is proportional to tau^gamma: beta_t = (1 -
    1/t)^(gamma + 1). sigma_rel is the profile's standard deviation in units of t. `averages` maps
    each sigma_rel to an `EMA`, and what is said there of a larger module holds here too. Its
    `state_dict`, saved at times, is a snapshot from which `posthoc` makes the average of any other
    width; `step` is in it.

    Args:
        net: the network to average.
        sigma_rel: widths, each in (0, 12^-0.5].

    Raises:
        ValueError: a width is out of its range.
    """

    def __init__(self, net: nn.Module, sigma_rel: Sequence[float] = (0.05, 0.10)):
        super().__init__()
        self.gammas = {width: power_function_gamma(width) for width in sigma_rel}
        self.step = 0.0
        self.profiles: Any = nn.ModuleDict({_key_of(width): EMA(net) for width in self.gammas})

    @property
    def averages(self) -> dict[float, EMA]:
        """The average of each width."""
        return dict(zip(self.gammas, self.profiles.values(), strict=True))

    def decays(self, step: float) -> list[float]:
        """The decay of each average in update `step`, for `optim.AdamEMA` to average with."""
        if not step >= 1:
            raise ValueError(f"PowerFunctionEMA: step must be at least 1, got {step}")
        return [(1 - 1 / step) ** (gamma + 1) for gamma in self.gammas.values()]

    def update(self, net: nn.Module, step: float) -> None:
        """Take `net` into every average.

        Args:
            net: as of `EMA.update`.
            step: the count of updates so far with this one, from 1; the first copies. Where the
                batch size changes, the images so far with this batch's, over its size, as EDM2
                counts: 32 / 32, 64 / 32, then with batches of 256 the first is 320 / 256.

        Raises:
            ValueError: `step` is below 1.
        """
        update(self.averages.values(), net, self.decays(step))
        self.step = float(step)

    def copy_buffers(self, net: nn.Module, step: float) -> None:
        """What is left to do where `optim.AdamEMA` averages the parameters, by `decays(step)`."""
        for average in self.averages.values():
            average.copy_buffers(net)
        self.step = float(step)

    def get_extra_state(self) -> Tensor:
        """`step`, in what every format of tensors holds."""
        return torch.tensor(self.step, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take `step` from a state dict."""
        self.step = float(state)


def _key_of(sigma_rel: float) -> str:
    """The name of a width in a state dict, where points part names."""
    return repr(float(sigma_rel)).replace(".", "_")


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


def posthoc(
    snapshots: Sequence[Mapping[str, Tensor] | str | os.PathLike],
    sigma_rel: float,
    step: float | None = None,
) -> dict[str, Tensor]:
    """A network's average of any width, from stored averages of other widths (arXiv 2312.02696,
    section 3.2).

    The snapshots' profiles are weighted so that their sum is nearest to the profile asked for. More
    snapshots, two widths in each, make it nearer: a few dozen over a run give any width between
    theirs to a percent.

    Args:
        snapshots: state dicts of `PowerFunctionEMA`, or files of them, by `torch.save` or
            safetensors; files are read one at a time.
        sigma_rel: the width asked for, in (0, 12^-0.5].
        step: the update at which that average would end; None: the newest snapshot's.

    Returns:
        The network's state dict, to load into a network such as was averaged. Sums are in float64,
        tensors in the snapshots' dtypes; whole numbers are the newest snapshot's.

    Raises:
        ValueError: no snapshot, one that is no state of a `PowerFunctionEMA`, or an argument out
            of its range.

    Warns where no sum of the snapshots comes near the profile.
    """
    profiles, where = [], []
    for i, source in enumerate(snapshots):
        own_step, averages = _read_snapshot(source, i)
        profiles += [(width, own_step) for width in averages]
        where += [(i, width) for width in averages]
    if not profiles:
        raise ValueError("posthoc: snapshots must hold at least one state of a PowerFunctionEMA")
    newest = max(own_step for _, own_step in profiles)
    weights, error = posthoc_weights(profiles, sigma_rel, newest if step is None else step)
    if error > POOR_FIT:
        warnings.warn(
            f"posthoc: these snapshots give width {sigma_rel} only to {error:.0%} of its profile; "
            "use more snapshots, or widths on both sides of it",
            stacklevel=2,
        )
    return _weighted_sum(snapshots, dict(zip(where, weights.tolist(), strict=True)))


def _weighted_sum(
    snapshots: Sequence[Mapping[str, Tensor] | str | os.PathLike],
    weight_of: dict[tuple[int, float], float],
) -> dict[str, Tensor]:
    """The sum of all averages, each times the weight of (its snapshot's place, its width)."""
    sums = {}
    dtypes = {}
    whole_of = -1.0  # the step of the snapshot that whole numbers are taken from
    for i, source in enumerate(snapshots):
        own_step, averages = _read_snapshot(source, i)
        for width, tensors in averages.items():
            if sums and tensors.keys() != sums.keys():
                raise ValueError(f"posthoc: snapshots[{i}] is of another network than the others")
            for name, tensor in tensors.items():
                if tensor.is_floating_point() or tensor.is_complex():
                    wide = torch.promote_types(tensor.dtype, torch.float64)
                    part = tensor.to(wide) * weight_of[i, width]
                    sums[name] = sums[name] + part if name in sums else part
                elif own_step >= whole_of:
                    sums[name] = tensor.clone()
                dtypes[name] = tensor.dtype
        whole_of = max(whole_of, own_step)
    return {name: total.to(dtypes[name]) for name, total in sums.items()}


def posthoc_weights(
    profiles: Sequence[tuple[float, float]], sigma_rel: float, step: float
) -> tuple[np.ndarray, float]:
    """The weights of `posthoc`, and how far their profile is from the one asked for.

    The profile of width i that ends at t_i is p_i(t) = (gamma_i + 1) t^gamma_i / t_i^(gamma_i + 1)
    up to t_i, then 0. The weights x make the integral of (p - sum_i x_i p_i)^2 least: A x = b with
    the integrals A_ij of p_i p_j and b_i of p_i p. They are then divided by their sum, as the
    weights in an average have the sum 1.

    Args:
        profiles: (sigma_rel, step) of each average.
        sigma_rel, step: of the average asked for.

    Returns:
        (weights [n] float64, distance), the distance in the norm of p.

    Raises:
        ValueError: `step` is not above 0, or after the newest of the profiles.
    """
    steps = np.array([float(own) for _, own in profiles])
    if not 0 < step <= steps.max():
        raise ValueError(
            f"posthoc: step must be above 0 and at most the newest snapshot's {steps.max():g}, "
            f"got {step}"
        )
    gammas = np.array([power_function_gamma(width) for width, _ in profiles])
    steps, gamma = steps / step, power_function_gamma(sigma_rel)
    gram = _inner_products(gammas[:, None], steps[:, None], gammas, steps)
    cross, own = _inner_products(gammas, steps, gamma, 1.0), _inner_products(gamma, 1.0, gamma, 1.0)
    weights = np.linalg.lstsq(gram, cross, rcond=None)[0]
    weights /= weights.sum()
    squared = own - 2 * cross @ weights + weights @ gram @ weights
    return weights, math.sqrt(max(squared, 0.0) / own)


def _inner_products(gamma_a, step_a, gamma_b, step_b):
    """Integrals of the product of two profiles, of any shapes that broadcast."""
    earlier = np.minimum(step_a, step_b)
    at_earlier = (gamma_a + 1) / step_a * (earlier / step_a) ** gamma_a
    at_earlier = at_earlier * (gamma_b + 1) / step_b * (earlier / step_b) ** gamma_b
    return at_earlier * earlier / (gamma_a + gamma_b + 1)


def _read_snapshot(source, i: int) -> tuple[float, dict[float, dict[str, Tensor]]]:
    """The step of a snapshot, and of each width the network's state dict."""
    name = f"snapshots[{i}]"
    if isinstance(source, str | os.PathLike):
        name, source = os.fspath(source), _tensors_of(source)
    if not isinstance(source, Mapping) or "_extra_state" not in source:
        raise ValueError(f"posthoc: {name} must be the state dict of a PowerFunctionEMA")
    averages = {}
    for key, tensor in source.items():
        parts = re.fullmatch(r"profiles\.([^.]+)\.module\.(.+)", key)
        if parts:
            averages.setdefault(float(parts[1].replace("_", ".")), {})[parts[2]] = tensor
    step = float(source["_extra_state"])
    if not averages or not step >= 1:
        raise ValueError(f"posthoc: {name} holds no average, or none that was updated")
    return step, averages


def _tensors_of(path: str | os.PathLike) -> Mapping[str, Tensor]:
    """What a file of tensors holds; nothing in it is executed."""
    try:
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"posthoc: {path}: cannot be read ({reason}); give another file"
        ) from error


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
    stays = step % every != 0
    return stays.double() if isinstance(stays, Tensor) else float(stays)


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
    batch_size: int, halflife_img: float, cur_nimg: int, rampup_ratio: float | None = 0.05
) -> float:
    """EDM's decay of one update: the average's half-life is `halflife_img` images (arXiv
    2206.00364, appendix F.2).

    While fewer than halflife_img / rampup_ratio images were seen (`cur_nimg`), it is that share of
    them instead; with None there is no such ramp.
    """
    if rampup_ratio is not None:
        halflife_img = min(halflife_img, cur_nimg * rampup_ratio)
    return 0.5 ** (batch_size / max(halflife_img, 1e-8))
