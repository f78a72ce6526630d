"""A directory of videos, one folder a class, as a `tf.data.Dataset` of clips.

Shape letters: B batch, V views (clips x crops), T frames, H and W height and width, C = 3 colours.
"""

import logging
import os
import threading

import numpy as np
import tensorflow as tf

from .clips import load_training_clip, load_views
from .decode import VideoError
from .sampling import check_sampling

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")

_LOGGER = logging.getLogger("keras_nonlocal")


class DecodeReport:
    """Which videos of a dataset have been decoded so far, and which turned out to be broken.

    Attributes:
        num_good: Integer, how many different videos have been decoded.
        broken: Dict from the path of a broken video to what is wrong with it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._good = set()
        self._broken = {}

    @property
    def num_good(self):
        return len(self._good)

    @property
    def broken(self):
        with self._lock:
            return dict(self._broken)

    def add_good(self, path):
        """Notes that the video at `path` was decoded."""
        with self._lock:
            self._good.add(path)

    def add_broken(self, path, message):
        """Notes that the video at `path` is broken, and logs it the first time."""
        with self._lock:
            is_new = path not in self._broken
            self._broken[path] = message
        if is_new:
            _LOGGER.warning("Skipped a broken video. %s", message)

    def summary(self, num_named=3):
        """One line, e.g. `decoded 9 videos; skipped 1 broken file: a.mp4 (…)`."""
        broken = sorted(self.broken.items())
        line = f"decoded {self.num_good} video{'s' * (self.num_good != 1)}"
        if not broken:
            return line
        named = [
            # The message repeats the path, of which the file's name is enough here.
            f"{os.path.basename(path)} ({message.removeprefix(f'Cannot decode {path}: ')})"
            for path, message in broken[:num_named]
        ]
        rest = len(broken) - len(named)
        return (
            f"{line}; skipped {len(broken)} broken file{'s' * (len(broken) != 1)}: "
            + ", ".join(named)
            + (f", … and {rest} more" if rest else "")
        )


def video_dataset_from_directory(
    directory,
    labels="inferred",
    label_mode="int",
    class_names=None,
    batch_size=8,
    num_frames=8,
    frame_stride=8,
    image_size=None,
    shorter_side=None,
    horizontal_flip=None,
    views=None,
    sampling="recipe",
    shuffle=None,
    seed=None,
    validation_split=None,
    subset=None,
    follow_links=False,
    num_parallel_calls=None,
    on_error="skip",
    verbose=True,
):
    """Generates a `tf.data.Dataset` of clips from video files in a directory.

    It is `keras.utils.image_dataset_from_directory` for videos. For a directory of the form

    ```
    main_directory/
    ...class_a/
    ......a_video_1.mp4
    ......a_video_2.mp4
    ...class_b/
    ......b_video_1.mp4
    ```

    it yields clips of the videos in `class_a` and `class_b` with the labels 0 and 1.

    Without `views`, each pass draws one random clip of each video by the paper's training recipe
    (section 4.1): a random start, a random size, a random crop, a flip. With `views`, the dataset
    is the paper's test protocol: several clips and crops of each video, nothing random. For a
    given `seed` the clips are the same in each run, however many are decoded in parallel.

    Pixels are the RGB values 0..255: map the model's own `preprocess_input` over the dataset.

    Args:
        directory: String or path-like. With `labels="inferred"` it has a sub-directory for each
            class; otherwise its structure is ignored.
        labels: `"inferred"` (from the sub-directories), `None` (no labels), or a list of integer
            labels, one for each video in the alphanumeric order of their paths.
        label_mode: `"int"` (int32 scalars), `"categorical"` (float32 one-hot vectors), `"binary"`
            (float32, 0 or 1, for two classes) or `None` (no labels).
        class_names: List of the sub-directories to use, in the order of their labels, with
            `labels="inferred"`. Defaults to all in alphanumeric order.
        batch_size: Integer B, or `None` for elements that are not batched.
        num_frames: Integer T, the frames of a clip.
        frame_stride: Integer, the step in the video from one frame of a clip to the next.
        image_size: Integer or pair `(height, width)` of the crops, in pixels. Defaults to
            `(224, 224)`, with `views` to `(256, 256)`.
        shorter_side: The size in pixels to which the videos' shorter side is resized before the
            crop: an integer, or without `views` also a pair `(low, high)` of which an integer is
            drawn for each clip, both ends included. Defaults to `(256, 320)`, with `views` to 256.
        horizontal_flip: Whether to mirror every second clip at random. Defaults to `True` without
            `views`; must not be true with them.
        views: `None`, or a pair `(num_clips, num_crops)`; the paper's is `(10, 3)`.
        sampling: Where the clips of the views start: `"recipe"` or `"even"`, see
            `keras_nonlocal.data.view_indices`.
        shuffle: Whether to draw a new order of the videos for each pass; otherwise the order is
            alphanumeric. Defaults to `True` without `views`, `False` with them.
        seed: Integer seed of the order, the split and the random clips. `None` takes one from
            NumPy's global generator, which `keras.utils.set_random_seed` sets.
        validation_split: Float between 0 and 1, the fraction of the videos reserved for validation.
            They are drawn by `seed`, whatever `shuffle` is, so that two calls with one `seed`
            never share a video between `"training"` and `"validation"`.
        subset: `"training"`, `"validation"` or `"both"`, with `validation_split`. `"both"`
            returns a pair of datasets, of which the validation one is never shuffled.
        follow_links: Whether to visit sub-directories that are symbolic links.
        num_parallel_calls: Integer, how many videos are decoded at a time. `None` lets `tf.data`
            decide.
        on_error: `"skip"` drops a video that cannot be decoded, logs it once as a warning of the
            logger `keras_nonlocal` and counts it in the dataset's `report`; a pass in which no
            video could be decoded is an error. `"raise"` makes the first such video an error.
        verbose: Whether to print the number of files and classes found.

    Returns:
        A `tf.data.Dataset` of `(clips, labels)`, or of `clips` alone without labels. `clips` is
        uint8 of shape `(B, T, height, width, 3)`; with `views`, `(B, V, T, height, width, 3)`,
        where V = `num_clips * num_crops`, all crops of the first clip first. `labels` is of shape
        `(B,)`, for `"categorical"` `(B, num_classes)`, for `"binary"` `(B, 1)`. The dataset has
        the attributes `class_names`, `file_paths` (in alphanumeric order) and `report`, a
        `DecodeReport`. With `on_error="skip"` its cardinality is unknown.

    Raises:
        ValueError: If an argument is out of range or no video is found.

    Example:

    ```python
    train, validation = (
        video_dataset_from_directory("videos", validation_split=0.2, seed=1, subset=subset)
        for subset in ("training", "validation")
    )
    ```
    """
    if labels not in ("inferred", None) and not isinstance(labels, (list, tuple)):
        raise ValueError(
            f'`labels` must be "inferred", None or a list of integers, one for each video. Received: labels={labels!r}'
        )
    if label_mode not in ("int", "categorical", "binary", None):
        raise ValueError(
            f'`label_mode` must be "int", "categorical", "binary" or None. Received: label_mode={label_mode!r}'
        )
    if labels is None or label_mode is None:
        labels = label_mode = None
    if class_names is not None and labels != "inferred":
        raise ValueError(
            f'`class_names` can only be passed with `labels="inferred"`. Received: class_names={class_names}'
        )
    if on_error not in ("skip", "raise"):
        raise ValueError(f'`on_error` must be "skip" or "raise". Received: on_error={on_error!r}')
    _check_positive(num_frames=num_frames, frame_stride=frame_stride)
    if batch_size is not None:
        _check_positive(batch_size=batch_size)
    _check_split(validation_split, subset, seed)
    if seed is None:
        seed = int(np.random.randint(1_000_000))
    load, clip_shape = _clip_loader(
        num_frames, frame_stride, image_size, shorter_side, horizontal_flip, views, sampling
    )
    if shuffle is None:
        shuffle = views is None

    paths, labels, class_names = _index_directory(directory, labels, class_names, follow_links)
    if verbose:
        classes = "" if labels is None else f" belonging to {len(class_names)} classes"
        print(f"Found {len(paths)} files{classes}.")
    if label_mode == "binary" and len(class_names) != 2:
        raise ValueError(f'`label_mode="binary"` needs exactly 2 classes. Received: class_names={class_names}')
    encoded = _encode_labels(labels, label_mode, class_names)

    def build(chosen, shuffle):
        return _build_dataset(
            [paths[i] for i in chosen],
            None if encoded is None else encoded[chosen],
            class_names,
            load,
            clip_shape,
            shuffle,
            seed,
            batch_size,
            num_parallel_calls,
            on_error,
        )

    if validation_split is None:
        return build(range(len(paths)), shuffle)
    num_validation = int(validation_split * len(paths))
    order = np.random.RandomState(seed).permutation(len(paths))
    split = {
        "training": np.sort(order[num_validation:]),
        "validation": np.sort(order[:num_validation]),
    }
    for name, chosen in split.items():
        if not len(chosen):
            raise ValueError(
                f"The {name} subset of {len(paths)} videos is empty. Received: validation_split={validation_split}"
            )
    if subset == "both":
        return build(split["training"], shuffle), build(split["validation"], False)
    return build(split[subset], shuffle)


def _check_positive(**values):
    for name, value in values.items():
        if not _is_positive_integer(value):
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")


def _is_positive_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0


def _is_pair(value):
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_positive_integer, value))


def _check_split(validation_split, subset, seed):
    if validation_split is None:
        if subset is not None:
            raise ValueError(f"`subset` can only be passed with `validation_split`. Received: subset={subset!r}")
        return
    if not 0 < validation_split < 1:
        raise ValueError(f"`validation_split` must be between 0 and 1. Received: validation_split={validation_split}")
    if subset not in ("training", "validation", "both"):
        raise ValueError(
            f'`subset` must be "training", "validation" or "both" with `validation_split`. Received: subset={subset!r}'
        )
    if seed is None and subset != "both":
        raise ValueError(
            "`validation_split` needs a `seed`, or the training and validation videos of two "
            "calls may overlap. Received: seed=None"
        )


def _clip_loader(num_frames, frame_stride, image_size, shorter_side, horizontal_flip, views, sampling):
    """Checks the arguments; returns `load(path, seed) -> clip` and the clip's shape."""
    if image_size is None:
        image_size = (224, 224) if views is None else (256, 256)
    elif _is_positive_integer(image_size):
        image_size = (image_size, image_size)
    if not _is_pair(image_size):
        raise ValueError(
            f"`image_size` must be a positive integer or a pair (height, width). Received: image_size={image_size!r}"
        )
    if shorter_side is None:
        shorter_side = (256, 320) if views is None else 256
    if views is None:
        low_high = (shorter_side,) * 2 if _is_positive_integer(shorter_side) else shorter_side
        if not _is_pair(low_high) or low_high[0] > low_high[1]:
            raise ValueError(
                "`shorter_side` must be a positive integer or a pair (low, high). "
                f"Received: shorter_side={shorter_side!r}"
            )
    else:
        if not _is_pair(views):
            raise ValueError(f"`views` must be None or a pair (num_clips, num_crops). Received: views={views!r}")
        check_sampling(sampling)
        if horizontal_flip:
            raise ValueError(f"`views` are never flipped. Received: horizontal_flip={horizontal_flip}, views={views}")
        if not _is_positive_integer(shorter_side):
            raise ValueError(
                "`shorter_side` must be a positive integer with `views`. "
                f"Received: shorter_side={shorter_side!r}, views={views}"
            )
        low_high = (shorter_side,) * 2
    if max(image_size) > low_high[0]:
        raise ValueError(
            "`image_size` must not be larger than `shorter_side`. "
            f"Received: image_size={tuple(image_size)}, shorter_side={shorter_side}"
        )

    clip_shape = (num_frames, *image_size, 3)
    if views is not None:

        def load(path, seed):
            return load_views(path, num_frames, frame_stride, views, shorter_side, image_size, sampling)

        return load, (views[0] * views[1], *clip_shape)

    flip = horizontal_flip is None or horizontal_flip

    def load(path, seed):
        rng = np.random.default_rng(seed)
        return load_training_clip(path, num_frames, frame_stride, low_high, image_size, flip, rng)

    return load, clip_shape


