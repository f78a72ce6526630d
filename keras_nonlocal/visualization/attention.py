"""What a position of a clip attends to, as arrays.

Shape letters:
    T, H, W: frames, height and width of the clip, in pixels
    T', H', W': sizes of the feature map on which a non-local block works
    T", H", W": sizes of its (sub-sampled) key map
"""

import dataclasses

import keras
import numpy as np

from keras_nonlocal.applications import preprocess_input as _preprocess_input
from keras_nonlocal.visualization.geometry import Axis, find_place, non_local_layers

# Weights held at a time while the most attended position is looked for (float32: 32 MiB).
MAX_WEIGHTS = 2**23


@dataclasses.dataclass(frozen=True)
class Attention:
    """Normalised weights f / C(x) of one position of a clip over the whole clip; `attend` makes it.

    Attributes:
        weights: Float32 array of shape `(T", H", W")`, the layer's key map. They sum to 1 for the forms with softmax
            and may be of either sign for the dot product. Keys outside of the query's window have weight 0.
        position: `(t, y, x)`: frame and pixel of the clip that asks.
        query: The position in the feature map that stands for it.
        layer_name: Name of the `NonLocal3D`.
        clip_shape: `(T, H, W)`.
        keys: For each axis of the clip an integer array, the key of every frame, row or column; -1 where none is: what
            sub-sampling cuts off.
        centres: For each axis of the key map a float array, the middle of every key in frames or pixels of the clip.
    """

    weights: np.ndarray
    position: tuple
    query: tuple
    layer_name: str
    clip_shape: tuple
    keys: tuple
    centres: tuple

    def pixels(self):
        """The weights in the clip: every pixel has that of its key, 0 where no key is.

        The key of a pixel is the one that pools the position of the feature map whose centre is nearest to it.

        Returns:
            Float32 array of shape `(T, H, W)`.
        """
        heat = self.weights[np.ix_(*self.keys)]  # where there is none, the last key's
        for axis, keys in enumerate(self.keys):
            heat[(slice(None),) * axis + (keys < 0,)] = 0
        return heat

    def is_finite(self):
        """Whether no weight is infinite or NaN, as those of a model are that diverged."""
        return bool(np.isfinite(self.weights).all())

    def strongest(self, count=20):
        """The keys with the largest weights of either sign, the strongest first.

        Args:
            count: Number of keys. Those of weight 0 are never among them.

        Returns:
            Two arrays: the keys' centres `(t, y, x)` in the clip, float32 of shape `(count, 3)`, and their signed
            weights, of shape `(count,)`.

        Raises:
            ValueError: if `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"`count` must be at least 1. Received: count={count!r}")
        flat = self.weights.ravel()
        order = np.argsort(-np.abs(flat), kind="stable")[:count]
        order = order[flat[order] != 0]
        indices = np.unravel_index(order, self.weights.shape)
        centres = np.stack([axis[index] for axis, index in zip(self.centres, indices, strict=True)], axis=-1)
        return centres.astype("float32"), flat[order]


def attend(model, clip, position=None, layer_name=None, preprocess_input=_preprocess_input):
    """What one position of a clip attends to.

    Where the positions of the layer's map lie in the clip is followed through the layers before it: their kernels,
    strides, dilations and paddings (convolutions, poolings, zero padding, cropping, `UpSampling`; also in nested models
    and in `TimeDistributed`). Any other layer is taken as one that leaves positions where they are, or, where it
    changes sizes, as one that spreads them evenly over the clip.

    Args:
        model: Functional or sequential Keras model with one input and `NonLocal3D` layers.
        clip: Array of pixels in 0..255, of shape `(frames, height, width, 3)`.
        position: `(t, y, x)`: frame and pixel of the clip that asks. The position of the layer's map whose centre is
            nearest stands for it. `None`: where the most attended key is, that with the largest mean |weight| over
            all positions of the map.
        layer_name: Name of a `NonLocal3D` layer, see `non_local_layers`. `None`: the last one.
        preprocess_input: Function from pixels to what the model takes. Its result has the channels last; for a model
            that takes them first they are moved.

    Returns:
        An `Attention`.

    Raises:
        ValueError: if the clip has another rank or is none that the model takes, the position lies outside of it,
            there is no such layer, or its weights are not finite.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), figure 3

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11
    >>> model = C2DResNet11(input_shape=(4, 32, 32, 3), classes=2)
    >>> attention = attend(model, np.zeros((4, 32, 32, 3), "uint8"), position=(0, 8, 8))
    >>> attention.weights.shape, attention.query, attention.pixels().shape
    ((2, 2, 2), (0, 1, 1), (4, 32, 32))
    """
    attention = Looker(model, layer_name, preprocess_input)(clip, position)
    if not attention.is_finite():
        raise ValueError(
            "The weights of attention must be finite; the model's own or the clip's are not. "
            f"Received: layer_name={attention.layer_name!r}"
        )
    return attention


class Looker:
    """`attend` for one layer of one model, which follows the graph once for each size of clips."""

    def __init__(self, model, layer_name=None, preprocess_input=_preprocess_input):
        names = non_local_layers(model) if hasattr(model, "inputs") else []
        if not names or (layer_name is not None and layer_name not in names):
            raise ValueError(
                f"`layer_name` must be a `NonLocal3D` layer of the functional model, which has {names}. "
                f"Received: layer_name={layer_name!r}"
            )
        if len(model.inputs) != 1:
            raise ValueError(f"`model` must have one input, the clips. Received: model with {len(model.inputs)} inputs")
        self.model = model
        self.layer_name = names[-1] if layer_name is None else layer_name
        self.preprocess_input = preprocess_input
        self._places = {}  # by the shapes of clip and input

    def __call__(self, clip, position=None):
        """The `Attention` of a position of a clip."""
        clip = np.asarray(clip)
        if clip.ndim != 4:
            raise ValueError(
                f"`clip` must have the shape (frames, height, width, 3). Received: clip.shape={clip.shape}"
            )
        clip_shape = clip.shape[:3]
        if position is not None:
            position = _check_position(position, clip_shape)
        inputs = self._inputs(clip)
        shapes = clip_shape, tuple(inputs.shape)
        if shapes not in self._places:
            try:
                self._places[shapes] = find_place(self.model, self.layer_name, *shapes)
            except ValueError as error:  # Keras' own, from a layer to which no position would be left
                raise ValueError(
                    f"`clip` must be of a size on which the model runs. Received: clip.shape={clip.shape}"
                ) from error
        place = self._places[shapes]
        num_tensors = len(place.stages[-1].outputs)
        if num_tensors != 1:
            raise ValueError(
                "The layer must be called on a map alone, without a mask. "
                f"Received: layer_name={self.layer_name!r}, which is called on {num_tensors} tensors"
            )
        layer, features = place.layer, place.features(inputs)
        shape = tuple(features.shape)
        sizes = shape[2:] if layer.data_format == "channels_first" else shape[1:-1]  # T' H' W'
        axes = place.axes or map(Axis.spread, clip_shape, sizes)  # sizes that only this run has told
        positions = [axis.centres(size) for axis, size in zip(axes, sizes, strict=True)]
        none = (None,) * 3
        keys, centres = zip(
            *map(_keys_of_axis, positions, clip_shape, layer.window or none, layer.pool_size or none), strict=True
        )
        if position is None:
            position = _most_attended(layer, features, sizes, centres, clip_shape)
        query = tuple(int(_nearest(axis, [p])[0]) for axis, p in zip(positions, position, strict=True))
        return Attention(
            weights=_weights(layer, features, [query])[0],
            position=position,
            query=query,
            layer_name=self.layer_name,
            clip_shape=clip_shape,
            keys=keys,
            centres=centres,
        )

    def _inputs(self, clip):
        inputs = self.preprocess_input(clip[None])
        expected = tuple(self.model.inputs[0].shape)
        if len(expected) == 5 and expected[-1] != inputs.shape[-1] == expected[1]:
            inputs = keras.ops.moveaxis(inputs, -1, 1)
        shape = tuple(inputs.shape)
        fits = len(shape) == len(expected) and all(
            size in (None, actual) for size, actual in zip(expected[1:], shape[1:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"`clip` must become what the model takes, {expected}, by `preprocess_input`. "
                f"Received: clip.shape={clip.shape}, which becomes {shape}"
            )
        return inputs


def _check_position(position, clip_shape):
    position = tuple(int(p) for p in position)
    if len(position) != 3 or not all(0 <= p < size for p, size in zip(position, clip_shape, strict=True)):
        raise ValueError(
            f"`position` must be a frame, a row and a column (t, y, x) inside of {clip_shape}. "
            f"Received: position={position}"
        )
    return position


def _weights(layer, features, queries):
    """Of the one sample: `(queries, T", H", W")`."""
    return keras.ops.convert_to_numpy(layer.attention(features, np.asarray(queries)))[0]


def _most_attended(layer, features, sizes, centres, clip_shape):
    """The pixel at the centre of the key with the largest mean |weight|."""
    total = np.zeros([len(axis) for axis in centres])  # of each key, over the queries, all of which are in its window
    window = [w or size for w, size in zip(layer.window or (None,) * 3, sizes, strict=True)]
    grid = [size // w for size, w in zip(sizes, window, strict=True)]
    in_window = [keys // number for keys, number in zip(total.shape, grid, strict=True)]
    queries = np.stack(np.unravel_index(np.arange(np.prod(window)), window), axis=-1)
    chunk = max(MAX_WEIGHTS // int(np.prod(in_window)), 1)
    axes = (slice(None),) * (2 if layer.data_format == "channels_first" else 1)
    for number in np.ndindex(*grid):
        part = features[(*axes, *(slice(n * w, (n + 1) * w) for n, w in zip(number, window, strict=True)))]
        keys = total[tuple(slice(n * size, (n + 1) * size) for n, size in zip(number, in_window, strict=True))]
        for first in range(0, len(queries), chunk):
            keys += np.abs(_weights(layer, part, queries[first : first + chunk])).sum(axis=0, dtype="float64")
    key = np.unravel_index(total.argmax(), total.shape)
    return tuple(
        int(_nearest(np.arange(pixels), [axis[k]])[0]) for pixels, axis, k in zip(clip_shape, centres, key, strict=True)
    )


def _keys_of_axis(positions, num_pixels, window, pool_size):
    """The key of every pixel along an axis, -1 for none, and the centre of every key."""
    size = len(positions)
    window, pool_size = window or size, pool_size or 1
    in_window = window // pool_size  # what is left over belongs to no key
    number, place = np.divmod(np.arange(size), window)
    key_of_position = np.where(place // pool_size < in_window, number * in_window + place // pool_size, -1)
    has_key = key_of_position >= 0
    centres = np.bincount(key_of_position[has_key], positions[has_key]) / pool_size
    return key_of_position[_nearest(positions, np.arange(num_pixels))], centres


def _nearest(places, points):
    """The index of the nearest of the places for each point, the earlier of two."""
    return np.abs(np.asarray(points)[:, None] - np.asarray(places)).argmin(axis=1)
