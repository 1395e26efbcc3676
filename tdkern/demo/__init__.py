"""`tdkern demo`: a family with and without TD on a problem whose exact denoiser is known."""

from .families import FAMILIES, STUDY, Family
from .picture import draw_picture
from .study import Config, Study, run_study
from .tables import conclusion, report, to_json

__all__ = [
    "FAMILIES",
    "STUDY",
    "Config",
    "Family",
    "Study",
    "conclusion",
    "draw_picture",
    "report",
    "run_study",
    "to_json",
]
