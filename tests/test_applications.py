"""The networks: the paper's sizes, a forward pass by hand, weights that move between networks."""

import inspect
import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal import applications, layers
from keras_nonlocal.applications import (
    C2DResNet11,
    I3DResNet11,
    I3DResNet50,
    decode_predictions,
    folded,
    inflate_weights,
    preprocess_input,
    resnet,
)
from keras_nonlocal.applications.labels import kinetics400
from tests import reference
from tests.descriptors import layer_weights, randomise, summary

SHAPE = (8, 224, 224, 3)
GOLDEN = Path(__file__).parent / "goldens" / "models.json"


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def of(name, **options):
    # name="model" as in test_conformance, so that the same network is built once for both.
    return summary(getattr(applications, name), name="model", input_shape=SHAPE, **options)


# Sizes; parameters and multiply-adds are in test_summary.py


SLOW = pytest.mark.slow


def sizes(shapes):
    names = ["conv1_relu", "pool1", "pool2", "res2_2_out", "res3_3_out", "res4_5_out", "res5_2_out"]
    return [shapes[name][1:] for name in names]


def test_feature_maps():
    assert sizes(of("I3DResNet50", non_local=5)["shapes"]) == [
        (8, 112, 112, 64),
        (8, 55, 55, 64),
        (4, 55, 55, 256),
        (8, 55, 55, 256),
        (4, 28, 28, 512),
        (4, 14, 14, 1024),
        (4, 7, 7, 2048),
    ]


@pytest.mark.parametrize(("frames", "expected"), [(32, (16, 8, 4)), (128, (64, 32, 16))])
def test_frames_of_the_paper_stem(frames, expected):
    model = I3DResNet11(input_shape=(frames, 64, 64, 3), temporal_strides=(2, 2, 2))
    outputs = [model.get_layer(name).output.shape[1] for name in ("conv1_relu", "pool1", "pool2")]
    assert tuple(outputs) == expected


def test_pool1_padding():
    model = C2DResNet11(input_shape=SHAPE, pool1_padding="same")
    assert model.get_layer("pool1").output.shape == (None, 8, 56, 56, 16)
    assert model.get_layer("res3_0_out").output.shape[2:4] == (28, 28)


POSITIONS = {
    ("50", 1): ["4_4"],
    ("50", 5): ["3_1", "3_3", "4_1", "4_3", "4_5"],
    ("50", 10): [f"3_{i}" for i in range(4)] + [f"4_{i}" for i in range(6)],
    ("101", 1): ["4_21"],
    ("101", 5): ["3_1", "3_3", "4_6", "4_13", "4_20"],
    ("101", 10): [f"3_{i}" for i in range(4)] + [f"4_{i}" for i in (2, 6, 10, 14, 18, 22)],
}


@pytest.mark.parametrize(("size", "number"), POSITIONS)
def test_positions_of_non_local_blocks(size, number):
    placement = resnet.non_local_blocks(resnet.ARRANGEMENTS[size], number)
    names = [f"{stage}_{i}" for stage, indices in placement.items() for i in indices]
    assert names == POSITIONS[size, number]
    assert len(names) == number


FAMILIES = [f"{family}ResNet{size}" for family in ("C2D", "I3D") for size in ("50", "101")]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, marks=[SLOW] if number == 1 or "101" in name else [])
        for name in FAMILIES
        for number in (0, 1, 10)
    ],
)
def test_golden_weights_of_other_numbers_of_blocks(name, number):
    """The golden file has each network with 5 blocks, others are the same in other places: they need no file."""
    golden = json.loads(GOLDEN.read_text())[f"{name}_5"]
    of_block = {  # stage → weights of one of its blocks, without the name of the block
        stage: [(path.split("/", 1)[1], shape) for path, shape in golden.items() if path.startswith(start)]
        for stage, start in (("3", "nonlocal_conv3_1/"), ("4", f"nonlocal_conv{POSITIONS[name[9:], 5][-1]}/"))
    }
    expected = []
    for path, shape in golden.items():
        if path.startswith("nonlocal"):
            continue
        expected.append((path, shape))
        position = path[3 : path.index("_branch")] if "branch2c_bn/moving_variance" in path else None
        if number and position in POSITIONS[name[9:], number]:
            expected += [(f"nonlocal_conv{position}/{rest}", shape) for rest, shape in of_block[position[0]]]
    assert list(of(name, non_local=number)["weights"].items()) == expected


@pytest.mark.parametrize(("size", "name"), [("50", "I3DResNet50"), ("101", "I3DResNet101")])
def test_non_local_blocks_stand_after_their_residual_block(size, name):
    names = of(name, non_local=5)["layers"]
    expected = POSITIONS[size, 5]
    assert [n for n in names if n.startswith("nonlocal")] == [f"nonlocal_conv{p}" for p in expected]
    for position in expected:
        assert names[names.index(f"nonlocal_conv{position}") - 1] == f"res{position}_out"


