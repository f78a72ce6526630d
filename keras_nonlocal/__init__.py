"""Non-local Neural Networks for Keras 3.

The layers are here, so that importing the package registers them with Keras; the other rooms (`applications`, `data`,
`evaluation`, `export`, `tuning`, `visualization`) are imported when they are first used, so that a user of a layer
loads no video decoder.
"""

import importlib

from keras_nonlocal import layers, ops
from keras_nonlocal._version import __version__
from keras_nonlocal.layers import NonLocal1D, NonLocal2D, NonLocal3D

_ROOMS = ("applications", "data", "evaluation", "export", "tuning", "visualization")

__all__ = ["NonLocal1D", "NonLocal2D", "NonLocal3D", "__version__", "layers", "ops"]


def __getattr__(name):
    if name in _ROOMS:
        return importlib.import_module(f"keras_nonlocal.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*__all__, *_ROOMS])
