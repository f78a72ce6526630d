"""Batch normalization whose training step takes less time on a CPU.

Same weights, names and results as the Keras layer that it subclasses. Of a training step of a ResNet-50 video network,
Keras' batch normalization is a third on TensorFlow's CPU kernels: they sum columns several times slower than a matrix
product with ones does, and the gradient that TensorFlow derives takes more passes over the map than one written out.
`benchmarks/results/models.md` has what whole networks gain.

Shape letters: N positions of all samples, C channels.
"""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_nonlocal")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, with `normalize_batch` where it takes the statistics of a batch.

    With a mask, `renorm`, `synchronized`, or channels that are not last it is the Keras layer.

    Example:

    >>> layer = BatchNormalization()
    >>> y = layer(np.array([[1.0], [3.0]], "float32"), training=True)
    >>> keras.ops.convert_to_numpy(y).round(3).tolist()
    [[-1.0], [1.0]]
    """

    def call(self, inputs, training=None, mask=None):
        is_last = self.axis in (-1, len(inputs.shape) - 1)
        renorm = getattr(self, "renorm", False)  # which Keras has from 3.14 on
        if not (training and self.trainable and is_last) or mask is not None or renorm or self.synchronized:
            return super().call(inputs, training=training, mask=mask)
        channels = inputs.shape[-1]
        x = ops.reshape(inputs, (-1, channels))  # N C
        gamma = ops.ones((channels,)) if self.gamma is None else ops.convert_to_tensor(self.gamma)
        beta = ops.zeros((channels,)) if self.beta is None else ops.convert_to_tensor(self.beta)
        y, mean, variance = normalize_batch(x, gamma, beta, self.epsilon)
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + ops.cast(value, moving.dtype) * (1 - self.momentum))
        return ops.cast(ops.reshape(y, ops.shape(inputs)), self.compute_dtype)


def normalize_batch(x, gamma, beta, epsilon):
    """Normalizes each channel over all positions, as batch normalization does in training.

    The gradient is written out (Ioffe and Szegedy, 2015, section 3). Do not differentiate it once more: to it, mean and
    variance are constants.

    Args:
        x: `(positions, channels)`.
        gamma: `(channels,)`, the scale.
        beta: `(channels,)`, the offset.
        epsilon: What is added to the variance.

    Returns:
        `(y, mean, variance)`: `y` like `x`; `mean` and `variance` `(channels,)`, float32 or, of float64 inputs,
        float64, and the variance that of the batch (over N, not N - 1). No gradient passes through the two.

    Example:

    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]], "float32")
    >>> y, mean, variance = normalize_batch(x, np.ones(2, "float32"), np.zeros(2, "float32"), epsilon=1e-6)
    >>> [keras.ops.convert_to_numpy(values).round(3).tolist() for values in (y, mean, variance)]
    [[[-1.0, 0.0], [1.0, 0.0]], [2.0, 5.0], [1.0, 0.0]]
    """
    x = ops.convert_to_tensor(x)
    dtype = keras.backend.result_type(x.dtype, "float32")
    constant = ops.cast(ops.stop_gradient(x), dtype)
    mean = _column_means(constant)  # C
    variance = _column_means(ops.square(constant - mean))  # C
    gamma, beta = ops.cast(gamma, dtype), ops.cast(beta, dtype)
    return _normalize(x, gamma, beta, mean, ops.rsqrt(variance + epsilon)), mean, variance


@ops.custom_gradient
def _normalize(x, gamma, beta, mean, inverse_deviation):
    """γ (x - m) / σ + β, where m and σ are the mean and the deviation of `x`, for given 1 / σ."""
    scale = gamma * inverse_deviation
    y = ops.cast(ops.cast(x, gamma.dtype) * scale + (beta - mean * scale), x.dtype)

    def gradient(*arguments, upstream=None):
        upstream = arguments[-1] if upstream is None else upstream  # PyTorch passes the inputs before it
        d_y, values = ops.cast(upstream, gamma.dtype), ops.cast(x, gamma.dtype)  # N C
        # In means over the positions: of dy, and of dy (x - m) / σ.
        mean_d_y = _column_means(d_y)
        slope = (_column_means(d_y * values) - mean * mean_d_y) * inverse_deviation
        # γ / σ (dy - mean(dy) - (x - m) / σ slope), as one line in dy and x.
        factor = scale * slope * inverse_deviation
        d_x = d_y * scale - values * factor + (mean * factor - scale * mean_d_y)
        count = ops.cast(ops.shape(x)[0], gamma.dtype)
        return ops.cast(d_x, x.dtype), slope * count, mean_d_y * count, ops.zeros_like(mean), ops.zeros_like(mean)

    return y, gradient


def _column_means(x):
    """Means over N of `x` (N, C).

    XLA and PyTorch sum well; and on a GPU, TensorFlow would round the values of a product to TF32.
    """
    if keras.backend.backend() != "tensorflow" or keras.distribution.list_devices("gpu"):
        return ops.mean(x, axis=0)
    count = ops.shape(x)[0]
    return ops.matmul(ops.ones((1, count), x.dtype), x)[0] / ops.cast(count, x.dtype)
