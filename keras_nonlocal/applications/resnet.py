"""C2D and I3D ResNets with non-local blocks, after the authors' release.

Wang et al., "Non-local Neural Networks" (CVPR 2018, arXiv 1711.07971), table 1 and section 4. Layer names are the
release's blob names, so that a checkpoint's tensors find their layers by name.

Shape letters: B batch, T time, H height, W width, C channels.
"""

import dataclasses
import difflib
import inspect
import sys

import keras
import numpy as np
from keras import ops

from keras_nonlocal.applications import weights as network_weights
from keras_nonlocal.applications.folded import Conv3D, MaxPooling3D
from keras_nonlocal.applications.rematerialization import RematerializedModel
from keras_nonlocal.layers import NonLocal3D
from keras_nonlocal.normalization import BatchNormalization

PIXEL_MEAN = 114.75
PIXEL_STD = 57.375

# What pixels weights were trained on: mean and standard deviation of R, G, B in 0..255, `None` for those above.
PIXELS = {
    "release": None,
    "torch": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "caffe": ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
}


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """One row of the table of networks.

    Args:
        blocks: Residual blocks of res2, res3, res4, res5.
        width: Channels of the first convolution; stage `s` has `width * 2 ** (s - 2)` in its bottlenecks.
        non_local: Number of non-local blocks → {stage: indices of the residual blocks after which they stand}.
        default_non_local: The number that a builder takes by default.
        keras_name: Name of the network in `keras.applications` with the weights of images for it, if there is one.
        remark: What its documentation adds to the title.
    """

    blocks: tuple
    width: int
    non_local: dict
    default_non_local: int = 5
    keras_name: str | None = None
    remark: str = ""


ARRANGEMENTS = {
    "11": Arrangement((1, 2), 16, {1: {3: (1,)}, 2: {3: (0, 1)}}, 2, remark=", small: for CPUs, examples and tests"),
    "50": Arrangement(
        (3, 4, 6, 3),
        64,
        {1: {4: (4,)}, 5: {3: (1, 3), 4: (1, 3, 5)}, 10: {3: range(4), 4: range(6)}},
        keras_name="ResNet50",
    ),
    "101": Arrangement(
        (3, 4, 23, 3),
        64,
        {1: {4: (21,)}, 5: {3: (1, 3), 4: (6, 13, 20)}, 10: {3: range(4), 4: range(2, 23, 4)}},
        keras_name="ResNet101",
    ),
}

# Residual blocks, counted from 0, whose kernels I3D inflates in time: every one of res2, every second one later,
# from the first, but in res5 from the second.
INFLATED = {2: (0, 1), 3: (0, 2), 4: (0, 2), 5: (1, 2)}

