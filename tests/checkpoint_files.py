"""Weight files of every format and container, written by hand: no code of the readers, no PyTorch."""

import json
import struct
import zipfile

import h5py
import numpy as np

# Pickles. What the standard library would not write (names that do not exist here, Python 2's strings) is spelled out.


class Global:
    def __init__(self, name):
        self.module, _, self.name = name.rpartition(".")


class Call:
    """`function(*arguments)`, then its state; `opcode` is REDUCE's or NEWOBJ's."""

    def __init__(self, function, arguments=(), state=None, opcode=b"R"):
        self.function = Global(function) if isinstance(function, str) else function
        self.arguments, self.state, self.opcode = arguments, state, opcode


class Raw:
    """Instructions of a pickle that leave one object on its stack."""

    def __init__(self, *instructions):
        self.instructions = b"".join(instructions)


class Reference:
    """A persistent id."""

    def __init__(self, key):
        self.key = key


def pickled(value, array=None, python2=False):
    """A pickle of protocol 2; `array` turns NumPy arrays into `Call`s."""
    array = array or numpy_array

    def write(value):
        if isinstance(value, np.ndarray):
            value = array(value)
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str) and python2:
            return write(value.encode("latin-1"))
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        if isinstance(value, bytes) and not python2:
            return b"B" + struct.pack("<I", len(value)) + value
        if isinstance(value, bytes):
            return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<I", len(value))) + value
        if isinstance(value, tuple):
            return b"(" + b"".join(map(write, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(write(part) for item in value.items() for part in item) + b"u"
        if isinstance(value, Global):
            return f"c{value.module}\n{value.name}\n".encode()
        if isinstance(value, Call):
            state = b"" if value.state is None else write(value.state) + b"b"
            return write(value.function) + write(tuple(value.arguments)) + value.opcode + state
        if isinstance(value, Reference):
            return write(value.key) + b"Q"
        if isinstance(value, Raw):
            return value.instructions
        raise TypeError(value)

    return b"\x80\x02" + write(value) + b"."


def numpy_array(value, core="numpy.core"):
    """As every NumPy pickles an array."""
    kind = value.dtype.str[1:]
    order = value.dtype.str[0]
    dtype = Call("numpy.dtype", (kind, 0, 1), (3, order, None, None, None, -1, -1, 0))
    fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    state = (1, value.shape, dtype, fortran, value.tobytes("F" if fortran else "C"))
    return Call(f"{core}.multiarray._reconstruct", (Global("numpy.ndarray"), (0,), b"b"), state)


def write_caffe2(path, arrays, flat=False):
    path.write_bytes(pickled(arrays if flat else {"blobs": arrays}, python2=True))


# torch

_STORAGES = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long", "i4": "Int", "u1": "Byte", "b1": "Bool"}


class TorchArrays:
    """Turns arrays into torch's tensors, each in a storage of its own."""

    def __init__(self):
        self.storages = []

    def __call__(self, array):
        storage = f"torch.{_STORAGES[array.dtype.str[1:]]}Storage"
        key = str(len(self.storages))
        self.storages.append(np.ascontiguousarray(array).tobytes())
        strides = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides)
        return tensor(storage, key, array.size, 0, array.shape, strides if array.ndim else (), self.view())

    def view(self):
        return ()


class LegacyArrays(TorchArrays):
    def view(self):
        return (None,)


def tensor(storage, key, size, offset, shape, strides, view=()):
    reference = Reference(("storage", Global(storage), key, "cpu", size, *view))
    hooks = Call("collections.OrderedDict")
    return Call("torch._utils._rebuild_tensor_v2", (reference, offset, shape, strides, False, hooks))


def ordered(items):
    """A state dictionary as torch pickles it: with notes on the side."""

    class Ordered(Call):
        pass

    return Ordered("collections.OrderedDict", ([[key, value] for key, value in items.items()],), {"_metadata": {}})


def write_torch(path, tree, compression=zipfile.ZIP_STORED, storages=None):
    arrays = TorchArrays()
    data = pickled(tree, arrays)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, raw in enumerate(storages or arrays.storages):
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")


def write_torch_legacy(path, tree, names=None):
    arrays = LegacyArrays()
    data = pickled(tree, arrays)
    keys = [str(key) for key in range(len(arrays.storages))][::-1]
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    content = magic + pickled(1001) + pickled(machine) + data + pickled(names or keys)
    for key in keys:
        # The pickle names the size in numbers; every test array of a legacy file is float32.
        content += struct.pack("<q", len(arrays.storages[int(key)]) // 4) + arrays.storages[int(key)]
    path.write_bytes(content)


# Others


def write_safetensors(path, arrays, low_byte=None):
    """`low_byte`: what the file is to begin with, the length of the header modulo 256; spaces fill it up."""
    codes = {"f4": "F32", "f8": "F64", "f2": "F16", "i8": "I64"}
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        part = np.ascontiguousarray(array).tobytes()
        offsets = [len(raw), len(raw) + len(part)]
        header[name] = {"dtype": codes[array.dtype.str[1:]], "shape": array.shape, "data_offsets": offsets}
        raw += part
    header = json.dumps(header).encode()
    if low_byte is not None:
        header += b" " * ((low_byte - len(header)) % 256)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)


def write_hdf5(path, arrays, split=False):
    """Keras' legacy format: names of `layer/weight`."""
    layers = {}
    for name, array in arrays.items():
        layer, _, weight = name.partition("/")
        layers.setdefault(layer, {})[f"{layer}_1/{weight}:0"] = array
    with h5py.File(path, "w") as file:
        names = [layer.encode() for layer in layers]
        if split:
            file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:2], names[2:]
        else:
            file.attrs["layer_names"] = names
        for layer, weights in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [weight.encode() for weight in weights]
            for weight, array in weights.items():
                group[weight] = array


