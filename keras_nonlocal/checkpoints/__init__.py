"""Other people's weight files, read into arrays under the names and in the layout of the networks in here.

Knows no network, needs no PyTorch, and runs nothing that a file asks for. One module a format, each a table of names.
"""

import dataclasses
import os

import numpy as np

from keras_nonlocal.checkpoints import (
    files,
    keras3,
    keras_applications,
    keras_hub,
    mmaction2,
    pyslowfast,
    release,
    tables,
    torchvision,
)

# Every format. "keras_hub" is one of arrays in memory only (`from_arrays`).
FORMATS = {
    module.__name__.split(".")[-1]: module.FORMAT
    for module in (release, pyslowfast, mmaction2, torchvision, keras_applications, keras_hub, keras3)
}

__all__ = ["FORMATS", "Checkpoint", "from_arrays", "read"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights of a foreign file, and an account of all its tensors.

    Args:
        format: Name of the format, a key of `FORMATS`.
        weights: Path of a weight here, such as `"res2_0_branch2a/kernel"` → float32 array in Keras' layout. Kernels are
            of `T×H×W×I×O`, those of image networks of `1×H×W×I×O`.
        shapes: Name of a tensor in the file → its shape there, of all tensors.
        sources: Path of a weight → tuple of the names in the file of the tensors that it was made of; empty where the
            format implies it.
        ignored: Name in the file → why it is no weight.
        unknown: Name in the file → shape, of tensors that are in no row of the format's table.
        settings: Arguments of a builder that the file fixes: `pixels` (`"release"`, `"torch"` or `"caffe"`),
            `stride_in_1x1`, `pool1_padding`, `temporal_strides`, `pool1_temporal_size`, and `non_local_options`,
            arguments of `NonLocal3D`.
        images: Whether the file is of a network for images, whose classes are no videos'. Kernels without a time axis
            tell, but for MMAction2's networks with a head: those are for videos, frame by frame.
    """

    format: str
    weights: dict
    shapes: dict
    sources: dict
    ignored: dict
    unknown: dict
    settings: dict
    images: bool


def read(path, format=None):
    """Reads a file of weights: Caffe2 pickles of the authors' release, torch files, safetensors, Keras' HDF5.

    Args:
        path: The file. What it is, its content says, not its name.
        format: A key of `FORMATS`; `None`: found out from the names of the tensors.

    Returns:
        A `Checkpoint`.

    Raises:
        ValueError: if there is no such file, it is damaged, of no known format, or asks for anything but arrays, such
            as a function to be called.

    Example:

    >>> names = ["layer1.0.conv1.weight", "layer1.0.bn1.weight", "epoch"]
    >>> header = {
    ...     name: {"dtype": "F32", "shape": shape, "data_offsets": [4 * i, 4 * i + 4]}
    ...     for i, (name, shape) in enumerate(zip(names, [(1, 1, 1, 1), (1,), (1,)]))
    ... }
    >>> import json, pathlib, struct
    >>> header = json.dumps(header).encode()
    >>> path = pathlib.Path("image_network.safetensors")
    >>> _ = path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<3f", 1, 2, 3))
    >>> checkpoint = read(path)
    >>> checkpoint.format, list(checkpoint.weights), checkpoint.unknown
    ('torchvision', ['res2_0_branch2a/kernel', 'res2_0_branch2a_bn/gamma'], {'epoch': (1,)})
    """
    _check_format(format)
    path = os.fspath(path)
    try:
        return _checkpoint(format, *files.load(path))
    except ValueError as error:
        raise ValueError(f"{error} Received: path={path!r}") from error


def from_arrays(arrays, format=None):
    """Reads weights that are in memory already.

    Args:
        arrays: Dictionary of names to arrays, such as
            `{weight.path: weight.numpy() for weight in keras.applications.ResNet50().weights}`.
        format: As for `read`.

    Returns:
        A `Checkpoint`.

    Raises:
        ValueError: if the names are of no known format.

    Example:

    >>> checkpoint = from_arrays({"conv2_block1_1_conv/kernel": np.zeros((1, 1, 64, 64))})
    >>> checkpoint.weights["res2_0_branch2a/kernel"].shape, checkpoint.settings
    ((1, 1, 1, 64, 64), {'pixels': 'caffe', 'stride_in_1x1': True})
    """
    _check_format(format)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    try:
        return _checkpoint(format, arrays, {}, {})
    except ValueError as error:
        raise ValueError(f"{error} Received: arrays of {len(arrays)} names") from error


def _check_format(format):
    if format is not None and format not in FORMATS:
        raise ValueError(f"`format` must be `None` or one of {', '.join(FORMATS)}. Received: format={format!r}")


def _checkpoint(format, arrays, beside, texts):
    names = {tables.plain_name(name) for name in arrays}
    fitting = [name for name, row in FORMATS.items() if row.signature in names and format in (None, name)]
    if not fitting:
        some = ", ".join(map(repr, list(arrays)[:3]))
        known = ", ".join(f"{row.signature!r} ({name})" for name, row in FORMATS.items() if format in (None, name))
        raise ValueError(f"The file must have a tensor {known}; it has {len(arrays)} others, such as {some}.")
    weights, sources, ignored, unknown, settings, images = tables.convert(FORMATS[fitting[0]], arrays, texts)
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    return Checkpoint(fitting[0], weights, shapes, sources, beside | ignored, unknown, settings, images)