# The authors' release: its arrangement for 8 frames, and where its blocks differ from the layer's defaults (the paper's
# equations).
RELEASE = {"temporal_strides": (1, 1, 2), "pool1_padding": "valid", "stride_in_1x1": False, "pixels": "release"}
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
    if type(x).__module__.partition(".")[0] == "tensorflow":  # of tf.data, on other backends too
        return (sys.modules["tensorflow"].cast(x, "float32") - PIXEL_MEAN) / PIXEL_STD
    if not ops.is_tensor(x) and not isinstance(x, keras.KerasTensor):
        return (np.asarray(x, "float32") - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return (ops.cast(x, "float32") - PIXEL_MEAN) / PIXEL_STD


def non_local_blocks(arrangement, non_local):
    """Expands the `non_local` argument of a builder to {stage: indices of residual blocks}."""
    numbers = {0: {}} | arrangement.non_local
    if isinstance(non_local, dict):
        placement = non_local
    elif is_integer(non_local) and non_local in numbers:
        placement = numbers[non_local]
    else:
        placement = None
    if placement is None or not all(
        isinstance(indices, (list, tuple, range, set)) and all(map(is_integer, indices))
        for indices in placement.values()
    ):
        raise ValueError(
            f"`non_local` must be one of {', '.join(map(str, numbers))}, or a dictionary of stages to lists of indices "
            f"of residual blocks such as {{4: [2]}}. Received: non_local={non_local!r}"
        )
    for stage, indices in placement.items():
        blocks = dict(enumerate(arrangement.blocks, start=2)).get(stage, 0)
        if not blocks or not set(indices) <= set(range(blocks)):
            raise ValueError(
                f"`non_local` must name stages 2 to {len(arrangement.blocks) + 1} and residual blocks that they have, "
                f"counted from 0; the stages have {arrangement.blocks} blocks. Received: non_local={non_local!r}"
            )
    return {stage: tuple(indices) for stage, indices in placement.items() if indices}


def non_local_arguments(placement, options, defaults):
    """Expands the `non_local_options` argument of a builder to {stage: arguments of its blocks}.

    `defaults`: what the weights need, over the release's options.
    """
    options = {} if options is None else options
    stages = {key: value for key, value in options.items() if is_integer(key)} if isinstance(options, dict) else None
    if stages is None or not all(isinstance(value, dict) for value in stages.values()):
        raise ValueError(
            "`non_local_options` must be a dictionary of arguments of `NonLocal3D`, with stages for those of their "
            'blocks only, such as {"scale": None, 3: {"window": (4, None, None)}}. '
            f"Received: non_local_options={options!r}"
        )
    for stage in stages:
        if stage not in placement:
            raise ValueError(
                f"`non_local_options` must name stages that have non-local blocks ({sorted(placement)}); {stage!r} is "
                f"none. Received: non_local_options={options!r}"
            )
    of_all = {key: value for key, value in options.items() if key not in stages}
    for arguments in (of_all, *stages.values()):
        check_options(NonLocal3D, arguments, options)
    return {stage: RELEASE_OPTIONS | defaults | of_all | stages.get(stage, {}) for stage in placement}


def check_options(layer, arguments, options):
    """Raises a `ValueError` if one of `arguments` is none of the layer's; `options` is what the user gave."""
    known = [name for name in inspect.signature(layer).parameters if name != "kwargs"] + ["dtype", "trainable"]
    for name in arguments:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known) or known
            raise ValueError(
                f"`non_local_options` must hold arguments of `{layer.__name__}`; {name!r} is none. The nearest: "
                f"{', '.join(nearest)}. Received: non_local_options={options!r}"
            )


