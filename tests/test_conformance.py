"""Every layer and every model keeps every contract of a Keras layer or model."""

import inspect
import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from tests import descriptors
from tests.backends import assert_close, assert_equal, dtype_of, to_numpy, weight_gradients
from tests.descriptors import ALL, LARGE, LAYERS, SMALL, randomise

GOLDENS = Path(__file__).parent / "goldens"
FILES = (GOLDENS / "layers.json", GOLDENS / "models.json")
UPDATE = os.environ.get("KNL_UPDATE_GOLDENS") == "1"

every_layer = pytest.mark.parametrize("descriptor", LAYERS, ids=lambda d: d.name)
every_small = pytest.mark.parametrize("descriptor", SMALL, ids=lambda d: d.name)

# Contracts that trace or compile run on these by default, on the others with the slow tests.
QUICK = (
    "NonLocal1D_chunks",
    "NonLocal2D_window_pool_chunks",
    "NonLocal3D_default",
    "NonLocal3D_gaussian_pool",
    "NonLocal3D_concatenation_window",
    "NonLocal3D_release",
    "NonLocal3D_space_only",
    "NonLocal3D_time_only",
    "I3DResNet11",
)


def costly(every):
    return pytest.mark.parametrize(
        "descriptor",
        [d if d.name in QUICK else pytest.param(d, marks=pytest.mark.slow) for d in every],
        ids=lambda d: d.name,
    )


def ready(descriptor, **options):
    """A model with random weights, its inputs, and its outputs, unlike a fresh model's."""
    model = descriptor.model(**options)
    x = descriptor.inputs()
    fresh = to_numpy(model(x, training=False))
    randomise(model)
    expected = to_numpy(model(x, training=False))
    assert np.isfinite(expected).all() and np.abs(expected - fresh).max() > 1e-3
    return model, x, expected


# Configuration


def as_json(config):
    return json.dumps(keras.saving.serialize_keras_object(config), sort_keys=True)


@every_layer
def test_config_of_layers(descriptor):
    layer = descriptor.make(dtype="mixed_bfloat16", trainable=False)
    config = layer.get_config()
    copy = type(layer).from_config(config)
    assert as_json(copy.get_config()) == as_json(config)
    json.dumps(config)  # plain values only
    names = set(inspect.signature(type(layer)).parameters) - {"kwargs"}
    assert names <= set(config)
    assert copy.dtype_policy.name == "mixed_bfloat16" and not copy.trainable


@every_layer
def test_attributes_are_the_arguments(descriptor):
    layer = descriptor.make()
    for name, value in descriptor.options.items():
        attribute = getattr(layer, name)
        if name in ("pool_size", "window") and isinstance(value, int):
            value = (value,) * layer.rank
        if name.endswith("initializer") and isinstance(value, str):
            value = keras.initializers.get(value)
            assert type(attribute) is type(value)
            continue
        assert attribute == value
    for name, parameter in inspect.signature(type(layer)).parameters.items():
        if name in descriptor.options or not hasattr(parameter, "default") or name == "kwargs":
            continue
        if parameter.default is None and name != "data_format":
            assert getattr(layer, name) is None


@every_layer
def test_build_changes_no_config(descriptor):
    layer = descriptor.make()
    before = as_json(layer.get_config())
    layer.build((None, *descriptor.input_shape))
    assert as_json(layer.get_config()) == before
    layer(descriptor.inputs())
    assert as_json(layer.get_config()) == before


@every_small
def test_config_of_models(descriptor):
    model = descriptor.model()
    copy = type(model).from_config(model.get_config())
    assert as_json(copy.get_config()) == as_json(model.get_config())
    assert [w.shape for w in copy.weights] == [w.shape for w in model.weights]
    assert [w.path for w in copy.weights] == [w.path for w in model.weights]


# Sizes


@every_layer
def test_output_shape(descriptor):
    layer = descriptor.make()
    for shape in ((2, *descriptor.input_shape), (None,) * len(descriptor.input_shape) + (6,)):
        assert layer.compute_output_shape(shape) == shape
        assert layer(keras.KerasTensor(shape)).shape == shape


# Saving


