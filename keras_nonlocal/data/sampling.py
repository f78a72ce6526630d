"""Which frames and which crops make a clip: formulas only, no decoding.

They are written against an array module `xp`, NumPy or `tf.experimental.numpy`, so that one formula serves arrays and
TensorFlow graphs, where the length of a video is known only as the graph runs.

Shape letters: F frames of the video, T frames of a clip, N clips, H and W the frame's height and width.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Which frames a clip takes.

    Attributes:
        training: Function `(xp, F, T, stride, uniform)` to T frame numbers; `uniform` are T draws from [0, 1).
        views: Function `(xp, F, T, stride, N)` to frame numbers of the shape (N, T).
    """

    training: Callable
    views: Callable


def _wrapping(xp, starts, F, T, stride):
    return (starts[..., None] + xp.arange(T) * stride) % F


def _recipe_training(xp, F, T, stride, uniform):
    num_starts = xp.maximum(F - T * stride, 0) + 1
    return _wrapping(xp, _floor(xp, uniform[0] * _float(xp, num_starts)), F, T, stride)


def _recipe_views(xp, F, T, stride, N):
    return _wrapping(xp, xp.arange(N) * F // N, F, T, stride)


def _even_views(xp, F, T, stride, N):
    return _wrapping(xp, _evenly_spaced(xp, xp.maximum(F - T * stride, 0), N), F, T, stride)


def _pyslowfast_training(xp, F, T, stride, uniform):
    start = uniform[0] * _float(xp, xp.maximum(F - T * stride, 0))
    steps = _float(xp, xp.arange(T) * (T * stride - 1)) / max(T - 1, 1)
    return xp.minimum(_floor(xp, start + steps), F - 1)


def _pyslowfast_views(xp, F, T, stride, N):
    # start + step in whole numbers over one denominator, so that nothing is lost before rounding down
    intervals = max(T - 1, 1)
    starts = xp.arange(N)[:, None] * xp.maximum(F - T * stride, 0) * intervals
    steps = xp.arange(T) * (T * stride - 1) * N
    return xp.minimum((starts + steps) // (N * intervals), F - 1)


def _segments_training(xp, F, T, stride, uniform):
    # the sum with a draw just below 1 can round up
    return xp.minimum(_floor(xp, (_float(xp, xp.arange(T)) + uniform) * _float(xp, F) / T), F - 1)


def _segments_views(xp, F, T, stride, N):
    # the centres of N * T segments, dealt out to the clips in turn: one clip holds the centres of T segments
    numbers = xp.arange(T) * N + xp.arange(N)[:, None]
    return (2 * numbers + 1) * F // (2 * N * T)


SAMPLERS = {
    "recipe": Sampler(_recipe_training, _recipe_views),
    "even": Sampler(_recipe_training, _even_views),
    "pyslowfast": Sampler(_pyslowfast_training, _pyslowfast_views),
    "segments": Sampler(_segments_training, _segments_views),
}


def training_positions(num_video_frames, num_frames, frame_stride, uniform, sampling="recipe", xp=np):
    """The frame indices of one training clip, from random draws that are given.

    Args:
        num_video_frames: Integer F, the number of frames of the video; in a graph a scalar tensor.
        num_frames: Integer T, the number of frames of the clip.
        frame_stride: Integer, the step from one frame of the clip to the next.
        uniform: T draws from [0, 1). All samplers but `"segments"` use the first only.
        sampling: A row of `SAMPLERS`, see `training_indices`.
        xp: `numpy` or `tf.experimental.numpy`.

    Returns:
        An int64 array of `xp`, of shape `(T,)`.
    """
    F, uniform = xp.asarray(num_video_frames, "int64"), xp.asarray(uniform, "float64")
    return SAMPLERS[sampling].training(xp, F, num_frames, frame_stride, uniform)


def view_positions(num_video_frames, num_frames, frame_stride, num_clips, sampling="recipe", xp=np):
    """The frame indices of the clips that a video is tested on.

    Args:
        num_video_frames: Integer F, the number of frames of the video; in a graph a scalar tensor.
        num_frames: Integer T, the number of frames of a clip.
        frame_stride: Integer, the step from one frame of a clip to the next.
        num_clips: Integer N, the number of clips.
        sampling: A row of `SAMPLERS`, see `view_indices`.
        xp: `numpy` or `tf.experimental.numpy`.

    Returns:
        An int64 array of `xp`, of shape `(N, T)`.
    """
    F = xp.asarray(num_video_frames, "int64")
    return SAMPLERS[sampling].views(xp, F, num_frames, frame_stride, num_clips)


def training_indices(num_video_frames, num_frames, frame_stride, rng, sampling="recipe"):
    """Draws the frame indices of one training clip.

    Args:
        num_video_frames: Integer F, the number of frames of the video.
        num_frames: Integer T, the number of frames of the clip.
        frame_stride: Integer, the step from one frame of the clip to the next.
        rng: A `numpy.random.Generator`.
        sampling: Where the frames are.

            - `"recipe"` and `"even"`: the start is a uniform integer of `[0, max(F - T * stride, 0)]` and the indices
              are taken modulo the video's length, so that a short video wraps: the training recipe of the paper
              (section 4.1) in its official release.
            - `"pyslowfast"`: as PySlowFast does: T positions evenly spaced from a uniform real start of
              `[0, max(F - T * stride, 0)]` to `T * stride - 1` frames after it, rounded down; what is past the end is
              the last frame. PySlowFast takes these frames where its `DATA.TARGET_FPS` is the video's rate; otherwise
              it stretches `T * stride` by their ratio, which is not done here.
            - `"segments"`: one random frame of each of T equal segments of the video (TSN; MMAction2's
              `keep_tail_frames`); `frame_stride` has no meaning here.

    Returns:
        An int64 array of shape `(T,)`.

    Raises:
        ValueError: If a length is smaller than 1 or `sampling` is unknown.

    Reference:
        - [Non-local Neural Networks](https://arxiv.org/abs/1711.07971)
        - [PySlowFast](https://github.com/facebookresearch/SlowFast)
        - [Temporal Segment Networks](https://arxiv.org/abs/1608.00859)

    Example:

    >>> import numpy as np
    >>> from keras_nonlocal.data import training_indices
    >>> training_indices(5, num_frames=4, frame_stride=2, rng=np.random.default_rng(0))
    array([0, 2, 4, 1])
    """
    _check_lengths(num_video_frames=num_video_frames, num_frames=num_frames, frame_stride=frame_stride)
    check_sampling(sampling)
    return training_positions(num_video_frames, num_frames, frame_stride, rng.random(num_frames), sampling)


def view_indices(num_video_frames, num_frames, frame_stride, num_clips, sampling="recipe"):
    """Lists the frame indices of the clips that a video is tested on.

    Args:
        num_video_frames: Integer F, the number of frames of the video.
        num_frames: Integer T, the number of frames of a clip.
        frame_stride: Integer, the step from one frame of a clip to the next.
        num_clips: Integer N, the number of clips.
        sampling: Where the clips are.

            - `"recipe"`: clip j starts at `int(F / N * j)`, as in the official release; indices past the end wrap to
              the video's first frames.
            - `"even"`: the starts are evenly spaced over `[0, F - T * stride]`, a single clip in the middle; indices
              wrap too.
            - `"pyslowfast"`: as PySlowFast does: clip j starts at the real number `max(F - T * stride, 0) * j / N`,
              its T positions are evenly spaced over `T * stride - 1` frames and rounded down; what is past the end is
              the last frame. It is so where its `DATA.TARGET_FPS` is the video's rate, see `training_indices`.
            - `"segments"`: the centres of `N * T` equal segments of the video, dealt out to the clips in turn, so
              that every clip spans the video; `frame_stride` has no meaning here.

    Returns:
        An int64 array of shape `(N, T)`.

    Raises:
        ValueError: If a length is smaller than 1 or `sampling` is unknown.

    Example:

    >>> from keras_nonlocal.data import view_indices
    >>> view_indices(10, num_frames=3, frame_stride=2, num_clips=2)
    array([[0, 2, 4],
           [5, 7, 9]])
    >>> view_indices(10, num_frames=3, frame_stride=2, num_clips=2, sampling="even")
    array([[0, 2, 4],
           [4, 6, 8]])
    """
    _check_lengths(num_video_frames=num_video_frames, num_frames=num_frames, frame_stride=frame_stride)
    _check_lengths(num_clips=num_clips)
    check_sampling(sampling)
    return view_positions(num_video_frames, num_frames, frame_stride, num_clips, sampling)


def _check_lengths(**lengths):
    for name, value in lengths.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")


def check_sampling(sampling):
    """Raises a `ValueError` unless `sampling` is a row of `SAMPLERS`."""
    if sampling not in SAMPLERS:
        raise ValueError(f"`sampling` must be one of {sorted(SAMPLERS)}. Received: sampling={sampling!r}")


def random_crop_position(height, width, size, uniform, xp=np):
    """The `(top, left)` of a crop of `size = (height, width)`, from two draws of [0, 1): an int64 array of `xp`."""
    spans = _crop_spans(height, width, size, xp)
    return _floor(xp, xp.asarray(uniform, "float64") * _float(xp, spans + 1))


def view_crop_positions(height, width, size, num_crops, xp=np):
    """The `(top, left)` of the test crops, evenly spaced along the longer dimension.

    One crop is the centre; three are left, centre, right where `W >= H`, else top, middle,
    bottom (paper, section 4.1). Along the shorter dimension all are centred.

    Returns:
        An int64 array of `xp`, of shape `(num_crops, 2)`.
    """
    spans = _crop_spans(height, width, size, xp)
    spaced = xp.stack([_evenly_spaced(xp, spans[axis], num_crops) for axis in (0, 1)], axis=-1)
    is_longer = xp.stack([height > width, height <= width])
    return xp.where(is_longer, spaced, spans // 2)


def _crop_spans(height, width, size, xp):
    """How far a crop can move down and right."""
    spans = xp.stack([xp.asarray(height, "int64") - size[0], xp.asarray(width, "int64") - size[1]])
    if xp is np and spans.min() < 0:  # in a graph, the crop itself fails
        raise ValueError(
            f"The crop must lie within the frame of {height} x {width} pixels. Received: size={tuple(size)}"
        )
    return spans


def _evenly_spaced(xp, span, count):
    """`count` integers from 0 to `span`, or the middle of the span for one."""
    return (span // 2)[None] if count == 1 else xp.arange(count) * span // (count - 1)


def _float(xp, values):
    return xp.asarray(values, "float64")


def _floor(xp, values):
    return xp.asarray(xp.floor(values), "int64")
