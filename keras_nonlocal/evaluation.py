"""Evaluation by the field's protocol: several views of a video, one averaged score.

Shape letters:
    B: videos of a batch
    V: views of a video (clips × crops)
    T, H, W: frames, height and width of a view
    K: classes
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import pathlib

import keras
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_nonlocal.files import whole_file

# How the scores of a video's views become those of the video.
VIEW_REDUCTIONS = {"mean": np.mean, "max": np.max}

# The first line of a file of scores says that it is one.
FORMAT = "keras_nonlocal.scores.1"

# By how much a video's scores may differ from those in a file that is resumed, as a part of the largest: half
# precision and other machines round differently, other weights are farther off.
RESUME_TOLERANCE = 0.01

# The picture of a confusion matrix: the colour of a whole row in one square, and the largest side of a square.
DARK = (8, 48, 107)
LARGEST_CELL = 32


class _Evaluation:
    """What the results for one label a video and for several have in common."""

    def save(self, directory):
        """Writes the figures into a directory, over those of before.

        `summary.json` has the figures of all videos together, `per_class.csv` a line for every class. With one label
        a video, `confusion.csv` has the numbers of videos by true class (rows) and predicted class (columns), and
        `confusion.png` is a picture of it, see `draw_confusion`.

        Args:
            directory: Path, created if it does not exist.

        Returns:
            List of the paths written.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        written = []
        for name, write in self._files().items():
            with whole_file(directory / name) as scratch:
                write(pathlib.Path(scratch))
            written.append(str(directory / name))
        return written

    def summary(self):
        """The figures of all videos together, as a dictionary for JSON."""
        return {name: getattr(self, name) for name in self._SUMMARY}

    def table(self):
        """The figures of every class as lines of text."""
        header, *rows = self._per_class_rows()
        lines = [header, *([row[0], str(row[1]), *(_figure(value) for value in row[2:])] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        # Names to the left, figures to the right.
        return "\n".join(
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
            for cells in (zip(line, widths, strict=True) for line in lines)
        )

    @property
    def names(self):
        """The names of the classes, or their numbers as strings."""
        return list(self.class_names or map(str, range(self.scores.shape[1])))

    def _files(self):
        return {
            "summary.json": lambda path: path.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8"),
            "per_class.csv": lambda path: _write_csv(path, self._per_class_rows()),
        }


@dataclasses.dataclass(frozen=True)
class ViewEvaluation(_Evaluation):
    """What `evaluate_views` found for videos of one class each.

    Attributes:
        num_videos: Number of videos.
        num_views: Views per video.
        top_1: Fraction of the videos whose class has the highest score.
        top_5: Fraction whose class is among the 5 highest (1.0 with 5 classes or fewer). Of equal scores, the class
            of the lower number comes first, for both figures.
        interval: 95 % Wilson score interval `(low, high)` of `top_1`.
        confusion: Integer array of shape `(classes, classes)`: rows are true classes, columns predicted ones.
        scores: Float32 array of shape `(num_videos, classes)`, averaged over the views.
        labels: Integer array of shape `(num_videos,)`.
        class_names: List of strings, or `None`.
    """

    num_videos: int
    num_views: int
    top_1: float
    top_5: float
    interval: tuple
    confusion: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: list | None = None

    _SUMMARY = ("num_videos", "num_views", "top_1", "top_5", "interval")

    @property
    def per_class(self):
        """Fraction of each class's videos that are right; NaN for a class without videos."""
        return self._per_class_top(1)

    def figures(self):
        """All figures, those of the classes included, as a dictionary for JSON; `None` where a class has no videos."""
        return self.summary() | {
            "class_names": self.names,
            "per_class": _for_json(self.per_class),
            "confusion": self.confusion.tolist(),
        }

    def headline(self):
        """The main figures as lines of text."""
        low, high = self.interval
        return f"top-1  {self.top_1:.4f}  (95 % interval {low:.4f} to {high:.4f})\ntop-5  {self.top_5:.4f}"

    def _per_class_top(self, k):
        totals = np.bincount(self.labels, minlength=len(self.confusion))
        right = np.bincount(self.labels[_ranks(self.scores, self.labels) < k], minlength=len(self.confusion))
        return np.divide(right, totals, out=np.full(len(totals), np.nan), where=totals > 0)

    def _per_class_rows(self):
        columns = (
            self.names,
            self.confusion.sum(axis=1).tolist(),
            self._per_class_top(1).tolist(),
            self._per_class_top(5).tolist(),
        )
        return [["class", "videos", "top-1", "top-5"], *map(list, zip(*columns, strict=True))]

    def _files(self):
        counts = [[name, *row] for name, row in zip(self.names, self.confusion.tolist(), strict=True)]
        return super()._files() | {
            "confusion.csv": lambda path: _write_csv(path, [["true \\ predicted", *self.names], *counts]),
            "confusion.png": lambda path: draw_confusion(self.confusion, self.names).save(path, format="PNG"),
        }


@dataclasses.dataclass(frozen=True)
class MultiLabelEvaluation(_Evaluation):
    """What `evaluate_views` found for videos of several classes each, such as those of Charades.

    The average precision of a class is the sum, over the videos in the order of their scores for it, of the precision
    among the videos so far times the step in recall. Videos of equal scores come together
    (`sklearn.metrics.average_precision_score`). As in Charades' own script, videos of no class at all come last,
    whatever their scores; the script takes equal scores one by one in the order of its file.

    Attributes:
        num_videos: Number of videos, those of no class included.
        num_views: Views per video.
        mean_average_precision: Mean of `average_precision` over the classes that any video has.
        average_precision: Float array of shape `(classes,)`; NaN for a class that no video has.
        scores: Float32 array of shape `(num_videos, classes)`, averaged over the views.
        labels: Float32 array of shape `(num_videos, classes)` of 0 and 1.
        class_names: List of strings, or `None`.
    """

    num_videos: int
    num_views: int
    mean_average_precision: float
    average_precision: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: list | None = None

    _SUMMARY = ("num_videos", "num_views", "mean_average_precision")

    @property
    def per_class(self):
        """The average precision of each class; NaN for a class that no video has."""
        return self.average_precision

    def figures(self):
        """All figures, those of the classes included, as a dictionary for JSON; `None` where a class has no videos."""
        return self.summary() | {"class_names": self.names, "per_class": _for_json(self.average_precision)}

    def headline(self):
        """The main figures as lines of text."""
        num_classes = int(np.isfinite(self.average_precision).sum())
        return f"mean average precision  {self.mean_average_precision:.4f}  (of {num_classes} classes)"

    def _per_class_rows(self):
        columns = self.names, self.labels.sum(axis=0).astype(int).tolist(), self.average_precision.tolist()
        return [["class", "videos", "average precision"], *map(list, zip(*columns, strict=True))]


def evaluate_views(
    model,
    dataset,
    num_clips=None,
    num_crops=None,
    preprocess_input=None,
    view_reduction="mean",
    class_names=None,
    view_batch_size=8,
    resume=None,
    verbose="auto",
):
    """Evaluates a classifier of clips on several views of each video, averaging the views' scores.

    A batch of videos is scored `view_batch_size` views at a time, and only the averages are kept. The paper's protocols
    are `views=(10, 3)` in the dataset, or `views=(10, 1)` of whole frames with
    `keras_nonlocal.applications.fully_convolutional(model)`.

    Args:
        model: Keras model from clips `(batch, frames, height, width, 3)` to scores `(batch, classes)`. For the
            paper's protocol these are probabilities, not logits.
        dataset: Iterable of `(views, labels)`, or of `(views, labels, names)` with the names of the videos: views of
            shape `(batch, views, frames, height, width, 3)`, such as
            `keras_nonlocal.data.video_dataset_from_directory(..., views=(10, 3), with_paths=True)` yields. Labels are
            integers of shape `(batch,)`, or 0 and 1 of shape `(batch, classes)` where a video has several classes or
            none.
        num_clips: Integer, how many clips of each video the dataset must hold, with `num_crops`; the paper's protocol
            is 10 and 3. The dataset makes the views, this only makes sure of them. `None`: whatever it holds.
        num_crops: Integer, the crops of each clip.
        preprocess_input: Function applied to every batch of views, such as
            `keras_nonlocal.applications.preprocess_input`. `None`: the views are what the model takes.
        view_reduction: `"mean"` of the views' scores, or `"max"`.
        class_names: List of the names of the classes. `None`: those of the dataset, if it has one for each score.
        view_batch_size: Number of views that pass through the model at a time.
        resume: Path of a file that keeps the scores of every video as they come, a line each. If it exists, videos
            that are in it do not pass through the model again, whatever their order: they are known by their pixels,
            for which the dataset decodes them again. The first of them does, to see that it is the same model.
        verbose: `0` for silence, else a progress bar; `"auto"` is a progress bar.

    Returns:
        A `ViewEvaluation`, or a `MultiLabelEvaluation` where the labels are of the shape `(batch, classes)`.

    Raises:
        ValueError: if the dataset is empty, its views have another rank or number, a label is no class of the model,
            the model gives other than one score per class or scores that are no numbers, or `resume` is no file of
            this model's scores.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 4.1, "Inference"

    Example:

    >>> model = keras.Sequential([keras.Input((2, 8, 8, 3)), keras.layers.GlobalAveragePooling3D()])
    >>> views = np.zeros((1, 4, 2, 8, 8, 3), "float32")
    >>> views[..., 1] = 1.0
    >>> evaluate_views(model, [(views, np.array([1]))], verbose=0).top_1
    1.0
    """
    if not _is_positive_integer(view_batch_size):
        raise ValueError(f"`view_batch_size` must be a positive integer. Received: view_batch_size={view_batch_size!r}")
    numbers = (num_clips, num_crops)
    if numbers != (None, None) and not all(map(_is_positive_integer, numbers)):
        raise ValueError(
            "`num_clips` and `num_crops` must both be positive integers, or both `None`. "
            f"Received: num_clips={num_clips!r}, num_crops={num_crops!r}"
        )
    if view_reduction not in VIEW_REDUCTIONS:
        raise ValueError(
            f"`view_reduction` must be one of {', '.join(map(repr, VIEW_REDUCTIONS))}. "
            f"Received: view_reduction={view_reduction!r}"
        )
    num_views = None if num_clips is None else num_clips * num_crops
    total = len(getattr(dataset, "file_paths", ())) or None  # without the broken ones it may be fewer
    progress = None if verbose == 0 else keras.utils.Progbar(total, interval=1.0, unit_name="video")

    def score(views, names):  # B V T H W 3 → B K
        parts = []
        flat = views.reshape(-1, *views.shape[2:])  # BV T H W 3
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
        scores = VIEW_REDUCTIONS[view_reduction](scores.reshape(*views.shape[:2], -1), axis=1)
        for name, finite in zip(names, np.isfinite(scores).all(axis=1), strict=True):
            if not finite:
                raise ValueError(f"`model` must give finite scores. Received: NaN or infinity for {name}")
        return scores

    all_scores, all_labels, num_videos = [], [], 0
    with _ScoreFile(resume, model, view_reduction) if resume is not None else contextlib.nullcontext() as kept:
        for element in dataset:
            views, labels, names = _checked_element(element, num_videos, num_views, num_clips, num_crops)
            num_views = views.shape[1]
            scores = score(views, names) if kept is None else kept.scores(views, names, score)
            _check_labels(labels, names, scores.shape[1])
            all_scores.append(scores)
            all_labels.append(labels)
            num_videos += len(labels)
            if progress:
                progress.update(num_videos)
    if not all_scores:
        raise ValueError(f"`dataset` must yield at least one video. Received: dataset={dataset!r}")
    if progress:
        progress.target = num_videos  # known only now: a dataset that leaves broken videos out has no length
        progress.update(num_videos, finalize=True)
    scores, labels = np.concatenate(all_scores), np.concatenate(all_labels)
    if class_names is None and len(getattr(dataset, "class_names", None) or ()) == scores.shape[1]:
        class_names = dataset.class_names
    return summarize(scores, labels, num_views, class_names)


def _is_positive_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0


def _checked_element(element, num_before, num_views, num_clips, num_crops):
    """`(views, labels, names)` of an element of the dataset; videos without names are numbered."""
    if not isinstance(element, (tuple, list)) or len(element) not in (2, 3):
        raise ValueError(
            "`dataset` must yield (views, labels) or (views, labels, names). "
            f"Received: {len(element) if isinstance(element, (tuple, list)) else type(element).__name__}"
        )
    views, labels = np.asarray(element[0]), np.asarray(element[1])
    if views.ndim != 6:
        raise ValueError(
            "`dataset` must yield views of the shape (batch, views, frames, height, width, channels). "
            f"Received: views.shape={views.shape}"
        )
    if num_views not in (None, views.shape[1]):
        wanted = (
            f"{num_views} views of every video, as of the first"
            if num_clips is None
            else f"{num_views} views of every video, num_clips={num_clips} times num_crops={num_crops}"
        )
        raise ValueError(f"`dataset` must yield {wanted}. Received: views.shape={views.shape}")
    batch = len(views)
    one_each = labels.shape == (batch,) and labels.dtype.kind in "iu"
    several = labels.ndim == 2 and len(labels) == batch and labels.dtype.kind in "biuf"
    if not one_each and not several:
        raise ValueError(
            f"`dataset` must yield one integer label per video: labels of the shape ({batch},), or 0 and 1 for every "
            f"class: labels of the shape ({batch}, classes). "
            f"Received: labels.shape={labels.shape}, labels.dtype={labels.dtype}"
        )
    if len(element) == 2:
        return views, labels, [f"video {number} (counted from 0)" for number in range(num_before, num_before + batch)]
    names = np.asarray(element[2]).tolist()
    if not isinstance(names, list) or len(names) != batch:
        raise ValueError(f"`dataset` must yield one name per video, {batch} of them. Received: names={names!r}")
    return views, labels, [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names]


def _check_labels(labels, names, num_classes):
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"Labels for every class must be as many as the model's scores, {num_classes}. "
                f"Received: labels.shape={labels.shape}"
            )
        wrong, wanted = ~np.isin(labels, (0, 1)).all(axis=1), "0 and 1"
    else:
        wrong, wanted = (labels < 0) | (labels >= num_classes), f"classes of the model, 0 to {num_classes - 1}"
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"Labels must be {wanted}. Received: {labels[first].tolist()} for {names[first]}")


