"""Mixtures of low-rank Gaussians, their exact denoiser, and the problems that are made of them."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...data.files import FileError, write_atomic
from .base import Problem

CHUNK = 1 << 20  # numbers of a posterior at once: 8 MiB, which stays near the processor
DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class LowRankMixture:
    """sum_k w_k N(m_k, W_k W_k^T + v_k I): K Gaussians that are wide in r directions of d.

    Args:
        weights: [K] float64, w_k > 0, summing to 1.
        means: [K, d] float64, m_k.
        factors: [K, d, r] float64, W_k.
        variances: [K] float64, v_k > 0.
        classes: [K] int64, the class of each component; None where there are no classes.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor
    variances: Tensor
    classes: Tensor | None = None

    @property
    def label_dim(self) -> int:
        """Classes, or 0."""
        return 0 if self.classes is None else int(self.classes.max()) + 1

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """(axes [d, K r], offsets [K, r], spreads [K, r]) of W W^T = U diag(spread) U^T.

        The axes are the columns of every U_k, and the offsets U_k^T m_k. An axis along which W_k
        does not reach is 0, and so is its spread.
        """
        spreads, turns = torch.linalg.eigh(self.factors.mT @ self.factors)
        reaches = spreads > 1e-12 * spreads[:, -1:]
        scale = torch.where(reaches, spreads, 1).rsqrt() * reaches
        axes = (self.factors @ turns) * scale[:, None]
        offsets = torch.einsum("kdr,kd->kr", axes, self.means)
        return axes.movedim(1, 0).flatten(1), offsets, spreads * reaches

    def log_prob(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """ln p(x; sigma) or ln p(x; sigma | labels), of data plus noise of level sigma: [B].

        x [B, d], sigma [B] or a number >= 0, labels [B, classes] one-hot; float64.
        """
        return self.log_joint(x, sigma, labels).logsumexp(1)

    def log_joint(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """ln w_k N(x; m_k, C_k + sigma^2 I): [B, K]; arguments as in `log_prob`."""
        return torch.cat([self._posterior(*part)[0] for part in self._parts(x, sigma, labels)])

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """E[x0 | x] or E[x0 | x, labels] [B, d] float64; arguments as in `log_prob`.

        With s^2 = sigma^2, n_k = v_k + s^2, z = U_k^T (x - m_k) and the spreads l of each k, the
        Woodbury identity makes of a component's m_k + C_k (C_k + s^2 I)^-1 (x - m_k)

        m_k + v_k / n_k (x - m_k) + U_k (l s^2 / (n_k (n_k + l)) z),

        and the components are averaged by their posterior probabilities (EDM, arXiv 2206.00364,
        appendix B.3, has them without W_k).
        """
        return torch.cat([self._denoised(*part) for part in self._parts(x, sigma, labels)])

    def _denoised(self, x: Tensor, s2: Tensor, labels: Tensor | None) -> Tensor:
        joint, z = self._posterior(x, s2, labels)
        axes, _, spreads = self._axes
        p, noise = joint.softmax(1), self.variances + s2
        shrink = self.variances / noise
        along = spreads / (noise[:, :, None] + spreads) * (s2 / noise)[:, :, None]
        moved = (p[:, :, None] * along * z).flatten(1) @ axes.T
        return (p * (1 - shrink)) @ self.means + (p * shrink).sum(1, keepdim=True) * x + moved

    def _parts(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None):
        """(x [b, d], sigma^2 [b, 1] or [1, 1], labels [b, classes] or None), some points at a time.

        A single level stays one, which saves most of a sampler's logarithms.
        """
        x, s2 = x.double(), torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1) ** 2
        rows = max(1, CHUNK // self._axes[1].numel())
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            levels = s2 if len(s2) == 1 else s2[part]
            yield x[part], levels, None if labels is None else labels[part]

    def _posterior(self, x: Tensor, s2: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """ln w_k N(x; m_k, C_k + s2 I) [b, K], and z = U_k^T (x - m_k) [b, K, r]."""
        axes, offsets, spreads = self._axes
        z = (x @ axes).unflatten(1, offsets.shape) - offsets
        noise = self.variances + s2
        total = noise[:, :, None] + spreads
        squares = x.square().sum(1, keepdim=True) - 2 * x @ self.means.T
        squares = squares + self.means.square().sum(1)
        inside = (z.square() * (spreads / total)).sum(2)
        free = x.shape[1] - spreads.shape[1]
        log_det = total.log().sum(2) + free * noise.log()
        log_weights = self.weights.log()
        if labels is not None:
            log_weights = log_weights + self._of_class(labels)
        constant = x.shape[1] * math.log(2 * math.pi)
        return log_weights - (constant + log_det + (squares - inside) / noise) / 2, z

    def _of_class(self, labels: Tensor) -> Tensor:
        """[b, K]: -ln P(class) for the components of a point's class, -inf for the others."""
        assert self.classes is not None
        member = torch.nn.functional.one_hot(self.classes, labels.shape[1]).double()
        share = labels.double() @ (member.T @ self.weights)
        return (labels.double() @ member.T).log() - share.log()[:, None]

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n independent draws [n, d] float64 and their components [n] int64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        _, d, r = self.factors.shape
        z = torch.randn(n, r, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
        parts = [
            self.means[j] + (self.factors[j] @ part[:, :, None])[:, :, 0]
            for j, part in zip(k.split(256), z.split(256), strict=True)
        ]
        return torch.cat(parts) + self.variances[k, None].sqrt() * noise, k


class Fitted(Problem):
    """Images of a mixture that was fitted to real ones; the file is a part of the package.

    Args:
        name: of the file, and in `PROBLEMS`.
        path: another file, of `save`; None is the package's.

    Raises:
        FileError: the file cannot be used.
    """

    def __init__(self, name: str, path: str | Path | None = None):
        self.name = name
        self.mixture, self.image_shape = load(Path(path or DATA / f"{name}.safetensors"))
        self.label_dim = self.mixture.label_dim

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        x0, k = self.mixture.sample(n, generator)
        labels = None
        if self.mixture.classes is not None:
            labels = torch.nn.functional.one_hot(self.mixture.classes[k], self.label_dim).float()
        return x0.float().view(n, *self.image_shape), labels

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        return self.mixture.denoise(x.flatten(1), sigma, labels).to(x.dtype).view_as(x)


def save(
    path: Path, mixture: LowRankMixture, image_shape: tuple[int, int, int], basis_size: int
) -> None:
    """Write a mixture as a small file of half-precision numbers, whole or not at all.

    Means and factors are stored by their coordinates in one basis, in which they are largest; what
    is read again is so a mixture next to this one.

    Args:
        basis_size: vectors of that basis, at most d.
    """
    from safetensors.torch import save as to_bytes

    centre = mixture.weights @ mixture.means
    vectors = torch.cat([(mixture.means - centre)[:, :, None], mixture.factors], 2)
    weighted = (mixture.weights.sqrt()[:, None, None] * vectors).movedim(1, 0).flatten(1)
    basis = torch.linalg.eigh(weighted @ weighted.T).eigenvectors[:, -basis_size:]
    tensors = {
        "centre": centre,
        "basis": basis,
        "coordinates": torch.einsum("db,kdv->kbv", basis, vectors),
    }
    tensors = {name: each.half().contiguous() for name, each in tensors.items()}
    tensors |= {"weights": mixture.weights, "variances": mixture.variances.float()}
    tensors["image_shape"] = torch.tensor(image_shape)
    if mixture.classes is not None:
        tensors["classes"] = mixture.classes
    write_atomic(path, to_bytes(tensors))


def load(path: Path) -> tuple[LowRankMixture, tuple[int, int, int]]:
    """The mixture that `save` wrote, and the shape of its images; raises FileError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        coordinates, basis = tensors["coordinates"].double(), tensors["basis"].double()
        vectors = torch.einsum("db,kbv->kdv", basis, coordinates)
        weights = tensors["weights"].double()
        mixture = LowRankMixture(
            weights / weights.sum(),
            tensors["centre"].double() + vectors[:, :, 0],
            vectors[:, :, 1:].contiguous(),
            tensors["variances"].double(),
            tensors.get("classes"),
        )
        channels, height, width = tensors["image_shape"].tolist()
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FileError(
            f"{path}: does not hold a fitted mixture ({error}); make it by bench/fit_problems.py"
        ) from error
    return mixture, (channels, height, width)
