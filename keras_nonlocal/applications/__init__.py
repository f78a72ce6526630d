"""Ready networks, what they cost, and non-local blocks for any other."""

from keras_nonlocal.applications.conversion import Conversion, convert_checkpoint
from keras_nonlocal.applications.convolutional import fully_convolutional
from keras_nonlocal.applications.heads import keypoint_head
from keras_nonlocal.applications.labels import decode_predictions
from keras_nonlocal.applications.resnet import (
    C2DResNet11,
    C2DResNet50,
    C2DResNet101,
    I3DResNet11,
    I3DResNet50,
    I3DResNet101,
    preprocess_input,
)
from keras_nonlocal.applications.summary import Summary, SummaryRow, summarize
from keras_nonlocal.applications.transfer import inflate_weights, insert_non_local

__all__ = [
    "C2DResNet11",
    "C2DResNet50",
    "C2DResNet101",
    "I3DResNet11",
    "I3DResNet50",
    "I3DResNet101",
    "Conversion",
    "Summary",
    "SummaryRow",
    "convert_checkpoint",
    "decode_predictions",
    "fully_convolutional",
    "inflate_weights",
    "insert_non_local",
    "keypoint_head",
    "preprocess_input",
    "summarize",
]
