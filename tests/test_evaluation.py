"""Evaluation over views: against slow loops in float64, and figures by hand."""

import csv
import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keras_nonlocal.applications import fully_convolutional, preprocess_input
from keras_nonlocal.evaluation import draw_confusion, evaluate_views, summarize, wilson_interval

CLASSES = 7


def small_model(seed=0, activation="softmax"):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((2, 4, 4, 3))
    x = keras.layers.Dense(CLASSES, kernel_initializer="random_normal", activation="tanh")(inputs)
    x = keras.layers.GlobalAveragePooling3D()(x)
    return keras.Model(inputs, keras.layers.Activation(activation)(40 * x))


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(0)
    # Every video and view of its own colour: then views disagree, and their mean is not any one of them.
    colour = rng.integers(0, 200, (11, 6, 1, 1, 1, 3))
    views = (colour + rng.integers(0, 56, (11, 6, 2, 4, 4, 3))).astype("uint8")
    return views, rng.integers(0, CLASSES, 11)


def batches(videos, *sizes):
    start = 0
    for size in sizes:
        yield tuple(array[start : start + size] for array in videos)
        start += size


def slow_scores(model, views, reduction=np.mean):
    """One view at a time, reduced in float64."""
    scores = [
        reduction([np.asarray(model(preprocess_input(view[None]))[0], "float64") for view in video], axis=0)
        for video in views
    ]
    return np.array(scores)


@pytest.fixture(scope="module")
def expected(model, videos):
    return slow_scores(model, videos[0])


# The slow twins: plain loops over Python numbers.


def slow_figures(scores, labels):
    """Top-1, top-5 and the confusion matrix: classes sorted by falling score, then by rising number."""
    num_classes = len(scores[0])
    orders = [sorted(range(num_classes), key=lambda k: (-row[k], k)) for row in scores]
    confusion = [[0] * num_classes for _ in range(num_classes)]
    for order, label in zip(orders, labels, strict=True):
        confusion[label][order[0]] += 1
    top_1 = sum(order[0] == label for order, label in zip(orders, labels, strict=True)) / len(labels)
    top_5 = sum(label in order[:5] for order, label in zip(orders, labels, strict=True)) / len(labels)
    return top_1, top_5, confusion


def slow_wilson(successes, trials):
    """The roots of (p - p̂)² = z² p (1 - p) / n, which is how the interval is defined."""
    z, p = 1.959964, successes / trials
    return np.sort(np.roots([1 + z * z / trials, -2 * p - z * z / trials, p * p]).real)


def slow_average_precision(scores, labels):
    """Over the thresholds, one for each different score: precision times the step in recall."""
    total, recall_before = 0.0, 0.0
    positives = sum(labels)
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        recall = sum(chosen) / positives
        total += (recall - recall_before) * sum(chosen) / len(chosen)
        recall_before = recall
    return total


def charades_average_precision(scores, labels, of_any):
    """As Charades' script has it: the mean, over the videos of the class, of the precision down to each.

    Videos of no class come last, whatever their scores.
    """
    precisions, found = [], 0
    order = sorted(range(len(scores)), key=lambda i: -scores[i] if of_any[i] else np.inf)
    for place, index in enumerate(order, start=1):
        if labels[index]:
            found += 1
            precisions.append(found / place)
    return sum(precisions) / len(precisions)


@pytest.mark.parametrize("view_batch_size", [1, 4, 8, 1000])
def test_equals_a_loop_over_videos_and_views(model, videos, expected, view_batch_size):
    result = evaluate_views(
        model,
        batches(videos, 4, 4, 3),
        preprocess_input=preprocess_input,
        view_batch_size=view_batch_size,
        verbose=0,
    )
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    top_1, top_5, confusion = slow_figures(expected.tolist(), videos[1].tolist())
    assert (result.top_1, result.top_5) == (top_1, pytest.approx(top_5))
    assert 0 < result.top_5 < 1  # or it would prove nothing
    assert (result.num_videos, result.num_views) == (11, 6)
    assert result.scores.dtype == np.float32
    assert result.labels.tolist() == videos[1].tolist()
    assert result.confusion.tolist() == confusion


