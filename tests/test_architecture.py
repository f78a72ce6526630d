"""The doors of the house: who may import whom. Reads the sources, imports nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "keras_nonlocal"

# What stands left in the chain, then what stands beside it.
OPEN = ("_version", "files")  # to all: the version, and how a file is written whole
TOOLS = ("training", "evaluation", "export", "visualization", "tuning")
CORE = ("ops", "normalization", "layers", "applications")
DOORS = {
    "": set(CORE),  # the package's own __init__
    "ops": set(),
    "normalization": set(),
    "layers": {"ops", "normalization"},
    "applications": {"ops", "normalization", "layers", "checkpoints"},
    **{tool: {*CORE} for tool in TOOLS},
    "export": {*CORE, "data"},  # an exported graph samples, resizes and crops by the same functions as the datasets
    "training": {*CORE, "data"},  # a recipe says the clips too, and one function trains by it
    "cli": {*CORE, *TOOLS, "checkpoints", "data"},
    "checkpoints": set(),
    "data": set(),
    **{room: set() for room in OPEN},
}
# Rooms or modules that may import it. The commands load exports and name the errors that come out of tf.data.
TENSORFLOW = ("data", "export", "cli", "training.distribution")
OPTIONAL = {
    "cv2",
    "h5py",
    "jax",
    "keras_tuner",
    "matplotlib",
    "onnx",
    "openvino",
    "pandas",
    "PIL",
    "scipy",
    "sklearn",
    "tensorboard",
    "tensorflow_io",
    "tensorflow_datasets",
    "tf2onnx",
    "torch",
    "av",
}


def imported_modules(tree, module, is_package):
    """`(line, module)` of every import, relative ones resolved, also inside of functions.

    `from a import b` gives both `a` and `a.b`: b may be a module.
    """
    parts = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = []
            if node.level:
                base = parts[: len(parts) - node.level + is_package]
            base = ".".join([*base, *([node.module] if node.module else [])])
            if base != PACKAGE:
                yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func)
            if name in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def keras_src(tree):
    """Lines that reach into `keras.src` through an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("keras.src"):
            yield node.lineno, "keras.src"


