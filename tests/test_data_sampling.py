"""Frame indices and crop offsets against tables worked out by hand."""

import numpy as np
import pytest

from keras_nonlocal.data import sampling
from keras_nonlocal.data.sampling import (
    random_crop_offset,
    training_indices,
    view_crop_offsets,
    view_indices,
)


class LastRng:
    """Draws the largest value that it may."""

    def integers(self, high, endpoint):
        assert endpoint
        return high


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
    monkeypatch.setitem(sampling.VIEW_SAMPLERS, "last", lambda f, span, n: np.full(n, f - span))
    assert view_indices(10, 2, 2, 1, "last").tolist() == [[6, 8]]


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
def test_view_crop_offsets(height, width, size, num_crops, expected):
    assert view_crop_offsets(height, width, size, num_crops) == expected


def test_random_crop_offsets_cover_the_frame():
    rng = np.random.default_rng(0)
    offsets = {random_crop_offset(10, 12, (8, 9), rng) for _ in range(500)}
    assert offsets == {(top, left) for top in range(3) for left in range(4)}


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
            r"`sampling` must be one of \['even', 'recipe'\]\. Received: sampling='odd'",
        ),
        (
            lambda: view_crop_offsets(100, 120, (100, 121), 3),
            r"within the frame of 100 x 120 pixels\. Received: size=\(100, 121\)",
        ),
    ],
)
def test_guards(call, message):
    with pytest.raises(ValueError, match=message):
        call()
