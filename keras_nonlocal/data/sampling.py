"""Which frames and which crops make a clip: pure NumPy, no decoding.

Shape letters: F frames of the video, L frames of a clip, N clips, H and W the frame's height
and width.
"""

import numpy as np


def _clips_at(starts, num_video_frames, num_frames, frame_stride):
    offsets = np.arange(num_frames) * frame_stride
    return (np.asarray(starts, "int64")[..., None] + offsets) % num_video_frames


def _check_lengths(num_video_frames, num_frames, frame_stride):
    for name, value in (
        ("num_video_frames", num_video_frames),
        ("num_frames", num_frames),
        ("frame_stride", frame_stride),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")


def training_indices(num_video_frames, num_frames, frame_stride, rng):
    """Draws the frame indices of one training clip.

    The start is a uniform integer of `[0, max(F - L * stride, 0)]` and the indices are taken
    modulo the video's length, so that a short video wraps: the training recipe of the paper
    (section 4.1) in its official release.

    Args:
        num_video_frames: Integer F, the number of frames of the video.
        num_frames: Integer L, the number of frames of the clip.
        frame_stride: Integer, the step from one frame of the clip to the next.
        rng: A `numpy.random.Generator`.

    Returns:
        An int64 array of shape `(L,)`.

    Raises:
        ValueError: If a length is smaller than 1.

    Example:

    >>> import numpy as np
    >>> from keras_nonlocal.data import training_indices
    >>> training_indices(5, num_frames=4, frame_stride=2, rng=np.random.default_rng(0))
    array([0, 2, 4, 1])
    """
    _check_lengths(num_video_frames, num_frames, frame_stride)
    last_start = max(num_video_frames - num_frames * frame_stride, 0)
    start = rng.integers(last_start, endpoint=True)
    return _clips_at(start, num_video_frames, num_frames, frame_stride)


def _recipe_starts(num_video_frames, clip_span, num_clips):
    return np.arange(num_clips) * num_video_frames // num_clips


def _even_starts(num_video_frames, clip_span, num_clips):
    return _evenly_spaced(max(num_video_frames - clip_span, 0), num_clips)


# A sampler maps (F, L * stride, N) to the N starts; the indices wrap modulo F.
VIEW_SAMPLERS = {"recipe": _recipe_starts, "even": _even_starts}


def view_indices(num_video_frames, num_frames, frame_stride, num_clips, sampling="recipe"):
    """Lists the frame indices of the clips that a video is tested on.

    Args:
        num_video_frames: Integer F, the number of frames of the video.
        num_frames: Integer L, the number of frames of a clip.
        frame_stride: Integer, the step from one frame of a clip to the next.
        num_clips: Integer N, the number of clips.
        sampling: `"recipe"`: clip j starts at `int(F / N * j)`, as in the official release;
            `"even"`: the starts are evenly spaced over `[0, F - L * stride]`, a single clip in
            the middle. In both, indices past the end wrap to the video's first frames.

    Returns:
        An int64 array of shape `(N, L)`.

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
    _check_lengths(num_video_frames, num_frames, frame_stride)
    if num_clips < 1:
        raise ValueError(f"`num_clips` must be at least 1. Received: num_clips={num_clips}")
    check_sampling(sampling)
    starts = VIEW_SAMPLERS[sampling](num_video_frames, num_frames * frame_stride, num_clips)
    return _clips_at(starts, num_video_frames, num_frames, frame_stride)


def check_sampling(sampling, name="sampling"):
    """Raises a `ValueError` unless `sampling` is a row of `VIEW_SAMPLERS`."""
    if sampling not in VIEW_SAMPLERS:
        raise ValueError(f"`{name}` must be one of {sorted(VIEW_SAMPLERS)}. Received: {name}={sampling!r}")


def _evenly_spaced(span, count):
    """`count` integers from 0 to `span`, or the middle of the span for one."""
    return np.array([span // 2]) if count == 1 else np.arange(count) * span // (count - 1)


def _crop_spans(height, width, size):
    spans = height - size[0], width - size[1]
    if min(spans) < 0:
        raise ValueError(
            f"The crop must lie within the frame of {height} x {width} pixels. Received: size={tuple(size)}"
        )
    return spans


def random_crop_offset(height, width, size, rng):
    """Draws the `(top, left)` of a crop of `size = (height, width)` uniformly."""
    spans = _crop_spans(height, width, size)
    return tuple(int(rng.integers(span, endpoint=True)) for span in spans)


def view_crop_offsets(height, width, size, num_crops):
    """Lists the `(top, left)` of the test crops, evenly spaced along the longer dimension.

    One crop is the centre; three are left, centre, right where `W >= H`, else top, middle,
    bottom (paper, section 4.1). Along the shorter dimension all are centred.
    """
    vertical, horizontal = _crop_spans(height, width, size)
    if width >= height:
        return [(vertical // 2, int(left)) for left in _evenly_spaced(horizontal, num_crops)]
    return [(int(top), horizontal // 2) for top in _evenly_spaced(vertical, num_crops)]