def private_attributes(tree):
    """Names that begin with an underscore, of anything but the own class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                yield ast.unparse(node)


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(root):
    """`file:line imports module: why not` of every import through no door."""
    found = []
    for file in sorted((root / PACKAGE).rglob("*.py")):
        path = file.relative_to(root)
        is_package = path.name == "__init__.py"
        module = ".".join(path.with_suffix("").parts[: -1 if is_package else None])
        tree = ast.parse(file.read_text(), str(file))
        imports = sorted({*imported_modules(tree, module, is_package), *keras_src(tree)})
        for line, imported in imports:
            reason = refusal(module, imported)
            if reason:
                found.append(f"{path}:{line} imports {imported}: {reason}")
    return found


def refusal(module, imported):
    """Why `module` may not import `imported`, or `None`."""
    room, top = room_of(module), imported.split(".")[0]
    if room not in DOORS:
        return f"the room {room!r} is not in the plan"
    if imported == "keras.src" or imported.startswith("keras.src."):
        return "keras.src is private"
    if top == "tensorflow" and not {room, module.partition(".")[2]} & {*TENSORFLOW}:
        return f"TensorFlow may be imported in {', '.join(TENSORFLOW)} only"
    if top in OPTIONAL and room in ("", *CORE):
        return f"{room or 'the package'} needs no optional package"
    if top == PACKAGE:
        other = room_of(imported)
        if other in (room, *OPEN, "__version__"):
            return None
        if other not in DOORS or not other:
            return "the package itself opens to every room; import from the room"
        if other not in DOORS[room]:
            return f"no door from {room or 'the package'!r} to {other!r}"
    return None


def test_doors():
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_keras_is_public():
    found = {
        (file.name, name)
        for room in CORE
        for file in [*(ROOT / PACKAGE).glob(f"{room}.py"), *(ROOT / PACKAGE).glob(f"{room}/*.py")]
        for name in private_attributes(ast.parse(file.read_text()))
    }
    assert found == {("transfer.py", "layer._output_shape")}  # which has no public name


def test_every_room_is_in_the_plan():
    for path in (ROOT / PACKAGE).iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert path.stem in DOORS or path.stem == "__init__", path


# The guard must be seen to fail.

BAD = [
    ("ops.py", "import tensorflow as tf", "tensorflow", "TensorFlow may be imported"),
    ("layers.py", "from tensorflow.keras import layers", "tensorflow.keras", "TensorFlow may"),
    ("training.py", "def f():\n    import tensorflow", "tensorflow", "TensorFlow may"),
    ("training/loop.py", "def f():\n    import tensorflow", "tensorflow", "TensorFlow may"),
    ("ops.py", "import keras.src", "keras.src", "private"),
    ("export/formats.py", "from keras.src.backend import config", "keras.src.backend", "private"),
    ("data/clips.py", "from keras import src", "keras.src", "private"),
    ("tuning.py", "import keras\nx = keras.src.ops", "keras.src", "private"),
    ("ops.py", "from keras_nonlocal import layers", "keras_nonlocal.layers", "no door"),
    ("ops.py", "from keras_nonlocal.layers import NonLocal1D", "keras_nonlocal.layers", "no door"),
    ("ops.py", "from . import layers", "keras_nonlocal.layers", "no door"),
    (
        "layers.py",
        "from .applications.resnet import build",
        "keras_nonlocal.applications",
        "no door",
    ),
    ("applications/resnet.py", "from ..training import fit", "keras_nonlocal.training", "no door"),
    ("applications/resnet.py", "from .. import data", "keras_nonlocal.data", "no door"),
    ("applications/__init__.py", "from ..cli import main", "keras_nonlocal.cli", "no door"),
    ("training.py", "import keras_nonlocal.evaluation", "keras_nonlocal.evaluation", "no door"),
    (
        "training.py",
        "from keras_nonlocal import checkpoints",
        "keras_nonlocal.checkpoints",
        "no door",
    ),
    ("evaluation.py", "from keras_nonlocal.data import read", "keras_nonlocal.data", "no door"),
    ("data/clips.py", "from ..export import saved_model", "keras_nonlocal.export", "no door"),
    ("data/clips.py", "from ..layers import NonLocal1D", "keras_nonlocal.layers", "no door"),
    ("checkpoints/caffe2.py", "from .. import ops", "keras_nonlocal.ops", "no door"),
    ("__init__.py", "from keras_nonlocal.data import read", "keras_nonlocal.data", "no door"),
    ("__init__.py", "from .cli import main", "keras_nonlocal.cli", "no door"),
    ("layers.py", "import matplotlib.pyplot as plt", "matplotlib.pyplot", "no optional"),
    ("applications/transfer.py", "import torch", "torch", "no optional"),
    ("applications/transfer.py", "def f():\n    from jax import numpy", "jax", "no optional"),
    (
        "ops.py",
        "import importlib\nimportlib.import_module('tensorflow_io')",
        "tensorflow_io",
        "no optional",
    ),
    ("ops.py", "import keras_nonlocal", "keras_nonlocal", "opens to every room"),
    (
        "data/clips.py",
        "from keras_nonlocal import NonLocal3D",
        "keras_nonlocal.NonLocal3D",
        "opens",
    ),
    ("kitchen.py", "import numpy", "numpy", "not in the plan"),
]


@pytest.mark.parametrize(("file", "source", "imported", "reason"), BAD)
def test_bad_imports_are_found(tmp_path, file, source, imported, reason):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text("\n\n" + source + "\n")
    found = violations(tmp_path)
    line = 3 + source.count("\n")
    assert found
    assert any(text.startswith(f"{PACKAGE}/{file}:{line} imports {imported}") and reason in text for text in found), (
        found
    )


GOOD = [
    ("layers.py", "from keras_nonlocal import ops"),
    ("layers.py", "from . import ops"),
    ("applications/resnet.py", "from keras_nonlocal.applications.folded import Conv3D"),
    ("applications/resnet.py", "from .folded import Conv3D"),
    ("applications/resnet.py", "from .. import checkpoints"),
    ("applications/resnet.py", "from ..checkpoints import caffe2"),
    ("export/saved_model.py", "import tensorflow as tf\nfrom keras_nonlocal.data.resizing import resized_size"),
    ("data/clips.py", "import tensorflow as tf\nimport av\nfrom . import decode"),
    ("training/distribution.py", "def f():\n    import tensorflow, jax"),
    ("visualization.py", "import matplotlib"),
    ("cli.py", "from . import data, training, checkpoints, export"),
    ("ops.py", "import dataclasses\nimport keras\nfrom keras import ops"),
]


@pytest.mark.parametrize(("file", "source"), GOOD)
def test_good_imports_pass(tmp_path, file, source):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    assert violations(tmp_path) == []


def test_importing_the_package_is_light():
    """What a user of a layer pays for: nothing of data, no optional package."""
    import subprocess
    import sys

    code = (
        "import sys, keras; before = set(sys.modules); "
        "import keras_nonlocal, keras_nonlocal.applications; "
        "print(*set(sys.modules) - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    modules = set(result.stdout.split())
    rooms = {room_of(name) for name in modules if name.startswith(PACKAGE)}
    assert rooms == {"", "_version", "ops", "normalization", "layers", "checkpoints", "applications"}
    assert not {name.split(".")[0] for name in modules} & (OPTIONAL | {"tensorflow"})