@pytest.mark.parametrize(("name", "blocks"), [("I3DResNet50", (3, 4, 6, 3)), ("I3DResNet101", (3, 4, 23, 3))])
def test_inflated_kernels(name, blocks):
    printed = {2: [1, 1, 1], 3: [1, 0] * 2, 4: ([1, 0] * 12)[: blocks[2]], 5: [0, 1, 0]}
    weights = of(name, non_local=5)["weights"]
    assert weights["conv1/kernel"] == [5, 7, 7, 3, 64]
    for stage, inflated in printed.items():
        assert len(inflated) == blocks[stage - 2]
        for block, is_inflated in enumerate(inflated):
            kernels = [weights[f"res{stage}_{block}_branch2{c}/kernel"][:3] for c in "abc"]
            assert kernels == [[3 if is_inflated else 1, 1, 1], [1, 3, 3], [1, 1, 1]]
            assert (f"res{stage}_{block}_branch1/kernel" in weights) == (block == 0)
    plain = of(name.replace("I3D", "C2D"), non_local=5)["weights"]
    assert all(shape[0] == 1 for path, shape in plain.items() if len(shape) == 5)


def test_inflated_kernels_of_3x3x3():
    weights = {w.path: list(w.shape) for w in I3DResNet11(non_local=0, inflation="3x3x3").weights}
    assert weights["res3_0_branch2a/kernel"][:3] == [1, 1, 1]
    assert weights["res3_0_branch2b/kernel"][:3] == [3, 3, 3]
    assert weights["res3_1_branch2b/kernel"][:3] == [1, 3, 3]


# Folded layers


CONVOLUTIONS = [
    {"kernel_size": (1, 3, 3)},
    {"kernel_size": (1, 3, 3), "padding": "same"},
    {"kernel_size": (1, 3, 2), "strides": (1, 2, 3)},
    {"kernel_size": (1, 3, 3), "strides": (1, 2, 2), "padding": "same", "use_bias": False},
    {"kernel_size": (1, 1, 1), "strides": (1, 2, 2), "activation": "relu"},
    {"kernel_size": (1, 2, 2), "dilation_rate": (1, 2, 2)},
    {"kernel_size": (3, 1, 1), "padding": "same"},
    {"kernel_size": (3, 3, 3), "strides": (2, 2, 2)},
    {"kernel_size": (1, 3, 3), "strides": (2, 1, 1)},
]
POOLINGS = [
    {"pool_size": (1, 3, 3), "strides": (1, 2, 2)},
    {"pool_size": (2, 3, 3), "strides": (2, 2, 2)},
    {"pool_size": (2, 1, 1)},
    {"pool_size": (3, 1, 1), "strides": (1, 1, 1), "padding": "same"},
    {"pool_size": (2, 3, 2), "strides": (1, 3, 1), "padding": "same"},
    {"pool_size": 2},
    {"pool_size": (1, 1, 1), "strides": (2, 1, 2)},
]


