"""Clips of video files as arrays: frame indices, decoding, crops and flips together.

Shape letters: V views (clips x crops), T frames, H and W height and width, C = 3 colours.
"""

import dataclasses

import numpy as np

from .decode import VideoReader
from .sampling import check_sampling, random_crop_position, training_indices, view_crop_positions, view_indices


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """What is taken of a video: the arguments of `video_dataset_from_directory`, checked and filled in.

    Attributes:
        num_frames: Integer T, the frames of a clip.
        frame_stride: Integer, the step from one frame of a clip to the next.
        shorter_side: Pair `(low, high)` of integers between which the frames' shorter side is drawn, both ends
            included; equal ends with `views`.
        image_size: Pair `(height, width)` of the crops, or `None` for whole frames.
        horizontal_flip: Whether to mirror every second clip.
        views: `None` for one random clip, or a pair `(num_clips, num_crops)`.
        sampling: A row of the samplers' table in `sampling.py`.
    """

    num_frames: int
    frame_stride: int
    shorter_side: tuple
    image_size: tuple | None
    horizontal_flip: bool
    views: tuple | None
    sampling: str

    @property
    def shape(self):
        """The static shape of what is taken, `None` where it depends on the video."""
        clip = (self.num_frames, *(self.image_size or (None, None)), 3)
        return clip if self.views is None else (self.views[0] * self.views[1], *clip)


def clip_options(
    num_frames,
    frame_stride,
    image_size=None,
    shorter_side=None,
    horizontal_flip=None,
    views=None,
    sampling="recipe",
):
    """Checks the arguments of `video_dataset_from_directory` about clips; returns them filled in, as `ClipOptions`."""
    check_positive(num_frames=num_frames, frame_stride=frame_stride)
    check_sampling(sampling)
    if views is not None and not _is_pair(views):
        raise ValueError(f"`views` must be None or a pair (num_clips, num_crops). Received: views={views!r}")
    if views is not None and horizontal_flip:
        raise ValueError(f"`views` are never flipped. Received: horizontal_flip={horizontal_flip}, views={views}")
    is_whole = isinstance(image_size, str) and image_size == "whole"
    if is_whole and (views is None or views[1] != 1):
        raise ValueError(
            f'`image_size="whole"` needs one crop for each clip: views=(num_clips, 1). Received: views={views}'
        )
    if image_size is None:
        image_size = (224, 224) if views is None else (256, 256)
    elif _is_positive_integer(image_size):
        image_size = (image_size, image_size)
    if not is_whole and not _is_pair(image_size):
        raise ValueError(
            '`image_size` must be a positive integer, a pair (height, width) or "whole". '
            f"Received: image_size={image_size!r}"
        )
    if shorter_side is None:
        shorter_side = (256, 320) if views is None else 256
    low_high = (shorter_side,) * 2 if _is_positive_integer(shorter_side) else shorter_side
    if views is not None and not _is_positive_integer(shorter_side):
        raise ValueError(
            "`shorter_side` must be a positive integer with `views`. "
            f"Received: shorter_side={shorter_side!r}, views={views}"
        )
    if not _is_pair(low_high) or low_high[0] > low_high[1]:
        raise ValueError(
            f"`shorter_side` must be a positive integer or a pair (low, high). Received: shorter_side={shorter_side!r}"
        )
    if not is_whole and max(image_size) > low_high[0]:
        raise ValueError(
            "`image_size` must not be larger than `shorter_side`. "
            f"Received: image_size={tuple(image_size)}, shorter_side={shorter_side}"
        )
    return ClipOptions(
        num_frames=num_frames,
        frame_stride=frame_stride,
        shorter_side=tuple(low_high),
        image_size=None if is_whole else tuple(image_size),
        horizontal_flip=views is None and (horizontal_flip is None or bool(horizontal_flip)),
        views=None if views is None else tuple(views),
        sampling=sampling,
    )


def check_positive(**values):
    """Raises a `ValueError` unless all values are positive integers."""
    for name, value in values.items():
        if not _is_positive_integer(value):
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")


def check_seed(seed):
    """Raises a `ValueError` unless it is a seed that all of NumPy's and TensorFlow's generators take."""
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be an integer from 0 to 2**32 - 1. Received: seed={seed!r}")


def _is_positive_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0


def _is_pair(value):
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_positive_integer, value))


def load_clip(path, clip, seed):
    """Loads what `clip`, a `ClipOptions`, says of a video: a random clip drawn from `seed`, or the views.

    Args:
        path: String or path-like, the video file.
        clip: A `ClipOptions`.
        seed: Integer; `views` do not depend on it.

    Returns:
        A uint8 array of the shape `clip.shape`.

    Raises:
        VideoError: If the file cannot be decoded.
    """
    with VideoReader(path) as video:
        return _random_clip(video, clip, np.random.default_rng(seed)) if clip.views is None else _views(video, clip)


def _random_clip(video, clip, rng):
    """The training recipe of the paper (section 4.1): a random start, a random size, a random crop, a flip."""
    indices = training_indices(video.num_frames, clip.num_frames, clip.frame_stride, rng, clip.sampling)
    frames = video.read(indices, int(rng.integers(*clip.shorter_side, endpoint=True)))
    height, width = clip.image_size
    top, left = random_crop_position(*frames.shape[1:3], clip.image_size, rng.random(2))
    frames = frames[:, top : top + height, left : left + width]
    return np.ascontiguousarray(frames[:, :, ::-1] if clip.horizontal_flip and rng.random() < 0.5 else frames)


def _views(video, clip):
    num_clips, num_crops = clip.views
    indices = view_indices(video.num_frames, clip.num_frames, clip.frame_stride, num_clips, clip.sampling)
    unique, inverse = np.unique(indices, return_inverse=True)
    frames = video.read(unique, clip.shorter_side[0])
    size = clip.image_size or frames.shape[1:3]
    clips = np.empty((num_clips, num_crops, clip.num_frames, *size, 3), "uint8")
    for crop, (top, left) in enumerate(view_crop_positions(*frames.shape[1:3], size, num_crops)):
        cropped = frames[:, top : top + size[0], left : left + size[1]]
        clips[:, crop] = cropped[inverse.reshape(indices.shape)]
    return clips.reshape(-1, *clips.shape[2:])


def load_views(
    path,
    num_frames,
    frame_stride,
    views=(10, 3),
    shorter_side=256,
    image_size=(256, 256),
    sampling="recipe",
):
    """Loads the views that a video is tested on, decoding each frame once.

    The defaults are the paper's protocol (section 4.1): 10 clips x 3 crops.

    Args:
        path: String or path-like, the video file.
        num_frames: Integer T, the frames of a clip.
        frame_stride: Integer, the step from one frame of a clip to the next.
        views: Pair `(num_clips, num_crops)`.
        shorter_side: Integer, the size to which the frames' shorter side is resized, in pixels.
        image_size: Pair `(height, width)` of the crops, at most `shorter_side` each, or `"whole"` for whole frames,
            with one crop.
        sampling: Where the clips are, see `view_indices`.

    Returns:
        A uint8 array of shape `(num_clips * num_crops, T, height, width, 3)`: all crops of the
        first clip, then all of the second, and so on.

    Raises:
        ValueError: If an argument is out of range.
        VideoError: If the file cannot be decoded.
    """
    clip = clip_options(num_frames, frame_stride, image_size, shorter_side, views=views, sampling=sampling)
    return load_clip(path, clip, seed=0)
