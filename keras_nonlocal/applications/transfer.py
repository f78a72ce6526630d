"""Non-local blocks and temporal kernels for networks that are trained already.

Shape letters: T, H, W the sizes of a kernel; I input channels, O output channels.
"""

import keras
import numpy as np

from keras_nonlocal.layers import NonLocal1D, NonLocal2D, NonLocal3D

_BY_RANK = {3: NonLocal1D, 4: NonLocal2D, 5: NonLocal3D}


def insert_non_local(model, after, **options):
    """Returns a copy of a functional model with non-local blocks after the named layers.

    The copy has the weights of `model`. As a non-local block starts as the identity, it also has its outputs,
    until it is trained.

    Args:
        model: Functional (or sequential) Keras model of any rank.
        after: Names of the layers after which a block shall stand. Their outputs must be `(batch, steps, channels)`,
            `(batch, height, width, channels)` or `(batch, time, height, width, channels)` (or channels first, with
            `data_format`).
        **options: Arguments of `NonLocal1D`, `NonLocal2D` or `NonLocal3D`.

    Returns:
        A new `keras.Model`. The block after the layer `"conv3"` has the name `"conv3_non_local"`.

    Raises:
        ValueError: if `model` is not functional, has no layer of such a name, or that layer's output is no such map.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 3.3: "we can insert a new non-local
        block into any pre-trained model, without breaking its initial behavior".

    Example:

    >>> inputs = keras.Input((16, 16, 3))
    >>> x = keras.layers.Conv2D(8, 3, name="conv")(inputs)
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    >>> new = insert_non_local(model, after=["conv"], pool_size=2)
    >>> new.get_layer("conv_non_local").pool_size
    (2, 2)
    """
    after = [after] if isinstance(after, str) else list(after)
    if isinstance(model, keras.Sequential) and model.built:
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    if not hasattr(model, "operations"):
        raise ValueError(f"`model` must be a functional Keras model. Received: model={model!r}")
    names = {layer.name for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)}
    for name in after:
        if name not in names:
            raise ValueError(
                f"`after` must hold names of layers of the model {model.name!r} that are no inputs; {name!r} is none. "
                f"Received: after={after!r}"
            )

    blocks = {}

    def call(layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        if layer.name not in after:
            return outputs
        rank = len(getattr(outputs, "shape", ()))
        if rank not in _BY_RANK:
            raise ValueError(
                "`after` must name layers whose output is one map of 1 to 3 dimensions of positions and channels; that "
                f"of {layer.name!r} is {getattr(outputs, 'shape', outputs)}. Received: after={after!r}"
            )
        if layer.name not in blocks:  # a layer that is called twice shares its block
            blocks[layer.name] = _BY_RANK[rank](**options, name=layer.name + "_non_local")
        return blocks[layer.name](outputs)

    copy = keras.models.clone_model(model, call_function=call)
    for layer in model.layers:
        if layer.weights:
            copy.get_layer(layer.name).set_weights(layer.get_weights())
    return copy


def inflate_weights(image_model, video_model, method="average"):
    """Fills a video network with the weights of an image network of the same family.

    Layers are matched by name. A kernel that is wider in time than the image network's is its copy at every one of its
    T time steps, divided by T: on a video of one repeated image both give the same responses, away from the ends of
    the clip, where convolutions are padded with zeros. That is the paper's way; `method="center"` leaves the video
    network with the image network's responses to each frame.

    Args:
        image_model: The trained network: kernels of `H×W×I×O`, or of `1×H×W×I×O` as in a C2D network built with
            `temporal_strides=(1, 1, 1)` on clips of one frame.
        video_model: The network to fill, in place.
        method: What a kernel that is wider in time is filled with: `"average"`, the image network's kernel divided by
            T at every time step, or `"center"`, that kernel at the middle step and zeros at the others.

    Returns:
        The names of the layers of `video_model` that have weights and were not filled: those that `image_model`
        does not have, such as the non-local blocks, and a head with another number of classes.

    Raises:
        ValueError: if a layer of the same name has weights of other shapes (the head excepted), no layer matches, or
            `method` is unknown.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 4, "Inflated 3D ConvNet"

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11, I3DResNet11
    >>> image_model = C2DResNet11(temporal_strides=(1, 1, 1), non_local=0, classes=10)
    >>> inflate_weights(image_model, I3DResNet11(non_local=1, classes=4))
    ['nonlocal_conv3_1', 'pred']
    """
    if method not in ("average", "center"):
        raise ValueError(f'`method` must be "average" or "center". Received: method={method!r}')
    sources = {layer.name: layer for layer in image_model.layers if layer.weights}
    targets = [layer for layer in video_model.layers if layer.weights]
    head = targets[-1] if targets else None
    planned, not_filled = [], []
    for layer in targets:
        if layer.name not in sources:
            not_filled.append(layer.name)
            continue
        source, shapes = sources[layer.name], [tuple(weight.shape) for weight in layer.weights]
        values = [
            inflate_kernel(value, shape, method) for value, shape in zip(source.get_weights(), shapes, strict=False)
        ]
        if len(source.weights) == len(shapes) and all(value is not None for value in values):
            planned.append((layer, values))
        elif layer is head and isinstance(layer, keras.layers.Dense):
            not_filled.append(layer.name)
        else:
            received = [tuple(weight.shape) for weight in source.weights]
            raise ValueError(
                f"The layer {layer.name!r} needs weights of the shapes {shapes}. Received: {received} from the "
                "layer of the same name in `image_model`"
            )
    if not planned:
        raise ValueError(
            "`image_model` must have layers with the names of `video_model`'s, and has none. "
            f"Received: image_model={image_model.name!r}, video_model={video_model.name!r}"
        )
    for layer, values in planned:  # only now: a mismatch leaves the network as it was
        layer.set_weights(values)
    return not_filled


def inflate_kernel(value, shape, method="average"):
    """The value in the target's shape, repeated along time if it has one step there; `None` if it does not fit."""
    if value.shape == shape:
        return value
    if value.ndim == 4 and len(shape) == 5:
        value = value[None]
    if value.ndim == 5 and len(shape) == 5 and value.shape[0] == 1 and value.shape[1:] == shape[1:]:
        if method == "average":
            return np.repeat(value, shape[0], axis=0) / shape[0]
        inflated = np.zeros(shape, value.dtype)
        inflated[shape[0] // 2] = value[0]
        return inflated
    return None
