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


def read_settings(file):
    """What `write_settings` has written into an open HDF5 file, or nothing."""
    return _with_tuples(json.loads(file.attrs.get(SETTINGS, "{}")))


def _with_tuples(value):
    if isinstance(value, dict):
        return {name: _with_tuples(part) for name, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def datasets(group, names=()):
    """`(name, dataset)` of every variable below a group: the names of its layers, then its number in the last one."""
    variables = group.get("vars")
    if variables is not None:
        names = (*names, str(variables.attrs.get("name", group.name.split("/")[-1])))
        for number, dataset in variables.items():
            yield "/".join((*names, number)), dataset
    for name, part in group.items():
        if name != "vars" and hasattr(part, "items"):
            yield from datasets(part, names)


def convolution(array):
    """(T, H, W, I, O), as it is."""
    if array.ndim != 5:
        raise ValueError("must have the axes (T, H, W, I, O)")
    return array


def _finish(weights, sources, rank):
    return {}


_BLOCK = r"nonlocal_conv\d_\d+"

FORMAT = Format(
    title="Keras",
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
