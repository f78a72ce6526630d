"""3-D convolution and pooling of single frames, computed in 2-D.

Same weights, names and results as the Keras layers that they subclass. A kernel of `(1, k, k)` sees one frame at a
time, so the frames can be folded into the batch. On a CPU that takes 0.9 to 1.0 of the time of a 3-D kernel, 0.5 to 0.9
under XLA (benchmarks/results/convolutions.md), and it is the only form that LiteRT runs. On GPUs it was not measured;
cuDNN has more and faster algorithms for 2-D kernels, and folding `B T H W C` moves no memory.

Shape letters: B batch, T time, H height, W width, C channels.
"""

import keras
from keras import ops


def _per_frame(function, inputs):
    """Applies a function of images to every frame: `B T H W C` to `B T H' W' C'`."""
    batch, time, height, width, channels = ops.shape(inputs)
    frames = function(ops.reshape(inputs, (batch * time, height, width, channels)))
    return ops.reshape(frames, (batch, time, *list(ops.shape(frames))[1:]))


@keras.saving.register_keras_serializable(package="keras_nonlocal")
class Conv3D(keras.layers.Conv3D):
    """`keras.layers.Conv3D`, in 2-D where its kernel and stride cover a single frame."""

    def convolution_op(self, inputs, kernel):
        single = self.kernel_size[0] == self.strides[0] == self.dilation_rate[0] == self.groups == 1
        if not single or self.data_format == "channels_first":
            return super().convolution_op(inputs, kernel)
        return _per_frame(
            lambda frames: ops.conv(
                frames,
                ops.squeeze(kernel, 0),
                strides=self.strides[1:],
                padding=self.padding,
                data_format="channels_last",
                dilation_rate=self.dilation_rate[1:],
            ),
            inputs,
        )


@keras.saving.register_keras_serializable(package="keras_nonlocal")
class MaxPooling3D(keras.layers.MaxPooling3D):
    """`keras.layers.MaxPooling3D`, in 2-D: over the frames first, then over time."""

    def call(self, inputs):
        self._check_sizes(inputs.shape)
        if self.data_format == "channels_first":
            return super().call(inputs)
        x = inputs
        if self.pool_size[1:] != (1, 1) or self.strides[1:] != (1, 1):
            x = _per_frame(lambda frames: self._pool(frames, self.pool_size[1:], self.strides[1:]), x)
        if self.pool_size[0] != 1 or self.strides[0] != 1:
            batch, time, height, width, channels = ops.shape(x)
            x = ops.reshape(x, (batch, time, height * width, channels))
            x = self._pool(x, (self.pool_size[0], 1), (self.strides[0], 1))
            x = ops.reshape(x, (batch, ops.shape(x)[1], height, width, channels))
        return x

    def _check_sizes(self, shape):
        """Refuses what would leave nothing: a mean over it is NaN, and no error."""
        sizes = shape[2:] if self.data_format == "channels_first" else shape[1:-1]
        too_small = any(size is not None and size < least for size, least in zip(sizes, self.pool_size, strict=True))
        if self.padding == "valid" and too_small:
            frames, height, width = self.pool_size
            raise ValueError(
                f"Clips are too short or too small: the inputs of {self.name!r} must have at least {frames} frames of "
                f"height {height} and width {width}. Received: inputs.shape={tuple(shape)}"
            )

    def _pool(self, images, pool_size, strides):
        return ops.max_pool(images, pool_size, strides, self.padding, data_format="channels_last")
