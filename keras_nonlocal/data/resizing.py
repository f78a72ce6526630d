"""Exact resizing of frames in TensorFlow graphs, one function for shards and for exported models.

Sizes and places are pairs (height, width) or (top, left) as int64 tensors.
"""

import tensorflow as tf


def resized_size(size, shorter_side):
    """The size of frames of `size` whose shorter side becomes `shorter_side`, rounded as in decoding."""
    shorter, longer = tf.reduce_min(size), tf.reduce_max(size)
    longer = (2 * longer * shorter_side + shorter) // (2 * shorter)
    return tf.where(size == shorter, shorter_side, longer)


def resized_window(size, resized, top_left, extent):
    """A window of frames, had they been resized, from no more of them than it is made of.

    Args:
        size: The size of the frames.
        resized: The size that the whole frames would get.
        top_left: Where the window lies in the resized frames.
        extent: The size of the window.

    Returns:
        `(first, last, resize)`: float64 whole numbers, the first pixels of the frames that are needed and those after
        the last, and a function from just these pixels `(frames, height, width, 3)` to the window, float32 with the
        values rounded to whole numbers.
    """
    scale = tf.cast(resized, tf.float64) / tf.cast(size, tf.float64)
    # In pixels of the frames, the window and where it ends.
    first, last = (tf.cast(place, tf.float64) / scale for place in (top_left, top_left + extent))
    # As many pixels around the window as interpolation takes in.
    margin = tf.maximum(1 / scale, 1) + 1
    corner = tf.maximum(tf.floor(first - margin), 0)
    shift = corner * scale - tf.cast(top_left, tf.float64)

    def resize(pixels):
        resized_pixels = tf.raw_ops.ScaleAndTranslate(
            images=pixels,
            size=tf.cast(extent, tf.int32),
            scale=tf.cast(scale, tf.float32),
            translation=tf.cast(shift, tf.float32),
            kernel_type="triangle",
            antialias=True,
        )
        return tf.round(resized_pixels)

    return corner, tf.minimum(tf.math.ceil(last + margin), tf.cast(size, tf.float64)), resize


def resize_and_crop(frames, resized, top_left, extent):
    """The same window of frames that are at hand; pixels of frames that have the size already are not touched.

    Args:
        frames: Tensor of pixels of shape `(…, height, width, 3)`, uint8 or float32.
        resized: The size that the whole frames get.
        top_left: Where the window lies in the resized frames.
        extent: The size of the window.

    Returns:
        Tensor of the dtype of `frames`, of shape `(…, *extent, 3)`.

    Example:

    >>> frames = tf.reshape(tf.range(2 * 4 * 3, dtype=tf.float32), (1, 2, 4, 3))
    >>> pairs = [tf.constant(pair, tf.int64) for pair in ((2, 4), (0, 1), (2, 2))]
    >>> resize_and_crop(frames, *pairs)[0, :, :, 0].numpy().tolist()
    [[3.0, 6.0], [15.0, 18.0]]
    """
    leading = tf.shape(frames, tf.int64)[:-3]
    size = tf.shape(frames, tf.int64)[-3:-1]

    def cropped(corner, end):
        return frames[..., corner[0] : end[0], corner[1] : end[1], :]

    def exact():
        first, last, resize = resized_window(size, resized, top_left, extent)
        pixels = cropped(tf.cast(first, tf.int64), tf.cast(last, tf.int64))
        window = resize(tf.reshape(pixels, tf.concat([[-1], tf.shape(pixels)[-3:]], 0)))
        return tf.cast(tf.reshape(window, tf.concat([leading, extent, [3]], 0)), frames.dtype)

    return tf.cond(tf.reduce_all(resized == size), lambda: cropped(top_left, top_left + extent), exact)
