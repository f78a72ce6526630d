"""ResNets (v1) of `keras.applications`, for images, whose convolutions have biases and whose pixels are BGR."""

import numpy as np

from keras_nonlocal.checkpoints.tables import BRANCH, EPSILON, Format, after, keras_convolution, keras_dense, vector

_EPSILON_DIFFERENCE = 1.001e-5 - EPSILON  # its batch norm's, less ours


def _first_convolution(array):
    return keras_convolution(array)[..., ::-1, :]  # takes RGB


def _variance(array):
    return vector(array).astype("float64") + _EPSILON_DIFFERENCE


def _finish(weights, sources, rank, texts):
    # A bias before a batch norm is a part of its mean.
    means = {"conv1/bias": "res_conv1_bn/moving_mean"}
    for bias in [path for path in weights if path.endswith("/bias") and path != "pred/bias"]:
        mean = means.get(bias, bias.removesuffix("/bias") + "_bn/moving_mean")
        if mean in weights:
            weights[mean] = np.subtract(weights[mean], weights.pop(bias))
            sources[mean] += sources.pop(bias)
    return {"pixels": "caffe", "stride_in_1x1": True}


_BLOCK = r"conv(?P<stage>[2-5])_block(?P<block>[1-9]\d*)_(?P<branch>[0-3])_"
_VARIANCE = r"bn/moving_variance"
_NORM = r"bn/(?P<norm>gamma|beta|moving_mean)"

FORMAT = Format(
    signature="conv2_block1_1_conv/kernel",
    rows=(
        (r"conv1_conv/kernel", "conv1/kernel", _first_convolution),
        (r"conv1_conv/bias", "conv1/bias", vector),
        (r"conv1_" + _VARIANCE, "res_conv1_bn/moving_variance", _variance),
        (r"conv1_" + _NORM, "res_conv1_bn/{norm}", vector),
        (_BLOCK + r"conv/kernel", "res{stage}_{block}_branch{branch}/kernel", keras_convolution),
        (_BLOCK + r"conv/bias", "res{stage}_{block}_branch{branch}/bias", vector),
        (_BLOCK + _VARIANCE, "res{stage}_{block}_branch{branch}_bn/moving_variance", _variance),
        (_BLOCK + _NORM, "res{stage}_{block}_branch{branch}_bn/{norm}", vector),
        (r"predictions/kernel", "pred/kernel", keras_dense),
        (r"predictions/bias", "pred/bias", vector),
    ),
    words={"block": after(-1), "branch": BRANCH},
    finish=_finish,
)
