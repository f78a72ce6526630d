"""A trained network as a SavedModel that needs neither Keras nor this package.

Shape letters: B clips, T frames of a clip, N frames of a video, H height, W width, K classes, Q queries, C channels.
"""

import datetime
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import keras
import numpy as np
import tensorflow as tf

from keras_nonlocal._version import __version__
from keras_nonlocal.applications import preprocess_input as _preprocess_input
from keras_nonlocal.applications.resnet import PIXEL_MEAN, PIXEL_STD
from keras_nonlocal.data.clips import clip_options
from keras_nonlocal.data.resizing import resize_and_crop, resized_size
from keras_nonlocal.data.sampling import view_crop_positions, view_positions
from keras_nonlocal.layers import NonLocal3D

from .warmup import example_requests, write_warmup

CLASS_NAMES_FILE = "class_names.txt"
METADATA_FILE = "metadata.json"


def export_saved_model(
    model,
    path,
    class_names=None,
    version=None,
    num_frames=None,
    frame_stride=None,
    image_size=None,
    shorter_side=None,
    views=(10, 3),
    sampling="recipe",
    attention_layer=None,
    features_layer=None,
    top_k=5,
    jit_compile=False,
    warmup=True,
    preprocess_input=_preprocess_input,
):
    """Exports a classifier of clips as a SavedModel: pixels in, scores out, all preparation inside.

    A version is written whole or not at all, and an existing one is never overwritten: a server that watches `path`
    loads each as soon as it is there. What a killed export leaves behind has a name that begins with a dot, which
    servers pass over.

    Signatures, of named tensors in and out. `clips` have the shape `(B, T, H, W, 3)`, RGB pixels in 0..255; what the
    model leaves open may vary.

    - `serving_default`: `clips` uint8 → `scores` float32 `(B, K)`.
    - `float`: the same for float32 pixels.
    - `classify`: `clips` uint8 → `labels` string and `scores` float32, both `(B, top_k)`, best first.
    - `jpeg`: `frames` string `(B, T)`, each a JPEG or PNG → `scores`.
    - `views`: `clips` uint8 `(B, N, H, W, 3)`, whole videos at their own frame rate → `scores`, the mean over the same
      views as those of `data.load_views`, scored one after the other.
    - `features`: `clips` uint8 → `features` float32 `(B, C)`, what the last layer with weights takes.
    - `attention`: `clips` uint8, `positions` int32 `(Q, 3)`, each `(t, y, x)` in the non-local block's own map →
      `weights` float32 `(B, Q, T', H', W')`, as the layer's `attention`; positions outside of the map are moved inside.

    Frames are resized until their shorter side is `shorter_side` and cropped to `image_size` in the centre, by the
    function that shards use for views; frames of files are resized as they are decoded, by FFmpeg, which gives slightly
    other pixels. Pixels of the right size are not touched, and clips of `image_size` pass as they are. Where
    `image_size` is not known, so do all. A signature that cannot be had is left out, and the metadata say why.

    `assets/metadata.json` says where the model comes from and how it wants its clips, see `read_metadata`;
    `assets/class_names.txt` has a name a line.

    Args:
        model: Functional Keras model from normalised clips to scores.
        path: The model's folder; the version becomes a folder in it.
        class_names: Names of the classes in the order of the scores, or `None`.
        version: Positive integer. `None`: the number after the highest in `path`.
        num_frames: Integer, the frames of a clip. `None`: the model's, if it fixes them.
        frame_stride: Integer, the step between them in a video. `None`: unknown.
        image_size: Integer or pair `(height, width)` of the crops. `None`: the model's, if it fixes them.
        shorter_side: Integer, to which the frames' shorter side is resized before the crop. `None`: the larger of
            `image_size`.
        views: Pair `(num_clips, num_crops)` of the signature `views`, or `None` for none.
        sampling: Where the clips of `views` are, see `data.view_indices`.
        attention_layer: Name of a `NonLocal3D` layer. `None`: the last one.
        features_layer: Name of the layer whose outputs are the features. `None`: as above.
        top_k: Integer, how many classes `classify` gives.
        jit_compile: Whether the network is compiled by XLA, wherever it is served.
        warmup: Whether to write requests with which TensorFlow Serving warms up, one for each signature, before it
            answers any.
        preprocess_input: Function from float32 pixels in 0..255 to what the model takes.

    Returns:
        The folder of the version, as a `pathlib.Path`.

    Raises:
        FileExistsError: if the version exists.
        ValueError: if an argument does not fit the model.
        RuntimeError: if Keras runs on another backend than TensorFlow.

    Reference:
        [TensorFlow Serving](https://www.tensorflow.org/tfx/serving/serving_config)

    Example:

    >>> import tempfile
    >>> inputs = keras.Input((None, None, None, 3))
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
    >>> path = export_saved_model(model, tempfile.mkdtemp() + "/colours", class_names=["red", "green", "blue"])
    >>> path.name, read_class_names(path)
    ('1', ['red', 'green', 'blue'])
    >>> read_metadata(path)["left_out"]["attention"]
    'the model has no non-local block'
    """
    check_backend("A SavedModel")
    path = pathlib.Path(path)
    _check_version(path, version)
    check_model(model, class_names)
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"`top_k` must be a positive integer. Received: top_k={top_k!r}")
    served = _Served(
        model,
        _preparation(model, num_frames, frame_stride, image_size, shorter_side, views, sampling),
        class_names,
        attention_layer,
        features_layer,
        top_k,
        jit_compile,
        preprocess_input,
    )
    signatures, left_out = {}, {}
    for name, build in SIGNATURES.items():
        try:
            signatures[name] = build(served)
        except _LeftOutError as reason:
            left_out[name] = str(reason)
    requests = example_requests(signatures, served.preparation)
    if warmup:
        _check_warmup(model, requests["serving_default"]["clips"], served.preparation)

    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there: whoever watches the folder sees a whole version or none.
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=path))
    try:
        module = tf.Module()
        # Variables, not the Keras model: the reader then needs no Keras to restore them.
        module.model_variables = [variable.value for variable in model.variables]
        content = _metadata(served, signatures, left_out, requests)
        files = {METADATA_FILE: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}
        if class_names is not None:
            files[CLASS_NAMES_FILE] = "".join(f"{name}\n" for name in class_names)
        for name, text in files.items():
            (scratch / name).write_text(text, encoding="utf-8")
        module.files = [tf.saved_model.Asset(str(scratch / name)) for name in files]
        written = scratch / "saved_model"
        tf.saved_model.save(module, str(written), signatures=signatures)
        if warmup:
            write_warmup(written, path.name, signatures, requests)
        return _move(written, path, version)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new and not any(path.iterdir()):
            path.rmdir()