def test_averages_before_it_ranks():
    """Two views of 0.6 for class 0 lose to one of 1.0 for class 1: a vote would say otherwise."""
    views = np.zeros((1, 3, 1, 1, 1, 3), "float32")
    views[0, :2, ..., 0], views[0, :2, ..., 1], views[0, 2, ..., 1] = 0.6, 0.4, 1.0
    model = keras.Sequential([keras.Input((1, 1, 1, 3)), keras.layers.GlobalAveragePooling3D()])
    result = evaluate_views(model, [(views, np.array([1]))], verbose=0)
    assert result.top_1 == 1.0
    np.testing.assert_allclose(result.scores, [[0.4, 0.6, 0.0]], atol=1e-6)


def test_the_largest_score_of_the_views(model, videos):
    options = {"preprocess_input": preprocess_input, "view_reduction": "max", "verbose": 0}
    result = evaluate_views(model, batches(videos, 4, 4, 3), **options)
    np.testing.assert_allclose(result.scores, slow_scores(model, videos[0], np.max), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_figures_equal_slow_loops(num_videos, num_classes, levels, seed):
    """With few levels most scores are equal: then the class of the lower number is first."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels + 1, (num_videos, num_classes)).astype("float32") / levels
    labels = rng.integers(0, num_classes, num_videos)
    result = summarize(scores, labels)
    top_1, top_5, confusion = slow_figures(scores.tolist(), labels.tolist())
    assert (result.top_1, result.top_5) == (pytest.approx(top_1), pytest.approx(top_5))
    assert result.confusion.tolist() == confusion
    assert result.interval == pytest.approx(slow_wilson(round(top_1 * num_videos), num_videos), abs=1e-6)
    for k in range(num_classes):
        of_class = labels == k
        share = slow_figures(scores[of_class], labels[of_class])[0] if of_class.any() else np.nan
        np.testing.assert_allclose(result.per_class[k], share)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.sampled_from([2, 5, 10**6]), st.integers(0, 2**32 - 1))
def test_mean_average_precision_equals_slow_loops(num_videos, num_classes, levels, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (num_videos, num_classes)).astype("float64") / levels
    labels = rng.integers(0, 2, (num_videos, num_classes)).astype("float32")
    labels[0, 0] = 1
    result = summarize(scores, labels)
    of_any = labels.any(axis=1)
    of_classes = {
        k: slow_average_precision(scores[of_any, k].tolist(), labels[of_any, k].tolist())
        for k in range(num_classes)
        if labels[:, k].any()
    }
    assert result.mean_average_precision == pytest.approx(sum(of_classes.values()) / len(of_classes))
    for k in range(num_classes):
        np.testing.assert_allclose(result.average_precision[k], of_classes.get(k, np.nan))
        if k in of_classes and len(set(scores[:, k])) == num_videos:
            assert of_classes[k] == pytest.approx(charades_average_precision(scores[:, k], labels[:, k], of_any))


def test_average_precision_by_hand():
    """Of the videos of any class, in the order of the scores, the first has the 1st, 3rd and 4th, the last both others.

    Nobody has the second. The last video has none, so that its high scores are of no weight.
    """
    scores = np.array([[0.9, 0.5, 0.1], [0.8, 0.1, 0.7], [0.5, 0.2, 0.2], [0.3, 0.9, 0.3], [0.1, 0.0, 0.6], [1, 1, 1]])
    labels = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    result = summarize(scores, labels, class_names=["dance", "sleep", "eat"])
    assert result.mean_average_precision == pytest.approx(((1 / 1 + 2 / 3 + 3 / 4) / 3 + 1) / 2)
    assert result.headline() == "mean average precision  0.9028  (of 2 classes)"
    assert (
        result.table() == "class  videos  average precision\n"
        "dance       3             0.8056\nsleep       0                  -\neat         2             1.0000"
    )
    assert result.figures() == {
        "num_videos": 6,
        "num_views": 1,
        "mean_average_precision": result.mean_average_precision,
        "class_names": ["dance", "sleep", "eat"],
        "per_class": [pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3), None, 1.0],
    }


def test_several_labels_a_video(videos):
    model, (views, _) = small_model(activation="sigmoid"), videos
    labels = np.random.default_rng(3).integers(0, 2, (11, CLASSES)).astype("float32")
    labels[:, 4], labels[2] = 0, 0  # a class without videos, and a video without classes
    result = evaluate_views(model, batches((views, labels), 4, 4, 3), preprocess_input=preprocess_input, verbose=0)
    expected = slow_scores(model, views)
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    of_classes = [
        slow_average_precision(np.delete(expected[:, k], 2).tolist(), np.delete(labels[:, k], 2).tolist())
        for k in range(CLASSES)
        if k != 4
    ]
    assert result.mean_average_precision == pytest.approx(np.mean(of_classes))
    assert np.isnan(result.average_precision).tolist() == [k == 4 for k in range(CLASSES)]
    assert result.labels.tolist() == labels.tolist()


def test_whole_frames_of_several_sizes(videos):
    """Every video its own width, as whole frames come."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2, None, None, 3))
    x = keras.layers.Conv3D(5, (1, 3, 3), activation="tanh", kernel_initializer="he_normal")(inputs)
    x = keras.layers.GlobalAveragePooling3D()(x)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax")(x))
    rng = np.random.default_rng(1)
    dataset = [
        (rng.normal(size=(1, 3, 2, 6, width, 3)).astype("float32"), np.array([label]))
        for width, label in ((6, 1), (9, 4), (7, 0))
    ]
    result = evaluate_views(fully_convolutional(model, 6), dataset, 3, 1, verbose=0)
    for scores, (views, _) in zip(result.scores, dataset, strict=True):
        crops = [views[0, :, :, :, x : x + 6] for x in range(views.shape[4] - 5)]
        np.testing.assert_allclose(scores, np.mean([model(crop) for crop in crops], axis=(0, 1)), atol=1e-6)


def test_figures_by_hand():
    scores = np.eye(4, dtype="float32")[[0, 0, 1, 3, 3]]
    result = summarize(scores, np.array([0, 1, 1, 3, 0]))
    assert result.top_1 == 0.6 and result.top_5 == 1.0
    assert result.confusion.tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(result.per_class, [0.5, 0.5, np.nan, 1.0])
    assert result.interval == wilson_interval(3, 5)


def test_top_5_by_hand():
    scores = np.tile(np.arange(8, dtype="float32")[::-1], (8, 1))  # class 0 first, class 7 last
    result = summarize(scores, np.arange(8))
    assert (result.top_1, result.top_5) == (1 / 8, 5 / 8)


def test_equal_scores_go_to_the_lower_class_in_both_figures():
    result = summarize(np.zeros((8, 8), "float32"), np.arange(8))
    assert (result.top_1, result.top_5) == (1 / 8, 5 / 8)
    assert result.confusion[:, 0].tolist() == [1] * 8


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [
        (15, 20, (0.5313, 0.8881)),  # centre 0.84604 / 1.19207, half-width 1.95996 * 0.108517 / 1.19207
        (0, 10, (0.0, 0.2775)),  # 3.8415 / 13.8415
        (10, 10, (0.7225, 1.0)),  # 10 / 13.8415
        (1, 1, (0.2065, 1.0)),  # 1 / 4.8415
        (50, 100, (0.4038, 0.5962)),
    ],
)
def test_wilson_interval(successes, trials, interval):
    assert wilson_interval(successes, trials) == pytest.approx(interval, abs=5e-5)


