"""Noise schedules: alpha(t), sigma(t), their grids and inverses, and the two-moment mean between two levels.

A diffusion path is x_t = alpha_t x0 + sigma_t eps. All functions take and return float64 tensors of any shape,
or anything `torch.as_tensor` reads.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

ETA = {"markov": 1.0, "shared": 0.0}


def eta_of(coupling: str) -> float:
    """DDIM's eta of a coupling: 1 for "markov" (DDPM's posterior), 0 for "shared" noise (DDIM, the ODE)."""
    if coupling not in ETA:
        raise ValueError(f"coupling must be 'markov' or 'shared', got {coupling!r}")
    return ETA[coupling]


def _f64(value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def two_moment(alpha_t, sigma_t, alpha_tau, sigma_tau, *, coupling: str = "markov", eta: float | None = None) -> tuple[Tensor, Tensor]:
    """The coefficients (A, kappa) of the two-moment mean mu = A x0 + kappa x_t of x_tau.

    kappa = sqrt(sigma_tau^2 - s^2) / sigma_t,  A = alpha_tau - kappa alpha_t  (DDIM, arXiv 2010.02502, eq. 12 and 16),
    s^2 = eta^2 (sigma_tau^2 / sigma_t^2) (sigma_t^2 - (alpha_t / alpha_tau)^2 sigma_tau^2), which with
    r = sigma_tau / sigma_t is kappa = r sqrt(1 - eta^2 + (eta r alpha_t / alpha_tau)^2), free of cancellation.

    Args:
        alpha_t, sigma_t: signal and noise level at t; sigma_t > 0. Broadcast against each other.
        alpha_tau, sigma_tau: the same at tau, which has less noise than t; alpha_tau > 0.
        coupling: "markov" (eta = 1, DDPM's posterior) or "shared" (eta = 0, DDIM and the probability-flow ODE).
        eta: in [0, 1]; overrides `coupling`.

    Returns:
        A and kappa, float64, in the broadcast shape.

    Deterministic; gradients flow through PyTorch's own autograd.
    """
    eta = eta_of(coupling) if eta is None else eta
    if not 0 <= eta <= 1:
        raise ValueError(f"two_moment: eta must be in [0, 1], got {eta}")
    alpha_t, sigma_t, alpha_tau, sigma_tau = map(_f64, (alpha_t, sigma_t, alpha_tau, sigma_tau))
    r = sigma_tau / sigma_t
    kappa = r * torch.sqrt(1 - eta**2 + (eta * r * alpha_t / alpha_tau) ** 2)
    return alpha_tau - kappa * alpha_t, kappa


@dataclass(frozen=True)
class EDM:
    """EDM's noise levels over a real index, 0 at the most noise (arXiv 2206.00364, eq. 5).

    sigma(i) = (sigma_max^(1/rho) + i/(steps-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, alpha = 1.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"EDM: steps must be at least 2, got {self.steps}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"EDM: sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.rho <= 0:
            raise ValueError(f"EDM: rho must be positive, got {self.rho}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def alpha(self, index) -> Tensor:
        """Signal level at an index: 1."""
        return torch.ones_like(_f64(index))

    def sigma(self, index) -> Tensor:
        """Noise level at a real index, held at sigma_max below index 0 and at sigma_min above steps - 1."""
        a, b = self._ends
        return (a + _f64(index) / (self.steps - 1) * (b - a)).clamp(b, a) ** self.rho

    def index(self, sigma) -> Tensor:
        """The real index of a noise level: 0 from sigma_max up, steps - 1 from sigma_min down."""
        a, b = self._ends
        return ((_f64(sigma) ** (1 / self.rho) - a) / (b - a)).clamp(0, 1) * (self.steps - 1)

    def sigmas(self) -> Tensor:
        """The sampler's levels: sigma(0), ..., sigma(steps - 1), 0."""
        return torch.cat([self.sigma(torch.arange(self.steps)), torch.zeros(1, dtype=torch.float64)])