def read_class_names(path):
    """Reads the class names of an export.

    Args:
        path: A model's folder that `export_saved_model` wrote, of which the newest version is read, or the folder of
            a version.

    Returns:
        List of strings, or `None` if the export has none.

    Raises:
        ValueError: If there is no export.
    """
    listing = version_folder(path) / "assets" / CLASS_NAMES_FILE
    # Not `splitlines`, which also knows other line ends than those that were written.
    return listing.read_text(encoding="utf-8").split("\n")[:-1] if listing.exists() else None


def read_metadata(path):
    """Reads where an export comes from and how its clips are prepared.

    Args:
        path: A model's folder that `export_saved_model` wrote, of which the newest version is read, or the folder of
            a version.

    Returns:
        A dict: the versions `keras_nonlocal`, `keras` and `tensorflow`; `created`, a time in UTC; `model`, its name,
        number of parameters and of classes, activation and the SHA-256 of its weights; `preprocessing`, from videos to
        what the network takes; `signatures`, their inputs and outputs, with the shapes of an example; `left_out`,
        signatures that there are not, and why; `jit_compile`.

    Raises:
        ValueError: If there is no export, or none with metadata.
    """
    file = version_folder(path) / "assets" / METADATA_FILE
    if not file.exists():
        raise ValueError(
            f"`path` must be an export of keras-nonlocal, with assets/{METADATA_FILE}. Received: path={str(path)!r}"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def version_folder(path):
    """The folder of a version: `path` itself, or the newest in it."""
    path = pathlib.Path(path)
    folder = path if (path / "saved_model.pb").exists() else path / str(max(_versions(path), default=""))
    if not (folder / "saved_model.pb").exists():
        raise ValueError(
            "`path` must be a folder that `export_saved_model` wrote, or that of a version in it. "
            f"Received: path={str(path)!r}"
        )
    return folder


# Checks


def check_backend(what):
    """Raises a `RuntimeError` unless Keras runs on TensorFlow, which all exporters work on."""
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(
            f"{what} is exported on the TensorFlow backend. Received: keras.config.backend()={keras.config.backend()!r}"
        )


def _check_version(path, version):
    if version is not None and (not isinstance(version, (int, np.integer)) or version < 1 or version is True):
        raise ValueError(f"`version` must be a positive integer or None. Received: version={version!r}")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"`path` must be a folder, or not exist. Received: path={str(path)!r}")
    if (path / "saved_model.pb").exists():
        raise FileExistsError(
            "`path` must be the model's folder, in which versions are folders; it is itself one of them. "
            f"Received: path={str(path)!r}"
        )
    if version is not None and (path / str(version)).exists():
        raise _exists(path / str(version))


