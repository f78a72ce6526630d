"""Directories of videos as datasets, against a slow reference and with every kind of fault."""

import concurrent.futures
import logging
import os
import re
import shutil
import socket
import threading
import time

import av
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal.data import (
    VideoError,
    directory,
    load_views,
    read_annotations,
    shards,
    video_dataset_from_directory,
    view_indices,
    write_video,
)
from keras_nonlocal.data.annotations import VIDEO_EXTENSIONS
from keras_nonlocal.data.directory import DecodeReport
from keras_nonlocal.data.sampling import SAMPLERS
from tests.video_files import BREAKERS, camera_clip, encode, grey_frames, numbered_frames, read_greys, read_numbers

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


def write_broken_in_the_middle(path):
    """20 frames, of which only the first decodes."""
    encode(path.with_suffix(".avi"), numbered_frames(20), codec="mpeg4", options={"g": "1"})
    content = bytearray(path.with_suffix(".avi").read_bytes())
    with av.open(str(path.with_suffix(".avi"))) as container:
        places = [(packet.pos + 8, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in places[1:]:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    path.with_suffix(".avi").unlink()


def test_an_epoch_of_1000_files_of_which_50_are_broken_loses_no_good_clip(tmp_path, levels):
    """Every good file comes once in each of two passes, with its label; every broken one is reported."""
    breakers = {**BREAKERS, "middle": write_broken_in_the_middle}
    for how, break_file in breakers.items():
        break_file(tmp_path / f"{how}.mp4")
    kinds = [*breakers, "missing"]
    numbers = np.random.default_rng(0).permutation(1000)
    broken = {int(number): kinds[position % len(kinds)] for position, number in enumerate(numbers[:50])}
    videos, labels = tmp_path / "videos", []
    videos.mkdir()
    for number in range(1000):
        level = number % 12
        source = levels / "ab"[level % 2] / f"{level:02}.mp4"
        if broken.get(number, "missing") != "missing":
            source = tmp_path / f"{broken[number]}.mp4"
        os.link(source, videos / f"{number:03}.mp4")
        labels.append(number)
    dataset = video_dataset_from_directory(
        videos, labels=labels, batch_size=32, seed=0, num_frames=2, frame_stride=1, image_size=8, shorter_side=8,
        verbose=False,
    )  # fmt: skip
    for number in (number for number, how in broken.items() if how == "missing"):
        (videos / f"{number:03}.mp4").unlink()
    good = [number for number in range(1000) if number not in broken]
    assert len(good) == 950
    orders = []
    for _ in range(2):
        clips, labels = collect(dataset)
        assert sorted(labels) == good
        assert read_greys(clips[:, 0]) == [label % 12 for label in labels]
        orders.append(labels.tolist())
    assert orders[0] != orders[1]
    assert dataset.report.num_good == 950
    assert sorted(int(os.path.basename(path)[:3]) for path in dataset.report.broken) == sorted(broken)


def test_black_clips_stand_for_broken_videos(partly_broken, caplog):
    folder, broken = partly_broken
    dataset = video_dataset_from_directory(folder, on_error="black", shuffle=False, batch_size=8, **SMALL)
    assert dataset.cardinality() == 5
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    with caplog.at_level(logging.WARNING, logger="keras_nonlocal"):
        clips, labels = collect(dataset)
    assert labels.tolist() == [level % 2 for level in order]
    for level, clip in zip(order, clips, strict=True):
        if level in broken:
            assert not clip.any()
        else:
            assert read_greys(clip[:1]) == [level]
    assert dataset.report.num_good == len(dataset.report.broken) == 20
    assert "; replaced 20 broken files by black: " in dataset.report.summary()
    assert repr(dataset.report) == f"<DecodeReport: {dataset.report.summary()}>"
    assert sum(r.getMessage().startswith("Replaced a broken video by black. Cannot") for r in caplog.records) == 20
    views = video_dataset_from_directory(folder, on_error="black", **VIEWS)
    assert sum(not clip.any() for clip, _ in views.as_numpy_iterator()) == 20


@pytest.mark.parametrize("on_error", ["skip", "black"])
def test_a_pass_without_a_good_video_is_an_error(tmp_path, on_error):
    (tmp_path / "a").mkdir()
    BREAKERS["empty"](tmp_path / "a" / "x.mp4")
    with pytest.raises(tf.errors.InvalidArgumentError, match="No video could be decoded: decoded 0 videos; "):
        list(video_dataset_from_directory(tmp_path, on_error=on_error, **SMALL))


def test_annotated_videos_and_their_wrong_rows(levels, tmp_path, caplog):
    rows = [f"{'ab'[level % 2]}/{level:02}.mp4 {level}" for level in (7, 3, 30)]
    (tmp_path / "list.txt").write_text("\n".join([*rows, "gone.mp4 1", "a/00.mp4 -1"]))
    with caplog.at_level(logging.WARNING, logger="keras_nonlocal"):
        dataset = video_dataset_from_directory(levels, annotations=tmp_path / "list.txt", seed=0, **SMALL)
        assert len(caplog.records) == len(dataset.report.skipped_rows) == 2
        for _ in range(2):
            clips, labels = collect(dataset)
            assert sorted(labels) == [3, 7, 30] and read_greys(clips[:, 0]) == labels.tolist()
    assert len(dataset.class_names) == 31
    assert [r.getMessage() for r in caplog.records[2:]] == [
        "End of a pass: decoded 3 videos; skipped 2 wrong rows of the annotations"
    ] * 2
    with pytest.raises(ValueError, match=r"Wrong row: .*list\.txt, line 4: "):
        video_dataset_from_directory(levels, annotations=tmp_path / "list.txt", on_error="raise", **SMALL)


def test_multi_label(levels, tmp_path):
    header = "id,actions,length\n"
    (tmp_path / "charades.csv").write_text(header + "00,c001 0 1;c156 0 1,1\n01,,1\n02,c003 0 1,1\n")
    arguments = {"annotations": tmp_path / "charades.csv", "shuffle": False, **SMALL}
    dataset = video_dataset_from_directory(levels, **arguments)
    assert dataset.element_spec[1] == tf.TensorSpec((None, 157), tf.float32)
    clips, labels = collect(dataset)
    assert read_greys(clips[:, 0]) == [0, 1, 2]
    assert [np.flatnonzero(row).tolist() for row in labels] == [[1, 156], [], [3]]
    with pytest.raises(ValueError, match=r"as label_mode=\"multi_label\"\. Received: label_mode='int'"):
        video_dataset_from_directory(levels, label_mode="int", **arguments)
    one = video_dataset_from_directory(levels, label_mode="multi_label", **{**SMALL, "shuffle": False})
    assert collect(one)[1].tolist() == [[1, 0]] * 20 + [[0, 1]] * 20


def test_workers_share_every_pass(levels):
    datasets = []
    for index in range(3):
        tf.random.set_seed(index)  # each worker's own: the shares depend on `seed` alone
        datasets.append(
            video_dataset_from_directory(levels, shard=(3, index), on_error="raise", seed=5, batch_size=1, **SMALL)
        )
    tf.random.set_seed(0)
    assert [int(dataset.cardinality()) for dataset in datasets] == [14, 13, 13]
    passes = []
    for _ in range(2):
        shares = [read_greys(collect(dataset)[0][:, 0]) for dataset in datasets]
        assert [len(share) for share in shares] == [14, 13, 13]
        assert sorted(sum(shares, [])) == list(range(40))
        passes.append(shares)
    assert set(passes[0][0]) != set(passes[1][0])  # another share in each pass
    for dataset, share in zip(datasets, passes[0], strict=True):
        assert sorted(int(os.path.basename(path)[:2]) for path in dataset.file_paths) == sorted(share)
    with pytest.raises(ValueError, match=r"a video for each shard, of 40 videos\. Received: shard=\(41, 40\)"):
        video_dataset_from_directory(levels, shard=(41, 40), **SMALL)


@pytest.mark.parametrize("arguments", [{"shuffle": False}, {"reshuffle_each_iteration": False}, {"is_sharded": True}])
def test_the_files_of_a_worker(levels, shard_folder, arguments):
    """Where the shares stay, `file_paths` are those of each pass."""
    arguments = dict(arguments)
    directory = shard_folder if arguments.pop("is_sharded", False) else levels
    everything = []
    for index in range(3):
        dataset = video_dataset_from_directory(directory, shard=(3, index), seed=5, **arguments, **SMALL)
        files = [int(os.path.basename(path)[:2]) for path in dataset.file_paths]
        for _ in range(2):
            assert sorted(read_greys(collect(dataset)[0][:, 0])) == sorted(files)
        everything += files
    assert sorted(everything) == list(range(40))


@pytest.mark.parametrize("labels", ["inferred", None])
def test_paths_come_with_the_clips(partly_broken, labels):
    folder, broken = partly_broken
    dataset = video_dataset_from_directory(folder, labels=labels, with_paths=True, batch_size=3, seed=0, **SMALL)
    assert len(dataset.element_spec) == (2 if labels is None else 3)
    assert dataset.element_spec[-1] == tf.TensorSpec((None,), tf.string)
    found = []
    for clips, *_, paths in dataset.as_numpy_iterator():
        levels = read_greys(clips[:, 0])
        assert [path.decode() for path in paths] == [f"{folder}/{'ab'[level % 2]}/{level:02}.mp4" for level in levels]
        found += levels
    assert sorted(found) == sorted(set(range(40)) - set(broken))


@pytest.mark.parametrize("on_error", ["skip", "black"])
def test_a_shard_that_vanishes_during_a_pass(shard_folder, tmp_path, on_error):
    """The clips that were not read yet are broken; the pass ends all the same."""
    shutil.copytree(shard_folder, tmp_path / "shards")
    dataset = video_dataset_from_directory(
        tmp_path / "shards", on_error=on_error, with_paths=True, seed=0, **{**SMALL, "batch_size": None}
    )
    elements = dataset.as_numpy_iterator()
    shown = [next(elements)]
    for file in (tmp_path / "shards").glob("*.tfrecord"):
        file.unlink()
    shown += elements
    read = [path.decode() for clip, _, path in shown if clip.any()]
    assert [read_greys(clip[:1]) for clip, _, _ in shown if clip.any()] == [[int(path[2:4])] for path in read]
    broken = dataset.report.broken
    assert 1 <= len(read) < 40 and set(read) | set(broken) == set(dataset.file_paths) and not set(read) & set(broken)
    assert len(shown) == (len(read) if on_error == "skip" else 40)
    for path, message in broken.items():
        assert message.startswith(f"Cannot decode {path}: its records in videos-0000")


def test_reshuffle_each_iteration(levels, folder):
    def orders(**arguments):
        dataset = video_dataset_from_directory(levels, seed=1, **arguments, **SMALL)
        return [read_greys(collect(dataset)[0][:, 0]) for _ in range(2)]

    first, second = orders(reshuffle_each_iteration=False)
    assert first == second != sorted(first)
    again, other = orders()
    assert again == first and sorted(other) == sorted(first) and other != first
    dataset = video_dataset_from_directory(folder, seed=1, reshuffle_each_iteration=False, **SMALL)
    (clips, labels), (new_clips, new_labels) = collect(dataset), collect(dataset)
    np.testing.assert_array_equal(labels, new_labels)
    assert not np.array_equal(clips, new_clips)  # the clips are drawn anew


def test_whole_frames(tmp_path):
    (tmp_path / "a").mkdir()
    write_video(tmp_path / "a" / "0.mp4", numbered_frames(17, 48, 80))
    write_video(tmp_path / "a" / "1.mp4", numbered_frames(33, 96, 64))
    BREAKERS["garbage"](tmp_path / "a" / "2.mp4")
    arguments = {"num_frames": 3, "frame_stride": 2, "views": (2, 1), "shorter_side": 40, "image_size": "whole"}
    dataset = video_dataset_from_directory(tmp_path, batch_size=1, on_error="black", verbose=False, **arguments)
    assert dataset.element_spec[0].shape.as_list() == [None, 2, 3, None, None, 3]
    clips = [clips[0] for clips, _ in dataset.as_numpy_iterator()]
    assert [clip.shape[2:4] for clip in clips] == [(40, 67), (60, 40), (40, 40)]
    assert not clips[2].any()
    for path, clip in zip(dataset.file_paths[:2], clips, strict=False):
        np.testing.assert_array_equal(load_views(path, **arguments), clip)
        indices = view_indices(17 if path.endswith("0.mp4") else 33, 3, 2, 2)
        assert read_numbers(clip.reshape(-1, *clip.shape[2:])) == indices.ravel().tolist()


def test_clips_in_memory_are_bounded(levels, monkeypatch):
    loaded = []
    load = directory.load_clip
    monkeypatch.setattr(directory, "load_clip", lambda *args: loaded.append(args) or load(*args))
    dataset = video_dataset_from_directory(levels, batch_size=2, num_parallel_calls=3, **SMALL)
    iterator = iter(dataset)
    next(iterator)
    deadline = time.monotonic() + 60
    while len(loaded) < 2 + 2 * 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)  # what decodes more than the documentation says would do it now
    before = len(loaded)
    assert 2 + 2 * 2 <= before <= 2 + 3 * 2 + 3 + 2  # the batch that was taken, and what the documentation says


@pytest.fixture(scope="module")
def shard_folder(levels, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    shards.write_shards(read_annotations(levels), out, videos_per_shard=7, verbose=False)
    return out


def test_shards_give_what_their_videos_give(levels, shard_folder):
    for arguments in ({}, {"class_names": ["b", "a"]}, {"class_names": ["b"]}, {"label_mode": "categorical"}):
        of_files, of_shards = (
            collect(video_dataset_from_directory(folder, seed=0, shuffle=True, **arguments, **SMALL))
            for folder in (levels, shard_folder)
        )
        shown = [
            dict(zip(read_greys(clips[:, 0]), labels.tolist(), strict=True)) for clips, labels in (of_files, of_shards)
        ]
        assert shown[0] == shown[1]
        assert of_files[1].dtype == of_shards[1].dtype
    split = {"validation_split": 0.3, "seed": 9, "subset": "both", **SMALL}
    training, validation = video_dataset_from_directory(shard_folder, **split)
    assert [len(d.file_paths) for d in (training, validation)] == [28, 12]
    assert not set(training.file_paths) & set(validation.file_paths)
    shown = shown_levels(collect(training)[0]) + shown_levels(collect(validation)[0])
    assert sorted(shown) == list(range(40))


@pytest.mark.parametrize("service", ["localhost:5000", "grpc://localhost", "grpc://localhost:x", 5000])
def test_a_service_is_an_address(shard_folder, service):
    with pytest.raises(ValueError, match=r'such as "grpc://localhost:5000"\. Received: service='):
        video_dataset_from_directory(shard_folder, service=service, **SMALL)


def test_a_service_that_does_not_run_is_an_error(shard_folder):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))  # and nobody listens
        address = f"grpc://localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"a dispatcher that runs .*refused.* Received: service='{address}'"):
            video_dataset_from_directory(shard_folder, service=address, **SMALL)