# Names. From ours to theirs, the other way round than the readers go.

_TORCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_BRANCHES = {"1": "0", "2a": "1", "2b": "2", "2c": "3"}


def release_name(path):
    layer, weight = path.split("/", 1)
    ending = {"gamma": "s", "beta": "b", "moving_mean": "rm", "moving_variance": "riv", "kernel": "w", "bias": "b"}
    if "/" in weight:
        part, weight = weight.split("/")
        layer += {"norm": "_bn"}.get(part, "_" + part)
    return f"{layer}_{ending[weight]}"


def _parts(path):
    """stage, block, branch or part of the block, whether a norm's, weight."""
    layer, *part, weight = path.split("/")
    if layer.startswith("nonlocal"):
        stage, block = layer.removeprefix("nonlocal_conv").split("_")
        return int(stage), int(block), part[0], part[0] == "norm", weight
    stage, block, branch = layer.removeprefix("res").removesuffix("_bn").split("_")
    return int(stage), int(block), branch.removeprefix("branch"), layer.endswith("_bn"), weight


def _torch_weight(weight, norm):
    return _TORCH_NORM[weight] if norm else {"kernel": "weight", "bias": "bias"}[weight]


def pyslowfast_name(path):
    if path.startswith("pred/"):
        return "head.projection." + _torch_weight(path[5:], False)
    if path == "conv1/kernel":
        return "s1.pathway0_stem.conv.weight"
    if path.startswith("res_conv1_bn/"):
        return "s1.pathway0_stem.bn." + _TORCH_NORM[path.split("/")[1]]
    stage, block, part, norm, weight = _parts(path)
    weight = _torch_weight(weight, norm)
    if path.startswith("nonlocal"):
        return f"s{stage}.pathway0_nonlocal{block}.{'bn' if norm else 'conv_' + part}.{weight}"
    branch = {"1": "branch1", "2a": "branch2.a", "2b": "branch2.b", "2c": "branch2.c"}[part]
    return f"s{stage}.pathway0_res{block}.{branch}{'_bn' if norm else ''}.{weight}"


