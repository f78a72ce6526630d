"""From a recipe to a compiled network, and what its training will cost."""

import dataclasses

import keras
import numpy as np

from keras_nonlocal.applications.rematerialization import kept_layers
from keras_nonlocal.applications.resnet import NETWORKS
from keras_nonlocal.applications.summary import Summary, summarize
from keras_nonlocal.layers import NonLocal1D, NonLocal2D, NonLocal3D
from keras_nonlocal.training.batch_norm import batch_norms, freeze_batch_norm
from keras_nonlocal.training.optimizer import learning_rate_of, make_optimizer
from keras_nonlocal.training.recipes import Recipe

# Arguments of the builders that a recipe has.
BUILDER_ARGUMENTS = ("non_local", "non_local_options", "temporal_strides", "pool1_padding", "dropout", "remat")


def build_model(recipe, classes):
    """Builds the network of a recipe, fills it with its weights and compiles it.

    Args:
        recipe: A `Recipe`.
        classes: Integer, the number of classes.

    Returns:
        A compiled `keras.Model` from clips `(batch, num_frames, height, width, 3)`, normalised by
        `keras_nonlocal.applications.preprocess_input`, of any height and width, to scores. It wants labels of
        `recipe.label_mode`.

    Raises:
        ValueError: if the weights are missing or do not fit, or a non-local block could not learn.

    Example:

    >>> from keras_nonlocal.training import read_recipe
    >>> recipe = read_recipe("kinetics-8x8", model="i3d_resnet11", non_local=2, weights=None)
    >>> model = build_model(recipe, classes=5)
    >>> model.name, model.output_shape, type(model.optimizer).__name__
    ('i3d_resnet11', (None, 5), 'SGD')
    """
    if recipe.starts_from and recipe.weights is None:
        raise ValueError(
            f"The recipe starts from a model that {recipe.starts_from!r} has trained: give its file as `weights` "
            f"(`--weights`), or `starts_from=None`. Received: weights={recipe.weights}"
        )
    model = _network(recipe, classes, recipe.weights)
    if recipe.freeze_batch_norm:
        _check_that_blocks_learn(model)
    model.compile(
        make_optimizer(recipe),
        _loss(recipe),
        metrics=[accuracy(recipe.multi_label)],
        jit_compile=recipe.jit_compile,
    )
    return model


def _network(recipe, classes, weights):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.dtype_policy)
    try:
        model = NETWORKS[recipe.model](
            input_shape=(recipe.num_frames, None, None, 3),  # other sizes may be tested than trained on
            classes=classes,
            classifier_activation="sigmoid" if recipe.multi_label else "softmax",
            weights=weights,
            new_head=recipe.new_head,
            **{name: getattr(recipe, name) for name in BUILDER_ARGUMENTS},
        )
    finally:
        keras.config.set_dtype_policy(policy)
    if recipe.freeze_batch_norm:
        freeze_batch_norm(model)
    return model


def _check_that_blocks_learn(model):
    """A block whose frozen γ is 0 stays the identity: no gradient passes γ."""
    dead = [
        layer.name
        for layer in model.layers
        if isinstance(layer, (NonLocal1D, NonLocal2D, NonLocal3D)) and layer.norm is not None
        if not np.any(keras.ops.convert_to_numpy(layer.norm.gamma))
    ]
    if dead:
        raise ValueError(
            "With `freeze_batch_norm` non-local blocks must come from the weights, or have "
            f"`non_local_options={{'normalization': None}}`: frozen at γ = 0 they never learn. Received: {dead}"
        )


def accuracy(multi_label):
    """The metric "accuracy": how often the highest score is right, or each score on its side of 0.5.

    Args:
        multi_label: Whether a video may be of several classes.

    Returns:
        What `compile` takes as a metric.
    """
    return keras.metrics.BinaryAccuracy(name="accuracy") if multi_label else "accuracy"


