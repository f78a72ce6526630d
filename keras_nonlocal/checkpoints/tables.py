"""What the tables of the formats are made of, and the conversion that reads them.

Shape letters: T, H, W the sizes of a kernel; I input channels, O output channels.
"""

import dataclasses
import re

import numpy as np


def has_image_kernels(weights, rank):
    """Whether a file is of an image network, where its kernels tell: they have no time axis."""
    return rank == 4


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to name the weights of a ResNet.

    Args:
        signature: The file's name of the first residual block's first kernel, by which the format is known.
        rows: `(pattern, target, layout)`: a regular expression of the file's names, the name here, in which groups of
            the expression stand in braces, and the function that gives an array the layout that it has here.
        words: Group of the expressions → function from what it matches to what stands for that here, or `None`.
        finish: Function of `weights`, `sources`, the rank of the file's kernels (4 where they have no time axis) and
            the strings that the file holds beside its weights, under their names. It adds to the former two what the
            file leaves unsaid, and returns the builder's arguments that the file fixes.
        ignored: `(pattern, reason)` of what is no weight of a network.
        images: Function of `weights` and that rank: whether the file is of an image network.
    """

    signature: str
    rows: tuple
    words: dict
    finish: object
    ignored: tuple = ()
    images: object = has_image_kernels

    def find(self, name):
        """`(name here, layout)` of a tensor, or `None`."""
        for pattern, target, layout in self.rows:
            match = re.fullmatch(pattern, name)
            if match:
                words = {key: self.words.get(key, str)(value) for key, value in match.groupdict().items()}
                if None not in words.values():
                    return target.format(**words), layout
        return None


def plain_name(name):
    """The name without what torch's wrappers of a model put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def convert(format, arrays, texts):
    """`(weights, sources, ignored, unknown, settings, images)` of the arrays of a file and of the strings beside them,
    by the table of a format."""
    weights, sources, ignored, unknown, rank = {}, {}, {}, {}, None
    for name, array in arrays.items():
        plain = plain_name(name)
        found = format.find(plain)
        reasons = [reason for pattern, reason in format.ignored if re.fullmatch(pattern, plain)]
        if found is not None:
            target, layout = found
            if target in weights:
                raise ValueError(f"{sources[target][0]!r} and {name!r} must not both be {target!r}.")
            try:
                if array.dtype.kind not in "biuf":
                    raise ValueError("must have real numbers")
                # A copy, so that nothing of the file stays in memory.
                weights[target] = np.array(layout(array), "float32", order="C")
            except ValueError as error:
                raise ValueError(
                    f"The tensor {name!r}, for {target!r}, {error}; it is {array.dtype} of the shape {array.shape}."
                ) from error
            sources[target] = (name,)
        elif reasons:
            ignored[name] = reasons[0]
        else:
            unknown[name] = tuple(array.shape)
        if plain == format.signature:
            rank = array.ndim
    settings = format.finish(weights, sources, rank, texts)
    return weights, sources, ignored, unknown, settings, format.images(weights, rank)


# Layouts. Their errors go on after "The tensor …".


def vector(array):
    """(O,), as it is."""
    if array.ndim != 1:
        raise ValueError("must have one axis")
    return array


def convolution(array):
    """(O, I, T, H, W) or (O, I, H, W) → (T, H, W, I, O)."""
    if array.ndim not in (4, 5):
        raise ValueError("must have the axes of a kernel, (O, I, T, H, W) or (O, I, H, W)")
    if array.ndim == 4:
        array = array[:, :, None]
    return array.transpose(2, 3, 4, 1, 0)


def dense(array):
    """(O, I), or a convolution of 1×1×1 → (I, O)."""
    if array.ndim < 2 or set(array.shape[2:]) - {1}:
        raise ValueError("must have the axes (O, I), with none but ones after them")
    return array.reshape(array.shape[:2]).transpose()


def keras_convolution(array):
    """(H, W, I, O) → (1, H, W, I, O)."""
    if array.ndim != 4:
        raise ValueError("must have the axes (H, W, I, O)")
    return array[None]


def keras_dense(array):
    """(I, O), as it is."""
    if array.ndim != 2:
        raise ValueError("must have the axes (I, O)")
    return array


# What several formats share.
EPSILON = 1e-5  # of the batch norms here
V1_5 = {"pixels": "torch", "stride_in_1x1": False}
TORCH_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}.get
BRANCH = {"0": "1", "1": "2a", "2": "2b", "3": "2c"}.get


def after(offset):
    """The function from a number in digits to the one `offset` later."""
    return lambda number: str(int(number) + offset)


def finish_v1_5(weights, sources, rank, texts):
    """For image networks of v1.5 whose tables say it all."""
    return dict(V1_5)


TORCH_IGNORED = ((r".*num_batches_tracked", "a counter of training steps"),)
