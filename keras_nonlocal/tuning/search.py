"""A search of Keras Tuner that survives being killed, with a table of its trials and the best model."""

import csv
import dataclasses
import gc
import io
import json
import math
import os
import pathlib
import warnings

import keras
import keras_tuner
import numpy as np

from keras_nonlocal.applications.resnet import is_integer
from keras_nonlocal.files import whole_file, write_text
from keras_nonlocal.tuning.space import ARCHITECTURE, IMPOSSIBLE, meaningful

COLUMNS = (*ARCHITECTURE, "learning_rate", "weight_decay")
# What a search writes into its folder.
STATE, BEST_MODEL, MARKDOWN, CSV = "search.json", "best.keras", "trials.md", "trials.csv"
# A trial during which the process was killed so often is given up: it may be what gets it killed.
MAX_STARTS = 3


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
        self.starts = {}  # of a trial → how often it was begun
        self.saved_best = None  # the trial of best.keras

    def populate_space(self, trial_id):
        """The values of a trial: those of the method, or random ones if they do not fit or were tried."""
        response = super().populate_space(trial_id)
        values = response.get("values") or {}
        if "tuner/trial_id" in values:  # Hyperband goes on with an earlier trial
            return response
        if not values and isinstance(self, keras_tuner.oracles.HyperbandOracle):  # its schedule is over
            return response
        # The other methods have no values where they drew tried ones 20 times, though there may be others.
        tried = [meaningful(trial.hyperparameters.values) for trial in self.trials.values()]
        if values and self.candidates.rejection(values) is None and meaningful(values) not in tried:
            return response
        rng = np.random.default_rng([self.seed, int(trial_id)])
        rates = {
            parameter.name: parameter.random_sample(int(rng.integers(2**31)))
            for parameter in self.hyperparameters.space
            if parameter.name not in ARCHITECTURE
        }
        drawn = [fitting | rates for fitting in self.candidates.fitting]
        drawn = [values for values in drawn if meaningful(values) not in tried]
        if not drawn:
            return {"status": "STOPPED"}
        of_method = {name: value for name, value in values.items() if name.startswith("tuner/")}
        return {"status": "RUNNING", "values": drawn[rng.integers(len(drawn))] | of_method}

    def save(self):
        state = {
            "settings": self.settings,
            "oracle": self.get_state(),
            "trials": [trial.get_state() for trial in self.trials.values()],
            "starts": self.starts,
            "saved_best": self.saved_best,
        }
        write_text(self.path, json.dumps(state))

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
        self.starts, self.saved_best = state["starts"], state["saved_best"]


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
        rejected: Dictionary of the names of the space's architectures that may not be built, to the reasons.
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
    metadata=None,
    verbose=1,
):
    """Searches a space of networks, and goes on where it was if it is called again.

    After every trial `directory` holds `trials.md` and `trials.csv`, the tables of trials so far, and `best.keras`, the
    best trial's network with the weights of its best epoch. Files appear under these names only when they are whole. A
    search that was killed begins the running trial anew, with the same hyperparameters and initial weights, while clips
    that are drawn at random are others; with a larger `max_trials` a finished one goes on.

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
        metadata: Dictionary that is written as JSON beside the best model, such as how its clips are prepared. A search
            goes on only with the same one.
        verbose: 0 for nothing, 1 for a line a trial, 2 for Keras' progress of each, too.

    Returns:
        A `TuningResult`.

    Raises:
        ValueError: if an argument is none of the above, nothing of the space fits the budget, `directory` holds another
            search or other files, or no trial was completed.

    Example:

    >>> import tensorflow as tf
    >>> from keras_nonlocal.tuning import NonLocalHyperModel
    >>> clips, labels = np.zeros((4, 4, 32, 32, 3), "float32"), np.array([0, 1, 0, 1])
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
        "metadata": metadata,
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
    if not goes_on:
        directory.mkdir(parents=True, exist_ok=True)
        oracle.save()
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
    return TuningResult(oracle.objective.name, rows, best, str(directory / BEST_MODEL), hypermodel.rejected)


def _check_directory(directory, settings):
    """Whether it holds this search."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`directory` must be a folder. Received: directory={str(directory)!r}")
    path = directory / STATE
    if not path.exists():
        others = [file.name for file in directory.glob("[!.]*")]
        if others:
            raise ValueError(
                f"`directory` must be new, empty or hold a search; it holds {', '.join(sorted(others)[:3])}. "
                f"Received: directory={str(directory)!r}"
            )
        return False
    before = _flat(json.loads(path.read_text(encoding="utf-8"))["settings"])
    now = _flat(json.loads(json.dumps(settings)))
    differences = [
        f"{name} {before.get(name)!r}, not {now.get(name)!r}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"`directory` must hold the same search. It is one of another {'; '.join(differences)}. "
            f"Received: directory={str(directory)!r}"
        )
    return True


def _flat(settings):
    metadata = settings["metadata"] or {}
    return settings | {"metadata": None} | {f"metadata {name}": value for name, value in metadata.items()}


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
            row = self._row(self.oracle.get_trial(trial.trial_id))
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
            if self.oracle.settings["metadata"] is not None:
                text = json.dumps(self.oracle.settings["metadata"], indent=2) + "\n"
                write_text(self.folder / f"{BEST_MODEL}.json", text)
            with whole_file(self.folder / BEST_MODEL) as scratch:
                model.save(scratch)
            self.oracle.saved_best = best.trial
            self.save()
        if not self.keeps_weights:
            for row in rows:
                pathlib.Path(self._weights_path(row.trial)).unlink(missing_ok=True)
        if rows:
            write_text(self.folder / MARKDOWN, _table(objective.name, rows, self.candidates.rejected) + "\n")
            write_text(self.folder / CSV, _csv(objective.name, rows))

    def rows(self):
        """A `TrialRow` for each trial that ended."""
        return tuple(map(self._row, filter(lambda trial: trial.status != "RUNNING", self.oracle.trials.values())))

    def _row(self, trial):
        values = meaningful(trial.hyperparameters.values)
        costs = self.candidates.costs(values)
        is_completed = trial.status == "COMPLETED"
        best_epoch, epochs = (
            int(trial.metrics.get_best_value(name)) if is_completed else None for name in ("best_epoch", "epochs")
        )
        # Of a traceback the last line, without the error's class.
        reason = "" if is_completed else trial.message.strip().splitlines()[-1].partition(": ")[2]
        return TrialRow(
            trial=trial.trial_id,
            hyperparameters=values,
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
            with whole_file(self.path) as scratch:
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
        costs = f"{row.parameters / 1e6:.4g} M", f"{row.macs / 1e9:.4g}"
        score = "" if row.score is None else f"{row.score:.4f}"
        lines.append([row.trial, *values, *costs, _shown(row.epochs), _shown(row.best_epoch), score, row.status])
    table = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
    if rejected:
        impossible = sum(reason.startswith(IMPOSSIBLE) for reason in rejected.values())
        table += (
            f"\n\n{len(rejected)} architectures of the space were rejected before they were built: "
            f"{len(rejected) - impossible} are over the budget, {impossible} impossible."
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
