"""EDM's training loop: its loss by its own call, with a TD term, its sampler and its networks.

Only the calls are EDM's (arXiv 2206.00364); nothing of its code is here.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import networks
from ..ema import EMA
from ..losses import TDEDMLoss
from ..preconditioning import append_dims
from ..samplers import heun
from ..schedules import EDM
from .targets import attach_target, paper_decay

__all__ = ["EDMPrecond", "TDLoss", "VEPrecond", "VPPrecond", "edm_sampler", "iDDPMPrecond"]


class TDLoss:
    """EDM's loss with a TD term, as EDM's loop constructs and calls its own.

    `loss_fn(net=ddp, images=images, labels=labels, augment_pipe=augment_pipe)` gives [B, C, H, W],
    each element the mean of its sample's loss, so that the loop's own line
    `loss.sum().mul(loss_scaling / batch_gpu_total).backward()` gives gradients of EDM's scale on
    any number of processes, and what it reports is EDM's mean over elements.

    The target network comes with `attach`, behind the optimizer's construction: each step updates
    it, and the optimizer's state, which EDM's loop saves and loads, holds it. It is not pickled
    with the loss, which EDM writes into every snapshot.

    Args:
        decay: of the target network, as `attach_target` takes it.
        settings: of `losses.TDEDMLoss`, such as sigma_data.
    """

    def __init__(self, *, decay: float | Callable[[int], float] = paper_decay, **settings):
        self.loss, self.decay = TDEDMLoss(**settings), decay
        self.target: EMA | None = None

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer, target: EMA | None = None):
        """Make the target network; see `attach_target`."""
        self.target = attach_target(net, optimizer, decay=self.decay, target=target)

    def __call__(
        self, net, images: Tensor, labels: Tensor | None = None, augment_pipe=None
    ) -> Tensor:
        """The loss as images [B, C, H, W]; raises ValueError without a target."""
        loss = self.per_sample(net, images, labels, augment_pipe)
        return append_dims(loss, images.ndim).expand(images.shape)

    def per_sample(self, net, images: Tensor, labels: Tensor | None, augment_pipe) -> Tensor:
        """The loss of each sample, [B]."""
        if self.target is None:
            raise ValueError(
                f"{type(self).__name__}: it has no target network yet; call attach(net, optimizer) "
                "behind the optimizer's construction"
            )
        return self.loss(net, self.target, images, labels, augment_pipe)

    def __getstate__(self) -> dict:
        return vars(self) | {"target": None}


def edm_sampler(
    net,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
) -> Tensor:
    """EDM's second-order sampler by its own signature (arXiv 2206.00364, algorithm 2).

    Args:
        net: EDM's network or one of `tdkern.networks`: it has sigma_min, sigma_max and round_sigma.
        latents: [B, C, H, W], unit noise.
        class_labels: [B, label_dim] one-hot, or None.
        randn_like: the noise of churn.
        num_steps, sigma_min, sigma_max, rho: of `schedules.EDM`, within the network's levels.
        S_churn, S_min, S_max, S_noise: as of `samplers.heun`.

    Returns:
        The images, float64, as EDM's.
    """
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    levels = EDM(num_steps, low, high, rho).sigmas()[:-1].to(latents.device)
    sigmas = torch.cat([net.round_sigma(levels), levels.new_zeros(1)])
    return heun(
        partial(net, class_labels=class_labels),
        latents.double() * sigmas[0],
        sigmas,
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
        S_noise=S_noise,
        randn_like=randn_like,
    )


def EDMPrecond(
    img_resolution: int,
    img_channels: int,
    label_dim: int = 0,
    model_type: str = "DhariwalUNet",
    **settings,
) -> networks.EDMPrecond:
    """EDM's network by the arguments of its class of this name, as EDM's loop makes it by name.

    So are the three below.

    Args:
        img_resolution, img_channels, label_dim: of the images and classes.
        model_type: "SongUNet" or "DhariwalUNet".
        settings: use_fp16, and the arguments of the wrapper in `tdkern.networks` and of the U-Net.

    Raises:
        ValueError: model_type is another.
        TypeError: an argument is none of these.
    """
    images = (img_resolution, img_channels, label_dim)
    return _network(networks.EDMPrecond, images, img_channels, model_type, settings)


def VPPrecond(
    img_resolution: int,
    img_channels: int,
    label_dim: int = 0,
    model_type: str = "SongUNet",
    **settings,
) -> networks.VPPrecond:
    """VP's network; see `EDMPrecond`."""
    images = (img_resolution, img_channels, label_dim)
    return _network(networks.VPPrecond, images, img_channels, model_type, settings)


def VEPrecond(
    img_resolution: int,
    img_channels: int,
    label_dim: int = 0,
    model_type: str = "SongUNet",
    **settings,
) -> networks.VEPrecond:
    """VE's network; see `EDMPrecond`."""
    images = (img_resolution, img_channels, label_dim)
    return _network(networks.VEPrecond, images, img_channels, model_type, settings)


def iDDPMPrecond(
    img_resolution: int,
    img_channels: int,
    label_dim: int = 0,
    model_type: str = "DhariwalUNet",
    **settings,
) -> networks.iDDPMPrecond:
    """Improved DDPM's network, whose U-Net gives twice the channels; see `EDMPrecond`."""
    images = (img_resolution, img_channels, label_dim)
    return _network(networks.iDDPMPrecond, images, 2 * img_channels, model_type, settings)


Wrapper = TypeVar("Wrapper", bound=nn.Module)


def _network(
    wrapper: type[Wrapper],
    images: tuple[int, int, int],
    out_channels: int,
    model_type: str,
    settings: dict,
) -> Wrapper:
    """A wrapper around a U-Net; `images` are img_resolution, img_channels and label_dim."""
    if model_type not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(
            f"{wrapper.__name__}: model_type must be SongUNet or DhariwalUNet, got {model_type!r}"
        )
    own = set(inspect.signature(wrapper).parameters) & settings.keys()
    arguments = {name: settings.pop(name) for name in own}
    dtype = torch.float16 if settings.pop("use_fp16", False) else None
    resolution, channels, label_dim = images
    model = getattr(networks, model_type)(resolution, channels, out_channels, label_dim, **settings)
    return wrapper(model, **arguments, dtype=dtype)
