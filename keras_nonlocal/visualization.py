"""What a position attends to, over all frames of a clip, as arrays and as pictures.

Shape letters:
    T, H, W: frames, height and width of the clip, in pixels
    T', H', W': sizes of the feature map on which a non-local block works
    T", H", W": sizes of its (sub-sampled) key map
"""

import os
import tempfile

import keras
import numpy as np
from PIL import Image, ImageDraw

from keras_nonlocal.applications import preprocess_input as _preprocess_input
from keras_nonlocal.layers import NonLocal3D


def non_local_layers(model):
    """Names of the model's `NonLocal3D` layers, in order."""
    return [layer.name for layer in model.layers if isinstance(layer, NonLocal3D)]


def attention_map(model, clip, position, layer_name=None, preprocess_input=_preprocess_input):
    """Normalised weights of one position of a clip over the whole clip.

    Args:
        model: Functional Keras model with `NonLocal3D` layers.
        clip: Array of pixels in 0..255, of shape `(frames, height, width, 3)`.
        position: `(t, y, x)`: frame and pixel of the clip that asks.
        layer_name: Name of a `NonLocal3D` layer. `None`: the last one.
        preprocess_input: Function from pixels to what the model takes.

    Returns:
        Float32 array of shape `(T", H", W")`, the layer's key map: the weights f / C(x) of the feature map's position
        that holds the pixel. They sum to 1 for the forms with softmax and may be of either sign for others.

    Raises:
        ValueError: if the clip has another rank, the position lies outside of it, or there is no such layer.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), figure 3

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11
    >>> model = C2DResNet11(input_shape=(4, 32, 32, 3), classes=2)
    >>> attention_map(model, np.zeros((4, 32, 32, 3), "uint8"), position=(0, 8, 8)).shape
    (2, 2, 2)
    """
    clip = np.asarray(clip)
    if clip.ndim != 4:
        raise ValueError(f"`clip` must have the shape (frames, height, width, 3). Received: clip.shape={clip.shape}")
    inside = len(position) == 3 and all(0 <= p < size for p, size in zip(position, clip.shape[:3], strict=True))
    if not inside:
        raise ValueError(
            f"`position` must be a frame, a row and a column (t, y, x) inside of {clip.shape[:3]}. "
            f"Received: position={tuple(position)}"
        )
    names = non_local_layers(model)
    if not names or (layer_name is not None and layer_name not in names):
        raise ValueError(
            f"`layer_name` must be a `NonLocal3D` layer of the model, which has {names}. "
            f"Received: layer_name={layer_name!r}"
        )
    layer = model.get_layer(layer_name or names[-1])
    features = keras.Model(model.inputs[0], layer.input)(preprocess_input(clip[None]), training=False)
    shape = tuple(features.shape)
    sizes = shape[2:] if layer.data_format == "channels_first" else shape[1:-1]  # T' H' W'
    query = [p * size // pixels for p, size, pixels in zip(position, sizes, clip.shape[:3], strict=True)]
    return np.asarray(keras.ops.convert_to_numpy(layer.attention(features, [query])))[0, 0]


def attention_in_pixels(weights, clip_shape):
    """Enlarges a key map to the clip: `(T", H", W")` to `(T, H, W)`, each pixel with the weight of its key.

    The keys are spread evenly over the clip. Where sub-sampling cuts off a last row of the map, that is off by less
    than the size of one key.

    Args:
        weights: Array of shape `(T", H", W")`.
        clip_shape: `(T, H, W)`, or the shape of the clip.

    Returns:
        Array of shape `(T, H, W)`.

    Example:

    >>> attention_in_pixels(np.array([[[0.25, 0.75]]]), (1, 1, 4)).tolist()
    [[[0.25, 0.25, 0.75, 0.75]]]
    """
    for axis, pixels in enumerate(clip_shape[:3]):
        weights = np.take(weights, np.arange(pixels) * weights.shape[axis] // pixels, axis=axis)
    return weights


def draw_attention(clip, weights, position, path, max_frames=8, frame_height=160, colormap=None):
    """Draws what a position attends to: frames of the clip side by side, below them the weights laid over.

    The query's frame is the first picture, its position a white square. The other frames are spread evenly over the
    clip. Bright is a large weight (of the whole clip); negative weights, which the dot product may give, are blue.

    Args:
        clip: Array of pixels in 0..255, of shape `(frames, height, width, 3)`.
        weights: What `attention_map` returned.
        position: `(t, y, x)`, as given to `attention_map`.
        path: PNG file to write.
        max_frames: Number of frames to show.
        frame_height: Height in pixels at which a frame is drawn.
        colormap: Name of a Matplotlib colour map for the sizes of the weights, from 0 to the largest. `None`: the
            built-in black-red-yellow-white. Others need the extra `keras-nonlocal[viz]`.

    Returns:
        The picture, as a `PIL.Image.Image`.

    Raises:
        ValueError: if `clip` or `weights` has another rank.
        ImportError: if `colormap` is given and Matplotlib is not installed.
    """
    clip, weights = np.asarray(clip, "uint8"), np.asarray(weights, "float32")
    if clip.ndim != 4 or weights.ndim != 3:
        raise ValueError(
            "`clip` must have the shape (frames, height, width, 3) and `weights` be what `attention_map` returned. "
            f"Received: clip.shape={clip.shape}, weights.shape={weights.shape}"
        )
    heat = attention_in_pixels(weights, clip.shape)  # T H W
    heat = heat / max(float(np.abs(heat).max()), 1e-12)
    colours = _colours(heat, colormap)  # T H W 3 in 0..1
    strength = np.abs(heat)[..., None]
    overlay = clip * (0.45 - 0.35 * strength) + 255.0 * colours * (0.2 + 0.8 * strength) * (strength > 0.02)
    overlay = overlay.clip(0, 255).astype("uint8")

    query_frame = int(position[0])
    frames = _spread(len(clip), query_frame, max_frames)
    scale = frame_height / clip.shape[1]
    size = (max(round(clip.shape[2] * scale), 1), frame_height)
    gap = 4
    sheet = Image.new("RGB", (len(frames) * (size[0] + gap) - gap, 2 * frame_height + gap + 14), "white")
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(frames):
        left = column * (size[0] + gap)
        for row, pictures in enumerate((clip, overlay)):
            picture = Image.fromarray(pictures[frame]).resize(size, Image.Resampling.NEAREST)
            sheet.paste(picture, (left, 14 + row * (frame_height + gap)))
        draw.text((left + 2, 1), f"frame {frame}" + (" (query)" if column == 0 else ""), fill="black")
    y, x = (round((coordinate + 0.5) * scale) for coordinate in position[1:])
    half = max(frame_height // 24, 2)
    for row in range(2):
        top = 14 + row * (frame_height + gap) + y
        draw.rectangle((x - half, top - half, x + half, top + half), outline="white", width=2)
        draw.rectangle((x - half - 1, top - half - 1, x + half + 1, top + half + 1), outline="black")
    _save(sheet, path)
    return sheet


def _spread(num_frames, query_frame, max_frames):
    """The query's frame, then others evenly over the clip, its first and last one included."""
    others = [frame for frame in range(num_frames) if frame != query_frame]
    count = min(max_frames - 1, len(others))
    picked = np.linspace(0, len(others) - 1, count).round().astype(int) if count > 0 else []
    return [query_frame] + [others[i] for i in picked]


def _colours(heat, colormap):
    size = np.abs(heat)
    if colormap is None:
        # Black, red, yellow, white, as one channel after the other fills up.
        colours = np.stack([size * 3, size * 3 - 1, size * 3 - 2], axis=-1).clip(0, 1)
    else:
        try:
            from matplotlib import colormaps
        except ImportError:
            raise ImportError(
                "Colour maps other than the built-in one need Matplotlib: pip install 'keras-nonlocal[viz]'"
            ) from None
        colours = colormaps[colormap](size)[..., :3]
    blue = np.stack([size * 0.2, size * 0.4, np.ones_like(size)], axis=-1)
    return np.where((heat < 0)[..., None], blue, colours)


def _save(picture, path):
    """Writes the PNG whole or not at all."""
    path = os.fspath(path)
    handle, scratch = tempfile.mkstemp(suffix=".png", dir=os.path.dirname(path) or ".")
    os.close(handle)
    try:
        picture.save(scratch, format="PNG")
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
