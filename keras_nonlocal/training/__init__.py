"""Training as in the paper: recipes, the optimizer, batch normalization that is frozen or precise, and a loop that
survives being killed, on one machine or several.
"""

from keras_nonlocal.training.batch_norm import PreciseBatchNormalization, freeze_batch_norm, precise_batch_norm
from keras_nonlocal.training.building import Plan, build_model, plan_training
from keras_nonlocal.training.checkpoints import Checkpoints, TrainingError
from keras_nonlocal.training.distribution import Workers, distribute
from keras_nonlocal.training.loop import LocalStep, train
from keras_nonlocal.training.optimizer import SGD, LearningRate, make_optimizer
from keras_nonlocal.training.recipes import RECIPES, Recipe, parse_overrides, read_recipe
from keras_nonlocal.training.run import TrainedModel, train_recipe

__all__ = [
    "RECIPES",
    "SGD",
    "Checkpoints",
    "LearningRate",
    "LocalStep",
    "Plan",
    "PreciseBatchNormalization",
    "Recipe",
    "TrainedModel",
    "TrainingError",
    "Workers",
    "build_model",
    "distribute",
    "freeze_batch_norm",
    "make_optimizer",
    "parse_overrides",
    "plan_training",
    "precise_batch_norm",
    "read_recipe",
    "train",
    "train_recipe",
]
