"""Evaluation over views: against a loop over videos and views, and figures by hand."""

import keras
import numpy as np
import pytest

from keras_nonlocal.applications import preprocess_input
from keras_nonlocal.evaluation import evaluate_views, summarize, wilson_interval

CLASSES = 7


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2, 4, 4, 3))
    x = keras.layers.Dense(CLASSES, kernel_initializer="random_normal", activation="tanh")(inputs)
    x = keras.layers.GlobalAveragePooling3D()(x)
    return keras.Model(inputs, keras.layers.Softmax()(40 * x))


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


@pytest.fixture(scope="module")
def expected(model, videos):
    """One view at a time, averaged in float64."""
    scores = [
        np.mean([np.asarray(model(preprocess_input(view[None]))[0], "float64") for view in views], axis=0)
        for views in videos[0]
    ]
    return np.array(scores)


@pytest.mark.parametrize("view_batch_size", [1, 4, 8, 1000])
def test_equals_a_loop_over_videos_and_views(model, videos, expected, view_batch_size):
    result = evaluate_views(
        model, batches(videos, 4, 4, 3), preprocess_input, view_batch_size=view_batch_size, verbose=0
    )
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    labels = videos[1]
    ranks = np.argsort(-expected, axis=1)
    assert result.top_1 == np.mean(ranks[:, 0] == labels)
    assert result.top_5 == pytest.approx((ranks[:, :5] == labels[:, None]).any(axis=1).mean())
    assert 0 < result.top_5 < 1  # or it would prove nothing
    assert (result.num_videos, result.num_views) == (11, 6)
    assert result.scores.dtype == np.float32
    assert result.labels.tolist() == labels.tolist()
    confusion = np.zeros((CLASSES, CLASSES), int)
    for label, rank in zip(labels, ranks, strict=True):
        confusion[label, rank[0]] += 1
    assert result.confusion.tolist() == confusion.tolist()


def test_averages_before_it_ranks():
    """Two views of 0.6 for class 0 lose to one of 1.0 for class 1: a vote would say otherwise."""
    views = np.zeros((1, 3, 1, 1, 1, 3), "float32")
    views[0, :2, ..., 0], views[0, :2, ..., 1], views[0, 2, ..., 1] = 0.6, 0.4, 1.0
    model = keras.Sequential([keras.Input((1, 1, 1, 3)), keras.layers.GlobalAveragePooling3D()])
    result = evaluate_views(model, [(views, np.array([1]))], verbose=0)
    assert result.top_1 == 1.0
    np.testing.assert_allclose(result.scores, [[0.4, 0.6, 0.0]], atol=1e-6)


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
    evaluate_views(model, batches(videos, 4, 4, 3), preprocess_input)
    assert "11/11" in capsys.readouterr().out
    evaluate_views(model, batches(videos, 4, 4, 3), preprocess_input, verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view_batch_size": 0}, r"must be a positive integer\. Received: view_batch_size=0$"),
        ({"view_batch_size": 2.5}, r"must be a positive integer\. Received: view_batch_size=2\.5$"),
        ({"dataset": []}, r"must yield at least one video\. Received: dataset=\[\]$"),
        (
            {"dataset": [(np.zeros((2, 2, 4, 4, 3)), np.array([0, 1]))]},
            r"views of the shape \(batch, views, frames.* Received: views\.shape=\(2, 2, 4, 4, 3\)$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.eye(2, dtype="int32"))]},
            r"labels of the shape \(2,\)\. Received: labels\.shape=\(2, 2\), labels\.dtype=int32$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.array([0.0, 1.0]))]},
            r"one integer label per video.* Received: labels\.shape=\(2,\), labels\.dtype=float64$",
        ),
        (
            {"dataset": [(np.zeros((2, 1, 2, 4, 4, 3)), np.array([0, 7]))]},
            r"classes of the model, 0 to 6\. Received: labels.min\(\)=0, labels.max\(\)=7$",
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
