"""A trained network as a SavedModel that needs neither Keras nor this package.

Shape letters: B clips, T frames, H height, W width, K classes.
"""

import os
import pathlib
import shutil
import tempfile

import keras
import tensorflow as tf

from keras_nonlocal.applications import preprocess_input as _preprocess_input

CLASS_NAMES_FILE = "class_names.txt"


def export_saved_model(model, path, class_names=None, preprocess_input=_preprocess_input):
    """Exports a classifier of clips as a SavedModel: uint8 clips in, scores out, normalisation inside.

    The signature `serving_default` takes `clips`, a uint8 tensor of shape `(batch, frames, height, width, 3)` with RGB
    pixels in 0..255, and gives `scores`, a float32 tensor of shape `(batch, classes)`. Frames and size may vary as far
    as the model's do. The class names travel as the asset `assets/class_names.txt`, a name a line.

    It is written whole or not at all, and an existing export is never overwritten.

    Args:
        model: Built Keras model from normalised clips to scores.
        path: Directory to create.
        class_names: Names of the classes in the order of the scores, or `None` for no asset.
        preprocess_input: Function from pixels in 0..255 to what the model takes.

    Returns:
        `path`, as a `pathlib.Path`.

    Raises:
        FileExistsError: if `path` exists.
        ValueError: if the model does not take one clip tensor, or has another number of classes than `class_names`.
        RuntimeError: if Keras runs on another backend than TensorFlow.

    Example:

    >>> import tempfile
    >>> inputs = keras.Input((None, None, None, 3))
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
    >>> path = export_saved_model(model, tempfile.mkdtemp() + "/1", class_names=["red", "green", "blue"])
    >>> read_class_names(path)
    ['red', 'green', 'blue']
    """
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(
            "A SavedModel is exported on the TensorFlow backend. "
            f"Received: keras.config.backend()={keras.config.backend()!r}"
        )
    path = pathlib.Path(path)
    if path.exists():
        raise FileExistsError(f"`path` must not exist, exports are never overwritten. Received: path={str(path)!r}")
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 5:
        shapes = [tuple(tensor.shape) for tensor in model.inputs]
        raise ValueError(
            f"`model` must take one tensor of clips, (batch, frames, height, width, 3). Received: model.inputs={shapes}"
        )
    if class_names is not None and len(class_names) != model.output_shape[-1]:
        raise ValueError(
            f"`class_names` must have a name for each of the model's {model.output_shape[-1]} scores. "
            f"Received: class_names={list(class_names)}"
        )

    @tf.function(
        input_signature=[tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.uint8, name="clips")],
        autograph=False,
    )
    def serving_default(clips):
        return {"scores": tf.cast(model(preprocess_input(clips), training=False), tf.float32)}

    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there: whoever watches the folder sees a whole export or none.
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        module = tf.Module()
        # Variables, not the Keras model: the reader then needs no Keras to restore them.
        module.model_variables = [variable.value for variable in model.variables]
        if class_names is not None:
            listing = scratch / CLASS_NAMES_FILE
            listing.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
            module.class_names = tf.saved_model.Asset(str(listing))
        written = scratch / "saved_model"
        tf.saved_model.save(module, str(written), signatures={"serving_default": serving_default})
        os.rename(written, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def read_class_names(path):
    """Reads the class names of an export.

    Args:
        path: Directory that `export_saved_model` wrote.

    Returns:
        List of strings, or `None` if the export has none.
    """
    listing = pathlib.Path(path) / "assets" / CLASS_NAMES_FILE
    return listing.read_text(encoding="utf-8").splitlines() if listing.exists() else None
