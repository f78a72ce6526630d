"""The authors' release: Caffe2 blobs in a pickle, of video networks and of the image networks that they start from.

PySlowFast's own zoo has I3D files with these names too, for networks whose pool1 is padded: a file does not tell them
apart, so for one of those the model is to be built with `pool1_padding="same"`.
"""

import numpy as np

from keras_nonlocal.checkpoints.tables import EPSILON, Format, convolution, dense, vector

_NORM = {"s": "gamma", "b": "beta", "rm": "moving_mean", "riv": "moving_variance"}.get


def _finish(weights, sources, rank, texts):
    settings = {"pixels": "release", "stride_in_1x1": False, "pool1_padding": "valid"} if rank == 5 else {}
    for path in [path for path in weights if path.endswith("/gamma")]:
        mean, variance = (path.removesuffix("gamma") + name for name in ("moving_mean", "moving_variance"))
        if mean not in weights and variance not in weights:
            # Affine form: the statistics are in γ and β. Mean 0 and variance 1 - ε leave them as they are.
            weights[mean], weights[variance] = np.zeros_like(weights[path]), np.full_like(weights[path], 1 - EPSILON)
            sources[mean] = sources[variance] = ()
    if any(path.endswith("/g/kernel") for path in weights) and not any("/norm/" in path for path in weights):
        settings["non_local_options"] = {"normalization": None}
    return settings


_BLOCK = r"res(?P<stage>[2-5])_(?P<block>\d+)_branch(?P<branch>1|2a|2b|2c)"
_NON_LOCAL = r"nonlocal_conv(?P<stage>[2-5])_(?P<block>\d+)"

FORMAT = Format(
    signature="res2_0_branch2a_w",
    rows=(
        (r"conv1_w", "conv1/kernel", convolution),
        (r"res_conv1_bn_(?P<norm>[a-z]+)", "res_conv1_bn/{norm}", vector),
        (_BLOCK + r"_w", "res{stage}_{block}_branch{branch}/kernel", convolution),
        (_BLOCK + r"_bn_(?P<norm>[a-z]+)", "res{stage}_{block}_branch{branch}_bn/{norm}", vector),
        (_NON_LOCAL + r"_(?P<part>theta|phi|g|out)_w", "nonlocal_conv{stage}_{block}/{part}/kernel", dense),
        (_NON_LOCAL + r"_(?P<part>theta|phi|g|out)_b", "nonlocal_conv{stage}_{block}/{part}/bias", vector),
        (_NON_LOCAL + r"_bn_(?P<norm>[a-z]+)", "nonlocal_conv{stage}_{block}/norm/{norm}", vector),
        (r"pred_w", "pred/kernel", dense),
        (r"pred_b", "pred/bias", vector),
    ),
    words={"norm": _NORM},
    ignored=(
        (r".*_momentum", "momentum of the optimizer"),
        (r"lr", "the learning rate"),
        (r"model_iter", "a counter of training steps"),
    ),
    finish=_finish,
)
