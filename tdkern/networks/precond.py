"""Networks as denoisers, D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

(EDM, arXiv 2206.00364, eq. 7 and table 1.)
"""

import inspect
from math import inf

import torch
from torch import Tensor, nn

from ..ops._modes import can_check_values
from ..preconditioning import (
    CT,
    EDM,
    Eps,
    Preconditioning,
    Score,
    append_dims,
    tensor_of,
    unwrapped,
)
from ..schedules import VP, iDDPM
from .layers import KeepsBuffers
from .remembered import Remembered

# what other people's models call a sample's class index
INDEX_ARGUMENTS = ("class_labels", "y", "labels")
TIME_ARGUMENT = "timestep"


def index_argument(model) -> str | None:
    """How a model takes class labels, by the arguments of its `forward`.

    None is the way of the U-Nets here, `model(x, t, class_labels, augment_labels)` with one-hot
    labels. Any other model is called as `model(x, t)`, with class indices [B] int64 by the keyword
    that is returned, which is "" where it takes none.
    """
    try:
        arguments = inspect.signature(unwrapped(model).forward).parameters
    except (AttributeError, TypeError, ValueError):  # no module, or one that says nothing
        return None
    if "augment_labels" in arguments:
        return None
    kinds = {each.kind for each in arguments.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    any_keyword = INDEX_ARGUMENTS[0] if inspect.Parameter.VAR_KEYWORD in kinds else ""
    return next((name for name in INDEX_ARGUMENTS if name in arguments), any_keyword)


def time_argument(model) -> str | None:
    """The keyword by which a model takes its time where that is not its second argument, as of
    diffusers' transformers, whose second is the text; None where it is the second.
    """
    try:
        arguments = list(inspect.signature(unwrapped(model).forward).parameters)
    except (AttributeError, TypeError, ValueError):
        return None
    return TIME_ARGUMENT if TIME_ARGUMENT in arguments[2:] else None


class Preconditioned(Remembered, KeepsBuffers):
    """A network as a denoiser in EDM's state; every wrapper here is one.

    A subclass sets `preconditioning` and gives `input_scaling(sigma) -> (c_in, c_noise)` for sigma
    [B].

    Args of every subclass:
        model: called as `model(c_in x, c_noise, class_labels, augment_labels)`, c_noise [B]; its
            parameters are then under "model.". Where it has a `label_dim` above 0, missing class
            labels are zeros, and indices become one-hot; where that is 0, class labels are dropped.
            A model whose `forward` knows no `augment_labels`, such as consistency models' or
            diffusers', is called as `model(c_in x, c_noise)`, or by `timestep=c_noise` where that
            is not its second argument, and where class labels are given with their indices as its
            `class_labels`, `y` or `labels`. Its answer may be what `preconditioning.tensor_of`
            reads.
        dtype: of the image inside the model, such as torch.bfloat16; None is x's. Also an
            attribute, to be set at any time.
    """

    preconditioning: Preconditioning
    sigma_min: float  # the noise levels that the network can be asked about
    sigma_max: float
    learned_variance = False  # whether F may have more channels than x; the rest is left out
    index_argument: str | None = None  # see the functions
    time_argument: str | None = None

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.index_argument, self.time_argument = index_argument(model), time_argument(model)
        # of an `MLP`: a batch holds as many samples for each
        self.num_models = getattr(model, "num_models", 1)

    @property
    def img_resolution(self) -> int:
        """Height and width in pixels, as EDM's networks have it."""
        return unwrapped(self.model).img_resolution

    @property
    def img_channels(self) -> int:
        """Channels of the image."""
        return unwrapped(self.model).in_channels

    @property
    def label_dim(self) -> int:
        """Width of the class labels, 0 for none."""
        return unwrapped(self.model).label_dim

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_in, c_noise) at noise levels [B], in their dtype."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        sigma,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        raw: bool = False,
        scaled: Tensor | None = None,
        **conditions,
    ) -> Tensor:
        """The denoised D(x, sigma) = c_skip x + c_out F, or F itself.

        Args:
            x: [B, ...] of any rank, noisy data.
            sigma: noise level, a number or a tensor of one or B elements.
            class_labels: [B, label_dim] one-hot floats, [B] int64 indices, or None.
            augment_labels: [B, augment_dim], or None.
            raw: give the network's own output F(c_in x, c_noise), in the dtype it came in. Losses
                and samplers ask so, since what wraps a network hands on `forward` alone.
            scaled: as `x`, c_in x in `input_dtype(x)`, where the caller has it already
                (`tdkern.heun_step` makes it). None: it is computed.
            conditions: handed to the model as they are, such as a text's embedding.

        Returns:
            [B, ...], float32; float64 if x and the model's parameters are float64.

        Raises:
            ValueError: sigma has neither one nor B elements, or labels have the wrong shape.

        Gradients to x, sigma, the labels and the parameters. Deterministic if the model is.
        """
        dtype = self._working_dtype(x)
        sigma = self._levels(sigma, x, dtype)
        c_in, c_noise = self.input_scaling(sigma)
        if scaled is None:
            scaled = (append_dims(c_in, x.ndim) * x.to(dtype)).to(self.input_dtype(x))
        F = self._output(scaled, c_noise, class_labels, augment_labels, conditions)
        if self.learned_variance:
            F = F[:, : x.shape[1]]
        if raw:
            return F
        c_skip, c_out = (append_dims(c, x.ndim) for c in self.preconditioning.skip_scale(sigma))
        return c_skip * x.to(dtype) + c_out * F.to(dtype)

    def input_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the model's image for a noisy x."""
        return self.dtype or self._working_dtype(x)

    def round_sigma(self, sigma) -> Tensor:
        """The noise levels, any shape, moved to the nearest that the network knows."""
        return torch.as_tensor(sigma)

    def _working_dtype(self, x: Tensor) -> torch.dtype:
        parameter = next(self.model.parameters(), x)
        double = x.dtype == parameter.dtype == torch.float64
        return torch.float64 if double else torch.float32

    def _levels(self, sigma, x: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(sigma, Tensor):
            sigma = sigma.to(x.device, dtype).reshape(-1)
        else:  # filled on the device: a copy to it would wait for it
            sigma = torch.full((1,), float(sigma), dtype=dtype, device=x.device)
        if sigma.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{type(self).__name__}: sigma must have one element or {x.shape[0]}, as x has "
                f"samples, got {sigma.shape[0]}"
            )
        return sigma.expand(x.shape[0])

    def _output(
        self,
        scaled: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        conditions: dict,
    ) -> Tensor:
        """F, the model called in its own way."""
        if self.index_argument is None:
            one_hot = self._one_hot(class_labels, c_noise)
            out = self.model(scaled, c_noise, one_hot, augment_labels, **conditions)
        else:
            self._refuse_augment_labels(augment_labels)
            named = self._indices(class_labels) | conditions
            if self.time_argument:
                out = self.model(scaled, **{self.time_argument: c_noise}, **named)
            else:
                out = self.model(scaled, c_noise, **named)
        return tensor_of(out, f"{type(self).__name__}: the model")

    def _refuse_augment_labels(self, augment_labels: Tensor | None) -> None:
        if augment_labels is not None:
            raise ValueError(
                f"{type(self).__name__}: augment_labels must be None, as the module takes none"
            )

    def _one_hot(self, class_labels: Tensor | None, c_noise: Tensor) -> Tensor | None:
        label_dim = getattr(unwrapped(self.model), "label_dim", None)
        if label_dim == 0:
            return None
        if label_dim and class_labels is None:
            return c_noise.new_zeros(len(c_noise), label_dim)
        if not label_dim or class_labels is None or class_labels.ndim != 1:
            return class_labels
        if class_labels.dtype.is_floating_point:
            return class_labels
        if (
            can_check_values(class_labels)
            and not ((class_labels >= 0) & (class_labels < label_dim)).all()
        ):
            found = f"{class_labels.min().item()} to {class_labels.max().item()}"
            raise ValueError(
                f"{type(self).__name__}: class_labels must be from 0 to {label_dim - 1}, got "
                f"{found}"
            )
        classes = torch.arange(label_dim, device=class_labels.device)
        return (class_labels[:, None] == classes).to(c_noise.dtype)

    def _indices(self, class_labels: Tensor | None) -> dict[str, Tensor]:
        """The class labels by the name and in the form that the model knows, if there are any."""
        if class_labels is None or (class_labels.ndim == 2 and class_labels.shape[1] == 0):
            return {}
        if not self.index_argument:
            raise ValueError(
                f"{type(self).__name__}: class_labels must be None, as the module takes none"
            )
        one_hot = class_labels.ndim == 2
        return {self.index_argument: class_labels.argmax(1) if one_hot else class_labels}


