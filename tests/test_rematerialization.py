"""Networks built with `remat=True` against those without: the same numbers, names and files; twice the forward pass."""

import functools

import keras
import numpy as np
import pytest

from keras_nonlocal import applications
from keras_nonlocal.applications import resnet
from keras_nonlocal.applications.rematerialization import RematerializedModel
from tests.backends import BACKEND, assert_close, assert_equal

OPTIONS = {"input_shape": (4, 32, 32, 3), "classes": 5}
CLIPS = np.random.default_rng(1).normal(size=(2, *OPTIONS["input_shape"])).astype("float32")
LABELS = np.array([1, 3])


def build(remat, **options):
    """A small I3D whose non-local blocks do something."""
    keras.utils.set_random_seed(0)  # of weights and of dropout
    model = applications.I3DResNet11(**OPTIONS | {"remat": remat} | options)
    for layer in model.layers:
        if layer.name.startswith("nonlocal"):
            layer.norm.gamma.assign(np.full(layer.norm.gamma.shape, 0.5, "float32"))
    return model


# How all but the tests of compilation train: TensorFlow takes longer to trace a step than to compute it.
EASIEST = {"tensorflow": {"run_eagerly": True}, "jax": {"jit_compile": True}, "torch": {"jit_compile": False}}[BACKEND]


def train(model, steps=2, **options):
    options = options or EASIEST
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy", **options)
    keras.utils.set_random_seed(1)  # PyTorch draws dropout from one generator for all models
    return np.array([model.train_on_batch(CLIPS, LABELS) for _ in range(steps)])


def assert_same_state(actual, expected, tolerance=1e-4):
    assert [weight.path for weight in actual.weights] == [weight.path for weight in expected.weights]
    for weight, one, other in zip(expected.weights, actual.get_weights(), expected.get_weights(), strict=True):
        if (
            tolerance
            and weight.path.startswith("nonlocal")
            and weight.path.endswith(("phi/bias", "g/bias", "out/bias"))
        ):
            # In front of a softmax or a norm they change nothing, and their gradients are rounding errors of 1e-7.
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=1e-6)
        else:
            assert_close(one, other, tolerance)


def assert_trains_alike(**options):
    """Losses, all weights and moving statistics after two steps. Dropout is on, in the head."""
    plain, remat = build(False), build(True)
    assert type(remat) is RematerializedModel and type(plain) is not RematerializedModel
    assert_same_state(remat, plain, 0.0)
    before = plain.get_weights()
    assert_close(train(remat, **options), train(plain, **options))
    assert_same_state(remat, plain)
    # The weights of the blocks too. The biases of non-local blocks change nothing in front of a softmax or a norm.
    changes = {
        weight.path: np.abs(new - old).max()
        for weight, new, old in zip(plain.weights, plain.get_weights(), before, strict=True)
        if weight.name != "bias"
    }
    assert min(changes.values()) > 1e-5, changes


def test_trains_alike():
    assert_trains_alike(**EASIEST)


if BACKEND == "tensorflow":

    @pytest.mark.slow
    def test_trains_alike_in_a_graph():
        assert_trains_alike(jit_compile=False)

    @pytest.mark.slow
    def test_trains_alike_compiled_by_xla():
        assert_trains_alike(jit_compile=True)


if BACKEND != "jax":  # which traces a function once, and computes it twice all the same

    def test_all_but_the_head_runs_twice(monkeypatch):
        called = []
        for cls in (resnet.Conv3D, resnet.BatchNormalization, keras.layers.Dense):

            @functools.wraps(cls.call)  # Keras looks at the names of its arguments
            def call(self, *args, original=cls.call, **kwargs):
                called.append(self.name)
                return original(self, *args, **kwargs)

            monkeypatch.setattr(cls, "call", call)
        for remat, times in ((False, 1), (True, 2)):
            model = build(remat)
            train(model, 1)  # Keras on PyTorch begins with a call of its own, that makes the metrics
            called.clear()
            model.train_on_batch(CLIPS, LABELS)
            names = {name for name in called if "branch" in name or name == "conv1"}
            # The branches of 3 blocks, of which 2 have a projection, and the first convolution.
            assert len(names) == 3 * 3 * 2 + 2 * 2 + 1
            counts = {name: called.count(name) for name in (*names, "norm", "pred")}
            # Both non-local blocks have a "norm".
            assert counts == {**dict.fromkeys(names, times), "norm": 2 * times, "pred": 1}


