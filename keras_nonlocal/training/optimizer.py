"""Stochastic gradient descent with the momentum, the weight decay and the learning rates of the paper's release."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_nonlocal")
class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of every step of a recipe.

    Args:
        learning_rate: Float, the highest.
        total_steps: Integer, the optimizer's steps; the rate of later ones is that of the last.
        schedule: `"step"` (times `decay_factor` from each of `milestones` on), `"cosine"` (half a cosine, which would
            reach 0 at `total_steps`) or `"constant"`.
        milestones: Steps of the schedule `"step"`.
        decay_factor: Float.
        warmup_steps: Integer, steps in which a factor of the schedule rises linearly from `warmup_factor` to 1.
        warmup_factor: Float.
        gradient_accumulation_steps: Integer, that of the optimizer, which counts what it accumulates as steps.

    Returns:
        The learning rate of a step, counted from 0, as a float32 tensor.

    Example:

    >>> rate = LearningRate(0.01, total_steps=400_000, milestones=(150_000, 300_000))
    >>> [round(float(rate(step)), 6) for step in (0, 149_999, 150_000, 300_000, 399_999)]
    [0.01, 0.01, 0.001, 0.0001, 0.0001]
    """

    def __init__(
        self,
        learning_rate,
        total_steps,
        schedule="step",
        milestones=(),
        decay_factor=0.1,
        warmup_steps=0,
        warmup_factor=0.1,
        gradient_accumulation_steps=1,
        name="learning_rate",
    ):
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {', '.join(map(repr, SCHEDULES))}. Received: {schedule=}")
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.schedule = schedule
        self.milestones = tuple(milestones)
        self.decay_factor = decay_factor
        self.warmup_steps = warmup_steps
        self.warmup_factor = warmup_factor
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.name = name

    def __call__(self, step):
        # Whole numbers as long as they are compared: float32 does not hold every step of a long run.
        step = ops.convert_to_tensor(step) // self.gradient_accumulation_steps
        step = ops.minimum(step, self.total_steps - 1)
        rate = self.learning_rate * SCHEDULES[self.schedule](self, step)
        if not self.warmup_steps:
            return rate
        done = ops.minimum(ops.cast(step, "float32") / self.warmup_steps, 1.0)
        return rate * (self.warmup_factor + (1.0 - self.warmup_factor) * done)

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "total_steps": self.total_steps,
            "schedule": self.schedule,
            "milestones": list(self.milestones),
            "decay_factor": self.decay_factor,
            "warmup_steps": self.warmup_steps,
            "warmup_factor": self.warmup_factor,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "name": self.name,
        }


def _constant(rate, step):
    return ops.ones((), "float32")


def _steps(rate, step):
    factor = ops.ones((), "float32")
    for milestone in rate.milestones:
        factor = ops.where(step >= milestone, factor * rate.decay_factor, factor)
    return factor


def _cosine(rate, step):
    return 0.5 * (1.0 + ops.cos(math.pi * ops.cast(step, "float32") / rate.total_steps))


SCHEDULES = {"step": _steps, "cosine": _cosine, "constant": _constant}


@keras.saving.register_keras_serializable(package="keras_nonlocal")
class SGD(keras.optimizers.SGD):
    """Stochastic gradient descent, with momentum and weight decay as in Caffe2's release of the paper and in PyTorch.

    For a weight w with the gradient g, momentum μ, decay d and learning rate r, a step is

    ```
    g = g + d w
    v = μ v + g
    w = w - r (g + μ v)     # Nesterov's; without it, w - r v
    ```

    `keras.optimizers.SGD` differs in both: its `weight_decay` does not go through the momentum (w - r d w, about a
    tenth of this with μ = 0.9), and its v holds the learning rates of the past, which still act after the rate drops.

    Args:
        learning_rate: Float or schedule.
        momentum: Float, μ.
        nesterov: Whether the momentum is Nesterov's.
        coupled_weight_decay: Float, d.
        not_decayed: Names of weights without decay. Biases have it, as in the release.
        **kwargs: Arguments of `keras.optimizers.SGD`, such as `gradient_accumulation_steps` and `use_ema`.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 4.1

    Example:

    >>> weight = keras.Variable([1.0])
    >>> optimizer = SGD(0.5, momentum=0.0, coupled_weight_decay=0.1)
    >>> optimizer.apply([keras.ops.convert_to_tensor([1.0])], [weight])
    >>> round(float(weight[0]), 6)
    0.45
    """

    def __init__(
        self,
        learning_rate=0.01,
        momentum=0.9,
        nesterov=True,
        coupled_weight_decay=1e-4,
        not_decayed=("gamma", "beta"),
        **kwargs,
    ):
        super().__init__(learning_rate, momentum=momentum, nesterov=nesterov, **kwargs)
        if self.weight_decay is not None:
            raise ValueError(
                f"`weight_decay` must be `None`, as this is `coupled_weight_decay`. "
                f"Received: weight_decay={self.weight_decay}"
            )
        self.coupled_weight_decay = coupled_weight_decay
        self.not_decayed = tuple(not_decayed)
        self.decays = []

    def is_decayed(self, variable):
        """Whether a weight has decay.

        Args:
            variable: `keras.Variable` of a model.

        Returns:
            Boolean.
        """
        return variable.name not in self.not_decayed

    def build(self, variables):
        if not self.built:
            self.decays = [self.coupled_weight_decay * self.is_decayed(variable) for variable in variables]
        super().build(variables)

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        if self.decays[index]:
            gradient = gradient + self.decays[index] * ops.convert_to_tensor(variable)
        if self.momentum:
            velocity = self.momentum * ops.convert_to_tensor(self.momentums[index]) + gradient
            self.assign(self.momentums[index], velocity)
            gradient = gradient + self.momentum * velocity if self.nesterov else velocity
        self.assign_sub(variable, rate * gradient)

    def get_config(self):
        config = super().get_config()
        return config | {
            "coupled_weight_decay": self.coupled_weight_decay,
            "not_decayed": list(self.not_decayed),
        }


def make_optimizer(recipe):
    """The optimizer of a recipe, with its learning rates.

    Args:
        recipe: A `Recipe`.

    Returns:
        A `SGD`. Its `iterations` are steps, whole batches each. With `ema_momentum` it keeps moving averages of the
        weights, which `optimizer.finalize_variable_values(model.trainable_variables)` puts in their place.

    Example:

    >>> from keras_nonlocal.training import read_recipe
    >>> optimizer = make_optimizer(read_recipe("kinetics-32x4"))
    >>> optimizer.momentum, optimizer.nesterov, round(float(optimizer.learning_rate), 6)
    (0.9, True, 0.0025)
    """
    parts = recipe.gradient_accumulation_steps
    return SGD(
        learning_rate_of(recipe),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        coupled_weight_decay=recipe.weight_decay,
        gradient_accumulation_steps=parts if parts > 1 else None,
        use_ema=recipe.ema_momentum is not None,
        # Keras averages at every part of a batch, all but one of which leave the weights as they are.
        ema_momentum=0.0 if recipe.ema_momentum is None else recipe.ema_momentum ** (1 / parts),
    )


def learning_rate_of(recipe):
    """The learning rates of a recipe.

    Args:
        recipe: A `Recipe`.

    Returns:
        A `LearningRate`.
    """
    return LearningRate(
        recipe.scaled_learning_rate,
        recipe.num_steps,
        schedule=recipe.schedule,
        milestones=recipe.scaled_milestones,
        decay_factor=recipe.decay_factor,
        warmup_steps=recipe.scaled_steps(recipe.warmup_steps),
        warmup_factor=recipe.warmup_factor,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
    )
