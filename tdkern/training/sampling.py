"""Images from a network, each a function of its own seed."""

from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from ..data import to_uint8
from ..data.files import first_of
from ..families import default_sampler
from ..networks.precond import Preconditioned
from ..samplers import SAMPLERS, ablation_sigmas, heun
from ..samplers.generalised import RANGES


class NotFinite(ValueError):
    """Images that are not finite numbers, which would be saved as black ones."""


def sampling_levels(
    net: Preconditioned,
    sampler: str,
    steps: int,
    *,
    disc: str = "edm",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> tuple[Tensor, dict]:
    """The noise levels of so many steps of a sampler, all of which the network knows.

    With them come those of the sampler's options that follow from them: for the levels of flow
    matching `heun` and `ablation` step in its own time.

    Where several levels are one to the network (`iDDPMPrecond`, from 61 steps on), a sampler that
    must descend at each step takes fewer steps.

    disc, sigma_min, sigma_max, rho: as for `samplers.ablation_sigmas`. Raises its ValueError.
    """
    lo, hi = (
        default if given is None else given
        for given, default in zip((sigma_min, sigma_max), RANGES[disc], strict=True)
    )
    lo, hi = max(lo, net.sigma_min), min(hi, net.sigma_max)
    kind = SAMPLERS[sampler]
    count = steps + 1 if kind.ends_at_sigma_min else steps
    sigmas = net.round_sigma(ablation_sigmas(disc, count, lo, hi, rho))
    if not kind.repeats:
        sigmas = sigmas.unique_consecutive()
    if kind.ends_at_sigma_min:
        return sigmas[:-1], {"sigma_min": sigmas[-2].item()}
    follow = dict(kind.on_flow) if disc == "flow" else {}
    return sigmas, {"sigma_min": lo, "sigma_max": hi} | follow if kind.has_range else follow


PREVIEW_STEPS = 18  # of the grids of images that training writes


def preview_levels(net: Preconditioned) -> Tensor:
    """The noise levels of the grids that training writes."""
    return sampling_levels(net, default_sampler(net), PREVIEW_STEPS)[0]


def choice(meta: dict) -> dict:
    """What `sample` must be told of the labels of a network, by its snapshot's meta."""
    return {"classes": meta["classes"]} if meta.get("classes") is not None else {}


def _where_it_began(run: Callable, sigmas: Tensor) -> str:
    """The same run once more, watched."""
    watched = []

    def watch(denoiser):
        watched.append(Watched(denoiser))
        return watched[0]

    run(watch)
    return watched[0].report(sigmas)


def sample(
    net: torch.nn.Module,
    network: dict,
    seeds: list[int],
    sigmas: Tensor,
    *,
    sampler=heun,
    class_idx: int | None = None,
    classes: list[int] | None = None,
    labels: Tensor | None = None,
    **options,
) -> Tensor:
    """Draw one image a seed, all in one batch.

    Args:
        net: net(x, sigma, class_labels) -> D, in evaluation mode, on any device.
        network: its description, with img_resolution, img_channels and label_dim.
        seeds: one per image, in 0 .. 2^64 - 1, of which torch takes the lower 32 bits. It gives
            the latent, the class and the sampler's noise through a CPU generator of its own, so an
            image depends on its seed and not on its batch or device, beyond rounding.
        sigmas: the noise levels, as for every sampler.
        sampler: one of `samplers`.
        class_idx: the class of all images; None draws one for each. For class-conditional networks.
        classes: those that the network was trained on; None for all, [] if its labels are no
            classes.
        labels: [B, label_dim], in place of drawn classes.
        **options: the sampler's own, such as S_churn or eta.

    Returns:
        [B, C, H, W] uint8 on the network's device.

    Raises:
        ValueError: class_idx is not a class of the network, or a seed is out of its range.
        NotFinite: an image is not finite; the message names the sampler's step.
    """
    if not all(0 <= seed < 2**64 for seed in seeds):
        raise ValueError(
            f"sample: a seed must be in 0 .. 2^64 - 1, got {min(seeds)} to {max(seeds)}"
        )
    _check_class(network["label_dim"], class_idx, classes, labels)

    def run(wrap) -> Tensor:
        draws = Draws(seeds, next(net.parameters()).device)
        shape = (network["img_channels"], network["img_resolution"], network["img_resolution"])
        x = draws.normal(torch.empty(len(seeds), *shape, dtype=torch.float64))
        x = x * _start(sigmas)
        given = labels
        if network["label_dim"] and labels is None:
            given = draws.labels(network["label_dim"], class_idx, classes)
        noise = (
            {"randn_like": draws.normal} if "randn_like" in signature(sampler).parameters else {}
        )
        given = None if given is None else given.to(x.device)
        return sampler(wrap(partial(net, class_labels=given)), x, sigmas, **noise, **options)

    images = run(lambda denoiser: denoiser)
    if not images.isfinite().all():
        raise NotFinite(_where_it_began(run, sigmas))
    return to_uint8(images)


def _start(sigmas: Tensor) -> float:
    """The factor of unit noise in a sampler's first state, which in pure noise is the noise."""
    return float(sigmas[0]) if sigmas[0] < float("inf") else 1.0


class Draws:
    """The random numbers of images, each from a CPU generator of its own."""

    def __init__(self, seeds: list[int], device: torch.device):
        self.device = device
        signed = [seed if seed < 2**63 else seed - 2**64 for seed in seeds]  # as torch takes them
        self.generators = [torch.Generator().manual_seed(seed) for seed in signed]

    def normal(self, like: Tensor) -> Tensor:
        """Unit noise of a tensor's shape and dtype."""
        shape, dtype = like.shape[1:], like.dtype
        noise = [
            torch.randn(shape, generator=generator, dtype=dtype) for generator in self.generators
        ]
        return torch.stack(noise).to(self.device)

    def labels(self, label_dim: int, class_idx: int | None, classes: list[int] | None) -> Tensor:
        """One-hot labels [B, label_dim] of a class, or of one drawn from `classes`, or from all."""
        count = len(classes) if classes and class_idx is None else label_dim
        drawn = [
            int(torch.randint(count, (), generator=generator)) for generator in self.generators
        ]
        if class_idx is not None:
            drawn = [class_idx] * len(drawn)
        elif classes:
            drawn = [classes[i] for i in drawn]
        return torch.zeros(len(drawn), label_dim).scatter_(1, torch.tensor(drawn)[:, None], 1)


def _check_class(
    label_dim: int, class_idx: int | None, classes: list[int] | None, labels: Tensor | None
) -> None:
    """Raises ValueError for a class, or none, where the network wants something else."""
    if class_idx is not None and not label_dim:
        raise ValueError(
            "sample: class is for class-conditional networks, and this one has no classes, got "
            f"{class_idx}"
        )
    if classes == [] and label_dim and labels is None:
        raise ValueError(
            "sample: the network's labels are vectors and no classes, so none can be drawn; "
            "give labels to tdkern.training.sample"
        )
    if class_idx is None:
        return
    if not 0 <= class_idx < label_dim:
        raise ValueError(
            f"sample: class must be one of the network's {label_dim} classes, counted from 0, got "
            f"{class_idx}"
        )
    if classes and class_idx not in classes:
        raise ValueError(
            f"sample: class {class_idx} had no image in training; classes with images are "
            f"{first_of([str(number) for number in classes])}"
        )


class Watched:
    """A denoiser that remembers the noise levels at which its answers were finite or not."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []

    def __call__(self, x: Tensor, sigma: Tensor, *args, **kwargs) -> Tensor:
        denoised = self.denoiser(x, sigma, *args, **kwargs)
        level = float(torch.as_tensor(sigma, dtype=torch.float64).flatten()[0])
        self.calls.append((level, bool(denoised.isfinite().all())))
        return denoised

    def report(self, sigmas: Tensor) -> str:
        """In words, where a sampler's images of these levels stopped being finite."""
        steps = max(len(sigmas) - 1, 1)
        level = next((level for level, finite in self.calls if not finite), None)
        if level is None:
            return (
                f"sample: the network's images are not finite after the sampler's step {steps} of "
                f"{steps}"
            )
        step = int((sigmas[:steps].double().cpu() >= level * (1 - 1e-6)).sum())
        return (
            f"sample: the network's images are not finite from the sampler's step {max(step, 1)} "
            f"of {steps} on, at noise level {level:.4g}"
        )