def test_shows_progress_unless_silent(model, videos, capsys):
    evaluate_views(model, batches(videos, 4, 4, 3), preprocess_input=preprocess_input)
    assert "11/11" in capsys.readouterr().out
    evaluate_views(model, batches(videos, 4, 4, 3), preprocess_input=preprocess_input, verbose=0)
    assert capsys.readouterr().out == ""


def test_progress_knows_the_number_of_files_before_the_end(model, videos, capsys):
    class Dataset(list):
        file_paths = [f"{number}.mp4" for number in range(12)]  # one of them is broken

    evaluate_views(model, Dataset(batches(videos, 4, 4, 3)), preprocess_input=preprocess_input)
    printed = capsys.readouterr().out
    assert " 4/12" in printed and "11/11" in printed and "11/12" not in printed.split("11/11")[1]


def test_takes_the_class_names_of_the_dataset(model, videos):
    class Dataset(list):
        class_names = [f"class {k}" for k in range(CLASSES)]

    dataset = Dataset(batches(videos, 4, 4, 3))
    options = {"preprocess_input": preprocess_input, "verbose": 0}
    assert evaluate_views(model, dataset, **options).names == Dataset.class_names
    assert evaluate_views(model, dataset, class_names=list("abcdefg"), **options).names == list("abcdefg")
    Dataset.class_names = ["of", "another", "number"]
    assert evaluate_views(model, dataset, **options).names == list("0123456")


