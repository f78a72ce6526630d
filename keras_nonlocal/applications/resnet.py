"""C2D and I3D ResNets with non-local blocks, after the authors' release.

Wang et al., "Non-local Neural Networks" (CVPR 2018, arXiv 1711.07971), table 1 and section 4. Layer names are the
release's blob names, so that a checkpoint's tensors find their layers by name.

Shape letters: B batch, T time, H height, W width, C channels.
"""

import dataclasses
import os
import zipfile

import keras
import numpy as np
from keras import ops

from keras_nonlocal.applications.folded import Conv3D, MaxPooling3D
from keras_nonlocal.layers import NonLocal3D

PIXEL_MEAN = 114.75
PIXEL_STD = 57.375


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """One row of the table of networks.

    Args:
        blocks: Residual blocks of res2, res3, res4, res5.
        width: Channels of the first convolution; stage `s` has `width * 2 ** (s - 2)` in its bottlenecks.
        non_local: Number of non-local blocks → {stage: indices of the residual blocks after which they stand}.
        default_non_local: The number that a builder takes by default.
        remark: What its documentation adds to the title.
    """

    blocks: tuple
    width: int
    non_local: dict
    default_non_local: int = 5
    remark: str = ""


ARRANGEMENTS = {
    "11": Arrangement((1, 2), 16, {1: {3: (1,)}, 2: {3: (0, 1)}}, 2, ", small: for CPUs, examples and tests"),
    "50": Arrangement(
        (3, 4, 6, 3),
        64,
        {1: {4: (4,)}, 5: {3: (1, 3), 4: (1, 3, 5)}, 10: {3: range(4), 4: range(6)}},
    ),
    "101": Arrangement(
        (3, 4, 23, 3),
        64,
        {1: {4: (21,)}, 5: {3: (1, 3), 4: (6, 13, 20)}, 10: {3: range(4), 4: range(2, 23, 4)}},
    ),
}

# Residual blocks, counted from 0, whose kernels I3D inflates in time: every one of res2, every second one later,
# from the first, but in res5 from the second.
INFLATED = {2: (0, 1), 3: (0, 2), 4: (0, 2), 5: (1, 2)}

# The authors' release, where it differs from the layer's defaults (the paper's equations).
RELEASE_OPTIONS = {
    "pool_size": (1, 2, 2),
    "scale": "sqrt",
    "kernel_initializer": keras.initializers.RandomNormal(stddev=0.01),
}


