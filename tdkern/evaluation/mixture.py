"""Data whose denoiser is known, Gaussian mixtures, and how far a network is from them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def normal_points(n: int, d: int, seed: int = 0) -> Tensor:
    """[n, d] float64 points of the unit normal that cover it evenly (scrambled Sobol).

    Their averages vary far less than random points'.
    """
    uniform = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(
        n, dtype=torch.float64
    )
    return math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 1e-12, 1 - 1e-12))


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of K round Gaussians in d dimensions, with its exact denoiser.

    It is sum_k w_k N(m_k, s_k^2 I).

    Args:
        weights: [K] float64, w_k > 0, summing to 1.
        means: [K, d] float64, m_k.
        stds: [K] float64, s_k > 0.

    Raises:
        ValueError: the weights do not sum to 1.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self):
        if not abs(self.weights.sum() - 1) < 1e-9:
            raise ValueError(f"GaussianMixture: weights must sum to 1, got {self.weights.tolist()}")

    @classmethod
    def ring(cls, sigma_data: float = 0.5) -> "GaussianMixture":
        """Four unequal Gaussians on a ring in the plane.

        They are moved and scaled to mean 0 and standard deviation `sigma_data` in each coordinate.
        """
        weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        stds = torch.tensor([0.10, 0.15, 0.20, 0.25], dtype=torch.float64)
        means = torch.tensor(
            [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64
        )
        means = means - weights @ means
        scale = sigma_data / cls(weights, means, stds).sigma_data
        return cls(weights, scale * means, scale * stds)

    @property
    def sigma_data(self) -> float:
        """Root mean square of a coordinate: the standard deviation, where the mean is 0."""
        return float((self.weights @ (self.means.square().mean(1) + self.stds**2)).sqrt())

    def log_prob(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """ln p(x; sigma), the density of data plus noise of level sigma: [B] float64.

        x is [B, d], sigma [B] or a number >= 0.
        """
        return self._joint(x.double(), self._variance(sigma)).logsumexp(1)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact denoiser E[x0 | x] = x + sigma^2 grad ln p(x; sigma).

        It is sum_k p_k(x) (m_k + s_k^2 / (s_k^2 + sigma^2) (x - m_k)).

        p_k is the posterior of component k (EDM, arXiv 2206.00364, eq. 3 and appendix B.3).
        Arguments as in `log_prob`; returns [B, d] float64.
        """
        x, variance = x.double(), self._variance(sigma)
        posterior = self._joint(x, variance).softmax(1)
        shrink = self.stds**2 / variance  # [B, K]
        return (posterior * (1 - shrink)) @ self.means + (posterior * shrink).sum(
            1, keepdim=True
        ) * x

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """[n, d] float64 independent draws; `generator` None is torch's global one."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[k] + self.stds[k, None] * torch.randn(
            n, self.means.shape[1], generator=generator, dtype=torch.float64
        )

    def points(self, n: int) -> Tensor:
        """[n, d] float64 points that cover the mixture evenly, the reference for `sliced_w2`.

        Each component's share is rounded.
        """
        ends = (self.weights.cumsum(0) * n).round().long()
        k = torch.bucketize(torch.arange(n), ends, right=True)
        return self.means[k] + self.stds[k, None] * normal_points(n, self.means.shape[1])

    def _variance(self, sigma) -> Tensor:
        """[B, K] or [1, K]: s_k^2 + sigma^2."""
        return torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1) ** 2 + self.stds**2

    def _joint(self, x: Tensor, variance: Tensor) -> Tensor:
        """[B, K]: ln w_k N(x; m_k, variance_k I)."""
        distance = (x[:, None] - self.means).square().sum(2)
        return (
            self.weights.log()
            - distance / (2 * variance)
            - x.shape[1] / 2 * (2 * math.pi * variance).log()
        )


@torch.no_grad()
def denoiser_error(
    denoiser,
    mixture: GaussianMixture,
    sigmas: Tensor,
    *,
    num_models: int = 1,
    n: int = 1024,
    exact=None,
) -> Tensor:
    """What EDM's loss could still lose at each noise level.

    It is the denoiser's loss less the exact denoiser's.

    error(sigma) = w mean((D(x, sigma) - E[x0 | x])^2),  w = (sigma^2 + sigma_data^2) / (sigma
    sigma_data)^2, which for a preconditioned network is the mean square error of its raw output F.

    Args:
        denoiser: `denoiser(x, sigma) -> D` for x [num_models n, d] float32, the first model's
            points first, and sigma [num_models n].
        mixture: the data.
        sigmas: [L], noise levels > 0.
        num_models: models that the denoiser holds.
        n: noisy points at each level; the same for every model, level and call.
        exact: `exact(x, sigma) -> D`, sigma [n], of which the denoiser may differ; None is the
            mixture's exact denoiser.

    Returns:
        [num_models, L] float64. Deterministic if the denoiser is.
    """
    exact = exact or mixture.denoise
    generator = torch.Generator().manual_seed(0)
    x0 = mixture.sample(n, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    errors = []
    for sigma in sigmas.tolist():
        x = (x0 + sigma * noise).float()
        D = denoiser(x.repeat(num_models, 1), torch.full((num_models * n,), sigma))
        weight = 1 / sigma**2 + 1 / mixture.sigma_data**2
        errors.append(
            weight
            * (D.unflatten(0, (num_models, n)) - exact(x, x.new_full((n,), sigma)))
            .square()
            .mean((1, 2))
        )
    return torch.stack(errors, 1)


def sliced_w2(x: Tensor, y: Tensor, *, projections: int = 64) -> Tensor:
    """Sliced 2-Wasserstein distance between two sets of as many points.

    SW2^2 = mean over directions u and i of (sorted(x u)_i - sorted(y u)_i)^2 (Bonneel et al., J.
    Math. Imaging Vis. 51, 2015).

    Args:
        x: [..., n, d]; y: [n, d], or as x.
        projections: directions, uniform on the sphere; the same at every call.

    Returns:
        [...] float64, in the unit of the points. Deterministic.

    Raises:
        ValueError: the two do not have as many points, of as many coordinates.
    """
    if x.shape[-2:] != y.shape[-2:]:
        raise ValueError(
            f"sliced_w2: y must have shape [..., {x.shape[-2]}, {x.shape[-1]}] as x has, got "
            f"{list(y.shape)}"
        )
    u = torch.randn(
        x.shape[-1], projections, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    u = u / u.norm(dim=0)
    gap = (x.double() @ u).sort(-2).values - (y.double() @ u).sort(-2).values
    return gap.square().mean((-2, -1)).sqrt()
