"""Clips of video files as arrays: frame indices, decoding, crops and flips together.

Shape letters: V views (clips x crops), T frames, H and W height and width, C = 3 colours.
"""

import dataclasses

import numpy as np

from .decode import VideoReader
from .sampling import random_crop_position, training_indices, view_crop_positions, view_indices


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


def load_training_clip(path, num_frames, frame_stride, shorter_side, image_size, horizontal_flip, rng):
    """Loads a random clip: the training recipe of the paper (section 4.1).

    Args:
        path: The video file.
        num_frames: Integer T.
        frame_stride: Integer, the step between the clip's frames.
        shorter_side: Pair `(low, high)` of integers: the frames' shorter side is drawn from it,
            both ends included.
        image_size: Pair `(height, width)` of the random crop.
        horizontal_flip: Whether to mirror every second clip.
        rng: A `numpy.random.Generator`.

    Returns:
        A uint8 array of shape `(T, height, width, 3)`.

    Raises:
        VideoError: If the file cannot be decoded.
    """
    with VideoReader(path) as video:
        indices = training_indices(video.num_frames, num_frames, frame_stride, rng)
        frames = video.read(indices, int(rng.integers(*shorter_side, endpoint=True)))
    top, left = random_crop_position(*frames.shape[1:3], image_size, rng.random(2))
    clip = frames[:, top : top + image_size[0], left : left + image_size[1]]
    return clip[:, :, ::-1] if horizontal_flip and rng.random() < 0.5 else clip


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
        image_size: Pair `(height, width)` of the crops, at most `shorter_side` each.
        sampling: `"recipe"` or `"even"`, see `view_indices`.

    Returns:
        A uint8 array of shape `(num_clips * num_crops, T, height, width, 3)`: all crops of the
        first clip, then all of the second, and so on.

    Raises:
        VideoError: If the file cannot be decoded.
    """
    num_clips, num_crops = views
    height, width = image_size
    with VideoReader(path) as video:
        indices = view_indices(video.num_frames, num_frames, frame_stride, num_clips, sampling)
        unique, inverse = np.unique(indices, return_inverse=True)
        frames = video.read(unique, shorter_side)
    offsets = view_crop_positions(*frames.shape[1:3], image_size, num_crops)
    clips = np.empty((num_clips, num_crops, num_frames, height, width, 3), "uint8")
    for crop, (top, left) in enumerate(offsets):
        cropped = frames[:, top : top + height, left : left + width]
        clips[:, crop] = cropped[inverse.reshape(indices.shape)]
    return clips.reshape(-1, *clips.shape[2:])
