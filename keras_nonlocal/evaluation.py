"""Evaluation by the field's protocol: several views of a video, one averaged score.

Shape letters:
    B: videos of a batch
    V: views of a video (clips × crops)
    T, H, W: frames, height and width of a view
    K: classes
"""

import dataclasses
import math

import keras
import numpy as np
from sklearn.metrics import confusion_matrix, top_k_accuracy_score


@dataclasses.dataclass(frozen=True)
class ViewEvaluation:
    """What `evaluate_views` found.

    Attributes:
        num_videos: Number of videos.
        num_views: Views per video.
        top_1: Fraction of the videos whose class has the highest score.
        top_5: Fraction whose class is among the 5 highest (1.0 with 5 classes or fewer).
        interval: 95 % Wilson score interval `(low, high)` of `top_1`.
        confusion: Integer array of shape `(classes, classes)`: rows are true classes, columns predicted ones.
        scores: Float32 array of shape `(num_videos, classes)`, averaged over the views.
        labels: Integer array of shape `(num_videos,)`.
    """

    num_videos: int
    num_views: int
    top_1: float
    top_5: float
    interval: tuple
    confusion: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    @property
    def per_class(self):
        """Fraction of each class's videos that are right; NaN for a class without videos."""
        totals = self.confusion.sum(axis=1)
        right = np.diag(self.confusion).astype(float)
        return np.divide(right, totals, out=np.full(len(totals), np.nan), where=totals > 0)


def evaluate_views(model, dataset, preprocess_input=None, view_batch_size=8, verbose="auto"):
    """Evaluates a classifier of clips on several views of each video, averaging the views' scores.

    A batch of videos is scored `view_batch_size` views at a time, and only the averages are kept.

    Args:
        model: Keras model from clips `(batch, frames, height, width, 3)` to scores `(batch, classes)`. For the
            paper's protocol these are probabilities, not logits.
        dataset: Iterable of `(views, labels)`: views of shape `(batch, views, frames, height, width, 3)`, integer
            labels of shape `(batch,)`, such as
            `keras_nonlocal.data.video_dataset_from_directory(..., views=(10, 3))` yields.
        preprocess_input: Function applied to every batch of views, such as
            `keras_nonlocal.applications.preprocess_input`. `None`: the views are what the model takes.
        view_batch_size: Number of views that pass through the model at a time.
        verbose: `0` for silence, else a progress bar; `"auto"` is a progress bar.

    Returns:
        A `ViewEvaluation`.

    Raises:
        ValueError: if the dataset is empty, its views have another rank, a label is no class of the model, or the model
            gives other than one score per class.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 4.1, "Inference"

    Example:

    >>> model = keras.Sequential([keras.Input((2, 8, 8, 3)), keras.layers.GlobalAveragePooling3D()])
    >>> views = np.zeros((1, 4, 2, 8, 8, 3), "float32")
    >>> views[..., 1] = 1.0
    >>> evaluate_views(model, [(views, np.array([1]))], verbose=0).top_1
    1.0
    """
    if not isinstance(view_batch_size, int) or view_batch_size < 1:
        raise ValueError(f"`view_batch_size` must be a positive integer. Received: view_batch_size={view_batch_size!r}")
    progress = None if verbose == 0 else keras.utils.Progbar(None, interval=1.0, unit_name="video")
    all_scores, all_labels, num_views = [], [], None
    for views, labels in dataset:
        views, labels = np.asarray(views), np.asarray(labels)
        if views.ndim != 6:
            raise ValueError(
                "`dataset` must yield views of the shape (batch, views, frames, height, width, channels). "
                f"Received: views.shape={views.shape}"
            )
        batch, num_views = views.shape[:2]
        if labels.shape != (batch,) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"`dataset` must yield one integer label per video: labels of the shape ({batch},). "
                f"Received: labels.shape={labels.shape}, labels.dtype={labels.dtype}"
            )
        flat = views.reshape(batch * num_views, *views.shape[2:])  # BV T H W 3
        parts = []
        for start in range(0, len(flat), view_batch_size):
            clips = flat[start : start + view_batch_size]
            clips = clips if preprocess_input is None else preprocess_input(clips)
            parts.append(np.asarray(model.predict_on_batch(clips), "float32"))
        scores = np.concatenate(parts)
        if scores.ndim != 2:
            raise ValueError(
                "`model` must give one score per class, of the shape (batch, classes). "
                f"Received: scores.shape={scores.shape}"
            )
        all_scores.append(scores.reshape(batch, num_views, -1).mean(axis=1))  # B K
        all_labels.append(labels)
        if progress:
            progress.add(batch)
    if not all_scores:
        raise ValueError(f"`dataset` must yield at least one video. Received: dataset={dataset!r}")
    labels = np.concatenate(all_labels)
    if progress:
        progress.target = len(labels)  # known only now: a dataset that leaves broken videos out has no length
        progress.update(len(labels), finalize=True)
    return summarize(np.concatenate(all_scores), labels, num_views)


def summarize(scores, labels, num_views=1):
    """Computes the figures of a `ViewEvaluation` from averaged scores `(videos, classes)` and labels `(videos,)`."""
    num_videos, num_classes = scores.shape
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels must be classes of the model, 0 to {num_classes - 1}. "
            f"Received: labels.min()={labels.min()}, labels.max()={labels.max()}"
        )
    predicted = scores.argmax(axis=1)
    right = int((predicted == labels).sum())
    classes = np.arange(num_classes)
    top_5 = 1.0 if num_classes <= 5 else float(top_k_accuracy_score(labels, scores, k=5, labels=classes))
    return ViewEvaluation(
        num_videos=num_videos,
        num_views=num_views,
        top_1=right / num_videos,
        top_5=top_5,
        interval=wilson_interval(right, num_videos),
        confusion=confusion_matrix(labels, predicted, labels=classes),
        scores=scores,
        labels=labels,
    )


def wilson_interval(successes, trials, z=1.959964):
    """95 % Wilson score interval of a proportion, which stays inside 0..1 for few trials.

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.
        z: Quantile of the normal distribution.

    Returns:
        `(low, high)`.

    Example:

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return max(centre - half, 0.0), min(centre + half, 1.0)
