"""Heads of detection networks with non-local blocks."""

import keras

from keras_nonlocal.applications.resnet import check_options, is_integer
from keras_nonlocal.layers import NonLocal2D

NUM_CONVOLUTIONS = 8
CHANNELS = 512

# Over the layer's defaults: the head has no batch normalization anywhere, and what a detector pads its RoIs with must
# not reach the statistics of others.
OPTIONS = {"normalization": None}


def keypoint_head(
    input_shape=(14, 14, 256), num_keypoints=17, non_local=4, non_local_options=None, name="keypoint_head"
):
    """Keypoint head of Mask R-CNN with non-local blocks.

    8 convolutions of 3×3 to 512 channels with ReLU, a transposed convolution (4×4, stride 2) to one map per keypoint,
    and ×2 bilinear upsampling: 56×56 heat maps from 14×14 features of a region (RoI). All convolutions start as
    Detectron's do (`MSRAFill`: N(0, 2 / fan-out)).

    The upsampling takes half-pixel centres and repeats the border. Detectron does it as a convolution with zeros
    outside, which is the same but for the outermost row and column on each side, where zeros are a quarter.

    Args:
        input_shape: Shape of a region's features, `(height, width, channels)`, or `(channels, height, width)` with
            `image_data_format` `"channels_first"` in the Keras configuration. Height and width may be `None`.
        num_keypoints: Number of keypoints K.
        non_local: Number of non-local blocks, 0 to 4: one after every second convolution, from the first pair on. The
            paper has 4, after convolutions 2, 4, 6 and 8.
        non_local_options: Dictionary of arguments of `NonLocal2D` for all blocks. Of themselves they have no batch
            normalization, as the head has none: their W_z starts at 0.
        name: Name of the model.

    Returns:
        A functional `keras.Model` from `(rois, height, width, channels)` to the logits of the heat maps,
        `(rois, 4 * height, 4 * width, num_keypoints)`.

    Raises:
        ValueError: if an argument is none of the above.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 6, "Keypoint detection";
        [Mask R-CNN](https://arxiv.org/abs/1703.06870), section 5

    Example:

    >>> keypoint_head(input_shape=(14, 14, 32)).output_shape
    (None, 56, 56, 17)
    """
    channels_first = keras.config.image_data_format() == "channels_first"
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3 or input_shape[-1 + channels_first] is None:
        raise ValueError(
            "`input_shape` must have 3 entries, (height, width, channels), or (channels, height, width) with channels "
            f"first, and the channels must be known. Received: input_shape={input_shape!r}"
        )
    if not is_integer(num_keypoints, 1):
        raise ValueError(f"`num_keypoints` must be an integer of at least 1. Received: num_keypoints={num_keypoints!r}")
    most = NUM_CONVOLUTIONS // 2
    if not is_integer(non_local) or non_local > most:
        raise ValueError(f"`non_local` must be an integer from 0 to {most}. Received: non_local={non_local!r}")
    if not isinstance(non_local_options, (dict, type(None))):
        raise ValueError(
            "`non_local_options` must be a dictionary of arguments of `NonLocal2D`. "
            f"Received: non_local_options={non_local_options!r}"
        )
    options = non_local_options or {}
    check_options(NonLocal2D, options, options)

    x = inputs = keras.Input(input_shape, name="roi_features")
    for number in range(1, NUM_CONVOLUTIONS + 1):
        x = keras.layers.Conv2D(
            CHANNELS, 3, padding="same", activation="relu", kernel_initializer=_msra(), name=f"conv_fcn{number}"
        )(x)
        if number % 2 == 0 and number <= 2 * non_local:
            x = NonLocal2D(**OPTIONS | options, name=f"nonlocal_conv_fcn{number}")(x)
    # Scores are never rounded to half precision.
    x = keras.layers.Conv2DTranspose(
        num_keypoints,
        4,
        strides=2,
        padding="same",
        kernel_initializer=_msra(),
        name="kps_score_lowres",
        dtype="float32",
    )(x)
    x = keras.layers.UpSampling2D(2, interpolation="bilinear", name="kps_score", dtype="float32")(x)
    return keras.Model(inputs, x, name=name)


def _msra():
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")
