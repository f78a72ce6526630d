"""What only TensorFlow has: sizes unknown while tracing."""

import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal import NonLocal2D
from tests.test_layers import make_inputs, make_layer


def test_attention_of_unknown_sizes(rng):
    x = make_inputs(rng, NonLocal2D)
    queries = [[0, 0], [3, 5], [2, 1]]
    layer = make_layer(NonLocal2D, window=(2, None), pool_size=(1, 2))
    expected = layer.attention(x, queries)

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 5))])
    def attention(x):
        return layer.attention(x, queries)

    np.testing.assert_allclose(attention(x), expected, rtol=1e-6, atol=1e-7)


def test_attention_of_queries_known_only_in_a_graph(rng):
    x = make_inputs(rng, NonLocal2D)
    layer = make_layer(NonLocal2D, window=(2, None), pool_size=(1, 2))

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 5)), tf.TensorSpec((None, 2), tf.int64)])
    def attention(x, queries):
        return layer.attention(x, queries)

    height, width = x.shape[1:3]
    for queries, inside in (
        ([[0, 0], [3, 5], [2, 1]], [[0, 0], [3, 5], [2, 1]]),
        ([[-1, 2], [height, width + 7]], [[0, 2], [height - 1, width - 1]]),  # no error can be raised there
    ):
        expected = layer.attention(x, np.array(inside))
        np.testing.assert_allclose(attention(x, tf.constant(queries, tf.int64)), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(layer.attention(x, tf.constant([[1, 2]])), layer.attention(x, [[1, 2]]))
    for spec in (tf.TensorSpec((None, 3), tf.int32), tf.TensorSpec((None,), tf.int32), tf.TensorSpec((None, 2))):
        with pytest.raises(ValueError, match=r"`queries` must be integers of shape \(num_queries, 2\)\. Received: q"):
            tf.function(lambda queries: layer.attention(x, queries)).get_concrete_function(spec)
