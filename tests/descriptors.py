"""Every layer and every model once: what the contracts of test_conformance.py run over."""

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import keras
import numpy as np

from keras_nonlocal import applications, layers

# Constructor arguments → names, per rank. Positions are 12; 6×4; 4×4×4, with 6 channels.
_MAPS = {1: (12, 6), 2: (6, 4, 6), 3: (4, 4, 4, 6)}
_LAYERS = (layers.NonLocal1D, layers.NonLocal2D, layers.NonLocal3D)
_OF_ALL_RANKS = {
    "default": {},
    "gaussian_pool": {"pairwise": "gaussian", "pool_size": 2},
    "dot_product": {"pairwise": "dot_product", "inner_channels": 2},
    "concatenation_window": {"pairwise": "concatenation", "window": 2},
}
_OF_RANK = {
    1: {"chunks": {"query_chunk_size": 5, "scale": "sqrt"}},
    2: {
        "euclidean_gaussian": {"pairwise": "euclidean_gaussian", "pool_size": (2, 1), "scale": 0.1},
        "no_normalization": {"normalization": None, "bias_initializer": "ones", "scale": 0.5},
        "window_pool_chunks": {
            "window": (3, None),
            "pool_size": (1, 2),
            "pairwise": "concatenation",
            "query_chunk_size": 2,
        },
    },
    3: {
        "release": {"pool_size": (1, 2, 2), "scale": "sqrt"},
        "pool_after_projection": {"pool_size": (1, 2, 2), "pool_after_projection": True},
        "space_only": {"window": (1, None, None), "query_chunk_size": 3},
        "time_only": {"window": (None, 1, 1), "pairwise": "dot_product"},
        "groups": {
            "window": (2, None, None),
            "pool_size": (2, 2, 2),
            "kernel_regularizer": keras.regularizers.L2(0.01),
            "name": "groups",
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """One layer or model.

    Args:
        name: Name of the test case and of the golden file's entry.
        constructor: Class of the layer, or function that builds the model.
        options: Arguments of the constructor.
        input_shape: Shape of one input, without the batch.
        tolerance: Largest difference to float32 in half precision, relative to the largest output.
        large: A network of published size: only its weights' names and shapes are looked at.
    """

    name: str
    constructor: Callable
    options: dict
    input_shape: tuple
    tolerance: float = 0.03
    large: bool = False

    @property
    def is_layer(self):
        return isinstance(self.constructor, type)

    def make(self, **options):
        return self.constructor(**(self.options | options))

    def model(self, static=True, **options):
        """A model with known sizes, or with `None` for all of them but the channels."""
        shape = self.input_shape if static else (None,) * (len(self.input_shape) - 1)
        shape = shape if static else (*shape, self.input_shape[-1])
        if not self.is_layer:
            return self.make(input_shape=shape, **options)
        inputs = keras.Input(shape)
        return keras.Model(inputs, self.make(**options)(inputs))

    def inputs(self, batch=2, seed=0):
        x = np.random.default_rng(seed).normal(size=(batch, *self.input_shape))
        return x.astype("float32")


def _layer_descriptors():
    for cls in _LAYERS:
        for name, options in (_OF_ALL_RANKS | _OF_RANK[cls.rank]).items():
            yield Descriptor(f"{cls.__name__}_{name}", cls, options, _MAPS[cls.rank])


_CLIP = (4, 33, 27, 3)
_SMALL = {"classes": 5, "dropout": 0.0}
LAYERS = tuple(_layer_descriptors())
MODELS = (
    Descriptor("C2DResNet11", applications.C2DResNet11, _SMALL, _CLIP, 0.1),
    Descriptor("I3DResNet11", applications.I3DResNet11, _SMALL, _CLIP, 0.1),
    Descriptor(
        "I3DResNet11_paper_stem",
        applications.I3DResNet11,
        {
            "include_top": False,
            "temporal_strides": (2, 2, 2),
            "inflation": "3x3x3",
            "pool1_padding": "same",
            "non_local": {2: [0], 3: [1]},
            "non_local_options": {"pairwise": "dot_product", "window": (1, None, None)},
        },
        (8, 33, 27, 3),
        0.1,
    ),
)
LARGE = tuple(
    Descriptor(
        f"{name}_{blocks}",
        getattr(applications, name),
        {"non_local": blocks},
        (8, 224, 224, 3),
        large=True,
    )
    for name, blocks in (
        ("C2DResNet50", 5),
        ("I3DResNet50", 5),
        ("C2DResNet101", 5),
        ("I3DResNet101", 5),
    )
)
ALL = LAYERS + MODELS + LARGE
SMALL = LAYERS + MODELS


def randomise(model, seed=0):
    """Random weights everywhere, zero-initialised ones and statistics included."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if weight.path.endswith("moving_variance"):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            value = rng.normal(size=shape) * 0.3 + weight.path.endswith("gamma")
        else:
            value = rng.normal(size=shape) * np.prod(shape[:-1]) ** -0.5
        weight.assign(value.astype("float32"))
    return model


def summary(constructor, **options):
    """Built once, in whatever order the options come."""
    return _summary(constructor, **dict(sorted(options.items())))


@functools.lru_cache(None)
def _summary(constructor, **options):
    """What `summarise` says of a model, which is let go. Nobody looks at its values: zeros are made much faster."""
    with (
        mock.patch.object(keras.initializers.VarianceScaling, "__call__", _zeros),
        mock.patch.object(keras.initializers.RandomNormal, "__call__", _zeros),
    ):
        return summarise(constructor(**options))


def _zeros(self, shape, dtype=None):
    return keras.ops.zeros(shape, dtype)


def summarise(model):
    return {
        "trainable": sum(int(np.prod(w.shape)) for w in model.trainable_weights),
        "weights": {w.path: list(w.shape) for w in model.weights},
        "layers": [layer.name for layer in model.layers],
        "shapes": {layer.name: tuple(layer.output.shape) for layer in getattr(model, "layers", [])},
        "sizes": applications.summarize(model),
    }


def layer_weights(layer):
    """Of a non-local block, as `tests.reference.block` takes them."""
    weights = {
        name: layer_part.get_weights()
        for name in ("theta", "phi", "g", "out", "norm")
        if (layer_part := getattr(layer, name)) is not None
    }
    if layer.score_kernel is not None:
        weights["score_kernel"] = np.asarray(layer.score_kernel)
    return weights
