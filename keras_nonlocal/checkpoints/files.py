"""Files of arrays of every kind that weights come in, read into `{name: array}`.

What a file is, its first bytes tell. No file can run code or name another file, and what it takes to read one grows as
the file does: a small one cannot make many numbers, or long texts, by naming the same ones again and again.
HDF5 is read by its own library, whose faults are here too: a damaged file can make it wait for ever.
"""

import io
import json
import math
import os
import struct
import zipfile

import numpy as np

from keras_nonlocal.checkpoints import pickles
from keras_nonlocal.checkpoints.pickles import Refusal, is_shape, shown

# The first of the pickles in torch's older format.
_TORCH_LEGACY = 0x1950A86A20F9469CFC6C

# What reading a damaged file makes h5py, zipfile, json and struct raise.
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
    *(ValueError, struct.error, zipfile.BadZipFile),
)


def load(path):
    """Reads any file of weights.

    Args:
        path: String, the file.

    Returns:
        `({name: array}, {name: reason}, {name: string})`: the arrays, what else lies at their place in the file or
        beside them, and what of the latter are strings.

    Raises:
        ValueError: if it is no such file, not whole, or asks for more than arrays.
    """
    if not os.path.isfile(path):
        raise Refusal("There must be a file of that name; there is none.")
    with open(path, "rb") as file:
        start = file.read(16)
    reader = next((reader for begins, reader in _READERS if begins(start)), None)
    if reader is None:
        raise Refusal(
            "The file must be a Caffe2 pickle, a torch file, safetensors or Keras' HDF5, and is none of them; it "
            f"begins with {start!r}."
        )
    try:
        arrays, ignored, texts = reader(path)
    except Refusal:
        raise
    except _DAMAGE as error:
        raise Refusal(f"The file is cut off or damaged ({shown(error)}).") from error
    if not arrays:
        raise Refusal("The file must hold arrays, and holds none.")
    return arrays, ignored, texts


def _read(path):
    with open(path, "rb") as file:
        return io.BytesIO(file.read())


def _check_total(shapes, path):
    if not all(map(is_shape, shapes)):
        raise Refusal("The file is cut off or damaged: a tensor's shape is no shape of an array.")
    total, size = sum(math.prod(shape) for shape in shapes), os.path.getsize(path)
    if total > size:
        raise Refusal(f"The file must hold its numbers: {size} bytes cannot be {total} of them.")


def _numbers(raw, dtype):
    """Flat array of bytes; NumPy has no bfloat16, the upper half of a float32."""
    if dtype != "bfloat16":
        return np.frombuffer(raw, dtype)
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def _item_size(dtype):
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _weights(tree, keys):
    """The dictionary of weights in what a pickle holds, as it is or under one of the keys; what lies beside it, and the
    strings in that."""
    if not isinstance(tree, dict):
        raise Refusal(f"The file must hold a dictionary of arrays, and holds a {type(tree).__name__}.")
    beside, texts = {}, {}
    for key in keys:
        if isinstance(tree.get(key), dict):
            beside = {str(name): f"not among the weights, which are in {key!r}" for name in tree if name != key}
            texts = {str(name): value for name, value in tree.items() if isinstance(value, str)}
            tree = tree[key]
            break
    tree = {str(name): value for name, value in tree.items()}
    return tree, beside, texts


def _read_pickle(path):
    file = _read(path)
    tree = pickles.load(file, pickles.CAFFE2)
    if tree == _TORCH_LEGACY:
        return _read_torch_legacy(file, path)
    return _pickled_arrays(*_weights(tree, ("blobs",)), path)


def _pickled_arrays(tree, ignored, texts, path, storage=None):
    arrays = {}
    for name, value in tree.items():
        if isinstance(value, pickles.Array) and value.value is not None:
            arrays[name] = value.value
        elif isinstance(value, pickles.Tensor):
            arrays[name] = value
        else:
            ignored[name] = "no array"
    _check_total([value.shape for value in arrays.values()], path)
    for name, value in arrays.items():
        if isinstance(value, pickles.Tensor):
            arrays[name] = _view(value, storage(value.storage))
    return arrays, ignored, texts


def _view(tensor, numbers):
    # Its bounds were checked when it was made, and the storage's size when that was read.
    strides = [step * numbers.itemsize for step in tensor.strides]
    if 0 in tensor.shape:
        return np.empty(tensor.shape, numbers.dtype)
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)


_TORCH_KEYS = ("model_state", "state_dict", "model")


