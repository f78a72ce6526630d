"""Training: the loop that survives being killed."""

from .checkpoints import Checkpoints, TrainingError
from .loop import LocalStep, train

__all__ = ["Checkpoints", "LocalStep", "TrainingError", "train"]