def with_gradients(function, *arguments):
    arguments = [tf.constant(argument) for argument in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        outputs = function(*arguments)
        loss = tf.reduce_sum(outputs**2)
    return [outputs, *tape.gradient(loss, arguments)]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_folded_convolution(rng, options):
    x = rng.normal(size=(2, 5, 7, 6, 3)).astype("float32")
    plain = keras.layers.Conv3D(4, **options)
    plain.build(x.shape)
    randomise(plain)
    ours = folded.Conv3D(4, **options)
    ours.build((None, None, None, None, 3))
    ours.set_weights(plain.get_weights())
    kernel = np.asarray(plain.kernel)
    for layer in (plain, ours):
        layer.compare = with_gradients(lambda x, k, layer=layer: layer.convolution_op(x, k), x, kernel)
    for a, b in zip(ours.compare, plain.compare, strict=True):
        assert_close(a, b)
    assert_close(ours(x), plain(x))
    dynamic = tf.function(ours, input_signature=[tf.TensorSpec((None, None, None, None, 3))])
    assert_close(dynamic(x), plain(x))
    assert ours(keras.KerasTensor((None, None, 7, None, 3))).shape == (
        plain(keras.KerasTensor((None, None, 7, None, 3))).shape
    )


@pytest.mark.parametrize("options", POOLINGS, ids=str)
def test_folded_pooling(rng, options):
    x = rng.normal(size=(2, 5, 7, 6, 3)).astype("float32")
    plain, ours = keras.layers.MaxPooling3D(**options), folded.MaxPooling3D(**options)
    for a, b in zip(with_gradients(ours, x), with_gradients(plain, x), strict=True):
        assert_close(a, b, 1e-6)
    dynamic = tf.function(ours, input_signature=[tf.TensorSpec((None, None, None, None, 3))])
    np.testing.assert_array_equal(dynamic(x), plain(x))
    assert ours(keras.KerasTensor((None, 5, None, 6, 3))).shape == (
        plain(keras.KerasTensor((None, 5, None, 6, 3))).shape
    )


def test_frames_are_folded(rng):
    """The guard of the two tests above: single-frame kernels do not run in 3-D."""

    def operations(layer):
        function = tf.function(layer)
        graph = function.get_concrete_function(tf.TensorSpec((2, 5, 7, 6, 3))).graph
        return {operation.type for operation in graph.get_operations()}

    single, temporal = folded.Conv3D(4, (1, 3, 3)), folded.Conv3D(4, (3, 1, 1))
    assert "Conv2D" in operations(single) and "Conv3D" not in operations(single)
    assert "Conv3D" in operations(temporal)
    assert "MaxPool3D" not in operations(folded.MaxPooling3D((2, 3, 3)))


# Numbers


def twin_weights(model):
    return {
        layer.name: layer_weights(layer) if "nonlocal" in layer.name else layer.get_weights() for layer in model.layers
    }


@pytest.mark.parametrize("temporal_strides", [(1, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("builder", [C2DResNet11, I3DResNet11])
def test_forward_by_hand(rng, builder, temporal_strides):
    frames = 9 if temporal_strides == (2, 2, 2) else 4
    x = rng.normal(size=(2, frames, 33, 27, 3)).astype("float32")
    model = builder(input_shape=x.shape[1:], classes=6, non_local=1, temporal_strides=temporal_strides)
    randomise(model)
    expected = reference.resnet11(x, twin_weights(model), builder is I3DResNet11, temporal_strides)
    assert expected.std(0).max() > 1e-3  # the samples differ
    assert_close(model(x, training=False), expected, 1e-4)


def test_hyperparameters():
    model = I3DResNet11(classes=6)
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    blocks = [layer for layer in model.layers if isinstance(layer, layers.NonLocal3D)]
    assert len(norms) == 12 and len(blocks) == 2
    for norm in norms + [block.norm for block in blocks]:
        assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)
    for block in blocks:
        assert (block.pairwise, block.scale, block.pool_size) == (
            "embedded_gaussian",
            "sqrt",
            (1, 2, 2),
        )
        assert 0.008 < np.std(block.theta.kernel) < 0.012
        assert not np.any(block.norm.gamma)
    assert model.get_layer("dropout").rate == 0.5
    kernel = np.asarray(model.get_layer("res3_1_branch2b").kernel)  # He: std √(2 / fan-in)
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 32)) ** 0.5, rtol=0.1)
    assert 0.008 < np.std(model.get_layer("pred").kernel) < 0.012


def test_preprocess_input(rng):
    x = np.array([0, 114, 255], "uint8")
    expected = (np.array([0, 114, 255]) - 114.75) / 57.375
    for inputs in (x, tf.constant(x), x.astype("float64"), [0, 114, 255]):
        outputs = preprocess_input(inputs)
        assert outputs.dtype == "float32"
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    assert isinstance(preprocess_input(x), np.ndarray)
    assert x.tolist() == [0, 114, 255]
    symbolic = preprocess_input(keras.Input((4, 4, 3), dtype="uint8"))
    assert symbolic.dtype == "float32"


# Arguments of the builders


def test_heads(rng):
    x = rng.normal(size=(2, 4, 33, 27, 3)).astype("float32")
    options = {"input_shape": x.shape[1:], "non_local": 1}
    bare = randomise(C2DResNet11(include_top=False, **options))
    features = np.asarray(bare(x, training=False))
    assert features.shape == (2, 2, 4, 3, 128)
    logits = None
    for pooling, reduce in (("avg", np.mean), ("max", np.max)):
        model = C2DResNet11(include_top=False, pooling=pooling, **options)
        model.set_weights(bare.get_weights())
        assert_close(model(x, training=False), reduce(features, (1, 2, 3)))
    for activation in (None, "sigmoid", "softmax"):
        model = C2DResNet11(classes=7, classifier_activation=activation, **options)
        randomise(model)
        scores = np.float64(model(x, training=False))
        assert scores.shape == (2, 7)
        if activation is None:
            logits = scores
        elif activation == "sigmoid":
            assert_close(scores, 1 / (1 + np.exp(-logits)))
        else:
            assert_close(scores, reference.softmax(logits))


def test_defaults():
    model = C2DResNet11()
    assert model.input_shape == (None, None, None, None, 3)
    assert model.output_shape == (None, 400)
    assert model.name == "c2d_resnet11"
    assert I3DResNet11(name="mine").name == "mine"


@pytest.mark.filterwarnings("error:The structure of")
def test_input_tensor(rng):
    inputs = keras.Input((4, 33, 27, 3), dtype="uint8", name="clip")
    model = C2DResNet11(input_tensor=preprocess_input(inputs), classes=5, non_local=1)
    assert model.input_shape == (None, 4, 33, 27, 3)
    assert model.inputs[0] is inputs
    plain = C2DResNet11(input_shape=(4, 33, 27, 3), classes=5, non_local=1)
    plain.set_weights(model.get_weights())
    x = rng.integers(0, 256, (2, 4, 33, 27, 3)).astype("uint8")
    assert_close(model(x, training=False), plain(preprocess_input(x), training=False))


