"""Tuning: costs before anything is built, and searches of tiny networks that fail, are killed and go on."""

import csv
import gc
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal import cli
from keras_nonlocal.applications import summarize
from keras_nonlocal.applications.resnet import NETWORKS
from keras_nonlocal.data import write_video
from keras_nonlocal.ops import PAIRWISE
from keras_nonlocal.tuning import METHODS, Costs, NonLocalHyperModel, tune
from keras_nonlocal.tuning.space import meaningful
from tests.test_cli import error_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPE = (4, 32, 32, 3)
SMALL = {"classes": 2, "input_shape": SHAPE, "networks": ["c2d_resnet11", "i3d_resnet11"]}
PLAIN = {"network": "c2d_resnet11", "non_local": "0"}


def values(network, non_local, pairwise=None, pool_size=None, window=None):
    of_blocks = {"pairwise": pairwise, "pool_size": pool_size, "window": window}
    return {"network": network, "non_local": non_local} | (of_blocks if pairwise else {})


# The space


CANDIDATES = [
    ({}, values("i3d_resnet11", "0")),
    ({}, values("c2d_resnet11", "2", "concatenation", "1,2,2", "none")),
    ({}, values("i3d_resnet11", "1", "gaussian", "none", "all,1,1")),
    ({}, values("c2d_resnet11", "res3_0", "dot_product", "none", "1,all,all")),
    (
        {"inflation": "3x3x3", "pool1_padding": "same"},
        values("i3d_resnet11", "2", "euclidean_gaussian", "1,2,2", "none"),
    ),
]
LARGE = [
    ({}, values("c2d_resnet50", "5", "embedded_gaussian", "1,2,2", "none")),
    ({"temporal_strides": (2, 2, 1)}, values("i3d_resnet101", "10", "concatenation", "none", "1,all,all")),
    ({}, values("i3d_resnet50", "res5_1", "dot_product", "none", "all,1,1")),
]


@pytest.mark.parametrize(
    ("options", "candidate"), [*CANDIDATES, *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE)]
)
def test_costs_are_those_of_the_built_network(options, candidate):
    shape = (8, 64, 64, 3)
    space = NonLocalHyperModel(7, (8, None, None, 3), shape, network_options=options)
    summary = summarize(space.build_network(candidate), shape)
    assert summary.non_local_macs > 0 or candidate["non_local"] == "0"
    assert space.costs(candidate) == Costs(summary.parameters, summary.macs)


@pytest.mark.parametrize(
    "candidate",
    [
        values("c2d_resnet11", "5", "gaussian", "none", "none"),  # has places for two
        values("c2d_resnet11", "1", "gaussian", "1,2,2", "all,1,1"),  # no key in a window
        values("c2d_resnet11", "1", "gaussian", "none", "3,all,all"),  # of 2 frames
        values("c2d_resnet11", "res5_1", "gaussian", "none", "none"),
    ],
)
def test_what_cannot_be_built_is_rejected(candidate):
    space = NonLocalHyperModel(2, SHAPE, window=[None, (None, 1, 1), (3, None, None)])
    assert space.rejection(candidate).startswith("impossible: ")
    with pytest.raises(ValueError):
        space.build_network(candidate)


def test_a_candidate_over_the_budget_allocates_nothing():
    """Its last layer alone would have half a terabyte."""
    space = NonLocalHyperModel(10**9, SHAPE, networks=["c2d_resnet11"], max_parameters=2e6)
    assert (
        space.costs(PLAIN).parameters - 10**9
        == NonLocalHyperModel(2, SHAPE).costs(PLAIN).parameters + 128 * (10**9 - 2) - 2
    )
    assert space.rejection(PLAIN) == "129,000,049,296 parameters, the budget is 2,000,000"
    hp = keras_tuner.HyperParameters()
    hp.values = PLAIN | {"learning_rate": 0.1, "weight_decay": 1e-4}
    space.declare_hyperparameters = lambda hp: None  # in this space nothing fits, so that it cannot be declared
    with pytest.raises(keras_tuner.errors.FailedTrialError, match="Rejected: 129,000,049,296 parameters"):
        space.build(hp)
    with keras.StatelessScope():
        pass  # at its end Keras fills all variables that have no value yet


