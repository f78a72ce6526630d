"""What only TensorFlow has: sizes unknown while tracing."""

import numpy as np
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
