"""Networks with non-local blocks as a search space, and what each of them costs before it is built."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math

import keras
import keras_tuner

from keras_nonlocal.applications.resnet import (
    ARRANGEMENTS,
    NETWORKS,
    is_integer,
    non_local_arguments,
    non_local_blocks,
)
from keras_nonlocal.applications.summary import summarize
from keras_nonlocal.layers import NonLocal3D
from keras_nonlocal.ops import PAIRWISE

# Of a block; they have a meaning only where there are blocks.
OF_BLOCKS = ("pairwise", "pool_size", "window")
ARCHITECTURE = ("network", "non_local", *OF_BLOCKS)
ATTRIBUTES = {"network": "networks"}  # of the hypermodel, with the choices, where the name is another
IMPOSSIBLE = "impossible"  # begins the reason why a network cannot be built at all


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a candidate costs, as `keras_nonlocal.applications.summarize` counts it.

    Args:
        parameters: Weights that training fits.
        macs: Multiply-adds of one clip.
    """

    parameters: int
    macs: int


class NonLocalHyperModel(keras_tuner.HyperModel):
    """Networks with non-local blocks as a search space of Keras Tuner, within a budget.

    Searched are the network, the number and place of its non-local blocks, their pairwise function, sub-sampling and
    window, the learning rate and the weight decay. An argument with a single value is no longer searched.

    What a candidate costs is known before it is built: it is counted on the same graph without any weight. Candidates
    over the budget, and impossible ones (five blocks in a network that has places for two, a window that does not
    divide the map), are rejected. `tune` draws others in their place; in a tuner of Keras Tuner's own they are failed
    trials.

    Candidates are trained by SGD with Nesterov momentum 0.9 on the cross-entropy. The weight decay is Keras', decoupled
    from the gradient, and leaves out γ and β of batch normalization.

    Args:
        classes: Number of classes.
        input_shape: Shape of the clips that the networks take, such as `(8, None, None, 3)`.
        clip_shape: Shape of the clips of the training, for which costs are counted; all its sizes must be known.
            `None`: `input_shape`.
        networks: Names out of `keras_nonlocal.applications.resnet.NETWORKS`. `None`: all.
        non_local: Numbers and places of blocks, each as `I3DResNet50(non_local=...)` takes it: a number, or a
            dictionary of stages to the indices of the residual blocks after which they stand. `None`: every number that
            the networks have, and one block in each stage but the first, before its last residual block (the paper's
            table 2b).
        pairwise: Pairwise functions. `None`: all.
        pool_size: Sub-samplings of the keys, as `NonLocal3D` takes them.
        window: Windows, as `NonLocal3D` takes them: by default space-time, space alone and time alone (table 2d).
        learning_rate: `(low, high)`, searched on a logarithmic scale, or one number.
        weight_decay: Likewise.
        max_parameters: Most parameters of a candidate. `None`: any number.
        max_gmacs: Most multiply-adds for one clip, in 10⁹. `None`: any number.
        multi_label: Whether a clip has several labels (or none): a sigmoid for each class, judged by the area under
            the precision-recall curve (`val_auc`). Otherwise by the accuracy (`val_accuracy`).
        network_options: Dictionary of further arguments of the networks' functions, such as
            `{"temporal_strides": (2, 2, 2)}`.

    Raises:
        ValueError: if an argument is none of the above. Costs, and whether anything fits, are looked at when the space
            is declared.

    Example:

    >>> hypermodel = NonLocalHyperModel(5, (8, 64, 64, 3), networks=["c2d_resnet11", "i3d_resnet50"], max_gmacs=0.2)
    >>> hypermodel.rejection({"network": "i3d_resnet50", "non_local": "0"})
    '2.236 GMACs, the budget is 0.2'
    >>> hypermodel.costs({"network": "c2d_resnet11", "non_local": "0"})
    Costs(parameters=49941, macs=39367296)
    """

    def __init__(
        self,
        classes,
        input_shape,
        clip_shape=None,
        networks=None,
        non_local=None,
        pairwise=None,
        pool_size=(None, (1, 2, 2)),
        window=(None, (1, None, None), (None, 1, 1)),
        learning_rate=(1e-3, 1e-1),
        weight_decay=(1e-6, 1e-3),
        max_parameters=None,
        max_gmacs=None,
        multi_label=False,
        network_options=None,
    ):
        super().__init__(name="non_local")
        if not is_integer(classes, 2):
            raise ValueError(f"`classes` must be an integer of at least 2. Received: classes={classes!r}")
        self.classes = classes
        self.input_shape = tuple(input_shape)
        self.clip_shape = self.input_shape if clip_shape is None else tuple(clip_shape)
        if (
            len(self.input_shape) != 4
            or len(self.clip_shape) != 4
            or not all(is_integer(n, 1) for n in self.clip_shape)
        ):
            raise ValueError(
                "`clip_shape`, or else `input_shape`, must give the 4 sizes of the clips. "
                f"Received: input_shape={input_shape!r}, clip_shape={clip_shape!r}"
            )
        self.networks = _names("networks", networks, NETWORKS)
        self.pairwise = _names("pairwise", pairwise, PAIRWISE)
        self.arrangements = {name: ARRANGEMENTS[name.rpartition("resnet")[2]] for name in self.networks}
        if non_local is None:
            non_local = _usual_places(self.arrangements.values())
        # What Keras Tuner holds are names; here is what they stand for.
        self.non_local = _named("non_local", non_local, _place_name)
        self.pool_size = _named("pool_size", pool_size, _sizes_name)
        self.window = _named("window", window, _sizes_name)
        self.learning_rate = _range("learning_rate", learning_rate)
        self.weight_decay = (0.0, 0.0) if weight_decay == 0 else _range("weight_decay", weight_decay)
        if max_parameters is not None and not max_parameters > 0:
            raise ValueError(
                f"`max_parameters` must be positive or `None`. Received: max_parameters={max_parameters!r}"
            )
        if max_gmacs is not None and not max_gmacs > 0:
            raise ValueError(f"`max_gmacs` must be positive or `None`. Received: max_gmacs={max_gmacs!r}")
        self.max_parameters, self.max_gmacs, self.multi_label = max_parameters, max_gmacs, multi_label
        self.network_options = dict(network_options or {})
        own = {"classes", "input_shape", "non_local", "non_local_options", "classifier_activation", "weights"}
        if own & set(self.network_options):
            raise ValueError(
                f"`network_options` must not hold {', '.join(sorted(own))}. Received: "
                f"network_options={network_options!r}"
            )

    @property
    def objective(self):
        """By what candidates are judged, a `keras_tuner.Objective`."""
        return keras_tuner.Objective("val_auc" if self.multi_label else "val_accuracy", "max")

    def get_config(self):
        """What the space is, in values that JSON can hold."""
        names = ("classes", "input_shape", "clip_shape", "networks", "non_local", "pairwise", "pool_size", "window")
        names += ("learning_rate", "weight_decay", "max_parameters", "max_gmacs", "multi_label")
        config = {name: getattr(self, name) for name in names}
        config = {key: list(value) if isinstance(value, (tuple, dict)) else value for key, value in config.items()}
        return config | {"network_options": repr(self.network_options)}

    def declare_hyperparameters(self, hp):
        """Adds the space to `hp`. Its defaults are a candidate that fits.

        Raises:
            ValueError: if no candidate of the space fits.
        """
        default = self.fitting[0]
        # None is conditional, though those of blocks mean nothing without: Keras Tuner would build a candidate of
        # each condition to learn what depends on it, whether that fits or not.
        for name in ARCHITECTURE:
            values = list(getattr(self, ATTRIBUTES.get(name, name)))
            if len(values) == 1:
                hp.Fixed(name, values[0])
            else:
                hp.Choice(name, values, default=default.get(name))
        for name in ("learning_rate", "weight_decay"):
            low, high = getattr(self, name)
            if low == high:
                hp.Fixed(name, low)
            else:
                hp.Float(name, low, high, sampling="log", default=math.sqrt(low * high))

    def build(self, hp):
        """Builds and compiles a candidate.

        Args:
            hp: `keras_tuner.HyperParameters`.

        Returns:
            A compiled `keras.Model`.

        Raises:
            keras_tuner.errors.FailedTrialError: if it is over the budget or impossible, before anything of it is built.
        """
        self.declare_hyperparameters(hp)
        reason = self.rejection(hp.values)
        if reason is not None:
            raise keras_tuner.errors.FailedTrialError(f"Rejected: {reason}")
        model = self.build_network(hp.values)
        optimizer = keras.optimizers.SGD(
            hp.values["learning_rate"], momentum=0.9, nesterov=True, weight_decay=hp.values["weight_decay"] or None
        )
        optimizer.exclude_from_weight_decay([v for v in model.trainable_variables if v.name in ("gamma", "beta")])
        if self.multi_label:
            auc = keras.metrics.AUC(curve="PR", multi_label=True, num_labels=self.classes, name="auc")
            model.compile(optimizer, "binary_crossentropy", metrics=[auc])
        else:
            model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def build_network(self, values):
        """Builds a candidate, not compiled.

        Args:
            values: Dictionary of the hyperparameters' values, as in `HyperParameters.values`.

        Returns:
            A `keras.Model`.
        """
        place, options = self._blocks_of(values)
        return NETWORKS[values["network"]](
            classes=self.classes,
            input_shape=self.input_shape,
            classifier_activation="sigmoid" if self.multi_label else "softmax",
            non_local=place,
            non_local_options=options,
            **self.network_options,
        )

    def costs(self, values):
        """Costs of a candidate, which is not built.

        Args:
            values: Dictionary of the hyperparameters' values, as in `HyperParameters.values`.

        Returns:
            `Costs`, those that `summarize(build_network(values), clip_shape)` would count.

        Raises:
            ValueError: if there is no such network.
        """
        network = values["network"]
        place, options = self._blocks_of(values)
        placement = non_local_blocks(self.arrangements[network], place)
        arguments = non_local_arguments(placement, options, {})
        summary = _known_costs(_network_summary, network, self.classes, self.clip_shape, self.network_options)
        parameters, macs = summary.parameters, summary.macs
        shapes = {row.name: row.output_shape for row in summary.rows}
        for stage, blocks in placement.items():
            for block in blocks:
                # A block leaves the map's sizes as they are.
                costs = _known_costs(_block_summary, shapes[f"res{stage}_{block}_out"], arguments[stage])
                parameters, macs = parameters + costs.parameters, macs + costs.macs
        return Costs(parameters, macs)

    def rejection(self, values):
        """Why a candidate is not to be built, in words, or `None` if it may be.

        Args:
            values: Dictionary of the hyperparameters' values, as in `HyperParameters.values`.

        Returns:
            String or `None`.
        """
        try:
            costs = self.costs(values)
        except ValueError as error:
            return f"{IMPOSSIBLE}: {error}"
        if self.max_parameters is not None and costs.parameters > self.max_parameters:
            return f"{costs.parameters:,} parameters, the budget is {self.max_parameters:,.0f}"
        if self.max_gmacs is not None and costs.macs > self.max_gmacs * 1e9:
            return f"{costs.macs / 1e9:.4g} GMACs, the budget is {self.max_gmacs:.4g}"
        return None

    def _blocks_of(self, values):
        """`non_local` and `non_local_options` of a candidate."""
        place = self.non_local[values["non_local"]]
        if values["non_local"] == "0":
            return place, None
        pairwise, pool_size, window = (values[name] for name in OF_BLOCKS)
        options = {"pairwise": pairwise, "pool_size": self.pool_size[pool_size], "window": self.window[window]}
        return place, options

    @property
    def fitting(self):
        """Architectures that may be built, a list of dictionaries of values.

        Raises:
            ValueError: if there is none.
        """
        fitting = [values for values, reason in self._judged if reason is None]
        if not fitting:
            possible = [self.costs(values) for values, reason in self._judged if not reason.startswith(IMPOSSIBLE)]
            if possible:
                parameters, macs = min(c.parameters for c in possible), min(c.macs for c in possible)
                smallest = f"the smallest ones have {parameters:,} parameters, {macs / 1e9:.4g} GMACs"
            else:
                smallest = self._judged[0][1]
            raise ValueError(
                f"No candidate of the space fits; {smallest}. "
                f"Received: max_parameters={self.max_parameters!r}, max_gmacs={self.max_gmacs!r}"
            )
        return fitting

    @property
    def rejected(self):
        """Architectures that may not be built, a dictionary of their names to the reasons."""
        return {" ".join(values.values()): reason for values, reason in self._judged if reason is not None}

    @functools.cached_property
    def _judged(self):
        """Every architecture, with the reason why it is rejected."""
        return [(values, self.rejection(values)) for values in self._architectures()]

    def _architectures(self):
        for network, non_local in itertools.product(self.networks, self.non_local):
            values = {"network": network, "non_local": non_local}
            if non_local == "0":
                yield values
            else:
                for choice in itertools.product(*(getattr(self, name) for name in OF_BLOCKS)):
                    yield values | dict(zip(OF_BLOCKS, choice, strict=True))