class _ScoreFile:
    """The scores of videos in a file that only grows: a line of JSON for each, after one that says whose they are.

    Videos are known by their pixels: neither names nor the order of a dataset need to be the same, and other clips
    or crops of a video are another.
    """

    def __init__(self, path, model, view_reduction):
        self.path = pathlib.Path(path)
        self.header = {"format": FORMAT, "weights": _digest(*model.get_weights()), "view_reduction": view_reduction}
        self.kept = {}
        self.is_checked = False

    def __enter__(self):
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a last line without an end was being written when the run was stopped
        lines = whole.split(b"\n")[:-1]
        if lines or not self._line(self.header).startswith(text):
            self._check_header(lines[0] if lines else text)
        for number, line in enumerate(lines[1:], start=2):
            row = self._parsed(line, number)
            self.kept[row["video"]] = np.array(row["scores"], "float32")
        self.file = open(self.path, "r+b" if self.path.exists() else "w+b")
        self.file.truncate(len(whole))
        self.file.seek(len(whole))
        if not lines:
            self._append(self.header)
        return self

    def __exit__(self, *error):
        self.file.close()

    def scores(self, views, names, score):
        """Scores of shape B K: what the file has, else what `score` says, which goes into the file."""
        keys = [_digest(video) for video in views]
        if not self.is_checked:
            known = [index for index, key in enumerate(keys) if key in self.kept][:1]
            for index in known:
                self._check(names[index], self.kept[keys[index]], score(views[index : index + 1], [names[index]])[0])
                self.is_checked = True
        new = [index for index, key in enumerate(keys) if key not in self.kept]
        if new:
            found = score(views[new] if len(new) < len(views) else views, [names[index] for index in new])
            for index, scores in zip(new, found, strict=True):
                # 9 digits are all of a float32.
                self._append(
                    {"video": keys[index], "name": names[index], "scores": [float(f"{x:.9g}") for x in scores.tolist()]}
                )
                self.kept[keys[index]] = scores
        return np.stack([self.kept[key] for key in keys])

    @staticmethod
    def _line(row):
        return json.dumps(row).encode() + b"\n"

    def _append(self, row):
        self.file.write(self._line(row))
        self.file.flush()

    def _parsed(self, line, number):
        try:
            row = json.loads(line)
            names = self.header if number == 1 else ("video", "scores")
            if number == 1 and row["format"] != FORMAT:
                raise ValueError
            return {name: row[name] for name in names}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"`resume` must be a file that `evaluate_views` wrote, or a new one; its line {number} is none of its "
                f"lines. Received: resume={str(self.path)!r}"
            ) from None

    def _check_header(self, line):
        header = self._parsed(line, 1)
        for name, what in (("weights", "a model of other weights"), ("view_reduction", "another `view_reduction`")):
            if header[name] != self.header[name]:
                raise ValueError(
                    f"`resume` must be a file of this model's scores, or a new one. It is of {what}: {name} "
                    f"{header[name]!r}, not {self.header[name]!r}. Received: resume={str(self.path)!r}"
                )

    def _check(self, name, kept, scores):
        if kept.shape != scores.shape or np.abs(kept - scores).max() > RESUME_TOLERANCE * np.abs(kept).max():
            raise ValueError(
                f"`resume` must be a file of this model's scores, or a new one. Now the scores of {name} are others, "
                "as another `preprocess_input` or another form of the model would make them. "
                f"Received: resume={str(self.path)!r}"
            )


