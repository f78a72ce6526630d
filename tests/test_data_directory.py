"""Directories of videos as datasets, against a slow reference and with every kind of fault."""

import concurrent.futures
import logging
import os
import re
import shutil

import av
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal.data import (
    VideoError,
    load_views,
    video_dataset_from_directory,
    view_indices,
    write_video,
)
from keras_nonlocal.data.annotations import VIDEO_EXTENSIONS
from keras_nonlocal.data.directory import DecodeReport
from keras_nonlocal.data.sampling import SAMPLERS
from tests.video_files import BREAKERS, camera_clip, grey_frames, numbered_frames, read_greys

SMALL = {"num_frames": 4, "frame_stride": 2, "image_size": 32, "shorter_side": 32, "verbose": False}
VIEWS = {**SMALL, "views": (1, 1), "batch_size": None}


def write_grey(path, level, num_frames=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.broadcast_to(grey_frames(level + 1)[level], (num_frames, 48, 64, 3))
    write_video(path, frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 videos of 3 classes, of 20 frames whose brightness is their number."""
    folder = tmp_path_factory.mktemp("videos")
    frames = grey_frames(20)
    frames = np.concatenate([frames, frames // 2], axis=2)  # left and right differ
    write_video(folder / "original.mp4", frames)
    for name in ("walk", "jump", "run"):
        (folder / name).mkdir()
        for number in range(4):
            shutil.copy(folder / "original.mp4", folder / name / f"{number}.mp4")
    (folder / "original.mp4").unlink()
    (folder / "walk" / "notes.txt").write_text("not a video")
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """40 videos of 2 classes, each of one grey that is its own."""
    folder = tmp_path_factory.mktemp("levels")
    for level in range(40):
        write_grey(folder / "ab"[level % 2] / f"{level:02}.mp4", level)
    return folder


def shown_levels(clips):
    return sorted(read_greys(np.asarray(clips).reshape(-1, 32, 32, 3)[::4]))


def collect(dataset):
    clips, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.concatenate(clips), np.concatenate(labels)


def test_training_elements(folder):
    dataset = video_dataset_from_directory(folder, batch_size=5, seed=1, **SMALL)
    clip_spec, label_spec = dataset.element_spec
    assert clip_spec == tf.TensorSpec((None, 4, 32, 32, 3), tf.uint8)
    assert label_spec == tf.TensorSpec((None,), tf.int32)
    assert [clips.shape[0] for clips, _ in dataset] == [5, 5, 2]
    assert dataset.class_names == ["jump", "run", "walk"]
    assert [os.path.relpath(path, folder) for path in dataset.file_paths] == [
        os.path.join(name, f"{i}.mp4") for name in ("jump", "run", "walk") for i in range(4)
    ]
    _, labels = collect(dataset)
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.report.num_good == 12 and dataset.report.broken == {}


def test_training_clips_follow_the_recipe(folder):
    dataset = video_dataset_from_directory(
        folder, batch_size=None, seed=3, **{**SMALL, "shorter_side": (32, 40), "image_size": 24}
    )
    starts, mirrored, widths = [], [], set()
    for clip, _ in dataset.repeat(10).as_numpy_iterator():
        grey = clip[..., 1].astype(float)
        left, right = grey[:, :, 0].mean(1), grey[:, :, -1].mean(1)
        bright, dark = np.maximum(left, right), np.minimum(left, right)
        # A crop that holds both halves says its frames' numbers and whether it was mirrored.
        if np.all(np.abs(bright - 2 * dark) < 3):
            numbers = np.rint((bright - 20) / 4).astype(int)
            assert np.all(np.diff(numbers) == 2)
            starts.append(numbers[0])
            mirrored.append(left[0] < right[0])
        widths.add(clip.shape)
    assert widths == {(4, 24, 24, 3)}
    assert len(starts) > 30
    assert min(starts) == 0 and max(starts) == 12  # 20 - 4 * 2
    assert 0.2 < np.mean(mirrored) < 0.8
    dataset = video_dataset_from_directory(folder, horizontal_flip=False, seed=3, **SMALL)
    clips, _ = collect(dataset.repeat(3))
    assert np.all(clips[..., :2, 1].mean((1, 2, 3)) + 1 >= clips[..., -2:, 1].mean((1, 2, 3)))


def test_labels_follow_class_folders(levels):
    for arguments, expected in (
        ({}, lambda level: level % 2),
        ({"class_names": ["b", "a"]}, lambda level: 1 - level % 2),
        ({"label_mode": "binary"}, lambda level: [level % 2]),
        ({"label_mode": "categorical"}, lambda level: [1 - level % 2, level % 2]),
        ({"labels": [5] * 20 + [7] * 20}, lambda level: 5 + 2 * (level % 2)),
        ({"class_names": ["b"]}, lambda level: 0),
    ):
        dataset = video_dataset_from_directory(levels, seed=0, **arguments, **SMALL)
        clips, labels = collect(dataset)
        shown = read_greys(clips[:, 0])
        assert labels.tolist() == [expected(level) for level in shown]
        only_b = arguments.get("class_names") == ["b"]
        assert sorted(shown) == list(range(1, 40, 2) if only_b else range(40))
    assert labels.dtype == np.int32
    binary = video_dataset_from_directory(levels, label_mode="binary", **SMALL)
    assert binary.element_spec[1] == tf.TensorSpec((None, 1), tf.float32)


@pytest.mark.parametrize("arguments", [{"labels": None}, {"label_mode": None}])
def test_no_labels(levels, arguments):
    dataset = video_dataset_from_directory(levels, **arguments, **SMALL)
    assert dataset.element_spec == tf.TensorSpec((None, 4, 32, 32, 3), tf.uint8)
    assert dataset.class_names is None
    assert shown_levels(np.concatenate(list(dataset.as_numpy_iterator()))) == list(range(40))


def test_what_is_printed(levels, capsys):
    arguments = {**SMALL, "verbose": True}
    video_dataset_from_directory(levels, **arguments)
    video_dataset_from_directory(levels, labels=None, **arguments)
    expected = "Found 40 files belonging to 2 classes.\nFound 40 files.\n"
    assert capsys.readouterr().out == expected


def test_deterministic_for_a_seed_however_parallel(folder):
    def epochs(seed, num_parallel_calls):
        dataset = video_dataset_from_directory(folder, seed=seed, num_parallel_calls=num_parallel_calls, **SMALL)
        return [collect(dataset) for _ in range(2)]

    first, again, other = epochs(1, 1), epochs(1, 8), epochs(2, 8)
    for (clips, labels), (clips_again, labels_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(clips, clips_again)
        np.testing.assert_array_equal(labels, labels_again)
    assert not np.array_equal(first[0][0], first[1][0])
    assert not np.array_equal(first[0][1], first[1][1])
    assert not np.array_equal(first[0][0], other[0][0])


def test_no_seed_takes_the_global_one(folder):
    def clips(seed):
        keras.utils.set_random_seed(seed)
        return collect(video_dataset_from_directory(folder, **SMALL))[0]

    np.testing.assert_array_equal(clips(4), clips(4))
    assert not np.array_equal(clips(4), clips(5))


def reference_views(path, num_frames, frame_stride, views, shorter_side, size, sampling):
    """Decodes, resizes and cuts out everything, one frame at a time."""
    with av.open(path) as container:
        video = list(container.decode(video=0))
    height, width = video[0].height, video[0].width
    scale = shorter_side / min(height, width)
    height, width = int(height * scale + 0.5), int(width * scale + 0.5)
    video = [f.reformat(width, height, "rgb24").to_ndarray() for f in video]
    result = []
    for indices in view_indices(len(video), num_frames, frame_stride, views[0], sampling):
        frames = np.stack([video[i] for i in indices])
        top, left = (height - size) // 2, (width - size) // 2
        boxes = {1: [(top, left)], 3: [(top, 0), (top, left), (top, width - size)]}[views[1]]
        if height > width and views[1] == 3:
            boxes = [(0, left), (top, left), (height - size, left)]
        result += [frames[:, y : y + size, x : x + size] for y, x in boxes]
    return np.stack(result)


@pytest.mark.parametrize("sampling", SAMPLERS)
@pytest.mark.parametrize("views, shorter_side, size", [((3, 3), 40, 40), ((2, 1), 48, 32)])
def test_views_of_wide_and_tall_and_real_videos(tmp_path, sampling, views, shorter_side, size):
    (tmp_path / "a").mkdir()
    write_video(tmp_path / "a" / "0.mp4", numbered_frames(17, 48, 80))
    write_video(tmp_path / "a" / "1.mp4", numbered_frames(33, 96, 64))
    shutil.copy(camera_clip("carphone_pristine.mp4"), tmp_path / "a" / "2.mp4")
    dataset = video_dataset_from_directory(
        tmp_path, batch_size=1, num_frames=5, frame_stride=4, views=views, sampling=sampling,
        shorter_side=shorter_side, image_size=size, verbose=False,
    )  # fmt: skip
    num_views = views[0] * views[1]
    assert dataset.element_spec[0].shape.as_list() == [None, num_views, 5, size, size, 3]
    elements = list(dataset.as_numpy_iterator())
    assert len(elements) == 3
    for path, (clips, _) in zip(dataset.file_paths, elements, strict=True):
        expected = reference_views(path, 5, 4, views, shorter_side, size, sampling)
        np.testing.assert_array_equal(clips[0], expected)


def test_a_video_is_opened_once_for_all_views(folder, monkeypatch):
    opened = []
    open_file = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kw: opened.append(args) or open_file(*args, **kw))
    views = load_views(folder / "run" / "0.mp4", 4, 2, (5, 3), 32, (32, 32))
    assert views.shape == (15, 4, 32, 32, 3) and len(opened) == 1


def test_views_keep_the_order_of_files(levels):
    dataset = video_dataset_from_directory(levels, **VIEWS)
    expected = [*range(0, 40, 2), *range(1, 40, 2)]
    for _ in range(2):
        clips = np.stack([clip for clip, _ in dataset.as_numpy_iterator()])
        assert read_greys(clips[:, 0, 0]) == expected
    shuffled = video_dataset_from_directory(levels, shuffle=True, seed=0, **VIEWS)
    clips = np.stack([clip for clip, _ in shuffled.as_numpy_iterator()])
    assert read_greys(clips[:, 0, 0]) != expected
    assert sorted(read_greys(clips[:, 0, 0])) == list(range(40))


def test_split_never_overlaps(levels):
    def split(subset, **arguments):
        arguments = {"validation_split": 0.3, "seed": 9, **SMALL, **arguments}
        return video_dataset_from_directory(levels, subset=subset, **arguments)

    training, validation = split("training"), split("validation", views=(1, 1))
    both = split("both")
    assert [len(d.file_paths) for d in (training, validation, *both)] == [28, 12, 28, 12]
    assert not set(training.file_paths) & set(validation.file_paths)
    assert both[0].file_paths == training.file_paths == sorted(training.file_paths)
    assert both[1].file_paths == validation.file_paths
    assert {os.path.basename(os.path.dirname(p)) for p in validation.file_paths} == {"a", "b"}
    clips, labels = collect(both[1])
    shown = read_greys(clips[:, 0])
    assert shown == [int(os.path.basename(p)[:2]) for p in validation.file_paths]
    assert labels.tolist() == [level % 2 for level in shown]


@pytest.fixture
def partly_broken(levels, tmp_path):
    """`levels` with 4 of its 40 files broken in each way: 20 good and 20 broken files."""
    folder = tmp_path / "videos"
    shutil.copytree(levels, folder)
    broken = np.random.default_rng(0).permutation(40)[:20].tolist()
    for position, level in enumerate(broken):
        path = folder / "ab"[level % 2] / f"{level:02}.mp4"
        list(BREAKERS.values())[position // 4](path)
    return folder, broken


@pytest.mark.parametrize("arguments", [{}, {"views": (1, 1)}])
def test_no_good_clip_is_lost_and_each_broken_one_reported_once(partly_broken, caplog, arguments):
    folder, broken = partly_broken
    good = sorted(set(range(40)) - set(broken))
    dataset = video_dataset_from_directory(folder, batch_size=6, seed=0, **arguments, **SMALL)
    with caplog.at_level(logging.WARNING, logger="keras_nonlocal"):
        for _ in range(2):
            clips, labels = collect(dataset)
            shown = read_greys(clips.reshape(-1, 4, 32, 32, 3)[:, 0])
            assert sorted(shown) == good
            assert labels.tolist() == [level % 2 for level in shown]
    assert dataset.report.num_good == 20
    assert sorted(int(os.path.basename(path)[:2]) for path in dataset.report.broken) == sorted(broken)
    messages = [record.getMessage() for record in caplog.records]
    ends = [message for message in messages if message.startswith("End of a pass: ")]
    assert ends == [f"End of a pass: {dataset.report.summary()}"] * 2 and messages[-1] == ends[-1]
    assert len(messages) == 20 + 2
    for path, message in dataset.report.broken.items():
        assert f"Skipped a broken video. {message}" in messages
        assert message.startswith(f"Cannot decode {path}: ")
    assert re.fullmatch(
        r"decoded 20 videos; skipped 20 broken files: "
        r"(\d\d\.mp4 \([^)]+\), ){2}\d\d\.mp4 \([^)]+\), … and 17 more",
        dataset.report.summary(),
    )


def test_on_error_raise(partly_broken):
    folder, _ = partly_broken
    dataset = video_dataset_from_directory(folder, on_error="raise", **SMALL)
    assert dataset.cardinality() == 5
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Cannot decode .*\d\d\.mp4: "):
        list(dataset)


def test_all_broken_is_an_error_in_every_pass(tmp_path):
    (tmp_path / "a").mkdir()
    for how, break_file in BREAKERS.items():
        break_file(tmp_path / "a" / f"{how}.mp4")
    dataset = video_dataset_from_directory(tmp_path, **SMALL)
    for _ in range(2):
        with pytest.raises(tf.errors.InvalidArgumentError, match="No video could be decoded: ") as e:
            list(dataset)
        assert "decoded 0 videos; skipped 5 broken files: audio_only.mp4 (" in str(e.value)
    with pytest.raises(VideoError):
        load_views(tmp_path / "a" / "empty.mp4", 4, 2)


def test_files_that_break_between_passes(tmp_path):
    for level in range(3):
        write_grey(tmp_path / "a" / f"{level}.mp4", level)
    dataset = video_dataset_from_directory(tmp_path, **SMALL)
    assert shown_levels(collect(dataset)[0]) == [0, 1, 2]
    for path in dataset.file_paths:
        os.unlink(path)
    with pytest.raises(tf.errors.InvalidArgumentError, match="No video could be decoded"):
        list(dataset)


# Keras says so of every dataset of unknown length.
@pytest.mark.filterwarnings("ignore:Your input ran out of data", "ignore:`shuffle=True`")
def test_repeat_and_take_and_fit(partly_broken):
    folder, _ = partly_broken
    dataset = video_dataset_from_directory(folder, batch_size=4, **SMALL)
    assert sum(1 for _ in dataset.repeat(2)) == 10
    assert sum(1 for _ in dataset.take(2)) == 2
    model = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    history = model.fit(dataset, epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history["loss"]))


def test_report_is_safe_under_threads():
    report = DecodeReport()

    def add(number):
        report.add_good(f"{number % 100}.mp4")
        report.add_broken(f"{number % 50}.avi", "Cannot decode it")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(5000)))
    assert report.num_good == 100 and len(report.broken) == 50


def test_report_summaries():
    report = DecodeReport()
    assert report.summary() == "decoded 0 videos"
    report.add_good("a.mp4")
    report.add_broken("x/b.mp4", "Cannot decode x/b.mp4: End of file")
    assert report.summary() == "decoded 1 video; skipped 1 broken file: b.mp4 (End of file)"


def test_extensions_nested_folders_and_links(tmp_path):
    (tmp_path / "out").mkdir()
    write_grey(tmp_path / "out" / "linked.mp4", 1)
    videos = tmp_path / "videos"
    (videos / "a" / "deep").mkdir(parents=True)
    for extension in VIDEO_EXTENSIONS:
        (videos / "a" / "deep" / f"x{extension.upper()}").write_bytes(b"")
    os.symlink(tmp_path / "out", videos / "a" / "link")
    without = video_dataset_from_directory(videos, **SMALL).file_paths
    assert len(without) == len(VIDEO_EXTENSIONS) == 10
    with_links = video_dataset_from_directory(str(videos), follow_links=True, **SMALL).file_paths
    assert set(with_links) - set(without) == {str(videos / "a" / "link" / "linked.mp4")}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": "infer"}, r"`labels` must be .* Received: labels='infer'"),
        ({"labels": [0] * 39}, r"each of the 40 videos\. Received: len\(labels\)=39"),
        ({"labels": [1] * 20 + [2] * 20, "label_mode": "categorical"},
         r"in \[0, 2\), the number of classes, .* Received: labels from 1 to 2"),
        ({"label_mode": "integer"}, r"`label_mode` must .* Received: label_mode='integer'"),
        ({"label_mode": "binary", "class_names": ["a"]},
         r"exactly 2 classes\. Received: class_names=\['a'\]"),
        ({"class_names": ["a", "c"]},
         r"which has \['a', 'b'\]\. Received: class_names=\['a', 'c'\]"),
        ({"class_names": ["a"], "labels": None}, r"Received: class_names=\['a'\]"),
        ({"batch_size": 0}, r"`batch_size` must be a positive integer\. Received: batch_size=0"),
        ({"num_frames": 0}, r"`num_frames` must be .* Received: num_frames=0"),
        ({"frame_stride": 1.5}, r"`frame_stride` must be .* Received: frame_stride=1.5"),
        ({"image_size": (32, 0)}, r"a pair \(height, width\) or \"whole\"\. Received: image_size=\(32, 0\)"),
        ({"image_size": 33}, r"Received: image_size=\(33, 33\), shorter_side=32"),
        ({"shorter_side": (40, 32)}, r"pair \(low, high\)\. Received: shorter_side=\(40, 32\)"),
        ({"shorter_side": (32, 40), "views": (1, 1)}, r"Received: shorter_side=\(32, 40\), views="),
        ({"views": 10}, r"pair \(num_clips, num_crops\)\. Received: views=10"),
        ({"views": (1, 1), "horizontal_flip": True}, r"never flipped\. .*horizontal_flip=True"),
        ({"sampling": "odd"}, r"Received: sampling='odd'"),
        ({"validation_split": 0.2, "seed": 1}, r'"both" with .* Received: subset=None'),
        ({"validation_split": 1.0, "subset": "both"}, r"Received: validation_split=1\.0"),
        ({"validation_split": 0.01, "subset": "both"}, r"validation subset of 40 videos is empty"),
        ({"subset": "both"}, r"only be passed with `validation_split`\. Received: subset='both'"),
        ({"validation_split": 0.2, "subset": "training"}, r"needs a `seed`.* Received: seed=None"),
        ({"on_error": "ignore"}, r"Received: on_error='ignore'"),
    ],
)  # fmt: skip
def test_guards(levels, arguments, message):
    with pytest.raises(ValueError, match=message):
        video_dataset_from_directory(levels, **{**SMALL, **arguments})


def test_directory_guards(tmp_path):
    with pytest.raises(ValueError, match="existing directory. Received: directory=.*missing"):
        video_dataset_from_directory(tmp_path / "missing")
    for prepare in (lambda: None, lambda: (tmp_path / "a").mkdir()):
        prepare()
        for labels in ("inferred", None):
            with pytest.raises(ValueError, match=r"Expected videos in .*'\.mp4'.* Received: dir"):
                video_dataset_from_directory(tmp_path, labels=labels)
    write_grey(tmp_path / "loose.mp4", 1)
    with pytest.raises(ValueError, match=r"in the sub-directories \['a'\] of the directory"):
        video_dataset_from_directory(tmp_path)
    write_grey(tmp_path / "a" / "x.mp4", 1)
    assert video_dataset_from_directory(tmp_path, verbose=False).class_names == ["a"]


def test_defaults_are_the_recipe(levels):
    clips, _ = video_dataset_from_directory(levels, verbose=False).element_spec
    assert clips.shape.as_list() == [None, 8, 224, 224, 3]
    clips, _ = video_dataset_from_directory(levels, views=(10, 3), verbose=False).element_spec
    assert clips.shape.as_list() == [None, 30, 8, 256, 256, 3]


def test_given_labels_follow_the_paths_through_sub_folders(tmp_path):
    write_video(tmp_path / "z.mp4", np.zeros((2, 16, 16, 3), "uint8"))
    (tmp_path / "a").mkdir()
    write_video(tmp_path / "a" / "x.mp4", np.zeros((2, 16, 16, 3), "uint8"))
    dataset = video_dataset_from_directory(
        tmp_path,
        labels=[7, 8],
        num_frames=1,
        frame_stride=1,
        image_size=16,
        shorter_side=16,
        shuffle=False,
        verbose=False,
    )
    assert [path.removeprefix(str(tmp_path)) for path in dataset.file_paths] == ["/a/x.mp4", "/z.mp4"]
    assert [labels.numpy().tolist() for _, labels in dataset] == [[7, 8]]
