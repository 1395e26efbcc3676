"""What every loss shares: the draws, the noisy pair, and one evaluation.

The evaluation is the same for every family, prediction and coupling.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ..columns import SCALE, SCALE_P, SIGMA, SIGMA_P, SKIP, SKIP_P, W_BASE, W_TD
from ..ema import EMA
from ..fields import flag, short
from ..ops import noise_pair, td_loss
from ..ops._modes import can_check_values
from ..ops.td_coef import BASE_WEIGHTS
from ..preconditioning import (
    Preconditioning,
    append_dims,
    is_compiled,
    knows_raw,
    tensor_of,
    unwrapped,
)
from ..schedules import two_moment
from ..weighting import NAMED_WEIGHTS, own_base_weight, td_weighting
from .conditions import Conditions

NO_TD = (-1.0, 0.0)  # as `td_sigma` of `td_coef`: no noise level has a TD term, so w_base = w


def lambda_base_flag():
    """The field of the base loss's weight, which all losses with TD have."""
    return flag(0.5, "Weight of the base loss beside its TD term, >= 0.")


OWN = "own"  # as `base_weight`, the weight that the family's own loss has
ALL_BASE_WEIGHTS = (OWN, *BASE_WEIGHTS, "inverse-step", *NAMED_WEIGHTS)


def base_weight_flag(default: str = OWN, *, kw_only: bool = True):
    """The field of the base loss's weight by noise level, which all losses have."""
    return flag(
        default,
        "Weight of a noise level in the base loss, of mean((x0 - D)^2); own is the family's, "
        "inverse-step is for consistency training. In Python also a callable of sigma.",
        choices=ALL_BASE_WEIGHTS,
        kw_only=kw_only,
    )


def share_flag():
    """The field of the target network's share of a batch, where it serves the TD term alone."""
    return flag(
        1.0,
        "Largest share of a batch that the target network runs on, in (0, 1], highest noise first; "
        "a sample beyond it has the base loss in place of its TD term.",
        metavar="SHARE",
        default_help="what --td-sigma needs, else 1",
    )


def share_of(p: float, batch: int) -> float:
    """A `td_share` for batches in which a sample has a TD term with probability p.

    It is p and one standard deviation of a batch's share, or 1 where that leaves no sample out.
    """
    share = min(p + (p * (1 - p) / batch) ** 0.5, 1.0)
    return share if math.ceil(share * batch) < batch else 1.0


class TDBatch(NamedTuple):
    """Clean data with every draw made: what a loss needs beside the networks."""

    x0: Tensor  # [B, ...] float32 or float64, clean data
    x_t: Tensor  # as x0, the online network's input
    x_tp: Tensor | None  # as x0, the target network's input; None where the loss has no TD term
    coef: Tensor  # [B, 8] float64, the eight numbers of `td_loss`
    levels: Tensor  # [B, 4] float64, the noise levels at t, tau, t', tau'
    # as x0, an estimate of the clean data at x_t' that differs from the one at x_t; None: x0
    x0_p: Tensor | None = None

    @property
    def sigma(self) -> Tensor:
        """[B] float64, the noise level of x_t."""
        return self.levels[:, SIGMA]

    @property
    def sigma_p(self) -> Tensor:
        """[B] float64, the noise level of x_t'."""
        return self.levels[:, SIGMA_P]


class TDTerms(NamedTuple):
    """A loss and its parts, one number for each sample."""

    loss: Tensor  # [B], td + base
    td: Tensor  # [B], weighted; 0 where not valid
    base: Tensor  # [B], weighted
    valid: Tensor  # [B] bool, whether the sample has a TD term


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] numbers as a column that multiplies `like`, [B, ...], in its dtype."""
    return append_dims(values.to(like.dtype), like.ndim)


def _scale_weights(coef: Tensor, gradient_scale: float, u: Tensor | None) -> None:
    """Multiply the weights in `coef` by the gradient's scale and by exp(-u), in place."""
    coef[:, W_TD:] *= gradient_scale
    if u is not None:
        coef[:, W_TD:] *= (-u.detach()).exp().to(coef.dtype)[:, None]


def _with_uncertainty(loss: Tensor, u: Tensor | None, gradient_scale: float) -> Tensor:
    """exp(-u) L + u of a loss [B] with exp(-u) in its weights, where it is a number: its gradient
    is that of exp(-u) L.
    """
    if u is None:
        return loss
    return loss - loss.detach() * (u - u.detach()) + gradient_scale * u


