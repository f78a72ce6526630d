"""Classifiers of crops, applied to whole frames at every position: the paper's fully convolutional testing.

Shape letters: B batch, T time, H height, W width, C channels, K classes; h, w: the feature map of one crop.
"""

import keras
from keras import ops

from keras_nonlocal.applications.resnet import is_integer

# What may stand between the pooling and the scores: layers that work on the channels of each position by itself, so
# that on a map they are 1×1×1 convolutions.
POINTWISE = (keras.layers.Dense, keras.layers.Dropout, keras.layers.Activation)
PROBABILITIES = ("softmax", "sigmoid")


def fully_convolutional(model, image_size=None):
    """Makes a classifier of crops one of whole frames, with the same weights.

    Where `model` takes the mean of the features of the crop and classifies it, the new model does so at every position
    of the crop: it averages the features over all frames and over every window as large as the feature map of a crop
    (stride 1, no padding), applies the dense layer to each as a 1×1×1 convolution, takes the softmax (or sigmoid) at
    each position, and then the mean of these scores over all positions. On clips of the crop's size there is one
    position, and the scores are those of `model`.

    The windows step by one position of the feature map, 32 pixels in the ResNets. What a window sees is not just its
    crop: convolutions and non-local blocks run on the whole frame.

    Args:
        model: Functional or sequential Keras model from clips `(batch, frames, height, width, channels)` to
            probabilities, that ends with `GlobalAveragePooling3D`, then `Dense`, `Dropout` and `Activation` layers
            only, of which the last is a softmax or sigmoid. Its layers must run on frames of any size.
        image_size: Integer or pair `(height, width)`: the crops that `model` was trained on, 224 in the paper. `None`:
            the size of its inputs, if that is fixed.

    Returns:
        A functional `keras.Model` from clips of any height and width, not below `image_size`, to probabilities
        `(batch, classes)`. It shares its layers with `model`: training one trains the other.

    Raises:
        ValueError: if `model` is no such classifier, or `image_size` is none of the above.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 4.1, "Inference"

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11
    >>> model = C2DResNet11(input_shape=(4, 32, 32, 3), classes=2)
    >>> whole = fully_convolutional(model)
    >>> whole.input_shape, whole.output_shape
    ((None, 4, None, None, 3), (None, 2))
    """
    if not isinstance(model, keras.Model) or not hasattr(model, "inputs"):
        raise ValueError(f"`model` must be a functional Keras model. Received: model={model!r}")
    shapes = [tuple(x.shape) for x in (*model.inputs, *model.outputs)]
    if [len(shape) for shape in shapes] != [5, 2]:
        raise ValueError(
            "`model` must take clips (batch, frames, height, width, channels) and give scores (batch, classes). "
            f"Received: model={model.name!r} with the shapes {shapes}"
        )
    inputs, features, pooling, head = _open(model)
    channels_first = pooling.data_format == "channels_first"
    height_axis = 3 if channels_first else 2
    clip_shape = list(model.inputs[0].shape)
    height, width = clip_shape[height_axis : height_axis + 2] = _crop_size(image_size, clip_shape, height_axis)
    map_shape = keras.Model(inputs, features).compute_output_shape((None, *clip_shape[1:]))
    h, w = map_shape[height_axis : height_axis + 2]

    x = keras.layers.Permute((2, 3, 4, 1))(features) if channels_first else features  # B T H W C
    x = ops.mean(x, axis=1, keepdims=True)
    x = keras.layers.AveragePooling3D(
        (1, h, w), strides=1, data_format="channels_last", dtype=pooling.dtype_policy, name=f"{pooling.name}_windows"
    )(x)
    for layer in head:
        x = layer(x)
    return keras.Model(inputs, ops.mean(x, axis=(1, 2, 3)), name=f"{model.name}_fully_convolutional")


def _open(model):
    """New inputs of any height and width, what the global pooling gets of them, the pooling, the layers after it."""
    made = {}  # by the id of what it gave: what was called on what; the tensor is kept so that its id stays its own

    def call(operation, *args, **kwargs):
        outputs = operation(*args, **kwargs)
        if isinstance(outputs, keras.KerasTensor):
            made[id(outputs)] = operation, args[0] if args else None, outputs
        return outputs

    graph = keras.Model(model.inputs[0], model.outputs[0])
    shape = list(graph.inputs[0].shape[1:])
    spatial = slice(2, 4) if _is_channels_first(model) else slice(1, 3)
    shape[spatial] = None, None
    inputs = keras.Input(shape, dtype=graph.inputs[0].dtype, name=graph.inputs[0].name)
    try:
        # Not a copy: the layers themselves, called on the new inputs.
        copy = keras.models.clone_model(graph, inputs, clone_function=lambda layer: layer, call_function=call)
    except Exception as error:  # whatever a layer says about sizes that it does not know
        raise ValueError(
            f"The layers of `model` must run on frames of any size ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Received: model={model.name!r}"
        ) from error
    head, tensor = [], copy.outputs[0]
    while True:
        operation, source, _ = made.get(id(tensor), (None, None, None))
        if isinstance(operation, keras.layers.GlobalAveragePooling3D):
            break
        if not isinstance(operation, POINTWISE):
            raise ValueError(_wanted(f"{getattr(operation, 'name', operation)!r} in {model.name!r}"))
        head.insert(0, operation)
        tensor = source
    classifiers = [layer for layer in head if not isinstance(layer, keras.layers.Dropout)]
    last = keras.activations.serialize(classifiers[-1].activation) if classifiers else None
    if last not in PROBABILITIES:
        raise ValueError(_wanted(f"the last activation {last!r} in {model.name!r}"))
    return inputs, source, operation, head


def _wanted(received):
    return (
        "`model` must end with `GlobalAveragePooling3D`, then `Dense`, `Dropout` and `Activation` layers only, the "
        f"last activation being one of {', '.join(PROBABILITIES)}. Received: {received}"
    )


def _is_channels_first(model):
    return any(
        isinstance(layer, keras.layers.GlobalAveragePooling3D) and layer.data_format == "channels_first"
        for layer in model.layers
    )


def _crop_size(image_size, clip_shape, height_axis):
    static = tuple(clip_shape[height_axis : height_axis + 2])
    size = static if image_size is None else (image_size,) * 2 if is_integer(image_size, 1) else image_size
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(is_integer(n, 1) for n in size):
        raise ValueError(
            "`image_size` must be a positive integer or a pair (height, width), and be given for a model that takes "
            f"crops of any size, such as {tuple(clip_shape)}. Received: image_size={image_size!r}"
        )
    if any(known not in (None, n) for known, n in zip(static, size, strict=True)):
        raise ValueError(
            f"`image_size` must be that of the model's inputs, {static}. Received: image_size={image_size!r}"
        )
    return tuple(size)
