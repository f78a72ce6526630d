"""Training: the loop that survives being killed, on one machine or several."""

from .checkpoints import Checkpoints, TrainingError
from .distribution import Workers, distribute
from .loop import LocalStep, train

__all__ = ["Checkpoints", "LocalStep", "TrainingError", "Workers", "distribute", "train"]
