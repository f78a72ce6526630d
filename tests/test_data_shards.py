"""Shards: what is written is what is read, against Pillow and against the video files themselves."""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import weakref

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from keras_nonlocal.cli import main
from keras_nonlocal.data.annotations import Annotations
from keras_nonlocal.data.clips import ClipOptions
from keras_nonlocal.data.decode import VideoError, VideoReader, write_video
from keras_nonlocal.data.sampling import view_crop_positions, view_indices
from keras_nonlocal.data.shards import (
    _ClipLoader,
    is_shards,
    read_index,
    shard_source,
    verify_shards,
    write_shards,
)
from tests.video_files import BREAKERS, camera_clip, decode_all, encode, grey_frames, read_greys

SMALL = ClipOptions(
    num_frames=4,
    frame_stride=2,
    shorter_side=(32, 40),
    image_size=(24, 28),
    horizontal_flip=True,
    views=None,
    sampling="recipe",
)
VIEWS = dataclasses.replace(SMALL, shorter_side=(32, 32), horizontal_flip=False, views=(3, 3))


def far_greys(*shape):
    """`grey_frames` of twice the contrast: encoding twice cannot take one for the next."""
    return 2 * grey_frames(*shape) - 20


def read_far_greys(frames):
    return read_greys((frames + 20.0) / 2)


def make_videos(folder, count=10, broken=()):
    """Videos whose lengths and first greys differ; returns their annotations."""
    folder.mkdir()
    paths = []
    for number in range(count):
        path = folder / ("one", "two")[number % 2] / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        if number in broken:
            BREAKERS["garbage"](path)
        else:
            encode(path, far_greys(8 + number, 48, 64), options={"crf": "10"})
        paths.append(str(path))
    return Annotations(paths=tuple(paths), labels=np.arange(count) % 2, class_names=("one", "two"))


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("data") / "videos")


@pytest.fixture(scope="module")
def index(annotations, tmp_path_factory):
    return write_shards(annotations, tmp_path_factory.mktemp("shards"), 36, videos_per_shard=4, verbose=False)


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Camera footage of 20 frames at 128 x 226 pixels, as a file of its own, and its shard of the same size."""
    folder = tmp_path_factory.mktemp("camera")
    with VideoReader(camera_clip("bigbuckbunny.mp4")) as video:
        frames = video.read(np.arange(20) * 6, 128)
    path = str(folder / "camera.mp4")
    write_video(path, frames[:, :, :226], options={"crf": "12"})
    annotations = Annotations(paths=(path,), labels=None, class_names=None)
    return path, write_shards(annotations, folder / "shards", 128, quality=95, verbose=False)


def records(index):
    """`(features of the head, JPEGs)` of each video, by TensorFlow's own reader, which checks its checksums."""
    numbers = iter(index.num_frames)
    for file in index.files:
        data = tf.data.TFRecordDataset(f"{index.directory}/{file}").as_numpy_iterator()
        for head in data:
            yield tf.train.Example.FromString(head).features.feature, list(itertools.islice(data, next(numbers)))


def elements(dataset):
    return [(clip, int(number), bool(good), message.decode()) for clip, number, good, message in numpy_of(dataset)]


def numpy_of(dataset):
    return dataset.as_numpy_iterator()


def numbers_of(dataset):
    return [number for _, number, _, _ in elements(dataset)]


def flip_bytes(path, position, count=3):
    content = bytearray(open(path, "rb").read())
    for place in range(position, position + count):
        content[place] ^= 255
    with open(path, "wb") as file:
        file.write(content)


# Writing


