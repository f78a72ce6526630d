"""Weights of files in networks: Keras' own files, and other people's by way of `keras_nonlocal.checkpoints`.

Shape letters: T, H, W the sizes of a kernel; I input channels, O output channels.
"""

import dataclasses
import os
import zipfile

import keras
import numpy as np

from keras_nonlocal import checkpoints
from keras_nonlocal.applications.transfer import inflate_kernel

KERAS_FILES = (".weights.h5", ".keras")
EPSILON = 1e-5  # of every batch normalization of the networks


@dataclasses.dataclass(frozen=True)
class Filling:
    """What became of a checkpoint's arrays and of a model's weights. All are paths such as `"conv1/kernel"`.

    Args:
        filled: Weights of the model that have the checkpoint's values.
        inflated: Those of them whose kernel was repeated along time.
        folded: Weights of non-local blocks that hold a normalization too, or a normalization that does nothing,
            where only one of checkpoint and model has one.
        not_filled: Weights of the model that the checkpoint does not have.
        not_used: Arrays of the checkpoint that the model has no place for.
    """

    filled: tuple
    inflated: tuple
    folded: tuple
    not_filled: tuple
    not_used: tuple


def fill(model, checkpoint):
    """Fills a network with the arrays of a checkpoint.

    A kernel of one time step fills one of T: it is repeated and divided by T. A non-local block without normalization
    is filled from one that has it (W_z takes over what the normalization does at inference), and the other way round.

    Args:
        model: Network of `keras_nonlocal.applications`, or any model with the same names; changed in place.
        checkpoint: `keras_nonlocal.checkpoints.Checkpoint`.

    Returns:
        A `Filling`.

    Raises:
        ValueError: if an array and the weight of its name have different shapes, or no name is in both; the model is as
            it was then.
    """
    weights = {weight.path: weight for weight in model.weights}
    arrays, folded = _with_norms_of(checkpoint.weights, weights)
    planned, inflated, mismatches = {}, [], []
    for path in weights.keys() & arrays.keys():
        shape, array = tuple(weights[path].shape), arrays[path]
        value = inflate_kernel(array, shape)
        if value is None:
            source = ", ".join(checkpoint.sources.get(path, ())) or path
            mismatches.append(f"{path} {shape} of the model, {source} {array.shape} of the file")
        elif value.shape != array.shape:
            inflated.append(path)
        planned[path] = value
    if mismatches:
        raise ValueError(
            f"The weights of {model.name!r} must have the shapes of those in the {checkpoint.format} file. "
            f"Received: {'; '.join(sorted(mismatches))}"
        )
    if not planned:
        raise ValueError(
            f"No name of the {checkpoint.format} file is one of {model.name!r}'s. "
            f"Received: {_some(arrays)} in the file, {_some(weights)} in the model"
        )
    for path, value in planned.items():  # only now: a mismatch leaves the network as it was
        weights[path].assign(value)
    return Filling(
        filled=tuple(path for path in weights if path in planned),
        inflated=tuple(path for path in weights if path in inflated),
        folded=tuple(folded),
        not_filled=tuple(path for path in weights if path not in planned),
        not_used=tuple(path for path in arrays if path not in planned),
    )


def _with_norms_of(arrays, weights):
    """The arrays with the normalizations of non-local blocks that `weights` has, and no others."""
    arrays, folded = dict(arrays), []
    blocks = [path.removesuffix("/out/kernel") for path in arrays if path.endswith("/out/kernel")]
    for block in blocks:
        names = [f"{block}/norm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")]
        kernel, bias = f"{block}/out/kernel", f"{block}/out/bias"
        has_norm, wants_norm = names[0] in arrays, names[0] in weights
        if has_norm and not wants_norm and kernel in weights:
            gamma, beta, mean, variance = (arrays.pop(name) for name in names)
            factor = gamma / np.sqrt(variance + EPSILON)
            arrays[kernel] = arrays[kernel] * factor
            arrays[bias] = (arrays[bias] - mean) * factor + beta
            folded += [kernel, bias]
        elif wants_norm and not has_norm:
            channels = arrays[kernel].shape[-1]
            for name, value in zip(names, (1.0, 0.0, 0.0, 1.0 - EPSILON), strict=True):
                arrays[name] = np.full(channels, value, "float32")
            folded += names
    return arrays, folded


def load(model, weights, checkpoint=None):
    """Fills a network of the builders with what their argument `weights` names.

    Args:
        model: The network, changed in place.
        weights: Path of a file.
        checkpoint: What `read` gave for it: `None` for a file of Keras.

    Raises:
        ValueError: if the file does not fill the model: everything but the non-local blocks, which start as the
            identity, and but the head for weights of images.
    """
    if checkpoint is None:
        try:
            return model.load_weights(os.fspath(weights))
        except (OSError, zipfile.BadZipFile) as error:  # which do not name the file
            raise ValueError(
                f"`weights` must be a file that Keras wrote ({error}). Received: weights={weights!r}"
            ) from error
    images = checkpoint.images
    if images:  # their classes are others
        checkpoint = dataclasses.replace(
            checkpoint, weights={p: a for p, a in checkpoint.weights.items() if not p.startswith("pred/")}
        )
    has_head = any(weight.path.startswith("pred/") for weight in model.weights)
    filling = fill(model, checkpoint)
    missing = [
        p for p in filling.not_filled if not p.startswith("nonlocal_") and not (images and p.startswith("pred/"))
    ]
    not_used = [p for p in filling.not_used if has_head or not p.startswith("pred/")]
    if missing or not_used:
        raise ValueError(
            f"The {checkpoint.format} file must fill the whole network, and the network take all of it. The file lacks "
            f"{_some(missing)}; the network lacks {_some(not_used)}. Received: weights={weights!r}"
        )
    return filling


def read(weights, keras_name=None):
    """What the builders' argument `weights` names: `None` for a file of Keras, else a `Checkpoint`.

    `keras_name`: the network of `keras.applications` that `"imagenet"` stands for, if there is one.
    """
    if weights == "imagenet":
        if keras_name is None:
            raise ValueError('There are no weights of images for this network. Received: weights="imagenet"')
        network = getattr(keras.applications, keras_name)(weights="imagenet", include_top=False)
        arrays = {weight.path: keras.ops.convert_to_numpy(weight) for weight in network.weights}
        return checkpoints.from_arrays(arrays, "keras_applications")
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f'`weights` must be `None`, a path or "imagenet". Received: weights={weights!r}')
    path = os.fspath(weights)
    if not os.path.exists(path):
        raise ValueError(f"The file that `weights` names does not exist. Received: weights={weights!r}")
    return None if path.endswith(KERAS_FILES) else checkpoints.read(path)


def _some(names, limit=4):
    names = list(names)
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
