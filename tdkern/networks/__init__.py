"""Networks: EDM's U-Nets and preconditioning under the names of its checkpoints.

Beside them others' networks as denoisers, and an MLP for points.
"""

from .denoiser import Denoiser
from .mlp import MLP
from .precond import CTPrecond, EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from .presets import unet
from .unet import DhariwalUNet, SongUNet

__all__ = [
    "MLP",
    "CTPrecond",
    "Denoiser",
    "DhariwalUNet",
    "EDMPrecond",
    "SongUNet",
    "VEPrecond",
    "VPPrecond",
    "iDDPMPrecond",
    "unet",
]