# Resuming


class Counting:
    """A model that counts the clips it takes, and may be stopped."""

    def __init__(self, model, stop_after=None):
        self.model, self.clips, self.stop_after = model, 0, stop_after
        self.get_weights = model.get_weights

    def predict_on_batch(self, clips):
        if self.stop_after is not None and self.clips >= self.stop_after:
            raise KeyboardInterrupt
        self.clips += len(clips)
        return self.model.predict_on_batch(clips)


OPTIONS = {"preprocess_input": preprocess_input, "view_batch_size": 6, "verbose": 0}


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_stopped_run_is_resumed(model, videos, tmp_path, cut):
    file = tmp_path / "scores.jsonl"
    stopped = Counting(model, stop_after=5 * 6)
    with pytest.raises(KeyboardInterrupt):
        evaluate_views(stopped, batches(videos, *[1] * 11), resume=file, **OPTIONS)
    file.write_bytes(file.read_bytes()[: -cut or None])  # the last line is only half written
    kept = 5 if cut == 0 else 4
    counting = Counting(model)
    result = evaluate_views(counting, batches(videos, 4, 4, 3), resume=file, **OPTIONS)
    assert counting.clips == (1 + 11 - kept) * 6  # and one to see that the model is the same
    whole = evaluate_views(model, batches(videos, 4, 4, 3), **OPTIONS)
    np.testing.assert_array_equal(result.scores, whole.scores)  # to the last bit
    assert result.confusion.tolist() == whole.confusion.tolist()
    assert len(file.read_bytes().splitlines()) == 1 + 11
    # Once more, in another order: nothing is left to do.
    counting = Counting(model)
    again = evaluate_views(counting, [(videos[0][::-1], videos[1][::-1])], resume=file, **OPTIONS)
    assert counting.clips == 6
    np.testing.assert_array_equal(again.scores, whole.scores[::-1])


def test_the_file_has_a_readable_line_for_every_video(model, videos, tmp_path):
    file = tmp_path / "scores.jsonl"
    names = np.array([f"video {number}.mp4".encode() for number in range(11)])
    result = evaluate_views(model, batches((*videos, names), 4, 4, 3), resume=file, **OPTIONS)
    header, *rows = map(json.loads, file.read_text().splitlines())
    assert header["format"] == "keras_nonlocal.scores.1" and header["view_reduction"] == "mean"
    assert [row["name"] for row in rows] == [f"video {number}.mp4" for number in range(11)]
    np.testing.assert_array_equal(np.array([row["scores"] for row in rows], "float32"), result.scores)


def test_a_header_that_was_half_written_is_written_anew(model, videos, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    evaluate_views(model, batches(videos, 11), resume=whole, **OPTIONS)
    half.write_bytes(whole.read_bytes()[:20])
    evaluate_views(model, batches(videos, 11), resume=half, **OPTIONS)
    assert half.read_bytes() == whole.read_bytes()


def test_other_pixels_of_a_video_are_scored_anew(model, videos, tmp_path):
    file = tmp_path / "scores.jsonl"
    evaluate_views(model, batches(videos, 4, 4, 3), resume=file, **OPTIONS)
    changed = videos[0].copy()
    changed[3, 0, 0, 0, 0, 0] ^= 1
    counting = Counting(model)
    evaluate_views(counting, batches((changed, videos[1]), 4, 4, 3), resume=file, **OPTIONS)
    assert counting.clips == 2 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": small_model(1)},
            r"It is of a model of other weights: weights '\w{32}', not '",
        ),
        ({"view_reduction": "max"}, r"It is of another `view_reduction`: view_reduction 'mean', not 'max'\. Received"),
        (
            {"preprocess_input": lambda x: x / np.float32(255)},
            r"Now the scores of video 0 \(counted from 0\) are others.* Received: resume='.*scores.jsonl'$",
        ),
        ({"text": b""}, None),
        (
            {"text": b"PK\x03 a model"},
            r"that `evaluate_views` wrote.* its line 1 is none of its lines\.",
        ),
        ({"text": b'{"a": 1}\n'}, r"its line 1 is none of its lines"),
        ({"add": b'{"video": "a"}\n'}, r"its line 13 is none of its lines"),
        ({"add": b"\n\n"}, r"its line 13 is none of its lines"),
        ({"add": b'{"video": "a", "scores": 3, "half'}, None),
    ],
)
def test_a_file_of_other_scores_is_refused(model, videos, tmp_path, change, message):
    file = tmp_path / "scores.jsonl"
    evaluate_views(model, batches(videos, 11), resume=file, **OPTIONS)
    change = dict(change)
    file.write_bytes(change.pop("text", file.read_bytes()) + change.pop("add", b""))
    before = file.read_bytes()
    arguments = {"model": model, "dataset": batches(videos, 11), "resume": file} | OPTIONS | change
    if message is None:
        evaluate_views(**arguments)
        assert len(file.read_bytes().splitlines()) == 12
    else:
        with pytest.raises(ValueError, match=message):
            evaluate_views(**arguments)
        assert file.read_bytes() == before


