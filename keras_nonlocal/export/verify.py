"""An export as its users have it: every signature runs in a process that has neither Keras nor this package."""

import dataclasses
import json
import pathlib
import subprocess
import sys

from .saved_model import read_metadata, version_folder

_PROCESS = pathlib.Path(__file__).with_name("clean_process.py")


@dataclasses.dataclass(frozen=True)
class SignatureCheck:
    """What became of one signature.

    Attributes:
        signature: String, its name.
        inputs: Dict from the names of the inputs to dtype and shape, as text.
        outputs: Dict from the names of the outputs to dtype and shape, as text.
        seconds: Float, how long the call took, the first of its kind.
        problem: String that says what is wrong, or `None`.
    """

    signature: str
    inputs: dict
    outputs: dict
    seconds: float
    problem: str | None


def verify_saved_model(path, timeout=None):
    """Runs every signature of an export in a clean process, in which importing Keras or this package is an error.

    The inputs are random pixels, the same for all signatures. The outputs must be finite and have the shapes that the
    export's metadata name; scores must lie in 0..1 where the network ends in a softmax or sigmoid, and add up to 1
    where in a softmax; `float` and `classify` must agree with `serving_default`.

    Args:
        path: A model's folder that `export_saved_model` wrote, of which the newest version is verified, or the folder
            of a version.
        timeout: Seconds after which the process is ended, which is a problem of the signature that ran. `None`: never.

    Returns:
        List of `SignatureCheck`, one for each signature that the metadata name, and one for each that is there beside
        them. Where the export cannot be loaded, all have that problem.

    Raises:
        ValueError: If there is no export.

    Example:

    >>> import keras, tempfile
    >>> from keras_nonlocal.export import export_saved_model
    >>> inputs = keras.Input((None, None, None, 3))
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
    >>> path = export_saved_model(model, tempfile.mkdtemp() + "/colours")
    >>> [(check.signature, check.problem) for check in verify_saved_model(path)]
    [('serving_default', None), ('float', None), ('jpeg', None)]
    """
    folder = version_folder(path)
    metadata = read_metadata(folder)
    command = [sys.executable, "-P", str(_PROCESS), str(folder.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        output, ending = done.stdout, f"the process ended with code {done.returncode}"
        if done.returncode > 0:  # a Python error; a signal leaves no words
            ending += f": {done.stderr.strip().splitlines()[-1]}"
    except subprocess.TimeoutExpired as error:
        output, ending = (error.stdout or b"").decode(), f"not done after {timeout} seconds"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    checks = {row["signature"]: SignatureCheck(**row) for row in rows}
    for name in metadata["signatures"]:
        checks.setdefault(name, SignatureCheck(name, {}, {}, 0.0, ending))
    return list(checks.values())
