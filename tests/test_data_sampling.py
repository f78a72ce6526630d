"""Frame indices and crop offsets against tables worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal.data import sampling
from keras_nonlocal.data.sampling import (
    SAMPLERS,
    Sampler,
    random_crop_position,
    training_indices,
    training_positions,
    view_crop_positions,
    view_indices,
    view_positions,
)

tnp = tf.experimental.numpy
ALMOST_1 = 1 - 2**-53  # the largest draw that there is


class LastRng:
    """Draws the largest values that there are."""

    def random(self, count):
        return np.full(count, ALMOST_1)


@pytest.mark.parametrize(
    "num_video_frames, num_frames, frame_stride, expected",
    [
        (20, 4, 2, [12, 14, 16, 18]),  # last start 20 - 8 = 12
        (8, 4, 2, [0, 2, 4, 6]),  # fits exactly: one start
        (5, 4, 2, [0, 2, 4, 1]),  # too short: starts at 0 and wraps
        (1, 3, 8, [0, 0, 0]),
        (7, 7, 1, [0, 1, 2, 3, 4, 5, 6]),
        (10, 1, 1, [9]),
    ],
)
def test_training_indices_at_the_last_start(num_video_frames, num_frames, frame_stride, expected):
    indices = training_indices(num_video_frames, num_frames, frame_stride, LastRng())
    assert indices.tolist() == expected


def test_training_starts_are_uniform_and_include_both_ends():
    rng = np.random.default_rng(0)
    starts = [training_indices(12, 4, 2, rng)[0] for _ in range(5000)]
    counts = np.bincount(starts)
    assert len(counts) == 5  # 0..12 - 8
    np.testing.assert_allclose(counts, 1000, rtol=0.15)


@pytest.mark.parametrize(
    "sampling, num_video_frames, num_frames, frame_stride, uniform, expected",
    [
        ("recipe", 20, 4, 2, [0.0], [0, 2, 4, 6]),
        ("recipe", 20, 4, 2, [0.5], [6, 8, 10, 12]),  # 13 starts: 6.5
        ("even", 20, 4, 2, [0.5], [6, 8, 10, 12]),
        ("pyslowfast", 20, 4, 2, [0.0], [0, 2, 4, 7]),  # 0, 2.33, 4.67, 7
        ("pyslowfast", 20, 4, 2, [0.5], [6, 8, 10, 13]),  # from 12 / 2
        ("pyslowfast", 20, 4, 2, [0.3], [3, 5, 8, 10]),  # 3.6, 5.93, 8.27, 10.6
        ("pyslowfast", 5, 4, 2, [0.9], [0, 2, 4, 4]),  # too short: 7 is past the end
        ("pyslowfast", 1, 3, 8, [0.9], [0, 0, 0]),
        ("pyslowfast", 10, 1, 1, [0.95], [8]),  # 9 * 0.95
        ("segments", 10, 4, 2, [0, 0.5, 0.5, 0.99], [0, 3, 6, 9]),  # 0, 3.75, 6.25, 9.975
        ("segments", 8, 4, 9, [0, 0.4, 0.5, 0.9], [0, 2, 5, 7]),  # the stride has no meaning
        ("segments", 2, 4, 2, [0.5] * 4, [0, 0, 1, 1]),  # too short: 0.25, 0.75, 1.25, 1.75
        ("segments", 1, 3, 8, [0.0, 0.5, ALMOST_1], [0, 0, 0]),
        ("segments", 7, 1, 1, [0.5], [3]),
    ],
)
def test_training_positions(sampling, num_video_frames, num_frames, frame_stride, uniform, expected):
    uniform = np.resize(uniform, num_frames)
    indices = training_positions(num_video_frames, num_frames, frame_stride, uniform, sampling)
    assert indices.tolist() == expected and indices.dtype == np.int64


def test_training_segments_reach_every_frame():
    rng = np.random.default_rng(0)
    indices = np.stack([training_indices(10, 4, 1, rng, "segments") for _ in range(4000)])
    for segment, reached in enumerate(([0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9])):  # 2.5 frames each
        assert sorted(set(indices[:, segment])) == reached
    np.testing.assert_allclose(np.bincount(indices.ravel()), 1600, rtol=0.15)


@pytest.mark.parametrize(
    "sampling, num_video_frames, num_frames, frame_stride, num_clips, expected",
    [
        ("pyslowfast", 20, 4, 2, 3, [[0, 2, 4, 7], [4, 6, 8, 11], [8, 10, 12, 15]]),  # 12 j / 3
        ("pyslowfast", 25, 2, 3, 4, [[0, 5], [4, 9], [9, 14], [14, 19]]),  # 19 j / 4
        ("pyslowfast", 5, 4, 2, 2, [[0, 2, 4, 4], [0, 2, 4, 4]]),
        ("pyslowfast", 10, 1, 1, 3, [[0], [3], [6]]),
        ("pyslowfast", 1, 2, 8, 2, [[0, 0], [0, 0]]),
        ("segments", 10, 4, 2, 1, [[1, 3, 6, 8]]),  # 1.25, 3.75, 6.25, 8.75
        ("segments", 10, 4, 2, 2, [[0, 3, 5, 8], [1, 4, 6, 9]]),  # 0.625 + 1.25 k, dealt out in turn
        ("segments", 3, 4, 2, 1, [[0, 1, 1, 2]]),
        ("segments", 1, 3, 8, 2, [[0, 0, 0]] * 2),
        ("segments", 7, 1, 1, 1, [[3]]),
    ],
)
def test_view_positions(sampling, num_video_frames, num_frames, frame_stride, num_clips, expected):
    indices = view_indices(num_video_frames, num_frames, frame_stride, num_clips, sampling)
    assert indices.tolist() == expected and indices.dtype == np.int64


def test_pyslowfast_positions_against_exact_fractions():
    for num_video_frames in (1, 9, 31, 32, 33, 100, 299):
        for num_frames, frame_stride, num_clips in ((8, 4, 10), (5, 3, 7), (1, 1, 3), (16, 2, 1)):
            room = max(num_video_frames - num_frames * frame_stride, 0)
            expected = [
                [
                    min(int(Fraction(room * clip, num_clips) + Fraction(frame * span, max(num_frames - 1, 1))), last)
                    for frame in range(num_frames)
                ]
                for clip in range(num_clips)
                for span, last in [(num_frames * frame_stride - 1, num_video_frames - 1)]
            ]
            assert (
                view_indices(num_video_frames, num_frames, frame_stride, num_clips, "pyslowfast").tolist() == expected
            )


@pytest.mark.parametrize("sampling", SAMPLERS)
@pytest.mark.parametrize("num_frames, frame_stride, num_clips", [(5, 3, 4), (1, 1, 1)])
def test_graphs_take_the_same_frames(sampling, num_frames, frame_stride, num_clips):
    @tf.function(input_signature=[tf.TensorSpec((), tf.int64), tf.TensorSpec((None,), tf.float64)])
    def in_graph(num_video_frames, uniform):
        sizes = num_video_frames, num_frames, frame_stride
        return (
            training_positions(*sizes, uniform, sampling, xp=tnp),
            view_positions(*sizes, num_clips, sampling, xp=tnp),
        )

    rng = np.random.default_rng(0)
    for num_video_frames in (1, 2, 4, 5, 14, 15, 16, 17, 100, 301):
        sizes = num_video_frames, num_frames, frame_stride
        for uniform in (*rng.random((5, num_frames)), np.zeros(num_frames), np.full(num_frames, ALMOST_1)):
            training, views = in_graph(num_video_frames, uniform)
            assert training.dtype == views.dtype == tf.int64
            assert training.numpy().tolist() == training_positions(*sizes, uniform, sampling).tolist()
        assert views.numpy().tolist() == view_positions(*sizes, num_clips, sampling).tolist()
        assert 0 <= views.numpy().min() and max(views.numpy().max(), training.numpy().max()) < num_video_frames


@pytest.mark.parametrize(
    "num_video_frames, num_frames, frame_stride, num_clips, sampling, starts",
    [
        (300, 8, 8, 10, "recipe", [0, 30, 60, 90, 120, 150, 180, 210, 240, 270]),
        (25, 2, 1, 10, "recipe", [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
        (3, 2, 1, 4, "recipe", [0, 0, 1, 2]),
        (300, 8, 8, 1, "recipe", [0]),
        (300, 8, 8, 1, "even", [118]),  # (300 - 64) / 2
        (300, 8, 8, 3, "even", [0, 118, 236]),
        (20, 4, 2, 4, "even", [0, 4, 8, 12]),
        (6, 4, 2, 3, "even", [0, 0, 0]),  # too short
    ],
)
def test_view_starts(num_video_frames, num_frames, frame_stride, num_clips, sampling, starts):
    indices = view_indices(num_video_frames, num_frames, frame_stride, num_clips, sampling)
    assert indices.shape == (num_clips, num_frames)
    assert indices[:, 0].tolist() == starts
    assert np.all(np.diff(indices, axis=1) % num_video_frames == frame_stride % num_video_frames)


@pytest.mark.parametrize(
    "sampling, expected",
    [
        ("recipe", [[0, 3, 6, 9], [5, 8, 1, 4]]),  # the second clip wraps past frame 9
        ("even", [[0, 3, 6, 9], [0, 3, 6, 9]]),  # 12 > 10 frames: both from 0
    ],
)
def test_views_wrap(sampling, expected):
    assert view_indices(10, 4, 3, 2, sampling).tolist() == expected


def test_a_short_video_wraps_within_a_clip():
    assert view_indices(6, 4, 2, 1, "even").tolist() == [[0, 2, 4, 0]]


def test_a_new_sampler_is_one_entry(monkeypatch):
    last = Sampler(
        training=lambda xp, F, T, stride, uniform: F - T + xp.arange(T),
        views=lambda xp, F, T, stride, N: F - T + xp.arange(T) + xp.zeros((N, 1), "int64"),
    )
    monkeypatch.setitem(sampling.SAMPLERS, "last", last)
    assert view_indices(10, 2, 2, 1, "last").tolist() == [[8, 9]]
    assert training_indices(10, 2, 2, LastRng(), "last").tolist() == [8, 9]


@pytest.mark.parametrize(
    "height, width, size, num_crops, expected",
    [
        (256, 340, (256, 256), 1, [(0, 42)]),
        (256, 340, (256, 256), 3, [(0, 0), (0, 42), (0, 84)]),
        (340, 256, (256, 256), 3, [(0, 0), (42, 0), (84, 0)]),
        (256, 256, (224, 224), 3, [(16, 0), (16, 16), (16, 32)]),
        (256, 340, (256, 256), 5, [(0, 0), (0, 21), (0, 42), (0, 63), (0, 84)]),
        (256, 340, (256, 256), 2, [(0, 0), (0, 84)]),
        (256, 341, (224, 256), 1, [(16, 42)]),
    ],
)
def test_view_crop_positions(height, width, size, num_crops, expected):
    positions = view_crop_positions(height, width, size, num_crops)
    assert list(map(tuple, positions.tolist())) == expected
    in_graph = tf.function(lambda height, width: view_crop_positions(height, width, size, num_crops, xp=tnp))
    np.testing.assert_array_equal(in_graph(tf.constant(height), tf.constant(width)), positions)


def test_random_crop_positions_cover_the_frame():
    rng = np.random.default_rng(0)
    positions = [random_crop_position(10, 12, (8, 9), rng.random(2)) for _ in range(3000)]
    counts = np.zeros((3, 4))
    for top, left in positions:
        counts[top, left] += 1
    np.testing.assert_allclose(counts, 250, rtol=0.3)
    in_graph = tf.function(lambda height, uniform: random_crop_position(height, 12, (8, 9), uniform, xp=tnp))
    assert in_graph(tf.constant(10), [0.5, ALMOST_1]).numpy().tolist() == [1, 3]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: training_indices(0, 4, 2, LastRng()),
            r"`num_video_frames` must be at least 1\. Received: num_video_frames=0",
        ),
        (lambda: view_indices(9, 0, 2, 1), r"`num_frames` must .* Received: num_frames=0"),
        (lambda: view_indices(9, 4, -1, 1), r"`frame_stride` must .* Received: frame_stride=-1"),
        (lambda: view_indices(9, 4, 1, 0), r"`num_clips` must .* Received: num_clips=0"),
        (
            lambda: view_indices(9, 4, 1, 1, "odd"),
            r"`sampling` must be one of \['even', 'pyslowfast', 'recipe', 'segments'\]\. Received: sampling='odd'",
        ),
        (lambda: training_indices(9, 4, 1, LastRng(), "odd"), r"Received: sampling='odd'"),
        (
            lambda: view_crop_positions(100, 120, (100, 121), 3),
            r"within the frame of 100 x 120 pixels\. Received: size=\(100, 121\)",
        ),
    ],
)
def test_guards(call, message):
    with pytest.raises(ValueError, match=message):
        call()
