"""The keypoint head: its graph by hand, and its non-local blocks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal.applications import heads, keypoint_head, summarize
from tests.descriptors import randomise

SHAPE = (4, 3, 5)


@pytest.fixture(autouse=True)
def few_channels(monkeypatch):
    monkeypatch.setattr(heads, "CHANNELS", 8)


def expected_weights(channels, input_channels, keypoints, blocks, inner):
    for number in range(1, 9):
        yield f"conv_fcn{number}/kernel", (3, 3, input_channels if number == 1 else channels, channels)
        yield f"conv_fcn{number}/bias", (channels,)
        if number in blocks:
            for name, shape in {
                **{name: (channels, inner) for name in ("theta", "phi", "g")},
                "out": (inner, channels),
            }.items():
                yield f"nonlocal_conv_fcn{number}/{name}/kernel", shape
                yield f"nonlocal_conv_fcn{number}/{name}/bias", shape[1:]
    yield "kps_score_lowres/kernel", (4, 4, keypoints, channels)
    yield "kps_score_lowres/bias", (keypoints,)


def names_and_shapes(model):
    return [(weight.path, tuple(weight.shape)) for weight in model.weights]


def test_weights_and_sizes_of_the_paper(monkeypatch):
    monkeypatch.undo()
    model = keypoint_head()
    assert model.input_shape == (None, 14, 14, 256) and model.output_shape == (None, 56, 56, 17)
    assert names_and_shapes(model) == list(expected_weights(512, 256, 17, (2, 4, 6, 8), 256))
    sizes = summarize(model)
    convolutions = 196 * 9 * 512 * (256 + 7 * 512)
    deconvolution = 196 * 512 * 16 * 17
    blocks = 4 * (4 * 196 * 512 * 256 + 2 * 196 * 196 * 256)
    assert sizes.macs == convolutions + deconvolution + blocks
    assert sizes.non_local_macs == blocks
    # Detectron's MSRAFill: N(0, 2 / fan-out), which is far from fan-in where channels differ.
    kernel = np.asarray(model.get_layer("conv_fcn1").kernel)
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 512)) ** 0.5, rtol=0.01)
    assert np.abs(kernel).max() > 3 * kernel.std()  # not truncated
    kernel = np.asarray(model.get_layer("kps_score_lowres").kernel)
    np.testing.assert_allclose(kernel.std(), (2 / (16 * 512)) ** 0.5, rtol=0.01)


@pytest.mark.parametrize("number", range(5))
def test_numbers_of_blocks(number):
    model = keypoint_head(SHAPE, 3, number)
    blocks = (2, 4, 6, 8)[:number]
    assert names_and_shapes(model) == list(expected_weights(8, 5, 3, blocks, 4))
    names = [layer.name for layer in model.layers]
    for block in blocks:
        assert names[names.index(f"nonlocal_conv_fcn{block}") - 1] == f"conv_fcn{block}"


def test_starts_as_the_head_without_blocks(rng):
    x = rng.normal(size=(2, *SHAPE)).astype("float32")
    plain = randomise(keypoint_head(SHAPE, 3, 0))
    for options in ({}, {"normalization": "batch", "pairwise": "gaussian", "pool_size": 2}):
        model = keypoint_head(SHAPE, 3, non_local_options=options)
        for layer in plain.layers:
            model.get_layer(layer.name if layer.weights else "kps_score").set_weights(layer.get_weights())
        np.testing.assert_array_equal(model(x), plain(x))
    block = model.get_layer("nonlocal_conv_fcn8")
    assert (block.pairwise, block.normalization, block.pool_size) == ("gaussian", "batch", (2, 2))


def convolve(x, kernel, bias):
    """3×3 with zeros outside."""
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return bias + sum(
        x[:, i : i + height, j : j + width] @ np.float64(kernel[i, j]) for i in range(3) for j in range(3)
    )


def deconvolve(x, kernel, bias):
    """Every input adds its kernel to 4×4 outputs at stride 2; the outermost row and column are cut off."""
    batch, height, width, _ = x.shape
    y = np.zeros((batch, 2 * height + 2, 2 * width + 2, kernel.shape[2]))
    for i in range(height):
        for j in range(width):
            y[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("bc,hwkc->bhwk", x[:, i, j], np.float64(kernel))
    return y[:, 1:-1, 1:-1] + bias


def upsample(x):
    """×2 bilinear, centres of pixels at halves, the border repeated."""
    for axis in (1, 2):
        x = np.moveaxis(x, axis, 0)
        before, after = np.concatenate([x[:1], x[:-1]]), np.concatenate([x[1:], x[-1:]])
        y = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=1)
        x = np.moveaxis(y.reshape(-1, *x.shape[1:]), 0, axis)
    return x


def test_by_hand(rng):
    x = rng.normal(size=(2, *SHAPE)).astype("float32")
    model = randomise(keypoint_head(SHAPE, 3, 0))
    y = x
    for number in range(1, 9):
        y = np.maximum(convolve(y, *model.get_layer(f"conv_fcn{number}").get_weights()), 0)
    y = upsample(deconvolve(y, *model.get_layer("kps_score_lowres").get_weights()))
    outputs = np.asarray(model(x))
    assert outputs.shape == (2, 16, 12, 3)
    assert outputs.min() < 0  # logits
    np.testing.assert_allclose(outputs, y, atol=1e-4 * np.abs(y).max())


def test_upsampling_of_a_step():
    layer = keypoint_head(SHAPE, 1, 0).get_layer("kps_score")
    row = np.array([0.0, 4.0, 8.0], "float32").reshape(1, 1, 3, 1)
    outputs = np.asarray(layer(row))
    assert outputs[0, :, :, 0].tolist() == [[0, 1, 3, 5, 7, 8]] * 2


def test_gradients_reach_every_weight(rng):
    x = rng.normal(size=(2, *SHAPE)).astype("float32")
    model = randomise(keypoint_head(SHAPE, 3))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x, training=True) ** 2)
    gradients = tape.gradient(loss, model.trainable_weights)
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        # φ's bias adds the same to every score of a query, which a softmax does not see.
        if not weight.path.endswith("phi/bias"):
            assert np.abs(gradient).max() > 0, weight.path


def test_channels_first_and_unknown_sizes():
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        first = keypoint_head((5, 4, 3), 3)
    finally:
        keras.config.set_image_data_format(before)
    assert first.output_shape == (None, 3, 16, 12)
    last = keypoint_head((None, None, 5), 3, name="mine")
    assert last.output_shape == (None, None, None, 3) and last.name == "mine"
    assert names_and_shapes(first) == names_and_shapes(last)


def test_scores_are_float32(policy):
    policy("mixed_float16")
    model = keypoint_head(SHAPE, 3)
    assert model.output.dtype == "float32"
    assert model.get_layer("conv_fcn1").compute_dtype == "float16"


def test_saves(tmp_path, rng):
    x = rng.normal(size=(2, *SHAPE)).astype("float32")
    model = randomise(keypoint_head(SHAPE, 3))
    model.save(tmp_path / "head.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "head.keras")(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (14, 14)}, r"`input_shape` must have 3 .*Received: input_shape=\(14, 14\)$"),
        ({"input_shape": (14, 14, None)}, r"channels must be known\. Received: input_shape=\(14, 14, None\)$"),
        ({"num_keypoints": 0}, r"`num_keypoints` must be .*Received: num_keypoints=0$"),
        ({"non_local": 5}, r"`non_local` must be an integer from 0 to 4\. Received: non_local=5$"),
        ({"non_local": True}, r"`non_local` must be .*Received: non_local=True$"),
        ({"non_local_options": 3}, r"`non_local_options` must be a dictionary .*Received: non_local_options=3$"),
        ({"non_local_options": {"scales": 1}}, r"of `NonLocal2D`; 'scales' is none\. The nearest: scale\. Received"),
        ({"non_local_options": {2: {}}}, r"2 is none\. The nearest: .*Received: non_local_options=\{2: \{\}\}$"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        keypoint_head(**options)
