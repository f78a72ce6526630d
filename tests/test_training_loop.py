"""The training loop: as `fit` where nothing happens, and the same training whatever happens."""

import csv
import logging
import os
import signal

import keras
import numpy as np
import pytest

from keras_nonlocal.training import Checkpoints, LocalStep, TrainingError, train

NUM_CLIPS, BATCH = 12, 4
STEPS = 8  # of which 3 are a pass: the last epoch is cut off


def make_data(num_clips=NUM_CLIPS):
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_clips, 6)).astype("float32"), rng.integers(3, size=num_clips)


def batches(x, y):
    return [(x[start : start + BATCH], y[start : start + BATCH]) for start in range(0, len(x), BATCH)]


def make_model(seed=1, run_eagerly=True, dropout=0.3, **optimizer):
    """Has all that a state is made of: statistics, random generators, momenta, averages of the weights.

    Compiling it would take longer than its few steps.
    """
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Dense(8)(inputs))
    x = keras.layers.Dropout(dropout)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, **optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=run_eagerly)
    return model


class Videos:
    """Passes in orders of their own, of a dataset that can begin anywhere; remembers what it gave."""

    def __init__(self):
        self.given = []

    def __call__(self, start):
        self.place = start
        return self

    def __iter__(self):
        number, position = self.place
        self.place = (number + 1, 0)
        order = np.random.default_rng(number).permutation(NUM_CLIPS)
        x, y = make_data()
        for first in range(position, NUM_CLIPS, BATCH):
            chosen = order[first : first + BATCH]
            names = [f"{video}.mp4".encode() for video in chosen]
            self.given.append((number, names))
            yield x[chosen], y[chosen], names, [(number, first + place) for place in range(len(chosen))]


class Interrupt(keras.callbacks.Callback):
    """Raises an error in the middle of a step, as nothing else is left to do in a process that is killed."""

    def __init__(self, steps, event="on_train_batch_end"):
        super().__init__()
        self.left = steps
        setattr(self, event, self._event)

    def _event(self, *arguments, **logs):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("killed")


def weights(model):
    return [keras.ops.convert_to_numpy(part) for part in LocalStep(model).variables]