def _index_directory(directory, labels, class_names, follow_links):
    """Returns the sorted paths, their integer labels or None, and the class names or None."""
    directory = os.fspath(directory)
    if not os.path.isdir(directory):
        raise ValueError(f"`directory` must be an existing directory. Received: directory={directory!r}")
    found = []
    if labels == "inferred":
        folders = sorted(
            entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith(".")
        )
        if class_names is not None and not set(class_names) <= set(folders):
            raise ValueError(
                f"`class_names` must be sub-directories of {directory}, which has {folders}. "
                f"Received: class_names={class_names}"
            )
        class_names = folders if class_names is None else list(class_names)
        for label, name in enumerate(class_names):
            folder = os.path.join(directory, name)
            found += [(path, label) for path in _video_files(folder, follow_links)]
        paths, labels = [path for path, _ in found], [label for _, label in found]
    else:
        paths = _video_files(directory, follow_links)
        if labels is not None:
            class_names = [str(label) for label in sorted(set(labels))]
    if not paths:
        where = f"in the sub-directories {class_names} of" if labels is not None else "in"
        raise ValueError(
            f"Expected videos {where} the directory, with one of the extensions "
            f"{VIDEO_EXTENSIONS}. Received: directory={directory!r}"
        )
    if labels is not None and len(labels) != len(paths):
        raise ValueError(
            f"`labels` must have one label for each of the {len(paths)} videos. Received: len(labels)={len(labels)}"
        )
    return paths, labels, class_names


