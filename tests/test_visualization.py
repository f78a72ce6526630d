"""Attention of a position: a planted look-alike is found where it is, in the pixels of the clip."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal import NonLocal3D
from keras_nonlocal.applications import C2DResNet11, I3DResNet11
from keras_nonlocal.applications.folded import Conv3D, MaxPooling3D
from keras_nonlocal.ops import PAIRWISE
from keras_nonlocal.visualization import attend, attention, non_local_layers
from keras_nonlocal.visualization.geometry import find_place

SHAPE = (4, 8, 8, 3)


def colour_model(downsample=None, **options):
    """A Gaussian block on the pixels themselves, or on their means."""
    inputs = keras.Input(SHAPE)
    x = inputs if downsample is None else keras.layers.AveragePooling3D(downsample)(inputs)
    return keras.Model(inputs, NonLocal3D(pairwise="gaussian", scale=60.0, name="block", **options)(x))


def planted(shape=SHAPE, **looks):
    """A black clip with red pixels: at 0..255, by positions."""
    clip = np.zeros(shape, "uint8")
    for level, positions in looks.items():
        for position in positions:
            clip[position][0] = int(level[1:])
    return clip


def scaled(pixels):
    return np.asarray(pixels, "float32") / 255


def gaussian(query, keys):
    """exp(60 q·k) over all keys, normalised, in float64."""
    f = np.exp(60.0 * query * np.asarray(keys, "float64"))
    return f / f.sum()


# Weights


def test_finds_the_look_alike_in_another_frame():
    query, alike = (0, 1, 2), (3, 6, 5)
    clip = planted(_128=[query], _255=[alike])
    found = attend(colour_model(), clip, query, preprocess_input=scaled)
    assert (found.position, found.query, found.layer_name, found.clip_shape) == (query, query, "block", SHAPE[:3])
    np.testing.assert_allclose(found.weights.ravel(), gaussian(128 / 255, clip[..., 0].ravel() / 255), atol=1e-6)
    np.testing.assert_array_equal(found.pixels(), found.weights)
    centres, weights = found.strongest(1)
    assert centres.tolist() == [list(alike)] and weights.tolist() == [found.weights.max()]


def test_sees_only_its_window():
    query, inside, outside = (2, 1, 2), (3, 6, 5), (1, 4, 4)
    clip = planted(_128=[query], _255=[inside, outside])
    found = attend(colour_model(window=(2, None, None)), clip, query, preprocess_input=scaled)
    assert np.unravel_index(found.weights.argmax(), found.weights.shape) == inside
    assert not found.weights[:2].any()
    np.testing.assert_allclose(
        found.weights[2:].ravel(), gaussian(128 / 255, clip[2:, ..., 0].ravel() / 255), atol=1e-6
    )
    centres, weights = found.strongest(1000)
    assert len(centres) == len(weights) == 2 * 8 * 8 and centres[:, 0].min() == 2  # none of weight 0


def test_a_block_with_a_mask_is_refused():
    inputs = keras.Input(SHAPE)
    mask = keras.ops.any(inputs > 0, axis=-1)
    model = keras.Model(inputs, NonLocal3D(name="block")(inputs, mask=mask))
    with pytest.raises(ValueError, match="without a mask. Received: layer_name='block', which is called on 2 tensors"):
        attend(model, np.zeros(SHAPE, "uint8"))


def test_takes_the_last_layer_or_the_named_one():
    inputs = keras.Input(SHAPE)
    x = NonLocal3D(pairwise="gaussian", scale=60.0, window=(1, None, None), name="first")(inputs)
    model = keras.Model(inputs, NonLocal3D(pairwise="gaussian", scale=60.0, name="second")(x))
    assert non_local_layers(model) == ["first", "second"]
    clip = planted(_128=[(0, 1, 2)], _255=[(3, 6, 5)])
    first = attend(model, clip, (0, 1, 2), layer_name="first", preprocess_input=scaled).weights
    second = attend(model, clip, (0, 1, 2), preprocess_input=scaled).weights
    assert not first[1:].any() and second[3, 6, 5] > 0.9


@pytest.mark.parametrize("options", [{}, {"pool_size": (1, 3, 2)}, {"window": (2, 4, None), "pool_size": (2, 3, 2)}])
def test_the_most_attended_position(options, monkeypatch):
    """Against all rows of weights at once; in chunks, and in windows."""
    monkeypatch.setattr(attention, "MAX_WEIGHTS", 2000)
    rng = np.random.default_rng(0)
    clip = np.maximum(planted(_255=[(2, 4, 3)], _250=[(1, 2, 6)]), rng.integers(0, 15, SHAPE).astype("uint8"))
    model = colour_model(**options)
    found = attend(model, clip, preprocess_input=scaled)
    everywhere = np.argwhere(np.ones(SHAPE[:3]))
    weights = np.asarray(model.get_layer("block").attention(scaled(clip[None]), everywhere))[0].mean(axis=0)
    t, y, x = np.unravel_index(weights.argmax(), weights.shape)
    centres = [axis[k] for axis, k in zip(found.centres, (t, y, x), strict=True)]
    assert found.position == tuple(int(np.ceil(centre - 0.5)) for centre in centres) == found.query
    if not options:
        assert found.position == (2, 4, 3)


# Places: what a position of the map sees, against the gradients of the map


def positive(model):
    """Weights above 0, so that no gradient cancels or is cut off."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.path.endswith("kernel"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape) / np.prod(weight.shape[:-1]))
    return model


