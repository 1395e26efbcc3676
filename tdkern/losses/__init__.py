"""Losses: each draws a noisy pair for clean images and gives one loss for each sample.

A family is one file beside `base`.
"""

from . import curricula
from .base import Loss, TDBatch, TDTerms
from .ct import CTLoss, TDCTLoss
from .ddpm import DDPMLoss, TDDDPMLoss
from .edm import EDMLoss, TDEDMLoss
from .flow import FlowLoss, TDFlowLoss
from .stable import stable_target
from .ve import TDVELoss, VELoss
from .vp import TDVPLoss, VPLoss

__all__ = [
    "CTLoss",
    "DDPMLoss",
    "EDMLoss",
    "FlowLoss",
    "Loss",
    "TDBatch",
    "TDCTLoss",
    "TDDDPMLoss",
    "TDEDMLoss",
    "TDFlowLoss",
    "TDTerms",
    "TDVELoss",
    "TDVPLoss",
    "VELoss",
    "VPLoss",
    "curricula",
    "stable_target",
]