def test_budgets():
    costs = NonLocalHyperModel(**SMALL).costs(PLAIN)
    for budget in ({"max_parameters": costs.parameters}, {"max_gmacs": costs.macs / 1e9}):
        assert NonLocalHyperModel(**SMALL, **budget).rejection(PLAIN) is None
    space = NonLocalHyperModel(**SMALL, max_parameters=costs.parameters - 1)
    assert space.rejection(PLAIN) == f"{costs.parameters:,} parameters, the budget is {costs.parameters - 1:,}"
    space = NonLocalHyperModel(**SMALL, max_gmacs=costs.macs / 1e9 - 1e-9)
    assert space.rejection(PLAIN).startswith(f"{costs.macs / 1e9:.4g} GMACs, the budget is ")


def test_a_space_in_which_nothing_fits_says_so(tmp_path):
    costs = NonLocalHyperModel(**SMALL).costs(PLAIN)
    with pytest.raises(
        ValueError, match=f"No candidate .* fits; the smallest ones have {costs.parameters:,} param.*=100,"
    ):
        tune(NonLocalHyperModel(**SMALL, max_parameters=100), None, None, tmp_path / "out")
    with pytest.raises(ValueError, match="No candidate of the space fits; impossible: Clips must have at least"):
        tune(NonLocalHyperModel(**SMALL | {"input_shape": (4, 4, 4, 3)}), None, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_space():
    space = NonLocalHyperModel(2, (8, 64, 64, 3))
    assert space.networks == list(NETWORKS) and space.pairwise == list(PAIRWISE)
    assert list(space.non_local) == ["0", "1", "2", "5", "10", "res3_0", "res3_2", "res5_1"]
    hp = keras_tuner.HyperParameters()
    NonLocalHyperModel(**SMALL).declare_hyperparameters(hp)
    space = {parameter.name: parameter for parameter in hp.space}
    assert list(space) == ["network", "non_local", "pairwise", "pool_size", "window", "learning_rate", "weight_decay"]
    assert space["network"].values == ["c2d_resnet11", "i3d_resnet11"]
    assert space["window"].values == ["none", "1,all,all", "all,1,1"]
    assert (space["learning_rate"].min_value, space["learning_rate"].max_value) == (1e-3, 1e-1)
    # The defaults are a candidate that fits; what has one value is not searched.
    hp = keras_tuner.HyperParameters()
    costs = NonLocalHyperModel(**SMALL).costs(PLAIN)
    small = SMALL | {"networks": ["i3d_resnet11", "c2d_resnet11"]}
    space = NonLocalHyperModel(
        **small, max_gmacs=costs.macs / 1e9, learning_rate=0.01, weight_decay=0, pairwise=["gaussian"]
    )
    space.declare_hyperparameters(hp)
    assert meaningful(hp.values) == PLAIN | {"learning_rate": 0.01, "weight_decay": 0.0}
    assert hp.values["pairwise"] == "gaussian"  # without blocks it means nothing
    assert space.rejection(hp.values) is None


def test_a_candidate_is_compiled_with_a_decay_that_leaves_out_normalization():
    hp = keras_tuner.HyperParameters()
    space = NonLocalHyperModel(**SMALL, learning_rate=0.5, weight_decay=0.1, multi_label=True)
    space.declare_hyperparameters(hp)
    hp.values["non_local"] = "2"
    model = space.build(hp)
    assert model.loss == "binary_crossentropy" and model.layers[-1].activation is keras.activations.sigmoid
    assert (space.objective.name, space.objective.direction) == ("val_auc", "max")
    before = []
    for variable in model.trainable_variables:
        variable.assign_add(keras.ops.ones(variable.shape))  # biases and β begin with 0
        before.append(variable.numpy())
    model.optimizer.apply_gradients([(keras.ops.zeros(v.shape), v) for v in model.trainable_variables])
    names = {variable.name for variable in model.trainable_variables}
    assert names == {"kernel", "bias", "gamma", "beta"}
    for variable, value in zip(model.trainable_variables, before, strict=True):
        factor = 1.0 if variable.name in ("gamma", "beta") else 1 - 0.5 * 0.1
        np.testing.assert_allclose(variable.numpy(), factor * value, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, "`classes` must be an integer of at least 2. Received: classes=1"),
        ({"input_shape": (4, None, None, 3)}, "`clip_shape`, or else `input_shape`, must give the 4 sizes"),
        ({"networks": ["resnet"]}, r"`networks` must be a list of c2d_resnet11, .*Received: networks=\['resnet'\]"),
        ({"pairwise": []}, r"`pairwise` must be a list of gaussian, .*Received: pairwise=\[\]"),
        ({"non_local": 5}, "`non_local` must be a list of what is searched. Received: non_local=5"),
        (
            {"non_local": [{3: 1}]},
            r"`non_local` must be a list .*, each as the networks take it. Received: non_local=\[",
        ),
        ({"window": None}, "`window` must be a list of what is searched. Received: window=None"),
        ({"learning_rate": (0.1, 0.01)}, r"`learning_rate` must be a positive .*Received: learning_rate=\(0.1, 0.01\)"),
        ({"weight_decay": (0, 0.1)}, r"`weight_decay` must be a positive number .*Received: weight_decay=\(0, 0.1\)"),
        ({"max_parameters": 0}, "`max_parameters` must be positive or `None`. Received: max_parameters=0"),
        ({"max_gmacs": -1}, "`max_gmacs` must be positive or `None`. Received: max_gmacs=-1"),
        ({"network_options": {"weights": "a.h5"}}, "`network_options` must not hold .*Received: network_options={'wei"),
    ],
)
def test_wrong_spaces(arguments, message):
    with pytest.raises(ValueError, match=message):
        NonLocalHyperModel(**SMALL | arguments)


