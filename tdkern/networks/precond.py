"""Preconditioning: a network F inside D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) (EDM, arXiv 2206.00364, eq. 7 and table 1)."""
from math import inf

import torch
from torch import Tensor, nn

from ..schedules import VP, iDDPM
from .layers import KeepsBuffers


class _Precond(KeepsBuffers):
    """What the five share. A subclass gives `input_scaling(sigma) -> (c_in, c_noise)` and `output_scaling(sigma) -> (c_skip, c_out)`, for sigma [B].

    Arguments of every subclass:
        model: called as `model(c_in x, c_noise, class_labels, augment_labels)`, c_noise [B]; its parameters are then under "model.".
            Where it has a `label_dim` above 0, missing class labels are zeros; where that is 0, class labels are dropped.
        dtype: of the image inside the model, such as torch.bfloat16; None is x's. Also an attribute, to be set at any time.
    """

    precond: str  # "edm", "ct", "vp", "ve" or "iddpm"
    sigma_min: float  # the noise levels that the network can be asked about
    sigma_max: float

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.num_models = getattr(model, "num_models", 1)  # of an `MLP`: a batch holds as many samples for each

    def forward(self, x: Tensor, sigma, class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        """The denoised D(x, sigma) = c_skip x + c_out F.

        Args:
            x: [B, ...] of any rank, noisy data.
            sigma: noise level, a number or a tensor of one or B elements.
            class_labels: [B, label_dim] one-hot floats, or None. augment_labels: [B, augment_dim], or None.

        Returns:
            [B, ...], float32; float64 if x and the model's parameters are float64.

        Raises:
            ValueError: sigma has neither one nor B elements, or labels have the wrong shape.

        Gradients to x, sigma, the labels and the parameters. Deterministic if the model is.
        """
        x, sigma = self._inputs(x, sigma)
        c_skip, c_out = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in self.output_scaling(sigma))
        return c_skip * x + c_out * self.raw(x, sigma, class_labels, augment_labels).to(x.dtype)

    def raw(self, x: Tensor, sigma, class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        """The network's own output F(c_in x, c_noise) [B, ...], in the dtype it came in. Arguments, errors and gradients as `forward`'s."""
        return self.raw_scaled(*self.scaled(x, sigma), class_labels, augment_labels)

    def scaled(self, x: Tensor, sigma) -> tuple[Tensor, Tensor]:
        """The model's own input: c_in x in the model's dtype and c_noise [B]. Arguments, errors and gradients as `forward`'s."""
        x, sigma = self._inputs(x, sigma)
        c_in, c_noise = self.input_scaling(sigma)
        return (c_in.reshape(-1, *[1] * (x.ndim - 1)) * x).to(self.dtype or x.dtype), c_noise

    def raw_scaled(self, scaled: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        """`raw` from what `scaled` gives, for a caller who has c_in x already (`tdkern.heun_step`)."""
        label_dim = getattr(self.model, "label_dim", None)
        if label_dim == 0:
            class_labels = None
        elif label_dim and class_labels is None:
            class_labels = c_noise.new_zeros(len(c_noise), label_dim)
        return self.model(scaled, c_noise, class_labels, augment_labels)

    def round_sigma(self, sigma) -> Tensor:
        """The noise levels, any shape, moved to the nearest that the network knows."""
        return torch.as_tensor(sigma)

    def _inputs(self, x: Tensor, sigma) -> tuple[Tensor, Tensor]:
        double = x.dtype == next(self.model.parameters(), x).dtype == torch.float64
        x = x.to(torch.float64 if double else torch.float32)
        if isinstance(sigma, Tensor):
            sigma = sigma.to(x).reshape(-1)
        else:
            sigma = x.new_full((1,), float(sigma))  # filled there: a copy would wait for the device
        if sigma.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{type(self).__name__}: sigma must have one element or {x.shape[0]}, as x has samples, got {sigma.shape[0]}")
        return x, sigma.expand(x.shape[0])


class EDMPrecond(_Precond):
    """EDM: c_skip = sd^2/(s^2+sd^2), c_out = s sd/sqrt(s^2+sd^2), c_in = 1/sqrt(s^2+sd^2), c_noise = ln(s)/4; sd is `sigma_data`."""

    precond, sigma_min, sigma_max = "edm", 0.0, inf

    def __init__(self, model: nn.Module, sigma_data: float = 0.5, *, dtype: torch.dtype | None = None):
        super().__init__(model, dtype=dtype)
        self.sigma_data = sigma_data

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma**2 + self.sigma_data**2).rsqrt(), sigma.log() / 4

    def output_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt()


class CTPrecond(_Precond):
    """Consistency models (arXiv 2303.01469, appendix C): EDM's with the boundary condition D(x, sigma_min) = x.

    c_skip = sd^2/((s-s_min)^2+sd^2), c_out = (s-s_min) sd/sqrt(s^2+sd^2), c_in = 1/sqrt(s^2+sd^2), c_noise = time_scale ln(s + 1e-44); sd is
    `sigma_data`. `time_scale` is 250 for a U-Net's embedding of steps in the hundreds, and EDM's 1/4 for a network made for EDM's c_noise, such as `MLP`.
    """

    precond = "ct"

    def __init__(self, model: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0, time_scale: float = 250.0, *,
                 dtype: torch.dtype | None = None):
        super().__init__(model, dtype=dtype)
        self.sigma_data, self.sigma_min, self.sigma_max, self.time_scale = sigma_data, sigma_min, sigma_max, time_scale

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma**2 + self.sigma_data**2).rsqrt(), self.time_scale * (sigma + 1e-44).log()

    def output_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        above = sigma - self.sigma_min
        return self.sigma_data**2 / (above**2 + self.sigma_data**2), above * self.sigma_data * (sigma**2 + self.sigma_data**2).rsqrt()