_COSTS = {}  # what `_known_costs` counted


def _known_costs(function, *args):
    """The summary that `function` gives, which builds a model: its variables get a shape and no memory.

    Built in a thread of its own: the scope and Keras' list of variables that wait for their values are of one thread,
    and end with it. In this thread the next scope would fill them all.
    """
    key = (function, repr(args), keras.config.image_data_format())
    if key not in _COSTS:

        def call():
            with keras.StatelessScope(initialize_variables=False):
                return function(*args)

        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            _COSTS[key] = executor.submit(call).result()
    return _COSTS[key]


def _network_summary(network, classes, clip_shape, options):
    """Of a network without blocks."""
    return summarize(NETWORKS[network](classes=classes, input_shape=clip_shape, non_local=0, **options))


def _block_summary(shape, arguments):
    """Of one block on a map of this shape."""
    inputs = keras.Input(shape)
    return summarize(keras.Model(inputs, NonLocal3D(**arguments)(inputs)))


def meaningful(values):
    """What makes a candidate another one: those of blocks do not where there is none."""
    names = ("network", "non_local", *(OF_BLOCKS if values["non_local"] != "0" else ()))
    return {name: values[name] for name in (*names, "learning_rate", "weight_decay")}


def _usual_places(arrangements):
    """Every number that a network has, and one block in each stage but the first, before its last residual block."""
    numbers = {0} | {number for arrangement in arrangements for number in arrangement.non_local}
    places = sorted(numbers)
    for arrangement in arrangements:
        for stage, num_blocks in enumerate(arrangement.blocks[1:], start=3):
            place = {stage: [max(num_blocks - 2, 0)]}
            # One of these is the release's own.
            is_known = any(
                non_local_blocks(arrangement, n) == {stage: tuple(place[stage])} for n in arrangement.non_local
            )
            if not is_known and place not in places:
                places.append(place)
    return places


