"""`tdkern demo`: a family with and without TD on a problem whose exact denoiser is known."""

from .families import FAMILIES, STUDY, Family
from .picture import draw_picture
from .saved import from_json, to_json
from .study import Config, Study, run_study
from .tables import conclusion, report

__all__ = [
    "FAMILIES",
    "STUDY",
    "Config",
    "Family",
    "Study",
    "conclusion",
    "draw_picture",
    "from_json",
    "report",
    "run_study",
    "to_json",
]
