"""PySlowFast's C2D and I3D, with and without non-local blocks (torch).

The pairwise function is not in the weights but in the configuration that a checkpoint holds as a YAML string, `cfg`.
Not read from there are the pooling in the non-local blocks (`NONLOCAL.POOL`), taken as the release's, and
`NONLOCAL.GROUP`, taken as 1: attention over clips that are cut in groups along time is `window` here.
"""

import re

from keras_nonlocal.checkpoints.tables import TORCH_IGNORED, TORCH_NORM, Format, convolution, dense, vector

# NONLOCAL.INSTANTIATION → arguments of `NonLocal3D`.
_INSTANTIATIONS = {
    "softmax": {"pairwise": "embedded_gaussian", "scale": "sqrt"},
    "dot_product": {"pairwise": "dot_product", "scale": None},
}


def _finish(weights, sources, rank, texts):
    settings = {"pixels": "release", "stride_in_1x1": False, "pool1_padding": "same"}
    found = re.search(r"^ +INSTANTIATION: *['\"]?(\w+)['\"]? *$", texts.get("cfg", ""), re.MULTILINE)
    if found and found[1] in _INSTANTIATIONS and any(path.endswith("/g/kernel") for path in weights):
        settings["non_local_options"] = dict(_INSTANTIATIONS[found[1]])
    return settings


_BLOCK = r"s(?P<stage>[2-5])\.pathway0_res(?P<block>\d+)\.branch"
_NON_LOCAL = r"s(?P<stage>[2-5])\.pathway0_nonlocal(?P<block>\d+)\."

FORMAT = Format(
    signature="s2.pathway0_res0.branch2.a.weight",
    rows=(
        (r"s1\.pathway0_stem\.conv\.weight", "conv1/kernel", convolution),
        (r"s1\.pathway0_stem\.bn\.(?P<norm>\w+)", "res_conv1_bn/{norm}", vector),
        (_BLOCK + r"2\.(?P<branch>[abc])\.weight", "res{stage}_{block}_branch2{branch}/kernel", convolution),
        (_BLOCK + r"2\.(?P<branch>[abc])_bn\.(?P<norm>\w+)", "res{stage}_{block}_branch2{branch}_bn/{norm}", vector),
        (_BLOCK + r"1\.weight", "res{stage}_{block}_branch1/kernel", convolution),
        (_BLOCK + r"1_bn\.(?P<norm>\w+)", "res{stage}_{block}_branch1_bn/{norm}", vector),
        (_NON_LOCAL + r"conv_(?P<part>theta|phi|g|out)\.weight", "nonlocal_conv{stage}_{block}/{part}/kernel", dense),
        (_NON_LOCAL + r"conv_(?P<part>theta|phi|g|out)\.bias", "nonlocal_conv{stage}_{block}/{part}/bias", vector),
        (_NON_LOCAL + r"(bn|norm)\.(?P<norm>\w+)", "nonlocal_conv{stage}_{block}/norm/{norm}", vector),
        (r"head\.projection\.weight", "pred/kernel", dense),
        (r"head\.projection\.bias", "pred/bias", vector),
    ),
    words={"norm": TORCH_NORM},
    ignored=TORCH_IGNORED,
    finish=_finish,
)
