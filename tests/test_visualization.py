"""Pictures of attention: a planted look-alike is found where it is, and the drawn pixels say so."""

import sys

import keras
import numpy as np
import pytest
from PIL import Image

from keras_nonlocal import NonLocal3D
from keras_nonlocal.visualization import attention_in_pixels, attention_map, draw_attention, non_local_layers

SHAPE = (4, 8, 8, 3)


def colour_model(downsample=None, **options):
    """A Gaussian block on the pixels themselves, or on their means."""
    inputs = keras.Input(SHAPE)
    x = inputs if downsample is None else keras.layers.AveragePooling3D(downsample)(inputs)
    return keras.Model(inputs, NonLocal3D(pairwise="gaussian", scale=60.0, name="block", **options)(x))


def planted(**looks):
    """A black clip with red pixels: at 0..255, by positions."""
    clip = np.zeros(SHAPE, "uint8")
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


def test_finds_the_look_alike_in_another_frame():
    query, alike = (0, 1, 2), (3, 6, 5)
    clip = planted(_128=[query], _255=[alike])
    weights = attention_map(colour_model(), clip, query, preprocess_input=scaled)
    assert np.unravel_index(weights.argmax(), weights.shape) == alike
    np.testing.assert_allclose(weights.ravel(), gaussian(128 / 255, clip[..., 0].ravel() / 255), atol=1e-6)


def test_sees_only_its_window():
    query, inside, outside = (2, 1, 2), (3, 6, 5), (1, 4, 4)
    clip = planted(_128=[query], _255=[inside, outside])
    weights = attention_map(colour_model(window=(2, None, None)), clip, query, preprocess_input=scaled)
    assert np.unravel_index(weights.argmax(), weights.shape) == inside
    assert not weights[:2].any()
    np.testing.assert_allclose(weights[2:].ravel(), gaussian(128 / 255, clip[2:, ..., 0].ravel() / 255), atol=1e-6)


def test_names_the_pooled_key():
    query, alike = (0, 1, 2), (3, 6, 5)
    clip = planted(_128=[query], _255=[alike])
    weights = attention_map(colour_model(pool_size=(1, 2, 2)), clip, query, preprocess_input=scaled)
    assert weights.shape == (4, 4, 4)
    assert np.unravel_index(weights.argmax(), weights.shape) == (3, 3, 2)
    keys = clip[..., 0].reshape(4, 4, 2, 4, 2).max((2, 4)) / 255
    np.testing.assert_allclose(weights.ravel(), gaussian(128 / 255, keys.ravel()), atol=1e-6)


def test_asks_from_the_feature_that_holds_the_pixel():
    """Pixels (2..3, 6..7) of frames 0 and 1 are one feature; so are those of the look-alike."""
    clip = np.zeros(SHAPE, "uint8")
    clip[0:2, 2:4, 6:8, 0], clip[2:4, 4:6, 0:2, 0] = 128, 255
    model = colour_model(downsample=(2, 2, 2))
    for pixel in ((0, 2, 6), (1, 3, 7), (0, 3, 6)):
        weights = attention_map(model, clip, pixel, preprocess_input=scaled)
        assert np.unravel_index(weights.argmax(), weights.shape) == (1, 2, 0)
    elsewhere = attention_map(model, clip, (0, 4, 6), preprocess_input=scaled)
    np.testing.assert_allclose(elsewhere, 1 / 32, atol=1e-6)  # a black pixel tells nothing apart


def test_takes_the_last_layer_or_the_named_one():
    inputs = keras.Input(SHAPE)
    x = NonLocal3D(pairwise="gaussian", scale=60.0, window=(1, None, None), name="first")(inputs)
    model = keras.Model(inputs, NonLocal3D(pairwise="gaussian", scale=60.0, name="second")(x))
    assert non_local_layers(model) == ["first", "second"]
    clip = planted(_128=[(0, 1, 2)], _255=[(3, 6, 5)])
    first = attention_map(model, clip, (0, 1, 2), layer_name="first", preprocess_input=scaled)
    second = attention_map(model, clip, (0, 1, 2), preprocess_input=scaled)
    assert not first[1:].any() and second[3, 6, 5] > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": np.zeros((8, 8, 3))}, r"shape \(frames, height, width, 3\)\. Received: clip\.shape=\(8, 8, 3\)$"),
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
        attention_map(**(arguments | change))