def test_a_service_gives_each_video_once(shard_folder):
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    address = dispatcher.target.split("://")[1]
    workers = [service.WorkerServer(service.WorkerConfig(dispatcher_address=address)) for _ in range(2)]
    dataset = video_dataset_from_directory(shard_folder, service=dispatcher.target, seed=0, **SMALL)
    for _ in range(2):
        clips, labels = collect(dataset)
        shown = read_greys(clips[:, 0])
        assert sorted(shown) == list(range(40))
        assert labels.tolist() == [level % 2 for level in shown]
    assert dataset.report.num_good == 40
    del workers


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


class SlowPath(str):
    """Another thread runs whenever a set or a dict looks it up."""

    def __hash__(self):
        time.sleep(0.02)
        return super().__hash__()


def test_report_is_safe_under_threads(caplog):
    """Threads that find a video broken at the same time log it once."""
    report, path = DecodeReport(), SlowPath("a.mp4")
    start = threading.Barrier(8)

    def add(_):
        start.wait(60)
        report.add_broken(path, "Cannot decode a.mp4: End of file")

    with caplog.at_level(logging.WARNING, logger="keras_nonlocal"), concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert [record.getMessage() for record in caplog.records] == [
        "Skipped a broken video. Cannot decode a.mp4: End of file"
    ]


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
        ({"labels": [0] * 39 + [0.9]}, r"`labels` must be integers of 32 bits\. Received: 0\.9 in labels"),
        ({"labels": [2**31] * 40}, r"`labels` must be integers of 32 bits\. Received: 2147483648 in labels"),
        ({"labels": ["1"] * 40}, r"`labels` must be integers of 32 bits\. Received: '1' in labels"),
        ({"class_names": []}, r"must name at least one class\. Received: class_names=\[\]"),
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
        ({"image_size": "whole"}, r"needs one crop for each clip: .* Received: views=None"),
        ({"image_size": "whole", "views": (2, 3)}, r"views=\(num_clips, 1\)\. Received: views=\(2, 3\)"),
        ({"image_size": "whole", "views": (2, 1)}, r"must be None or 1 .* Received: batch_size=8"),
        ({"image_size": "half"}, r"Received: image_size='half'"),
        ({"shard": (3, 3)}, r"0 <= index < num_shards\. Received: shard=\(3, 3\)"),
        ({"shard": 3}, r"a pair \(num_shards, index\).* Received: shard=3"),
        ({"shard": (2, 0), "service": "grpc://x"}, r"Received: shard=\(2, 0\), service='grpc://x'"),
        ({"service": "grpc://x:1"}, r"by `keras-nonlocal shard DATA OUT`\. Received: service='grpc://x:1'"),
        ({"on_error": "ignore"}, r"Received: on_error='ignore'"),
        ({"seed": -1}, r"`seed` must be an integer from 0 to 2\*\*32 - 1\. Received: seed=-1"),
        ({"seed": 2**32}, r"2\*\*32 - 1\. Received: seed=4294967296"),
        ({"seed": 1.5}, r"2\*\*32 - 1\. Received: seed=1\.5"),
    ],
)  # fmt: skip
def test_guards(levels, arguments, message):
    with pytest.raises(ValueError, match=message):
        video_dataset_from_directory(levels, **{**SMALL, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"annotations": "list.txt"}, r"`annotations` cannot be .* labels\. Received: annotations='list.txt'"),
        ({"labels": [1]}, r'must be "inferred" or None with shards'),
        ({"follow_links": True}, r"`follow_links` cannot be passed with shards.* Received: follow_links=True"),
        ({"seed": 2**70}, r"2\*\*32 - 1\. Received: seed=1180591620717411303424"),
        ({"class_names": []}, r"which have \['a', 'b'\]\. Received: class_names=\[\]"),
        ({"class_names": ["a", "a"]}, r"which have \['a', 'b'\]\. Received: class_names=\['a', 'a'\]"),
        ({"class_names": ["a", "c"]}, r"which have \['a', 'b'\]\. Received: class_names=\['a', 'c'\]"),
        ({"class_names": ["a"], "labels": None}, r"Received: labels=None, class_names=\['a'\]"),
    ],
)
def test_shard_guards(shard_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        video_dataset_from_directory(shard_folder, **arguments, **SMALL)


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