# Saving


def test_saves_tables_and_a_picture(tmp_path):
    names = ["a, b", "ß → 猫", "c"]
    scores = np.eye(3, dtype="float32")[[0, 0, 1, 0, 1, 0]]
    result = summarize(scores, np.array([0, 0, 0, 1, 1, 0]), num_views=2, class_names=names)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("the old one")
    written = result.save(tmp_path / "out")
    assert sorted(written) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.json",
        "per_class.csv",
        "confusion.csv",
        "confusion.png",
    }
    low, high = result.interval
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {
        "num_videos": 6,
        "num_views": 2,
        "top_1": 4 / 6,
        "top_5": 1.0,
        "interval": [low, high],
    }

    def table(name):
        with open(tmp_path / "out" / name, newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    assert table("per_class.csv") == [
        ["class", "videos", "top-1", "top-5"],
        ["a, b", "4", "0.75", "1.0"],
        ["ß → 猫", "2", "0.5", "1.0"],
        ["c", "0", "", ""],
    ]
    assert table("confusion.csv") == [
        ["true \\ predicted", "a, b", "ß → 猫", "c"],
        ["a, b", "3", "1", "0"],
        ["ß → 猫", "1", "1", "0"],
        ["c", "0", "0", "0"],
    ]
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(picture.convert("RGB"), draw_confusion(result.confusion, names))


def test_several_labels_have_no_confusion_matrix(tmp_path):
    summarize(np.array([[0.9, 0.5]]), np.array([[1, 0]])).save(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"summary.json", "per_class.csv"}


@pytest.mark.parametrize(("num_classes", "cell"), [(1, 32), (5, 32), (60, 20), (61, 19), (400, 3)])
def test_the_picture_has_a_square_for_every_pair(num_classes, cell):
    rng = np.random.default_rng(0)
    confusion = rng.multinomial(100, [1 / num_classes] * num_classes, num_classes)
    confusion[num_classes // 2] = 0  # a class without videos
    confusion[0] = [50] + [0] * (num_classes - 1)
    picture = np.asarray(draw_confusion(confusion, [f"name {k}" for k in range(num_classes)]))
    bottom = picture.shape[0] - 24
    side = bottom - cell * num_classes
    assert picture.shape[1] >= side + cell * num_classes
    # The corners of the squares: numbers stand in the middle.
    corners = picture[side:bottom:cell, side : side + cell * num_classes : cell]
    for row in range(num_classes):
        total = confusion[row].sum()
        for column in {0, row, num_classes - 1}:
            share = (confusion[row, column] / total) ** 0.5 if total else 0
            colour = np.array([225] * 3 if not total else [255 - share * (255 - dark) for dark in (8, 48, 107)])
            np.testing.assert_allclose(corners[row, column], colour, atol=0.51)
    # Names above and to the left.
    assert (picture[side:bottom, :side] < 128).any() and (picture[:side, side:] < 128).any()


def test_names_stand_beside_their_rows_and_columns():
    """One long name: its ink is beside its own row, and above its own column, the end of it next to the squares."""
    names = ["."] * 5
    names[3] = "a long name"
    picture = np.asarray(draw_confusion(np.eye(5, dtype=int), names)).min(axis=2)
    side = picture.shape[0] - 24 - 5 * 32
    beside = (picture[side : side + 160, :side] < 128).reshape(5, 32, side).sum(axis=(1, 2))
    above = (picture[:side, side : side + 160] < 128).reshape(side, 5, 32).sum(axis=(0, 2))
    assert beside.argmax() == above.argmax() == 3 and beside[3] > 5 * beside[0] and above[3] > 5 * above[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view_batch_size": 0}, r"must be a positive integer\. Received: view_batch_size=0$"),
        ({"view_batch_size": 2.5}, r"must be a positive integer\. Received: view_batch_size=2\.5$"),
        ({"view_reduction": "vote"}, r"must be one of 'mean', 'max'\. Received: view_reduction='vote'$"),
        ({"num_clips": 10}, r"or both `None`\. Received: num_clips=10, num_crops=None$"),
        (
            {"num_clips": abs, "num_crops": 3},
            r"must both be positive integers.* Received: num_clips=<built-in",
        ),
        (
            {"num_clips": 10, "num_crops": 3},
            r"must yield 30 views of every video, num_clips=10 times num_crops=3\. "
            r"Received: views\.shape=\(2, 1, 2, 4, 4, 3\)$",
        ),
        (
            {"dataset": [(np.zeros((1, views, 2, 4, 4, 3)), np.array([0])) for views in (3, 2)]},
            r"must yield 3 views of every video, as of the first\. Received: views\.shape=\(1, 2, 2, 4, 4, 3\)$",
        ),
        ({"class_names": ["a", "b"]}, r"as many as the model's scores, 7\. Received: class_names=\['a', 'b'\]$"),
        ({"dataset": []}, r"must yield at least one video\. Received: dataset=\[\]$"),
        ({"dataset": [np.zeros((2, 2, 4, 4, 3))]}, r"\(views, labels, names\)\. Received: ndarray$"),
        (
            {"dataset": [(np.zeros((2, 2, 4, 4, 3)), np.array([0, 1]))]},
            r"views of the shape \(batch, views, frames.* Received: views\.shape=\(2, 2, 4, 4, 3\)$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.eye(2, dtype="int32"))]},
            r"as many as the model's scores, 7\. Received: labels\.shape=\(2, 2\)$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.array([0.0, 1.0]))]},
            r"one integer label per video.* Received: labels\.shape=\(2,\), labels\.dtype=float64$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.array([0, 7]))]},
            r"Labels must be classes of the model, 0 to 6\. Received: 7 for video 1 \(counted from 0\)$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.array([0, -1]), ["a.mp4", "b.mp4"])]},
            r"0 to 6\. Received: -1 for b\.mp4$",
        ),
        (
            {"dataset": [(np.zeros((1, 1, 2, 4, 4, 3)), np.array([[0, 1, 0.5, 0, 0, 0, 0]]))]},
            r"Labels must be 0 and 1\. Received: \[0\.0, 1\.0, 0\.5.*\] for video 0 \(counted from 0\)$",
        ),
        (
            {"dataset": [(np.zeros((1, 1, 2, 4, 4, 3)), np.zeros((1, 7)))]},
            r"At least one video must be of a class\. Received: labels of zeros only$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.array([0, 1]), ["a.mp4"])]},
            r"one name per video, 2 of them\. Received: names=\['a\.mp4'\]$",
        ),
        (
            {"dataset": [(np.full((2, 1, 2, 4, 4, 3), [[[[[[0]]]]], [[[[[np.nan]]]]]]), np.array([0, 1]))]},
            r"must give finite scores\. Received: NaN or infinity for video 1 \(counted from 0\)$",
        ),
        (
            {"model": keras.Sequential([keras.Input((2, 4, 4, 3)), keras.layers.Dense(7)])},
            r"one score per class.* Received: scores.shape=\(2, 2, 4, 4, 7\)$",
        ),
    ],
)
def test_errors_say_what_was_expected(change, message, model):
    arguments = {"model": model, "dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.array([0, 1]))]}
    with pytest.raises(ValueError, match=message):
        evaluate_views(**(arguments | change), verbose=0)