def _read_torch_legacy(file, path):
    """torch's format before 1.6: pickles of a number, a version, the machine, the objects and the storages' names, then
    for every storage its size and its numbers."""
    storages, read = {}, {}
    version, machine, tree, keys = (pickles.load_torch(file, storages) for _ in range(4))
    if version != 1001 or not isinstance(machine, dict) or not machine.get("little_endian"):
        raise Refusal("The torch file must be of version 1001, from a little-endian machine.")
    content, position = file.getbuffer(), file.tell()
    for key in keys:
        if not isinstance(key, str):
            raise Refusal("The names of the torch file's storages must be strings.")
        start = position + 8
        (size,) = struct.unpack("<q", content[position:start])
        position = start + storages[key].size * _item_size(storages[key].dtype)
        read[key] = _numbers_of(storages[key], content[start:position], size)
    return _pickled_arrays(*_weights(tree, _TORCH_KEYS), path, lambda storage: read[storage.key])


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "model.weights.h5" in names:
            entry = archive.getinfo("model.weights.h5")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > os.path.getsize(path):
                raise Refusal("The zip file must be one that Keras wrote; its weights are compressed.")
            return _read_hdf5(path, io.BytesIO(archive.read(entry)))
        pickled = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise Refusal("The zip file must be one that torch wrote, with one data.pkl in its folder.")
        folder = pickled[0].removesuffix("data.pkl")
        stored = [entry.file_size for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
        if sum(stored) > os.path.getsize(path):
            raise Refusal("The zip file must be one that torch wrote; parts of it lie over each other.")

        def member(name):
            entry = archive.getinfo(folder + name)
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Refusal(f"The zip file must be one that torch wrote; {name!r} is compressed in it.")
            return archive.read(entry)

        if folder + "byteorder" in names and member("byteorder") != b"little":
            raise Refusal("The torch file must be from a little-endian machine.")
        tree = pickles.load_torch(io.BytesIO(member("data.pkl")), {})
        read = {}

        def storage(wanted):
            if wanted.key not in read:  # the numbers of what is no weight are never read
                read[wanted.key] = _numbers_of(wanted, member(f"data/{wanted.key}"), wanted.size)
            return read[wanted.key]

        return _pickled_arrays(*_weights(tree, _TORCH_KEYS), path, storage)


def _numbers_of(storage, raw, size):
    """The numbers of a storage, which must be as many as its references say."""
    if size != storage.size or len(raw) != size * _item_size(storage.dtype):
        raise Refusal(
            f"The file is cut off or damaged: {len(raw)} bytes are no {storage.size} numbers ({storage.dtype}) of the "
            f"storage {storage.key!r}."
        )
    return _numbers(raw, storage.dtype)


# safetensors: the length of a header, the header as JSON, the numbers.
_SAFETENSORS = {
    "BF16": "bfloat16",
    "BOOL": "|b1",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "I8": "|i1",
    "U8": "|u1",
}


def _read_safetensors(path):
    file = _read(path)
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(min(length, os.path.getsize(path))))
    numbers, arrays = file.getbuffer()[8 + length :], {}
    header.pop("__metadata__", None)
    _check_total([tuple(entry["shape"]) for entry in header.values()], path)
    for name, entry in header.items():
        (start, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        if dtype not in _SAFETENSORS:
            raise Refusal(f"The tensors must be of {', '.join(_SAFETENSORS)}; {name!r} is of {dtype!r}.")
        dtype = _SAFETENSORS[dtype]
        if not 0 <= start <= end <= len(numbers) or end - start != math.prod(shape) * _item_size(dtype):
            raise Refusal(f"The file is cut off or damaged: the tensor {name!r} of shape {shape} does not lie in it.")
        arrays[name] = _numbers(numbers[start:end], dtype).reshape(shape)
    return arrays, {}, {}


def _read_hdf5(path, content=None):
    """Keras' formats: version 2's, of `keras.applications`, and version 3's. `content`: of an HDF5 file that
    lies in the one at `path`."""
    import h5py

    with h5py.File(content or path, "r") as file:
        root = _inside(file, "model_weights") if "model_weights" in file else file
        if "layers" in root:
            datasets = dict(_variables(_inside(root, "layers")))
        else:
            datasets = dict(_named_weights(root))
        if not datasets:
            raise Refusal("The HDF5 file must be one that Keras wrote, and names no layers.")
        texts = {name: value for name, value in file.attrs.items() if isinstance(value, str)}
        for name, dataset in datasets.items():
            if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
                raise Refusal(f"The numbers of {name!r} must lie in the file itself.")
            if dataset.dtype.kind not in "biuf":
                raise Refusal(f"The file must hold arrays of plain numbers; {name!r} is of {dataset.dtype}.")
        _check_total([dataset.shape for dataset in datasets.values()], path)
        return {name: dataset[()] for name, dataset in datasets.items()}, {}, texts


def _named_weights(root):
    """Keras 2: a group for every layer, in it the weights that it names."""
    for layer in _attribute(root, "layer_names"):
        group = _inside(root, layer)
        for weight in _attribute(group, "weight_names"):
            # The graph's names before the last one may be numbered ("conv1_conv_1"); the layer's is not.
            yield f"{layer}/{weight.split('/')[-1].split(':')[0]}", _inside(group, weight)


def _variables(group, names=()):
    """Keras 3: groups that are named after classes, in each a group "vars" with the layer's name and its variables by
    number, beside groups of the layers inside of it. Named here `layer/inner layer/number`."""
    if len(names) > 8:
        raise Refusal("The HDF5 file must be one that Keras wrote; its groups lie in each other without end.")
    parts = {name: _inside(group, name) for name in group}
    variables = parts.pop("vars", None)
    if variables is not None:
        names = (*names, str(variables.attrs.get("name", group.name)))
        for number in variables:
            yield "/".join((*names, number)), _inside(variables, number)
    for part in parts.values():
        if hasattr(part, "keys"):
            yield from _variables(part, names)


def _inside(group, path):
    """What lies at the path, if no link on the way leads to another file."""
    import h5py

    for name in path.split("/"):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise Refusal(f"The HDF5 file must hold {path!r} itself, and does not.")
        group = group[name]
    return group


def _attribute(group, name):
    """The strings of an attribute, which Keras splits into name0, name1, … where they are too many for one."""
    names = [name] if name in group.attrs else []
    while f"{name}{len(names)}" in group.attrs:
        names.append(f"{name}{len(names)}")
    values = [value for part in names for value in group.attrs[part]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


# How a file begins → what reads it. The first byte of safetensors, of a length, may be that of a pickle.
_READERS = (
    (lambda start: start[6:9] == b"\0\0{", _read_safetensors),
    (lambda start: start.startswith(b"\x80"), _read_pickle),
    (lambda start: start.startswith(b"PK\x03\x04"), _read_zip),
    (lambda start: start.startswith(b"\x89HDF\r\n\x1a\n"), _read_hdf5),
)
