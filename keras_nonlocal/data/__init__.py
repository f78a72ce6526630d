"""Videos to arrays: which frames, exact decoding, directories of classes to `tf.data`."""

from .clips import load_views
from .decode import VideoError, VideoReader, write_video
from .directory import DecodeReport, video_dataset_from_directory
from .inspection import Inspection, VideoFacts, inspect_videos
from .sampling import training_indices, view_indices

__all__ = [
    "DecodeReport",
    "Inspection",
    "VideoError",
    "VideoFacts",
    "VideoReader",
    "inspect_videos",
    "load_views",
    "training_indices",
    "video_dataset_from_directory",
    "view_indices",
    "write_video",
]
