"""The state of a training on a disk: files that are whole or are not there, of which the newest sound one is read.

A checkpoint is an `.npz` file of all variables and of a JSON text with the rest. Its name says the step, the epoch and
the checksum of the whole file: `step-000001000-epoch-0003-0123456789abcdef.npz`.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import uuid

import keras
import numpy as np

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

FORMAT = 1
_NAME = re.compile(r"step-(\d{9,})-epoch-(\d{4,})-([0-9a-f]{16})\.npz")
_STATE = "state"

_LOGGER = logging.getLogger("keras_nonlocal")


class TrainingError(ValueError):
    """A training cannot go on: its loss or weights are not finite, or none of its checkpoints can be read."""


class Checkpoints:
    """The checkpoints of one training.

    Args:
        directory: String or path-like, where the files are. It is made when the first is written.
        num_kept: Integer, how many of the newest ones are kept.

    Example:

    >>> import tempfile, keras, numpy as np
    >>> variable = keras.Variable(np.zeros(2, "float32"))
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), num_kept=2)
    >>> for step in range(5):
    ...     _ = variable.assign([step, 0])
    ...     path = checkpoints.write([variable], {"step": step, "epoch": 0})
    >>> [path.name[:14] for path in checkpoints.paths()]
    ['step-000000003', 'step-000000004']
    >>> _ = variable.assign([7, 7])
    >>> state = checkpoints.read(checkpoints.newest(), [variable])
    >>> state["step"], keras.ops.convert_to_numpy(variable).tolist()
    (4, [4.0, 0.0])
    """

    def __init__(self, directory, num_kept=3):
        self.directory = pathlib.Path(directory)
        self.num_kept = num_kept

    def paths(self):
        """The files there are, from the oldest to the newest."""
        if not self.directory.is_dir():
            return []
        found = [(_NAME.fullmatch(path.name), path) for path in self.directory.iterdir()]
        return [path for _, path in sorted((_rank(match), path) for match, path in found if match)]

    @contextlib.contextmanager
    def locked(self):
        """A block in which no other process may lock them: two would delete each other's. A killed one holds no lock.

        Raises:
            TrainingError: If another process has locked them.
        """
        if fcntl is None:
            yield
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainingError(
                    f"No other process may train in this directory. Received: directory={str(self.directory.parent)!r}"
                ) from error
            except OSError as error:  # a file system that knows no locks
                _LOGGER.warning("Cannot lock %s: %s", self.directory, error)
            yield

    def write(self, variables, state):
        """Writes a checkpoint and deletes those that are too many.

        Args:
            variables: List of Keras variables.
            state: Dict for JSON, with the integers `"step"` and `"epoch"`, by which checkpoints are ordered.

        Returns:
            The path of the file.

        Raises:
            TrainingError: If a value of a variable is not finite. Then nothing is written.
        """
        arrays = {}
        for number, variable in enumerate(variables):
            array = keras.ops.convert_to_numpy(variable)
            if array.dtype.kind == "V":  # bfloat16 and its like, which NumPy's files do not know
                array = array.astype("float32")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise TrainingError(
                    f"The weights must be finite to be kept at step {state['step']}. "
                    f"Received: {int((~np.isfinite(array)).sum())} of {array.size} values of {variable.path} are not"
                )
            arrays[f"{number:05d}/{variable.path}"] = array
        text = json.dumps({"format": FORMAT, **state})
        arrays[_STATE] = np.frombuffer(text.encode(), "uint8")

        self.directory.mkdir(parents=True, exist_ok=True)
        # Not `whole_file`: the name is known when the content is, and the content is to outlast a power failure.
        scratch = self.directory / f".{uuid.uuid4().hex}.partial"
        try:
            with open(scratch, "w+b") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
                name = f"step-{state['step']:09d}-epoch-{state['epoch']:04d}-{_checksum(file)}.npz"
            path = self.directory / name
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        _sync_directory(self.directory)
        self._clean(path)
        return path

    def _clean(self, newest):
        """Deletes old checkpoints, and what a killed process or a damaged disk left."""
        paths = self.paths()
        # What stands after the newest could not be read, or this one would not have been written.
        kept = paths[: paths.index(newest) + 1][-self.num_kept :]
        for path in [*paths, *self.directory.glob(".*.partial")]:
            if path not in kept:
                path.unlink(missing_ok=True)

    def newest(self):
        """The newest checkpoint that is sound; damaged ones are logged as warnings.

        Returns:
            Its path, or `None` if there is no checkpoint.

        Raises:
            TrainingError: If there are checkpoints and all are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            with open(path, "rb") as file:
                checksum = _checksum(file)
            if checksum == _NAME.fullmatch(path.name)[3]:
                return path
            _LOGGER.warning("Passed over a damaged checkpoint: %s has the checksum %s.", path, checksum)
        if paths:
            raise TrainingError(
                "At least one checkpoint must be sound. Delete them to start anew. "
                f"Received: {len(paths)} damaged ones in {str(self.directory)!r}"
            )
        return None

    @staticmethod
    def rank(path):
        """The step and the epoch of a checkpoint, by which they are ordered."""
        return _rank(_NAME.fullmatch(path.name))

    def read(self, path, variables):
        """Reads a checkpoint into `variables`.

        Args:
            path: What `newest` returns.
            variables: List of Keras variables, of the shapes and in the order of those that were written.

        Returns:
            Its state.

        Raises:
            ValueError: If it is of other variables.
        """
        with open(path, "rb") as file:
            return _read(file, path, variables)


def _rank(match):
    return int(match[1]), int(match[2])


def _checksum(file):
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _read(file, path, variables):
    with np.load(file, allow_pickle=False) as content:
        arrays = dict(content)
    state = json.loads(arrays.pop(_STATE).tobytes())
    if state.pop("format") != FORMAT:
        raise ValueError(f"A checkpoint must be of format {FORMAT}. Received: {str(path)!r}")
    # All are compared before one is changed. Not by their names: Keras numbers those of a process.
    pairs = itertools.zip_longest(arrays.items(), variables)
    for (name, array), variable in ((was or (None, None), now) for was, now in pairs):
        if name is None or variable is None or array.shape != tuple(variable.shape):
            was = "no more" if name is None else f"{name.partition('/')[2]} of shape {array.shape}"
            now = "no more" if variable is None else f"{variable.path} of shape {tuple(variable.shape)}"
            raise ValueError(
                "The checkpoints must be of this model and optimizer, or the directory a new one: there is "
                f"{was} where the model has {now}. Received: {str(path)!r}"
            )
    for array, variable in zip(arrays.values(), variables, strict=True):
        variable.assign(array)
    return state


def _sync_directory(directory):
    """The new name too must be on the disk."""
    with contextlib.suppress(OSError):  # Windows cannot open directories
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
