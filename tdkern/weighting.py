"""The weights of the TD term and of the base loss, by name, in plain PyTorch."""

import torch
from torch import Tensor


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


def base_weighting(base_weight: str, sigma: Tensor, sigma_data: float) -> Tensor:
    """w of the base loss at noise levels of any shape, by consistency models' names.

    EDM's own weight is "karras" (arXiv 2206.00364, table 1; 2303.01469, appendix C).
    """
    snr = sigma**-2
    return {
        "karras": snr + sigma_data**-2,
        "uniform": torch.ones_like(sigma),
        "snr": snr,
        "snr+1": snr + 1,
        "truncated-snr": snr.clamp(min=1),
    }[base_weight]