def test_non_local_argument():
    def blocks(**options):
        model = I3DResNet11(**options)
        return [layer for layer in model.layers if isinstance(layer, layers.NonLocal3D)]

    assert blocks(non_local=0) == []
    assert [b.name for b in blocks(non_local=1)] == ["nonlocal_conv3_1"]
    assert [b.name for b in blocks(non_local=2)] == ["nonlocal_conv3_0", "nonlocal_conv3_1"]
    found = blocks(
        non_local={2: [0], 3: [0]},
        non_local_options={"pairwise": "dot_product", "pool_size": None},
    )
    assert [b.name for b in found] == ["nonlocal_conv2_0", "nonlocal_conv3_0"]
    for block in found:
        assert (block.pairwise, block.pool_size, block.scale) == ("dot_product", None, "sqrt")
    assert set(resnet.RELEASE_OPTIONS) == {"pool_size", "scale", "kernel_initializer"}


@pytest.fixture
def channels_first():
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format(before)


def test_channels_first(channels_first):
    model = I3DResNet11(input_shape=(3, 4, 33, 27), include_top=False, pool1_padding="same")
    with pytest.raises(ValueError, match=r"at least 2 frames .*Received: input_shape=\(3, 1, 33, 27\)"):
        I3DResNet11(input_shape=(3, 1, 33, 27))
    keras.config.set_image_data_format("channels_last")
    last = I3DResNet11(input_shape=(4, 33, 27, 3), include_top=False, pool1_padding="same")
    assert model.output_shape == (None, 128, *last.output_shape[1:4])
    assert [w.shape for w in model.weights] == [w.shape for w in last.weights]


def test_public_builders_have_the_signature_of_keras_applications():
    start = "include_top weights input_tensor input_shape pooling classes classifier_activation name"
    for name in applications.__all__:
        if "ResNet" in name:
            parameters = list(inspect.signature(getattr(applications, name)).parameters)
            assert parameters[:8] == start.split()
            assert parameters[8] == "non_local"


def test_weights(rng, tmp_path):
    x = rng.normal(size=(1, 4, 33, 27, 3)).astype("float32")
    options = {"input_shape": x.shape[1:], "classes": 5}
    model = randomise(I3DResNet11(**options))
    expected = model(x, training=False)
    for name in ("a.weights.h5", "a.keras"):
        path = tmp_path / name
        model.save_weights(path) if name.endswith("h5") else model.save(path)
        for weights in (path, str(path)):
            loaded = I3DResNet11(weights=weights, **options)
            np.testing.assert_array_equal(loaded(x, training=False), expected)
    with pytest.raises(ValueError, match=r"`new_head=True` .* pred/kernel \(128, 6\)[^;]* 'pred/0' \(128, 5\)"):
        I3DResNet11(weights=path, input_shape=x.shape[1:], classes=6)


def features(model, names, x):
    """Outputs of the named layers."""
    outputs = [model.get_layer(name).output for name in names]
    return [np.asarray(y) for y in keras.tree.flatten(keras.Model(model.inputs[0], outputs)(x, training=False))]


def test_stride_in_1x1(rng):
    """The same as taking every second row and column, then no stride at all."""
    x = rng.normal(size=(2, 4, 33, 27, 3)).astype("float32")
    model = randomise(I3DResNet11(input_shape=x.shape[1:], stride_in_1x1=True))
    inputs, outputs = features(model, ("pool2", "res3_0_out"), x)
    assert outputs.shape[2:4] == (4, 3)

    def convolution(x, branch):
        (kernel,) = model.get_layer(f"res3_0_{branch}").get_weights()
        norm = model.get_layer(f"res3_0_{branch}_bn").get_weights()
        return reference.batch_norm(reference.conv3d(x, kernel, (1, 1, 1)), norm)

    half = np.float64(inputs)[:, :, ::2, ::2]
    y = convolution(reference.relu(convolution(half, "branch2a")), "branch2b")
    y = convolution(reference.relu(y), "branch2c")
    assert_close(outputs, reference.relu(y + convolution(half, "branch1")), 1e-5)
    weights = {w.path: w.shape for w in I3DResNet11().weights}
    assert {w.path: w.shape for w in model.weights} == weights


@pytest.mark.parametrize(("padding", "size"), [("valid", None), ("valid", 1), ("same", 1), ("same", 3)])
def test_pool1(rng, padding, size):
    x = rng.normal(size=(2, 9, 33, 27, 3)).astype("float32")
    options = {"temporal_strides": (1, 2, 2), "pool1_padding": padding, "pool1_temporal_size": size}
    model = randomise(C2DResNet11(input_shape=x.shape[1:], non_local=0, **options))
    inputs, outputs = features(model, ("conv1_relu", "pool1"), x)
    if padding == "same":
        inputs = np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    np.testing.assert_array_equal(outputs, reference.max_pool3d(inputs, (size or 2, 3, 3), (2, 2, 2)))


STATISTICS = {  # of ImageNet's pixels in 0..1, as torchvision prints them, and of its older networks in 0..255
    "torch": (np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255),
    "caffe": (np.array([123.68, 116.779, 103.939]), 1.0),
}