def _video_files(folder, follow_links):
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder, followlinks=follow_links)
        for name in names
        if name.lower().endswith(VIDEO_EXTENSIONS) and not name.startswith(".")
    )


def _encode_labels(labels, label_mode, class_names):
    if label_mode is None:
        return None
    labels = np.asarray(labels, "int32")
    if label_mode != "int" and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"`labels` must be in [0, {len(class_names)}), the number of classes, with "
            f"label_mode={label_mode!r}. Received: labels from {labels.min()} to {labels.max()}"
        )
    if label_mode == "categorical":
        return np.eye(len(class_names), dtype="float32")[labels]
    return labels.astype("float32")[:, None] if label_mode == "binary" else labels


def _build_dataset(
    paths,
    labels,
    class_names,
    load,
    clip_shape,
    shuffle,
    seed,
    batch_size,
    num_parallel_calls,
    on_error,
):
    report = DecodeReport()

    def decode(index, seed):
        path = paths[index]
        try:
            clip = np.ascontiguousarray(load(path, seed))
        except VideoError as error:
            if on_error == "raise":
                raise
            report.add_broken(path, str(error))
            return np.zeros(clip_shape, "uint8"), False
        report.add_good(path)
        return clip, True

    def decode_element(index, seed):
        clip, is_good = tf.numpy_function(decode, [index, seed], (tf.uint8, tf.bool))
        return tf.ensure_shape(clip, clip_shape), index, tf.ensure_shape(is_good, ())

    def labelled(clip, index, is_good):
        return clip if labels is None else (clip, tf.gather(labels, index))

    dataset = tf.data.Dataset.range(len(paths))
    if shuffle:
        dataset = dataset.shuffle(len(paths), seed=seed, reshuffle_each_iteration=True)
    # A seed of its own for each clip: the clips do not depend on which thread comes first.
    seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    dataset = tf.data.Dataset.zip(dataset, seeds).map(
        decode_element,
        num_parallel_calls=num_parallel_calls or tf.data.AUTOTUNE,
        deterministic=True,
    )
    if on_error == "skip":
        dataset = _drop_broken(dataset, clip_shape, report)
    dataset = dataset.map(labelled)
    if batch_size is not None:
        dataset = dataset.batch(batch_size)
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    dataset.class_names = class_names
    dataset.file_paths = paths
    dataset.report = report
    return dataset


def _drop_broken(dataset, clip_shape, report):
    """Drops the elements that are not good; the end of a pass without a good one is an error."""

    def raise_none_good(any_good):
        if not any_good:
            raise VideoError(f"No video could be decoded: {report.summary()}")
        return False

    def remember_good(any_good, element):
        clip, index, is_good = element
        is_end = index < 0
        is_good = tf.cond(
            is_end,
            lambda: tf.ensure_shape(tf.numpy_function(raise_none_good, [any_good], tf.bool), ()),
            lambda: is_good,
        )
        return any_good | is_good, (clip, index, is_good)

    # One more element ends each pass: it is never good, so it is dropped as a broken file is.
    end = tf.data.Dataset.range(1).map(lambda _: (tf.zeros(clip_shape, tf.uint8), tf.constant(-1, tf.int64), False))
    dataset = dataset.concatenate(end).scan(tf.constant(False), remember_good)
    return dataset.filter(lambda clip, index, is_good: is_good)
