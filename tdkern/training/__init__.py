"""Training with and without the temporal-difference term: options, loop, checkpoints."""

from .checkpoint import CheckpointError, load_network
from .loop import train
from .options import Options
from .sampling import sample
from .trainer import Trainer

__all__ = ["CheckpointError", "Options", "Trainer", "load_network", "sample", "train"]