class EDMPrecond(Preconditioned):
    """EDM: c_skip = sd^2/(s^2+sd^2), c_out = s sd/sqrt(s^2+sd^2), c_in = 1/sqrt(s^2+sd^2).

    c_noise = ln(s)/4; sd is `sigma_data`. `sigma_min` and `sigma_max` are the noise levels that it
    is sampled at.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = inf,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, dtype=dtype)
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.preconditioning = EDM(sigma_data)

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        # at 0, where D = x whatever F is, F has to be a number
        least = torch.finfo(sigma.dtype).tiny
        return (sigma**2 + self.sigma_data**2).rsqrt(), sigma.clamp(min=least).log() / 4


class CTPrecond(Preconditioned):
    """Consistency models (arXiv 2303.01469, appendix C): EDM's with D(x, sigma_min) = x.

    c_skip = sd^2/((s-s_min)^2+sd^2), c_out = (s-s_min) sd/sqrt(s^2+sd^2), c_in = 1/sqrt(s^2+sd^2),
    c_noise = time_scale ln(s + 1e-44); sd is `sigma_data`. `time_scale` is 250 for a U-Net's
    embedding of steps in the hundreds, and EDM's 1/4 for a network made for EDM's c_noise, such as
    `MLP`. With `sigma_min` 0 and 1/4 it is EDM's own, as easy consistency tuning has it.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        time_scale: float = 250.0,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, dtype=dtype)
        self.sigma_data, self.time_scale = sigma_data, time_scale
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.preconditioning = CT(sigma_data, sigma_min) if sigma_min else EDM(sigma_data)

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return c_in, self.time_scale * (sigma + 1e-44).log()


