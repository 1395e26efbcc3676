"""Image data sets in EDM's layout, the order in which training reads them, and images on disk."""

from .augment import AugmentPipe
from .dataset import DatasetError, ImageDataset
from .images import save_grid, save_image, to_float, to_uint8
from .order import StepBatches, derive_seed, step_indices

__all__ = [
    "AugmentPipe",
    "DatasetError",
    "ImageDataset",
    "StepBatches",
    "derive_seed",
    "save_grid",
    "save_image",
    "step_indices",
    "to_float",
    "to_uint8",
]