def _exists(folder):
    return FileExistsError(f"The version exists, and exports are never overwritten. Received: {str(folder)!r}")


def _versions(path):
    return [int(entry.name) for entry in path.glob("[0-9]*") if entry.name.isdecimal()]


def check_model(model, class_names):
    """Raises a `ValueError` unless the model is one from clips to scores, with a name for each of them if any."""
    if not model.built:
        raise ValueError(f"`model` must be built, which it is once it has an `Input`. Received: model={model.name!r}")
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 5:
        shapes = [tuple(tensor.shape) for tensor in model.inputs]
        raise ValueError(
            f"`model` must take one tensor of clips, (batch, frames, height, width, 3). Received: model.inputs={shapes}"
        )
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 2:
        shapes = [tuple(tensor.shape) for tensor in model.outputs]
        raise ValueError(f"`model` must give one tensor of scores, (batch, classes). Received: model.outputs={shapes}")
    if class_names is None:
        return
    if len(class_names) != model.output_shape[-1]:
        raise ValueError(
            f"`class_names` must have a name for each of the model's {model.output_shape[-1]} scores. "
            f"Received: class_names={list(class_names)}"
        )
    if any(not isinstance(name, str) or "\n" in name for name in class_names):
        raise ValueError(f"`class_names` must be strings of one line. Received: class_names={list(class_names)}")


def _check_warmup(model, shape, preparation):
    size = preparation["image_size"] or shape[2:4]
    try:
        model.compute_output_shape((*shape[:2], *size, 3))
    except ValueError as error:
        raise ValueError(
            f"The model must take the clips of the warm-up, {shape[1]} frames of {size[0]} x {size[1]} pixels, or a "
            "server would not load it: give the `num_frames` and `image_size` that it takes, or `warmup=False`. "
            f"Received: num_frames={preparation['num_frames']}, image_size={preparation['image_size']}"
        ) from error


