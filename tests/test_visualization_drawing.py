"""Pictures and videos of attention, read back; and those in TensorBoard."""

import io
import sys

import av
import keras
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_nonlocal import NonLocal3D
from keras_nonlocal.visualization import (
    Attention,
    AttentionLogger,
    attend,
    draw_arrows,
    draw_attention,
    drawing,
    write_attention_video,
)

GREY = 100
CLIP = np.full((5, 40, 60, 3), GREY, "uint8")
TOP, GAP = 20, 4  # of the sheet: the title, and what is between two pictures


def attention(weights, position=(2, 15, 25)):
    """Of keys of 10×10 pixels, by `(frame, row, column)` of the key."""
    values = np.zeros((5, 4, 6), "float32")
    for key, weight in weights.items():
        values[key] = weight
    sizes, key_sizes = CLIP.shape[:3], values.shape
    keys = tuple(np.arange(size) * number // size for size, number in zip(sizes, key_sizes, strict=True))
    centres = tuple((np.arange(n) + 0.5) * size / n - 0.5 for size, n in zip(sizes, key_sizes, strict=True))
    return Attention(values, position, (2, 1, 2), "block", sizes, keys, centres)


def cell(picture, column, row, key_row, key_column):
    """The middle of a key in the sheet, drawn at twice the clip's size."""
    left, top = column * (120 + GAP), TOP + row * (80 + GAP)
    return np.asarray(picture)[top + 20 * key_row + 10, left + 20 * key_column + 10].astype(int)


def bar(picture):
    """The colours from the left to the right end of the legend."""
    return np.asarray(picture)[-34, 4 : 4 + 220].astype(int)


@pytest.fixture
def texts(monkeypatch):
    """All that is written into pictures."""
    written = []
    write = drawing._Sheet._text

    def spied(sheet, x, y, text):
        written.append(text)
        write(sheet, x, y, text)

    monkeypatch.setattr(drawing._Sheet, "_text", spied)
    return written


def test_overlay_is_bright_where_the_weights_are(tmp_path, texts):
    found = attention({(2, 3, 1): 0.1, (4, 0, 5): 0.75, (1, 2, 2): 0.15})
    path = tmp_path / "a.png"
    picture = draw_attention(CLIP, found, path, frame_height=80)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    shown = [2, 0, 1, 3, 4]  # the query's, then the others
    assert texts[:5] == ["frame 2 (query)", "frame 0", "frame 1", "frame 3", "frame 4"]
    light = {}
    for column, frame in enumerate(shown):
        for row, key in np.ndindex(4, 6):
            if (frame, row, key) == (2, 1, 2):
                continue  # below the query's mark
            assert cell(picture, column, 0, row, key).tolist() == [GREY] * 3
            colour = cell(picture, column, 1, row, key)
            if found.weights[frame, row, key]:
                light[frame, row, key] = colour.sum()
            else:
                assert colour.tolist() == [60] * 3  # the frame, darkened
    assert list(light) == [(2, 3, 1), (1, 2, 2), (4, 0, 5)] == sorted(light, key=light.get)
    # The largest weight has nine tenths of the scale's last colour.
    np.testing.assert_allclose(cell(picture, 4, 1, 0, 5), 0.9 * np.array(drawing.SEQUENTIAL[-1]) + 6, atol=1)
    assert bar(picture)[[0, -1]].tolist() == [list(drawing.SEQUENTIAL[0]), list(drawing.SEQUENTIAL[-1])]
    assert texts[5:] == ["0", "0.75", "block, weight of each key", "asked: frame 2, row 15, column 25"]
    # The mark: a white square around the middle of pixel (15, 25).
    pixels = np.asarray(picture)[TOP : TOP + 80, :120]
    rows, columns = np.nonzero((pixels == 255).all(axis=-1))
    assert (rows.min() + rows.max(), columns.min() + columns.max()) == (2 * 31, 2 * 51)


def test_signed_weights_are_red_and_blue_on_a_scale_around_0(texts):
    picture = draw_attention(CLIP, attention({(0, 0, 0): -0.25, (0, 3, 5): 0.5, (3, 1, 1): -0.02}), frame_height=80)
    weak_blue, negative, positive = (
        cell(picture, column, 1, *key) for column, key in ((3, (1, 1)), (1, (0, 0)), (1, (3, 5)))
    )
    assert positive[0] > 200 and positive[0] > 2 * positive[1:].max()
    assert negative[2] > 150 and negative[2] > 1.3 * negative[:2].max()
    assert 60 < weak_blue[2] < negative[2] and weak_blue.argmax() == 2
    assert cell(picture, 1, 1, 2, 2).tolist() == [60] * 3
    colours = bar(picture)
    assert colours[0].argmax() == 2 and colours[-1].argmax() == 0 and np.ptp(colours[110]) <= 3
    red, blue = colours[:, 0], colours[:, 2]
    assert (np.diff(red)[:110] >= 0).all() and (np.diff(blue)[110:] <= 0).all()
    assert [text for text in texts if text[-1].isdigit() and "a" not in text] == ["-0.5", "0", "0.5"]


def test_colour_maps_of_matplotlib(monkeypatch):
    from matplotlib import colormaps

    picture = draw_attention(CLIP, attention({(0, 0, 0): 1.0}), colormap="viridis")
    expected = np.rint(255 * np.array(colormaps["viridis"]([0.0, 1.0]))[:, :3])
    np.testing.assert_array_equal(bar(picture)[[0, -1]], expected)
    picture = draw_attention(CLIP, attention({(0, 0, 0): -1.0}), colormap="coolwarm")
    expected = np.rint(255 * np.array(colormaps["coolwarm"]([0.0, 1.0]))[:, :3])
    np.testing.assert_array_equal(bar(picture)[[0, -1]], expected)
    with pytest.raises(ValueError, match=r"one of Matplotlib's\. Received: colormap='no'$"):
        draw_attention(CLIP, attention({}), colormap="no")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-nonlocal\[viz\]'$"):
        draw_attention(CLIP, attention({}), colormap="viridis")


@pytest.fixture
def arrows(monkeypatch):
    """`(start, end, width)` of all that are drawn, in pixels of the sheet."""
    drawn = []
    draw = drawing._draw_arrow

    def spied(context, start, end, bend, width, colour, edge):
        drawn.append(((start / 3).tolist(), (end / 3).tolist(), width / 3))
        draw(context, start, end, bend, width, colour, edge)

    monkeypatch.setattr(drawing, "_draw_arrow", spied)
    return drawn


def test_arrows_lead_to_the_strongest(tmp_path, arrows, texts):
    weights = {(4, 3, 5): 0.5, (1, 0, 0): -0.25, (2, 1, 2): 0.2, (0, 2, 3): 0.01}
    path = tmp_path / "a.png"
    picture = draw_arrows(CLIP, attention(weights), path, count=3, frame_height=80)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    assert texts[:5] == ["frame 2 (query)", "frame 0", "frame 1", "frame 3", "frame 4"]
    assert "asked: frame 2, row 15, column 25; 3 strongest of 120" in texts
    # The weakest first, so that the strongest is on top. Drawn at twice the size.
    start, step = [51, TOP + 31], 120 + GAP
    assert [arrow[:2] for arrow in arrows] == [
        (start, [2 * 25, TOP + 2 * 15]),
        (start, [2 * step + 2 * 5, TOP + 2 * 5]),
        (start, [4 * step + 2 * 55, TOP + 2 * 35]),
    ]
    assert [round(width, 6) for _, _, width in arrows] == [0.8 + 1.2 * share for share in (0.4, 0.5, 1.0)]
    pixels = np.asarray(picture).astype(int)
    frames = np.abs(pixels[TOP : TOP + 80] - GREY).sum(axis=-1) > 60
    assert frames[:, 60 : 4 * step + 100].any(axis=0).all()  # without a break, up to the last frame
    red = (pixels[..., 0] > 180) & (pixels[..., 2] < 60)
    blue = (pixels[..., 2] > 180) & (pixels[..., 0] < 170) & (pixels[..., 0] < pixels[..., 2] - 40)
    for mask, (_, (x, y), _) in ((red, arrows[2]), (blue, arrows[1])):  # the heads, which come from the left
        assert mask[int(y) - 4 : int(y) + 5, int(x) - 8 : int(x) + 1].any()
    assert (pixels[TOP - 2 : TOP] == 255).all() and (pixels[TOP + 80 : TOP + 84] == 255).all()


def test_arrows_show_the_frames_that_hold_them(arrows, texts):
    weights = {(4, 3, 5): 0.5, (1, 0, 0): 0.25, (3, 0, 0): 0.01}
    draw_arrows(CLIP, attention(weights), max_frames=2, frame_height=80)
    assert texts[:2] == ["frame 2 (query)", "frame 4"]
    # Frames 1 and 3 are as near to frame 2 as can be shown.
    assert [end for _, end, _ in arrows] == [[10, TOP + 10], [10, TOP + 10], [124 + 2 * 55, TOP + 2 * 35]]


@pytest.mark.parametrize("position", [(0, 0, 0), (0, 38, 58), (0, 20, 30), (4, 12, 1)])
def test_bent_arrows_stay_in_the_pictures(position):
    rng = np.random.default_rng(0)
    keys = {tuple(rng.integers((0, 0, 0), (5, 4, 6))): weight for weight in rng.uniform(0.1, 1, 40)}
    pixels = np.asarray(draw_arrows(CLIP, attention(keys, position), count=40, frame_height=160))
    below, above = pixels[TOP + 160 + 2 : TOP + 164], pixels[TOP - 2 : TOP]
    assert (below == 255).all() and (above == 255).all()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("count", [None, 2])
def test_video_shows_the_clip_and_its_attention(suffix, count, tmp_path, arrows):
    found = attention({(1, 0, 5): 0.75, (4, 3, 0): 0.25})
    path = tmp_path / f"a{suffix}"
    pictures = write_attention_video(CLIP, found, path, fps=5, count=count, frame_height=81)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert len(pictures) == 5 and all(size % 2 == 0 for size in pictures.shape[1:3])
    if suffix == ".mp4":
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert stream.average_rate == 5
    else:
        image = Image.open(path)
        frames = []
        for number in range(image.n_frames):
            image.seek(number)
            assert image.info["duration"] == 200
            frames.append(np.asarray(image.convert("RGB")))
        assert image.info["loop"] == 0
    difference = np.abs(np.stack(frames).astype(int) - pictures)
    assert difference.mean() < 3
    assert difference[:, -36:-32, 4:224].mean() < 8  # the legend's colours, of which there are many
    left, right = (pictures[:, TOP : TOP + 81, start : start + 122].astype(int) for start in (0, 126))
    for frame in range(5):
        np.testing.assert_array_equal(left[frame, 70], GREY)
        changed = np.argwhere(np.abs(right[frame] - (GREY if count else 60)).max(axis=-1) > 30)
        rows, columns = changed[:, 0], changed[:, 1]
        # Besides the mark around (31, 51): the key at the top right, the one at the bottom left, none.
        assert (frame == 1) == (columns > 95).any() and (frame == 4) == (rows > 65).any()
        white = (left[frame] == 255).all(axis=-1)
        assert white.any() == (frame == 2)  # the mark, grey in the other frames
    assert len(arrows) == (count or 0)


def test_errors_of_pictures_say_what_was_expected(tmp_path):
    found, path = attention({(0, 0, 0): 1.0}), tmp_path / "a.mp4"
    for call, message in (
        (lambda: draw_attention(CLIP[:4], found), r"of `attention`, of shape \(5, 40, 60, 3\)\. .*=\(4, 40, 60, 3\)$"),
        (lambda: draw_attention(CLIP, found, max_frames=0), r"`max_frames` must be at least 1\. .*max_frames=0$"),
        (lambda: draw_arrows(CLIP, found, count=0), r"`count` must be at least 1\. Received: count=0$"),
        (lambda: draw_arrows(CLIP, found, frame_height=0), r"`frame_height` must be at least 1\. .*frame_height=0$"),
        (lambda: write_attention_video(CLIP, found, path, fps=0), r"above 0 and of at most 100\. Received: fps=0$"),
        (lambda: write_attention_video(CLIP, found, "a.avi"), r"one of \.mp4, \.gif\. Received: path='a\.avi'$"),
        (lambda: write_attention_video(CLIP, found, path, count=0), r"`count` must be at least 1\. .*count=0$"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    path.write_text("the old one")

    def full(scratch, pictures, fps, scale):
        with open(scratch, "w") as file:
            file.write("half")
        raise OSError("No space left on device")

    monkeypatch.setitem(drawing.WRITERS, ".gif", full)
    with pytest.raises(OSError, match="No space left"):
        write_attention_video(CLIP, attention({}), path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.gif"] and path.read_text() == "the old one"


# TensorBoard

SHAPE = (2, 8, 8, 3)


def trainable():
    """Two blocks and a score."""
    inputs = keras.Input(SHAPE)
    x = NonLocal3D(inner_channels=2, name="first")(inputs)
    x = NonLocal3D(pairwise="dot_product", inner_channels=2, name="second")(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling3D()(x)))
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    return model


class _Snapshots(keras.callbacks.Callback):
    """The weights at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


def logged(folder):
    """`{tag: {step: pixels}}`, as TensorBoard reads it."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: {
            image.step: np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in events.Images(tag)
        }
        for tag in events.Tags()["images"]
    }


def test_logger_writes_what_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    clips = {name: rng.integers(0, 255, SHAPE).astype("uint8") for name in ("one", "two")}
    positions = [(1, 2, 3), None]
    model, snapshots = trainable(), _Snapshots()
    logger = AttentionLogger(
        tmp_path,
        clips,
        positions,
        layer_names=["first", "second"],
        every=2,
        pictures=("attention", "arrows"),
        frame_height=40,
    )
    targets = rng.normal(size=(4, 1)).astype("float32")
    data = rng.normal(size=(4, *SHAPE)).astype("float32")
    model.fit(data, targets, batch_size=2, epochs=3, callbacks=[logger, snapshots], verbose=0)
    model.fit(data, targets, batch_size=2, epochs=5, initial_epoch=3, callbacks=[logger, snapshots], verbose=0)
    found = logged(tmp_path)
    assert sorted(found) == [
        f"{kind}/{layer}/{name}"
        for kind in ("arrows", "attention")
        for layer in ("first", "second")
        for name in ("one", "two")
    ]
    assert any((old != new).any() for old, new in zip(snapshots.weights[0], snapshots.weights[4], strict=True))
    assert all(sorted(steps) == [0, 2, 4] for steps in found.values())
    for step in (0, 2, 4):
        model.set_weights(snapshots.weights[step])
        for (name, clip), position in zip(clips.items(), positions, strict=True):
            for layer in ("first", "second"):
                expected = attend(model, clip, position, layer)
                for kind, draw in (("attention", draw_attention), ("arrows", draw_arrows)):
                    picture = np.asarray(draw(clip, expected, frame_height=40)).astype(int)
                    # Other sums of the same products: a weight may round to the next colour.
                    difference = np.abs(found[f"{kind}/{layer}/{name}"][step] - picture)
                    assert difference.mean() < 0.05, (step, kind, layer, name)


def test_logger_takes_lists_and_the_last_layer(tmp_path):
    clip = np.zeros(SHAPE, "uint8")
    model = trainable()
    logger = AttentionLogger(tmp_path / "new" / "logs", [clip, clip], frame_height=20)
    model.fit(np.zeros((1, *SHAPE)), np.zeros((1, 1)), callbacks=[logger], verbose=0)
    assert sorted(logged(tmp_path / "new" / "logs")) == ["attention/second/0", "attention/second/1"]


def test_logger_leaves_out_what_is_not_finite(tmp_path):
    clip = np.zeros(SHAPE, "uint8")
    model = trainable()
    model.get_layer("second").phi.bias.assign([np.nan, 0])
    logger = AttentionLogger(tmp_path, [clip], layer_names=["first", "second"], frame_height=20)
    logger.set_model(model)
    logger.on_train_begin()
    with pytest.warns(UserWarning, match=r"Epoch 0: no picture of second, whose weights of attention are not finite"):
        logger.on_epoch_end(0)
    logger.on_train_end()
    assert sorted(logged(tmp_path)) == ["attention/first/0"]
    with pytest.raises(ValueError, match=r"must be finite; .* Received: layer_name='second'$"):
        attend(model, clip)


def test_logger_says_what_was_expected(tmp_path, monkeypatch):
    clip = np.zeros(SHAPE, "uint8")
    for arguments, message in (
        (([clip], [None, None]), r"one for each clip, .*; there are 1\. Received: positions=\[None, None\]$"),
        (([],), r"of which at least one is needed; there are 0\. Received: positions=\[\]$"),
        (([clip], None, None, 0), r"an integer of at least 1\. Received: every=0$"),
        (([clip], None, None, 1, ("heat",)), r"of 'attention', 'arrows'\. Received: pictures=\('heat',\)$"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionLogger(tmp_path, *arguments)
    logger = AttentionLogger(tmp_path, [clip], layer_names=["third"])
    with pytest.raises(ValueError, match=r"which has \['first', 'second'\]\. Received: layer_name='third'$"):
        trainable().fit(np.zeros((1, *SHAPE)), np.zeros((1, 1)), callbacks=[logger], verbose=0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-nonlocal\[viz\]'$"):
        AttentionLogger(tmp_path, [clip])
