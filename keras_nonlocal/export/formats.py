"""Trained networks as single files for other runtimes: LiteRT and ONNX.

A file gets its name only after its own runtime has given the scores of the Keras model.

Shape letters: B clips, T frames, H height, W width, K classes.
"""

import contextlib
import inspect
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
import warnings
import zipfile

import numpy as np
import tensorflow as tf

from keras_nonlocal.applications import preprocess_input as _preprocess_input

from .saved_model import CLASS_NAMES_FILE, check_backend, check_model, export_saved_model

# Largest difference to the Keras scores, relative to the largest of these where that is above 1.
TOLERANCES = {None: 1e-4, "float16": 1e-2, "bfloat16": 0.1, "int8": 0.1}
# Clips that a written file is run on. More cost time and find no other faults.
NUM_CHECKS = 3
# Operators of ONNX that are about as old as TensorFlow 2.16; newer runtimes know them, too.
ONNX_OPSET = 18
# What a file that takes any size calls it, and on which it is run.
OPEN_SIZES = {"frames": 8, "height": 64, "width": 64}
# How the converters and runtimes name operations that they lack, and what to do about the frequent ones.
LACKING = {"LiteRT": r"TF Select ops: ([\w, ]+)", "ONNX": r"No Op registered for (\w+)"}
REPLACEMENTS = {
    "MaxPool3D": "with `keras_nonlocal.applications.folded.MaxPooling3D` for `keras.layers.MaxPooling3D`",
    "AvgPool3D": "with `keras.layers.TimeDistributed(keras.layers.AveragePooling2D(…))` for "
    "`keras.layers.AveragePooling3D`",
}