def assert_sees_what_is_said(model, name, clip_sizes, samples=1, at_edges=True):
    """Every position along each axis has gradients to exactly the pixels that are said to be seen.

    `at_edges`: also where these begin or end outside of the clip. Maxima never choose what is half of padding, and a
    dilated kernel may step over the edge.
    """
    place = find_place(model, name, clip_sizes, (samples, *clip_sizes, 3))
    clips = tf.constant(np.random.default_rng(1).uniform(1, 2, (samples, *clip_sizes, 3)).astype("float32"))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(clips)
        features = place.features(clips)
        sums = [tf.unstack(tf.reduce_sum(features, [a for a in range(5) if a != axis + 1])) for axis in range(3)]
    for axis, (one, pixels) in enumerate(zip(place.axes, clip_sizes, strict=True)):
        assert len(sums[axis]) == features.shape[axis + 1] > 1
        for position, value in enumerate(sums[axis]):
            others = [a for a in range(5) if a != axis + 1]
            seen = np.flatnonzero(np.abs(tape.gradient(value, clips)).max(axis=tuple(others)))
            first, last = one.first + position * one.step, one.last + position * one.step
            assert seen[0] == max(first, 0) or (first < 0 and not at_edges), (axis, position)
            assert seen[-1] == min(last, pixels - 1) or (last >= pixels and not at_edges), (axis, position)
            assert one.centres(position + 1)[position] == (first + last) / 2
    return place


def shortcut(x):
    """A residual block of two branches that see different pixels."""
    branch = keras.layers.Conv3D(2, (3, 5, 3), (1, 2, 2), padding="same")(x)
    gate = keras.layers.GlobalAveragePooling3D(keepdims=True)(branch)
    x = keras.layers.Conv3D(2, 1, (1, 2, 2))(x)
    return keras.layers.Add()([x, keras.layers.Multiply()([branch, keras.ops.stop_gradient(gate)])])


def nested(x):
    inner = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.ZeroPadding3D(((1, 0), (2, 1), (0, 3))),
            Conv3D(2, (2, 3, 3), (1, 2, 2)),
        ]
    )
    image = keras.Input(inner.output_shape[2:])
    y = keras.layers.SeparableConv2D(2, 3, strides=2, padding="same")(image)
    each_frame = keras.Model(image, keras.layers.DepthwiseConv2D(2)(y))
    return keras.layers.TimeDistributed(each_frame)(inner(x))


STACKS = {
    "same, odd and even": lambda x: keras.layers.Conv3D(2, (2, 4, 7), (2, 2, 3), padding="same")(
        keras.layers.Conv3D(2, (3, 3, 2), (1, 2, 2), padding="same")(x)
    ),
    "dilation and cropping": lambda x: keras.layers.Cropping3D(((1, 0), (3, 1), (0, 2)))(
        keras.layers.Conv3D(2, (2, 3, 3), dilation_rate=(1, 3, 2), padding="same")(x)
    ),
    "unpadded pooling": lambda x: keras.layers.AveragePooling3D((1, 3, 2), (1, 2, 2))(
        keras.layers.AveragePooling3D((2, 3, 3), (1, 2, 2))(x)
    ),
    "padded pooling": lambda x: keras.layers.AveragePooling3D((3, 3, 4), (2, 2, 3), padding="same")(x),
    "branches": shortcut,
    "nested": nested,
    "each frame": lambda x: keras.layers.TimeDistributed(keras.layers.Conv2D(2, (3, 5), strides=(2, 3)))(x),
}


@pytest.mark.parametrize("stack", STACKS)
def test_places_are_those_of_the_gradients(stack):
    sizes = (6, 23, 26)
    inputs = keras.Input((*sizes, 3))
    x = STACKS[stack](inputs)
    model = positive(keras.Model(inputs, NonLocal3D(name="block")(x)))
    assert_sees_what_is_said(model, "block", sizes, at_edges="dilation" not in stack)


