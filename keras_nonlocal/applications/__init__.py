"""Ready networks, and non-local blocks for any other."""

from keras_nonlocal.applications.resnet import (
    C2DResNet11,
    C2DResNet50,
    C2DResNet101,
    I3DResNet11,
    I3DResNet50,
    I3DResNet101,
    preprocess_input,
)
from keras_nonlocal.applications.transfer import inflate_weights, insert_non_local

__all__ = [
    "C2DResNet11",
    "C2DResNet50",
    "C2DResNet101",
    "I3DResNet11",
    "I3DResNet50",
    "I3DResNet101",
    "inflate_weights",
    "insert_non_local",
    "preprocess_input",
]