def is_integer(value, least=0):
    """Whether `value` is an integer, and not below `least`; `True` and `False` are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
    temporal_strides=None,
    pool1_padding=None,
    pool1_temporal_size=None,
    stride_in_1x1=None,
    pixels=None,
    dropout=0.5,
    new_head=False,
    remat=False,
):
    """Builds any network of the family; the public functions are its rows with names.

    Args:
        arrangement: A row of `ARRANGEMENTS`.
        inflated: Whether the network has temporal convolutions (I3D) or not (C2D).

    The other arguments are those of `I3DResNet50`.
    """
    checkpoint = None if weights is None else network_weights.read(weights, arrangement.keras_name)
    settings = RELEASE if checkpoint is None else RELEASE | checkpoint.settings
    given = {
        "temporal_strides": temporal_strides,
        "pool1_padding": pool1_padding,
        "pool1_temporal_size": pool1_temporal_size,
        "stride_in_1x1": stride_in_1x1,
        "pixels": pixels,
    }
    temporal_strides, pool1_padding, pool1_temporal_size, stride_in_1x1, pixels = (
        settings.get(name) if value is None else value for name, value in given.items()
    )
    placement = non_local_blocks(arrangement, non_local)
    arguments = non_local_arguments(placement, non_local_options, settings.get("non_local_options", {}))
    if inflation not in ("3x1x1", "3x3x3"):
        raise ValueError(f'`inflation` must be "3x1x1" or "3x3x3". Received: inflation={inflation!r}')
    if pool1_padding not in ("valid", "same"):
        raise ValueError(f'`pool1_padding` must be "valid" or "same". Received: pool1_padding={pool1_padding!r}')
    if pooling not in (None, "avg", "max"):
        raise ValueError(f'`pooling` must be `None`, "avg" or "max". Received: pooling={pooling!r}')
    if not isinstance(pixels, str) or pixels not in PIXELS:
        raise ValueError(f"`pixels` must be one of {', '.join(map(repr, PIXELS))}. Received: pixels={pixels!r}")
    triple = isinstance(temporal_strides, (tuple, list)) and len(temporal_strides) == 3
    if not triple or not all(is_integer(stride, 1) for stride in temporal_strides):
        raise ValueError(
            "`temporal_strides` must be 3 integers of at least 1: of conv1, pool1 and pool2. "
            f"Received: temporal_strides={temporal_strides!r}"
        )
    if pool1_temporal_size is not None and not is_integer(pool1_temporal_size, 1):
        raise ValueError(
            "`pool1_temporal_size` must be `None` or an integer of at least 1. "
            f"Received: pool1_temporal_size={pool1_temporal_size!r}"
        )
    if include_top and not is_integer(classes, 1):
        raise ValueError(f"`classes` must be an integer of at least 1. Received: classes={classes!r}")
    if include_top and not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ValueError(f"`dropout` must be a number from 0 to below 1. Received: dropout={dropout!r}")
    if not isinstance(remat, bool):
        raise ValueError(f"`remat` must be `True` or `False`. Received: remat={remat!r}")
    channels_first = keras.config.image_data_format() == "channels_first"
    if input_tensor is not None:
        if not isinstance(input_tensor, keras.KerasTensor):
            raise ValueError(f"`input_tensor` must be a Keras tensor. Received: input_tensor={type(input_tensor)}")
        if input_shape is not None and tuple(input_shape) != tuple(input_tensor.shape[1:]):
            raise ValueError(
                f"`input_shape` must be that of `input_tensor`, {tuple(input_tensor.shape[1:])}, or `None`. "
                f"Received: input_shape={input_shape!r}"
            )
        input_shape = tuple(input_tensor.shape[1:])
    if input_shape is None:
        input_shape = (3, None, None, None) if channels_first else (None, None, None, 3)
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 4:
        raise ValueError(
            "`input_shape` must have 4 entries, (frames, height, width, 3), or (3, frames, height, width) with "
            f"channels first. Received: input_shape={input_shape!r}"
        )

    # The geometry: kernel sizes and strides of the stem, and of every residual block with what stands behind it.
    conv1_stride, pool1_stride, pool2_stride = temporal_strides
    conv1 = (5 if inflated else 1, 7, 7), (conv1_stride, 2, 2)
    pool1 = (pool1_temporal_size or pool1_stride, 3, 3), (pool1_stride, 2, 2)
    pool2 = (pool2_stride, 1, 1), (pool2_stride, 1, 1)
    blocks = list(_residual_blocks(arrangement, inflated and inflation, arguments, placement))
    least = _least_of_blocks(blocks, pool2)
    padding = (0, 1, 1) if pool1_padding == "same" else (0, 0, 0)
    least = _least_inputs(_least_inputs(least, *pool1, padding), (1, 1, 1), conv1[1])
    sizes, channels = (input_shape[1:], input_shape[0]) if channels_first else (input_shape[:3], input_shape[3])
    if any(size is not None and size < n for size, n in zip(sizes, least, strict=True)):
        raise ValueError(
            f"Clips must have at least {least[0]} frames of height {least[1]} and width {least[2]} with these "
            f"strides and non-local blocks. Received: input_shape={tuple(input_shape)}"
        )

    inputs = keras.Input(shape=input_shape) if input_tensor is None else input_tensor
    x = inputs
    if PIXELS[pixels] is not None:
        if channels != 3:
            raise ValueError(
                f"Clips must have 3 channels with pixels={pixels!r}. Received: input_shape={tuple(input_shape)}"
            )
        x = _rescaling(*PIXELS[pixels], channels_first)(x)
    x = _conv(x, arrangement.width, *conv1, "conv1")
    x = keras.layers.ReLU(name="conv1_relu")(_norm(x, "res_conv1_bn"))
    if pool1_padding == "same":
        # Symmetric, with values that no ReLU can exceed from below: zeros.
        x = keras.layers.ZeroPadding3D(padding, name="pool1_pad")(x)
    x = MaxPooling3D(*pool1, name="pool1")(x)
    for stage, block, kernels, stride, layer, ends_res2 in blocks:
        width = arrangement.width * 2 ** (stage - 2)
        strides = (stride, (1, 1, 1)) if stride_in_1x1 else ((1, 1, 1), stride)
        x = _bottleneck(x, width, kernels, strides, block == 0, f"res{stage}_{block}")
        x = x if layer is None else layer(x)
        if ends_res2 and pool2_stride > 1:
            x = MaxPooling3D(*pool2, name="pool2")(x)
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
    model = (RematerializedModel if remat else keras.Model)(inputs, x, name=name)
    if weights is not None:
        network_weights.load(model, checkpoint, new_head)
    return model


def _residual_blocks(arrangement, inflation, arguments, placement):
    """`(stage, block, kernel sizes, stride, non-local block behind it or None, whether res2 ends)` of each."""
    for stage, num_blocks in enumerate(arrangement.blocks, start=2):
        for block in range(num_blocks):
            offset, step = INFLATED[stage]
            temporal = 3 if inflation and block >= offset and (block - offset) % step == 0 else 1
            kernels = ((1, 1, 1), (temporal, 3, 3)) if inflation == "3x3x3" else ((temporal, 1, 1), (1, 3, 3))
            stride = (1, 2, 2) if stage > 2 and block == 0 else (1, 1, 1)
            layer = None
            if block in placement.get(stage, ()):
                layer = NonLocal3D(**arguments[stage], name=f"nonlocal_conv{stage}_{block}")
            yield stage, block, kernels, stride, layer, stage == 2 and block == num_blocks - 1


def _least_of_blocks(blocks, pool2):
    """Least sizes of pool1's output, from the last block to the first."""
    least = [1, 1, 1]
    for _, _, _, stride, layer, ends_res2 in reversed(blocks):
        if ends_res2:
            least = _least_inputs(least, *pool2)
        if layer is not None:
            least = _least_of_non_local(least, layer)
        least = _least_inputs(least, (1, 1, 1), stride)
    return least