@pytest.mark.parametrize("pixels", STATISTICS)
def test_pixels(rng, tmp_path, pixels):
    x = rng.integers(0, 256, (2, 4, 33, 27, 3)).astype("uint8")
    mean, std = STATISTICS[pixels]
    model = randomise(C2DResNet11(input_shape=x.shape[1:], classes=5, pixels=pixels))
    (theirs,) = features(model, ["pixels"], preprocess_input(x))
    assert_close(theirs, (x - mean) / std, 1e-6)
    plain = C2DResNet11(input_shape=x.shape[1:], classes=5)
    assert [w.path for w in plain.weights] == [w.path for w in model.weights]
    plain.set_weights(model.get_weights())
    assert_close(model(preprocess_input(x), training=False), plain(theirs, training=False))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(theirs), model(theirs))


@pytest.mark.parametrize("pixels", STATISTICS)
def test_pixels_channels_first(rng, channels_first, pixels):
    model = C2DResNet11(input_shape=(3, 4, 33, 27), pixels=pixels)
    assert model.get_layer("pixels").output.shape == (None, 3, 4, 33, 27)
    x = rng.integers(0, 256, (2, 3, 4, 5, 6))
    mean, std = (np.broadcast_to(values, 3).reshape(3, 1, 1, 1) for values in STATISTICS[pixels])
    assert_close(model.get_layer("pixels")(preprocess_input(x)), (x - mean) / std, 1e-6)


def test_pixels_of_the_release_need_no_layer():
    assert "pixels" not in [layer.name for layer in C2DResNet11().layers]


def test_options_per_stage():
    options = {"pairwise": "dot_product", "scale": None, 3: {"window": (4, None, None), "pairwise": "gaussian"}}
    model = C2DResNet11(input_shape=(8, 64, 64, 3), non_local={2: [0], 3: (0, 1)}, non_local_options=options)
    found = {
        layer.name: (layer.pairwise, layer.window, layer.scale, layer.pool_size)
        for layer in model.layers
        if isinstance(layer, layers.NonLocal3D)
    }
    groups = ("gaussian", (4, None, None), None, (1, 2, 2))
    assert found == {
        "nonlocal_conv2_0": ("dot_product", None, None, (1, 2, 2)),
        "nonlocal_conv3_0": groups,
        "nonlocal_conv3_1": groups,
    }
    assert options[3] == {"window": (4, None, None), "pairwise": "gaussian"}


def test_groups_of_frames_do_not_see_each_other(rng):
    """Windows of 4 frames behind two strides of 2: half of a clip of 32 frames leaves the other half as it was."""
    options = {"temporal_strides": (2, 2, 1), "non_local_options": {3: {"window": (4, None, None)}}}
    x = rng.normal(size=(1, 32, 33, 27, 3)).astype("float32")
    other = np.concatenate([x[:, :16], x[:, 16:] + 1], axis=1)
    model = randomise(C2DResNet11(input_shape=x.shape[1:], include_top=False, non_local=1, **options))
    a, b = np.asarray(model(x, training=False)), np.asarray(model(other, training=False))
    assert a.shape[1] == 8
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 1e-3


WINDOW = {"window": (4, 3, None), "pool_size": (1, 2, 5)}
LEAST = [  # (builder, options, frames, height, width)
    (C2DResNet11, {"non_local": 0}, 2, 5, 5),  # res3 1 ← res2 1 ← conv1 3 ← 5
    (C2DResNet11, {}, 2, 13, 13),  # keys of 2×2 in res3: res3 2 ← res2 3 ← conv1 7 ← 13
    (I3DResNet11, {"pool1_padding": "same", "non_local": 0}, 2, 1, 1),
    (I3DResNet11, {"pool1_padding": "same"}, 2, 9, 9),  # res3 2 ← res2 3 ← conv1 5 ← 9
    (I3DResNet11, {"temporal_strides": (2, 2, 2)}, 7, 13, 13),  # pool2 2 ← pool1 2 · 2 ← conv1 7
    (I3DResNet11, {"temporal_strides": (2, 2, 2), "pool1_temporal_size": 1}, 5, 13, 13),
    (C2DResNet11, {"non_local_options": {3: WINDOW}}, 8, 21, 37),  # res3 4, 3, 5 ← res2 8, 5, 9 ← conv1 8, 11, 19
    (C2DResNet11, {"non_local": {2: [0]}, "non_local_options": {"window": (6, None, None)}}, 6, 9, 9),
]


