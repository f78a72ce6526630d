"""Bottleneck ResNets of torchvision, for images, and whatever has its names."""

from keras_nonlocal.checkpoints.tables import (
    BRANCH,
    TORCH_IGNORED,
    TORCH_NORM,
    Format,
    after,
    convolution,
    dense,
    finish_v1_5,
    vector,
)

_BLOCK = r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."

FORMAT = Format(
    signature="layer1.0.conv1.weight",
    rows=(
        (r"conv1\.weight", "conv1/kernel", convolution),
        (r"bn1\.(?P<norm>\w+)", "res_conv1_bn/{norm}", vector),
        (_BLOCK + r"conv(?P<branch>[123])\.weight", "res{stage}_{block}_branch{branch}/kernel", convolution),
        (_BLOCK + r"bn(?P<branch>[123])\.(?P<norm>\w+)", "res{stage}_{block}_branch{branch}_bn/{norm}", vector),
        (_BLOCK + r"downsample\.0\.weight", "res{stage}_{block}_branch1/kernel", convolution),
        (_BLOCK + r"downsample\.1\.(?P<norm>\w+)", "res{stage}_{block}_branch1_bn/{norm}", vector),
        (r"fc\.weight", "pred/kernel", dense),
        (r"fc\.bias", "pred/bias", vector),
    ),
    words={"stage": after(1), "branch": BRANCH, "norm": TORCH_NORM},
    ignored=TORCH_IGNORED,
    finish=finish_v1_5,
)
