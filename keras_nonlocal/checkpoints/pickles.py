"""Pickles of arrays, read without running anything of theirs.

A pickle is a program for a small machine whose instructions may call, and set attributes of, whatever the file names.
This is such a machine without those powers: a name that the file asks for is looked up in a table here, never
imported, and what stands in the table makes arrays, containers, or objects that do nothing.
"""

import dataclasses
import math
import pickletools
import re
import reprlib
import struct

import numpy as np


class Refusal(ValueError):
    """A file that is not read, and why."""


# How messages show what a file holds, and errors that quote it: in part, as few bytes of pickle can nest lists whose
# whole text fills any memory.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100
shown = _SHORT.repr


def is_shape(sizes):
    """Whether a tuple is the shape of an array: so few and so small numbers that their product is made in no time."""
    return isinstance(sizes, tuple) and len(sizes) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in sizes)


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the file asked for, and the function that stands for it here."""

    name: str
    make: object


class Inert:
    """Stands for an object of a harmless class that is no weight. Takes everything, does nothing."""


class Array:
    """A NumPy array of the file. Its values come after the object itself."""

    value = None

    def build(self, state):
        """Takes the state that NumPy's `__setstate__` would."""
        _, shape, dtype, fortran, raw = state if len(state) == 5 else (None, *state)
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


class DType:
    """A NumPy dtype of the file: integers, floats and booleans only."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248]|b1|\?)", code):
            raise Refusal(f"The file must hold arrays of plain numbers, and has one of dtype {shown(code)}.")
        self.value = np.dtype(code)

    def build(self, state):
        """Takes the byte order of the state that NumPy's `__setstate__` would."""
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise Refusal(f"The file must hold arrays of plain numbers, and has a byte order {shown(order)}.")
        self.value = self.value.newbyteorder(order)


@dataclasses.dataclass
class Storage:
    """The numbers that tensors of a torch file lie in."""

    key: str
    dtype: str
    size: int


@dataclasses.dataclass
class Tensor:
    """A tensor of a torch file: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple

    def __post_init__(self):
        fits = all(map(is_shape, (self.shape, self.strides, (self.offset,)))) and len(self.shape) == len(self.strides)
        if fits and 0 not in self.shape:
            last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
            # Steps of 0 could make any number of elements out of one.
            fits = last < self.storage.size and math.prod(self.shape) <= self.storage.size
        if not fits:
            raise Refusal(
                f"The tensors must lie in their storages; one of shape {shown(self.shape)} and strides "
                f"{shown(self.strides)} from {shown(self.offset)} on does not in one of {self.storage.size} elements."
            )


def _array(raw, dtype, shape, order):
    if isinstance(raw, str):  # Python 2 had no bytes
        raw = raw.encode("latin-1")
    if not isinstance(dtype, DType) or not is_shape(shape) or order not in ("C", "F"):
        raise ValueError("not the parts of an array")
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise ValueError(f"{len(raw)} bytes are no array of shape {shape} and dtype {dtype.value}")
    return np.frombuffer(raw, dtype.value).reshape(shape, order=order)


def _frombuffer(raw, dtype, shape, order="C"):
    array = Array()
    array.value = _array(raw, dtype, shape, order)
    return array


def _encode(text, encoding="latin1"):
    if encoding not in ("latin1", "latin-1"):
        raise Refusal(f"The file asks for the text encoding {shown(encoding)}, which makes no array.")
    return text.encode("latin-1")


def _dictionary(items=()):
    return _update({}, [part for key, value in items for part in (key, value)])


# What copies its first argument, and is charged for its length.
_COPYING = (_encode, _dictionary, _frombuffer)


def _tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return Tensor(storage, offset, shape, strides)


def _parameter(data, *_):
    return data


_NUMPY = {
    "_codecs.encode": _encode,
    "collections.OrderedDict": _dictionary,
    "numpy.dtype": DType,
    "numpy.ndarray": None,  # an argument of `_reconstruct`, which needs it no more
}
for _package in ("numpy.core", "numpy._core"):
    _NUMPY[f"{_package}.multiarray._reconstruct"] = lambda *_: Array()
    _NUMPY[f"{_package}.multiarray.scalar"] = lambda dtype, raw: _frombuffer(raw, dtype, ())
    _NUMPY[f"{_package}.numeric._frombuffer"] = _frombuffer

# What torch files hold beside their weights: settings, logs, states of optimizers.
_HARMLESS = (
    """
    argparse.Namespace copyreg._reconstructor copy_reg._reconstructor collections.Counter collections.deque
    datetime.date datetime.datetime datetime.timedelta datetime.timezone
    pathlib.Path pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib._local.PosixPath
    torch.Size torch.device torch.dtype torch.float torch.float16 torch.float32 torch.float64 torch.bfloat16
    addict.addict.Dict fvcore.common.config.CfgNode yacs.config.CfgNode
    mmcv.utils.config.Config mmcv.utils.config.ConfigDict
    mmengine.config.config.Config mmengine.config.config.ConfigDict mmengine.logging.history_buffer.HistoryBuffer