@pytest.mark.parametrize(
    ("network", "options", "centre"),
    [
        (C2DResNet11, {}, (0.5, 2.0, 2.0)),
        (I3DResNet11, {"temporal_strides": (2, 2, 1), "inflation": "3x3x3", "pool1_padding": "same"}, (1.0, 0.0, 0.0)),
    ],
)
def test_places_in_a_network(network, options, centre):
    model = positive(network(classes=2, **options))
    # Of 4 samples, as each maximum has a gradient to one of its inputs.
    place = assert_sees_what_is_said(model, "nonlocal_conv3_0", (12, 49, 38), samples=4, at_edges=False)
    assert [axis.step for axis in place.axes][1:] == [8, 8]
    assert tuple(axis.centres(1)[0] for axis in place.axes) == centre


def test_repeated_and_unknown_positions():
    inputs = keras.Input((4, 12, 12, 3))
    x = keras.layers.Conv3D(2, (1, 3, 3), (1, 2, 2))(inputs)  # centres 1, 3, 5, 7, 9
    x = NonLocal3D(name="repeated")(keras.layers.UpSampling3D((1, 2, 2))(x))
    x = keras.layers.Lambda(lambda x: x[:, ::2, :, ::5], output_shape=(2, 10, 2, 2))(x)  # nobody knows how
    x = NonLocal3D(name="changed")(x)
    x = keras.layers.Reshape((2, 5, 4, 2))(x)
    model = keras.Model(inputs, NonLocal3D(name="reshaped")(x))

    def centres(name, *sizes):
        axes = find_place(model, name, (4, 12, 12), (1, 4, 12, 12, 3)).axes
        return [axis.centres(size).tolist() for axis, size in zip(axes, sizes, strict=True)]

    frames, rows, _ = centres("repeated", 4, 6, 10)
    assert frames == [0, 1, 2, 3] and rows == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert centres("changed", 2, 3, 2) == [[0.5, 2.5], pytest.approx([0.1, 1.3, 2.5]), [2.5, 8.5]]
    assert centres("reshaped", 2, 2, 3) == [[0.5, 2.5], pytest.approx([0.7, 3.1]), [1, 4, 7]]


# Planted patterns: what is lit, in pixels

CLIP = (8, 83, 55)


def peaked(x, kernel_size, strides, data_format=None):
    """A convolution whose response falls off from the middle, to all sides; each channel by itself."""
    taps = np.ones((1, 1, 1))
    for axis, size in enumerate(kernel_size):
        shape = [1, 1, 1]
        shape[axis] = size
        taps = taps * (np.minimum(np.arange(size), np.arange(size)[::-1]) + 1.0).reshape(shape)
    layer = keras.layers.Conv3D(3, kernel_size, strides, use_bias=False, data_format=data_format)
    y = layer(x)
    layer.set_weights([(taps / taps.max())[..., None, None] * np.eye(3)])
    return y


def patterns_model(channels_first=False, **options):
    """Two unpadded strided convolutions, of which each position of their map sees 15×15 pixels of 3 frames, and a
    block whose θ and φ are the identity."""
    data_format = "channels_first" if channels_first else "channels_last"
    inputs = keras.Input((3, None, None, None) if channels_first else (None, None, None, 3))
    x = peaked(inputs, (3, 3, 3), (1, 2, 2), data_format)
    x = peaked(x, (1, 7, 7), (1, 2, 2), data_format)
    layer = NonLocal3D(inner_channels=3, name="block", data_format=data_format, **options)
    model = keras.Model(inputs, layer(x))
    for projection in (layer.theta, layer.phi):
        if projection is not None:
            projection.set_weights([4 * np.eye(3), np.zeros(3)])
    if layer.score_kernel is not None:
        layer.score_kernel.assign([[0.0], [0.0], [0.0], [1.0], [0.0], [0.0]])
    return model


# The map: frames 1 to 6 of the clip, rows 7, 11, … (18 of them), columns likewise (11). Steps of 2 positions keep the
# phase of a pattern to the map, and to keys of 2 positions.
STEPS = (2, 8, 8)