def test_every_pixel_gets_the_weight_of_its_key():
    weights = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    pixels = attention_in_pixels(weights, (3, 4, 5, 3))
    top, bottom = [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]
    assert pixels[0].tolist() == pixels[1].tolist() == [top, top, bottom, bottom]
    assert pixels[2].tolist() == [[5, 5, 5, 6, 6]] * 2 + [[7, 7, 7, 8, 8]] * 2


# Drawing: frames of 8×8 pixels at a height of 80 pixels, 14 above for the titles, a gap of 4 between pictures.


@pytest.fixture
def drawn():
    clip = np.full(SHAPE, 100, "uint8")
    weights = np.zeros((4, 2, 2))
    weights[2, 1, 0], weights[1, 0, 1], weights[3, 0, 0] = 0.4, -0.2, 0.2
    return clip, weights, (0, 4, 4)


def pixel(sheet, column, row, y, x):
    return np.asarray(sheet)[14 + row * 84 + y, column * 84 + x].tolist()


def test_draws_weights_where_they_are(drawn, tmp_path):
    path = tmp_path / "a.png"
    sheet = draw_attention(*drawn, path, frame_height=80)
    assert sheet.size == (4 * 84 - 4, 2 * 80 + 4 + 14)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(sheet))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    for column in range(4):
        assert pixel(sheet, column, 0, 60, 70) == [100, 100, 100]  # the frame as it is
        assert pixel(sheet, column, 1, 60, 70) == [45, 45, 45]  # no weight: the frame, darkened
    assert pixel(sheet, 2, 1, 60, 20) == [255, 255, 255]  # the largest weight
    assert pixel(sheet, 2, 1, 39, 20) == [45, 45, 45]  # just above it
    assert pixel(sheet, 2, 1, 60, 40) == [45, 45, 45]  # just right of it
    # Half of the largest: 100 * (0.45 - 0.175), plus 0.6 of red and half yellow, or of blue for a negative weight.
    assert pixel(sheet, 3, 1, 20, 20) == [180, 104, 27]
    assert pixel(sheet, 1, 1, 20, 60) == [42, 58, 180]


def test_draws_the_query_in_its_frame(drawn, tmp_path):
    sheet = draw_attention(*drawn, tmp_path / "a.png", frame_height=80)
    for row in range(2):
        assert pixel(sheet, 0, row, 45, 42) == pixel(sheet, 0, row, 48, 45) == [255, 255, 255]
        assert pixel(sheet, 0, row, 45, 41) == pixel(sheet, 0, row, 49, 45) == [0, 0, 0]
    assert pixel(sheet, 0, 0, 45, 45) == [100, 100, 100]  # the pixel itself stays visible
    assert pixel(sheet, 1, 0, 45, 42) == [100, 100, 100]


def test_spreads_the_frames_and_begins_with_the_query(tmp_path):
    clip = np.broadcast_to(np.arange(10, dtype="uint8")[:, None, None, None] * 20, (10, 8, 8, 3))
    sheet = draw_attention(clip, np.ones((1, 1, 1)), (4, 0, 0), tmp_path / "a.png", max_frames=4, frame_height=80)
    assert sheet.size[0] == 4 * 84 - 4
    assert [pixel(sheet, column, 0, 70, 70)[0] // 20 for column in range(4)] == [4, 0, 5, 9]


def test_an_interrupted_drawing_leaves_the_old_file(drawn, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def save(self, scratch, format):
        with open(scratch, "wb") as file:
            file.write(b"half of a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space"):
        draw_attention(*drawn, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"old"


def test_takes_a_colour_map_of_matplotlib(drawn, tmp_path):
    sheet = draw_attention(*drawn, tmp_path / "a.png", frame_height=80, colormap="viridis")
    # viridis ends at (0.993248, 0.906157, 0.143936); 10 of the frame below shines through.
    assert pixel(sheet, 2, 1, 60, 20) == [255, 241, 46]
    assert pixel(sheet, 1, 1, 20, 60) == [42, 58, 180]  # negative weights stay blue


def test_says_what_to_install(drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"need Matplotlib: pip install 'keras-nonlocal\[viz\]'$"):
        draw_attention(*drawn, tmp_path / "a.png", colormap="viridis")
    assert list(tmp_path.iterdir()) == []
    draw_attention(*drawn, tmp_path / "a.png")  # the built-in colours need nothing