""".split()
    + [
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in "bool bytearray bytes complex dict float frozenset int list long object set slice str tuple".split()
    ]
)

STORAGES = {
    "torch.BFloat16Storage": "bfloat16",
    "torch.BoolStorage": "|b1",
    "torch.ByteStorage": "|u1",
    "torch.CharStorage": "|i1",
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.IntStorage": "<i4",
    "torch.LongStorage": "<i8",
    "torch.ShortStorage": "<i2",
}

# Name that a file may ask for → what is called in its place. `None`: may be named, not called.
CAFFE2 = _NUMPY
TORCH = {
    **{name: lambda *_: Inert() for name in _HARMLESS},
    **_NUMPY,
    **dict.fromkeys(STORAGES),
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
}


def _storage(saved):
    """The storage that a torch file refers to by `("storage", type, key, location, size, …)`."""
    if not isinstance(saved, tuple) or not 5 <= len(saved) <= 6:
        raise ValueError("no reference to a storage")
    kind, storage_type, key, _, size = saved[:5]
    if kind != "storage" or not isinstance(storage_type, Global) or storage_type.name not in STORAGES:
        raise ValueError("a reference to something else than a storage")
    if not isinstance(key, str) or len(key) > 100:
        raise ValueError(f"a storage of the name {shown(key)}")
    if not is_shape((size,)) or saved[5:] not in ((), (None,)):
        raise ValueError("a storage of no size, or a view of one")
    return Storage(key, STORAGES[storage_type.name], size)


def load(data, table, reference=None):
    """What a pickle holds: plain containers with `Array`, `Tensor` and `Inert` objects.

    Args:
        data: Binary file object in memory; it is left behind the pickle's end.
        table: The names that the pickle may ask for, `CAFFE2` or `TORCH`.
        reference: Function that gives what the pickle refers to outside of itself; `None`: it may not.

    Raises:
        Refusal: if it asks for anything else, or is no whole pickle.
    """
    machine = _Machine(table, reference, 4 * data.getbuffer().nbytes)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        (result,) = machine.stack
        return result
    except Refusal:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error) as error:
        raise Refusal(f"The file is cut off or damaged: no whole pickle ({shown(error)}).") from error


def load_torch(data, storages):
    """What a pickle of torch's holds. The storages that it refers to are added to the dictionary `storages`."""

    def reference(saved):
        storage = _storage(saved)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two storages {storage.key}")
        return storage

    return load(data, TORCH, reference)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_NUMBERS_AND_STRINGS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
# What an instruction does to the objects since the last mark.
_FROM_MARK = {"LIST": list, "TUPLE": tuple, "FROZENSET": frozenset, "DICT": lambda items: _update({}, items)}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self, table, reference, budget):
        self.table, self.reference, self.budget = table, reference, budget
        self.stack, self.marks, self.memo = [], [], {}

    def step(self, name, argument):
        stack = self.stack
        if name in _NUMBERS_AND_STRINGS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _FROM_MARK:
            items = self.pop_mark()
            stack.append(_FROM_MARK[name](_hashable(items) if name == "FROZENSET" else items))
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(items[::-1]))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise Refusal(f"The file uses the pickle instruction {name}, which no array needs.")

    def charge(self, amount):
        """For what an instruction copies: as it can be recalled from the memo, a short file could make any number."""
        self.budget -= amount
        if self.budget < 0:
            raise Refusal("The file must be about as long as what it holds; it copies parts of itself time and again.")

    def pop_mark(self):
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self, _):
        self.marks.append(len(self.stack))

    def remember(self, key):
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def recall(self, key):
        self.stack.append(self.memo[key])

    def name(self, name):
        if name is None:
            name = [self.stack.pop(), self.stack.pop()][::-1]
        else:
            name = name.split(" ", 1)
        name = ".".join(name)
        if name not in self.table:
            name = shown(name)
            raise Refusal(f"The file asks for {name}, which is no array and no plain container; nothing was run.")
        self.stack.append(Global(name, self.table[name]))

    def call(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function.make is None or not isinstance(arguments, tuple):
            raise Refusal(f"The file calls {shown(getattr(function, 'name', function))}, which makes no array.")
        self.charge(len(arguments))
        if function.make in _COPYING and arguments:
            self.charge(len(arguments[0]))
        self.stack.append(function.make(*arguments))

    def call_with_names(self, _):
        self.stack.pop()  # arguments by name: only objects that do nothing have some
        self.call(None)

    def build(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (Array, DType)):
            self.charge(len(state[-1]) if isinstance(target, Array) else 0)
            target.build(state)
        elif not isinstance(target, (Inert, dict)):  # which drop it, a dictionary as it holds notes about the weights
            raise Refusal(f"The file sets attributes of a {type(target).__name__}.")

    def extend(self, items):
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_hashable(items))
        elif not isinstance(target, Inert):
            raise ValueError(f"items for a {type(target).__name__}")

    def update(self, items):
        target = self.stack[-1]
        if isinstance(target, dict):
            _update(target, items)
        elif not isinstance(target, Inert):
            raise ValueError(f"items for a {type(target).__name__}")

    def refer(self, key):
        key = self.stack.pop() if key is None else key
        if self.reference is None:
            raise Refusal("The file refers to something outside of itself.")
        self.stack.append(self.reference(key))

    def pop(self, _):
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()


def _update(target, items):
    target.update(zip(_hashable(items[::2]), items[1::2], strict=True))
    return target


def _hashable(items):
    # Small keys of plain types only: the hash of a nested one could exhaust the stack, that of a large one takes long.
    for item in items:
        if not isinstance(item, (str, bytes, int, float, type(None))):
            raise ValueError(f"a key of the type {type(item).__name__}")
        if (isinstance(item, int) and item.bit_length() > 64) or (isinstance(item, (str, bytes)) and len(item) > 10000):
            raise ValueError("a key of great length")
    return items


_ACTIONS = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "MARK": _Machine.mark,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "POP": _Machine.pop,
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.name),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "NEWOBJ_EX": _Machine.call_with_names,
    "BUILD": _Machine.build,
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_mark()),
    **dict.fromkeys(("PERSID", "BINPERSID"), _Machine.refer),
}