def _least_inputs(outputs, kernel_size, strides, padding=(0, 0, 0)):
    """Least sizes of a map from which a sliding window gives `outputs` positions.

    A convolution that is padded by half its kernel on both sides counts as one of kernel 1.
    """
    return [
        max((n - 1) * stride + kernel - 2 * p, 1)
        for n, kernel, stride, p in zip(outputs, kernel_size, strides, padding, strict=True)
    ]


def _least_of_non_local(outputs, layer):
    """Least sizes of a map for a non-local block: one window, and one key in it."""
    none = (None,) * 3
    sizes = zip(outputs, layer.window or none, layer.pool_size or none, strict=True)
    return [max(n, window or 1, pool_size or 1) for n, window, pool_size in sizes]


def _rescaling(mean, std, channels_first):
    """From what `preprocess_input` gives to `(pixel - mean) / std` per channel."""
    shape = (3, 1, 1, 1) if channels_first else (3,)
    scale = PIXEL_STD / np.array(std)
    offset = (PIXEL_MEAN - np.array(mean)) / std
    return keras.layers.Rescaling(scale.reshape(shape).tolist(), offset.reshape(shape).tolist(), name="pixels")


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
    return BatchNormalization(axis=_channel_axis(), momentum=0.9, epsilon=1e-5, name=name)(x)


