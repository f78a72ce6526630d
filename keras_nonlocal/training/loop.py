"""Training that goes on where it was stopped: the same steps on the same clips, however often it is killed."""

import base64
import contextlib
import csv
import dataclasses
import itertools
import math
import os
import pathlib
import signal
import threading
import warnings

import keras
import numpy as np

from keras_nonlocal.files import whole_file

from .batch_norm import random_numbers_kept
from .checkpoints import Checkpoints, TrainingError


def train(
    model,
    dataset,
    directory,
    steps=None,
    epochs=None,
    steps_per_epoch=None,
    validation_data=None,
    validation_freq=1,
    callbacks=(),
    checkpoint_steps=1000,
    num_checkpoints=3,
    step=None,
    verbose=1,
):
    """Trains a compiled model as `model.fit` does, and loses nothing when it is stopped.

    All that the training is made of is written to `directory/checkpoints` at the start, every `checkpoint_steps` steps
    and after every epoch: the model's variables, those of its random generators too, the optimizer's, the step, the
    place in the dataset and the figures so far. The same call with the same directory goes on from there, whatever
    ended the process before: the same clips follow, and the result is that of a training that nothing had stopped,
    as exactly as the backend repeats its sums.

    After Ctrl-C or SIGTERM the step, or the batch of a validation, is finished and a checkpoint written, then
    `KeyboardInterrupt` or `SystemExit(143)` is raised. The second signal acts as ever.

    Callbacks are called as in `fit`, but their own state is not kept: they begin anew. `directory/log.csv` has a row
    for every epoch. Its figures are means of those of the batches: metrics must be numbers, and one that is no mean,
    such as an area under a curve, is not that of the epoch.

    Args:
        model: A compiled Keras model.
        dataset: A function from the place `(pass, position)` where the training goes on to an iterable of batches: of
            which each iteration is the next pass, the first one from `position` on. A batch is `(x, y, names, places)`,
            names and places of the single clips, as `video_dataset_from_directory(..., with_paths=True, start=place)`
            gives them; or `(x, y)`, of which batches are counted. It may also be a plain iterable of batches
            `(x, y)`, which is the same in every pass: of that, batches that were seen are read again and skipped.
        directory: String or path-like, of this training alone.
        steps: Integer, the number of steps of the whole training, or `None`.
        epochs: Integer, the number of epochs of the whole training, or `None`. The first that is reached ends it.
        steps_per_epoch: Integer, or `None`: an epoch is a pass through the dataset.
        validation_data: A dataset of batches, or a tuple of arrays `(x, y)`, or `None`.
        validation_freq: Integer, how many epochs come to one validation.
        callbacks: List of `keras.callbacks.Callback`.
        checkpoint_steps: Integer, how many steps come to one checkpoint.
        num_checkpoints: Integer, how many checkpoints are kept.
        step: What makes a step. `None`: `LocalStep(model)`, one process. Any object with its methods and attributes.
        verbose: 0 is silent, 1 shows a progress bar, 2 one line per epoch.

    Returns:
        A `keras.callbacks.History` of all epochs, those before the last start too.

    Raises:
        TrainingError: If a loss is not finite: the message names the step, the learning rate and the clips of the
            batch. Checkpoints of before stay. Also if weights are not finite when they are to be kept, or if the
            dataset has no batch.
        ValueError: If an argument is out of range, or the checkpoints are another model's.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> from keras_nonlocal.training import train
    >>> keras.utils.set_random_seed(0)
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> batches = [(np.eye(2, dtype="float32"), np.ones((2, 1), "float32"))] * 3
    >>> directory = tempfile.mkdtemp()
    >>> history = train(model, batches, directory, epochs=2, verbose=0)
    >>> history = train(model, batches, directory, epochs=4, verbose=0)  # two more
    >>> history.epoch, int(model.optimizer.iterations)
    ([0, 1, 2, 3], 12)
    """
    counts = {"steps": steps, "epochs": epochs, "steps_per_epoch": steps_per_epoch}
    counts |= {"validation_freq": validation_freq, "checkpoint_steps": checkpoint_steps}
    for name, value in {**counts, "num_checkpoints": num_checkpoints}.items():
        is_count = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0
        if not is_count and not (value is None and name in ("steps", "epochs", "steps_per_epoch")):
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    if steps is None and epochs is None:
        raise ValueError("`steps` or `epochs` must say when the training ends. Received: steps=None, epochs=None")
    for callback in callbacks:
        if getattr(callback, "swap_on_epoch", False):
            raise ValueError(
                "`callbacks` must leave the weights as they are between epochs: `SwapEMAWeights()` swaps them for "
                f"evaluations only. Received: callbacks with {type(callback).__name__}(swap_on_epoch=True)"
            )
    with _stop_signals() as received:
        loop = _Loop(
            model=model,
            step=LocalStep(model) if step is None else step,
            dataset=dataset,
            directory=pathlib.Path(directory),
            validation_data=validation_data,
            callbacks=list(callbacks),
            num_checkpoints=num_checkpoints,
            verbose=verbose,
            received=received,
            **counts,
        )
        return loop.run()