def _digest(*arrays):
    digest = hashlib.blake2b(digest_size=16)
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.shape} {array.dtype} ".encode())
        digest.update(array.view("uint8").data if array.size else b"")
    return digest.hexdigest()


def summarize(scores, labels, num_views=1, class_names=None):
    """Computes the figures of an evaluation from the scores of videos.

    Args:
        scores: Array of shape `(videos, classes)`, averaged over the views.
        labels: Integer array of shape `(videos,)`, or array of 0 and 1 of shape `(videos, classes)`.
        num_views: Number of views of each video.
        class_names: List of the names of the classes, or `None`.

    Returns:
        A `ViewEvaluation`, or a `MultiLabelEvaluation` for labels of shape `(videos, classes)`.

    Raises:
        ValueError: if a label is no class, or the names are not as many as the classes.

    Example:

    >>> print(summarize(np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([0, 1])).table())
    class  videos   top-1   top-5
    0           1  1.0000  1.0000
    1           1  0.0000  1.0000
    """
    num_videos, num_classes = scores.shape
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"`class_names` must be as many as the model's scores, {num_classes}. Received: class_names={class_names!r}"
        )
    class_names = None if class_names is None else [str(name) for name in class_names]
    _check_labels(labels, [f"video {number} (counted from 0)" for number in range(num_videos)], num_classes)
    if labels.ndim == 2:
        # Only here: it takes a second to import, and the command line reads a table of this module.
        from sklearn.metrics import average_precision_score

        has_videos = labels.any(axis=0)
        if not has_videos.any():
            raise ValueError("At least one video must be of a class. Received: labels of zeros only")
        average_precision = np.full(num_classes, np.nan)
        of_any = labels.any(axis=1)  # the others come last, where they change no precision
        for k in np.flatnonzero(has_videos):
            average_precision[k] = average_precision_score(labels[of_any, k] > 0, scores[of_any, k])
        return MultiLabelEvaluation(
            num_videos=num_videos,
            num_views=num_views,
            mean_average_precision=float(average_precision[has_videos].mean()),
            average_precision=average_precision,
            scores=scores,
            labels=labels.astype("float32"),
            class_names=class_names,
        )
    labels = labels.astype("int64")
    ranks = _ranks(scores, labels)
    right = int((ranks == 0).sum())
    return ViewEvaluation(
        num_videos=num_videos,
        num_views=num_views,
        top_1=right / num_videos,
        top_5=float((ranks < 5).mean()),
        interval=wilson_interval(right, num_videos),
        confusion=np.bincount(labels * num_classes + scores.argmax(axis=1), minlength=num_classes**2).reshape(
            num_classes, num_classes
        ),
        scores=scores,
        labels=labels,
        class_names=class_names,
    )