def test_records_hold_every_frame(index, annotations):
    assert index.files == tuple(f"videos-{number:05d}-of-00003.tfrecord" for number in range(3))
    assert sorted(index.paths) == sorted(f"{('one', 'two')[n % 2]}/{n}.mp4" for n in range(10))
    assert index.class_names == ("one", "two") and index.skipped == {}
    videos = {path.rsplit("videos/")[1]: path for path in annotations.paths}
    videos_written = list(records(index))
    assert len(videos_written) == 10
    for number, (record, jpegs) in enumerate(videos_written):
        assert record["name"].bytes_list.value[0].decode() == index.paths[number]
        assert record["label"].int64_list.value == [index.paths[number].startswith("two")] == [index.labels[number]]
        with VideoReader(videos[index.paths[number]]) as video:
            expected, timestamps = video.read(np.arange(video.num_frames), 36), video.timestamps
        frames = np.stack([PIL.Image.open(io.BytesIO(jpeg)) for jpeg in jpegs])
        assert frames.shape == expected.shape == (index.num_frames[number], 36, 48, 3)
        assert np.abs(frames.astype(int) - expected).max() <= 2
        np.testing.assert_allclose(record["timestamps"].float_list.value, timestamps, atol=1e-6)
        assert (record["height"].int64_list.value[0], record["width"].int64_list.value[0]) == tuple(index.sizes[number])


def test_index_says_where_the_bytes_are(index):
    content = json.loads(open(f"{index.directory}/shards.json").read())
    assert sorted(os.listdir(index.directory)) == ["shards.json", *index.files]
    for shard in content["shards"]:
        data = open(f"{index.directory}/{shard['file']}", "rb").read()
        assert len(data) == shard["bytes"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        for video in shard["videos"]:
            length = int.from_bytes(data[video["offset"] : video["offset"] + 8], "little")
            end = video["offset"] + 12 + length + 4
            features = tf.train.Example.FromString(data[end - 4 - length : end - 4]).features.feature
            assert features["name"].bytes_list.value[0].decode() == video["path"]
            offsets = features["frame_offsets"].int64_list.value
            assert len(offsets) == video["num_frames"]
            assert all(data[end + offset + 12 :].startswith(b"\xff\xd8\xff") for offset in offsets)


def test_classes_come_mixed(tmp_path, index):
    """Annotations list one class after the other; no shard holds one class alone."""
    for number in range(len(index.files)):
        assert len(set(index.labels[index.file_numbers == number])) == 2 or number == 2


def test_small_videos_are_not_enlarged(index, annotations, tmp_path):
    larger = write_shards(annotations, tmp_path, 320, videos_per_shard=100, verbose=False)
    assert larger.sizes.tolist() == [[48, 64]] * 10


def test_several_labels(annotations, tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (10, 5)).astype("float32")
    labels[3] = 0
    multi_hot = dataclasses.replace(annotations, labels=labels, class_names=None)
    read = write_shards(multi_hot, tmp_path, 16, verbose=False)
    order = [[path.endswith(name) for path in multi_hot.paths].index(True) for name in read.paths]
    np.testing.assert_array_equal(read.labels, labels[order])
    assert read.labels.dtype == "float32"


def test_a_long_video_is_not_held_raw(tmp_path):
    path = encode(tmp_path / "long.mp4", grey_frames(50))
    frames, most = [], 0

    def grey(frame):
        nonlocal most
        frames.append(weakref.ref(frame))
        most = max(most, sum(reference() is not None for reference in frames))
        return frame.mean()

    with VideoReader(path) as video:
        greys = video.map_frames(grey, 24)
        assert video.map_frames(np.shape, 480) == [(48, 64, 3)] * 50
    np.testing.assert_allclose(greys, decode_all(path).mean((1, 2, 3)), rtol=0, atol=2.5)
    assert len(frames) == 50 and most <= 2


def test_broken_videos_are_listed(tmp_path, caplog):
    annotations = make_videos(tmp_path / "videos", broken=(2, 5))
    with caplog.at_level(logging.WARNING, "keras_nonlocal"):
        index = write_shards(annotations, tmp_path / "shards", 16, videos_per_shard=3, verbose=False)
    assert set(index.skipped) == {"one/2.mp4", "two/5.mp4"} and len(index.paths) == 8
    assert all("Cannot decode" in reason for reason in index.skipped.values())
    assert len(caplog.records) == 2
    with pytest.raises(VideoError, match="Cannot decode .*[25].mp4"):
        write_shards(annotations, tmp_path / "strict", 16, on_error="raise", verbose=False)
    broken = dataclasses.replace(annotations, paths=(annotations.paths[2],), labels=annotations.labels[:1])
    with pytest.raises(VideoError, match="No video could be decoded"):
        write_shards(broken, tmp_path / "none", 16, verbose=False)


class Interrupted(Exception):
    pass


def test_goes_on_where_it_stopped(annotations, tmp_path, monkeypatch, capsys):
    whole = write_shards(annotations, tmp_path / "whole", 16, videos_per_shard=3, verbose=False)
    out, read_all = tmp_path / "out", VideoReader.map_frames
    decoded = []

    def counted(reader, *args):
        if len(decoded) == 7:
            raise Interrupted
        decoded.append(reader.path)
        return read_all(reader, *args)

    options = {"shorter_side": 16, "videos_per_shard": 3, "num_parallel_calls": 1}
    monkeypatch.setattr(VideoReader, "map_frames", counted)
    with pytest.raises(Interrupted):
        write_shards(annotations, out, **options)
    assert not is_shards(out) and (out / "videos-00001-of-00004.tfrecord").exists()
    assert not (out / "videos-00002-of-00004.tfrecord").exists()
    flip_bytes(out / "videos-00000-of-00004.tfrecord", 100)
    monkeypatch.setattr(VideoReader, "map_frames", lambda *args: decoded.append(args[0].path) or read_all(*args))
    decoded.clear()
    capsys.readouterr()
    index = write_shards(annotations, out, **options)
    assert len(decoded) == 7  # all but the second shard: the first was damaged
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("was there") for line in lines] == [False, True, False, False]
    assert index.paths == whole.paths and verify_shards(out) == {}
    for file in ("shards.json", *index.files):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(os.listdir(out)) == ["shards.json", *index.files]