@pytest.mark.parametrize(("builder", "options", "frames", "height", "width"), LEAST)
def test_least_sizes(builder, options, frames, height, width):
    least = (frames, height, width)
    model = builder(input_shape=(*least, 3), include_top=False, **options)
    assert min(model.output_shape[1:]) >= 1
    dynamic = builder(include_top=False, **options)
    for axis in range(3):
        less = tuple(size - (axis == i) for i, size in enumerate(least))
        with pytest.raises(ValueError, match=f"at least {frames} frames of height {height} and width {width} "):
            builder(input_shape=(*less, 3), **options)
        if 0 not in less:  # and indeed, one less leaves nothing
            with pytest.raises(ValueError):
                applications.summarize(dynamic, (*less, 3))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_clips_that_leave_nothing_to_pool(data_format):
    """A network of unknown sizes says so when it is called: the mean over nothing would be NaN."""
    options = {"pool_size": (2, 3, 3), "strides": (1, 1, 1), "data_format": data_format, "name": "pool"}
    layer, function = folded.MaxPooling3D(**options), tf.function(folded.MaxPooling3D(**options))
    for short in [(1, 3, 3), (2, 2, 3), (2, 3, 2)]:
        clip = np.zeros((1, 1, *short) if data_format == "channels_first" else (1, *short, 1), "float32")
        message = "'pool' must have at least 2 frames of height 3 and width 3. Received: inputs.shape="
        for call in (layer, function):
            with pytest.raises(ValueError, match=re.escape(f"{message}{clip.shape}")):
                call(clip)
    assert folded.MaxPooling3D(**options, padding="same")(clip).shape == clip.shape


def test_clips_that_are_too_short_or_too_small():
    model = C2DResNet11(classes=3)
    assert np.isfinite(model(np.zeros((1, 2, 13, 13, 3), "float32"))).all()
    for shape, layer in (((1, 1, 64, 64, 3), "pool2"), ((1, 2, 4, 64, 3), "pool1")):
        with pytest.raises(ValueError, match=rf"the inputs of '{layer}' must have at least .*Received: inputs\.shape="):
            model(np.zeros(shape, "float32"))
    with pytest.raises(ValueError, match=r"`pool_size` must not be larger than the map"):
        model(np.zeros((1, 2, 12, 13, 3), "float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, r"`classes` must be an integer of at least 1\. Received: classes=0$"),
        ({"classes": 4.0}, r"`classes` must be .*Received: classes=4\.0$"),
        ({"dropout": 1}, r"`dropout` must be a number from 0 to below 1\. Received: dropout=1$"),
        ({"dropout": "half"}, r"`dropout` must be .*Received: dropout='half'$"),
        ({"pixels": "tf"}, r"`pixels` must be one of 'release', 'torch', 'caffe'\. Received: pixels='tf'$"),
        ({"pixels": "torch", "input_shape": (8, 64, 64, 1)}, r"must have 3 channels with pixels='torch'\. Received"),
        ({"pool1_temporal_size": 0}, r"`pool1_temporal_size` must be .*Received: pool1_temporal_size=0$"),
        ({"temporal_strides": (1, 0, 1)}, r"`temporal_strides` must be .*temporal_strides=\(1, 0, 1\)$"),
        ({"input_shape": 64}, r"`input_shape` must have 4 .*Received: input_shape=64$"),
        ({"non_local": True}, r"`non_local` must be one of 0, 1, 2, or .*Received: non_local=True$"),
        ({"non_local": [3]}, r"`non_local` must be one of .*Received: non_local=\[3\]$"),
        ({"non_local": {3: 1}}, r"`non_local` must be one of .*Received: non_local=\{3: 1\}$"),
        ({"non_local": {3: ["1"]}}, r"`non_local` must be one of .*Received: non_local=\{3: \['1'\]\}$"),
        ({"non_local": {"3": [1]}}, r"`non_local` must name stages .*Received: non_local=\{'3': \[1\]\}$"),
        (
            {"non_local_options": ["scale"]},
            r"`non_local_options` must be a dictionary .*non_local_options=\['scale'\]$",
        ),
        ({"non_local_options": {3: 4}}, r"`non_local_options` must be a dictionary .*non_local_options=\{3: 4\}$"),
        ({"non_local_options": {4: {}}}, r"stages that have non-local blocks \(\[3\]\); 4 is none\. Received: non_loc"),
        ({"non_local": 0, "non_local_options": {3: {}}}, r"have non-local blocks \(\[\]\); 3 is none\. Received"),
        ({"non_local_options": {"windows": 1}}, r"of `NonLocal3D`; 'windows' is none\. The nearest: window\. Received"),
        ({"non_local_options": {3: {"pool": 1}}}, r"'pool' is none\. The nearest: .*pool.*Received: non_local_opt"),
        (
            {"non_local_options": {"name": "mine"}},
            r"'name' is none\. .*Received: non_local_options=\{'name': 'mine'\}$",
        ),
        ({"non_local_options": {"pairwise": "euclid"}}, r"Received: pairwise='euclid'"),
        ({"non_local_options": {"window": (4, None)}}, r"`window` must be .*Received: window=\(4, None\)$"),
    ],
)
def test_errors_of_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        C2DResNet11(**options)


def test_arguments_that_nothing_needs_are_not_looked_at():
    model = C2DResNet11(include_top=False, classes=None, dropout=None, non_local=0, non_local_options={"scale": 1})
    assert model.output_shape[-1] == 128


# Names of classes