def path_coef(
    alpha: Tensor,
    sigma: Tensor,
    valid: Tensor,
    *,
    preconditioning: Preconditioning,
    eta: float,
    weight: str,
    lambda_base: float,
    base_weight: Callable[[Tensor, Tensor], Tensor] | None = None,
    mean_matching: bool = False,
) -> tuple[Tensor, Tensor]:
    """The columns of `td_loss`'s `coef` and the noise levels, for pairs on any path.

    It is what `td_coef` is for EDM's path: A = alpha_tau - kappa alpha_t by `two_moment`,
    D = skip x + scale F in EDM's state by the preconditioning, w_td by `weight`. The base loss has
    the weight w = 1/scale^2, in which it is the mean square error of F, or another. Where the pair
    leaves the path w_td = 0 and w_base is (1 + lambda_base) w or, with `mean_matching`,
    lambda_base w plus the weight of A^2 |x0 - D|^2, which is the TD term of a pair whose x_t' is
    the data itself.

    Args:
        alpha, sigma: [4, B] float64, the levels at t, tau, t', tau'.
        valid: [B] bool, whether the sample has a TD term.
        preconditioning: the network's.
        eta: DDIM's eta of the posterior means, in [0, 1]; it does not set the states' noise.
        weight: w_td, a name of `weighting.td_weighting`.
        lambda_base: weight of the base loss beside the TD term, >= 0.
        base_weight: w by (sigma, scale), [B] each.
        mean_matching: whether the whole return, which is known there, replaces the base loss.

    Returns:
        coef [B, 8] and levels [B, 4] = sigma / alpha, float64.
    """
    levels = sigma / alpha
    A, A_p = two_moment(alpha[0::2], sigma[0::2], alpha[1::2], sigma[1::2], eta=eta)[0]
    skip, scale = preconditioning.skip_scale(levels[0::2])
    w = scale[0] ** -2 if base_weight is None else base_weight(levels[0], scale[0])
    w_end = w
    if mean_matching:
        w_end = A**2 * td_weighting(weight, A, 0 * A, scale[0], 0 * A)
    w_td = torch.where(valid, td_weighting(weight, A, A_p, *scale), 0.0)
    w_base = lambda_base * w + torch.where(valid, 0.0, w_end)
    coef = torch.stack([skip[0], scale[0], skip[1], scale[1], A, A_p, w_td, w_base], 1)
    return coef, levels.T


L = TypeVar("L", bound="Loss")


