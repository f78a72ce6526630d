"""Which pixels of a clip the positions of a feature map stand for: followed from layer to layer through the graph.

Shape letters:
    T, H, W: frames, height and width of the clip, in pixels
    T', H', W': sizes of a feature map
"""

import dataclasses
import math

import keras
import numpy as np

from keras_nonlocal.layers import NonLocal3D


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a feature map: what its positions see of the clip. Fractions where a map is finer than the clip.

    Attributes:
        first: The first pixel that position 0 sees, below 0 where that is padding.
        last: The last one.
        step: Pixels from one position to the next.
    """

    first: float
    last: float
    step: float

    def windowed(self, kernel, stride, padding):
        """The axis after a window of `kernel` positions, with `padding` positions put before the first."""
        first = self.first - padding * self.step
        return Axis(first, self.last + (kernel - 1 - padding) * self.step, self.step * stride)

    def centres(self, size):
        """The pixel in the middle of what each of `size` positions sees."""
        return (self.first + self.last) / 2 + self.step * np.arange(size)

    @classmethod
    def spread(cls, pixels, size):
        """`size` positions, evenly over that many pixels."""
        return cls(0.0, pixels / size - 1, pixels / size)


@dataclasses.dataclass(frozen=True)
class Place:
    """A non-local block in a model, for clips of one size.

    Attributes:
        name: Its name; of a layer in a model that is a layer itself, `"model/layer"`.
        layer: The `NonLocal3D`.
        clip_sizes: `(T, H, W)`.
        stages: Models from the input to the features on which the block works, one a level of nested models.
        axes: Tuple of the three `Axis` of these features.
    """

    name: str
    layer: NonLocal3D
    clip_sizes: tuple
    stages: tuple
    axes: tuple

    def features(self, inputs):
        """What the block is called on."""
        for stage in self.stages:
            inputs = stage(inputs, training=False)
        return inputs


def non_local_layers(model):
    """Names of the model's `NonLocal3D` layers, in order; of those in a model that is a layer itself, `"model/layer"`.

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11
    >>> non_local_layers(C2DResNet11(classes=2))
    ['nonlocal_conv3_0', 'nonlocal_conv3_1']
    """
    names = []
    for layer in model.layers:
        if isinstance(layer, NonLocal3D):
            names.append(layer.name)
        elif _is_graph(layer):
            names += [f"{layer.name}/{name}" for name in non_local_layers(layer)]
    return names


def find_place(model, layer_name, clip_sizes, input_shape):
    """Follows the graph from the input to a block, to its first call if there are several.

    Windows (convolutions, poolings), paddings, croppings and repetitions are followed exactly, also in nested models
    and in `TimeDistributed`. Any other layer is taken as one that leaves every position where it is, or, if it changes
    the sizes, as one that spreads its positions evenly over the clip.

    Args:
        model: Functional or sequential model with one input.
        layer_name: One of `non_local_layers(model)`.
        clip_sizes: `(T, H, W)` of the clip.
        input_shape: What the model is called on, with the batch. Where it has other sizes than the clip, that is taken
            as resized.

    Returns:
        A `Place`.

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11
    >>> place = find_place(C2DResNet11(classes=2), "nonlocal_conv3_1", (8, 224, 224), (1, 8, 224, 224, 3))
    >>> [axis.step for axis in place.axes], place.axes[2].centres(3).tolist()
    ([2.0, 8.0, 8.0], [2.0, 10.0, 18.0])
    """
    path = layer_name.split("/")
    layers = [model]
    for name in path:
        layers.append(layers[-1].get_layer(name))
    block = layers[-1]
    tracer = _Tracer(tuple(clip_sizes), block.data_format)
    shapes, axes, stages = [tuple(input_shape)], [tracer.spread(input_shape)], []
    for name, owner in zip(path, layers, strict=False):
        walk = _Walk(tracer, owner, shapes, axes)
        reached = walk.inputs_of[name]
        stages.append(keras.Model(*(x if len(x) > 1 else x[0] for x in (walk.inputs, reached))))
        shapes, axes = [tuple(x.shape) for x in reached], [walk.axes(x) for x in reached]
    return Place(layer_name, block, tuple(clip_sizes), tuple(stages), axes[0])


def _is_graph(layer):
    """Whether it is a model whose graph of layers is known."""
    return isinstance(layer, keras.Model) and (
        hasattr(layer, "operations") or (isinstance(layer, keras.Sequential) and layer.built)
    )


class _Probe(keras.Operation):
    """Does as a layer does, in a copy of its graph, of which the layer is told nothing."""

    def __init__(self, layer):
        super().__init__(name=layer.name)
        self.layer = layer

    def call(self, *args, **kwargs):
        return self.layer(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)


class _Walk:
    """A copy of a model's graph for inputs of known sizes, and where the positions of its tensors are.

    Attributes:
        inputs: Its input tensors.
        inputs_of: The tensors that each layer is called on first, by its name.
        outputs: Its output tensors.
    """

    def __init__(self, tracer, model, shapes, axes):
        self.tracer = tracer
        self.inputs_of = {}
        self._known = {}  # by the tensor's id: the tensor, which keeps the id its own, and its axes
        # The same layers, whatever the model's class.
        if isinstance(model, keras.Sequential):
            graph = keras.Model(model.inputs[0], model.outputs[0])
        else:
            graph = keras.Model(model.input, model.output)
        own = keras.tree.flatten(graph.input)
        self.inputs = [
            keras.Input(batch_shape=shape, dtype=x.dtype, name=x.name) for shape, x in zip(shapes, own, strict=True)
        ]
        self._remember(self.inputs, axes)
        copy = keras.models.clone_model(
            graph,
            input_tensors=keras.tree.pack_sequence_as(graph.input, self.inputs),
            clone_function=_Probe,
            call_function=self._call,
        )
        self.outputs = keras.tree.flatten(copy.output)

    def axes(self, tensor):
        """Of a tensor of the copy, or `None`."""
        return self._known.get(id(tensor), (tensor, None))[1]

    def _call(self, probe, *args, **kwargs):
        outputs = probe(*args, **kwargs)
        inputs, tensors = (
            [x for x in keras.tree.flatten(side) if _is_symbolic(x)] for side in ((args, kwargs), outputs)
        )
        self.inputs_of.setdefault(probe.name, inputs)
        given = [(tuple(x.shape), self.axes(x)) for x in inputs]
        self._remember(tensors, self.tracer.after(probe.layer, given, [tuple(x.shape) for x in tensors]))
        return outputs

    def _remember(self, tensors, axes):
        self._known |= {id(x): (x, known) for x, known in zip(tensors, axes, strict=True)}


def _is_symbolic(x):
    return isinstance(x, keras.KerasTensor)


@dataclasses.dataclass(frozen=True)
class _Tracer:
    """What layers do to the axes of maps.

    Attributes:
        clip_sizes: Pixels of the clip along each axis of positions.
        data_format: Of the maps.
    """

    clip_sizes: tuple
    data_format: str

    def sizes(self, shape):
        """The sizes of a map, or `None` for what is none or has an unknown size."""
        sizes = tuple(shape[2:] if self.data_format == "channels_first" else shape[1:-1])
        return None if len(sizes) != len(self.clip_sizes) or None in sizes else sizes

    def spread(self, shape):
        """Axes of a map that lies evenly over the clip, `None` for what is no map."""
        sizes = self.sizes(shape)
        return sizes and tuple(map(Axis.spread, self.clip_sizes, sizes))

    def after(self, layer, given, shapes):
        """The axes of each output of a layer. `given`: `(shape, axes)` of each input; `shapes`: of the outputs."""
        if _is_graph(layer):
            walk = _Walk(self, layer, *zip(*given, strict=True))
            return [walk.axes(x) for x in walk.outputs]
        if isinstance(layer, keras.layers.TimeDistributed):
            known = self._after_each_frame(layer, *given[0], shapes[0])
            return [known or self.spread(shapes[0])]
        windows = next((windows for kinds, windows in WINDOWS if isinstance(layer, kinds)), None)
        if windows is None:
            return [self._merged(given, shape) or self.spread(shape) for shape in shapes]
        shape, axes = given[0]
        if axes is None or layer.data_format != self.data_format:
            return [self.spread(shapes[0])]
        return [
            tuple(axis.windowed(*window) for axis, window in zip(axes, windows(layer, self.sizes(shape)), strict=True))
        ]

    def _after_each_frame(self, layer, shape, axes, output):
        if axes is None or self.data_format == "channels_first":
            return None
        inner = _Tracer(self.clip_sizes[1:], self.data_format)
        without_time = (shape[0], *shape[2:])
        (known, *_) = inner.after(layer.layer, [(without_time, axes[1:])], [(output[0], *output[2:])])
        return known and (axes[0], *known)

    def _merged(self, given, shape):
        """What positions see by all inputs that are maps of the output's sizes; `None` if these do not agree."""
        sizes = self.sizes(shape)
        maps = [axes for input_shape, axes in given if axes and sizes and self.sizes(input_shape) == sizes]
        merged = []
        for parts in zip(*maps, strict=True):
            if not all(math.isclose(part.step, parts[0].step) for part in parts):
                return None
            first, last = min(part.first for part in parts), max(part.last for part in parts)
            merged.append(Axis(first, last, parts[0].step))
        return tuple(merged) or None


