"""Weight files that Keras 3 wrote of the networks in here.

Keras' own loader goes by the classes and the order of layers, and puts a non-local block of one place into any other.
Here, layers are found by their names.
"""

import json

from keras_nonlocal.checkpoints.tables import Format, keras_dense, vector

# Attribute of an HDF5 file with the arguments that a builder needs for it, as JSON.
SETTINGS = "keras_nonlocal_settings"


def write_settings(path, settings):
    """Adds the arguments that a builder needs for a `.weights.h5` file to it."""
    import h5py

    with h5py.File(path, "r+") as file:
        file.attrs[SETTINGS] = json.dumps(settings)


def _finish(weights, sources, rank, texts):
    settings = json.loads(texts.get(SETTINGS, "{}"))
    if not isinstance(settings, dict):
        raise ValueError(f"The attribute {SETTINGS!r} must be a dictionary in JSON.")
    return _with_tuples(settings)


def _with_tuples(value):
    if isinstance(value, dict):
        return {name: _with_tuples(part) for name, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def convolution(array):
    """(T, H, W, I, O), as it is."""
    if array.ndim != 5:
        raise ValueError("must have the axes (T, H, W, I, O)")
    return array


_BLOCK = r"nonlocal_conv\d_\d+"

FORMAT = Format(
    signature="res2_0_branch2a/0",
    rows=(
        (rf"(?P<layer>\w+_bn|{_BLOCK}/norm)/(?P<norm>[0-3])", "{layer}/{norm}", vector),
        (rf"(?P<layer>{_BLOCK})/0", "{layer}/score_kernel", keras_dense),
        (rf"(?P<layer>pred|{_BLOCK}/(theta|phi|g|out))/0", "{layer}/kernel", keras_dense),
        (rf"(?P<layer>pred|{_BLOCK}/(theta|phi|g|out))/1", "{layer}/bias", vector),
        (r"(?P<layer>conv1|res\d_\d+_branch\w+)/0", "{layer}/kernel", convolution),
    ),
    words={"norm": dict(zip("0123", ("gamma", "beta", "moving_mean", "moving_variance"), strict=True)).get},
    ignored=((r"dropout/.*", "a state of random numbers"),),
    finish=_finish,
)