def test_kinetics_class_names():
    names = kinetics400()
    assert len(set(names)) == 400
    assert list(names) == sorted(names)
    assert all(name == name.strip() and name for name in names)
    # As the release numbers them (process_data/kinetics/classids.json).
    numbers = {0: "abseiling", 5: "archery", 173: "jumpstyle dancing", 290: "sharpening knives", 399: "zumba"}
    assert {index: names[index] for index in numbers} == numbers


def test_decode_predictions():
    scores = np.zeros((2, 400), "float32")
    scores[0, [5, 173, 399]] = 0.25, 0.5, 0.125
    scores[1, 290] = 1
    for predictions in (scores, tf.constant(scores), scores.tolist()):
        first, second = decode_predictions(predictions, top=3)
        assert first == [(173, "jumpstyle dancing", 0.5), (5, "archery", 0.25), (399, "zumba", 0.125)]
        assert second == [(290, "sharpening knives", 1.0), (0, "abseiling", 0.0), (1, "air drumming", 0.0)]
    assert len(decode_predictions(scores)[0]) == 5
    assert decode_predictions(np.ones((1, 2)), top=2, class_names=["a", "b"]) == [[(0, "a", 1.0), (1, "b", 1.0)]]


@pytest.mark.parametrize("dtype", ["uint8", "uint64", "bool", "int8", "float16"])
def test_decode_predictions_of_every_type(dtype):
    scores = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    expected = [[(1, "b", 1.0), (2, "c", 1.0), (0, "a", 0.0)], [(0, "a", 1.0), (1, "b", 0.0), (2, "c", 0.0)]]
    assert decode_predictions(scores, top=3, class_names="abc") == expected


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 399), {}, r"the shape \(samples, 400\), .*Received: predictions\.shape=\(2, 399\)$"),
        ((400,), {}, r"`predictions` must have .*Received: predictions\.shape=\(400,\)$"),
        ((1, 3), {"class_names": "ab"}, r"\(samples, 2\), .*Received: predictions\.shape=\(1, 3\)$"),
        ((1, 400), {"top": 0}, r"`top` must be an integer from 1 to 400\. Received: top=0$"),
        ((1, 3), {"class_names": "abc", "top": 4}, r"`top` must be an integer from 1 to 3\. Received: top=4$"),
        ((1, 400), {"top": 2.0}, r"`top` must be .*Received: top=2\.0$"),
    ],
)
def test_errors_of_decode_predictions(shape, options, message):
    with pytest.raises(ValueError, match=message):
        decode_predictions(np.ones(shape), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"input_tensor": keras.Input((8, 64, 64, 3)), "input_shape": (9, 64, 64, 3)},
            r"Received: input_shape=\(9, 64,",
        ),
        ({"weights": "imagenet.ckpt"}, r"there is no such file\. Received: weights='imagenet.ckpt'"),
        ({"weights": "no.weights.h5"}, r"there is no such file\. Received: weights='no.weights.h5'"),
        ({"non_local": 3}, r"`non_local` must be one of 0, 1, 2, or .*Received: non_local=3"),
        (
            {"non_local": {6: [0]}},
            r"`non_local` must name stages .*\(1, 2\).*non_local=\{6: \[0\]\}",
        ),
        (
            {"non_local": {3: [2]}},
            r"`non_local` must name stages .*Received: non_local=\{3: \[2\]\}",
        ),
        ({"inflation": "5x1x1"}, r"`inflation` must be .*Received: inflation='5x1x1'"),
        ({"pool1_padding": 1}, r"`pool1_padding` must be .*Received: pool1_padding=1"),
        ({"pooling": "mean"}, r"`pooling` must be .*Received: pooling='mean'"),
        ({"temporal_strides": (1, 2)}, r"`temporal_strides` must be .*temporal_strides=\(1, 2\)"),
        (
            {"input_shape": (8, 8, 3)},
            r"`input_shape` must have 4 .*Received: input_shape=\(8, 8, 3\)",
        ),
        (
            {"input_shape": (1, 64, 64, 3)},
            r"at least 2 frames.*Received: input_shape=\(1, 64, 64, 3\)",
        ),
    ],
)
def test_errors_of_builders(options, message):
    with pytest.raises(ValueError, match=message):
        C2DResNet11(**options)


def test_non_local_of_a_stage_that_the_small_network_lacks():
    with pytest.raises(ValueError, match=r"stages 2 to 3 .*Received: non_local=\{4: \[0\]\}"):
        C2DResNet11(non_local={4: [0]})


# Inflation


def still_video(rng, frames):
    image = rng.normal(size=(2, 1, 33, 27, 3)).astype("float32")
    return image, np.repeat(image, frames, axis=1)