# Searches. The networks that train are tiny; what they are said to cost is what the space's would.


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """After each trial memory is freed; that need not look through what was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Tiny(NonLocalHyperModel):
    def build_network(self, values):
        inputs = keras.Input(SHAPE)
        x = keras.layers.GlobalAveragePooling3D()(inputs)
        x = keras.layers.Dense(self.classes, "sigmoid" if self.multi_label else "softmax", name="pred")(x)
        return keras.Model(inputs, x)


class Scripted(Tiny):
    """Its trials play scores, and leave the number of the epoch in the weights.

    Args:
        play: Function from the number of the trial to the scores of its epochs, or to the error that it raises.
    """

    def __init__(self, play, **kwargs):
        super().__init__(**SMALL | kwargs)
        self.play, self.trained = play, []

    def fit(self, hp, model, training, validation_data, epochs, initial_epoch, callbacks, **kwargs):
        number = len(self.trained)
        self.trained.append((number, initial_epoch, epochs, dict(hp.values)))
        callbacks = keras.callbacks.CallbackList(callbacks, model=model)
        for epoch, score in zip(range(initial_epoch, epochs), self.play(number), strict=False):
            if isinstance(score, BaseException):
                raise score
            model.set_weights([np.full(weight.shape, epoch + 1.0) for weight in model.get_weights()])
            callbacks.on_epoch_end(epoch, {"loss": 1.0, "val_accuracy": score})


def weights_of(path):
    return {float(value) for weight in keras.saving.load_model(path).get_weights() for value in weight.ravel()}


def labelled_clips(num_classes=2):
    """Clips whose brightness is their class, in a dataset that does not know its length."""
    labels = np.arange(12) % 2
    clips = np.random.default_rng(0).normal(size=(12, *SHAPE)) + 4 * labels[:, None, None, None, None]
    if num_classes > 2:
        labels = np.eye(num_classes)[labels]
    dataset = tf.data.Dataset.from_tensor_slices((clips.astype("float32"), labels))
    return dataset.filter(lambda clip, label: True).batch(4)


def test_search(tmp_path):
    dataset = labelled_clips()
    assert dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY
    space = Tiny(**SMALL, max_gmacs=0.006)
    folders = []
    result = tune(
        space,
        dataset,
        dataset,
        tmp_path,
        max_trials=3,
        epochs=4,
        callbacks=lambda folder: folders.append(folder) or [keras.callbacks.CSVLogger(f"{folder}/log.csv")],
        metadata={"class_names": ["dark", "light"]},
        verbose=0,
    )
    assert [row.trial for row in result.rows] == ["0", "1", "2"]
    for row, folder in zip(result.rows, folders, strict=True):
        assert row.status == "completed" and row.epochs == 4
        assert Costs(row.parameters, row.macs) == space.costs(row.hyperparameters)
        assert row.macs <= 6e6
        with open(f"{folder}/log.csv", newline="") as file:
            scores = [float(epoch["val_accuracy"]) for epoch in csv.DictReader(file)]
        assert len(scores) == 4 and row.score == pytest.approx(max(scores))
        assert row.best_epoch == 1 + int(np.argmax(scores))
        assert os.listdir(folder).count("best.weights.h5") == 0  # the best ones are in the model
    assert result.best == min(result.rows, key=lambda row: (-row.score, row.macs))
    assert result.hyperparameters == result.best.hyperparameters
    model = keras.saving.load_model(result.model_path)
    correct = [model(clips).numpy().argmax(1) == labels.numpy() for clips, labels in dataset]
    assert np.concatenate(correct).mean() == pytest.approx(result.best.score)
    assert json.loads((tmp_path / "best.keras.json").read_text()) == {"class_names": ["dark", "light"]}
    # The tables.
    assert (tmp_path / "trials.md").read_text() == result.table() + "\n"
    header, rule, *lines = result.table().splitlines()
    assert header == (
        "| trial | network | non_local | pairwise | pool_size | window | learning_rate | weight_decay "
        "| parameters | GMACs | epochs | best epoch | val_accuracy | status |"
    )
    for line, row in zip(lines[:3], result.rows, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:3] == [row.trial, row.hyperparameters["network"], row.hyperparameters["non_local"]]
        assert cells[8:10] == [f"{row.parameters / 1e6:.4g} M", f"{row.macs / 1e9:.4g}"]
        assert cells[10:] == ["4", str(row.best_epoch), f"{row.score:.4f}", "completed"]
    over = sum(reason.endswith(" GMACs, the budget is 0.006") for reason in result.rejected.values())
    impossible = sum(reason.startswith("impossible: ") for reason in result.rejected.values())
    assert min(over, impossible) > 0 and over + impossible + len(space.fitting) == 2 * (1 + 3 * 30)
    assert lines[-1] == (
        f"{over + impossible} architectures of the space were rejected before they were built: "
        f"{over} are over the budget, {impossible} impossible."
    )
    with open(tmp_path / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], int(row["macs"]), float(row["learning_rate"])) for row in rows] == [
        (row.hyperparameters["network"], row.macs, row.hyperparameters["learning_rate"]) for row in result.rows
    ]
    # Once it is over, calling again trains nothing.
    assert tune(space, None, None, tmp_path, 3, 4, metadata={"class_names": ["dark", "light"]}, verbose=0) == result


def test_several_labels(tmp_path):
    space = Tiny(3, SHAPE, networks=["c2d_resnet11"], non_local=[0], learning_rate=0.5, multi_label=True)
    result = tune(space, labelled_clips(3), labelled_clips(3), tmp_path, max_trials=1, epochs=3, verbose=0)
    assert result.objective == "val_auc"
    # Two classes are told apart, of the third there is no clip.
    assert 1 / 2 < result.best.score <= 2 / 3 + 1e-6


def test_the_best_epoch_is_kept_and_of_equals_the_cheaper_network(tmp_path, capsys):
    space = Scripted(lambda trial: [0.1, 0.7, 0.7, 0.2] if trial < 4 else [0.3])
    result = tune(space, None, None, tmp_path, max_trials=6, epochs=4, verbose=1)
    assert [row.score for row in result.rows] == [0.7] * 4 + [0.3] * 2
    assert result.best.macs == min(row.macs for row in result.rows[:4])
    assert (result.best.best_epoch, result.best.epochs) == (2, 4)
    assert weights_of(result.model_path) == {2.0}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[5].startswith("trial 5: completed, val_accuracy 0.3000 (network ")


@pytest.mark.parametrize("method", METHODS)
def test_rejected_candidates_use_up_no_trials(method, tmp_path):
    """Of all architectures a few fit."""
    space = Scripted(lambda trial: [trial / 100] * 9, max_gmacs=0.0055)
    result = tune(space, None, None, tmp_path, max_trials=7, epochs=9, method=method, verbose=0)
    assert len(result.rows) == 7 and all(row.status == "completed" for row in result.rows)
    assert all(row.macs <= 5.5e6 for row in result.rows)
    assert len(result.rejected) > 3
    assert len({row.hyperparameters["learning_rate"] for row in result.rows}) == 7


def test_methods():
    assert tuple(METHODS) == cli.TUNING_METHODS


def test_hyperband_goes_on_from_the_best(tmp_path):
    """Its schedule for 3 epochs and factor 3: those that go on begin where they were."""
    space = Scripted(lambda trial: [trial / 100] * 9, max_gmacs=0.0055)
    result = tune(space, None, None, tmp_path, max_trials=None, epochs=3, method="hyperband", verbose=0)
    begun = [(initial, last) for _, initial, last, _ in space.trained]
    # Of the first bracket's three trials of one epoch the best goes on; the second bracket trains two in full.
    assert begun == [(0, 1)] * 3 + [(1, 3)] + [(0, 3)] * 2
    promoted, parent = space.trained[3][3], space.trained[2][3]
    assert promoted["tuner/trial_id"] == "0002" and promoted["learning_rate"] == parent["learning_rate"]
    assert [row.epochs for row in result.rows] == [1, 1, 1, 3, 3, 3]


def test_failed_trials_are_rows(tmp_path):
    class ResourceExhaustedError(Exception):
        pass

    failures = [
        ResourceExhaustedError("OOM when allocating"),
        MemoryError(),
        float("nan"),
        RuntimeError("CUDA out of memory"),
    ]
    space = Scripted(lambda trial: [0.9, failures[trial]] if trial < 4 else [0.5, 0.4])
    result = tune(space, None, None, tmp_path, max_trials=6, epochs=2, verbose=0)
    nan = "failed: val_accuracy was nan in epoch 2"
    assert [row.status for row in result.rows] == [
        *("failed: out of memory", "failed: out of memory", nan, "failed: out of memory", "completed", "completed")
    ]
    assert [row.score for row in result.rows] == [None] * 4 + [0.5] * 2
    assert result.best.score == 0.5 and weights_of(result.model_path) == {1.0}
    assert result.table().count("failed: out of memory |") == 3
    space = Scripted(lambda trial: [MemoryError()])
    with pytest.raises(
        ValueError, match="No trial was completed; the last one failed: out of memory. Received: directory="
    ):
        tune(space, None, None, tmp_path / "none", max_trials=4, verbose=0)
    assert len(space.trained) == 4 and (tmp_path / "none" / "trials.md").exists()


def test_a_loss_that_is_no_number_fails_the_trial(tmp_path):
    """By real training: with weights that are no numbers the accuracy still is one."""
    space = Tiny(**SMALL, learning_rate=1e30)
    dataset = labelled_clips().map(lambda clips, labels: (clips * 1e20, labels))
    with pytest.raises(ValueError, match="the last one failed: loss was nan in epoch 1"):
        tune(space, dataset, dataset, tmp_path, max_trials=1, epochs=2, verbose=0)


@pytest.mark.parametrize("error", [OSError("[Errno 28] No space left on device"), KeyboardInterrupt()])
def test_other_errors_end_the_search_which_goes_on_there(error, tmp_path):
    def play(trial):
        return [0.1 * trial, error if trial == 2 else 0.0]

    broken = Scripted(play)
    with pytest.raises(type(error)) as raised:
        tune(broken, None, None, tmp_path / "broken", max_trials=4, epochs=2, verbose=0)
    assert raised.value is error
    assert (tmp_path / "broken" / "trials.md").read_text().count("| completed |") == 2
    mended = Scripted(lambda trial: [0.1 * (trial + 2), 0.0])
    result = tune(mended, None, None, tmp_path / "broken", max_trials=4, epochs=2, verbose=0)
    assert len(mended.trained) == 2
    whole = tune(Scripted(lambda trial: [0.1 * trial, 0.0]), None, None, tmp_path / "whole", 4, 2, verbose=0)
    assert result.rows == whole.rows and result.best == whole.best
    assert (tmp_path / "broken" / "trials.csv").read_text() == (tmp_path / "whole" / "trials.csv").read_text()
    # A finished search goes on if it may have more trials.
    more = Scripted(lambda trial: [0.9, 0.0])
    result = tune(more, None, None, tmp_path / "broken", max_trials=5, epochs=2, verbose=0)
    assert len(more.trained) == 1 and len(result.rows) == 5 and result.best.score == 0.9


KILLED = """
import os, signal, sys
from tests.test_tuning import Scripted, tune
kill_in, directory = int(sys.argv[1]), sys.argv[2]

