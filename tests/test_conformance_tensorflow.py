"""The contracts that only TensorFlow can keep: sizes unknown while tracing, and SavedModels."""

import numpy as np
import tensorflow as tf

from tests.backends import assert_close
from tests.descriptors import SMALL
from tests.test_conformance import costly, ready


@costly(SMALL)
def test_unknown_sizes(descriptor):
    model, x, expected = ready(descriptor)
    dynamic = descriptor.model(static=False)
    dynamic.set_weights(model.get_weights())
    assert_close(dynamic(x), expected, 1e-6)
    sizes = (None,) * (x.ndim - 1)
    function = tf.function(
        lambda x: dynamic(x, training=False),
        input_signature=[tf.TensorSpec((*sizes, x.shape[-1]))],
    )
    assert_close(function(x), expected)
    assert_close(function(x[:1]), expected[:1])
    twice = np.concatenate([x, x[:, ::-1]], axis=-2)  # another width, through the same graph
    assert_close(function(twice), dynamic(twice))


@costly(SMALL)
def test_export(descriptor, tmp_path):
    model, x, expected = ready(descriptor, static=False)
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    assert_close(loaded.serve(x), expected)
    assert_close(loaded.serve(x[:1]), expected[:1])