@pytest.mark.parametrize("builder", [C2DResNet11, I3DResNet11])
def test_inflated_weights_on_a_still_video(rng, builder):
    image_model = C2DResNet11(temporal_strides=(1, 1, 1), non_local=0, include_top=False)
    randomise(image_model)
    video_model = builder(non_local=0, include_top=False)
    assert inflate_weights(image_model, video_model) == []
    image, video = still_video(rng, 16)
    expected = np.asarray(image_model(image, training=False))
    outputs = np.asarray(video_model(video, training=False))
    if builder is I3DResNet11:  # zero padding in time reaches 2 + 1 frames, and after pool2 1 step
        assert outputs.shape[1] == 8
        assert np.abs(outputs[:, :1] - expected).max() > 1e-2
        outputs = outputs[:, 3:5]
    assert_close(outputs, np.broadcast_to(expected, outputs.shape), 1e-5)


def test_inflation_from_a_2d_network(rng):
    inputs = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    outputs = keras.layers.Dense(2, name="head")(keras.layers.GlobalAveragePooling2D()(x))
    image_model = randomise(keras.Model(inputs, outputs))
    inputs = keras.Input((6, 9, 9, 3))
    x = keras.layers.Conv3D(4, (3, 3, 3), name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = layers.NonLocal3D(name="block")(x)
    outputs = keras.layers.Dense(2, name="head")(keras.layers.GlobalAveragePooling3D()(x))
    video_model = keras.Model(inputs, outputs)
    assert inflate_weights(image_model, video_model) == ["block"]
    kernel = np.asarray(video_model.get_layer("conv").kernel)
    for t in range(3):
        assert_close(kernel[t], np.asarray(image_model.get_layer("conv").kernel) / 3, 1e-6)
    image = rng.normal(size=(2, 9, 9, 3)).astype("float32")
    video = np.repeat(image[:, None], 6, axis=1)
    assert_close(video_model(video), image_model(image))


def test_layers_that_inflation_leaves():
    image_model = randomise(C2DResNet11(temporal_strides=(1, 1, 1), non_local=0, classes=10))
    video_model = I3DResNet11(non_local=2, classes=4)
    before = [video_model.get_layer(name).get_weights() for name in ("pred", "nonlocal_conv3_0")]
    left = inflate_weights(image_model, video_model)
    assert left == ["nonlocal_conv3_0", "nonlocal_conv3_1", "pred"]
    after = [video_model.get_layer(name).get_weights() for name in ("pred", "nonlocal_conv3_0")]
    for a, b in zip(sum(before, []), sum(after, []), strict=True):
        np.testing.assert_array_equal(a, b)
    same_head = I3DResNet11(non_local=0, classes=10)
    assert inflate_weights(image_model, same_head) == []


def test_errors_of_inflation():
    inputs = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(4, 3, name="conv1")(inputs)
    image_model = keras.Model(inputs, keras.layers.Conv2D(4, 5, name="conv2")(x))
    inputs = keras.Input((6, 9, 9, 3))
    x = keras.layers.Conv3D(4, 3, name="conv1")(inputs)
    video_model = keras.Model(inputs, keras.layers.Conv3D(4, 3, name="conv2")(x))
    before = video_model.get_weights()
    with pytest.raises(ValueError, match=r"The layer 'conv2' needs .*\(3, 3, 3, 4, 4\).*Received: \[\(5, 5, 4, 4\)"):
        inflate_weights(image_model, video_model)
    for a, b in zip(before, video_model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)  # conv1, which fits, included
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="other")
    with pytest.raises(ValueError, match=r"`image_model` must have .*Received: image_model='other'"):
        inflate_weights(other, video_model)


@SLOW
def test_big_network_runs():
    """One published network, forward, on the smallest clip."""
    model = I3DResNet50(input_shape=(2, 32, 32, 3), classes=3, dropout=0.0)
    scores = model(np.zeros((1, 2, 32, 32, 3), "float32"), training=False)
    np.testing.assert_allclose(np.sum(scores), 1.0, rtol=1e-5)


def test_short_clip_in_input_tensor():
    with pytest.raises(ValueError, match=r"at least 2 frames.*Received: input_shape=\(1, 64, 64, 3\)"):
        applications.C2DResNet11(input_tensor=keras.Input((1, 64, 64, 3)))
    with pytest.raises(ValueError, match="must be a Keras tensor. Received: input_tensor=<class 'int'>"):
        applications.C2DResNet11(input_tensor=3)


def test_center_inflation_gives_the_image_networks_responses_to_every_frame():
    image_model = randomise(applications.C2DResNet11(temporal_strides=(1, 1, 1), non_local=0, include_top=False))
    options = {"temporal_strides": (1, 1, 1), "non_local": 0, "include_top": False}
    video_model = applications.I3DResNet11(**options)
    assert applications.inflate_weights(image_model, video_model, method="center") == []
    clip = np.random.default_rng(0).normal(size=(1, 5, 33, 27, 3)).astype("float32")
    frames = np.concatenate([np.asarray(image_model(clip[:, t : t + 1])) for t in range(5)], axis=1)
    np.testing.assert_allclose(video_model(clip), frames, atol=1e-5 * np.abs(frames).max())
    with pytest.raises(ValueError, match=r'"average" or "center". Received: method=\'mean\'$'):
        applications.inflate_weights(image_model, video_model, method="mean")