class Killed(Exception):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)

def scores(trial):
    yield 0.1 * trial
    if trial == kill_in:
        Killed()
    yield 0.0

tune(Scripted(scores), None, None, directory, max_trials=4, epochs=2, verbose=0)
"""


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path):
    command = [sys.executable, "-c", KILLED, "2", str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "trials.md").read_text().count("| completed |") == 2
    going_on = Scripted(lambda trial: [0.1 * (trial + 2), 0.0])
    result = tune(going_on, None, None, tmp_path / "killed", max_trials=4, epochs=2, verbose=0)
    assert len(going_on.trained) == 2
    whole = tune(Scripted(lambda trial: [0.1 * trial, 0.0]), None, None, tmp_path / "whole", 4, 2, verbose=0)
    assert result.rows == whole.rows
    assert weights_of(result.model_path) == {1.0}


def test_a_trial_that_gets_the_process_killed_is_given_up(tmp_path):
    """As if the system had ended it three times: what it finds then."""
    with pytest.raises(KeyboardInterrupt):
        tune(Scripted(lambda trial: [KeyboardInterrupt()]), None, None, tmp_path, max_trials=2, verbose=0)
    path = tmp_path / "search.json"
    state = json.loads(path.read_text())
    assert state["starts"] == {"0": 0} and state["trials"][0]["status"] == "RUNNING"
    path.write_text(json.dumps(state | {"starts": {"0": 3}}))
    result = tune(Scripted(lambda trial: [0.5]), None, None, tmp_path, max_trials=2, verbose=0)
    assert [row.status for row in result.rows] == ["failed: the process ended 3 times during this trial", "completed"]


def test_a_kill_before_the_best_model_was_written_is_mended(tmp_path, monkeypatch):
    space = Scripted(lambda trial: [0.1, 0.6])
    save = keras.Model.save
    monkeypatch.setattr(keras.Model, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune(space, None, None, tmp_path, max_trials=1, epochs=2, verbose=0)
    assert not (tmp_path / "best.keras").exists()
    monkeypatch.setattr(keras.Model, "save", save)
    result = tune(space, None, None, tmp_path, max_trials=1, epochs=2, verbose=0)
    assert len(space.trained) == 1 and weights_of(result.model_path) == {2.0}


def test_a_small_space_is_tried_as_a_whole(tmp_path):
    """Also the last candidates, which random draws miss with this seed; none twice."""
    rates = {"learning_rate": 0.1, "weight_decay": 0.0}
    one = {"networks": ["c2d_resnet11"], "non_local": [1], "pool_size": [None], "window": [None, (None, 1, 1)]}
    space = Scripted(lambda trial: [0.5], **rates, **one)
    result = tune(space, None, None, tmp_path, max_trials=99, epochs=1, seed=4, verbose=0)
    tried = [row.hyperparameters for row in result.rows]
    assert len(tried) == len(space.fitting) == 10 and all(values | rates in tried for values in space.fitting)


def test_a_folder_of_another_search_is_refused(tmp_path):
    space = Scripted(lambda trial: [0.5])
    tune(space, None, None, tmp_path / "a", max_trials=1, epochs=1, metadata={"stride": 1}, verbose=0)
    with pytest.raises(
        ValueError,
        match="same search. It is one of another epochs 1, not 2; metadata stride 1, not None. Received: directory=",
    ):
        tune(space, None, None, tmp_path / "a", max_trials=1, epochs=2, verbose=0)
    with pytest.raises(ValueError, match="another max_gmacs None, not 0.5. Received: directory="):
        other = Scripted(space.play, max_gmacs=0.5)
        tune(other, None, None, tmp_path / "a", max_trials=1, epochs=1, metadata={"stride": 1}, verbose=0)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match="must be new, empty or hold a search; it holds a, notes.txt. Received: directory="
    ):
        tune(space, None, None, tmp_path, verbose=0)
    with pytest.raises(ValueError, match="`directory` must be a folder. Received: directory="):
        tune(space, None, None, tmp_path / "notes.txt", verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "grid"}, "`method` must be one of random, bayesian, hyperband. Received: method='grid'"),
        ({"max_trials": 0}, "`max_trials` must be an integer of at least 1. Received: max_trials=0"),
        ({"max_trials": None}, "`max_trials` must be an integer of at least 1. Received: max_trials=None"),
        ({"epochs": 1.5}, "`epochs` must be an integer of at least 1. Received: epochs=1.5"),
        ({"seed": -1}, "`seed` must be an integer of at least 0. Received: seed=-1"),
        ({"objective": "val_loss"}, "`objective` must be one of loss, val_accuracy. Received: objective='val_loss'"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tune(Scripted(lambda trial: [0.5]), None, None, tmp_path, **{"max_trials": 1, "verbose": 0} | arguments)


def test_a_tuner_of_keras_tuner_takes_the_space(tmp_path):
    """What is rejected is a failed trial there."""
    space = Tiny(**SMALL, max_gmacs=0.0055)
    tuner = keras_tuner.RandomSearch(
        space, space.objective, max_trials=3, seed=1, max_consecutive_failed_trials=9, directory=str(tmp_path)
    )
    dataset = labelled_clips()
    tuner.search(dataset, validation_data=dataset, epochs=1, verbose=0)
    for trial in tuner.oracle.trials.values():
        reason = space.rejection(trial.hyperparameters.values)
        assert trial.status == ("COMPLETED" if reason is None else "FAILED")
        assert reason is None or f"Rejected: {reason}" in trial.message
    assert {trial.status for trial in tuner.oracle.trials.values()} == {"COMPLETED", "FAILED"}


def test_without_keras_tuner(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("keras_nonlocal.tuning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    with pytest.raises(ImportError, match=r"needs Keras Tuner: install it with pip install 'keras-nonlocal\[tuner\]'"):
        importlib.import_module("keras_nonlocal.tuning")
    assert "pip install 'keras-nonlocal[tuner]'" in error_of(capsys, ["tune", "videos", "--out", "out"])


# The command


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (root / name).mkdir()
        for number in range(5):
            write_video(root / name / f"{number}.mp4", (rng.integers(-20, 20, (5, 32, 36, 3)) + level).astype("uint8"))
    (root / "dark" / "broken.mp4").write_bytes(b"no video")
    return root


CLIPS = ["--num-frames", "4", "--frame-stride", "1", "--image-size", "32", "--shorter-side", "32", "36"]


def test_command(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(NonLocalHyperModel, "build_network", Tiny.build_network)
    out = tmp_path / "search"
    options = [*CLIPS, "--networks", "c2d_resnet11", "i3d_resnet11", "--max-gmacs", "0.006", "--max-trials", "2"]
    options += ["--epochs", "3", "--learning-rate", "0.1", "0.3", "--batch-size", "4", "--validation-split", "0.3"]
    command = ["tune", str(videos), "--out", str(out), *options]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert (out / "trials.md").read_text() in printed
    assert "skipped 1 broken file: broken.mp4 (" in printed
    assert f"\nWrote {out}/best.keras of trial " in printed
    settings = json.loads((out / "best.keras.json").read_text())
    assert {name: settings[name] for name in cli.SETTINGS} == {
        "class_names": ["dark", "light"],
        "num_frames": 4,
        "frame_stride": 1,
        "image_size": 32,
        "shorter_side": [32, 36],
    }
    # The other commands take it without any option.
    assert cli.main(["evaluate", str(out / "best.keras"), str(videos), "--clips", "1", "--crops", "1"]) == 0
    assert "\n10 videos, 1 views of each" in capsys.readouterr().out
    assert cli.main(["predict", str(out / "best.keras"), str(videos / "light" / "0.mp4")]) == 0
    # It goes on only as what it was.
    assert "is one of another metadata frame_stride 1, not 2. Rec" in error_of(
        capsys, [*command, "--frame-stride", "2"]
    )
    line = error_of(capsys, [*command[:3], str(tmp_path / "b"), *options, "--max-parameters", "1e3"])
    assert line.startswith("No candidate of the space fits; the smallest ones have ")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_command_with_the_real_networks(videos, tmp_path, capsys):
    out = tmp_path / "search"
    options = [*CLIPS, "--networks", "c2d_resnet11", "--max-gmacs", "0.007", "--max-trials", "3", "--epochs", "3"]
    options += ["--validation-split", "0.3", "--method", "bayesian"]
    assert cli.main(["tune", str(videos), "--out", str(out), *options]) == 0
    with open(out / "trials.csv", newline="") as file:
        best = max(csv.DictReader(file), key=lambda row: (float(row["val_accuracy"]), -int(row["macs"])))
    summary = summarize(keras.saving.load_model(out / "best.keras"), SHAPE)
    assert (summary.parameters, summary.macs) == (int(best["parameters"]), int(best["macs"]))
    assert cli.main(["evaluate", str(out / "best.keras"), str(videos)]) == 0
    assert cli.main(["export", str(out / "best.keras"), str(tmp_path / "served")]) == 0
