"""Batch normalization: the values, gradients and statistics of the equations, and of the Keras layer it stands for."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_nonlocal import normalization
from keras_nonlocal.normalization import BatchNormalization, normalize_batch
from tests import reference
from tests.backends import assert_close, assert_equal, dtype_of, gradients, to_numpy, weight_gradients


def make_pair(shape, **options):
    """Ours and Keras' with the same random weights."""
    pair = [cls(**options) for cls in (BatchNormalization, keras.layers.BatchNormalization)]
    values = None
    for layer in pair:
        layer.build((None, *shape[1:]))
        if values is None:
            rng = np.random.default_rng(1)
            values = [rng.uniform(0.5, 2.0, weight.shape) for weight in layer.weights]
        layer.set_weights(values)
    return pair


@pytest.fixture
def calls(monkeypatch):
    """Of the function that is ours."""
    found = []

    def counted(*arguments):
        found.append(arguments)
        return normalize_batch(*arguments)

    monkeypatch.setattr(normalization, "normalize_batch", counted)
    return found


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.03), ("float16", 4e-3)])
def test_equations(rng, dtype, tolerance):
    x, direction = rng.normal(2.0, 3.0, (11, 4)), rng.normal(size=(11, 4))
    x, direction = (to_numpy(ops.cast(values, dtype)) for values in (x, direction))  # what the type can hold
    gamma, beta = rng.normal(size=(2, 4)).astype("float32")
    y, mean, variance = normalize_batch(ops.cast(x, dtype), gamma, beta, 1e-3)
    expected, expected_gradients = reference.batch_normalization(x, gamma, beta, 1e-3, direction)
    assert dtype_of(y) == dtype and dtype_of(mean) == dtype_of(variance) == "float32"
    assert_close(y, expected, tolerance)
    assert_close(mean, np.mean(np.float64(x), axis=0))
    assert_close(variance, np.var(np.float64(x), axis=0))

    def total(x, gamma, beta):
        y = normalize_batch(ops.cast(x, dtype), gamma, beta, 1e-3)[0]
        return ops.multiply(ops.cast(y, "float32"), direction)

    _, actual = gradients(total, [x, gamma, beta])
    for values, theirs in zip(actual, expected_gradients, strict=True):
        assert_close(values, theirs, tolerance)


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False, "momentum": 0.5, "epsilon": 0.1}])
@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 5, 3), (2, 2, 3, 2, 3)], ids=str)
def test_is_the_keras_layer(rng, calls, shape, options):
    ours, theirs = make_pair(shape, **options)
    x, direction = rng.normal(1.0, 2.0, (2, *shape)).astype("float32")
    results = []
    for layer in (ours, theirs):
        _, found = weight_gradients(layer, lambda y: ops.sum(ops.multiply(y, direction)), x, training=True)
        state = [
            [weight.value for weight in weights] for weights in (layer.trainable_weights, layer.non_trainable_weights)
        ]
        _, (d_x,) = gradients(
            lambda x, s=state, call=layer.stateless_call: ops.multiply(call(*s, x, training=True)[0], direction), [x]
        )
        results.append([layer(x, training=True), d_x, *found, *layer.get_weights(), layer(x, training=False)])
    assert len(calls) >= 3
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_far_from_zero(rng):
    """Where the mean is 1000 deviations, neither the variance nor the gradient is lost in differences."""
    x, direction = rng.normal(1000.0, 1.0, (128, 3)).astype("float32"), rng.normal(size=(128, 3)).astype("float32")
    gamma, beta = np.ones(3, "float32"), np.zeros(3, "float32")
    expected, (d_x, *_) = reference.batch_normalization(x, gamma, beta, 1e-3, direction)
    y, _, variance = normalize_batch(x, gamma, beta, 1e-3)
    assert_close(variance, np.var(np.float64(x), axis=0), 1e-4)
    assert_close(y, expected, 1e-3)
    assert_close(
        gradients(lambda x: ops.multiply(normalize_batch(x, gamma, beta, 1e-3)[0], direction), [x])[1][0], d_x, 2e-3
    )


# An argument of Keras' since 3.14.
RENORM = [({"renorm": True}, {"training": True})] if hasattr(keras.layers.BatchNormalization(), "renorm") else []


@pytest.mark.parametrize(
    "options, call",
    [
        ({}, {"training": False}),
        ({"trainable": False}, {"training": True}),
        ({"axis": 1}, {"training": True}),
        *RENORM,
        ({}, {"training": True, "mask": np.array([[True, True, False, True]] * 2)}),
    ],
    ids=lambda value: ",".join(value),
)
def test_elsewhere_it_is_the_keras_code(rng, calls, options, call):
    x = rng.normal(size=(2, 4, 3)).astype("float32")
    ours, theirs = make_pair(x.shape, **options)
    assert_equal(ours(x, **call), theirs(x, **call))
    for actual, expected in zip(ours.weights, theirs.weights, strict=True):
        assert_equal(actual, expected)
    assert not calls


def test_mixed_precision(rng):
    x = rng.normal(size=(8, 5, 3)).astype("float32")
    ours, theirs = make_pair(x.shape, dtype="mixed_bfloat16")
    y = ours(x, training=True)
    assert dtype_of(y) == "bfloat16"
    assert_close(y, theirs(x, training=True), 0.01)
    for actual, expected in zip(ours.weights, theirs.weights, strict=True):
        assert dtype_of(actual) == "float32"
        assert_close(actual, expected)


def test_config():
    ours, theirs = BatchNormalization(momentum=0.5, name="norm"), keras.layers.BatchNormalization(0.5, name="norm")
    assert ours.get_config().keys() == theirs.get_config().keys()
    layer = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(ours))
    assert type(layer) is BatchNormalization and layer.momentum == 0.5