class LocalStep:
    """The steps of a training in this process.

    Args:
        model: A compiled Keras model.

    Attributes:
        is_chief: Whether this process writes checkpoints and the log.
        is_alone: Whether no other process makes these steps too.
    """

    is_chief = True
    is_alone = True

    def __init__(self, model):
        if not getattr(model, "compiled", False) or not model.built:
            raise ValueError(f"`model` must be compiled and built. Received: model={model!r}")
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._model = model

    @property
    def variables(self):
        """All that a step changes: weights, statistics, random generators and the optimizer's state."""
        return [*self._model.variables, *self._model.optimizer.variables]

    @property
    def learning_rate(self):
        """That of the coming step."""
        return float(keras.ops.convert_to_numpy(self._model.optimizer.learning_rate))

    def run(self, x, y):
        """Makes one step. Returns a dict of floats, the loss and the metrics of this batch."""
        # tf.data gives TensorFlow's tensors on every backend.
        x, y = keras.tree.map_structure(lambda part: part if keras.ops.is_tensor(part) else np.asarray(part), (x, y))
        self._model.reset_metrics()  # which older Keras leaves to the caller
        return self._model.train_on_batch(x, y, return_dict=True)

    def evaluate(self, validation_data, callbacks):
        """Evaluates the model. Returns a dict of floats, the loss and the metrics."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
        with warnings.catch_warnings(), random_numbers_kept():
            # The length of a dataset that leaves out broken videos is not known before its end, which Keras calls an
            # interruption.
            warnings.filterwarnings("ignore", message=".*[Yy]our input ran out of data.*")
            return self._model.evaluate(
                x, y, sample_weight=sample_weight, callbacks=callbacks, verbose=0, return_dict=True
            )

    def gather(self, values):
        """A list of integers of each process that makes these steps, in which all must call it at the same place."""
        return [values]

    def finish(self):
        """Ends the training: an optimizer that averages the weights puts the averages in their place."""
        self._model.optimizer.finalize_variable_values(self._model.trainable_variables)


@dataclasses.dataclass
class _State:
    """What a checkpoint holds beside variables."""

    step: int = 0  # steps that are made
    epoch: int = 0
    epoch_step: int = 0  # those of this epoch
    epoch_clips: int = 0
    learning_rate: float = 0.0  # of the last step
    epoch_sums: dict = dataclasses.field(default_factory=dict)  # of the batches' logs times their clips
    place: tuple = (0, 0)  # pass and position of what comes next
    history: list = dataclasses.field(default_factory=list)  # the logs of whole epochs
    generators: list = dataclasses.field(default_factory=list)  # PyTorch's


@dataclasses.dataclass
class _Batch:
    x: object
    y: object
    names: list
    place: tuple  # behind it


class _Loop:
    def __init__(self, model, step, directory, callbacks, num_checkpoints, verbose, **options):
        self._model, self._step, self._directory, self._verbose = model, step, directory, verbose
        self._dataset, self._validation_data = options["dataset"], options["validation_data"]
        self._steps, self._epochs = options["steps"] or math.inf, options["epochs"] or math.inf
        self._steps_per_epoch = options["steps_per_epoch"]
        self._validation_freq, self._checkpoint_steps = options["validation_freq"], options["checkpoint_steps"]
        self._received = options["received"]
        self._checkpoints = Checkpoints(directory / "checkpoints", num_checkpoints)
        self._history = keras.callbacks.History()
        self._callbacks = keras.callbacks.CallbackList(
            # Several processes end a validation together.
            [*callbacks, self._history, *([_StopEvaluation(self._received)] if step.is_alone else [])],
            add_progbar=verbose != 0,
            model=model,
        )

    def run(self):
        with self._checkpoints.locked() if self._step.is_chief else contextlib.nullcontext():
            return self._run()

    def _run(self):
        self._start()
        source = self._dataset(self._state.place) if callable(self._dataset) else self._dataset
        batches = _batches(source, self._state.place, is_resumed=callable(self._dataset))
        num_steps = self._steps_per_epoch or _length(source)
        # The epochs' own line says the steps too, so that the progress bar writes none: it knows epochs only.
        self._callbacks.set_params({"verbose": self._verbose, "epochs": 1, "steps": num_steps})
        self._model.stop_training = False
        self._callbacks.on_train_begin()
        for row in self._state.history:
            self._history.on_epoch_end(row["epoch"], {name: row[name] for name in row if name not in _COLUMNS})
        logs = {}
        while not self._is_done() and not self._model.stop_training:
            logs = self._epoch(batches)
        self._step.finish()
        self._callbacks.on_train_end(logs)
        return self._history

    def _start(self):
        self._state = _State()
        path = self._checkpoints.newest()
        step, epoch = (-1, -1) if path is None else self._checkpoints.rank(path)
        # Before one of them writes the next, and all together take over what it holds.
        found = [tuple(map(int, row)) for row in self._step.gather([step, epoch])]
        if len(set(found)) > 1:
            raise TrainingError(
                "All workers must see the same checkpoints, in a directory that they share. "
                f"Received: (step, epoch) of the newest of the workers: {', '.join(map(str, found))}"
            )
        if path is None:
            self._save()
            return
        state = self._checkpoints.read(path, self._step.variables)
        self._state = _State(**{**state, "place": tuple(state["place"])})
        _set_generators(self._state.generators)
        if self._step.is_chief:
            _write_log(self._directory / "log.csv", self._state.history)
        if self._verbose:
            way = "Is finished with" if self._is_done() else "Goes on after"
            print(f"{way} step {self._state.step}, as in {path}", flush=True)

    def _is_done(self):
        """An epoch that has begun is still to be ended."""
        state = self._state
        return state.epoch >= self._epochs or (state.step >= self._steps and not state.epoch_step)

    def _epoch(self, batches):
        state = self._state
        if self._verbose:
            of_steps = "" if math.isinf(self._steps) else f" of {self._steps}"
            of_epochs = "" if math.isinf(self._epochs) else f"/{self._epochs}"
            print(f"Epoch {state.epoch + 1}{of_epochs}, from step {state.step + 1}{of_steps} on", flush=True)
        self._callbacks.on_epoch_begin(state.epoch)
        next_pass = None
        while state.step < self._steps and state.epoch_step < (self._steps_per_epoch or math.inf):
            batch = next(batches)
            if isinstance(batch, _Batch):
                self._train_on(batch)
                if self._model.stop_training:
                    break
            elif self._steps_per_epoch is None and state.epoch_step:
                next_pass = batch
                break
            else:
                state.place = batch
        logs = self._logs()
        if self._validation_data is not None and (state.epoch + 1) % self._validation_freq == 0:
            self._save()  # a validation may take long
            results = self._step.evaluate(self._validation_data, self._callbacks)
            logs |= {f"val_{name}": float(value) for name, value in results.items()}
        self._callbacks.on_epoch_end(state.epoch, logs)
        signal_number = self._agree()
        row = {name: float(value) for name, value in logs.items()}
        state.history.append({"epoch": state.epoch, "step": state.step, **row})
        state.epoch += 1
        state.epoch_step, state.epoch_clips, state.epoch_sums = 0, 0, {}
        state.place = next_pass or state.place
        self._save()
        if self._step.is_chief:
            _write_log(self._directory / "log.csv", state.history)
        _stop_if_asked(signal_number)
        return logs

    def _train_on(self, batch):
        state = self._state
        state.learning_rate = self._step.learning_rate
        self._callbacks.on_train_batch_begin(state.epoch_step)
        logs = self._step.run(batch.x, batch.y)
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"The loss must be finite. At step {state.step + 1} with the learning rate "
                f"{state.learning_rate:.6g} it was not, of {', '.join(batch.names)}. Received: loss={logs['loss']}"
            )
        num_clips = len(keras.tree.flatten(batch.x)[0])
        for name, value in logs.items():
            state.epoch_sums[name] = state.epoch_sums.get(name, 0.0) + float(value) * num_clips
        state.epoch_clips += num_clips
        state.step += 1
        state.epoch_step += 1
        state.place = batch.place
        self._callbacks.on_train_batch_end(state.epoch_step - 1, self._logs())
        signal_number = self._agree()
        if state.step % self._checkpoint_steps == 0 or signal_number:
            self._save()
        _stop_if_asked(signal_number)

    def _agree(self):
        """What one process was asked all do, after the same step. Returns the number of a signal, or 0."""
        asked = self._step.gather([self._received[0] if self._received else 0, int(self._model.stop_training)])
        signal_number, self._model.stop_training = int(max(row[0] for row in asked)), any(row[1] for row in asked)
        return signal_number

    def _logs(self):
        """The means of this epoch so far."""
        state = self._state
        means = {name: total / state.epoch_clips for name, total in state.epoch_sums.items()}
        return means | {"learning_rate": state.learning_rate}

    def _save(self):
        if self._step.is_chief:
            self._state.generators = _generators()
            self._checkpoints.write(self._step.variables, dataclasses.asdict(self._state))


# PyTorch's own generators, from which Keras' dropout draws there: with the other backends the state is in variables


def _generators():
    if keras.backend.backend() != "torch":
        return []
    import torch

    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def _set_generators(texts):
    if keras.backend.backend() != "torch":
        return
    import torch

    states = [torch.from_numpy(np.frombuffer(base64.b64decode(text), "uint8").copy()) for text in texts]
    if states:  # not of a checkpoint of another backend
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state_all(states[1 : 1 + torch.cuda.device_count()])


# Data


def _batches(source, start, is_resumed):
    """The batches of pass after pass, and after each pass the place where the next begins."""
    number, position = start
    skipped = 0 if is_resumed else position
    is_empty = position == 0
    while True:
        for element in itertools.islice(iter(source), skipped, None):
            is_empty = False
            if not isinstance(element, (tuple, list)) or len(element) not in (2, 4):
                kind = len(element) if isinstance(element, (tuple, list)) else type(element).__name__
                raise ValueError(f"`dataset` must yield (x, y) or (x, y, names, places). Received: {kind}")
            x, y, *rest = element
            if rest and not is_resumed:  # what was seen is counted in batches
                raise ValueError(
                    "A `dataset` of (x, y, names, places) must be a function of the place to start from. "
                    f"Received: {type(source).__name__}"
                )
            if rest:
                names, places = (np.asarray(values) for values in rest)
                number, position = map(int, places[-1])
                names = [os.fsdecode(name) for name in names.tolist()]
            else:
                names = [f"batch {position} of pass {number} (counted from 0)"]
            position += 1
            yield _Batch(x, y, names, (number, position))
        if is_empty:
            raise TrainingError(f"`dataset` must have a batch in every pass. Received: none in pass {number}")
        number, position, skipped, is_empty = number + 1, 0, 0, True
        yield number, position


def _length(source):
    """The number of batches of a pass, or `None`."""
    try:
        return len(source)
    except TypeError:  # not known
        return None


# Figures

_COLUMNS = ("epoch", "step")


def _write_log(path, history):
    """All rows anew, so that none comes twice however often the training is killed."""
    columns = dict.fromkeys([*_COLUMNS, *(name for row in history for name in row)])
    with whole_file(path) as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


# Signals


@contextlib.contextmanager
def _stop_signals():
    """Gives a list that gets the first Ctrl-C or SIGTERM; from then on both act as ever."""
    received, before = [], {}

    def put_back():
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def note(number, frame):
        received.append(number)
        put_back()

    if threading.current_thread() is threading.main_thread():  # no other may
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        put_back()


def _stop_if_asked(number):
    if number:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + signal.SIGTERM)


class _StopEvaluation(keras.callbacks.Callback):
    """A validation may take long, and what was trained before it is safe."""

    def __init__(self, received):
        super().__init__()
        self._received = received

    def on_test_batch_end(self, batch, logs=None):
        _stop_if_asked(self._received and self._received[0])
