"""What every loss shares: the draws, the noisy pair, and one evaluation.

The evaluation is the same for every family, prediction and coupling.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..columns import SCALE, SCALE_P, SIGMA, SIGMA_P, SKIP, SKIP_P, W_BASE, W_TD
from ..fields import flag
from ..ops import noise_pair, td_loss
from ..preconditioning import Preconditioning, append_dims, unwrapped
from ..schedules import two_moment
from ..weighting import td_weighting

NO_TD = (-1.0, 0.0)  # as `td_sigma` of `td_coef`: no noise level has a TD term, so w_base = w


def lambda_base_flag():
    """The field of the base loss's weight, which all losses with TD have."""
    return flag(0.5, "Weight of the base loss beside its TD term, >= 0.")


def share_flag():
    """The field of the target network's share of a batch, where it serves the TD term alone."""
    return flag(
        1.0,
        "The most of each batch that the target network runs on, highest noise first, in (0, 1]; a "
        "sample whose TD term has no room has the base loss in its place.",
        metavar="SHARE",
        default_help="what --td-sigma needs, else 1",
    )


class TDBatch(NamedTuple):
    """Clean data with every draw made: what a loss needs beside the networks."""

    x0: Tensor  # [B, ...] float32 or float64, clean data
    x_t: Tensor  # as x0, the online network's input
    x_tp: Tensor | None  # as x0, the target network's input; None where the loss has no TD term
    coef: Tensor  # [B, 8] float64, the eight numbers of `td_loss`
    levels: Tensor  # [B, 4] float64, the noise levels at t, tau, t', tau'

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


def path_coef(
    alpha: Tensor,
    sigma: Tensor,
    valid: Tensor,
    *,
    preconditioning: Preconditioning,
    eta: float,
    weight: str,
    lambda_base: float,
    mean_matching: bool = False,
) -> tuple[Tensor, Tensor]:
    """The columns of `td_loss`'s `coef` and the noise levels, for pairs on any path.

    It is what `td_coef` is for EDM's path: A = alpha_tau - kappa alpha_t by `two_moment`,
    D = skip x + scale F in EDM's state by the preconditioning, w_td by `weight`. The base loss has
    the weight w = 1/scale^2, in which it is the mean square error of F. Where the pair leaves the
    path w_td = 0 and w_base is (1 + lambda_base) w or, with `mean_matching`, lambda_base w plus the
    weight of A^2 |x0 - D|^2, which is the TD term of a pair whose x_t' is the data itself.

    Args:
        alpha, sigma: [4, B] float64, the levels at t, tau, t', tau'.
        valid: [B] bool, whether the sample has a TD term.
        preconditioning: the network's.
        eta: DDIM's eta of the posterior means, in [0, 1]; it does not set the states' noise.
        weight: w_td, a name of `weighting.td_weighting`.
        lambda_base: weight of the base loss beside the TD term, >= 0.
        mean_matching: whether the whole return, which is known there, replaces the base loss.

    Returns:
        coef [B, 8] and levels [B, 4] = sigma / alpha, float64.
    """
    levels = sigma / alpha
    A, A_p = two_moment(alpha[0::2], sigma[0::2], alpha[1::2], sigma[1::2], eta=eta)[0]
    skip, scale = preconditioning.skip_scale(levels[0::2])
    w = scale[0] ** -2
    w_end = w
    if mean_matching:
        w_end = A**2 * td_weighting(weight, A, 0 * A, scale[0], 0 * A)
    w_td = torch.where(valid, td_weighting(weight, A, A_p, *scale), 0.0)
    w_base = lambda_base * w + torch.where(valid, 0.0, w_end)
    coef = torch.stack([skip[0], scale[0], skip[1], scale[1], A, A_p, w_td, w_base], 1)
    return coef, levels.T