def _place_name(place):
    """`"5"`, or the residual blocks by their names: `"res3_1 res4_2"`."""
    if isinstance(place, dict) and place:
        return " ".join(f"res{stage}_{block}" for stage, blocks in sorted(place.items()) for block in blocks)
    return str(place or 0)


def _sizes_name(sizes):
    """`"1,2,2"`, `"1,all,all"` or `"none"`."""
    if sizes is None or is_integer(sizes):
        return str(sizes).lower()
    return ",".join("all" if size is None else str(size) for size in sizes)


def _named(argument, values, name_of):
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"`{argument}` must be a list of what is searched. Received: {argument}={values!r}")
    try:
        return {name_of(value): value for value in values}
    except TypeError:
        raise ValueError(
            f"`{argument}` must be a list of what is searched, each as the networks take it. "
            f"Received: {argument}={values!r}"
        ) from None


def _names(argument, names, known):
    names = list(known) if names is None else names
    if not isinstance(names, (list, tuple)) or not names or not set(names) <= set(known):
        raise ValueError(f"`{argument}` must be a list of {', '.join(known)}. Received: {argument}={names!r}")
    return list(names)


def _range(argument, value):
    pair = (value, value) if isinstance(value, (int, float)) else value
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(n, (int, float)) for n in pair)
    if not is_pair or not 0 < pair[0] <= pair[1] < math.inf:
        raise ValueError(
            f"`{argument}` must be a positive number or `(low, high)` with 0 < low <= high. "
            f"Received: {argument}={value!r}"
        )
    return float(pair[0]), float(pair[1])
