"""Parity with MMAction2's own I3D with non-local blocks: its file in, its class probabilities out.

`pip install mmaction2==1.2.0 mmcv-lite==2.1.0 mmengine-lite==0.10.7 torch`; later mmcv it refuses.
"""

import pathlib
import sys
import types

import keras
import mmaction
import numpy as np
import pytest
import torch

from keras_nonlocal import applications
from tests.release_twin import positions, random_blobs, random_clips

SHAPE = (16, 64, 64, 3)
TOLERANCE = 1e-4
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of its I3D's configuration
BRANCHES = {"2a": "conv1", "2b": "conv2", "2c": "conv3", "1": "downsample"}
NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}

# The package on the registry lacks a folder that importing all its models needs: only the modules used here.
for name in ("models", "models.backbones", "models.heads"):
    package = types.ModuleType(f"mmaction.{name}")
    package.__path__ = [str(pathlib.Path(mmaction.__file__).parent.joinpath(*name.split(".")))]
    sys.modules.setdefault(package.__name__, package)

import mmaction.models.losses  # noqa: E402, F401  (the head looks its loss up)
from mmaction.models.backbones.resnet3d import ResNet3d  # noqa: E402
from mmaction.models.heads.i3d_head import I3DHead  # noqa: E402


class Recognizer(torch.nn.Module):
    """The two parts of a recognizer that have weights, under its names."""

    def __init__(self, depth, non_local, mode, sub_sample, use_scale):
        super().__init__()
        blocks = ResNet3d.arch_settings[depth][1]
        self.backbone = ResNet3d(
            depth=depth,
            pretrained=None,
            conv1_kernel=(5, 7, 7),
            conv1_stride_t=2,
            pool1_stride_t=2,
            norm_eval=False,
            inflate=((1, 1, 1), (1, 0, 1, 0), (1, 0) * (blocks[2] // 2) + (1,) * (blocks[2] % 2), (0, 1, 0)),
            zero_init_residual=False,
            non_local=[
                [int(block in non_local.get(stage, ())) for block in range(number)]
                for stage, number in enumerate(blocks, 2)
            ],
            non_local_cfg={
                "sub_sample": sub_sample,
                "use_scale": use_scale,
                "norm_cfg": {"type": "BN3d", "requires_grad": True},
                "mode": mode,
            },
        )
        self.cls_head = I3DHead(num_classes=400, in_channels=2048)
        self.eval()

    def forward(self, x):
        return torch.softmax(self.cls_head(self.backbone(x)), -1)


def their_name(blob):
    """Of a blob of the release."""
    name, _, kind = blob.rpartition("_")
    is_norm = name.endswith("_bn")
    name = name.removesuffix("_bn")
    if name == "pred":
        return f"cls_head.fc_cls.{'weight' if kind == 'w' else 'bias'}"
    if name in ("conv1", "res_conv1"):
        unit = "backbone.conv1"
    elif name.startswith("res"):
        stage, block, branch = name.removeprefix("res").replace("branch", "").split("_")
        unit = f"backbone.layer{int(stage) - 1}.{block}.{BRANCHES[branch]}"
    else:
        stage, block, *part = name.removeprefix("nonlocal_conv").split("_")
        part = "conv_out" if part in ([], ["out"]) else part[0]
        unit = f"backbone.layer{int(stage) - 1}.{block}.non_local_block.{part}"
    return f"{unit}.bn.{NORM[kind]}" if is_norm else f"{unit}.conv.{'weight' if kind == 'w' else 'bias'}"


def fill(model, blobs):
    """All weights; of the blobs, all but what the arrangement has not."""
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    found = {their_name(name): torch.from_numpy(blob) for name, blob in blobs.items()}
    plain = {name: name.replace(".phi.0.", ".phi.").replace(".g.0.", ".g.") for name in state}
    model.load_state_dict({name: found[plain[name]] for name in state}, strict=False)
    left = set(found) - set(plain.values())
    assert all(name.endswith("conv_out.conv.bias") for name in left), left


@pytest.mark.parametrize(
    ("depth", "mode", "sub_sample"),
    [
        (50, "embedded_gaussian", True),
        pytest.param(50, "embedded_gaussian", False, marks=pytest.mark.slow),
        pytest.param(50, "dot_product", True, marks=pytest.mark.slow),
        pytest.param(101, "embedded_gaussian", True, marks=pytest.mark.slow),
    ],
)
def test_parity(tmp_path, depth, mode, sub_sample):
    stages = positions(depth, 5)
    blobs = random_blobs(depth, True, stages)
    for name in [name for name in blobs if "_theta_" in name or "_phi_" in name]:
        # Their scores are not scaled.
        inner = 256 if name.startswith("nonlocal_conv3") else 512
        blobs[name] = blobs[name] * np.float32(inner**-0.25)
        if mode == "dot_product":
            # The mean of the scores, which no softmax takes out, is many times their spread.
            blobs[name] = blobs[name] * np.float32(0.2)
    theirs = Recognizer(depth, stages, mode, sub_sample, use_scale=False)
    fill(theirs, blobs)
    pixels = np.clip(random_clips(SHAPE, seed=1) * 57.375 + 114.75, 0, 255).round()
    with torch.inference_mode():
        normalized = torch.from_numpy(np.float32((pixels - MEAN) / STD))
        expected = theirs(normalized.permute(0, 4, 1, 2, 3)).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 100 * TOLERANCE
    path = tmp_path / "recognizer.pth"
    torch.save({"meta": {"epoch": 100}, "state_dict": theirs.state_dict()}, path)
    options = {} if mode == "embedded_gaussian" else {"non_local_options": {"pairwise": mode}}
    builder = getattr(applications, f"I3DResNet{depth}")
    ours = builder(weights=str(path), non_local=stages, input_shape=SHAPE, **options)
    clips = applications.preprocess_input(np.float32(pixels))
    actual = keras.ops.convert_to_numpy(ours(clips, training=False))
    assert np.abs(actual - expected).max() <= TOLERANCE