def _loss(recipe):
    if recipe.multi_label:
        return keras.losses.BinaryCrossentropy(label_smoothing=recipe.label_smoothing)
    if recipe.label_smoothing:
        return keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan_training` says of a run; `print` shows a table.

    Args:
        recipe: The `Recipe`.
        summary: `Summary` of the network for one clip.
        decayed: Paths of the weights with weight decay.
        not_decayed: Paths of the weights that are trained without.
        frozen: Paths of γ and β that are not trained.
        state_bytes: Memory of weights, gradients and the optimizer's state.
        activation_bytes: Memory of the activations of the clips that are computed at a time by one worker.
        stages: `(first step, last step, learning rate at the first, at the last)` of each part of the schedule.
        num_videos: Number of videos to train on, or `None`.
        num_workers: Number of workers.
    """

    recipe: Recipe
    summary: Summary
    decayed: tuple
    not_decayed: tuple
    frozen: tuple
    state_bytes: int
    activation_bytes: int
    stages: tuple
    num_videos: int | None
    num_workers: int

    def __str__(self):
        recipe, summary = self.recipe, self.summary
        size = recipe.micro_batch_size(self.num_workers)
        low, high = recipe.shorter_side
        side = f"{recipe.image_size}x{recipe.image_size}"
        batch = _counted(recipe.batch_size, "clip")
        if size != recipe.batch_size:
            parts = _counted(recipe.gradient_accumulation_steps, "part")
            batch += f": {_counted(self.num_workers, 'worker')} x {parts} x {_counted(size, 'clip')}"
        rows = [
            ("network", f"{recipe.model}, non_local={recipe.non_local}, weights={recipe.weights}"),
            ("clips", f"{recipe.num_frames} frames at stride {recipe.frame_stride}, {side} of {low} to {high}"),
            ("batch", batch),
            ("parameters", f"{summary.parameters / 1e6:.2f} M"),
            ("weight decay", f"{recipe.weight_decay:g} of {_counted(len(self.decayed), 'weight')}"),
            ("", f"none of {_counted(len(self.not_decayed), 'weight')}, frozen {len(self.frozen)}"),
            ("multiply-adds", f"{summary.macs / 1e9:.2f} G, the forward pass of a clip"),
            ("memory", f"about {(self.state_bytes + self.activation_bytes) / 2**30:.1f} GiB a worker"),
            ("", f"weights, gradients, optimizer {self.state_bytes / 2**30:.2f} GiB"),
            ("", f"activations of {_counted(size, 'clip')} {self.activation_bytes / 2**30:.2f} GiB"),
        ]
        lines = [f"{name:<20}{text}" for name, text in rows]
        of_videos = "" if self.num_videos is None else f"{f'passes over {self.num_videos} videos':>32}"
        lines += ["", f"{'steps':<24}{'learning rate':>22}{of_videos}"]
        for first, last, rate, last_rate in self.stages:
            rates = f"{rate:.3g}" if rate == last_rate else f"{rate:.3g} to {last_rate:.3g}"
            passes = ""
            if self.num_videos is not None:
                start, end = (step * recipe.batch_size / self.num_videos for step in (first, last + 1))
                passes = f"{f'{start:.1f} to {end:.1f}':>32}"
            lines.append(f"{f'{first} to {last}':<24}{rates:>22}{passes}")
        return "\n".join(lines)


def _counted(count, noun):
    return f"{count} {noun}{'s' * (count != 1)}"


def plan_training(recipe, classes, num_videos=None, num_workers=1):
    """Says what the training by a recipe takes, without reading weights or videos.

    The memory is an estimate: what one worker must hold for the backward pass, the outputs of all layers as `summarize`
    counts them (with `remat` of those between blocks, and of all that is inside of the largest), and the float32
    weights with their gradients and the optimizer's state. Frameworks hold less where they compute in place, and more
    for copies and for the workspace of convolutions.

    Args:
        recipe: A `Recipe`.
        classes: Integer, the number of classes.
        num_videos: Integer, the number of videos, or `None`.
        num_workers: Integer, the workers that share a batch.

    Returns:
        A `Plan`.

    Example:

    >>> from keras_nonlocal.training import read_recipe
    >>> recipe = read_recipe("kinetics-8x8", model="i3d_resnet11", non_local=2, weights=None, batch_size=8)
    >>> print(plan_training(recipe, classes=5, num_videos=1000))
    network             i3d_resnet11, non_local=2, weights=None
    clips               8 frames at stride 8, 224x224 of 256 to 320
    batch               8 clips
    parameters          0.13 M
    weight decay        0.0001 of 30 weights
                        none of 28 weights, frozen 0
    multiply-adds       2.26 G, the forward pass of a clip
    memory              about 1.0 GiB a worker
                        weights, gradients, optimizer 0.00 GiB
                        activations of 8 clips 1.03 GiB
    <BLANKLINE>
    steps                            learning rate         passes over 1000 videos
    0 to 1199999                           0.00125                   0.0 to 9600.0
    1200000 to 2399999                    0.000125               9600.0 to 19200.0
    2400000 to 3199999                    1.25e-05              19200.0 to 25600.0
    """
    size = recipe.micro_batch_size(num_workers)
    model = _network(recipe, classes, None)
    summary = summarize(model, (recipe.num_frames, recipe.image_size, recipe.image_size, 3))
    optimizer = make_optimizer(recipe)
    trained = model.trainable_variables
    norms = [weight for norm in batch_norms(model) for weight in (norm.gamma, norm.beta)]
    kept = {id(weight) for weight in trained}
    # The gradient and the momentum; then what is accumulated, and what is averaged.
    copies = 2 + (recipe.gradient_accumulation_steps > 1) + (recipe.ema_momentum is not None)
    sizes = [int(np.prod(weight.shape)) for weight in trained]
    # Half precision halves the maps, but for the sums that normalization takes.
    bytes_of_entry = 1.0 if recipe.dtype_policy == "float32" else 0.5
    return Plan(
        recipe=recipe,
        summary=summary,
        decayed=tuple(weight.path for weight in trained if optimizer.is_decayed(weight)),
        not_decayed=tuple(weight.path for weight in trained if not optimizer.is_decayed(weight)),
        frozen=tuple(weight.path for weight in norms if id(weight) not in kept),
        state_bytes=4 * (model.count_params() + copies * sum(sizes)),
        activation_bytes=int(bytes_of_entry * size * _held_bytes(recipe, model, summary)),
        stages=tuple(_stages(recipe)),
        num_videos=num_videos,
        num_workers=num_workers,
    )


def _held_bytes(recipe, model, summary):
    """With `remat` what is kept, and of the rest the largest part."""
    if not recipe.remat:
        return summary.activation_bytes
    kept_names = {layer.name for layer in kept_layers(model)}
    held, parts = 0, [0]
    for row in summary.rows:
        parts[-1] += row.activation_bytes
        if row.name in kept_names:
            output_bytes = 4 * int(np.prod(row.output_shape))
            held += output_bytes
            parts[-1] -= output_bytes
            parts.append(0)
    return held + max(parts)


def _stages(recipe):
    rate = learning_rate_of(recipe)
    last_step = recipe.num_steps - 1
    ends = {recipe.scaled_steps(recipe.warmup_steps), recipe.num_steps}
    ends |= set(recipe.scaled_milestones) if recipe.schedule == "step" else set()
    first = 0
    for end in sorted(ends - {0}):
        last = min(end - 1, last_step)
        # In the steps that the optimizer counts, which are parts of a batch.
        rates = [float(rate(step * recipe.gradient_accumulation_steps)) for step in (first, last)]
        yield first, last, *rates
        first = end
