"""The weights of the TD term and of the base loss, by name, in plain PyTorch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def td_weighting(weight: str, A: Tensor, A_p: Tensor, scale: Tensor, scale_p: Tensor) -> Tensor:
    """w_td of a pair of noise levels (docs/mathematics.md), any shape.

    | weight | w_td |
    | --- | --- |
    | "pairwise" | 1 / ((A scale)^2 + (A' scale')^2) |
    | "pairwise_x0" | 1 / max(A^2 + A'^2, 0.01) |
    | "online" | 1 / max((A scale)^2, 1e-8), what the published EDM code computes |
    | "none" | 1 |
    """
    return {
        "pairwise": lambda: 1 / ((A * scale) ** 2 + (A_p * scale_p) ** 2),
        "pairwise_x0": lambda: 1 / (A**2 + A_p**2).clamp(min=0.01),
        "online": lambda: 1 / ((A * scale) ** 2).clamp(min=1e-8),
        "none": lambda: torch.ones_like(A),
    }[weight]()


def base_weighting(base_weight: str, sigma: Tensor, sigma_data: float | None) -> Tensor:
    """w of the base loss at noise levels of any shape, by consistency models' names.

    EDM's own weight is "karras" (arXiv 2206.00364, table 1; 2303.01469, appendix C), which alone
    needs `sigma_data`.
    """
    snr = sigma**-2
    if base_weight == "karras":
        assert sigma_data is not None  # only losses that know it take this name
        return snr + sigma_data**-2
    return {
        "uniform": torch.ones_like(sigma),
        "snr": snr,
        "snr+1": snr + 1,
        "truncated-snr": snr.clamp(min=1),
    }[base_weight]


@dataclass(frozen=True)
class MinSNR:
    """Min-SNR-gamma's weight of mean((x0 - D)^2): w = min(SNR, gamma), with SNR = sigma^-2.

    (arXiv 2303.09556, section 3.4.) In units of the eps that a network predicts it is
    min(SNR, gamma) / SNR, and of v min(SNR, gamma) / (SNR + 1).

    Args:
        gamma: above 0; the paper's is 5.
    """

    gamma: float = 5.0

    def __post_init__(self):
        _check_positive(self, "gamma")

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**-2).clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR:
    """Soft min-SNR's weight of mean((x0 - D)^2): w = 1 / (sigma^2 + 1 / gamma).

    (arXiv 2401.11605.) It is SNR gamma / (SNR + gamma), which goes over from SNR to gamma smoothly.

    Args:
        gamma: above 0; the paper's is 4, for which w is 1 / (sigma^2 + sigma_data^2) at EDM's
            sigma_data of 0.5.
    """

    gamma: float = 4.0

    def __post_init__(self):
        _check_positive(self, "gamma")

    def __call__(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + 1 / self.gamma)


@dataclass(frozen=True)
class P2:
    """P2's weight of mean((x0 - D)^2): w = SNR / (k + SNR)^gamma, with SNR = sigma^-2.

    (arXiv 2204.00227, eq. 8.) In units of the eps that a network predicts it is
    1 / (k + SNR)^gamma.

    Args:
        k, gamma: above 0; the paper's are 1 and 1, and gamma 0.5 for some data.
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self):
        _check_positive(self, "k", "gamma")

    def __call__(self, sigma: Tensor) -> Tensor:
        snr = sigma**-2
        return snr / (self.k + snr) ** self.gamma


def _check_positive(weight, *names: str) -> None:
    for name in names:
        value = getattr(weight, name)
        if not 0 < value < math.inf:
            raise ValueError(
                f"{type(weight).__name__}: {name} must be a positive number, got {value}"
            )


# by name with the papers' numbers; with others an object of the class is given
NAMED_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "min-snr": MinSNR(),
    "soft-min-snr": SoftMinSNR(),
    "p2": P2(),
}


def own_base_weight(
    base_weight: str | Callable, sigma: Tensor, sigma_data: float | None, where: str
) -> Tensor:
    """w of the base loss [B] at noise levels [B] in float64, by any name or by a callable.

    Args:
        base_weight: a name of `NAMED_WEIGHTS` or of `base_weighting`, or a callable of sigma.
        sigma: [B] float64.
        sigma_data: of "karras".
        where: how an error begins.

    Raises:
        ValueError: the callable gave something else than [B] numbers.
    """
    if isinstance(base_weight, str) and base_weight not in NAMED_WEIGHTS:
        return base_weighting(base_weight, sigma, sigma_data)
    weight = NAMED_WEIGHTS[base_weight] if isinstance(base_weight, str) else base_weight
    values = weight(sigma)
    if not isinstance(values, Tensor) or values.shape != sigma.shape:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{where}: base_weight must give a tensor {list(sigma.shape)} for as many noise "
            f"levels, got {shape}"
        )
    return values.to(sigma.dtype)


class Uncertainty(nn.Module):
    """EDM2's learned uncertainty u(sigma) of a noise level (arXiv 2312.02696, section 2.3).

    Given to a loss, a sample's L becomes exp(-u) L + u, whose optimum over u is
    u = ln E[L | sigma]: every noise level then has the same weight in the gradient, whatever L is
    there. u is a linear layer over random Fourier features of ln(sigma) / 4 and starts at 0, where
    nothing changes. Its parameters are trained with the network's and are not needed afterwards.

    Args:
        channels: of the features.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, sigma: Tensor) -> Tensor:
        """u [B] of noise levels [B] > 0, in the parameters' dtype; gradient to the parameters.

        Levels above e^20, and an infinite one, are one.
        """
        c_noise = (sigma.log().clamp(max=20) / 4).to(self.freqs.dtype)
        features = (c_noise[:, None] * self.freqs + self.phases).cos() * 2**0.5
        return features @ self.weight / len(self.weight) ** 0.5
