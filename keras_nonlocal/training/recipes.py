"""How a network is trained, as a table of named values: the recipes of the paper, and YAML files that change them."""

import dataclasses
import difflib
import math
import os
import pathlib
import re

import yaml

from keras_nonlocal.applications.resnet import NETWORKS, is_integer

FOLDER = pathlib.Path(__file__).parent / "recipes"
RECIPES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))  # the names of those that are shipped
DEFAULT_BASE = "kinetics-8x8"  # where every key stands


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a training run is told but its videos, its classes and its seed. `read_recipe` gives one.

    Steps are those of the optimizer. `learning_rate` and all numbers of steps are meant for batches of
    `reference_batch_size` clips: with another `batch_size` the rate scales with it, and the steps inversely, so that
    there are as many passes over the videos (Goyal et al., 2017, section 2.1).

    Args:
        model: Name of the network, such as `"i3d_resnet50"`.
        non_local: Non-local blocks: their number, or a dictionary of stages to indices of residual blocks.
        non_local_options: Dictionary of arguments of `NonLocal3D`, or `None`, as the builders take it.
        temporal_strides: Three integers, of conv1, pool1 and pool2. `None`: those of the weights, or (1, 1, 2).
        pool1_padding: `"valid"` or `"same"`. `None`: that of the weights, or `"valid"`.
        dropout: Rate of the dropout before the dense layer, from 0 to below 1.
        weights: What the network starts from: `None` (random), `"imagenet"` or the path of a file of weights.
        new_head: Whether the dense layer starts at random although the file in `weights` has one.
        starts_from: Name of the recipe that has trained what `weights` must name, or `None`: such a recipe is nothing
            without its weights.
        num_frames: Frames of a clip.
        frame_stride: Step from one frame of a clip to the next, in frames of the video.
        image_size: Side of the square crops, in pixels.
        shorter_side: Pair (low, high), in pixels: videos are resized to a shorter side drawn from it.
        horizontal_flip: Whether to mirror every second clip at random.
        sampling: Which frames are taken, a name of `keras_nonlocal.data.sampling.SAMPLERS`.
        multi_label: Whether a video may be of several classes: a sigmoid for each and binary cross-entropy, in place of
            a softmax.
        batch_size: Clips of a step, over all machines and all `gradient_accumulation_steps`.
        reference_batch_size: Clips of a step that `learning_rate` and the numbers of steps are meant for.
        gradient_accumulation_steps: Parts that a batch is computed in, one after the other, where memory is short.
            Batch normalization takes the statistics of each part by itself. Progress bars and logs count parts.
        total_steps: Length of the training.
        learning_rate: The highest learning rate.
        schedule: `"step"` (times `decay_factor` at each of `milestones`), `"cosine"` (half a cosine down to 0 at
            `total_steps`) or `"constant"`.
        milestones: Steps (integers) or fractions of `total_steps` (below 1), rising, of the schedule `"step"`.
        decay_factor: Factor of the learning rate at every milestone.
        warmup_steps: Steps in which a factor of the learning rate rises linearly from `warmup_factor` to 1; 0 for none.
        warmup_factor: Where it starts.
        momentum: Momentum of SGD, from 0 to below 1.
        nesterov: Whether it is Nesterov's.
        weight_decay: Factor of the weights in their gradients; γ and β of batch normalization have none.
        label_smoothing: Share of the label that is spread evenly over all classes, from 0 to below 1.
        ema_momentum: Momentum of a moving average of the weights over the steps, which the trained model takes; `None`
            for none.
        freeze_batch_norm: Whether batch normalization keeps its statistics, γ and β.
        precise_batch_norm_batches: Batches from which its statistics are computed before every evaluation; 0 evaluates
            with the moving averages.
        remat: Whether a step keeps only what goes from block to block and computes the rest once more: less memory,
            about a third more arithmetic.
        dtype_policy: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"`.
        jit_compile: Whether XLA compiles the step: true, false or `"auto"`, as Keras decides.
        test_num_clips: Clips of a video that is tested, by `keras-nonlocal evaluate` or `evaluate_views`.
        test_num_crops: Crops of each of them.
        test_shorter_side: Size to which the videos' shorter side is resized then, in pixels.
        test_image_size: Side of the crops then, in pixels.

    Raises:
        ValueError: if a value is none of the above.
    """

    model: str
    non_local: int | dict
    non_local_options: dict | None
    temporal_strides: tuple | None
    pool1_padding: str | None
    dropout: float
    weights: str | None
    new_head: bool
    starts_from: str | None
    num_frames: int
    frame_stride: int
    image_size: int
    shorter_side: tuple
    horizontal_flip: bool
    sampling: str
    multi_label: bool
    batch_size: int
    reference_batch_size: int
    gradient_accumulation_steps: int
    total_steps: int
    learning_rate: float
    schedule: str
    milestones: tuple
    decay_factor: float
    warmup_steps: int
    warmup_factor: float
    momentum: float
    nesterov: bool
    weight_decay: float
    label_smoothing: float
    ema_momentum: float | None
    freeze_batch_norm: bool
    precise_batch_norm_batches: int
    remat: bool
    dtype_policy: str
    jit_compile: bool | str
    test_num_clips: int
    test_num_crops: int
    test_shorter_side: int
    test_image_size: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            object.__setattr__(self, name, _with_tuples(value))
        for name, (is_valid, expected) in CHECKS.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}")
            if isinstance(value, int) and Recipe.__annotations__[name] in (float, float | None):
                object.__setattr__(self, name, float(value))
        if self.shorter_side[0] < self.image_size:
            raise ValueError(
                f"`image_size` must not be larger than `shorter_side`, {self.shorter_side}. "
                f"Received: image_size={self.image_size}"
            )
        if self.test_shorter_side < self.test_image_size:
            raise ValueError(
                f"`test_image_size` must not be larger than `test_shorter_side`, {self.test_shorter_side}. "
                f"Received: test_image_size={self.test_image_size}"
            )
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"`warmup_steps` must be below `total_steps`, {self.total_steps}. "
                f"Received: warmup_steps={self.warmup_steps}"
            )
        steps = [0, *(_step_of(milestone, self.total_steps) for milestone in self.milestones), self.total_steps]
        if self.schedule == "step" and any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(
                f"`milestones` must rise and lie below `total_steps`, {self.total_steps}, or be fractions such as "
                f"0.5. Received: milestones={self.milestones}"
            )
        self.micro_batch_size()

    @property
    def num_steps(self):
        """Steps of the optimizer at `batch_size`."""
        return self.scaled_steps(self.total_steps)

    @property
    def scaled_learning_rate(self):
        """The highest learning rate at `batch_size`."""
        return self.learning_rate * self.batch_size / self.reference_batch_size

    @property
    def scaled_milestones(self):
        """The milestones as steps at `batch_size`."""
        return tuple(self.scaled_steps(_step_of(milestone, self.total_steps)) for milestone in self.milestones)

    @property
    def label_mode(self):
        """The argument `label_mode` of `video_dataset_from_directory` that the loss wants."""
        if self.multi_label:
            return "multi_label"
        return "categorical" if self.label_smoothing else "int"

    @property
    def clip_options(self):
        """The arguments of `video_dataset_from_directory` about the clips to train on."""
        names = ("num_frames", "frame_stride", "image_size", "shorter_side", "horizontal_flip", "sampling")
        return {name: getattr(self, name) for name in names}

    def scaled_steps(self, steps):
        """`steps` of the recipe as steps at `batch_size`, rounded.

        Args:
            steps: Integer, steps of batches of `reference_batch_size` clips.

        Returns:
            Integer.
        """
        return (2 * steps * self.reference_batch_size + self.batch_size) // (2 * self.batch_size)

    def micro_batch_size(self, num_workers=1):
        """Clips that one worker computes at a time.

        Args:
            num_workers: Integer, the workers that share every batch.

        Returns:
            Integer.

        Raises:
            ValueError: if `batch_size` has no equal share for each.
        """
        size, rest = divmod(self.batch_size, num_workers * self.gradient_accumulation_steps)
        if rest:
            shares = f"`gradient_accumulation_steps`, {self.gradient_accumulation_steps}"
            shares += f", times the workers, {num_workers}" if num_workers > 1 else ""
            raise ValueError(f"`batch_size` must be a multiple of {shares}. Received: batch_size={self.batch_size}")
        return size

    def to_yaml(self):
        """The recipe as the text of a file that `read_recipe` reads, with every key.

        Returns:
            A string.
        """
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def read_recipe(name_or_path, **overrides):
    """Reads a recipe that is shipped, or a YAML file.

    A file holds keys of `Recipe` and their values, and with the key `base` the name or the path (from its own folder)
    of the recipe that has the rest; the default is `kinetics-8x8`.

    Args:
        name_or_path: One of `RECIPES` (`"charades"`, `"kinetics-128x1"`, `"kinetics-32x2"`, `"kinetics-32x4"`,
            `"kinetics-8x8"`), or the path of a file.
        **overrides: Values in place of the recipe's.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: if there is no such recipe, a key is unknown or a value is out of range; it names the nearest.

    Example:

    >>> recipe = read_recipe("kinetics-8x8", batch_size=16)
    >>> recipe.num_frames, recipe.scaled_learning_rate, recipe.num_steps
    (8, 0.0025, 1600000)
    """
    values = _read_values(name_or_path, ()) | _checked_keys(overrides, "the arguments")
    return Recipe(**values)


def parse_overrides(texts):
    """Keys and values from a command line.

    Args:
        texts: List of strings `key=value`, the values in YAML.

    Returns:
        A dictionary for `read_recipe(..., **overrides)`.

    Raises:
        ValueError: if a string is none, or its key is unknown or there twice.

    Example:

    >>> parse_overrides(["weight_decay=5e-5", "shorter_side=[128, 160]"])
    {'weight_decay': 5e-05, 'shorter_side': [128, 160]}
    """
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key in overrides:
            raise ValueError(f"Overrides must be `key=value`, each key once. Received: {text!r}")
        overrides |= _checked_keys({key: _load_yaml(value, f"`{key}`")}, "the overrides")
    return overrides


# Files


def _read_values(name_or_path, chain):
    """All keys of a recipe and of those that it is based on; `chain`: the files that lead here."""
    path = FOLDER / f"{name_or_path}.yaml" if name_or_path in RECIPES else pathlib.Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"There is no such recipe or file; the nearest: {_nearest(path.name, RECIPES)}. "
            f"Received: {os.fspath(name_or_path)!r}"
        )
    path = path.resolve()
    if path in chain:
        raise ValueError(f"`base` must not lead back to the file itself. Received: base={os.fspath(name_or_path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"A recipe must be a text file in UTF-8. Received: {str(path)!r}") from error
    values = _load_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"A recipe must be lines `key: value`. Received: {str(path)!r}")
    base = values.pop("base", DEFAULT_BASE)
    values = _checked_keys(values, str(path))
    if path == FOLDER.resolve() / f"{DEFAULT_BASE}.yaml":
        return values
    if not isinstance(base, str):
        raise ValueError(f"`base` must be the name or the path of a recipe. Received: base={base!r}")
    return _read_values(base if base in RECIPES else path.parent / base, (*chain, path)) | values


def _checked_keys(values, where):
    known = list(Recipe.__annotations__)
    for key in values:
        if key not in known:
            raise ValueError(f"Unknown key in {where}; the nearest: {_nearest(key, known)}. Received: {key!r}")
    return values


def _nearest(name, known):
    return ", ".join(difflib.get_close_matches(str(name), known) or known)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and a key may stand once."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text, where):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} must be YAML. Received: {' '.join(str(error).split())}") from error


def _with_tuples(value):
    """Lists, of which YAML knows only one kind, as tuples."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, (list, tuple)) else value