def export_model(model, path, format="saved_model", **options):
    """Exports a classifier of clips in one of the formats of `FORMATS`.

    Args:
        model: Functional Keras model from normalised clips to scores.
        path: What to write: a folder for `"saved_model"`, else a file.
        format: `"saved_model"`, see `export_saved_model`; `"litert"`, see `export_litert`; or `"onnx"`, see
            `export_onnx`.
        **options: Other arguments of that function.

    Returns:
        What was written, as a `pathlib.Path`.

    Raises:
        ValueError: if there is no such format, or it has no such option.

    Example:

    >>> import keras, tempfile
    >>> inputs = keras.Input((2, 8, 8, 3))
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
    >>> export_model(model, tempfile.mkdtemp() + "/colours.tflite", "litert", quantization="float16").name
    'colours.tflite'
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(map(repr, FORMATS))}. Received: format={format!r}")
    known = list(inspect.signature(FORMATS[format]).parameters)[2:]
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"The format {format!r} has the options {', '.join(known)}; {name!r} is none. "
                f"Received: {name}={value!r}"
            )
    return FORMATS[format](model, path, **options)


def export_litert(
    model,
    path,
    class_names=None,
    num_frames=None,
    image_size=None,
    batch_size=1,
    quantization=None,
    representative_clips=None,
    tolerance=None,
    preprocess_input=_preprocess_input,
):
    """Exports a classifier of clips for LiteRT (TensorFlow Lite): phones, boards, browsers.

    The file has one signature, `serving_default`: `clips`, float32 of shape `(B, T, H, W, 3)`, RGB pixels in 0..255 →
    `scores`, float32 `(B, K)`. All sizes are fixed. It needs the runtime's built-in operations only, and is run by it
    before it gets its name. The class names are in it as in a ZIP archive: `class_names.txt`, a name a line.

    Args:
        model: Functional Keras model from normalised clips to scores.
        path: File to write, by custom with the ending `.tflite`.
        class_names: Names of the classes in the order of the scores, or `None`.
        num_frames: Integer, the frames of a clip. `None`: the model's, if it fixes them.
        image_size: Integer or pair `(height, width)` of the frames. `None`: the model's, if it fixes them.
        batch_size: Integer, clips at a time.
        quantization: `None` for float32; `"float16"`: weights of half the size; `"int8"`: weights of a quarter of the
            size, and with `representative_clips` also activations, as far as the runtime has operations for them.
        representative_clips: Clips of the data, pixels in 0..255: an array `(N, T, H, W, 3)`, or an iterable of clips
            or batches, such as a `tf.data.Dataset` with or without labels. All are held; some hundred are plenty. The
            written file is checked on the first of them; without any, on random clips.
        tolerance: Largest difference to the Keras scores that is accepted, relative to the largest score where that is
            above 1. `None`: 1e-4 in float32, 1e-2 in float16, 0.1 in int8.
        preprocess_input: Function from float32 pixels in 0..255 to what the model takes.

    Returns:
        `path`, as a `pathlib.Path`.

    Raises:
        FileExistsError: if `path` exists.
        ValueError: if an argument does not fit the model, LiteRT lacks an operation of it, or the written file gives
            other scores; no file is left then.
        RuntimeError: if Keras runs on another backend than TensorFlow.

    Example:

    >>> import keras, tempfile
    >>> inputs = keras.Input((2, 8, 8, 3))
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
    >>> path = export_litert(model, tempfile.mkdtemp() + "/colours.tflite", class_names=["red", "green", "blue"])
    >>> zipfile.ZipFile(path).read("class_names.txt").split()
    [b'red', b'green', b'blue']
    """
    if quantization not in (None, "float16", "int8"):
        raise ValueError(f'`quantization` must be None, "float16" or "int8". Received: quantization={quantization!r}')
    if representative_clips is not None and quantization != "int8":
        raise ValueError(
            f'`representative_clips` are for `quantization="int8"`. Received: quantization={quantization!r}'
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}")
    network = _Network(model, num_frames, image_size, class_names, preprocess_input)
    if network.half:
        raise ValueError(
            "LiteRT takes networks of float32: build the model under that policy; its weights are float32 already, and "
            f'`quantization="float16"` halves the file. Received: layers of {network.half}'
        )
    missing = [name for name, size in zip(("num_frames", "image_size"), network.shape, strict=False) if size is None]
    if missing:
        raise ValueError(
            "LiteRT takes clips of one size, which the model leaves open: give `num_frames` and `image_size`. "
            f"Received: {', '.join(f'{name}=None' for name in missing)}"
        )
    clips = None if representative_clips is None else _listed(representative_clips, network.shape)

    with _scratch(path) as file:
        module = network.module(batch_size)
        function = module.serving_default.get_concrete_function()
        if clips is not None and _has_loops(function):
            raise ValueError(
                "Representative clips run through networks without loops only, or LiteRT ends the process: build the "
                "non-local blocks with `query_chunk_size=None`, or leave the clips out. Received: a network with loops"
            )
        with _conversion("LiteRT", network):
            converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
            if quantization is not None:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if quantization == "float16":
                converter.target_spec.supported_types = [tf.float16]
            if clips is not None:
                converter.representative_dataset = lambda: (
                    {"clips": np.repeat(clip[None], batch_size, axis=0).astype("float32")} for clip in clips
                )
            file.write_bytes(converter.convert())
        if class_names is not None:
            # Readers of the model do not look behind its end, where readers of ZIP archives look.
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr(CLASS_NAMES_FILE, "".join(f"{name}\n" for name in class_names))
        with warnings.catch_warnings():
            # That it moves to a package of its own; TensorFlow has it still.
            warnings.filterwarnings("ignore", message=".*tf.lite.Interpreter is deprecated")
            interpreter = tf.lite.Interpreter(str(file))
        runner = interpreter.get_signature_runner("serving_default")
        _compare(
            "LiteRT",
            network,
            lambda clips: runner(clips=clips)["scores"],
            _check_clips(network.shape, batch_size) if clips is None else _batched(clips, batch_size),
            TOLERANCES[quantization] if tolerance is None else tolerance,
            'Try `representative_clips` of your data, `quantization="float16"`, or a larger `tolerance`.'
            if quantization == "int8"
            else "Try other layers, or a larger `tolerance`.",
        )
    return pathlib.Path(path)


def _has_loops(function):
    graph = function.graph.as_graph_def()
    nodes = [node for part in (graph.node, *(library.node_def for library in graph.library.function)) for node in part]
    return any(node.op in ("While", "StatelessWhile") for node in nodes)


def export_onnx(
    model,
    path,
    class_names=None,
    num_frames=None,
    image_size=None,
    tolerance=None,
    preprocess_input=_preprocess_input,
):
    """Exports a classifier of clips as an ONNX file. Needs the extra `onnx`.

    The file takes `clips`, float32 of shape `(B, T, H, W, 3)`, RGB pixels in 0..255, and gives `scores`, float32
    `(B, K)`, for any B, and any T, H and W that neither the model nor an argument fixes. It is run by onnxruntime
    before it gets its name. The class names are its metadata property `class_names`, a JSON list.

    Args:
        model: Functional Keras model from normalised clips to scores.
        path: File to write, by custom with the ending `.onnx`.
        class_names: Names of the classes in the order of the scores, or `None`.
        num_frames: Integer, the frames of a clip. `None`: the model's, if it fixes them, or any.
        image_size: Integer or pair `(height, width)` of the frames. `None`: the model's, if it fixes them, or any.
        tolerance: Largest difference to the Keras scores that is accepted, relative to the largest score where that is
            above 1. `None`: 1e-4, for a model that computes in float16 1e-2.
        preprocess_input: Function from float32 pixels in 0..255 to what the model takes.

    Returns:
        `path`, as a `pathlib.Path`.

    Raises:
        FileExistsError: if `path` exists.
        ImportError: if the extra is not installed.
        ValueError: if an argument does not fit the model, ONNX lacks an operation of it, or the written file gives
            other scores; no file is left then.
        RuntimeError: if Keras runs on another backend than TensorFlow.
    """
    try:
        import onnx
        import onnxruntime
        import tf2onnx  # noqa: F401
        from tf2onnx import optimizer, tf_loader, tfonnx
        from tf2onnx.optimizer import back_to_back_optimizer as back_to_back
        from tf2onnx.optimizer import const_fold_optimizer as const_fold
        from tf2onnx.optimizer import identity_optimizer as identity
        from tf2onnx.optimizer import merge_duplicated_nodes_optimizer as merge
        from tf2onnx.optimizer import transpose_optimizer as transpose
    except ImportError as error:
        raise ImportError(
            f'ONNX files need the extra: pip install "keras-nonlocal[onnx]". Missing: {error.name}'
        ) from error
    # Not its optimizer of reshapes: that drops the first of two, though the second may refer to its sizes, and the
    # concatenation form then fails with more than one clip.
    optimizers = {
        "transpose": transpose.TransposeOptimizer,
        "fold": const_fold.ConstFoldOptimizer,
        "merge": merge.MergeDuplicatedNodesOptimizer,
        "identity": identity.IdentityOptimizer,
        "back_to_back": back_to_back.BackToBackOptimizer,
    }
    network = _Network(model, num_frames, image_size, class_names, preprocess_input)
    with _scratch(path) as file:
        function = network.module(None).serving_default.get_concrete_function()
        (clips,) = (tensor for tensor in function.inputs if tensor.dtype != tf.resource)
        (scores,) = function.outputs
        with _conversion("ONNX", network):
            frozen = tf_loader.from_function(function, [clips.name], [scores.name])
            with tf.Graph().as_default() as graph:
                tf.import_graph_def(frozen, name="")
                converted = tfonnx.process_tf_graph(
                    graph,
                    opset=ONNX_OPSET,
                    input_names=[clips.name],
                    output_names=[scores.name],
                    tensors_to_rename={clips.name: "clips", scores.name: "scores"},
                )
                # Without its copies of the graph from before each step, which take most of its time.
                converted = optimizer.optimize_graph(converted, catch_errors=False, optimizers=optimizers)
                proto = converted.make_model(model.name)
        sizes = ["batch", *(size or name for size, name in zip(network.shape, OPEN_SIZES, strict=True)), 3]
        for tensor, names in ((proto.graph.input[0], sizes), (proto.graph.output[0], sizes[:1])):
            for dimension, name in zip(tensor.type.tensor_type.shape.dim, names, strict=False):
                if isinstance(name, str):
                    dimension.dim_param = name
        if class_names is not None:
            onnx.helper.set_model_props(proto, {"class_names": json.dumps(list(class_names), ensure_ascii=False)})
        with _conversion("ONNX", network):
            onnx.checker.check_model(proto)
            onnx.save(proto, file)
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        _compare(
            "ONNX",
            network,
            lambda clips: session.run(["scores"], {"clips": clips})[0],
            _check_clips([size or least for size, least in zip(network.shape, OPEN_SIZES.values(), strict=True)], 2),
            TOLERANCES[network.half] if tolerance is None else tolerance,
            "Try other layers, or a larger `tolerance`.",
        )
    return pathlib.Path(path)


FORMATS = {"saved_model": export_saved_model, "litert": export_litert, "onnx": export_onnx}


class _Network:
    """What is exported: from float32 pixels to scores."""

    def __init__(self, model, num_frames, image_size, class_names, preprocess_input):
        check_backend("A model")
        check_model(model, class_names)
        self.model = model
        self.preprocess_input = preprocess_input
        sizes = tuple(model.inputs[0].shape[1:])
        # Files take channels last; a network that does not, gets them moved.
        self.channels_first = sizes[0] == 3 and sizes[-1] != 3
        static = sizes[1:] if self.channels_first else sizes[:-1]
        given = (num_frames, *(image_size if isinstance(image_size, (tuple, list)) else (image_size,) * 2))
        for size, fixed in zip(given, static, strict=True):
            if size is not None and (not isinstance(size, (int, np.integer)) or size < 1 or fixed not in (None, size)):
                raise ValueError(
                    "`num_frames` and `image_size` must be positive, and the model's where it fixes them, "
                    f"{static}. Received: num_frames={num_frames}, image_size={image_size}"
                )
        # Half precision rounds elsewhere in every runtime.
        dtypes = {layer.compute_dtype for layer in model.layers}
        self.half = next((dtype for dtype in ("bfloat16", "float16") if dtype in dtypes), None)
        self.shape = tuple(fixed if size is None else int(size) for size, fixed in zip(given, static, strict=True))

    def scores(self, clips):
        clips = self.preprocess_input(clips)
        if self.channels_first:
            clips = tf.transpose(clips, (0, 4, 1, 2, 3))
        return tf.cast(self.model(clips, training=False), tf.float32)

    def module(self, batch_size):
        module = tf.Module()
        module.model_variables = [variable.value for variable in self.model.variables]
        module.serving_default = tf.function(
            lambda clips: {"scores": self.scores(clips)},
            input_signature=[tf.TensorSpec((batch_size, *self.shape, 3), tf.float32, name="clips")],
            autograph=False,
        )
        return module


@contextlib.contextmanager
def _scratch(path):
    """A name beside `path` that becomes `path` when the file is written and found right."""
    path = pathlib.Path(path)
    _check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield folder / path.name
        _check_new(path)
        os.rename(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_new(path):
    if path.exists():
        raise FileExistsError(f"`path` must not exist, exports are never overwritten. Received: path={str(path)!r}")


@contextlib.contextmanager
def _conversion(runtime, network):
    """One sentence in place of the pages of a converter or a runtime."""
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it cannot convert, it also logs
    try:
        yield
    except Exception as error:  # which kinds they are is no part of any interface
        operations = sorted({name for names in re.findall(LACKING[runtime], str(error)) for name in names.split(", ")})
        if not operations:
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f'{runtime} does not take the model; `format="saved_model"` takes every model. '
                f"Received: {type(error).__name__}: {reason}"
            ) from error
        if network.channels_first:
            raise ValueError(
                f"{runtime} lacks operations of networks with channels first: build it after "
                '`keras.config.set_image_data_format("channels_last")`; its weights are the same. '
                f"Received: operations={operations}"
            ) from error
        advice = [REPLACEMENTS[name] for name in operations if name in REPLACEMENTS]
        raise ValueError(
            f"{runtime} lacks operations of the model: build it {' and '.join(advice) or 'of other layers'}, or take "
            f'another format; "saved_model" takes every model. Received: operations={operations}'
        ) from error
    finally:
        logger.setLevel(level)


def _listed(clips, shape):
    listed = []
    for element in clips:
        element = np.asarray(element[0] if isinstance(element, tuple) else element)
        listed.extend(element if element.ndim == 5 else [element])
    for clip in listed:
        if clip.shape != (*shape, 3):
            raise ValueError(
                f"`representative_clips` must be clips of the shape {(*shape, 3)}. Received: a clip of {clip.shape}"
            )
    if not listed:
        raise ValueError("`representative_clips` must hold clips. Received: none")
    return listed


def _batched(clips, batch_size):
    """The first of them, in whole batches."""
    chosen = np.resize(np.arange(len(clips)), (NUM_CHECKS, batch_size))
    return [np.stack([clips[index] for index in batch]).astype("float32") for batch in chosen]


def _check_clips(shape, batch_size):
    """Batches of clips that look different to a network: colours that change slowly and noise, more or less of each."""
    rng = np.random.default_rng(0)
    frames, height, width = shape
    batches = []
    for noise in np.linspace(0.1, 0.9, NUM_CHECKS):
        coarse = rng.uniform(0, 255, (batch_size, frames, -(-height // 16), -(-width // 16), 3))
        coarse = np.kron(coarse, np.ones((1, 1, 16, 16, 1)))[:, :, :height, :width]
        fine = rng.uniform(0, 255, coarse.shape)
        batches.append(((1 - noise) * coarse + noise * fine).astype("float32"))
    return batches


def _compare(runtime, network, run, batches, tolerance, advice):
    for clips in batches:
        try:
            expected = network.scores(clips).numpy()
        except (ValueError, tf.errors.OpError) as error:
            raise ValueError(
                "The model does not run on clips of this size here: give the `num_frames` and `image_size` that it "
                f"takes. Received: clips.shape={clips.shape}"
            ) from error
        with _conversion(runtime, network):
            scores = run(clips)
        difference = np.abs(scores - expected).max() / max(np.abs(expected).max(), 1)
        if not difference <= tolerance:  # nor if it is no number
            raise ValueError(
                f"The {runtime} file was not kept: its scores differ from the Keras model's by {difference:.1e}. "
                f"{advice} Received: tolerance={tolerance}"
            )
