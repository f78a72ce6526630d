"""ResNets (v1.5) of KerasHub, for images: a backbone's or a classifier's weights, as arrays under their paths.

There are no files of this format, only `from_arrays`: Keras 3's own do not hold the names.
"""

from keras_nonlocal.checkpoints.tables import (
    BRANCH,
    Format,
    after,
    finish_v1_5,
    keras_convolution,
    keras_dense,
    vector,
)

_BLOCK = r"stack(?P<stage>[0-3])_block(?P<block>\d+)_(?P<branch>[0-3])_"
_NORM = r"bn/(?P<norm>gamma|beta|moving_mean|moving_variance)"

FORMAT = Format(
    signature="stack0_block0_1_conv/kernel",
    rows=(
        (r"conv1_conv/kernel", "conv1/kernel", keras_convolution),
        (r"conv1_" + _NORM, "res_conv1_bn/{norm}", vector),
        (_BLOCK + r"conv/kernel", "res{stage}_{block}_branch{branch}/kernel", keras_convolution),
        (_BLOCK + _NORM, "res{stage}_{block}_branch{branch}_bn/{norm}", vector),
        (r"predictions/kernel", "pred/kernel", keras_dense),
        (r"predictions/bias", "pred/bias", vector),
    ),
    words={"stage": after(2), "branch": BRANCH},
    finish=finish_v1_5,
)