def _step_of(milestone, total_steps):
    return milestone if isinstance(milestone, int) else round(milestone * total_steps)


# Which values a key may have, and how to say so


def _integer(least):
    return lambda value: is_integer(value, least), f"an integer of at least {least}"


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _share(may_be_none=False):
    return (
        lambda value: (value is None and may_be_none) or (_is_number(value) and 0 <= value < 1),
        ("`None` or " if may_be_none else "") + "a number from 0 to below 1",
    )


def _positive(highest=math.inf):
    above = "" if highest == math.inf else f" of at most {highest}"
    return lambda value: _is_number(value) and 0 < value <= highest, f"a positive number{above}"


def _one_of(*choices):
    # By type too: 1 is no `True`.
    types = {type(choice) for choice in choices}
    return lambda value: type(value) in types and value in choices, f"one of {', '.join(map(repr, choices))}"


def _text(may_be_none=False):
    return (
        lambda value: (value is None and may_be_none) or (isinstance(value, str) and bool(value)),
        "`None` or a string" if may_be_none else "a string",
    )


def _are_milestones(value):
    return isinstance(value, tuple) and all(is_integer(x, 1) or (_is_number(x) and 0 < x < 1) for x in value)


CHECKS = {
    "model": _one_of(*NETWORKS),
    "non_local": (lambda value: is_integer(value, 0) or isinstance(value, dict), "an integer or a dictionary"),
    "non_local_options": (lambda value: value is None or isinstance(value, dict), "`None` or a dictionary"),
    "temporal_strides": (
        lambda value: (
            value is None
            or (isinstance(value, tuple) and len(value) == 3 and all(is_integer(stride, 1) for stride in value))
        ),
        "`None` or 3 integers of at least 1",
    ),
    "pool1_padding": _one_of(None, "valid", "same"),
    "dropout": _share(),
    "weights": _text(may_be_none=True),
    "new_head": _one_of(True, False),
    "starts_from": _text(may_be_none=True),
    "num_frames": _integer(1),
    "frame_stride": _integer(1),
    "image_size": _integer(1),
    "shorter_side": (
        lambda value: (
            isinstance(value, tuple)
            and len(value) == 2
            and all(is_integer(side, 1) for side in value)
            and value[0] <= value[1]
        ),
        "a pair (low, high) of integers of at least 1",
    ),
    "horizontal_flip": _one_of(True, False),
    "sampling": _text(),
    "multi_label": _one_of(True, False),
    "batch_size": _integer(1),
    "reference_batch_size": _integer(1),
    "gradient_accumulation_steps": _integer(1),
    "total_steps": _integer(1),
    "learning_rate": _positive(),
    "schedule": _one_of("step", "cosine", "constant"),
    "milestones": (_are_milestones, "a list of steps (integers of at least 1) or of fractions (below 1)"),
    "decay_factor": _positive(highest=1),
    "warmup_steps": _integer(0),
    "warmup_factor": _positive(highest=1),
    "momentum": _share(),
    "nesterov": _one_of(True, False),
    "weight_decay": _share(),
    "label_smoothing": _share(),
    "ema_momentum": _share(may_be_none=True),
    "freeze_batch_norm": _one_of(True, False),
    "precise_batch_norm_batches": _integer(0),
    "remat": _one_of(True, False),
    "dtype_policy": _one_of("float32", "mixed_bfloat16", "mixed_float16"),
    "jit_compile": _one_of("auto", True, False),
    "test_num_clips": _integer(1),
    "test_num_crops": _integer(1),
    "test_shorter_side": _integer(1),
    "test_image_size": _integer(1),
}