def mmaction2_name(path, pooled=True):
    if path.startswith("pred/"):
        return "cls_head.fc_cls." + _torch_weight(path[5:], False)
    if path == "conv1/kernel":
        return "backbone.conv1.conv.weight"
    if path.startswith("res_conv1_bn/"):
        return "backbone.conv1.bn." + _TORCH_NORM[path.split("/")[1]]
    stage, block, part, norm, weight = _parts(path)
    weight = _torch_weight(weight, norm)
    start = f"backbone.layer{stage - 1}.{block}."
    if path.startswith("nonlocal"):
        sequence = ".0" if pooled and part in ("phi", "g") else ""
        part = {"norm": "conv_out.bn", "out": "conv_out.conv"}.get(part, f"{part}{sequence}.conv")
        return f"{start}non_local_block.{part}.{weight}"
    part = {"1": "downsample", "2a": "conv1", "2b": "conv2", "2c": "conv3"}[part]
    return f"{start}{part}.{'bn' if norm else 'conv'}.{weight}"


def torchvision_name(path):
    if path.startswith("pred/"):
        return "fc." + _torch_weight(path[5:], False)
    if path == "conv1/kernel":
        return "conv1.weight"
    if path.startswith("res_conv1_bn/"):
        return "bn1." + _TORCH_NORM[path.split("/")[1]]
    stage, block, part, norm, weight = _parts(path)
    start, weight = f"layer{stage - 1}.{block}.", _torch_weight(weight, norm)
    if part == "1":
        return f"{start}downsample.{int(norm)}.{weight}"
    return f"{start}{'bn' if norm else 'conv'}{_BRANCHES[part]}.{weight}"


def keras_name(path, block_name="conv{stage}_block{block}", offsets=(0, 1)):
    layer, weight = path.split("/")
    if layer in ("pred", "conv1", "res_conv1_bn"):
        return {"pred": "predictions", "conv1": "conv1_conv", "res_conv1_bn": "conv1_bn"}[layer] + "/" + weight
    stage, block, part, norm, weight = _parts(path)
    start = block_name.format(stage=stage + offsets[0], block=block + offsets[1])
    return f"{start}_{_BRANCHES[part]}_{'bn' if norm else 'conv'}/{weight}"


def keras_hub_name(path):
    return keras_name(path, "stack{stage}_block{block}", (-2, 0))


def keras3_name(path):
    order = ("gamma", "beta", "moving_mean", "moving_variance") if "/norm/" in path or "_bn/" in path else None
    layer, weight = path.rsplit("/", 1)
    return f"{layer}/{(order or ('kernel', 'bias')).index(weight)}"


NAMES = {
    "release": release_name,
    "pyslowfast": pyslowfast_name,
    "mmaction2": mmaction2_name,
    "torchvision": torchvision_name,
    "keras_applications": keras_name,
    "keras_hub": keras_hub_name,
    "keras3": keras3_name,
}


def convolution_shape(path):
    """T, H, W, I, O of a small kernel, no two of which are the same."""
    return (2, 3, 4, 5, 6) if path != "conv1/kernel" else (5, 7, 4, 3, 6)


def file_of(format, paths, image=False, seed=0):
    """`(arrays of a file, what they are here)` for the weights here; channels are few."""
    rng, arrays, expected = np.random.default_rng(seed), {}, {}
    keras = format.startswith("keras")
    for path in paths:
        if not path.endswith("/kernel"):
            ours = theirs = rng.normal(size=6).astype("float32")
        elif path.startswith(("pred", "nonlocal")):
            ours = rng.normal(size=(4, 6)).astype("float32")
            theirs = ours if keras else np.einsum("io->oi", ours)
            if path.startswith("nonlocal") and not keras:
                theirs = theirs[..., None, None, None]
        else:
            t, *shape = convolution_shape(path)
            ours = rng.normal(size=(1 if image else t, *shape)).astype("float32")
            theirs = ours if format == "keras3" else ours[0] if keras else np.einsum("thwio->oithw", ours)
            if image and not keras:
                theirs = theirs[:, :, 0]
        arrays[NAMES[format](path)], expected[path] = np.ascontiguousarray(theirs), ours
    return arrays, expected