@dataclass(frozen=True)
class Loss(ABC):
    """A loss of a network's output over noisy data.

    A family gives `preconditioning` and `pair`; the rest is here.
    """

    backend: str = field(default="auto", kw_only=True)  # which backend the ops use
    # the families whose target network serves the TD term alone have it as an argument
    td_share = 1.0

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

    def at(self, step: int) -> "Loss":
        """The loss of a training step, from 0: this one, unless a curriculum changes it."""
        return self

    def __call__(
        self,
        net,
        target_net,
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe=None,
        *,
        gradient_scale: float = 1.0,
    ) -> Tensor:
        """Loss of each sample [B] for fresh draws, differentiable in `net`'s parameters.

        See the class, and `evaluate` for `gradient_scale`.
        """
        augment_labels = None
        if augment_pipe is not None:
            images, augment_labels = augment_pipe(images)
        batch = self.pair(images)
        terms = self.evaluate(
            net, target_net, batch, labels, augment_labels, gradient_scale=gradient_scale
        )
        return terms.loss

    def evaluate(
        self,
        net,
        target_net,
        batch: TDBatch,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        gradient_scale: float = 1.0,
    ) -> TDTerms:
        """The loss of a given pair, in its parts.

        Args:
            net: the online network, `net(x, sigma, class_labels, augment_labels) -> D` with x
                [B, ...] and sigma [B] in x's dtype. One whose `preconditioning` equals the loss's
                is called with `raw=True` too and gives F: its preconditioning is then part of the
                one fused launch. So is one inside DistributedDataParallel, torch.compile, both, or
                under `fully_shard`.
            target_net: the same for the target network; it runs without gradients, and not at all
                without a TD term.
            batch: from `pair`.
            labels, augment_labels: passed to both networks, or None.
            gradient_scale: a factor of all terms, > 0, in the weights before the launch: the
                gradient of `terms.loss.sum()` is then handed out as the launch has written it. A
                factor behind the loss is a second pass over it. EDM's is a sample's elements over
                the batch size.

        Returns:
            `TDTerms`, times `gradient_scale`. A term whose weight is 0 is left out, so the target
            network may give NaN there. With `td_share` below 1 a sample that the target network had
            no place for is as one without a TD term.

        Raises:
            ValueError: a TD term without a target network, or an output of a wrong shape or dtype.

        Gradient to `net`'s parameters only. Deterministic if the networks are. No host
        synchronisation.
        """
        conditions = {"class_labels": labels, "augment_labels": augment_labels}
        coef = batch.coef.clone()
        chosen = None
        if self.td_share < 1:
            num_models = getattr(unwrapped(target_net), "num_models", 1)
            chosen = self._choose(coef, batch.sigma, num_models)
        coef[:, W_TD:] *= gradient_scale
        out, x_t = self._predict(net, batch.x_t, batch.sigma, conditions)
        if x_t is None:
            coef[:, SKIP].fill_(0)
            coef[:, SCALE].fill_(1)
        if batch.x_tp is None:
            out_target, x_tp = out.detach(), None  # never read: every w_td is 0
        else:
            out_target, x_tp = self._predict_target(target_net, batch, conditions, chosen)
            if x_tp is None:
                coef[:, SKIP_P].fill_(0)
                coef[:, SCALE_P].fill_(1)
        dtype = torch.promote_types(out.dtype, out_target.dtype)
        terms = self._terms(out.to(dtype), out_target.to(dtype), batch.x0, coef, x_t, x_tp)
        td, base = terms.unbind(1)
        return TDTerms(terms.sum(1), td, base, coef[:, W_TD] != 0)

    def _predict_target(
        self, target_net, batch: TDBatch, conditions: dict, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`_predict` of the target network, without gradients."""
        assert batch.x_tp is not None
        if target_net is None:
            raise ValueError(f"{type(self).__name__}: target_net must be a network, got None")
        with torch.no_grad():
            return self._predict(target_net, batch.x_tp, batch.sigma_p, conditions, chosen)

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

    def _choose(self, coef: Tensor, sigma: Tensor, num_models: int) -> Tensor:
        """Which samples the target network runs on.

        Of those with a TD term they are as many as `td_share` leaves room for, the largest sigma
        first.

        The others lose their TD term: in `coef` w_td = 0 and w_base gains the w = 1/scale^2 that it
            would have had. Samples without a TD term
        fill what room is left, so that the number is always ceil(td_share B), and of a network of
        several models each runs on as many.
        """
        valid = coef[:, W_TD] != 0
        order = (
            torch.where(valid, sigma, -1.0)
            .unflatten(0, (num_models, -1))
            .argsort(descending=True, stable=True)
        )  # topk may break ties anyhow
        first = torch.arange(num_models, device=sigma.device)[:, None] * order.shape[1]
        chosen = (order[:, : math.ceil(self.td_share * order.shape[1])] + first).flatten()
        dropped = valid.index_fill(0, chosen, False)
        coef[:, W_TD].masked_fill_(dropped, 0.0)
        coef[:, W_BASE] += torch.where(dropped, coef[:, SCALE] ** -2, 0.0)
        return chosen

    def _predict(
        self,
        net,
        x: Tensor,
        sigma: Tensor,
        conditions: dict,
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A network's output and the x of D = skip x + scale output, None where the output is D.

        chosen: the indices of the samples to run the network on; the others' outputs are then
            whatever memory held.
        """
        sigma = sigma.to(x.dtype)
        fused = self.fits(net)
        if fused:
            conditions = conditions | {"raw": True}
        if chosen is None:
            out = net(x, sigma, **conditions)
        else:
            theirs = {
                name: value[chosen] if isinstance(value, Tensor) else value
                for name, value in conditions.items()
            }
            part = net(x[chosen], sigma[chosen], **theirs)
            out = part.new_empty(len(x), *part.shape[1:]).index_copy(0, chosen, part)
        return out, x if fused else None

    def _check_share(self) -> None:
        if not 0 < self.td_share <= 1:
            raise ValueError(
                f"{type(self).__name__}: td_share must be above 0 and at most 1, got "
                f"{self.td_share}"
            )

    def fits(self, net) -> bool:
        """Whether a network takes the fused path, wrapped or not: its preconditioning is the
        loss's.
        """
        return getattr(unwrapped(net), "preconditioning", None) == self.preconditioning

    def _check_images(self, images: Tensor) -> None:
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
                x0, one, sigma, one, sigma_p, coupling=coupling, seed=seed, backend=self.backend
            )
        noise = self._noise("noise", noise, x0)
        x_tp = x0 + per_sample(sigma_p, x0) * (
            noise if shared else self._noise("noise_p", noise_p, x0)
        )
        if shared:
            return x0 + per_sample(sigma, x0) * noise, x_tp
        return x_tp + per_sample((sigma**2 - sigma_p**2).clamp(min=0).sqrt(), x0) * noise, x_tp

    def _noise(self, name: str, given: Tensor | None, images: Tensor) -> Tensor:
        """Unit noise like `images`: the one given, or a draw."""
        if given is None:
            return torch.randn_like(images)
        self._check_shape(name, given, images.shape)
        return given.to(images.dtype)