@pytest.mark.slow
def test_statistics_are_updated_once():
    model = build(True)
    norm = model.get_layer("res_conv1_bn")
    inside = keras.Model(model.input, model.get_layer("conv1").output)(CLIPS)
    means = np.float64(keras.ops.convert_to_numpy(inside)).mean(axis=(0, 1, 2, 3))
    train(model, 1)
    assert_close(norm.moving_mean, 0.1 * means)


@pytest.mark.slow
def test_frozen_layers_stay():
    """As in the paper's training on long clips: batch normalization frozen, in the blocks too."""
    plain, remat = build(False), build(True)
    for model in (plain, remat):
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
            elif layer.name.startswith("nonlocal"):
                layer.norm.trainable = False
        model.get_layer("conv1").trainable = False
    before = {weight.path: keras.ops.convert_to_numpy(weight).copy() for weight in remat.non_trainable_weights}
    assert_close(train(remat), train(plain))
    assert_same_state(remat, plain)
    for weight in remat.non_trainable_weights:
        assert_equal(weight, before[weight.path])


@pytest.mark.slow
def test_mixed_precision(policy):
    """Of the blocks, which compute in float32, no weight is rounded."""
    policy("mixed_bfloat16")
    options = {"non_local_options": {"dtype": "float32"}}
    plain, remat = build(False, **options), build(True, **options)
    assert {weight.dtype for weight in remat.weights} == {"float32"}
    assert_close(train(remat, 1), train(plain, 1))
    for one, other in zip(remat.layers, plain.layers, strict=True):
        for actual, expected in zip(one.get_weights(), other.get_weights(), strict=True):
            assert_close(actual, expected, 1e-5 if one.name.startswith("nonlocal") else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("top", [{}, {"include_top": False}, {"include_top": False, "pooling": "avg"}])
def test_without_head_and_outside_of_training(top):
    plain, remat = build(False, **top), build(True, **top)
    for training in (False, True):
        outputs = []
        for model in (remat, plain):
            keras.utils.set_random_seed(1)
            outputs.append(model(CLIPS, training=training))
        assert_close(*outputs)


@pytest.mark.slow
def test_behind_other_layers():
    """Layers in front whose names are those of blocks, but which stand side by side."""
    losses = []
    for remat in (False, True):
        clips = keras.Input(OPTIONS["input_shape"])
        sides = [keras.layers.ReLU(negative_slope=slope, name=f"side{slope}_out")(clips) for slope in (2, 3)]
        model = build(remat, input_shape=None, input_tensor=keras.layers.Add(name="both_out")(sides))
        losses.append(train(model, 1))
    assert_close(*losses)


def test_files(tmp_path):
    plain, remat = build(False), build(True, dropout=0.0)
    train(remat, 1)
    remat.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is RematerializedModel
    assert_same_state(loaded, remat, 0.0)
    from_file = applications.I3DResNet11(**OPTIONS, remat=True, weights=str(tmp_path / "model.keras"))
    assert_same_state(from_file, remat, 0.0)
    remat.save_weights(tmp_path / "remat.weights.h5")
    plain.load_weights(tmp_path / "remat.weights.h5")
    assert_same_state(plain, remat, 0.0)
    assert_close(train(loaded, 1), train(remat, 1))
    assert_same_state(loaded, remat)
    names = [[layer.name for layer in model.layers[1:]] for model in (loaded, plain)]  # inputs are numbered
    assert names[0] == names[1]
    assert loaded.get_layer("res3_0_out").output.shape == plain.get_layer("res3_0_out").output.shape


@pytest.mark.slow
def test_other_functions_take_it():
    plain, remat = build(False, dropout=0.0), build(True, dropout=0.0)
    train(remat, 1)  # its parts are made
    plain.set_weights(remat.get_weights())
    assert str(applications.summarize(remat)) == str(applications.summarize(plain))
    whole = applications.fully_convolutional(remat)
    assert_close(whole(CLIPS), applications.fully_convolutional(plain)(CLIPS))
    assert type(keras.models.clone_model(remat)) is RematerializedModel

    new = applications.insert_non_local(remat, after=["res2_0_out"])
    assert type(new) is RematerializedModel and new.name == remat.name
    assert_close(new(CLIPS), remat(CLIPS))
    twin = applications.insert_non_local(plain, after=["res2_0_out"])
    twin.set_weights(new.get_weights())
    assert_close(train(new), train(twin))
    assert_same_state(new, twin)


def test_faulty_argument():
    with pytest.raises(ValueError, match=r"`remat` must be `True` or `False`. Received: remat='full'"):
        build("full")
