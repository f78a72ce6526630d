"""MMAction2's ResNets (torch).

What its weights do not tell is not read: the embedded Gaussian is taken for the dot product too, and the scores are
taken as unscaled, as in MMAction2's own configurations, though `use_scale` is `True` by default in mmcv's block. For
files of such networks, `non_local_options` is to say `pairwise="dot_product"` or `scale="sqrt"`.

Its C2D has kernels without a time axis, and so has its TSN under the same names: where there is a head too, the file is
of a video network, and taken for C2D, whose stem and pooling are the release's. For TSN (and C2D without pooling) the
model is to be built with `temporal_strides=(1, 1, 1)` and `pool1_padding="same"`.
"""

import numpy as np

from keras_nonlocal.checkpoints.tables import (
    BRANCH,
    TORCH_IGNORED,
    TORCH_NORM,
    V1_5,
    Format,
    after,
    convolution,
    dense,
    vector,
)


def _is_of_images(weights, rank):
    return rank == 4 and "pred/kernel" not in weights


def _finish(weights, sources, rank, texts):
    settings = dict(V1_5)
    if rank == 5:
        settings["pool1_padding"] = "same"
    if "conv1/kernel" in weights and len(weights["conv1/kernel"]) == 5:
        # Its I3D. Other networks with these names (SlowOnly) do not have such a conv1.
        settings |= {"temporal_strides": (2, 2, 2), "pool1_temporal_size": 1}
    blocks = [path.removesuffix("/g/kernel") for path in weights if path.endswith("/g/kernel")]
    if not blocks:
        return settings
    pooled = any(".g.0." in name for names in sources.values() for name in names)
    options = {"scale": None, "pool_after_projection": True, "pool_size": (1, 2, 2) if pooled else None}
    if blocks[0] + "/score_kernel" in weights:
        options["pairwise"] = "concatenation"
    elif blocks[0] + "/theta/kernel" not in weights:
        options["pairwise"] = "gaussian"
    settings["non_local_options"] = options
    for block in blocks:
        if block + "/out/kernel" in weights and block + "/out/bias" not in weights:
            weights[block + "/out/bias"] = np.zeros(weights[block + "/out/kernel"].shape[1], "float32")
            sources[block + "/out/bias"] = ()
    if blocks[0] + "/norm/gamma" not in weights:
        options["normalization"] = None
    return settings


_BLOCK = r"backbone\.layer(?P<stage>[1-4])\.(?P<block>\d+)\."
_CONV = _BLOCK + r"conv(?P<branch>[123])\."
_NON_LOCAL = _BLOCK + r"non_local_block\."

FORMAT = Format(
    signature="backbone.layer1.0.conv1.conv.weight",
    rows=(
        (r"backbone\.conv1\.conv\.weight", "conv1/kernel", convolution),
        (r"backbone\.conv1\.bn\.(?P<norm>\w+)", "res_conv1_bn/{norm}", vector),
        (_CONV + r"conv\.weight", "res{stage}_{block}_branch{branch}/kernel", convolution),
        (_CONV + r"bn\.(?P<norm>\w+)", "res{stage}_{block}_branch{branch}_bn/{norm}", vector),
        (_BLOCK + r"downsample\.conv\.weight", "res{stage}_{block}_branch1/kernel", convolution),
        (_BLOCK + r"downsample\.bn\.(?P<norm>\w+)", "res{stage}_{block}_branch1_bn/{norm}", vector),
        # ".0" where pooling follows
        (
            _NON_LOCAL + r"(?P<part>theta|phi|g)(\.0)?\.conv\.weight",
            "nonlocal_conv{stage}_{block}/{part}/kernel",
            dense,
        ),
        (_NON_LOCAL + r"(?P<part>theta|phi|g)(\.0)?\.conv\.bias", "nonlocal_conv{stage}_{block}/{part}/bias", vector),
        (_NON_LOCAL + r"concat_project\.conv\.weight", "nonlocal_conv{stage}_{block}/score_kernel", dense),
        (_NON_LOCAL + r"conv_out\.conv\.weight", "nonlocal_conv{stage}_{block}/out/kernel", dense),
        (_NON_LOCAL + r"conv_out\.conv\.bias", "nonlocal_conv{stage}_{block}/out/bias", vector),
        (_NON_LOCAL + r"conv_out\.bn\.(?P<norm>\w+)", "nonlocal_conv{stage}_{block}/norm/{norm}", vector),
        (r"cls_head\.fc_cls\.weight", "pred/kernel", dense),
        (r"cls_head\.fc_cls\.bias", "pred/bias", vector),
    ),
    words={"stage": after(1), "branch": BRANCH, "norm": TORCH_NORM},
    ignored=TORCH_IGNORED,
    finish=_finish,
    images=_is_of_images,
)
