"""Losses: each draws a noisy pair for clean images and gives one loss a sample. A family is one file beside `base`."""
from .base import Loss, TDBatch, TDTerms
from .edm import EDMLoss, TDEDMLoss

__all__ = ["EDMLoss", "Loss", "TDBatch", "TDEDMLoss", "TDTerms"]
