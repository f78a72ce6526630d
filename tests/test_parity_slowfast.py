"""Parity with PySlowFast's own I3D-NLN: its file in, its class probabilities out.

The package `slowfast` is Facebook AI Research's of 2020; without its data and detection parts it needs
`pip install --no-deps slowfast==1.0 fvcore iopath yacs` and `pip install pyyaml tabulate termcolor torch`.
"""

import sys
import types

import keras
import numpy as np
import pytest
import torch

from keras_nonlocal import applications
from tests.release_twin import ReleaseTwin, positions, random_blobs, random_clips

SHAPE = (8, 64, 64, 3)
TOLERANCE = 1e-4
# Its detection head wants this package, which is on no registry; a classifier calls nothing of it.
sys.modules["detectron2"] = types.ModuleType("detectron2")
sys.modules["detectron2.layers"] = types.ModuleType("detectron2.layers")
sys.modules["detectron2.layers"].ROIAlign = None

from slowfast.config.defaults import get_cfg  # noqa: E402
from slowfast.models.video_model_builder import ResNetModel  # noqa: E402
from slowfast.utils.c2_model_loading import get_name_convert_func  # noqa: E402


def their_model(blobs, architecture, depth, non_local, size):
    """With the blobs, under the names that its own converter of the release's files gives them."""
    stages = positions(depth, non_local)
    configuration = get_cfg()
    configuration.MODEL.ARCH = architecture
    configuration.DATA.INPUT_CHANNEL_NUM = [3]
    configuration.DATA.CROP_SIZE = size
    configuration.RESNET.DEPTH = depth
    configuration.RESNET.NUM_BLOCK_TEMP_KERNEL = [[3], [4], [23 if depth == 101 else 6], [3]]
    configuration.NONLOCAL.LOCATION = [[stages.get(stage, [])] for stage in (2, 3, 4, 5)]
    configuration.NONLOCAL.INSTANTIATION = "softmax"
    model = ResNetModel(configuration).eval()
    convert = get_name_convert_func()
    state = {convert(name): torch.from_numpy(blob) for name, blob in blobs.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model


@pytest.mark.parametrize(
    ("architecture", "depth"),
    [("i3d", 50), ("c2d", 50), pytest.param("i3d", 101, marks=pytest.mark.slow)],
)
def test_parity(tmp_path, architecture, depth):
    blobs = random_blobs(depth, architecture == "i3d", 5)
    theirs = their_model(blobs, architecture, depth, 5, SHAPE[1])
    clips = random_clips(SHAPE, seed=1)
    with torch.inference_mode():
        expected = theirs([torch.from_numpy(clips).permute(0, 4, 1, 2, 3)]).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 100 * TOLERANCE
    # The twin of the release has it all but the padding.
    twin = ReleaseTwin(blobs, depth, architecture == "i3d", 5, pool1_padding=1)
    assert np.abs(twin(clips) - expected).max() <= TOLERANCE
    path = tmp_path / "checkpoint.pyth"
    torch.save({"epoch": 1, "model_state": theirs.state_dict(), "optimizer_state": {}, "cfg": "MODEL:\n"}, path)
    builder = getattr(applications, f"{architecture.upper()}ResNet{depth}")
    ours = builder(weights=str(path), non_local=5, input_shape=SHAPE)
    actual = keras.ops.convert_to_numpy(ours(clips, training=False))
    assert np.abs(actual - expected).max() <= TOLERANCE
