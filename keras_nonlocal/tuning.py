"""Search for the best network within a budget: a hypermodel for Keras Tuner, and a search that survives being killed.

Needs Keras Tuner: `pip install 'keras-nonlocal[tuner]'`.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import os
import pathlib
import uuid
import warnings

import keras
import numpy as np

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

try:
    import keras_tuner
except ImportError as error:
    raise ImportError(
        "keras_nonlocal.tuning needs Keras Tuner: install it with pip install 'keras-nonlocal[tuner]'"
    ) from error

# Of a block, in the order of the tables; they have a meaning only where there are blocks.
OF_BLOCKS = ("pairwise", "pool_size", "window")
COLUMNS = ("network", "non_local", *OF_BLOCKS, "learning_rate", "weight_decay")
# What a search writes into its folder.
STATE, BEST_MODEL, MARKDOWN, CSV = "search.json", "best.keras", "trials.md", "trials.csv"
# A trial during which the process ended so often is given up: what ended it may be the trial.
MAX_STARTS = 3
MAX_DRAWS = 10_000
IMPOSSIBLE = "impossible"  # begins the reason why a network cannot be built at all


# The space


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
        self._summaries, self._block_costs = {}, {}

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
        fitting = self._first_fit
        _choice(hp, "network", self.networks, fitting)
        _choice(hp, "non_local", list(self.non_local), fitting)
        with_blocks = [name for name in self.non_local if name != "0"]
        if with_blocks:
            with hp.conditional_scope("non_local", with_blocks):
                for name in OF_BLOCKS:
                    _choice(hp, name, list(getattr(self, name)), fitting)
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
        summary = self._summary(network)
        parameters, macs = summary.parameters, summary.macs
        shapes = {row.name: row.output_shape for row in summary.rows}
        for stage, blocks in placement.items():
            for block in blocks:
                # A block leaves the map's sizes as they are.
                costs = self._costs_of_block(shapes[f"res{stage}_{block}_out"], arguments[stage])
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
            return f"{costs.parameters:,} parameters, the budget is {self.max_parameters:,}"
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

    def _summary(self, network):
        """Of the network without blocks."""
        if network not in self._summaries:
            self._summaries[network] = _without_weights(
                lambda: summarize(
                    NETWORKS[network](
                        classes=self.classes, input_shape=self.clip_shape, non_local=0, **self.network_options
                    )
                )
            )
        return self._summaries[network]

    def _costs_of_block(self, shape, arguments):
        key = repr((shape, arguments))
        if key not in self._block_costs:
            self._block_costs[key] = _without_weights(_costs_of_layer, shape, arguments)
        return self._block_costs[key]

    @functools.cached_property
    def _first_fit(self):
        """The values of the first architecture that fits."""
        reasons, least = {}, {}
        for values in self._architectures():
            reason = self.rejection(values)
            if reason is None:
                return values
            reasons[reason] = None
            with contextlib.suppress(ValueError):
                costs = self.costs(values)
                least = {
                    "parameters": min(costs.parameters, least.get("parameters", math.inf)),
                    "macs": min(costs.macs, least.get("macs", math.inf)),
                }
        if least:
            smallest = f"the smallest ones have {least['parameters']:,} parameters, {least['macs'] / 1e9:.4g} GMACs"
        else:
            smallest = next(iter(reasons))
        raise ValueError(
            f"No candidate of the space fits; {smallest}. "
            f"Received: max_parameters={self.max_parameters!r}, max_gmacs={self.max_gmacs!r}"
        )

    def _architectures(self):
        for network, non_local in itertools.product(self.networks, self.non_local):
            values = {"network": network, "non_local": non_local}
            if non_local == "0":
                yield values
            else:
                for choice in itertools.product(*(getattr(self, name) for name in OF_BLOCKS)):
                    yield values | dict(zip(OF_BLOCKS, choice, strict=True))


def _without_weights(function, *args):
    """Calls what builds models, whose variables get a shape and no memory.

    In a thread of its own: the scope and Keras' list of variables that wait for their values are of one thread, and
    end with it. In this thread the next scope would fill them all.
    """

    def call():
        with keras.StatelessScope(initialize_variables=False):
            return function(*args)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result()


def _costs_of_layer(shape, arguments):
    inputs = keras.Input(shape)
    summary = summarize(keras.Model(inputs, NonLocal3D(**arguments)(inputs)))
    return Costs(summary.parameters, summary.macs)


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


def _choice(hp, name, values, fitting):
    if len(values) == 1:
        hp.Fixed(name, values[0])
    else:
        hp.Choice(name, values, default=fitting.get(name))


def _millions(number):
    return f"{number / 1e6:.4g} M"


# The search


class _Oracle:
    """What all of Keras Tuner's oracles get: candidates that fit, and a state that is one file, written as a whole.

    Keras Tuner's own state is several files, which a kill can leave in two minds or cut off.
    """

    def __init__(self, candidates, path, settings, **kwargs):
        space = keras_tuner.HyperParameters()
        candidates.declare_hyperparameters(space)
        super().__init__(hyperparameters=space, max_consecutive_failed_trials=None, **kwargs)
        self.verbose = 0
        self.candidates, self.path, self.settings = candidates, path, settings
        self.rejected = {}  # name of an architecture → reason
        self.starts = {}  # of a trial → how often it was begun
        self.saved_best = None  # the trial of best.keras

    def populate_space(self, trial_id):
        """The values of a trial: those of the method, or, where they are rejected, random ones that are not."""
        response = super().populate_space(trial_id)
        values = response.get("values")
        if not values or not self._is_rejected(values):
            return response
        of_method = {name: value for name, value in values.items() if name.startswith("tuner/")}
        values = self._draw(int(trial_id))
        return {"status": "STOPPED"} if values is None else {"status": "RUNNING", "values": values | of_method}

    def _draw(self, trial):
        tried = [
            {name: value for name, value in trial.hyperparameters.values.items() if not name.startswith("tuner/")}
            for trial in self.trials.values()
        ]
        for draw in range(MAX_DRAWS):
            hp = keras_tuner.HyperParameters()
            seeds = np.random.SeedSequence([self.seed, trial, draw]).generate_state(len(self.hyperparameters.space))
            for parameter, seed in zip(self.hyperparameters.space, seeds, strict=True):
                hp.merge([parameter])
                if hp.is_active(parameter):
                    hp.values[parameter.name] = parameter.random_sample(int(seed))
            if not self._is_rejected(hp.values) and hp.values not in tried:
                return dict(hp.values)
        return None  # all that fits was tried

    def _is_rejected(self, values):
        reason = self.candidates.rejection(values)
        if reason is not None:
            self.rejected[" ".join(str(values[name]) for name in COLUMNS[:5] if name in values)] = reason
        return reason is not None

    def save(self):
        state = {
            "settings": self.settings,
            "oracle": self.get_state(),
            "trials": [trial.get_state() for trial in self.trials.values()],
            "rejected": self.rejected,
            "starts": self.starts,
            "saved_best": self.saved_best,
        }
        _write(self.path, json.dumps(state))

    def reload(self):
        state = json.loads(self.path.read_text(encoding="utf-8"))
        trials = map(keras_tuner.engine.trial.Trial.from_state, state["trials"])
        self.trials = {trial.trial_id: trial for trial in trials}
        oracle = state["oracle"]
        # Those that were running begin anew. One that had just ended is still named, and has its result.
        ongoing = [trial for trial in oracle["ongoing_trials"].values() if self.trials[trial].status == "RUNNING"]
        oracle["retry_queue"] += [trial for trial in ongoing if trial not in oracle["retry_queue"]]
        oracle["ongoing_trials"] = {}
        self.set_state(oracle)
        self.rejected, self.starts, self.saved_best = state["rejected"], state["starts"], state["saved_best"]


# One row a method: Keras Tuner's oracle, and its arguments.
METHODS = {
    "random": (keras_tuner.oracles.RandomSearchOracle, lambda max_trials, epochs: {"max_trials": max_trials}),
    "bayesian": (
        keras_tuner.oracles.BayesianOptimizationOracle,
        # Its own number of random trials, 3 for each hyperparameter, is more than most searches have.
        lambda max_trials, epochs: {"max_trials": max_trials, "num_initial_points": max(2, max_trials // 3)},
    ),
    "hyperband": (keras_tuner.oracles.HyperbandOracle, lambda max_trials, epochs: {"max_epochs": epochs}),
}


@dataclasses.dataclass(frozen=True)
class TrialRow:
    """One row of the table of trials.

    Args:
        trial: Its name.
        hyperparameters: Dictionary of the values of the space.
        parameters: Parameters of the network.
        macs: Its multiply-adds for one clip.
        score: Of its best epoch; `None` of a failed trial.
        best_epoch: That epoch, counted from 1.
        epochs: Epochs trained, with those of the trial that it goes on from (`"hyperband"`).
        status: `"completed"` or `"failed: …"`.
    """

    trial: str
    hyperparameters: dict
    parameters: int
    macs: int
    score: float | None
    best_epoch: int | None
    epochs: int | None
    status: str


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """What `tune` found.

    Args:
        objective: Name of the score.
        rows: A `TrialRow` for each trial, in order.
        best: The row of the best trial: of the best score, and of several such the one of the fewest multiply-adds.
        model_path: Path of the best trial's model, with the weights of its best epoch.
        rejected: Dictionary of the architectures that were drawn and rejected, to the reasons.
    """

    objective: str
    rows: tuple
    best: TrialRow
    model_path: str
    rejected: dict

    @property
    def hyperparameters(self):
        """Those of the best trial, a dictionary."""
        return self.best.hyperparameters

    def table(self):
        """The trials as a table in Markdown."""
        return _table(self.objective, self.rows, self.rejected)


def tune(
    hypermodel,
    training,
    validation,
    directory,
    max_trials=10,
    epochs=10,
    method="random",
    objective=None,
    seed=0,
    callbacks=None,
    verbose=1,
):
    """Searches a space of networks, and goes on where it was if it is called again.

    After every trial `directory` holds `trials.md` and `trials.csv`, the tables of trials so far, and `best.keras`, the
    best trial's network with the weights of its best epoch. Files appear under these names only when they are whole. A
    search that was killed begins the running trial anew, with the same hyperparameters and random numbers; with a
    larger `max_trials` a finished one goes on.

    Rejected candidates (see `NonLocalHyperModel`) use up no trial. A trial that runs out of memory or whose loss is no
    number is a failed row of the table, and so is one during which the process was killed three times; any other error
    ends the search.

    Args:
        hypermodel: A `NonLocalHyperModel`.
        training: What `keras.Model.fit` takes as one argument, such as a `tf.data.Dataset` of clips and labels; it need
            not know its length.
        validation: Likewise, for the score.
        directory: String or path-like, a folder that is new, empty or holds this search.
        max_trials: Number of trials; for `"hyperband"` the most of them, `None` for its whole schedule.
        epochs: Epochs of each trial; for `"hyperband"` the most of them.
        method: `"random"`, `"bayesian"` (random at first, then where a Gaussian process expects the most) or
            `"hyperband"` (many trials of few epochs, of which the best go on). The latter keeps the weights of all
            trials in `directory`.
        objective: By what trials are judged: a name such as `"val_loss"` or a `keras_tuner.Objective`. `None`: the
            hypermodel's.
        seed: Integer of at least 0, of the hyperparameters and of each trial's weights.
        callbacks: Function from the trial's folder, a string, to a list of Keras callbacks for it, such as
            `lambda folder: [keras.callbacks.EarlyStopping(patience=3)]`. `None`: none.
        verbose: 0 for nothing, 1 for a line a trial, 2 for Keras' progress of each, too.

    Returns:
        A `TuningResult`.

    Raises:
        ValueError: if an argument is none of the above, nothing of the space fits the budget, `directory` holds another
            search or other files, or no trial was completed.

    Example:

    >>> clips, labels = np.zeros((4, 4, 32, 32, 3), "float32"), np.array([0, 1, 0, 1])
    >>> import tensorflow as tf
    >>> dataset = tf.data.Dataset.from_tensor_slices((clips, labels)).batch(4)
    >>> space = NonLocalHyperModel(2, (4, 32, 32, 3), networks=["c2d_resnet11"], max_gmacs=0.01)
    >>> result = tune(space, dataset, dataset, "search", max_trials=1, epochs=1, verbose=0)
    >>> result.best.score
    0.5
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Received: method={method!r}")
    if not is_integer(max_trials, 1) and not (method == "hyperband" and max_trials is None):
        raise ValueError(f"`max_trials` must be an integer of at least 1. Received: max_trials={max_trials!r}")
    if not is_integer(epochs, 1):
        raise ValueError(f"`epochs` must be an integer of at least 1. Received: epochs={epochs!r}")
    if not is_integer(seed, 0):
        raise ValueError(f"`seed` must be an integer of at least 0. Received: seed={seed!r}")
    directory = pathlib.Path(directory)
    objective = hypermodel.objective if objective is None else objective
    settings = {
        "method": method,
        "epochs": epochs,
        "objective": getattr(objective, "name", objective),
        "seed": seed,
        **hypermodel.get_config(),
    }
    goes_on = _check_directory(directory, settings)

    oracle_class, arguments_of = METHODS[method]
    oracle = type(oracle_class.__name__, (_Oracle, oracle_class), {})(
        hypermodel,
        directory / STATE,
        settings,
        objective=objective,
        seed=seed + 1,  # Keras Tuner takes 0 for none
        **arguments_of(max_trials, epochs),
    )
    oracle.max_trials = max_trials
    directory.mkdir(parents=True, exist_ok=True)
    tuner = _Tuner(oracle, hypermodel, directory, epochs, method == "hyperband", callbacks, verbose)
    if goes_on:
        tuner.reload()
        tuner.keep_best()
    try:
        tuner.search(training, validation)
    except keras_tuner.errors.FatalError as error:
        raise (error.__cause__ or error) from None
    rows = tuner.rows()
    best = _best(rows, oracle.objective)
    if best is None:
        raise ValueError(
            f"No trial was completed; the last one {rows[-1].status}. Received: directory={str(directory)!r}"
        )
    return TuningResult(oracle.objective.name, rows, best, str(directory / BEST_MODEL), dict(oracle.rejected))