def preprocess_input(x):
    """Normalises RGB pixels from 0..255 as the networks expect them: `(x - 114.75) / 57.375`.

    One function for training, evaluation and the exported graph.

    Args:
        x: Array or tensor of pixels in 0..255, RGB, of any shape and dtype.

    Returns:
        Float32 array (for a NumPy array or a number) or tensor of the shape of `x`.

    Example:

    >>> preprocess_input(np.array([0, 255], "uint8")).tolist()
    [-2.0, 2.444444417953491]
    """
    if not ops.is_tensor(x) and not isinstance(x, keras.KerasTensor):
        return (np.asarray(x, "float32") - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return (ops.cast(x, "float32") - PIXEL_MEAN) / PIXEL_STD


def non_local_blocks(arrangement, non_local):
    """Expands the `non_local` argument of a builder to {stage: indices of residual blocks}."""
    if isinstance(non_local, dict):
        placement = non_local
    elif non_local == 0:
        placement = {}
    elif non_local in arrangement.non_local:
        placement = arrangement.non_local[non_local]
    else:
        numbers = ", ".join(map(str, (0, *arrangement.non_local)))
        raise ValueError(
            f"`non_local` must be one of {numbers}, or a dictionary of stages to indices of residual blocks such "
            f"as {{4: [2]}}. Received: non_local={non_local!r}"
        )
    for stage, indices in placement.items():
        blocks = dict(enumerate(arrangement.blocks, start=2)).get(stage, 0)
        if not blocks or not set(indices) <= set(range(blocks)):
            raise ValueError(
                f"`non_local` must name stages 2 to {len(arrangement.blocks) + 1} and residual blocks that they have, "
                f"counted from 0; the stages have {arrangement.blocks} blocks. Received: non_local={non_local!r}"
            )
    return {stage: tuple(indices) for stage, indices in placement.items()}


def build_resnet(
    arrangement,
    inflated,
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=400,
    classifier_activation="softmax",
    name=None,
    non_local=5,
    non_local_options=None,
    inflation="3x1x1",
    temporal_strides=(1, 1, 2),
    pool1_padding="valid",
    dropout=0.5,
):
    """Builds any network of the family; the public functions are its rows with names.

    Args:
        arrangement: A row of `ARRANGEMENTS`.
        inflated: Whether the network has temporal convolutions (I3D) or not (C2D).

    The other arguments are those of `I3DResNet50`.
    """
    placement = non_local_blocks(arrangement, non_local)
    if inflation not in ("3x1x1", "3x3x3"):
        raise ValueError(f'`inflation` must be "3x1x1" or "3x3x3". Received: inflation={inflation!r}')
    if pool1_padding not in ("valid", "same"):
        raise ValueError(f'`pool1_padding` must be "valid" or "same". Received: pool1_padding={pool1_padding!r}')
    if pooling not in (None, "avg", "max"):
        raise ValueError(f'`pooling` must be `None`, "avg" or "max". Received: pooling={pooling!r}')
    if not isinstance(temporal_strides, (tuple, list)) or len(temporal_strides) != 3:
        raise ValueError(
            "`temporal_strides` must be 3 integers: of conv1, pool1 and pool2. "
            f"Received: temporal_strides={temporal_strides!r}"
        )
    options = RELEASE_OPTIONS | (non_local_options or {})
    channels_first = keras.config.image_data_format() == "channels_first"
    if input_tensor is not None:
        if not isinstance(input_tensor, keras.KerasTensor):
            raise ValueError(f"`input_tensor` must be a Keras tensor. Received: input_tensor={input_tensor!r}")
        input_shape = tuple(input_tensor.shape[1:])
    if input_shape is None:
        input_shape = (3, None, None, None) if channels_first else (None, None, None, 3)
    if len(input_shape) != 4:
        raise ValueError(
            "`input_shape` must have 4 entries, (frames, height, width, 3), or (3, frames, height, width) with "
            f"channels first. Received: input_shape={input_shape!r}"
        )
    conv1_stride, pool1_stride, pool2_stride = temporal_strides
    num_frames = input_shape[1] if channels_first else input_shape[0]
    shortest = conv1_stride * pool1_stride * pool2_stride
    if num_frames is not None and num_frames < shortest:
        raise ValueError(
            f"Clips must have at least {shortest} frames with temporal_strides={tuple(temporal_strides)}. "
            f"Received: input_shape={input_shape!r}"
        )

    inputs = keras.Input(shape=input_shape) if input_tensor is None else input_tensor
    x = _conv(inputs, arrangement.width, (5 if inflated else 1, 7, 7), (conv1_stride, 2, 2), "conv1")
    x = keras.layers.ReLU(name="conv1_relu")(_norm(x, "res_conv1_bn"))
    if pool1_padding == "same":
        # Symmetric, with values that no ReLU can exceed from below: zeros.
        x = keras.layers.ZeroPadding3D((0, 1, 1), name="pool1_pad")(x)
    x = MaxPooling3D((pool1_stride, 3, 3), (pool1_stride, 2, 2), name="pool1")(x)
    for stage, num_blocks in enumerate(arrangement.blocks, start=2):
        width = arrangement.width * 2 ** (stage - 2)
        for block in range(num_blocks):
            offset, step = INFLATED[stage]
            temporal = 3 if inflated and block >= offset and (block - offset) % step == 0 else 1
            kernels = ((temporal, 1, 1), (1, 3, 3))
            if inflation == "3x3x3":
                kernels = ((1, 1, 1), (temporal, 3, 3))
            stride = (1, 2, 2) if stage > 2 and block == 0 else (1, 1, 1)
            x = _bottleneck(x, width, kernels, stride, block == 0, f"res{stage}_{block}")
            if block in placement.get(stage, ()):
                x = NonLocal3D(**options, name=f"nonlocal_conv{stage}_{block}")(x)
        if stage == 2 and pool2_stride > 1:
            x = MaxPooling3D((pool2_stride, 1, 1), name="pool2")(x)
    if include_top:
        x = keras.layers.GlobalAveragePooling3D(name="pool5")(x)
        x = keras.layers.Dropout(dropout, name="dropout")(x)
        x = keras.layers.Dense(
            classes,
            activation=classifier_activation,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
            name="pred",
            dtype="float32",  # scores are never rounded to half precision
        )(x)
    elif pooling == "avg":
        x = keras.layers.GlobalAveragePooling3D(name="pool5")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling3D(name="pool5")(x)
    if input_tensor is not None:
        inputs = keras.utils.get_source_inputs(inputs)
        inputs = inputs[0] if len(inputs) == 1 else inputs
    model = keras.Model(inputs, x, name=name)
    if weights is not None:
        _load_weights(model, weights)
    return model


def _load_weights(model, weights):
    path = os.fspath(weights)
    if not path.endswith((".weights.h5", ".keras")):
        raise ValueError(
            f"`weights` must be `None` or the path of a `.weights.h5` or `.keras` file. Received: weights={weights!r}"
        )
    if not os.path.exists(path):
        raise ValueError(f"The file that `weights` names does not exist. Received: weights={weights!r}")
    try:
        model.load_weights(path)
    except (OSError, zipfile.BadZipFile) as error:  # which do not name the file
        raise ValueError(
            f"`weights` must be a file that Keras wrote ({error}). Received: weights={weights!r}"
        ) from error


def _channel_axis():
    return 1 if keras.config.image_data_format() == "channels_first" else -1


def _conv(x, channels, kernel_size, strides, name):
    # Symmetric padding of k // 2, as the release has it. "same" is that only where the stride is 1.
    padding = tuple(k // 2 for k in kernel_size)
    if any(stride > 1 and p for stride, p in zip(strides, padding, strict=True)):
        x = keras.layers.ZeroPadding3D(padding, name=name + "_pad")(x)
        mode = "valid"
    else:
        mode = "same"
    return Conv3D(
        channels,
        kernel_size,
        strides,
        padding=mode,
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)


def _norm(x, name):
    return keras.layers.BatchNormalization(axis=_channel_axis(), momentum=0.9, epsilon=1e-5, name=name)(x)


def _bottleneck(x, width, kernels, stride, project, name):
    shortcut = x
    if project:
        shortcut = _conv(x, 4 * width, (1, 1, 1), stride, name + "_branch1")
        shortcut = _norm(shortcut, name + "_branch1_bn")
    x = _conv(x, width, kernels[0], (1, 1, 1), name + "_branch2a")
    x = keras.layers.ReLU(name=name + "_branch2a_relu")(_norm(x, name + "_branch2a_bn"))
    x = _conv(x, width, kernels[1], stride, name + "_branch2b")
    x = keras.layers.ReLU(name=name + "_branch2b_relu")(_norm(x, name + "_branch2b_bn"))
    x = _norm(_conv(x, 4 * width, (1, 1, 1), (1, 1, 1), name + "_branch2c"), name + "_branch2c_bn")
    x = keras.layers.Add(name=name + "_add")([shortcut, x])
    return keras.layers.ReLU(name=name + "_out")(x)


_DOCUMENTATION = """{title}

    The defaults are the arrangement of the authors' release for 8 frames ("8x8"): temporal strides (1, 1, 2) of conv1,
    pool1 and pool2, pool1 without padding, non-local blocks with sub-sampled keys and scaled scores.
    Inputs are normalised by `keras_nonlocal.applications.preprocess_input`.

    Args:
        include_top: Whether to have the head: global average pooling, dropout, dense layer.
        weights: `None` (random) or the path of a `.weights.h5` or `.keras` file.
        input_tensor: Optional Keras tensor to use as the input.
        input_shape: Optional shape of a clip, `(frames, height, width, 3)`; any but the channels may be `None`.
            `None`: all of them are.
        pooling: Without `include_top`: `None` for the feature map, `"avg"` or `"max"` for its global pooling.
        classes: Number of classes.
        classifier_activation: Activation of the head, `None` for logits.
        name: Name of the model.
        non_local: Non-local blocks: {numbers}, placed as in the paper, or a dictionary of stages to the indices of
            the residual blocks after which they stand, such as `{{4: [2]}}`.
        non_local_options: Dictionary of arguments of `NonLocal3D` for all blocks, over the release's
            (`pool_size=(1, 2, 2)`, `scale="sqrt"`, N(0, 0.01) kernels).
        inflation: Kernels of the I3D's inflated blocks: `"3x1x1"` or `"3x3x3"`. A C2D has none.
        temporal_strides: Temporal strides of conv1, pool1 and pool2. (2, 2, 2) is the paper's for 32 and 128
            frames; (1, 1, 1) takes images as clips of one frame.
        pool1_padding: `"valid"` (55×55 from 224×224, as the release's weights need) or `"same"` (56×56).
        dropout: Rate of the dropout before the dense layer.

    Returns:
        A functional `keras.Model` from `(batch, frames, height, width, 3)` to `(batch, classes)`.

    Raises:
        ValueError: if an argument is none of the above or a clip has fewer frames than the temporal strides need.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), table 1 and section 4

    Example:

    >>> model = {function}(input_shape=(8, 64, 64, 3), classes=5)
    >>> model.output_shape
    (None, 5)
    """


NETWORKS = {}  # name of the model → public function


def _network(depth, inflated):
    """The public function for one row of `ARRANGEMENTS`, as C2D or as I3D."""
    arrangement = ARRANGEMENTS[depth]
    family = "I3D" if inflated else "C2D"
    default_name = f"{family.lower()}_resnet{depth}"

    def build(
        include_top=True,
        weights=None,
        input_tensor=None,
        input_shape=None,
        pooling=None,
        classes=400,
        classifier_activation="softmax",
        name=default_name,
        non_local=arrangement.default_non_local,
        **options,
    ):
        return build_resnet(
            arrangement,
            inflated,
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            name,
            non_local,
            **options,
        )

    build.__name__ = build.__qualname__ = f"{family}ResNet{depth}"
    build.__doc__ = _DOCUMENTATION.format(
        title=f"{'Inflated 3-D' if inflated else '2-D'} ResNet-{depth} with non-local blocks{arrangement.remark}.",
        numbers=", ".join(map(str, (0, *arrangement.non_local))),
        function=build.__name__,
    )
    NETWORKS[default_name] = build
    return build


C2DResNet11 = _network("11", inflated=False)
C2DResNet50 = _network("50", inflated=False)
C2DResNet101 = _network("101", inflated=False)
I3DResNet11 = _network("11", inflated=True)
I3DResNet50 = _network("50", inflated=True)
I3DResNet101 = _network("101", inflated=True)