def assert_lights_the_look_alike(model, rng, in_window=lambda query, alike: True, keys=STEPS):
    """A red pixel somewhere and its look-alike whole keys away: the second's pixel is as bright as any."""
    found = 0
    while found < 3:
        query = tuple(int(rng.integers(low, high)) for low, high in ((1, 7), (7, 75), (7, 45)))
        alike = tuple(
            int(rng.choice(np.arange(p % step, high, step)))
            for p, step, high in zip(query, STEPS, (7, 75, 45), strict=True)
        )
        between = any((p - 7) % 4 == 2 for p in query[1:])  # two positions of the map, as near to one as to the other
        if query == alike or between or min(alike[0] - 1, alike[1] - 7, alike[2] - 7) < 0:
            continue
        if not in_window(query, alike):
            continue
        found += 1
        clip = planted((*CLIP, 3), _255=[query, alike])
        result = attend(model, clip, query, preprocess_input=scaled)
        heat = result.pixels()
        assert heat.shape == CLIP
        np.testing.assert_allclose(heat[alike], heat.max(), rtol=1e-4)
        lit = {tuple(centre) for centre in result.strongest(2)[0].tolist()}
        for place in (query, alike):  # and nothing else is
            assert any(all(abs(c - p) <= s / 2 for c, p, s in zip(centre, place, keys, strict=True)) for centre in lit)
        third = np.sort(np.abs(result.weights), axis=None)[-3]
        assert third < heat.max() * (1 - 1e-4)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("pool_size", [None, (2, 2, 2)])
def test_look_alikes_with_every_pairwise_function(pairwise, pool_size, rng):
    assert_lights_the_look_alike(patterns_model(pairwise=pairwise, pool_size=pool_size), rng)