def _bottleneck(x, width, kernels, strides, project, name):
    shortcut = x
    if project:
        stride = max(strides)  # of branch2a or of branch2b
        shortcut = _conv(x, 4 * width, (1, 1, 1), stride, name + "_branch1")
        shortcut = _norm(shortcut, name + "_branch1_bn")
    x = _conv(x, width, kernels[0], strides[0], name + "_branch2a")
    x = keras.layers.ReLU(name=name + "_branch2a_relu")(_norm(x, name + "_branch2a_bn"))
    x = _conv(x, width, kernels[1], strides[1], name + "_branch2b")
    x = keras.layers.ReLU(name=name + "_branch2b_relu")(_norm(x, name + "_branch2b_bn"))
    x = _norm(_conv(x, 4 * width, (1, 1, 1), (1, 1, 1), name + "_branch2c"), name + "_branch2c_bn")
    x = keras.layers.Add(name=name + "_add")([shortcut, x])
    return keras.layers.ReLU(name=name + "_out")(x)


_DOCUMENTATION = """{title}

    The defaults are the arrangement of the authors' release for 8 frames ("8x8"): temporal strides (1, 1, 2) of conv1,
    pool1 and pool2, pool1 without padding, non-local blocks with sub-sampled keys and scaled scores.
    Inputs are normalised by `keras_nonlocal.applications.preprocess_input`; with `image_data_format` `"channels_first"`
    in the Keras configuration the channels come before the frames, here and below.

    Args:
        include_top: Whether to have the head: global average pooling, dropout, dense layer.
        weights: `None` (random); the path of a `.weights.h5` or `.keras` file of such a network, of a file of the
            authors' release, PySlowFast, MMAction2 or torchvision (see `keras_nonlocal.checkpoints.read`, whose result
            it also takes); or `"imagenet"`: the weights of `keras.applications`, repeated along time. Non-local blocks
            that a file does not have start as the identity; weights of images leave the head random, too.
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
            (`pool_size=(1, 2, 2)`, `scale="sqrt"`, N(0, 0.01) kernels). Under a stage's number stands a dictionary for
            that stage's blocks, over those of all: `{{3: {{"window": (4, None, None)}}}}` is the paper's choice for
            long clips, groups of 4 frames in res3.
        inflation: Kernels of the I3D's inflated blocks: `"3x1x1"` or `"3x3x3"`. A C2D has none.
        temporal_strides: Temporal strides of conv1, pool1 and pool2: (1, 1, 2), or what the file in `weights` says.
            (2, 2, 2) is the paper's for 32 and 128 frames; (1, 1, 1) takes images as clips of one frame.
        pool1_padding: `"valid"` (55×55 from 224×224, as the release's weights need) or `"same"` (56×56). `None`:
            `"valid"`, or what the file says.
        pool1_temporal_size: Frames that pool1 takes the maximum of; `None`: as many as its temporal stride, or what the
            file says.
        stride_in_1x1: Whether a stage's spatial stride is that of its first 1×1×1 convolution (branch2a, as in
            the ResNets of `keras.applications`) in place of its first 1×3×3 one (branch2b). `None`: only if the file
            in `weights` says so.
        pixels: What pixels the weights were trained on. Inputs are always those of `preprocess_input`; a layer without
            weights, "pixels", maps them to `"torch"` (ImageNet's mean and standard deviation of each channel) or
            `"caffe"` (less ImageNet's mean). `None`: `"release"`, or what the file says.
        dropout: Rate of the dropout before the dense layer.
        new_head: Whether to leave the head random, for other classes than those of the file in `weights`.
        remat: Whether training keeps only what goes from one residual or non-local block to the next, and computes the
            rest once more in the backward pass: less memory, about a third more arithmetic. Weights and results are the
            same.

    Returns:
        A functional `keras.Model` from `(batch, frames, height, width, 3)` to `(batch, classes)`.

    Raises:
        ValueError: if an argument is none of the above, the weights do not fit, or clips are shorter or smaller than
            the strides, windows and sub-sampling need.

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

    # What `help` and editors show, in place of `**options`.
    own = inspect.signature(build).parameters
    all_of_them = [own.get(name, parameter) for name, parameter in inspect.signature(build_resnet).parameters.items()]
    build.__signature__ = inspect.Signature(all_of_them[2:])
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