def _check_directory(directory, settings):
    """Whether it holds this search."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`directory` must be a folder. Received: directory={str(directory)!r}")
    path = directory / STATE
    if not path.exists():
        # A kill before the first state leaves nothing else.
        others = [file.name for file in directory.glob("[!.]*") if file.name != f"{BEST_MODEL}.json"]
        if others:
            raise ValueError(
                f"`directory` must be new, empty or hold a search; it holds {', '.join(sorted(others)[:3])}. "
                f"Received: directory={str(directory)!r}"
            )
        return False
    before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    now = json.loads(json.dumps(settings))
    differences = [
        f"{name} {before.get(name)!r}, not {value!r}" for name, value in now.items() if before[name] != value
    ]
    if differences:
        raise ValueError(
            f"`directory` must hold the same search. It is one of another {'; '.join(differences)}. "
            f"Received: directory={str(directory)!r}"
        )
    return True


class _Tuner(keras_tuner.Tuner):
    """Trains the candidates that the oracle draws, one after the other."""

    def __init__(self, oracle, candidates, directory, epochs, keeps_weights, callbacks, verbose):
        # With a `hypermodel` Keras Tuner would build candidates to learn of the space, which the oracle knows.
        super().__init__(oracle, directory=str(directory), project_name="trials")
        self.candidates, self.folder, self.epochs = candidates, directory, epochs
        self.keeps_weights, self.make_callbacks, self.is_verbose = keeps_weights, callbacks, verbose

    def save(self):
        self.oracle.save()

    def reload(self):
        self.oracle.reload()

    def on_trial_begin(self, trial):
        self._count_start(trial, 1)

    def _count_start(self, trial, number):
        self.oracle.starts[trial.trial_id] = self.oracle.starts.get(trial.trial_id, 0) + number
        self.save()

    def run_trial(self, trial, training, validation):
        values = trial.hyperparameters.values
        if self.oracle.starts[trial.trial_id] > MAX_STARTS:
            raise keras_tuner.errors.FailedTrialError(f"the process ended {MAX_STARTS} times during this trial")
        best_epoch = _BestEpoch(self.oracle.objective, self._weights_path(trial.trial_id))
        try:
            keras.utils.set_random_seed((self.oracle.seed * 100_003 + int(trial.trial_id)) % 2**32)
            model = self.candidates.build(trial.hyperparameters)
            if "tuner/trial_id" in values:  # of Hyperband: goes on from there
                model.load_weights(self._weights_path(values["tuner/trial_id"]))
            callbacks = [] if self.make_callbacks is None else self.make_callbacks(self.get_trial_dir(trial.trial_id))
            with warnings.catch_warnings():
                # A dataset that leaves out broken videos does not know its length. Keras calls its end an interruption.
                warnings.filterwarnings("ignore", message=".*[Yy]our input ran out of data.*")
                self.candidates.fit(
                    trial.hyperparameters,
                    model,
                    training,
                    validation_data=validation,
                    epochs=values.get("tuner/epochs", self.epochs),
                    initial_epoch=values.get("tuner/initial_epoch", 0),
                    callbacks=[*callbacks, keras.callbacks.TerminateOnNaN(), best_epoch],
                    shuffle=False,  # datasets shuffle themselves
                    verbose="auto" if self.is_verbose > 1 else 0,
                )
        except keras_tuner.errors.FailedTrialError:
            raise
        except BaseException as error:
            if _is_out_of_memory(error):
                raise keras_tuner.errors.FailedTrialError("out of memory") from None
            self._count_start(trial, -1)  # ended, not killed
            if isinstance(error, Exception):
                raise keras_tuner.errors.FatalRuntimeError(str(error)) from error
            raise
        finally:
            model = None
            gc.collect()
        return best_epoch.results()

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        self.keep_best()
        if self.is_verbose:
            row = self.rows()[-1]
            score = "" if row.score is None else f", {self.oracle.objective.name} {row.score:.4f}"
            values = ", ".join(f"{name} {_shown(value)}" for name, value in row.hyperparameters.items())
            print(f"trial {row.trial}: {row.status}{score} ({values})", flush=True)

    def keep_best(self):
        """Brings tables and the best model up to date. Whenever this is cut off, the next call mends it."""
        rows = self.rows()
        objective = self.oracle.objective
        best = _best(rows, objective)
        if best is not None and best.trial != self.oracle.saved_best:
            model = self.candidates.build_network(best.hyperparameters)
            model.load_weights(self._weights_path(best.trial))
            with _whole_file(self.folder / BEST_MODEL) as scratch:
                model.save(scratch)
            self.oracle.saved_best = best.trial
            self.save()
        if not self.keeps_weights:
            for row in rows:
                pathlib.Path(self._weights_path(row.trial)).unlink(missing_ok=True)
        if rows:
            _write(self.folder / MARKDOWN, _table(objective.name, rows, self.oracle.rejected) + "\n")
            _write(self.folder / CSV, _csv(objective.name, rows))

    def rows(self):
        """A `TrialRow` for each trial that ended."""
        return tuple(map(self._row, filter(lambda trial: trial.status != "RUNNING", self.oracle.trials.values())))

    def _row(self, trial):
        values = {name: trial.hyperparameters.values.get(name) for name in COLUMNS}
        costs = self.candidates.costs(values)
        is_completed = trial.status == "COMPLETED"
        best_epoch, epochs = (
            int(trial.metrics.get_best_value(name)) if is_completed else None for name in ("best_epoch", "epochs")
        )
        # Of a traceback the last line, without the error's class.
        reason = "" if is_completed else trial.message.strip().splitlines()[-1].partition(": ")[2]
        return TrialRow(
            trial=trial.trial_id,
            hyperparameters={name: value for name, value in values.items() if value is not None},
            parameters=costs.parameters,
            macs=costs.macs,
            score=float(trial.score) if is_completed else None,
            best_epoch=best_epoch,
            epochs=epochs,
            status="completed" if is_completed else f"failed: {reason}",
        )

    def _weights_path(self, trial_id):
        return os.path.join(self.get_trial_dir(trial_id), "best.weights.h5")


class _BestEpoch(keras.callbacks.Callback):
    """Keeps the weights of the best epoch and its score; a loss that is no number fails the trial."""

    def __init__(self, objective, path):
        super().__init__()
        self.objective, self.path = objective, path
        self.best, self.best_epoch, self.epochs = None, None, 0

    def on_epoch_end(self, epoch, logs=None):
        self.epochs = epoch + 1
        not_finite = [name for name, value in logs.items() if not math.isfinite(value)]
        if not_finite:
            raise keras_tuner.errors.FailedTrialError(f"{not_finite[0]} was {logs[not_finite[0]]} in epoch {epoch + 1}")
        if self.objective.name not in logs:
            raise ValueError(
                f"`objective` must be one of {', '.join(logs)}. Received: objective={self.objective.name!r}"
            )
        value = float(logs[self.objective.name])
        if self.best is None or self.objective.better_than(value, self.best):
            self.best, self.best_epoch = value, epoch + 1
            with _whole_file(self.path) as scratch:
                self.model.save_weights(scratch)

    def results(self):
        return {self.objective.name: self.best, "best_epoch": self.best_epoch, "epochs": self.epochs}


def _is_out_of_memory(error):
    text = str(error).lower()
    if "no space left on device" in text:  # of a disk, which TensorFlow gives the same class
        return False
    names = ("MemoryError", "OutOfMemoryError", "ResourceExhaustedError")
    return type(error).__name__ in names or any(words in text for words in ("out of memory", "resource_exhausted"))


def _best(rows, objective):
    completed = [row for row in rows if row.score is not None]
    sign = -1 if objective.direction == "max" else 1
    return min(completed, key=lambda row: (sign * row.score, row.macs), default=None)


# Tables and files


def _table(objective, rows, rejected):
    titles = ("trial", *COLUMNS, "parameters", "GMACs", "epochs", "best epoch", objective, "status")
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        values = [_shown(row.hyperparameters.get(name)) for name in COLUMNS]
        costs = _millions(row.parameters), f"{row.macs / 1e9:.4g}"
        score = "" if row.score is None else f"{row.score:.4f}"
        lines.append([row.trial, *values, *costs, _shown(row.epochs), _shown(row.best_epoch), score, row.status])
    table = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
    if rejected:
        impossible = sum(reason.startswith(IMPOSSIBLE) for reason in rejected.values())
        table += (
            f"\n\n{len(rejected)} architectures were rejected before they were built: "
            f"{len(rejected) - impossible} over the budget, {impossible} impossible."
        )
    return table


def _csv(objective, rows):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("trial", *COLUMNS, "parameters", "macs", "epochs", "best_epoch", objective, "status"))
    for row in rows:
        values = [row.hyperparameters.get(name) for name in COLUMNS]
        writer.writerow(
            (row.trial, *values, row.parameters, row.macs, row.epochs, row.best_epoch, row.score, row.status)
        )
    return file.getvalue()


def _shown(value):
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write(path, text):
    with _whole_file(path) as scratch:
        pathlib.Path(scratch).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _whole_file(path):
    """A name beside `path` that becomes it once what the block wrote is whole."""
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, f".{uuid.uuid4().hex}.{name}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        pathlib.Path(scratch).unlink(missing_ok=True)
