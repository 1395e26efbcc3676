"""Images from a network, each a function of its own seed."""
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from ..data import to_uint8
from ..families import default_sampler
from ..samplers import SAMPLERS, ablation_sigmas, heun
from ..samplers.ablation import RANGES


def sampling_levels(net: torch.nn.Module, sampler: str, steps: int, *, disc: str = "edm", sigma_min: float | None = None,
                    sigma_max: float | None = None, rho: float = 7.0) -> tuple[Tensor, dict]:
    """The noise levels of so many steps of a sampler, all of which the network knows.

    With them come those of the sampler's options that follow from them.

    Where several levels are one to the network (`iDDPMPrecond`, from 61 steps on), a sampler that
    must descend at each step takes fewer steps.

    disc, sigma_min, sigma_max, rho: as for `samplers.ablation_sigmas`. Raises its ValueError.
    """
    lo, hi = (default if given is None else given for given, default in zip((sigma_min, sigma_max), RANGES[disc], strict=True))
    lo, hi = max(lo, net.sigma_min), min(hi, net.sigma_max)
    kind = SAMPLERS[sampler]
    count = steps + 1 if kind.ends_at_sigma_min else steps
    sigmas = net.round_sigma(ablation_sigmas(disc, count, lo, hi, rho))
    if not kind.repeats:
        sigmas = sigmas.unique_consecutive()
    if kind.ends_at_sigma_min:
        return sigmas[:-1], {"sigma_min": sigmas[-2].item()}
    return sigmas, {"sigma_min": lo, "sigma_max": hi} if kind.has_range else {}


PREVIEW_STEPS = 18  # of the grids of images that training writes


def preview_levels(net: torch.nn.Module) -> Tensor:
    """The noise levels of the grids that training writes."""
    return sampling_levels(net, default_sampler(net), PREVIEW_STEPS)[0]


def sample(net: torch.nn.Module, network: dict, seeds: list[int], sigmas: Tensor, *, sampler=heun, class_idx: int | None = None, **options) -> Tensor:
    """Draw one image for each seed, all in one batch.

    Args:
        net: net(x, sigma, class_labels) -> D, in evaluation mode, on any device.
        network: its description, with img_resolution, img_channels and label_dim.
        seeds: one an image, each in 0 .. 2^64 - 1. It gives the latent, the class and the sampler's
            noise through a CPU generator of its own, so an image depends on its seed and not on its
            batch or device, beyond rounding.
        sigmas: the noise levels, as for every sampler.
        sampler: one of `samplers`.
        class_idx: the class of all images; None draws one an image. For class-conditional networks.
        **options: the sampler's own, such as S_churn or eta.

    Returns:
        [B, C, H, W] uint8 on the network's device.

    Raises:
        ValueError: class_idx is not a class of the network.
    """
    device = next(net.parameters()).device
    label_dim = network["label_dim"]
    if class_idx is not None and not 0 <= class_idx < label_dim:
        raise ValueError(f"sample: class must be one of the network's {label_dim} classes, counted from 0, got {class_idx}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(like: Tensor) -> Tensor:
        return torch.stack([torch.randn(like.shape[1:], generator=generator, dtype=like.dtype) for generator in generators]).to(device)

    shape = (len(seeds), network["img_channels"], network["img_resolution"], network["img_resolution"])
    x = draw(torch.empty(shape, dtype=torch.float64)) * float(sigmas[0])
    labels = None
    if label_dim:
        drawn = [int(torch.randint(label_dim, (), generator=generator)) for generator in generators]
        labels = torch.eye(label_dim, device=device)[drawn if class_idx is None else [class_idx] * len(seeds)]
    noise = {"randn_like": draw} if "randn_like" in signature(sampler).parameters else {}
    return to_uint8(sampler(partial(net, class_labels=labels), x, sigmas, **noise, **options))