def _preparation(model, num_frames, frame_stride, image_size, shorter_side, views, sampling):
    """From videos to the network's clips: the arguments, and what the model's input shape says."""
    frames, height, width, _ = model.inputs[0].shape[1:]
    static_size = None if None in (height, width) else (height, width)
    if isinstance(image_size, (int, np.integer)):
        image_size = (int(image_size),) * 2
    image_size = static_size if image_size is None else tuple(image_size)
    num_frames = frames if num_frames is None else num_frames
    if image_size is None and shorter_side is not None:
        raise ValueError(f"`shorter_side` needs `image_size`. Received: shorter_side={shorter_side}, image_size=None")
    if image_size is not None and shorter_side is None:
        shorter_side = max(image_size)

    # The checks of `load_views`; what is not known passes them.
    def known(value, placeholder):
        return placeholder if value is None else value

    clip_options(
        known(num_frames, 1),
        known(frame_stride, 1),
        known(image_size, 1),
        known(shorter_side, 1),
        views=known(views, (1, 1)),
        sampling=sampling,
    )
    for name, value, static in (("num_frames", num_frames, frames), ("image_size", image_size, static_size)):
        if static is not None and value != static:
            raise ValueError(f"`{name}` must be the model's, {static}. Received: {name}={value}")
    numbers = {"num_frames": num_frames, "frame_stride": frame_stride, "shorter_side": shorter_side}
    pairs = {"image_size": image_size, "views": views}
    return {
        **{name: None if value is None else int(value) for name, value in numbers.items()},
        **{name: None if value is None else tuple(map(int, value)) for name, value in pairs.items()},
        "sampling": sampling,
    }


# Signatures


class _LeftOutError(Exception):
    """Why an export does not have a signature."""


class _Served:
    """What the signatures share."""

    def __init__(
        self, model, preparation, class_names, attention_layer, features_layer, top_k, jit_compile, preprocess_input
    ):
        self.model = model
        self.preparation = preparation
        self.class_names = class_names
        self.attention_layer = attention_layer
        self.features_layer = features_layer
        self.top_k = top_k
        self.jit_compile = jit_compile
        self.preprocess_input = preprocess_input
        self.num_frames = model.inputs[0].shape[1]
        self._frame_size = tuple(preparation["image_size"] or model.inputs[0].shape[2:4])
        # One function for all signatures: they share its graph.
        self.scores = self.compiled(lambda clips: model(preprocess_input(clips), training=False))

    def clips(self, dtype=tf.uint8, num_frames="model"):
        """What a signature takes. Where frames are brought to one size, they may come in any."""
        size = (None, None) if self.preparation["image_size"] else self._frame_size
        num_frames = self.num_frames if num_frames == "model" else num_frames
        return tf.TensorSpec((None, num_frames, *size, 3), dtype, name="clips")

    def compiled(self, network, *specs):
        """A function of prepared clips that gives float32."""
        spec = tf.TensorSpec((None, self.num_frames, *self._frame_size, 3), tf.float32)
        function = tf.function(
            lambda *arguments: tf.cast(network(*arguments), tf.float32),
            input_signature=[spec, *specs],
            autograph=False,
            jit_compile=self.jit_compile or None,
        )
        return lambda clips, *others: function(tf.ensure_shape(clips, spec.shape), *others)

    def prepare(self, clips):
        """The central crop of resized frames `(…, H, W, 3)`."""
        if self.preparation["image_size"] is not None:
            size = tf.shape(clips, tf.int64)[-3:-1]
            resized, extent = self.sizes(size)
            # Who sends crops has resized what they are from.
            resized = tf.where(tf.reduce_all(size == extent), size, resized)
            clips = resize_and_crop(clips, resized, _corners(resized, extent, 1)[0], extent)
        return tf.cast(clips, tf.float32)

    def sizes(self, size):
        """Of frames of `size` when they are resized, and of the crops of them."""
        shorter_side, image_size = (
            tf.constant(self.preparation[name], tf.int64) for name in ("shorter_side", "image_size")
        )
        return resized_size(size, shorter_side), image_size

    def submodel(self, tensor):
        """From prepared clips to a tensor inside of the model."""
        model = keras.Model(self.model.inputs[0], tensor)
        return lambda clips: model(self.preprocess_input(clips), training=False)