def test_a_finished_directory_is_mended(annotations, tmp_path):
    index = write_shards(annotations, tmp_path, 16, videos_per_shard=3, verbose=False)
    expected = (tmp_path / index.files[1]).read_bytes()
    num_bytes = (tmp_path / index.files[3]).stat().st_size
    (tmp_path / index.files[1]).unlink()
    flip_bytes(tmp_path / index.files[2], 50)
    (tmp_path / index.files[3]).write_bytes(b"")
    assert verify_shards(tmp_path) == {
        index.files[1]: "it is missing",
        index.files[2]: "its content has changed",
        index.files[3]: f"it has 0 bytes instead of {num_bytes}",
    }
    write_shards(annotations, tmp_path, 16, videos_per_shard=3, verbose=False)
    assert verify_shards(tmp_path) == {} and (tmp_path / index.files[1]).read_bytes() == expected


def count_decoded(monkeypatch):
    """The list of the numbers of the videos that are decoded from now on, as they come."""
    decoded, read_all = [], VideoReader.map_frames

    def counted(reader, *args):
        decoded.append(int(os.path.basename(reader.path)[:-4]))
        return read_all(reader, *args)

    monkeypatch.setattr(VideoReader, "map_frames", counted)
    return decoded


def test_a_repaired_video_joins_its_shard(tmp_path, monkeypatch, caplog):
    """Whether its file has another size or is the same and can only now be read; other shards are left as they are."""
    annotations = make_videos(tmp_path / "videos", broken=(2, 5, 6))
    options = {"shorter_side": 16, "videos_per_shard": 1, "verbose": False}
    index = write_shards(annotations, tmp_path / "shards", **options)
    assert len(index.skipped) == 3
    encode(annotations.paths[2], far_greys(10, 48, 64), options={"crf": "10"})
    unreadable = annotations.paths[6]
    encode(unreadable, far_greys(14, 48, 64), options={"crf": "10"})
    repaired = open(unreadable, "rb").read()
    with open(unreadable, "wb") as file:  # as many bytes before as after
        file.write(b"?" * len(repaired))
    index = write_shards(annotations, tmp_path / "shards", **options)
    assert set(index.skipped) == {"two/5.mp4", "one/6.mp4"} and "one/2.mp4" in index.paths
    with open(unreadable, "wb") as file:
        file.write(repaired)
    decoded = count_decoded(monkeypatch)
    caplog.clear()
    index = write_shards(annotations, tmp_path / "shards", **options)
    assert set(index.skipped) == {"two/5.mp4"} and "one/6.mp4" in index.paths
    assert set(decoded) <= {6}  # the others are there, the fifth does not even open
    assert verify_shards(tmp_path / "shards") == {}
    assert [record.getMessage().count("5.mp4") > 0 for record in caplog.records] == [True]
    whole = write_shards(annotations, tmp_path / "whole", **options)
    for file in ("shards.json", *whole.files):
        assert (tmp_path / "shards" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_replaced_video_is_written_anew(tmp_path, monkeypatch):
    annotations = make_videos(tmp_path / "videos", count=4)
    options = {"shorter_side": 16, "videos_per_shard": 1, "verbose": False}
    write_shards(annotations, tmp_path / "shards", **options)
    encode(annotations.paths[1], far_greys(17, 48, 64), options={"crf": "10"})
    decoded = count_decoded(monkeypatch)
    index = write_shards(annotations, tmp_path / "shards", **options)
    assert decoded == [1] and index.num_frames[index.paths.index("two/1.mp4")] == 17


def test_a_finished_directory_with_broken_videos_may_raise(tmp_path):
    annotations = make_videos(tmp_path / "videos", count=4, broken=(1,))
    index = write_shards(annotations, tmp_path / "shards", 16, verbose=False)
    with pytest.raises(VideoError, match="Cannot decode .*1.mp4"):
        write_shards(annotations, tmp_path / "shards", 16, on_error="raise", verbose=False)
    assert read_index(tmp_path / "shards").paths == index.paths and verify_shards(tmp_path / "shards") == {}


def test_no_index_while_shards_are_written_anew(tmp_path, monkeypatch):
    """A reader would find other bytes than it says."""
    annotations = make_videos(tmp_path / "videos", count=4)
    options = {"shorter_side": 16, "videos_per_shard": 1, "verbose": False}
    write_shards(annotations, tmp_path / "shards", **options)
    for path in annotations.paths[1:3]:
        encode(path, far_greys(17, 48, 64), options={"crf": "10"})
    read_all, decoded = VideoReader.map_frames, []

    def interrupted(reader, *args):
        if decoded:
            raise Interrupted
        decoded.append(reader.path)
        return read_all(reader, *args)

    monkeypatch.setattr(VideoReader, "map_frames", interrupted)
    with pytest.raises(Interrupted):
        write_shards(annotations, tmp_path / "shards", **options)
    assert not is_shards(tmp_path / "shards")
    monkeypatch.setattr(VideoReader, "map_frames", lambda *args: decoded.append(args[0].path) or read_all(*args))
    index = write_shards(annotations, tmp_path / "shards", **options)
    assert sorted(decoded) == sorted(annotations.paths[1:3]) and sorted(index.num_frames) == [8, 11, 17, 17]


def test_other_options_and_videos_are_errors(annotations, index):
    message = (
        r"differs in options \(before \{.*'quality': 90.*, now .*'quality': 80.*or delete this one. Received: out="
    )
    with pytest.raises(ValueError, match=message):
        write_shards(annotations, index.directory, 36, quality=80, videos_per_shard=4)
    fewer = dataclasses.replace(annotations, paths=annotations.paths[1:], labels=annotations.labels[1:])
    with pytest.raises(ValueError, match=r"in num_videos \(before 10, now 9\), videos \(their paths or labels\)\. "):
        write_shards(fewer, index.directory, 36, videos_per_shard=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shorter_side": 0}, "`shorter_side` must be a positive integer. Received: shorter_side=0"),
        ({"quality": 101}, "`quality` must be an integer from 1 to 100. Received: quality=101"),
        ({"videos_per_shard": 2.5}, "`videos_per_shard` must be a positive integer. Received: videos_per_shard=2.5"),
        ({"num_parallel_calls": 0}, "`num_parallel_calls` must be a positive integer. Received: num_parallel_calls=0"),
        ({"on_error": "black"}, '`on_error` must be "skip" or "raise". Received: on_error=\'black\''),
    ],
)
def test_wrong_arguments(annotations, tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        write_shards(annotations, tmp_path / "out", **options)
    assert str(error.value) == message and not (tmp_path / "out").exists()


def test_directories_without_shards(tmp_path):
    assert not is_shards(tmp_path) and not is_shards(tmp_path / "missing")
    with pytest.raises(ValueError, match="complete with their shards.json. Received: directory="):
        read_index(tmp_path)
    (tmp_path / "shards.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="must be of version 2. Received: version=1"):
        read_index(tmp_path)
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(ValueError, match="Expected JSON .*Received: "):
        read_index(tmp_path)


# Reading


def triangle_weights(num_in, num_out):
    """Linear interpolation in float64; a smaller image is an average under wider triangles."""
    scale = num_out / num_in
    radius = max(1 / scale, 1)
    centres = (np.arange(num_out) + 0.5) / scale - 0.5
    weights = np.maximum(1 - np.abs(np.arange(num_in) - centres[:, None]) / radius, 0)
    return weights / weights.sum(1, keepdims=True)


def whole_frames(index):
    """The frames of the first video, decoded whole by Pillow."""
    _, jpegs = next(records(index))
    return np.stack([PIL.Image.open(io.BytesIO(jpeg)) for jpeg in jpegs])


def resized_frames(frames, side):
    """The slow way: every frame resized whole in float64."""
    shorter, longer = min(frames.shape[1:3]), max(frames.shape[1:3])
    longer = int(longer * side / shorter + 0.5)
    height, width = (side, longer) if frames.shape[1] <= frames.shape[2] else (longer, side)
    rows, columns = triangle_weights(frames.shape[1], height), triangle_weights(frames.shape[2], width)
    return np.einsum("ah,thwc,bw->tabc", rows, frames, columns, optimize=True)


def assert_rounded(actual, expected):
    """Equal, but for rounding: what lies between two levels may become either."""
    assert actual.shape == expected.shape and actual.dtype == "uint8"
    assert np.abs(actual - expected).max() < 1.51
    assert np.mean(np.abs(actual - expected) > 0.51) < 0.05


@pytest.mark.parametrize("side", [100, 128, 160])
@pytest.mark.parametrize("num_crops", [1, 3])
def test_views_are_those_of_a_slow_twin(camera, side, num_crops):
    _, index = camera
    size = (80, 96)
    clip = ClipOptions(5, 3, (side, side), size, False, (2, num_crops), "recipe")
    ((clips, number, good, message),) = elements(shard_source(index, None, clip, False, 0))
    assert (number, good, message) == (0, True, "") and clips.shape == (2 * num_crops, 5, *size, 3)
    frames = resized_frames(whole_frames(index), side)
    expected = [
        frames[positions, top : top + size[0], left : left + size[1]]
        for positions in view_indices(20, 5, 3, 2)
        for top, left in view_crop_positions(*frames.shape[1:3], size, num_crops)
    ]
    assert_rounded(clips, np.stack(expected))


@pytest.mark.parametrize("side", [100, 128])
def test_clips_are_those_of_the_files(camera, side):
    """As PyAV decodes and resizes them; JPEG, which halves the colours' resolution, leaves about 2 of 255 levels."""
    path, index = camera
    clip = ClipOptions(4, 4, (side, side), None, False, (2, 1), "recipe")
    ((clips, _, _, _),) = elements(shard_source(index, None, clip, False, 0))
    positions = view_indices(20, 4, 4, 2)
    with VideoReader(path) as video:
        expected = video.read(positions.ravel(), side)
    assert clips.shape == (2, 4, *expected.shape[1:])
    difference = np.abs(clips.reshape(expected.shape).astype(int) - expected)
    assert difference.mean() < 2.5
    shifted = np.abs(np.roll(clips.reshape(expected.shape), 1, axis=2).astype(int) - expected)
    assert difference.mean() < shifted.mean() / 2  # one pixel off would be seen


def test_training_clips_are_windows_of_the_frames(camera):
    """Each random clip is found again, pixel by pixel, in the frames that Pillow decodes whole: at one place."""
    _, index = camera
    clip = ClipOptions(3, 5, (128, 128), (60, 70), True, None, "recipe")
    frames = whole_frames(index)
    found = []
    for seed in range(8):
        ((actual, _, _, _),) = elements(shard_source(index, None, clip, True, seed))
        places = [
            (start, flip, *place)
            for start in range(20 - 3 * 5 + 1)
            for flip in (False, True)
            for place in locate(actual[:, :, ::-1] if flip else actual, frames[start : start + 11 : 5])
        ]
        assert len(places) == 1, places
        found += places
    starts, flips, tops, lefts = map(set, zip(*found, strict=True))
    assert len(starts) > 2 and flips == {False, True} and len(tops) > 4 and len(lefts) > 4


def locate(clip, frames):
    """Where in the frames the clip lies: where its first pixel is, then all of it."""
    height, width = clip.shape[1:3]
    corners = frames[0, : frames.shape[1] - height + 1, : frames.shape[2] - width + 1]
    for top, left in np.argwhere((corners == clip[0, 0, 0]).all(-1)):
        if np.array_equal(frames[:, top : top + height, left : left + width], clip):
            yield int(top), int(left)


@pytest.mark.parametrize(("side", "is_rounded"), [(150, True), (128, False), (100, True), (80, False)])
def test_windows_of_random_clips_are_rounded(camera, side, is_rounded):
    """To whole stored pixels, where no wider triangles are needed; there as exactly as views."""
    _, index = camera
    clip = ClipOptions(3, 5, (side, side), (60, 70), True, None, "recipe")
    loader = _ClipLoader(index, np.arange(1), clip, seed=0)
    frames = whole_frames(index)[:2]
    exact = resized_frames(frames, side)
    corner, size = np.array([7, 21]), np.array([60, 70])
    actual = loader._decode(
        tf.constant(next(records(index))[1][:2]),
        *(tf.constant(pair, tf.int64) for pair in (frames.shape[1:3], exact.shape[1:3], corner, size)),
    ).numpy()
    expected = exact[:, 7:67, 21:91]
    if is_rounded:
        assert np.abs(actual - expected).max() > 2  # else this test would prove nothing
        scale = np.array(exact.shape[1:3]) / frames.shape[1:3]
        (top, left), (bottom, right) = np.rint(corner / scale).astype(int), np.rint((corner + size) / scale).astype(int)
        window = frames[:, top:bottom, left:right]
        rows, columns = (linear_weights(*pair) for pair in zip(window.shape[1:3], size, strict=True))
        expected = np.einsum("ah,thwc,bw->tabc", rows, window, columns, optimize=True)
    assert_rounded(actual, expected)


def linear_weights(num_in, num_out):
    """Linear interpolation in float64 between the two nearest pixels."""
    centres = ((np.arange(num_out) + 0.5) * num_in / num_out - 0.5).clip(0, num_in - 1)
    return np.maximum(1 - np.abs(np.arange(num_in) - centres[:, None]), 0)


def test_draws_are_uniform():
    """Over many seeds: starts, sizes, corners and flips each as often as the other."""
    loader = object.__new__(_ClipLoader)
    loader._clip = SMALL
    record = {"num_frames": tf.constant(11, tf.int64), "size": tf.constant([36, 48], tf.int64)}
    uniform = np.random.default_rng(0).random((600, SMALL.num_frames + 4))
    drawn = tf.data.Dataset.from_tensor_slices(uniform).map(lambda row: loader._geometry(record, row))
    frames, corners, _, resized = next(iter(drawn.batch(600)))
    sides, starts = np.bincount(resized[:, 0]), np.bincount(frames[:, 0])
    assert len(sides) == 41 and sides[32:].min() > 35 and sides[32:].max() < 105
    assert len(starts) == 4 and starts.min() > 110
    tops = corners[:, 0, 0].numpy()
    spans = resized[:, 0].numpy() - 24
    assert (tops >= 0).all() and (tops <= spans).all()
    assert (tops == 0).any() and (tops == spans).any()


def test_whole_frames(index):
    clip = dataclasses.replace(VIEWS, image_size=None, views=(2, 1), shorter_side=(30, 30))
    for clips, number, good, _ in elements(shard_source(index, None, clip, False, 0)):
        assert good and clips.shape == (2, 4, 30, 40, 3)
        wrapped = view_indices(int(index.num_frames[number]), 4, 2, 2)
        assert [read_far_greys(view) for view in clips] == wrapped.tolist()


def test_portrait_and_odd_sizes(tmp_path):
    path = encode(tmp_path / "portrait.mp4", far_greys(9, 90, 50))
    index = write_shards(Annotations((path,), None, None), tmp_path / "shards", 35, verbose=False)
    assert index.sizes.tolist() == [[63, 35]] and index.labels is None
    ((clips, _, good, _),) = elements(shard_source(index, None, VIEWS, False, 0))
    assert good and clips.shape == (9, 4, 24, 28, 3)
    assert [read_far_greys(view) for view in clips[::3]] == view_indices(9, 4, 2, 3).tolist()


def test_only_the_seed_counts(index):
    passes = []
    for global_seed in (1, 2):
        tf.random.set_seed(global_seed)
        dataset = shard_source(index, None, SMALL, True, 3)
        passes.append([[(int(number), clip.tobytes()) for clip, number, _, _ in elements(dataset)] for _ in range(2)])
    assert passes[0] == passes[1]
    assert passes[0][0] != passes[0][1]


def test_order(index):
    everything = list(range(10))
    assert numbers_of(shard_source(index, None, SMALL, False, 0)) == everything
    assert numbers_of(shard_source(index, [7, 2, 5], VIEWS, False, 0)) == [7, 2, 5]
    dataset = shard_source(index, None, SMALL, True, 3)
    passes = [elements(dataset) for _ in range(2)] + [elements(shard_source(index, None, SMALL, True, 3))]
    orders = [[number for _, number, _, _ in one] for one in passes]
    assert sorted(orders[0]) == sorted(orders[1]) == everything
    assert orders[0] == orders[2] and len({tuple(order) for order in (everything, *orders)}) == 3
    by_number = [{number: clip for clip, number, _, _ in one} for one in passes]
    assert all(np.array_equal(by_number[0][n], by_number[2][n]) for n in everything)
    assert not all(np.array_equal(by_number[0][n], by_number[1][n]) for n in everything)
    fixed = shard_source(index, None, SMALL, True, 3, reshuffle_each_iteration=False)
    assert numbers_of(fixed) == numbers_of(fixed) != everything
    repeated = numbers_of(dataset.repeat(2))
    assert sorted(repeated[:10]) == sorted(repeated[10:]) == everything and repeated[:10] != repeated[10:]


def test_clips_do_not_depend_on_threads_or_neighbours(index):
    one = {number: clip for clip, number, _, _ in elements(shard_source(index, None, SMALL, True, 3, None, 1))}
    four = {number: clip for clip, number, _, _ in elements(shard_source(index, None, SMALL, True, 3, None, 4))}
    few = elements(shard_source(index, [1, 8], SMALL, False, 3))
    assert all(np.array_equal(one[number], four[number]) for number in range(10))
    assert all(np.array_equal(one[number], clip) for clip, number, _, _ in few)


def test_shards_of_workers_are_disjoint_and_complete(index):
    parts = [numbers_of(shard_source(index, range(1, 10), SMALL, True, 0, (3, part))) for part in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert sorted(sum(parts, [])) == list(range(1, 10))
    assert elements(shard_source(index, [], SMALL, True, 0)) == []


def test_order_in_the_service():
    """There the passes cannot be told apart but by the clock; each position comes once all the same."""
    from keras_nonlocal.data.shards import _order

    count = 200
    dataset = _order(count, True, 0, True, True)
    first, second = ([(int(p), int(e)) for p, e in numpy_of(dataset)] for _ in range(2))
    assert sorted(p for p, _ in first) == sorted(p for p, _ in second) == list(range(count))
    assert [p for p, _ in first] != [p for p, _ in second]
    assert not {e for _, e in first} & {e for _, e in second}
    plain = _order(count, False, 0, True, True)
    assert [int(p) for p, _ in numpy_of(plain)] == list(range(count))


# Damage


def test_a_damaged_record_is_one_clip_less(annotations, tmp_path):
    index = write_shards(annotations, tmp_path, 16, videos_per_shard=4, verbose=False)
    expected = {number: clip for clip, number, _, _ in elements(shard_source(index, None, VIEWS, False, 0))}
    flip_bytes(f"{tmp_path}/{index.files[0]}", index.offsets[1] + 500)
    with pytest.raises(tf.errors.DataLossError):
        list(records(index))
    found = elements(shard_source(index, None, VIEWS, False, 0))
    assert [good for _, _, good, _ in found] == [number != 1 for number in range(10)]
    for clip, number, good, message in found:
        if good:
            np.testing.assert_array_equal(clip, expected[number])
        else:
            assert clip.shape == VIEWS.shape and not clip.any()
            place = f"{index.files[0]} from byte {index.offsets[1]}"
            assert message == f"Cannot decode {index.paths[1]}: its records in {place} on are damaged"


def test_missing_and_cut_files(annotations, tmp_path):
    index = write_shards(annotations, tmp_path, 16, videos_per_shard=4, verbose=False)
    (tmp_path / index.files[0]).unlink()
    with open(tmp_path / index.files[1], "r+b") as file:
        file.truncate(int(index.offsets[6]) + 10)
    bad = {n for _, n, good, _ in elements(shard_source(index, None, SMALL, True, 0)) if not good}
    assert bad == {0, 1, 2, 3, 6, 7}


# File systems


def test_in_memory_file_system(annotations, index):
    """`ram://` is TensorFlow's own: nothing but `tf.io.gfile` can reach it."""
    out = "ram://knl_shards/a"
    written = write_shards(annotations, out, 36, videos_per_shard=4, verbose=False)
    assert is_shards(out) and verify_shards(out) == {} and written.directory == out
    for (clip, number, good, _), (same, *_) in zip(
        elements(shard_source(written, None, SMALL, False, 0)),
        elements(shard_source(index, None, SMALL, False, 0)),
        strict=True,
    ):
        assert good, number
        np.testing.assert_array_equal(clip, same)
    assert write_shards(annotations, out, 36, videos_per_shard=4, verbose=False).paths == index.paths


@pytest.mark.parametrize("scheme", ["s3", "az", "hdfs"])
def test_a_file_system_that_is_not_there(annotations, scheme):
    message = (
        f"{scheme}:// is read through tensorflow-io, which is not installed or does not load in TensorFlow "
        f"{tf.__version__}. Install tensorflow==2.16.2 and tensorflow-io==0.37.1. "
        f"Received: directory='{scheme}://bucket/shards'"
    )
    for function in (is_shards, read_index, verify_shards, lambda out: write_shards(annotations, out)):
        with pytest.raises(ValueError) as error:
            function(f"{scheme}://bucket/shards")
        assert str(error.value) == message


# The command


def test_command(tmp_path, capsys):
    make_videos(tmp_path / "videos", count=4, broken=(1,))
    out = tmp_path / "shards"
    assert main(["shard", str(tmp_path / "videos"), str(out), "--shorter-side", "24", "--videos-per-shard", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"Wrote 3 videos of 2 classes in 2 shards to {out}; skipped 1 broken file" in printed
    assert main(["shard", "--verify", str(out)]) == 0
    assert capsys.readouterr().out == "2 shards are as they were written\n"
    index = read_index(out)
    flip_bytes(out / index.files[1], 60)
    assert main(["shard", "--verify", str(out)]) == 1
    assert capsys.readouterr().err == f"{index.files[1]}: its content has changed\n"
    for arguments in (["shard"], ["shard", str(out)], ["shard", "--verify", str(out), "more"]):
        assert main(arguments) == 2
        assert "either DATA and OUT or --verify OUT. Received: DATA=" in capsys.readouterr().err
