"""Training as in the paper: recipes, the optimizer, batch normalization that is frozen or precise."""

from keras_nonlocal.training.batch_norm import PreciseBatchNormalization, freeze_batch_norm, precise_batch_norm
from keras_nonlocal.training.building import Plan, build_model, plan_training
from keras_nonlocal.training.optimizer import SGD, LearningRate, make_optimizer
from keras_nonlocal.training.recipes import RECIPES, Recipe, parse_overrides, read_recipe

__all__ = [
    "RECIPES",
    "SGD",
    "LearningRate",
    "Plan",
    "PreciseBatchNormalization",
    "Recipe",
    "build_model",
    "freeze_batch_norm",
    "make_optimizer",
    "parse_overrides",
    "plan_training",
    "precise_batch_norm",
    "read_recipe",
]