def _corners(resized, extent, num_crops):
    return view_crop_positions(resized[0], resized[1], extent, num_crops, xp=tf.experimental.numpy)


def _signature(*specs):
    """A function of named tensors, none of which may be empty."""

    def decorate(function):
        @tf.function(input_signature=specs, autograph=False)
        @functools.wraps(function)
        def checked(*tensors):
            names = " and ".join(f"`{spec.name}`" for spec in specs)
            sizes = tf.concat([tf.shape(tensor) for tensor in tensors], 0)
            message = f"{names} must not be empty"
            with tf.control_dependencies([tf.debugging.assert_positive(sizes, message=message)]):
                return function(*map(tf.identity, tensors))

        return checked

    return decorate


def _of_clips(served, dtype):
    @_signature(served.clips(dtype))
    def scores_of_clips(clips):
        return {"scores": served.scores(served.prepare(clips))}

    return scores_of_clips


def _classify(served):
    if served.class_names is None:
        raise _LeftOutError("there are no class names")

    @_signature(served.clips())
    def classify(clips):
        scores, indices = tf.math.top_k(
            served.scores(served.prepare(clips)), min(served.top_k, len(served.class_names))
        )
        return {"labels": tf.gather(tf.constant(served.class_names), indices), "scores": scores}

    return classify


def _jpeg(served):
    @_signature(tf.TensorSpec((None, served.num_frames), tf.string, name="frames"))
    def jpeg(frames):
        def prepared(frame):
            # This one reads PNG, too. The DCT is that of shards.
            pixels = tf.io.decode_jpeg(frame, channels=3, dct_method="INTEGER_ACCURATE")
            return served.prepare(pixels)

        pixels = tf.map_fn(
            prepared, tf.reshape(frames, [-1]), fn_output_signature=tf.TensorSpec([None, None, 3], tf.float32)
        )
        clips = tf.reshape(pixels, tf.concat([tf.shape(frames), tf.shape(pixels)[1:]], 0))
        return {"scores": served.scores(clips)}

    return jpeg


def _views(served):
    preparation = served.preparation
    if preparation["views"] is None:
        raise _LeftOutError("`views` is None")
    num_clips, num_crops = preparation["views"]
    missing = [name for name in ("num_frames", "frame_stride", "image_size") if preparation[name] is None]
    if missing:
        raise _LeftOutError(f"it needs {' and '.join(missing)}")

    @_signature(served.clips(num_frames=None))
    def views(clips):
        shape = tf.shape(clips, tf.int64)
        frames = view_positions(
            shape[1],
            preparation["num_frames"],
            preparation["frame_stride"],
            num_clips,
            preparation["sampling"],
            xp=tf.experimental.numpy,
        )
        resized, extent = served.sizes(shape[2:4])
        corners = _corners(resized, extent, num_crops)
        # The window that all crops lie in, as shards read it.
        top_left = tf.reduce_min(corners, axis=0)
        window = tf.reduce_max(corners, axis=0) + extent - top_left

        def scores_of_clip(frames):
            clip = resize_and_crop(tf.gather(clips, frames, axis=1), resized, top_left, window)

            def scores_of_crop(corner):
                end = corner + extent
                crop = clip[:, :, corner[0] : end[0], corner[1] : end[1]]
                return served.scores(tf.cast(crop, tf.float32))

            return _one_by_one(scores_of_crop, corners - top_left)

        scores = _one_by_one(scores_of_clip, frames)  # clips, crops, B, K
        return {"scores": tf.reduce_mean(scores, axis=(0, 1))}

    return views


def _one_by_one(function, values):
    """`tf.map_fn` that holds what one call of `function` needs, not more."""
    return tf.map_fn(function, values, fn_output_signature=tf.float32, parallel_iterations=1)