def test_look_alikes_in_windows(rng):
    """Groups of 2 frames and 6 rows; sub-sampling cuts off 2 of 11 columns."""
    model = patterns_model(pairwise="gaussian", window=(2, 6, None), pool_size=(1, 2, 3), scale=4.0)

    def in_window(query, alike):
        windows = [((t - 1) // 2, round((y - 7) / 4) // 6) for t, y, _ in (query, alike)]
        same_phase = (query[2] - alike[2]) % 12 == 0  # of keys of 3 columns
        return (
            windows[0] == windows[1] and (query[1] - alike[1]) % 8 == 0 and same_phase and max(query[2], alike[2]) < 41
        )

    assert_lights_the_look_alike(model, rng, in_window, keys=(1, 8, 12))


def test_look_alikes_with_channels_first(rng):
    first, last = (
        patterns_model(channels_first, pairwise="dot_product", pool_size=(1, 2, 2)) for channels_first in (True, False)
    )
    assert_lights_the_look_alike(first, rng)
    clip = rng.integers(0, 255, (*CLIP, 3)).astype("uint8")
    assert attend(first, clip).position == attend(last, clip).position


def test_pixels_by_hand():
    """10 positions with centres 3, 7, …, 39, windows of 5, keys of 2: rows 4 and 9 of the map belong to no key."""
    inputs = keras.Input((1, 43, 43, 3))
    x = keras.layers.AveragePooling3D((1, 3, 3), (1, 2, 2))(inputs)
    x = keras.layers.AveragePooling3D((1, 3, 3), (1, 2, 2))(x)
    model = keras.Model(inputs, NonLocal3D(pairwise="gaussian", window=(1, 5, 10), pool_size=(1, 2, 10))(x))
    found = attend(model, np.zeros((1, 43, 43, 3), "uint8"), (0, 17, 20))
    assert found.query == (0, 3, 4)  # row 17 lies between the centres 15 and 19, column 20 next to 19
    assert [axis.tolist() for axis in found.centres] == [[0], [5, 13, 25, 33], [21]]
    rows = [0] * 10 + [1] * 8 + [-1] * 4 + [2] * 8 + [3] * 8 + [-1] * 5
    assert found.keys[1].tolist() == rows
    np.testing.assert_allclose(found.weights[0, :, 0], [0.5, 0.5, 0, 0])
    expected = np.isin(rows, (0, 1))[:, None] * np.full((1, 43), 0.5)
    np.testing.assert_allclose(found.pixels()[0], expected)


def test_a_block_in_a_nested_model(rng):
    """The same weights and places as of the flat model."""
    block = colour_model(downsample=(1, 2, 2), pool_size=(1, 2, 1))
    inputs = keras.Input(SHAPE)
    outer = keras.Model(
        inputs,
        keras.layers.Flatten()(
            block(keras.layers.Cropping3D((0, (1, 0), 0))(keras.layers.ZeroPadding3D((0, (1, 0), 0))(inputs)))
        ),
    )
    assert non_local_layers(outer) == [f"{block.name}/block"]
    clip = rng.integers(0, 255, SHAPE).astype("uint8")
    flat, inner = (attend(model, clip, (1, 3, 4), preprocess_input=scaled) for model in (block, outer))
    assert (inner.query, inner.layer_name) == (flat.query, f"{block.name}/block")
    np.testing.assert_array_equal(inner.weights, flat.weights)
    np.testing.assert_array_equal(inner.pixels(), flat.pixels())


def test_a_network_for_any_size(rng):
    """As that of the same weights for one size; another size has a map of its own."""
    fixed, free = (C2DResNet11(input_shape=shape, classes=2) for shape in ((4, 40, 56, 3), (None, None, None, 3)))
    free.set_weights(fixed.get_weights())
    clip = rng.integers(0, 255, (6, 48, 56, 3)).astype("uint8")
    for position in ((3, 20, 30), None):
        one, other = (attend(model, clip[:4, :40], position) for model in (fixed, free))
        assert (one.position, one.query) == (other.position, other.query)
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
    assert one.weights.shape == (2, 2, 3) and attend(free, clip).weights.shape == (3, 3, 3)


def test_sizes_that_nobody_knows_before_the_run():
    inputs = keras.Input(SHAPE)
    x = keras.layers.Lambda(lambda x: x[:, ::2, 2:], output_shape=(None, None, None, 3))(inputs)
    x = keras.layers.Conv3D(3, (1, 1, 3))(x)
    found = attend(keras.Model(inputs, NonLocal3D(name="block")(x)), np.zeros(SHAPE, "uint8"), (2, 7, 7))
    assert found.weights.shape == (2, 6, 6) and found.query == (1, 5, 5)
    assert found.centres[0].tolist() == [0.5, 2.5]
    np.testing.assert_allclose(found.centres[1], (np.arange(6) + 0.5) * 8 / 6 - 0.5)


def test_leaves_the_model_as_it_was(rng):
    model = C2DResNet11(input_shape=(4, 32, 32, 3), classes=2)
    clip = rng.integers(0, 255, (4, 32, 32, 3)).astype("uint8")
    before = model(scaled(clip[None]))
    weights = model.get_weights()
    attend(model, clip)
    attend(model, clip, layer_name="nonlocal_conv3_0")
    for layer in model.layers:
        assert layer.output is not None  # which raises if the layer was called once more
    np.testing.assert_array_equal(model(scaled(clip[None])), before)
    for value, old in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": np.zeros((8, 8, 3))}, r"shape \(frames, height, width, 3\)\. Received: clip\.shape=\(8, 8, 3\)$"),
        ({"clip": np.zeros((4, 8, 9, 3))}, r"takes, \(None, 4, 8, 8, 3\), by .* which becomes \(1, 4, 8, 9, 3\)$"),
        ({"position": (4, 0, 0)}, r"inside of \(4, 8, 8\)\. Received: position=\(4, 0, 0\)$"),
        ({"position": (0, -1, 0)}, r"inside of \(4, 8, 8\)\. Received: position=\(0, -1, 0\)$"),
        ({"position": (0, 0)}, r"\(t, y, x\) inside of \(4, 8, 8\)\. Received: position=\(0, 0\)$"),
        ({"layer_name": "nothing"}, r"which has \['block'\]\. Received: layer_name='nothing'$"),
        (
            {"model": keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(2)])},
            r"which has \[\]\. Received: layer_name=None$",
        ),
    ],
)
def test_errors_say_what_was_expected(change, message):
    arguments = {"model": colour_model(), "clip": np.zeros(SHAPE, "uint8"), "position": (0, 0, 0)}
    with pytest.raises(ValueError, match=message):
        attend(**(arguments | change))


def test_more_errors():
    two = [keras.Input(SHAPE), keras.Input(SHAPE)]
    model = keras.Model(two, NonLocal3D()(keras.layers.Add()(two)))
    with pytest.raises(ValueError, match=r"one input, the clips\. Received: model with 2 inputs$"):
        attend(model, np.zeros(SHAPE, "uint8"))
    with pytest.raises(ValueError, match=r"`count` must be at least 1\. Received: count=0$"):
        attend(colour_model(), np.zeros(SHAPE, "uint8")).strongest(0)


def test_folded_layers_are_windows():
    """Ours are subclasses of Keras' layers, so that one row of the table has both."""
    inputs = keras.Input((4, 20, 20, 3))
    x = MaxPooling3D((2, 3, 3), (2, 2, 2))(Conv3D(2, (1, 3, 3), (1, 2, 2))(inputs))
    place = find_place(keras.Model(inputs, NonLocal3D(name="b")(x)), "b", (4, 20, 20), (1, 4, 20, 20, 3))
    assert [(axis.first, axis.last, axis.step) for axis in place.axes] == [(0, 1, 2), (0, 6, 4), (0, 6, 4)]