def _ranks(scores, labels):
    """How many classes stand before each video's own; of equal scores, those of lower numbers do, as in `argmax`."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return before.sum(axis=1)


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


def draw_confusion(confusion, names):
    """Draws a confusion matrix.

    Rows are true classes, columns predicted ones. The darker a square, the larger its share of the row's videos; the
    shade goes with the square root, so that rare confusions are seen. Rows without videos are grey. Up to 60 classes
    have their names at the sides, more have their numbers; up to 37 the squares have the numbers of videos in them.

    Args:
        confusion: Integer array of shape `(classes, classes)`.
        names: List of the names of the classes.

    Returns:
        A `PIL.Image.Image`.

    Example:

    >>> draw_confusion(np.eye(400, dtype=int), [f"class {k}" for k in range(400)]).width > 1200
    True
    """
    confusion = np.asarray(confusion)
    num_classes = len(confusion)
    cell = min(max(1200 // num_classes, 3), LARGEST_CELL)  # 400 classes: 1200 pixels
    totals = confusion.sum(axis=1, keepdims=True)
    strength = np.sqrt(confusion / np.maximum(totals, 1))[..., None]  # K K 1
    colours = 255 + strength * (np.array(DARK) - 255)
    colours = np.where(totals[..., None] > 0, colours, 225).round().astype("uint8")

    font = ImageFont.load_default()
    step = 1 if cell >= 20 else 10 * math.ceil(2 / cell)  # a number every 20 pixels, or more
    texts = {k: _latin(names[k]) if step == 1 else str(k) for k in range(0, num_classes, step)}
    side, length = 12 + math.ceil(max(font.getlength(text) for text in texts.values())), cell * num_classes
    remark = "rows: true class, columns: predicted class"
    sheet = Image.new("RGB", (max(side + length, math.ceil(font.getlength(remark))) + 12, side + length + 24), "white")
    sheet.paste(Image.fromarray(colours).resize((length, length), Image.Resampling.NEAREST), (side, side))
    rows, columns = Image.new("RGB", (side, length), "white"), Image.new("RGB", (side, length), "white")
    for k, text in texts.items():
        middle = max((k + 0.5) * cell, 7)  # the first is not to be cut off
        _text_at(rows, text, side - 6 - font.getlength(text), middle, "black", font)
        _text_at(columns, text, 6, middle, "black", font)
    sheet.paste(rows, (0, side))
    sheet.paste(columns.rotate(90, expand=True), (side, 0))  # read from below, as the first row is then at the left
    if cell == LARGEST_CELL:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                x = side + (column + 0.5) * cell - font.getlength(str(count)) / 2
                colour = "white" if strength[row, column] > 0.6 else "black"
                _text_at(sheet, str(count), x, side + (row + 0.5) * cell, colour, font)
    _text_at(sheet, remark, 6, side + length + 12, "black", font)
    return sheet


def _text_at(picture, text, left, middle, colour, font):
    _, top, _, bottom = font.getbbox(text)
    ImageDraw.Draw(picture).text((round(left), round(middle - (top + bottom) / 2)), text, colour, font)


def _latin(text):
    """What Pillow's own font can write, with question marks for the rest."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _figure(value):
    return "-" if math.isnan(value) else f"{value:.4f}"


def _for_json(values):
    return [None if math.isnan(value) else value for value in values.tolist()]


def _write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            ["" if isinstance(value, float) and math.isnan(value) else value for value in row] for row in rows
        )
