"""Weights of files in networks, by way of `keras_nonlocal.checkpoints`.

Shape letters: T, H, W the sizes of a kernel; I input channels, O output channels.
"""

import dataclasses
import os
import warnings

import keras
import numpy as np

from keras_nonlocal import checkpoints
from keras_nonlocal.applications.transfer import inflate_kernel

EPSILON = 1e-5  # of every batch normalization of the networks
NORM = ("gamma", "beta", "moving_mean", "moving_variance")


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


def fill(model, checkpoint, new_head=False):
    """Fills a network with the arrays of a checkpoint.

    A kernel of an image network fills one of T time steps: it is repeated and divided by T. A non-local block without
    normalization is filled from one that has it (W_z takes over what the normalization does at inference), and the
    other way round.

    Args:
        model: Network of `keras_nonlocal.applications`, or any model with the same names; changed in place.
        checkpoint: `keras_nonlocal.checkpoints.Checkpoint`.
        new_head: Whether to leave the head as it is.

    Returns:
        A `Filling`.

    Raises:
        ValueError: if an array and the weight of its name have different shapes, or no name is in both; the model is as
            it was then.
    """
    weights = {weight.path: weight for weight in model.weights}
    arrays, folded = _with_norms_of(checkpoint, weights)
    planned, inflated, mismatches = {}, [], []
    for path in weights.keys() & arrays.keys():
        if new_head and is_of_head(path):
            continue
        shape, array = tuple(weights[path].shape), arrays[path]
        fits = array.shape == shape or checkpoint.images
        value = inflate_kernel(array, shape) if fits else None
        if value is None:
            files = ", ".join(f"{name!r} {checkpoint.shapes[name]}" for name in checkpoint.sources.get(path, ()))
            mismatches.append(f"{path} {shape} of the model, {files or array.shape} of the file")
        elif value.shape != array.shape:
            inflated.append(path)
        planned[path] = value
    if mismatches:
        other_classes = all(map(is_of_head, mismatches))
        hint = "`classes` must be the file's, or `new_head=True` (`--new-head`) given. " if other_classes else ""
        raise ValueError(
            f"The weights of {model.name!r} must have the shapes of those in the {checkpoint.format} file. {hint}"
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


def _with_norms_of(checkpoint, weights):
    """The arrays with the normalizations of non-local blocks that `weights` has, and no others."""
    arrays, folded = dict(checkpoint.weights), []
    for block in [path.removesuffix("/out/kernel") for path in arrays if path.endswith("/out/kernel")]:
        names = [f"{block}/norm/{name}" for name in NORM]
        kernel, bias = f"{block}/out/kernel", f"{block}/out/bias"
        has_norm, wants_norm = names[0] in arrays, names[0] in weights
        channels = arrays[kernel].shape[-1]
        if has_norm and not wants_norm and kernel in weights:
            parts = [arrays.get(name) for name in (*names, bias)]
            if any(part is None or part.shape != (channels,) for part in parts):
                continue  # whatever it is will not fit
            gamma, beta, mean, variance, old_bias = parts
            factor = gamma / np.sqrt(variance + EPSILON)
            arrays[kernel] = arrays[kernel] * factor
            arrays[bias] = (old_bias - mean) * factor + beta
            for name in names:
                del arrays[name]
            folded += [kernel, bias]
        elif wants_norm and not has_norm:
            for name, value in zip(names, (1.0, 0.0, 0.0, 1.0 - EPSILON), strict=True):
                arrays[name] = np.full(channels, value, "float32")
            folded += names
    return arrays, folded


def load(model, checkpoint, new_head=False):
    """Fills a network of the builders with a whole checkpoint.

    Args:
        model: The network, changed in place.
        checkpoint: `keras_nonlocal.checkpoints.Checkpoint`.
        new_head: Whether to leave the head as it is, for other classes. With weights of images it always is.

    Returns:
        A `Filling`.

    Raises:
        ValueError: if the checkpoint does not fill all of the model but the head that is to be new and non-local blocks
            that are not in it, which start as the identity; or if the model does not take all of it.
    """
    new_head = new_head or checkpoint.images
    filling = fill(model, checkpoint, new_head)
    blocks = {path.split("/")[0] for path in checkpoint.weights}
    has_head = any(is_of_head(weight.path) for weight in model.weights)

    def may_be_missing(path):
        block = path.split("/")[0]
        return (block.startswith("nonlocal_") and block not in blocks) or (new_head and is_of_head(path))

    missing = [path for path in filling.not_filled if not may_be_missing(path)]
    not_used = [path for path in filling.not_used if not (is_of_head(path) and (new_head or not has_head))]
    if missing or not_used:
        raise ValueError(
            "The file must fill the whole network, and the network take all of it: have the same non-local blocks, of "
            f"the same pairwise function. Received: a {checkpoint.format} file with {_some(not_used)}, which "
            f"{model.name!r} does not have, and without {_some(missing)}, which it has"
        )
    return filling


def read(weights, keras_name=None):
    """The `Checkpoint` that the builders' argument `weights` names.

    `keras_name`: the network of `keras.applications` that `"imagenet"` stands for, if there is one.
    """
    if isinstance(weights, checkpoints.Checkpoint):
        return weights
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(
            f'`weights` must be `None`, a path, "imagenet" or a `Checkpoint`. Received: weights={weights!r}'
        )
    if weights == "imagenet":
        return _imagenet(keras_name)
    if not os.path.exists(weights):
        raise ValueError(
            f'`weights` must be a file of weights or "imagenet"; there is no such file. Received: weights={weights!r}'
        )
    try:
        checkpoint = checkpoints.read(weights)
    except ValueError as error:
        raise ValueError(f"`weights` must be a file of weights. {error}") from error
    if checkpoint.unknown:
        names = _some(map(repr, checkpoint.unknown))
        warnings.warn(f"{os.fspath(weights)!r} has tensors that are not used: {names}.", stacklevel=4)
    return checkpoint


def _imagenet(keras_name):
    if keras_name is None:
        raise ValueError(
            'There are weights of images for the networks of 50 and 101 layers only. Received: weights="imagenet"'
        )
    try:
        network = getattr(keras.applications, keras_name)(weights="imagenet", include_top=False)
    except Exception as error:  # Keras raises just that where it cannot download
        raise ValueError(f'Keras does not get its weights ({error}). Received: weights="imagenet"') from error
    arrays = {weight.path: np.asarray(keras.ops.convert_to_numpy(weight), "float32") for weight in network.weights}
    return checkpoints.from_arrays(arrays, "keras_applications")


def is_of_head(path):
    """Whether the path is a weight of the dense layer at the end."""
    return path.startswith("pred/")


def _some(names, limit=4):
    names = list(names)
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