def read_log(directory):
    with open(directory / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def of_package(caplog):
    return [record for record in caplog.records if record.name == "keras_nonlocal"]


def assert_same(model, other):
    for one, two in zip(weights(model), weights(other), strict=True):
        np.testing.assert_array_equal(one, two)


class Events(keras.callbacks.Callback):
    """Which events came, with the number of the epoch or batch."""

    def __init__(self):
        super().__init__()
        self.seen = []


def _noted(event):
    def note(self, *arguments, **logs):
        self.seen.append((event, *[part for part in arguments if isinstance(part, int)]))

    return note


for _name in ("train", "test", "epoch", "train_batch", "test_batch"):
    for _place in ("begin", "end"):
        setattr(Events, f"on_{_name}_{_place}", _noted(f"on_{_name}_{_place}"))


def test_as_fit(tmp_path):
    """Weights, figures and the events of callbacks; the last batch is smaller."""
    x, y = make_data(NUM_CLIPS - 2)
    averaged = {"run_eagerly": False, "use_ema": True, "ema_momentum": 0.5}
    if keras.backend.backend() == "torch":  # there what `fit` validates draws random numbers, and dropout gets others
        averaged["dropout"] = 0.0
    events = [Events(), Events()]
    options = {"epochs": 3, "validation_data": (x, y), "verbose": 0}
    sizes = {"batch_size": BATCH, "validation_batch_size": 32}
    fitted = make_model(**averaged)
    expected = fitted.fit(x, y, shuffle=False, callbacks=[events[0]], **sizes, **options)
    trained = make_model(**averaged)  # now: PyTorch has one generator for all models
    history = train(trained, batches(x, y), tmp_path, callbacks=[events[1]], **options)
    for one, two in zip(weights(fitted), weights(trained), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert history.epoch == expected.epoch == [0, 1, 2]
    np.testing.assert_allclose(history.history.pop("learning_rate"), 0.1, rtol=1e-6)
    assert sorted(history.history) == sorted(expected.history)
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-5)
    assert events[1].seen == events[0].seen and len(events[1].seen) > 3 * 2 * 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Model, history, rows of the log, what the dataset gave."""
    directory, videos, model = tmp_path_factory.mktemp("whole"), Videos(), make_model(use_ema=True)
    x, y = make_data()
    history = train(model, videos, directory, steps=STEPS, validation_data=(x, y), verbose=0)
    return model, history, read_log(directory), videos.given


def test_killed_anywhere(tmp_path, uninterrupted, caplog):
    """Bit for bit the same, with other random weights at each new start."""
    model, history, log, given = uninterrupted
    x, y = make_data()
    # Before the first checkpoint of a step; after one; in a validation; behind it; at the end of a pass; in the last.
    deaths = [(1, "on_train_batch_end"), (3, "on_train_batch_end"), (1, "on_test_batch_end"), (1, "on_epoch_end")]
    deaths += [(2, "on_train_batch_end"), (2, "on_epoch_begin"), (1, "on_test_end")]
    for seed, (count, event) in enumerate([*deaths, (None, "on_train_end")]):
        videos, resumed = Videos(), make_model(seed=seed + 50 if seed else 1, use_ema=True)
        options = {"steps": STEPS, "validation_data": (x, y), "checkpoint_steps": 2, "verbose": 0}
        if count is None:
            again = train(resumed, videos, tmp_path, **options)
        else:
            with pytest.raises(RuntimeError, match="killed"):
                train(resumed, videos, tmp_path, callbacks=[Interrupt(count, event)], **options)
        if videos.given:  # some begin with a validation
            first = given.index(videos.given[0])
            assert given[first : first + len(videos.given)] == videos.given
    assert videos.given[-1:] in ([], given[-1:])
    assert_same(model, resumed)
    assert (again.epoch, again.history) == (history.epoch, history.history)
    assert read_log(tmp_path) == log
    assert [row["step"] for row in log] == ["3", "6", "8"]
    assert not of_package(caplog)


def test_a_finished_training_is_read(tmp_path, uninterrupted):
    """And it may be made longer; the averages stand in the model at the end, not in the checkpoints."""
    results = []
    for steps in (STEPS - 3, STEPS - 3, STEPS):
        model, videos = make_model(seed=7 if results else 1, use_ema=True), Videos()
        train(model, videos, tmp_path, steps=steps, verbose=0)
        results.append(model)
    assert_same(results[0], results[1])
    assert int(results[2].optimizer.iterations) == STEPS and len(videos.given) == 3
    # Where it stopped an epoch ended, but not the pass.
    assert [row["step"] for row in read_log(tmp_path)] == ["3", "5", "6", "8"]
    assert_same(results[2], uninterrupted[0])


def test_plain_iterables_and_epochs_of_steps(tmp_path):
    """Batches that were seen are skipped."""
    x, y = make_data()
    whole = make_model()
    options = {"epochs": 4, "steps_per_epoch": 2, "verbose": 0}
    expected = train(whole, batches(x, y), tmp_path / "whole", **options)
    assert int(whole.optimizer.iterations) == 8
    stopped = make_model()
    with pytest.raises(RuntimeError, match="killed"):
        train(stopped, batches(x, y), tmp_path / "part", checkpoint_steps=1, callbacks=[Interrupt(6)], **options)
    resumed = make_model(seed=2)
    history = train(resumed, batches(x, y), tmp_path / "part", **options)
    assert_same(whole, resumed)
    assert history.history == expected.history


def test_stop_training(tmp_path):
    x, y = make_data()
    model = make_model()
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1))
    assert train(model, batches(x, y), tmp_path, epochs=9, callbacks=[stop], verbose=0).epoch == [0, 1]
    stop = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", True))
    assert train(model, batches(x, y), tmp_path, epochs=9, callbacks=[stop], verbose=0).epoch == [0, 1, 2]
    assert int(model.optimizer.iterations) == 7


def test_the_progress_is_shown(tmp_path, capsys):
    x, y = make_data()
    train(make_model(), batches(x, y), tmp_path, epochs=2, steps=5)
    shown = capsys.readouterr().out
    assert "Epoch 1/2, from step 1 of 5 on" in shown and "Epoch 2/2, from step 4 of 5 on" in shown and "3/3" in shown
    train(make_model(), batches(x, y), tmp_path, epochs=3)
    shown = capsys.readouterr().out
    assert "Goes on after step 5, as in " in shown and "Epoch 3/3, from step 6 on" in shown


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(tmp_path, uninterrupted, number):
    """The step is finished and kept; a second signal would act at once."""
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def send(batch, logs):
        if batch == 1:
            os.kill(os.getpid(), number)
            seen.append([signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)])

    model = make_model(use_ema=True)
    x, y = make_data()
    options = {"steps": STEPS, "validation_data": (x, y), "verbose": 0}
    with pytest.raises((KeyboardInterrupt, SystemExit)) as error:
        train(
            model, Videos(), tmp_path, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_begin=send)], **options
        )
    assert error.type is KeyboardInterrupt if number == signal.SIGINT else error.value.code == 143
    assert seen == [handlers] and [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name[:25] for path in Checkpoints(tmp_path / "checkpoints").paths()] == [
        "step-000000000-epoch-0000",
        "step-000000002-epoch-0000",
    ]
    model = make_model(seed=9, use_ema=True)
    train(model, Videos(), tmp_path, **options)
    assert_same(model, uninterrupted[0])


def test_a_signal_ends_a_validation(tmp_path):
    """What was trained before it is kept."""
    x, y = make_data()
    send = keras.callbacks.LambdaCallback()
    send.on_test_batch_begin = lambda batch, logs: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(make_model(), batches(x, y), tmp_path, epochs=1, validation_data=(x, y), callbacks=[send], verbose=0)
    assert Checkpoints(tmp_path / "checkpoints").paths()[-1].name.startswith("step-000000003-epoch-0000-")


# Faults


def test_damaged_checkpoints(tmp_path, uninterrupted, caplog):
    """The one before is used, and said so; the end is the same."""
    caplog.set_level(logging.WARNING)
    x, y = make_data()
    options = {"checkpoint_steps": 1, "num_checkpoints": 3, "verbose": 0}
    train(make_model(use_ema=True), Videos(), tmp_path, steps=5, validation_data=(x, y), **options)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    first, second, third = checkpoints.paths()
    assert [path.name[:25] for path in (first, second, third)] == [
        "step-000000004-epoch-0001",
        "step-000000005-epoch-0001",
        "step-000000005-epoch-0002",
    ]
    third.write_bytes(third.read_bytes()[:-100])  # truncated
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    second.write_bytes(content)
    (tmp_path / "checkpoints" / ".1234.partial").write_bytes(b"what a killed process left")
    assert not of_package(caplog)
    model, videos = make_model(seed=3, use_ema=True), Videos()
    train(model, videos, tmp_path, steps=STEPS, validation_data=(x, y), **options)
    assert [record.getMessage().split(" has the checksum")[0] for record in of_package(caplog)] == [
        f"Passed over a damaged checkpoint: {path}" for path in (third, second)
    ]
    assert len(videos.given) == STEPS - 4
    assert_same(model, uninterrupted[0])
    paths = checkpoints.paths()
    assert len(paths) == 3 and sorted(os.listdir(tmp_path / "checkpoints")) == [".lock", *(path.name for path in paths)]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match="At least one checkpoint must be sound.* Received: 3 damaged ones in"):
        train(model, videos, tmp_path, steps=STEPS, **options)


def test_not_finite(tmp_path):
    """The loss: the clips are named and the checkpoint before stays. Weights: they are not kept."""
    x, y = make_data()

    def dataset(start):
        for element in Videos()(start):
            element[0][(np.array(element[2]) == b"3.mp4")] = np.nan
            yield element

    order = np.random.default_rng(0).permutation(NUM_CLIPS).tolist()
    step = order.index(3) // BATCH
    clips = ", ".join(f"{video}.mp4" for video in order[step * BATCH : (step + 1) * BATCH])
    message = (
        f"^The loss must be finite. At step {step + 1} with the learning rate 0.1 it was not, of {clips}. Rec.*nan$"
    )
    for _ in range(2):  # again where it stopped
        with pytest.raises(TrainingError, match=message):
            train(make_model(), dataset, tmp_path / "loss", steps=STEPS, checkpoint_steps=1, verbose=0)
        newest = Checkpoints(tmp_path / "loss" / "checkpoints").paths()[-1]
        assert newest.name.startswith(f"step-{step:09d}-")
    model = make_model()
    spoil = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: model.layers[1].bias.assign([np.inf] + [0] * 7)
    )
    with pytest.raises(TrainingError, match="weights must be finite.* step 1. Received: 1 of 8 values of dense.*/bias"):
        train(model, batches(x, y), tmp_path / "weights", steps=3, checkpoint_steps=1, callbacks=[spoil], verbose=0)
    (path,) = Checkpoints(tmp_path / "weights" / "checkpoints").paths()
    assert path.name.startswith("step-000000000-")


def test_wrong_data(tmp_path):
    model = make_model()
    for dataset, message in (
        ([], "`dataset` must have a batch in every pass. Received: none in pass 0"),
        (iter(batches(*make_data())), "Received: none in pass 1"),
        ([(np.ones((2, 6)),)], r"must yield \(x, y\) or \(x, y, names, places\). Received: 1"),
        ([np.ones((2, 6))], "Received: ndarray"),
        ([(*make_data(2), ["a", "b"], [(0, 0), (0, 1)])], "must be a function of the place to start.* Received: list"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, dataset, tmp_path, steps=9, verbose=0)


def test_one_process_at_a_time(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints").locked():
        with pytest.raises(TrainingError, match=f"No other process may train .* Received: directory='{tmp_path}/run'"):
            train(make_model(), batches(*make_data()), tmp_path / "run", epochs=1, verbose=0)
    train(make_model(), batches(*make_data()), tmp_path / "run", epochs=1, verbose=0)


def test_another_model(tmp_path):
    x, y = make_data()
    train(make_model(), batches(x, y), tmp_path, steps=1, verbose=0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(9), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    before = model.get_weights()
    message = r"this model and optimizer.* dense[^/]*/kernel of shape \(6, 8\) where .*of shape \(6, 9\). Received: '"
    with pytest.raises(ValueError, match=message):
        train(model, batches(x, y), tmp_path, steps=1, verbose=0)
    assert all(map(np.array_equal, before, model.get_weights()))
    with pytest.raises(ValueError, match="there is no more where the model has "):
        train(make_model(use_ema=True), batches(x, y), tmp_path, steps=1, verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": None}, "`steps` or `epochs` must say when.* Received: steps=None, epochs=None"),
        ({"steps": 0}, "`steps` must be a positive integer. Received: steps=0"),
        ({"epochs": 1.5}, "`epochs` must be a positive integer. Received: epochs=1.5"),
        ({"checkpoint_steps": None}, "`checkpoint_steps` must be a positive integer. Received: checkpoint_steps=None"),
        ({"num_checkpoints": 0}, "`num_checkpoints` must be a positive integer"),
        (
            {"callbacks": [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]},
            "Received: callbacks with SwapEMAWeights",
        ),
        ({"model": keras.Sequential([keras.Input((6,))])}, "`model` must be compiled and built. Received: model=<"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    arguments = {"model": None, "dataset": [], "directory": tmp_path, "steps": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        train(**arguments)
    assert not list(tmp_path.iterdir())


def test_kinds_of_numbers(tmp_path):
    """bfloat16, which NumPy's files do not know, integers, and names that come twice."""
    values = {"bfloat16": [1.5, -2.0], "uint8": [7, 255], "float32": [1e-30, 3], "bool": [True, False]}
    variables = [keras.Variable(value, dtype=dtype, name="same", trainable=False) for dtype, value in values.items()]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(variables, {"step": 0, "epoch": 0, "figure": 0.1})
    for variable in variables:
        variable.assign([0, 0])
    path = checkpoints.newest()
    state = checkpoints.read(path, variables)
    assert state == {"step": 0, "epoch": 0, "figure": 0.1} and path == checkpoints.paths()[0]
    for variable, (dtype, value) in zip(variables, values.items(), strict=True):
        found = keras.ops.convert_to_numpy(variable)
        assert keras.backend.standardize_dtype(variable.dtype) == dtype
        np.testing.assert_array_equal(
            found.astype("float64"), np.array(value, "float32" if dtype == "float32" else None)
        )