def _features(served):
    if served.features_layer is not None:
        tensor = _layer(served, "features_layer", lambda layer: True).output
    else:
        weighted = [layer for layer in served.model.layers if layer.weights]
        if not weighted:
            raise _LeftOutError("the model has no layer with weights")
        last = weighted[-1]
        tensor = None if isinstance(last, keras.Model) else last.input
        if not isinstance(tensor, keras.KerasTensor) or len(tensor.shape) != 2:
            raise _LeftOutError(
                f"the inputs of {last.name!r}, the last layer with weights, are not (batch, channels); name a layer by "
                "`features_layer`"
            )
    network = served.compiled(served.submodel(tensor))

    @_signature(served.clips())
    def features(clips):
        return {"features": network(served.prepare(clips))}

    return features


def _attention(served):
    def is_non_local(layer):
        return isinstance(layer, NonLocal3D)

    if served.attention_layer is not None:
        layer = _layer(served, "attention_layer", is_non_local)
    else:
        layers = list(filter(is_non_local, served.model.layers))
        if not layers:
            raise _LeftOutError("the model has no non-local block")
        layer = layers[-1]
    inputs = served.submodel(layer.input)
    positions = tf.TensorSpec((None, 3), tf.int32, name="positions")
    network = served.compiled(lambda clips, positions: layer.attention(inputs(clips), positions), positions)

    @_signature(served.clips(), positions)
    def attention(clips, positions):
        return {"weights": network(served.prepare(clips), positions)}

    return attention


def _layer(served, argument, is_right):
    names = [layer.name for layer in served.model.layers if is_right(layer)]
    name = getattr(served, argument)
    if name not in names:
        raise ValueError(f"`{argument}` must be one of the model's layers {names}. Received: {argument}={name!r}")
    return served.model.get_layer(name)


SIGNATURES = {
    "serving_default": functools.partial(_of_clips, dtype=tf.uint8),
    "float": functools.partial(_of_clips, dtype=tf.float32),
    "classify": _classify,
    "jpeg": _jpeg,
    "views": _views,
    "features": _features,
    "attention": _attention,
}


# Files


def _metadata(served, signatures, left_out, requests):
    model, preprocess = served.model, served.preprocess_input
    pixels = {"function": f"{preprocess.__module__}.{preprocess.__qualname__}"}
    if preprocess is _preprocess_input:
        pixels |= {"mean": PIXEL_MEAN, "std": PIXEL_STD}
    activation = getattr(model.layers[-1], "activation", None)
    return {
        "keras_nonlocal": __version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {
            "name": model.name,
            "parameters": model.count_params(),
            "classes": model.output_shape[-1],
            "activation": getattr(activation, "__name__", None),
            "weights_sha256": _weights_sha256(model),
        },
        "preprocessing": served.preparation | {"colours": "RGB"} | pixels,
        "signatures": {
            name: _described(signature) | {"example": requests[name]} for name, signature in signatures.items()
        },
        "left_out": left_out,
        "jit_compile": bool(served.jit_compile),
    }


def _described(signature):
    """The names, dtypes and shapes of a signature."""
    outputs = signature.get_concrete_function().structured_outputs

    def described(specs):
        return {name: {"dtype": spec.dtype.name, "shape": spec.shape.as_list()} for name, spec in specs}

    return {
        "inputs": described((spec.name, spec) for spec in signature.input_signature),
        "outputs": described(outputs.items()),
    }


def _weights_sha256(model):
    """Over the weights in the model's order: of each the path, dtype and shape as text, then its bytes."""
    digest = hashlib.sha256()
    for weight in model.weights:
        value = np.ascontiguousarray(weight.numpy())
        digest.update(f"{weight.path} {value.dtype.name} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _move(written, path, version):
    """Gives a finished version its name."""
    while True:
        folder = path / str(version or max(_versions(path), default=0) + 1)
        try:
            # A folder takes the place of an empty one only if that was there; another export's is not empty.
            if folder.exists():
                raise _exists(folder)
            os.rename(written, folder)
            return folder
        except OSError:
            if version is not None or not folder.exists():
                raise
