"""Names of classes."""

import functools
from pathlib import Path

import numpy as np
from keras import ops

from keras_nonlocal.applications.resnet import is_integer


@functools.lru_cache(None)
def kinetics400():
    """The names of Kinetics-400's classes, in alphabetical order: that of published weights' outputs.

    Kay et al., "The Kinetics Human Action Video Dataset" (arXiv 1705.06950). The data set is Google's, under CC BY 4.0.
    """
    lines = Path(__file__).with_name("kinetics400.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def decode_predictions(predictions, top=5, class_names=None):
    """Names the classes with the highest scores.

    Args:
        predictions: Scores, array or tensor of shape `(samples, classes)`.
        top: Number of classes per sample.
        class_names: Names of the classes in the order of the scores. `None`: the 400 of Kinetics-400 (CC BY 4.0), in
            alphabetical order, as published weights have them.

    Returns:
        For each sample a list of `top` tuples `(class_index, class_name, score)`, the highest score first; of equal
        scores, the class that comes first.

    Raises:
        ValueError: if `predictions` has another rank or number of classes than `class_names`, or `top` is not from 1
            to the number of classes.

    Example:

    >>> decode_predictions(np.array([[0.1, 0.7, 0.2]]), top=2, class_names=["run", "swim", "jump"])
    [[(1, 'swim', 0.7), (2, 'jump', 0.2)]]
    """
    scores = ops.convert_to_numpy(predictions) if ops.is_tensor(predictions) else np.asarray(predictions)
    class_names = kinetics400() if class_names is None else tuple(class_names)
    if scores.ndim != 2 or scores.shape[1] != len(class_names):
        raise ValueError(
            f"`predictions` must have the shape (samples, {len(class_names)}), a score for each of the class names. "
            f"Received: predictions.shape={scores.shape}"
        )
    if not is_integer(top, 1) or top > len(class_names):
        raise ValueError(f"`top` must be an integer from 1 to {len(class_names)}. Received: top={top!r}")
    scores = scores.astype("float64")  # unsigned integers have no negatives
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [
        [(int(index), class_names[index], float(row[index])) for index in indices]
        for row, indices in zip(scores, order, strict=True)
    ]
