"""What `verify_saved_model` runs: a program that knows an export from its files alone.

It prints a JSON object a line for each signature.
"""

import json
import pathlib
import sys
import time


def check_signatures(folder):
    """Yields what became of each signature of a version, as a dict."""
    import numpy as np
    import tensorflow as tf

    metadata = json.loads((folder / "assets" / "metadata.json").read_text(encoding="utf-8"))
    names = folder / "assets" / "class_names.txt"
    names = names.read_text(encoding="utf-8").split("\n")[:-1] if names.exists() else []
    loaded = tf.saved_model.load(str(folder))
    inputs = _Inputs(metadata, np, tf)
    results = {}
    for name, described in metadata["signatures"].items():
        given, row = {}, {"signature": name, "inputs": {}, "outputs": {}, "seconds": 0.0}
        try:
            given = inputs.of(name, described)
            row["inputs"] = {key: _text(value, value.shape) for key, value in given.items()}
            start = time.perf_counter()
            results[name] = {key: value.numpy() for key, value in loaded.signatures[name](**given).items()}
            row["seconds"] = time.perf_counter() - start
            row["outputs"] = {key: _text(value, value.shape) for key, value in results[name].items()}
            row["problem"] = _problem(name, described, results, metadata["model"], names, np)
        except (KeyError, TypeError, ValueError, tf.errors.OpError) as error:
            row["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield row
    for name in set(loaded.signatures) - set(metadata["signatures"]):
        yield {"signature": name, "inputs": {}, "outputs": {}, "seconds": 0.0, "problem": "not in the metadata"}


class _Inputs:
    """Random inputs of valid shapes; frames that are resized come larger than they need to be."""

    def __init__(self, metadata, np, tf):
        self._np, self._tf = np, tf
        self._rng = np.random.default_rng(0)
        self._pixels = {}  # of a shape: all signatures get the same
        size = metadata["signatures"]["serving_default"]["example"]["clips"][2:4]
        is_resized = metadata["preprocessing"]["image_size"] is not None
        self._size = (size[0] + 3, size[1] + 10) if is_resized else tuple(size)

    def of(self, name, described):
        inputs = {}
        for key, spec in described["inputs"].items():
            shape = list(described["example"][key])
            make = {"clips": self._clips, "frames": self._frames, "positions": self._positions}[key]
            inputs[key] = self._tf.cast(make(shape), spec["dtype"])
        return inputs

    def _clips(self, shape):
        shape = (2, shape[1], *self._size, 3)
        if shape not in self._pixels:
            self._pixels[shape] = self._rng.integers(0, 256, shape).astype("uint8")
        return self._pixels[shape]

    def _frames(self, shape):
        images = self._clips([*shape, *self._size, 3])
        strings = [self._tf.io.encode_jpeg(image).numpy() for clip in images for image in clip]
        return self._tf.reshape(strings, images.shape[:2])

    def _positions(self, shape):
        return self._np.zeros(shape, "int32")


def _text(value, shape):
    dtype = value.dtype.name if value.dtype != object else "string"
    return f"{dtype} {tuple(shape)}"


def _problem(name, described, results, model, names, np):
    """What is wrong with the outputs of a signature, or `None`."""
    outputs = results[name]
    if set(outputs) != set(described["outputs"]):
        return f"the outputs are {sorted(outputs)} instead of {sorted(described['outputs'])}"
    for key, spec in described["outputs"].items():
        value = outputs[key]
        fits = value.ndim == len(spec["shape"]) and all(
            size in (None, found) for size, found in zip(spec["shape"], value.shape, strict=True)
        )
        if not fits:
            return f"`{key}` has the shape {value.shape} instead of {spec['shape']}"
        if value.dtype != object and not np.isfinite(value).all():
            return f"`{key}` is not finite"
    scores, labels = outputs.get("scores"), outputs.get("labels")
    if scores is not None and model["activation"] in ("softmax", "sigmoid"):
        if scores.min() < 0 or scores.max() > 1.001:
            return f"scores from {scores.min():.4g} to {scores.max():.4g} instead of 0 to 1"
        if model["activation"] == "softmax" and labels is None and np.abs(scores.sum(-1) - 1).max() > 0.01:
            return "the scores of a clip do not add up to 1"
    expected = results.get("serving_default", {}).get("scores")
    if expected is None:  # which is a problem of its own
        return None
    if labels is not None:
        labels = [[label.decode() for label in row] for row in labels]
        order = np.argsort(-expected, kind="stable")[:, : scores.shape[1]]
        if labels != [[names[index] for index in row] for row in order]:
            return "the labels are not the names of the best scores"
        expected = np.take_along_axis(expected, order, 1)
    if name in ("float", "classify") and np.abs(scores - expected).max() > 1e-4:
        return f"the scores differ from those of serving_default by {np.abs(scores - expected).max():.2g}"
    return None


def main():
    """Blocks the packages that an export must do without, and checks the export that is named."""
    sys.modules["keras"] = sys.modules["keras_nonlocal"] = None  # importing them is an error now
    for row in check_signatures(pathlib.Path(sys.argv[1])):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