# Windows: kernel, stride, and padding before the first position, along each axis


def _convolution(layer, sizes):
    kernels = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    return _sliding(layer, sizes, kernels)


def _pooling(layer, sizes):
    return _sliding(layer, sizes, layer.pool_size)


def _sliding(layer, sizes, kernels):
    for size, kernel, stride in zip(sizes, kernels, layer.strides, strict=True):
        # "same": as much as the last window lacks, the smaller half of it in front.
        lacking = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        yield kernel, stride, lacking // 2 if layer.padding == "same" else 0


def _padding(layer, sizes):
    return [(1, 1, before) for before, _ in layer.padding]


def _cropping(layer, sizes):
    return [(1, 1, -before) for before, _ in layer.cropping]


def _repetition(layer, sizes):
    # Position o lies in the o-th of as many parts of what was repeated.
    return [(1, 1 / size, (1 - 1 / size) / 2) for size in layer.size]


# One row a kind of layer: its classes, and the windows of it. The first that fits counts.
WINDOWS = (
    (
        (
            keras.layers.Conv2D,
            keras.layers.Conv3D,
            keras.layers.DepthwiseConv2D,
            keras.layers.SeparableConv2D,
        ),
        _convolution,
    ),
    (
        (
            keras.layers.AveragePooling2D,
            keras.layers.AveragePooling3D,
            keras.layers.MaxPooling2D,
            keras.layers.MaxPooling3D,
        ),
        _pooling,
    ),
    ((keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D), _padding),
    ((keras.layers.Cropping2D, keras.layers.Cropping3D), _cropping),
    ((keras.layers.UpSampling2D, keras.layers.UpSampling3D), _repetition),
)