@dataclass(frozen=True)
class Loss(ABC):
    """A loss of a network's output over noisy data.

    A family gives `preconditioning` and `pair`; the rest is here.
    """

    backend: str = field(default="auto", kw_only=True)  # which backend the ops use
    # (index of the first sample, samples) of the batch that the images are a part of; None: all
    place: tuple[int, int] | None = field(default=None, kw_only=True)
    # the families whose target network serves the TD term alone have it as an argument
    td_share = 1.0
    # whether the target network serves the TD term alone: the base loss does not look at it
    target_for_td_alone = True
    # the losses have it as an argument; annotated here it would be their first
    base_weight = cast("str | Callable", OWN)
    base_weights = tuple(name for name in ALL_BASE_WEIGHTS if name != "inverse-step")

    @property
    @abstractmethod
    def preconditioning(self) -> Preconditioning:
        """Whose raw output is the F that `TDBatch.coef` is made for."""

    @abstractmethod
    def pair(self, images: Tensor) -> TDBatch:
        """The noisy pair for `images`.

        Every draw may be given by keyword; the rest is drawn with torch's global generator.
        """

    def prepare(self, image_shape: tuple[int, ...]) -> None:  # noqa: B027  (most need nothing)
        """Fetch what a loss needs beside the networks, before the first step of a run.

        Args:
            image_shape: [channels, height, width] of the images.

        Raises:
            ValueError: the loss cannot be had of such images.
            ImportError: a library is missing; the message says how to get it.
        """

    def window_share(self, batch: int) -> float:
        """A `td_share` that leaves out next to no TD term in batches of a size."""
        return 1.0

    def part_of(self, first: int, samples: int) -> "Loss":
        """The loss of a part of a batch, whose draws are the whole batch's.

        With one seed of torch's generator any split of a batch, over accumulation rounds or
        processes, then sees the same levels and noise.

        Args:
            first: index of the part's first sample in the batch.
            samples: of the whole batch.
        """
        return self._with(place=(first, samples))

    def _with(self: L, **changes) -> L:
        """This loss with other values of its fields, which are not checked anew: a curriculum's
        first steps may have what is refused of a whole run, such as no TD term yet.
        """
        loss = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(loss, name, value)
        return loss

    def at(self, step: int) -> "Loss":
        """The loss of a training step, from 0: this one, unless a curriculum changes it."""
        return self

    def __call__(self, net, *args, **named) -> Tensor:
        """Loss of each sample [B] for fresh draws, differentiable in `net`'s parameters.

        `loss(net, target_net, images, labels=None, augment_pipe=None, *, uncertainty=None,
        gradient_scale=1.0, **conditions)`, or in EDM's own order without a target network,
        `loss(net, images, labels=None, augment_pipe=None)`, where there is no TD term. See the
        class, and `evaluate` for the arguments.

        Args:
            augment_pipe: images -> (images, augment_labels), or None.
        """
        if args and isinstance(args[0], Tensor):  # EDM's order
            args = (None, *args)
        return self._of_fresh_draws(net, *args, **named)

    def _of_fresh_draws(
        self,
        net,
        target_net=None,
        images: Any = None,
        labels: Tensor | None = None,
        augment_pipe=None,
        **named,
    ) -> Tensor:
        augment_labels = None
        if augment_pipe is not None:
            images, augment_labels = augment_pipe(images)
        batch = self.pair(images)
        return self.evaluate(net, target_net, batch, labels, augment_labels, **named).loss

    def evaluate(
        self,
        net,
        target_net,
        batch: TDBatch,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        uncertainty: Callable[[Tensor], Tensor] | None = None,
        gradient_scale: float = 1.0,
        **conditions,
    ) -> TDTerms:
        """The loss of a given pair, in its parts; docs/losses.md says more of each argument.

        Args:
            net: the online network, `net(x, sigma, labels, augment_labels=, **conditions) -> D`
                with x [B, ...] and sigma [B] in x's dtype, then what is given and nothing else. It
                may answer as `preconditioning.tensor_of` says. One whose `preconditioning` is the
                loss's is called with `raw=True` too and gives F: its preconditioning is then part
                of the one launch, also inside DDP, torch.compile or `fully_shard`.
            target_net: the same for the target network, or its `EMA`; it runs without gradients,
                and only on samples with a TD term where no device is waited for (see `_choose`).
            batch: from `pair`.
            labels: class labels, one-hot [B, classes] or indices [B], as the networks take them.
            augment_labels: [B, ...], passed on by their name.
            uncertainty: u(sigma) [B] of noise levels [B], such as `weighting.Uncertainty`: a
                sample's loss L becomes exp(-u) L + u.
            gradient_scale: a factor of all terms, > 0, in the weights before the launch: behind the
                loss it would be a second pass over the gradient. EDM's is elements over batch.
            conditions: handed to both networks by their names. Tensors begin with the batch.

        Returns:
            `TDTerms`, times `gradient_scale`. A term whose weight is 0 is left out: there the
            target network may give NaN. `td_share` below 1 takes a sample's TD term away.

        Raises:
            ValueError: no target network for a TD term, or a condition or output that does not fit.

        Gradient to `net`'s and `uncertainty`'s parameters. Deterministic if they are. No host wait.
        """
        name = type(self).__name__
        given = Conditions.of(name, len(batch.x0), labels, augment_labels, conditions)
        target_net = target_net.module if isinstance(target_net, EMA) else target_net
        # by the column, here and below: torch.compile before 2.13 cannot trace the property
        sigma = batch.levels[:, SIGMA]
        u = None if uncertainty is None else uncertainty(sigma)
        coef = batch.coef.clone()
        chosen = None
        if batch.x_tp is not None:
            chosen = self._choose(coef, sigma, target_net)
        _scale_weights(coef, gradient_scale, u)
        outputs = self._outputs(net, target_net, batch, given, chosen)
        terms = self._weighted(outputs, batch, coef)
        td, base = terms.unbind(1)
        loss = _with_uncertainty(terms.sum(1), u, gradient_scale)
        return TDTerms(loss, td, base, coef[:, W_TD] != 0)

    def _weighted(self, outputs: tuple, batch: TDBatch, coef: Tensor) -> Tensor:
        """[B, 2], td and base, of `_outputs`; an output without its x is D itself."""
        out, x_t, out_target, x_tp = outputs
        if x_t is None:
            coef[:, SKIP].fill_(0)
            coef[:, SCALE].fill_(1)
        if batch.x_tp is not None and x_tp is None:
            coef[:, SKIP_P].fill_(0)
            coef[:, SCALE_P].fill_(1)
        if batch.x0_p is not None:
            out_target = self._seen_from(batch.x0_p, batch.x0, coef[:, SCALE_P], out_target)
        dtype = torch.promote_types(out.dtype, out_target.dtype)
        return self._terms(out.to(dtype), out_target.to(dtype), batch.x0, coef, x_t, x_tp)

    def _seen_from(self, x0_p: Tensor, x0: Tensor, scale_p: Tensor, out_target: Tensor) -> Tensor:
        """The target's output with which e' = x0 - (skip' x_t' + scale' F') is x0_p - D'."""
        if not self.target_for_td_alone:
            raise ValueError(
                f"{type(self).__name__}: batch.x0_p must be None, as the base loss compares both "
                "networks' errors of one x0"
            )
        return out_target + (x0 - x0_p) / per_sample(scale_p, x0)

    def _terms(
        self,
        out: Tensor,
        out_target: Tensor,
        x0: Tensor,
        coef: Tensor,
        x_t: Tensor | None,
        x_tp: Tensor | None,
    ) -> Tensor:
        """[B, 2], td and base, of `td_loss`'s tensors.

        A family with another base loss overrides it.
        """
        return td_loss(out, out_target, x0, coef, x_t, x_tp, backend=self.backend)

    def _base_weight(self, sigma: Tensor, scale: Tensor) -> Tensor:
        """w of the base loss [B] at noise levels [B], float64; scale: of D = skip x + scale F."""
        if self.base_weight == OWN:
            return scale**-2
        sigma_data = getattr(self, "sigma_data", None)
        return own_base_weight(self.base_weight, sigma, sigma_data, type(self).__name__)

    def _check_base_weight(self) -> None:
        if not callable(self.base_weight) and self.base_weight not in self.base_weights:
            raise ValueError(
                f"{type(self).__name__}: base_weight must be one of "
                f"{', '.join(self.base_weights)}, or a callable, got {short(self.base_weight)}"
            )

    def _check_lambda_base(self) -> None:
        value = self.lambda_base  # type: ignore[attr-defined]  # of what has a TD term
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(
                f"{type(self).__name__}: lambda_base must be a number >= 0, got {short(value)}"
            )

    def _choose(self, coef: Tensor, sigma: Tensor, target_net) -> Tensor | None:
        """Which samples the target network runs on, None being all.

        Of those with a TD term they are as many as `td_share` leaves room for, the largest sigma
        first. The others lose their TD term: in `coef` w_td = 0, and w_base gains the w that it
        would have had. Samples without a TD term fill what room is left, so that the number is
        ceil(td_share B) wherever the device would have to be waited for. Where it need not be (on
        the CPU, outside `torch.compile`, transforms and traces, for a module that serves the TD
        term alone) there is room for what has a TD term alone, and for one sample where nothing
        has: every process then calls a network under `fully_shard` as often as the others.
        Of a network of several models each runs on as many.
        """
        num_models = getattr(unwrapped(target_net), "num_models", 1)
        size = room = len(sigma) // num_models
        valid = coef[:, W_TD] != 0
        if self.td_share < 1:
            room = math.ceil(self.td_share * size)
        if self._may_count(coef, target_net):
            room = min(room, max(int(valid.unflatten(0, (num_models, -1)).sum(1).max()), 1))
        if room >= size:
            return None
        # topk may break ties anyhow
        order = (
            torch.where(valid, sigma, -1.0)
            .unflatten(0, (num_models, -1))
            .argsort(descending=True, stable=True)
        )
        first = torch.arange(num_models, device=sigma.device)[:, None] * size
        chosen = (order[:, :room] + first).flatten()
        if self.td_share < 1:
            dropped = valid.index_fill(0, chosen, False)
            coef[:, W_TD].masked_fill_(dropped, 0.0)
            w = self._base_weight(sigma, coef[:, SCALE])
            coef[:, W_BASE] += torch.where(dropped, w, 0.0)
        return chosen

    def _may_count(self, coef: Tensor, target_net) -> bool:
        """Whether the number of samples that the target network runs on may be what they need.

        It may where no device is waited for, and a module takes any number without being compiled
        anew; of another callable nothing is known.
        """
        return (
            self.target_for_td_alone
            and can_check_values(coef)
            and isinstance(target_net, nn.Module)
            and not is_compiled(target_net)
        )

    def _outputs(
        self, net, target_net, batch: TDBatch, conditions: Conditions, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The outputs of both networks, each with its x; see `_predict`."""
        out, x_t = self._predict("net", net, batch.x_t, batch.levels[:, SIGMA], conditions)
        if batch.x_tp is None:
            return out, x_t, out.detach(), None  # never read: every w_td is 0
        return out, x_t, *self._predict_target(target_net, batch, conditions, chosen)

    def _predict_target(
        self, target_net, batch: TDBatch, conditions: Conditions, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`_predict` of the target network, without gradients."""
        if target_net is None:
            raise ValueError(f"{type(self).__name__}: target_net must be a network, got None")
        x, sigma = batch.x_tp, batch.levels[:, SIGMA_P]
        assert x is not None
        with torch.no_grad():
            if chosen is None:
                return self._predict("target_net", target_net, x, sigma, conditions)
            part, of_part = self._predict(
                "target_net", target_net, x[chosen], sigma[chosen], conditions.of_samples(chosen)
            )
            # the others' outputs are whatever memory held
            out = part.new_empty(len(x), *part.shape[1:]).index_copy(0, chosen, part)
        return out, None if of_part is None else x

    def _predict(
        self, argument: str, net, x: Tensor, sigma: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor | None]:
        """A network's output and the x of D = skip x + scale output, None where the output is D."""
        fused = self.fits(net)
        if fused:
            conditions = conditions.with_(raw=True)
        who = f"{type(self).__name__}: {argument}"
        if not callable(net):
            raise ValueError(f"{who} must be a network, got {type(net).__name__}")
        out = net(x, sigma.to(x.dtype), *conditions.positional, **conditions.named)
        out = tensor_of(out, who)
        if out.shape != x.shape:
            raise ValueError(
                f"{who} must answer {list(x.shape)}, as it is asked, got {list(out.shape)}"
            )
        if x.dtype == torch.float64 and out.dtype != x.dtype:
            raise ValueError(
                f"{who} must answer float64 images in float64, got {out.dtype}: give "
                "images.float(), or net.double()"
            )
        return out, x if fused else None

    def _check_share(self) -> None:
        if not 0 < self.td_share <= 1:
            raise ValueError(
                f"{type(self).__name__}: td_share must be above 0 and at most 1, got "
                f"{self.td_share}"
            )

    def fits(self, net) -> bool:
        """Whether a network takes the fused path, wrapped or not: its preconditioning is the
        loss's, and it says itself what `raw=True` means.
        """
        inner = unwrapped(net)
        same = getattr(inner, "preconditioning", None) == self.preconditioning
        return same and knows_raw(inner)

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise ValueError(
                f"{type(self).__name__}: images must be a tensor, got {type(images).__name__}"
            )
        if images.dtype not in (torch.float32, torch.float64) or images.ndim == 0:
            raise ValueError(
                f"{type(self).__name__}: images must be [B, ...] of float32 or float64, got "
                f"{list(images.shape)} of {images.dtype}"
            )

    def _check_shape(self, name: str, tensor: Tensor, shape: torch.Size) -> None:
        if tensor.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: {name} must have shape {list(shape)}, got "
                f"{list(tensor.shape)}"
            )

    def _noisy_pair(
        self,
        x0: Tensor,
        sigma: Tensor,
        sigma_p: Tensor,
        coupling: str,
        noise: Tensor | None,
        noise_p: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(x_t, x_t') in EDM's state.

        They lie on one Markov path with `noise_p` up to x_t' and `noise` from there, or share one
        noise.

        With neither noise given the pair comes from the `noise_pair` op, and its seed from torch's
        global generator on x0's device.
        """
        shared = coupling == "shared"
        if shared and noise_p is not None:
            raise ValueError(
                f"{type(self).__name__}: noise_p must be None with shared coupling, where noise "
                "serves both levels"
            )
        if noise is None and noise_p is None:
            one, seed = torch.ones_like(sigma), torch.randint(2**63 - 1, (1,), device=x0.device)
            return noise_pair(
                x0,
                one,
                sigma,
                one,
                sigma_p,
                coupling=coupling,
                seed=seed,
                first_sample=self.place[0] if self.place else 0,
                backend=self.backend,
            )
        noise = self._noise("noise", noise, x0)
        x_tp = x0 + per_sample(sigma_p, x0) * (
            noise if shared else self._noise("noise_p", noise_p, x0)
        )
        if shared:
            return x0 + per_sample(sigma, x0) * noise, x_tp
        return x_tp + per_sample((sigma**2 - sigma_p**2).clamp(min=0).sqrt(), x0) * noise, x_tp

    def _draw(self, images: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """[B] numbers for `images`, of the whole batch that they are a part of.

        draw: gives so many.
        """
        if self.place is None:
            return draw(len(images))
        first, samples = self.place
        return draw(samples)[first : first + len(images)]

    def _noise(self, name: str, given: Tensor | None, images: Tensor) -> Tensor:
        """Unit noise like `images`: the one given, or a draw."""
        if given is None:
            return torch.randn_like(images)
        self._check_shape(name, given, images.shape)
        return given.to(images.dtype)
