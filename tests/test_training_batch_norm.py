"""Frozen and precise batch normalization, against NumPy over all batches."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_nonlocal import NonLocal1D, NonLocal2D
from keras_nonlocal.training import PreciseBatchNormalization, freeze_batch_norm, precise_batch_norm
from keras_nonlocal.training.batch_norm import batch_norms


def network():
    """Batch normalization by itself, in a model that is a layer, and in a non-local block; and dropout."""
    inner = keras.Sequential([keras.Input((6, 4)), keras.layers.BatchNormalization(name="inner_norm")], name="inner")
    inputs = keras.Input((6, 3))
    x = keras.layers.BatchNormalization(momentum=0.8, name="first")(inputs)
    x = inner(keras.layers.Dense(4, activation="relu", name="hidden")(x))
    x = NonLocal1D(name="block")(x)
    x = keras.layers.Dropout(0.3, seed=1)(keras.layers.GlobalAveragePooling1D()(x))
    outputs = keras.layers.Dense(2)(x)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def batches(rng, sizes=(4, 4, 4)):
    return [
        (3 + 2 * rng.normal(size=(size, 6, 3)).astype("float32"), rng.normal(size=(size, 2)).astype("float32"))
        for size in sizes
    ]


def values(variables):
    return {variable.path: ops.convert_to_numpy(variable).copy() for variable in variables}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert value.tobytes() == after[path].tobytes(), path


@pytest.fixture
def model(rng):
    model = network()
    # γ of the block is 0 at the start; here everything is at work.
    model.get_layer("block").norm.gamma.assign(np.full(4, 0.5))
    model.get_layer("block").out.kernel.assign(rng.normal(size=(2, 4)))
    return model


# Frozen


def test_frozen_batch_normalization_does_not_move(model, rng):
    assert freeze_batch_norm(model) == 3
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = values(model.variables)
    for x, y in batches(rng):
        model.train_on_batch(x, y)
    after = values(model.variables)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    frozen = {path for path in before if path.split("/")[-1] in names}
    assert len(frozen) == 12
    assert {path for path in before if before[path].tobytes() == after[path].tobytes()} == frozen
    # In training it normalizes by its statistics, as at inference.
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    norm = model.get_layer("first")
    np.testing.assert_array_equal(ops.convert_to_numpy(norm(x, training=True)), ops.convert_to_numpy(norm(x)))


def test_batch_norms_of_a_subclass_and_of_wrappers():
    class Own(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.stages = {"one": [keras.layers.TimeDistributed(keras.layers.BatchNormalization())]}
            self.block = NonLocal2D()

    layer = Own()
    layer.block.build((None, 4, 4, 2))
    assert batch_norms(layer) == [layer.stages["one"][0].layer, layer.block.norm]
    assert batch_norms(keras.layers.Dense(2)) == []


# Precise


def test_statistics_of_all_batches(model, rng):
    """Of the first layer those of all its inputs; behind it, of what training would give it, batch by batch."""
    data = batches(rng)
    weights = values(model.trainable_variables)
    seen, inner = [], []
    for x, _ in data:
        mean, variance = x.mean((0, 1), dtype="float64"), x.var((0, 1), dtype="float64")
        normalized = (x - mean) / np.sqrt(variance + 1e-3)
        inner.append(np.maximum(normalized @ weights["hidden/kernel"] + weights["hidden/bias"], 0))
        seen.append(x)
    expected = {"first": np.concatenate(seen), "inner_norm": np.concatenate(inner)}
    before = values(model.variables)
    with precise_batch_norm(model, data):
        for norm in (model.get_layer("first"), model.get_layer("inner").layers[0]):
            x = expected[norm.name]
            np.testing.assert_allclose(norm.moving_mean, x.mean((0, 1), dtype="float64"), rtol=1e-5)
            np.testing.assert_allclose(norm.moving_variance, x.var((0, 1), dtype="float64"), rtol=1e-5)
        inside = values(model.variables)
    changed = {path for path in before if before[path].tobytes() != inside[path].tobytes()}
    assert changed == {path for path in before if "/moving_" in path} and len(changed) == 6
    assert_same(before, values(model.variables))  # dropout's state, too
    assert [norm.momentum for norm in batch_norms(model)] == [0.8, 0.99, 0.9]


def test_a_single_batch_is_normalized_as_in_training(model, rng):
    """Non-local blocks included: with the statistics of a batch, inference on it is training on it but for dropout."""
    (x, _), *_ = batches(rng)
    features = keras.Model(model.inputs, model.get_layer("block").output)
    before = values(model.variables)
    in_training = ops.convert_to_numpy(features(x, training=True))
    for variable in model.variables:
        variable.assign(before[variable.path])
    with precise_batch_norm(model, [x]):
        np.testing.assert_allclose(ops.convert_to_numpy(features(x)), in_training, rtol=1e-4, atol=1e-5)
    assert np.abs(ops.convert_to_numpy(features(x)) - in_training).max() > 0.1


def test_batches_of_different_sizes_and_of_a_number(model, rng):
    data = batches(rng, (4, 1, 3, 4))
    norm = model.get_layer("first")
    with precise_batch_norm(model, iter(data), num_batches=3):
        x = np.concatenate([x for x, _ in data[:3]]).astype("float64")
        np.testing.assert_allclose(norm.moving_mean, x.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(norm.moving_variance, x.var((0, 1)), rtol=1e-5)


def test_frozen_layers_are_left_alone(model, rng):
    model.get_layer("first").trainable = False
    before = values(model.get_layer("first").weights)
    with precise_batch_norm(model, batches(rng)):
        assert_same(before, values(model.get_layer("first").weights))
        assert float(model.get_layer("block").norm.moving_mean[0]) != 0
    freeze_batch_norm(model)
    before = values(model.variables)
    with precise_batch_norm(model, None):  # nothing to read the batches for
        assert_same(before, values(model.variables))


class Spy(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.in_tests = []

    def on_test_batch_begin(self, batch, logs=None):
        self.in_tests.append(values([self.model.layers[0].moving_mean]))


def fitted(callbacks, data):
    keras.utils.set_random_seed(0)
    first = keras.layers.BatchNormalization(name="first")
    rest = [keras.layers.Flatten(), keras.layers.Dropout(0.3), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((6, 3)), first, *rest])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x, y = (np.concatenate(parts) for parts in zip(*data, strict=True))
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, validation_data=(x, y), verbose=0, callbacks=callbacks)
    return model, model.evaluate(x, y, batch_size=4, verbose=0, callbacks=callbacks)


def test_evaluation_in_fit(rng):
    """Exact statistics in every evaluation; the training is, to the last bit, that without."""
    data = batches(rng)
    spy = Spy()
    model, loss = fitted([PreciseBatchNormalization(data, num_batches=3), spy], data)
    (mean,) = spy.in_tests[0].values()
    np.testing.assert_allclose(mean, np.concatenate([x for x, _ in data]).mean((0, 1), dtype="float64"), rtol=1e-5)
    assert len(spy.in_tests) == 9
    plain_model, plain_loss = fitted([], data)
    assert_same(
        {str(i): value for i, value in enumerate(values(plain_model.weights).values())},
        {str(i): value for i, value in enumerate(values(model.weights).values())},
    )
    assert abs(loss - plain_loss) > 1e-3
    with precise_batch_norm(plain_model, data):
        x, y = (np.concatenate(parts) for parts in zip(*data, strict=True))
        assert plain_model.evaluate(x, y, batch_size=4, verbose=0) == pytest.approx(loss, rel=1e-5)


def test_a_broken_evaluation_leaves_the_averages(model, rng):
    before = values(model.variables)
    callback = PreciseBatchNormalization(batches(rng))
    callback.set_model(model)
    callback.on_test_begin()
    callback.on_train_batch_begin(0)  # no `on_test_end` came
    assert_same(before, values(model.variables))
    with pytest.raises(KeyError), precise_batch_norm(model, batches(rng)):
        raise KeyError
    assert_same(before, values(model.variables))

    def breaks():
        yield batches(rng)[0]
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), precise_batch_norm(model, breaks()):
        pass
    assert_same(before, values(model.variables))
    assert [norm.momentum for norm in batch_norms(model)] == [0.8, 0.99, 0.9]


def test_errors(model):
    for value in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"must be a positive integer. Received: num_batches={value}"):
            PreciseBatchNormalization([], num_batches=value)
    with pytest.raises(ValueError, match=r"`dataset` must hold a batch. Received: dataset=\[\]"):
        with precise_batch_norm(model, []):
            pass