class VPPrecond(_Precond):
    """VP (arXiv 2011.13456): c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = (M-1) t(s) of `schedules.VP`."""

    precond = "vp"

    def __init__(self, model: nn.Module, beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5, *,
                 dtype: torch.dtype | None = None):
        super().__init__(model, dtype=dtype)
        self.M, self.schedule = M, VP(beta_d, beta_min, epsilon_t)
        self.sigma_min, self.sigma_max = self.schedule.sigma_hat([epsilon_t, 1]).tolist()

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma**2 + 1).rsqrt(), ((self.M - 1) * self.schedule.time(sigma)).to(sigma.dtype)

    def output_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), -sigma


class VEPrecond(_Precond):
    """VE (arXiv 2011.13456): c_skip = 1, c_out = s, c_in = 1, c_noise = ln(s/2)."""

    precond = "ve"

    def __init__(self, model: nn.Module, sigma_min: float = 0.02, sigma_max: float = 100.0, *, dtype: torch.dtype | None = None):
        super().__init__(model, dtype=dtype)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), (sigma / 2).log()

    def output_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma


class iDDPMPrecond(_Precond):
    """Improved DDPM (arXiv 2102.09672): c_skip = 1, c_out = -s, c_in = 1/sqrt(s^2+1), c_noise = M-1-j for the nearest level u_j
    of `schedules.iDDPM`. Of a model with twice the channels, the second half, which learns variances, is left out of F.
    """

    precond = "iddpm"

    def __init__(self, model: nn.Module, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, *, dtype: torch.dtype | None = None):
        super().__init__(model, dtype=dtype)
        self.M = M
        u = iDDPM(C_1, C_2, M).u.tolist()
        self.register_buffer("u", torch.tensor(u, dtype=torch.float64))  # on the default device, "meta" perhaps, as the model's parameters
        self.sigma_min, self.sigma_max = u[M - 1], u[0]

    def _nearest(self, sigma: Tensor) -> Tensor:
        return (sigma[..., None] - self.u).abs().argmin(-1)

    def round_sigma(self, sigma) -> Tensor:
        sigma = torch.as_tensor(sigma, device=self.u.device)
        return self.u[self._nearest(sigma)].to(sigma.dtype)

    def input_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma**2 + 1).rsqrt(), (self.M - 1 - self._nearest(sigma)).to(sigma.dtype)

    def output_scaling(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), -sigma

    def raw_scaled(self, scaled: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        """As in the other wrappers; F has x's channels."""
        return super().raw_scaled(scaled, c_noise, class_labels, augment_labels)[:, :scaled.shape[1]]