@every_small
def test_keras_file(descriptor, tmp_path):
    model, x, expected = ready(descriptor)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(loaded(x, training=False), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    other = descriptor.model()
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal(other(x, training=False), expected)


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
@pytest.mark.parametrize(
    "descriptor",
    [d for d in LAYERS if d.name.split("_", 1)[1] in ("gaussian_pool", "window_pool_chunks", "release")],
    ids=lambda d: d.name,
)
def test_quantized(descriptor, tmp_path):
    """`model.quantize` reaches the projections, which are dense layers, and files keep what it did."""
    model, x, expected = ready(descriptor)
    model.quantize("int8")
    kernels = [weight.path.split("/")[-2] for weight in model.weights if dtype_of(weight) == "int8"]
    embedded = descriptor.options.get("pairwise") != "gaussian"
    assert sorted(kernels) == (["g", "out", "phi", "theta"] if embedded else ["g", "out"])
    quantized = to_numpy(model(x, training=False))
    assert (quantized != expected).any()
    assert_close(quantized - x, expected - x, 0.03)
    for _ in range(2):  # what was loaded can be saved
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        assert_equal(model(x, training=False), quantized)


# Numbers


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
@costly(SMALL)
def test_mixed_precision(descriptor, precision, policy):
    model, x, expected = ready(descriptor)
    policy(precision)
    half = descriptor.model()
    half.set_weights(model.get_weights())
    outputs = half(x, training=False)
    is_head = not descriptor.is_layer and descriptor.options.get("include_top", True)
    assert dtype_of(outputs) == ("float32" if is_head else precision.removeprefix("mixed_"))
    assert all(weight.dtype == "float32" for weight in half.weights)
    assert np.isfinite(to_numpy(outputs)).all()
    assert_close(outputs, expected, descriptor.tolerance)
    _, gradients = weight_gradients(half, lambda z: ops.mean(ops.cast(z, "float32") ** 2), x, training=True)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


@every_small
def test_gradient_reaches_every_weight(descriptor):
    model, x, expected = ready(descriptor)
    direction = np.random.default_rng(1).normal(size=expected.shape).astype("float32")
    _, gradients = weight_gradients(model, lambda z: ops.sum(ops.multiply(z, direction)), x, training=False)
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        if weight.path.endswith("phi/bias") and _is_softmax(model, weight):
            continue  # adds the same to all scores of a query: a softmax does not see it
        assert np.abs(gradient).max() > 1e-7, weight.path


def _is_softmax(model, weight):
    layer = model.get_layer(weight.path.split("/")[-3])
    return layer.pairwise == "embedded_gaussian"


@every_layer
def test_channels_first(descriptor):
    layer = descriptor.make(data_format="channels_last")
    x = descriptor.inputs()
    layer.build(x.shape)
    randomise(layer)
    expected = to_numpy(layer(x))
    first = descriptor.make(data_format="channels_first")
    first_x = np.moveaxis(x, -1, 1)
    assert first(keras.KerasTensor((None, *first_x.shape[1:]))).shape == (None, *first_x.shape[1:])
    first.set_weights(layer.get_weights())
    assert_equal(np.moveaxis(to_numpy(first(first_x)), 1, -1), expected)


@costly(LAYERS)
def test_fit(descriptor):
    model, x, _ = ready(descriptor)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    losses = model.fit(x, np.zeros_like(x), epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


# Names and shapes of weights, which files on people's disks depend on


def weights_of(descriptor):
    if descriptor.large:
        options = descriptor.options | {"name": "model", "input_shape": descriptor.input_shape}
        return descriptors.summary(descriptor.constructor, **options)["weights"]
    keras.utils.clear_session(free_memory=False)
    if descriptor.is_layer:
        layer = descriptor.make(name="block")
        layer.build((None, *descriptor.input_shape))
        return {weight.path: list(weight.shape) for weight in layer.weights}
    return {weight.path: list(weight.shape) for weight in descriptor.model().weights}


def golden_file(descriptor):
    return FILES[0 if descriptor.is_layer else 1]


@pytest.mark.parametrize("descriptor", ALL, ids=lambda d: d.name)
def test_golden_weights(descriptor):
    file, weights = golden_file(descriptor), weights_of(descriptor)
    assert len(set(weights)) == len(weights)
    if UPDATE:
        goldens = json.loads(file.read_text()) if file.exists() else {}
        goldens[descriptor.name] = weights
        lines = (
            f"  {json.dumps(name)}: {{\n    "
            + ",\n    ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in goldens[name].items())
            + "\n  }"
            for name in sorted(goldens)
        )
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    golden = json.loads(file.read_text())[descriptor.name]
    assert list(weights.items()) == list(golden.items()), (
        "Names or shapes of weights changed: saved files no longer load. If so meant, run with "
        "KNL_UPDATE_GOLDENS=1 and say so in the change log."
    )


def test_goldens_have_no_more_than_the_list():
    names = {name for file in FILES for name in json.loads(file.read_text())}
    assert names == {descriptor.name for descriptor in ALL}


def test_the_list_is_complete():
    assert set(QUICK) <= {descriptor.name for descriptor in SMALL}
    from keras_nonlocal import applications, layers

    used = {descriptor.constructor.__name__ for descriptor in ALL}
    public = {name for name in applications.__all__ if "ResNet" in name}
    public |= {name for name in vars(layers) if name.startswith("NonLocal")}
    assert used == public
    assert len(LARGE) == 4