class VPPrecond(Preconditioned):
    """VP (arXiv 2011.13456): c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = (M-1) t(s).

    t(s) is the time of `schedules.VP`.
    """

    preconditioning = Eps()

    def __init__(
        self,
        model: nn.Module,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, dtype=dtype)
        self.M, self.schedule = M, VP(beta_d, beta_min, epsilon_t)
        self.sigma_min, self.sigma_max = self.schedule.sigma_hat([epsilon_t, 1]).tolist()

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_noise = ((self.M - 1) * self.schedule.time(sigma)).to(sigma.dtype)
        return (sigma**2 + 1).rsqrt(), c_noise


class VEPrecond(Preconditioned):
    """VE (arXiv 2011.13456): c_skip = 1, c_out = s, c_in = 1, c_noise = ln(s/2)."""

    preconditioning = Score()

    def __init__(
        self,
        model: nn.Module,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, dtype=dtype)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), (sigma / 2).log()


class iDDPMPrecond(Preconditioned):
    """Improved DDPM (arXiv 2102.09672): c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1).

    c_noise = M-1-j, and j is the nearest level u_j of `schedules.iDDPM`. Of a model with twice the
    channels, the second half, which learns variances, is left out of F.
    """

    preconditioning = Eps()
    learned_variance = True
    u: Tensor  # [M + 1], the levels, falling

    def __init__(
        self,
        model: nn.Module,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, dtype=dtype)
        self.M = M
        u = iDDPM(C_1, C_2, M).u.tolist()
        # on the default device, "meta" perhaps, as the model's parameters
        self.register_buffer("u", torch.tensor(u, dtype=torch.float64))
        self.sigma_min, self.sigma_max = u[M - 1], u[0]

    def _nearest(self, sigma: Tensor) -> Tensor:
        return (sigma[..., None] - self.u).abs().argmin(-1)

    def round_sigma(self, sigma) -> Tensor:
        sigma = torch.as_tensor(sigma, device=self.u.device)
        return self.u[self._nearest(sigma)].to(sigma.dtype)

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma**2 + 1).rsqrt(), (self.M - 1 - self._nearest(sigma)).to(sigma.dtype)
