"""Videos to arrays: which frames, exact decoding, annotated videos to `tf.data`."""

from .annotations import Annotations, read_annotations
from .clips import load_views
from .decode import VideoError, VideoReader, write_video
from .directory import DecodeReport, video_dataset_from_directory
from .inspection import Inspection, VideoFacts, inspect_videos
from .sampling import training_indices, view_indices

__all__ = [
    "Annotations",
    "DecodeReport",
    "Inspection",
    "VideoError",
    "VideoFacts",
    "VideoReader",
    "inspect_videos",
    "load_views",
    "read_annotations",
    "training_indices",
    "video_dataset_from_directory",
    "view_indices",
    "write_video",
]
