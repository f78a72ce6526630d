"""Blocks in backbones of KerasHub. Collected where KerasHub is installed (conftest.py)."""

import keras
import keras_hub
import numpy as np
import pytest

from keras_nonlocal.applications import insert_non_local
from tests.descriptors import randomise


@pytest.fixture(scope="module")
def backbone():
    return randomise(
        keras_hub.models.ResNetBackbone(
            input_conv_filters=[8],
            input_conv_kernel_sizes=[7],
            stackwise_num_filters=[64, 64, 64],
            stackwise_num_blocks=[1, 1, 1],
            stackwise_num_strides=[1, 2, 2],
            block_type="bottleneck_block",
            image_shape=(64, 64, 3),
        )
    )


@pytest.fixture
def images(rng):
    return rng.normal(size=(2, 64, 64, 3)).astype("float32")


def test_pyramid_of_a_backbone(backbone, images):
    model = keras.Model(backbone.input, backbone.pyramid_outputs)
    copy = insert_non_local(model, ["stack1_block0_out", "stack2_block0_out"])
    outputs, expected = copy(images, training=False), model(images, training=False)
    assert set(outputs) == set(expected) == {"P2", "P3", "P4"}
    for level in outputs:
        np.testing.assert_array_equal(outputs[level], expected[level])
    randomise(copy.get_layer("stack1_block0_out_non_local"))
    outputs = copy(images, training=False)
    changed = [level for level in outputs if not np.allclose(outputs[level], expected[level])]
    assert changed == ["P3", "P4"]  # the block's own level and what stands on it


def test_feature_pyramid_network(backbone, images, tmp_path):
    """The backbone of RetinaNet: the image network is a model in the model."""
    model = keras_hub.models.RetinaNetBackbone(image_encoder=backbone, min_level=3, max_level=4, use_p5=False)
    inner = next(layer.name for layer in model.layers if isinstance(layer, keras.Model))
    copy = insert_non_local(model, f"{inner}/stack1_block0_out")
    outputs, expected = copy(images, training=False), model(images, training=False)
    assert set(outputs) == {"P3", "P4"}
    for level in outputs:
        np.testing.assert_array_equal(outputs[level], expected[level])
    randomise(copy.get_layer(inner).get_layer("stack1_block0_out_non_local"))
    copy.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")(images, training=False)
    outputs = copy(images, training=False)
    for level in outputs:
        assert not np.allclose(outputs[level], expected[level])
        np.testing.assert_array_equal(loaded[level], outputs[level])
