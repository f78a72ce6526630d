"""Videos on a disk as a `tf.data.Dataset` of clips.

Shape letters: B batch, V views (clips x crops), T frames, H and W height and width, C = 3 colours, K classes.
"""

import itertools
import logging
import os
import socket
import threading
import urllib.parse

import numpy as np
import tensorflow as tf

from . import shards
from .annotations import Annotations, read_annotations
from .clips import check_positive, check_seed, clip_options, load_clip
from .decode import VideoError

_LOGGER = logging.getLogger("keras_nonlocal")


class DecodeReport:
    """Which videos of a dataset have been decoded so far, and which turned out to be broken.

    Args:
        skipped_rows: List of strings, the rows of the annotations that were left out.
        is_replaced: Whether black clips stand for broken videos, which are otherwise left out.

    Attributes:
        num_good: Integer, how many different videos have been decoded.
        broken: Dict from the path of a broken video to what is wrong with it.
        skipped_rows: List of strings, what is wrong with the rows of the annotations that were left out.
    """

    def __init__(self, skipped_rows=(), is_replaced=False):
        self._lock = threading.Lock()
        self._good = set()
        self._broken = {}
        self._is_replaced = is_replaced
        self.skipped_rows = list(skipped_rows)

    def __repr__(self):
        return f"<DecodeReport: {self.summary()}>"

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
            done = "Replaced a broken video by black" if self._is_replaced else "Skipped a broken video"
            _LOGGER.warning("%s. %s", done, message)

    def summary(self, num_named=3):
        """One line, e.g. `decoded 9 videos; skipped 1 broken file: a.mp4 (…)`."""
        parts = [f"decoded {_counted(self.num_good, 'video')}"]
        broken = sorted(self.broken.items())
        if broken:
            done, how = ("replaced", " by black") if self._is_replaced else ("skipped", "")
            named = [
                # The message repeats the path, of which the file's name is enough here.
                f"{os.path.basename(path)} ({message.removeprefix(f'Cannot decode {path}: ')})"
                for path, message in broken[:num_named]
            ]
            rest = len(broken) - len(named)
            parts.append(
                f"{done} {_counted(len(broken), 'broken file')}{how}: "
                + ", ".join(named)
                + (f", … and {rest} more" if rest else "")
            )
        if self.skipped_rows:
            parts.append(f"skipped {_counted(len(self.skipped_rows), 'wrong row')} of the annotations")
        return "; ".join(parts)


def _counted(count, noun):
    return f"{count} {noun}{'s' * (count != 1)}"


def video_dataset_from_directory(
    directory,
    labels="inferred",
    label_mode="inferred",
    class_names=None,
    annotations=None,
    annotation_format=None,
    split=None,
    batch_size=8,
    num_frames=8,
    frame_stride=8,
    image_size=None,
    shorter_side=None,
    horizontal_flip=None,
    views=None,
    sampling="recipe",
    shuffle=None,
    reshuffle_each_iteration=True,
    seed=None,
    validation_split=None,
    subset=None,
    follow_links=False,
    shard=None,
    service=None,
    num_parallel_calls=None,
    on_error="skip",
    with_paths=False,
    start=None,
    verbose=True,
):
    """Generates a `tf.data.Dataset` of clips from videos in a directory.

    It is `keras.utils.image_dataset_from_directory` for videos. For a directory of the form

    ```
    main_directory/
    ...class_a/
    ......a_video_1.mp4
    ......a_video_2.mp4
    ...class_b/
    ......b_video_1.mp4
    ```

    it yields clips of the videos in `class_a` and `class_b` with the labels 0 and 1. With `annotations`, a file says
    the labels; and the directory may hold shards, which `keras-nonlocal shard` wrote of all this.

    Without `views`, each pass draws one random clip of each video by the paper's training recipe
    (section 4.1): a random start, a random size, a random crop, a flip. With `views`, the dataset
    is the paper's test protocol: several clips and crops of each video, nothing random. For a
    given `seed` the clips are the same in each run, however many are decoded in parallel.

    Of the clips, no more are in memory than those that are decoded at a time (`num_parallel_calls`, or the
    machine's cores), two more, and three batches: one that is filled, two that wait.

    Pixels are the RGB values 0..255: map the model's own `preprocess_input` over the dataset.

    Args:
        directory: String or path-like. With `labels="inferred"` and no `annotations` it has a sub-directory for each
            class; otherwise its structure is ignored. It may be a directory of shards, with a file `shards.json`.
        labels: `"inferred"` (from the sub-directories), `None` (no labels), or a list of integer
            labels, one for each video in the alphanumeric order of their paths.
        label_mode: `"int"` (int32 scalars), `"categorical"` (float32 one-hot vectors), `"binary"`
            (float32, 0 or 1, for two classes), `"multi_label"` (float32 vectors of a 1 for each class that is shown) or
            `None` (no labels). `"inferred"`: `"multi_label"` where the annotations give a video several labels, as
            those of Charades do, otherwise `"int"`.
        class_names: List of the classes in the order of their labels, with `labels="inferred"`; in a directory
            without `annotations`, the sub-directories to use. Defaults to the order of the annotations, which is mostly
            the alphanumeric one.
        annotations: String or path-like, a file that lists videos and labels: the CSV files of Kinetics and Charades,
            the splits of UCF-101, lines `path label`; see `read_annotations`.
        annotation_format: The format of `annotations`, a name in `read_annotations`. `None`: seen from its first lines.
        split: `"train"`, `"val"` or `"test"`: the rows of `annotations` to use, if they say their split.
        batch_size: Integer B, or `None` for elements that are not batched.
        num_frames: Integer T, the frames of a clip.
        frame_stride: Integer, the step in the video from one frame of a clip to the next.
        image_size: Integer or pair `(height, width)` of the crops, in pixels. Defaults to
            `(224, 224)`, with `views` to `(256, 256)`. `"whole"`: whole frames, for fully convolutional tests with
            `views=(num_clips, 1)`; as their sizes differ, `batch_size` must be `None` or 1.
        shorter_side: The size in pixels to which the videos' shorter side is resized before the
            crop: an integer, or without `views` also a pair `(low, high)` of which an integer is
            drawn for each clip, both ends included. Defaults to `(256, 320)`, with `views` to 256.
        horizontal_flip: Whether to mirror every second clip at random. Defaults to `True` without
            `views`; must not be true with them.
        views: `None`, or a pair `(num_clips, num_crops)`; the paper's is `(10, 3)`.
        sampling: Which frames are taken: `"recipe"`, `"even"`, `"pyslowfast"` or `"segments"`, see
            `keras_nonlocal.data.training_indices` and `view_indices`.
        shuffle: Whether to draw a random order of the videos; otherwise it is alphanumeric, or that of `annotations`.
            Defaults to `True` without `views`, `False` with them.
        reshuffle_each_iteration: Whether to draw a new order for each pass. The clips of files are new in each pass
            anyway; those of shards repeat with the order.
        seed: Integer seed from 0 to 2**32 - 1, of the order, the split and the random clips. `None` takes one
            from NumPy's global generator, which `keras.utils.set_random_seed` sets.
        validation_split: Float between 0 and 1, the fraction of the videos reserved for validation.
            They are drawn by `seed`, whatever `shuffle` is, so that two calls with one `seed`
            never share a video between `"training"` and `"validation"`.
        subset: `"training"`, `"validation"` or `"both"`, with `validation_split`. `"both"`
            returns a pair of datasets, of which the validation one is never shuffled.
        follow_links: Whether to visit sub-directories that are symbolic links. Not with a directory of shards, for
            which `keras-nonlocal shard` has visited them or not.
        shard: Pair `(num_shards, index)`: only every `num_shards`-th video of each pass, from the `index`-th on.
            Several workers with one `seed` and their own `index` share the videos of every pass among them: files
            anew in each pass, of a directory of shards each worker keeps its own. All must make equally many passes,
            begun ones included, as every worker counts its own: the shares of different passes overlap.
        service: String such as `"grpc://localhost:5000"`, the dispatcher of a `tf.data` service whose workers decode.
            Needs a directory of shards, and a dispatcher that runs already. Each video comes once in a pass, in no
            certain order. With `reshuffle_each_iteration` random clips depend on the clock, no longer on `seed` alone,
            as the workers cannot tell one pass from the next.
        num_parallel_calls: Integer, how many videos are decoded at a time. `None` lets `tf.data`
            decide.
        on_error: `"skip"` drops a video that cannot be decoded, logs it once as a warning of the
            logger `keras_nonlocal` and counts it in the dataset's `report`; a pass in which no
            video could be decoded is an error. `"raise"` makes the first such video an error. `"black"` yields a
            black clip in its place, with its label, so that the number of clips stays known. Wrong rows of
            `annotations` are left out and logged too, or an error with `"raise"`. A pass with broken videos or wrong
            rows ends with one more line of the logger, the `report`'s summary.
        with_paths: Whether to give with each clip the path of its video, as bytes, so that `evaluate_views` can name
            the videos in what it says and writes.
        start: Pair `(pass, position)` of integers from 0 on: the first pass through the dataset is the one of that
            number, and it starts at that position. Nothing that comes before is decoded, and all that follows is as in
            a dataset that has got there pass by pass, so that a training that was stopped goes on where it was. Each
            clip then comes with its own place: after a batch, the next start is the last one's position + 1. Broken
            videos have positions too. Needs a `seed`. With `subset="both"` it is the training dataset's.
        verbose: Whether to print the number of files and classes found.

    Returns:
        A `tf.data.Dataset` of `(clips, labels)`, or of `clips` alone without labels; `with_paths`, of
        `(clips, labels, paths)` or `(clips, paths)`. With `start` one more comes last, the places, int64 of shape
        `(B, 2)`, the pass and the position of each clip. `clips` is
        uint8 of shape `(B, T, height, width, 3)`; with `views`, `(B, V, T, height, width, 3)`,
        where V = `num_clips * num_crops`, all crops of the first clip first. `labels` is of shape
        `(B,)`, for `"categorical"` and `"multi_label"` `(B, K)`, for `"binary"` `(B, 1)`. The dataset has
        the attributes `class_names`, `file_paths` (in the order without `shuffle`; of a `shard` its own, which are
        those of the first pass where files are shuffled anew in each) and `report`, a `DecodeReport`.
        With `on_error="skip"` its cardinality is unknown.

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
    if label_mode != "inferred" and label_mode not in _LABEL_MODES and label_mode is not None:
        raise ValueError(
            f'`label_mode` must be "inferred", None or one of {list(_LABEL_MODES)}. Received: label_mode={label_mode!r}'
        )
    if labels is None or label_mode is None:
        labels = label_mode = None
    if on_error not in ("skip", "raise", "black"):
        raise ValueError(f'`on_error` must be "skip", "raise" or "black". Received: on_error={on_error!r}')
    if batch_size is not None:
        check_positive(batch_size=batch_size)
    _check_split(validation_split, subset, seed)
    _check_shard(shard, service)
    _check_start(start, seed, service)
    if seed is None:
        seed = int(np.random.randint(1_000_000))
    check_seed(seed)
    clip = clip_options(num_frames, frame_stride, image_size, shorter_side, horizontal_flip, views, sampling)
    if clip.image_size is None and batch_size not in (None, 1):
        raise ValueError(f'`batch_size` must be None or 1 with `image_size="whole"`. Received: batch_size={batch_size}')
    if shuffle is None:
        shuffle = views is None

    index = _shard_index(directory)
    if index is not None:
        shards.check_no_annotations(
            annotations=annotations, annotation_format=annotation_format, split=split, follow_links=follow_links or None
        )
        videos, usable = _shard_videos(index, labels, class_names)
    else:
        if service is not None:
            raise ValueError(
                "`service` needs shards, as Python's decoder cannot run in other processes: write them first, by "
                f"`keras-nonlocal shard DATA OUT`. Received: service={service!r}, directory={os.fspath(directory)!r}"
            )
        videos = read_annotations(
            directory, annotations, annotation_format, split, labels, class_names, follow_links, on_error
        )
        usable = np.arange(len(videos.paths))
    if verbose:
        classes = "" if videos.labels is None else f" belonging to {len(videos.class_names)} classes"
        print(f"Found {len(usable)} files{classes}.")
    encoded = _encode_labels(videos, label_mode)

    def build(chosen, shuffle, start=None):
        first_pass, first_position = start or (0, 0)
        # Shards are shared once and then shuffled, files shuffled and then shared in each pass.
        drawn = first_pass if reshuffle_each_iteration else 0
        order = chosen if index is not None else _draw_order(chosen, shuffle, seed, drawn)
        own = np.sort(_share(order, shard))
        if not len(own):
            raise ValueError(f"There must be a video for each shard, of {len(chosen)} videos. Received: shard={shard}")
        if first_position > len(own):
            raise ValueError(
                f"`start` must be a place in a pass of {len(own)} videos, at most its end. Received: start={start!r}"
            )
        if index is None:
            elements = _file_source(
                videos.paths, chosen, clip, shuffle, reshuffle_each_iteration, seed, shard, num_parallel_calls, start
            )
        else:
            elements = shards.shard_source(
                index,
                chosen,
                clip,
                shuffle=shuffle,
                reshuffle_each_iteration=reshuffle_each_iteration,
                seed=seed,
                shard=shard,
                num_parallel_calls=num_parallel_calls,
                distributed=service is not None,
                start=start,
            )
        if service is not None:
            _check_service(service)
            elements = _distributed(elements, service)
        report = DecodeReport(videos.skipped, is_replaced=on_error == "black")
        dataset = _received(elements, clip, len(own), videos.paths, encoded, with_paths, report, on_error, start)
        if batch_size is not None:
            dataset = dataset.batch(batch_size)
        # Not AUTOTUNE, which lets the buffer grow with the memory that is free.
        dataset = dataset.prefetch(2)
        dataset.class_names = None if videos.class_names is None else list(videos.class_names)
        dataset.file_paths = [videos.paths[number] for number in own]
        dataset.report = report
        return dataset

    if validation_split is None:
        return build(usable, shuffle, start)
    num_validation = int(validation_split * len(usable))
    order = np.random.RandomState(seed).permutation(usable)
    subsets = {
        "training": np.sort(order[num_validation:]),
        "validation": np.sort(order[:num_validation]),
    }
    for name, chosen in subsets.items():
        if not len(chosen):
            raise ValueError(
                f"The {name} subset of {len(usable)} videos is empty. Received: validation_split={validation_split}"
            )
    if subset == "both":
        return build(subsets["training"], shuffle, start), build(subsets["validation"], False)
    return build(subsets[subset], shuffle, start)


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


def _check_shard(shard, service):
    if shard is None:
        return
    is_pair = isinstance(shard, (tuple, list)) and len(shard) == 2
    if not is_pair or not all(isinstance(part, (int, np.integer)) for part in shard) or not 0 <= shard[1] < shard[0]:
        raise ValueError(
            f"`shard` must be None or a pair (num_shards, index), 0 <= index < num_shards. Received: shard={shard!r}"
        )
    if service is not None:
        raise ValueError(
            "`shard` cannot be passed with `service`, whose workers share the videos as they come. "
            f"Received: shard={shard}, service={service!r}"
        )


def _check_start(start, seed, service):
    if start is None:
        return
    is_pair = isinstance(start, (tuple, list)) and len(start) == 2
    if not is_pair or not all(isinstance(part, (int, np.integer)) and part >= 0 for part in start):
        raise ValueError(
            f"`start` must be None or a pair (pass, position) of integers from 0 on. Received: start={start!r}"
        )
    if seed is None:
        raise ValueError("`start` needs a `seed`, or the order would be another one. Received: seed=None")
    if service is not None:
        raise ValueError(
            "`start` cannot be passed with `service`, whose order is never the same. "
            f"Received: start={start!r}, service={service!r}"
        )


def _share(items, shard):
    return items if shard is None else items[shard[1] :: shard[0]]


# Labels

_LABEL_MODES = ("int", "categorical", "binary", "multi_label")


def _encode_labels(videos, label_mode):
    """The labels of all videos as the dataset gives them, or None."""
    if label_mode is None:
        return None
    labels, class_names = videos.labels, list(videos.class_names)
    is_multi_label = labels.ndim == 2
    if label_mode == "inferred":
        label_mode = "multi_label" if is_multi_label else "int"
    if is_multi_label:
        if label_mode != "multi_label":
            raise ValueError(
                f'The annotations give a video several labels, as label_mode="multi_label". '
                f"Received: label_mode={label_mode!r}"
            )
        return labels
    if label_mode == "binary" and len(class_names) != 2:
        raise ValueError(f'`label_mode="binary"` needs exactly 2 classes. Received: class_names={class_names}')
    if label_mode != "int" and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"`labels` must be in [0, {len(class_names)}), the number of classes, with "
            f"label_mode={label_mode!r}. Received: labels from {labels.min()} to {labels.max()}"
        )
    if label_mode in ("categorical", "multi_label"):
        return np.eye(len(class_names), dtype="float32")[labels]
    return labels.astype("float32")[:, None] if label_mode == "binary" else labels


# Directories of shards


def _shard_index(directory):
    """The index of a directory of shards, or None for a directory of videos."""
    return shards.read_index(directory) if shards.is_shards(directory) else None


def _shard_videos(index, labels, class_names):
    """The videos of shards as `Annotations`, and the numbers of those that have one of the classes."""
    paths, everything = tuple(index.paths), np.arange(len(index.paths))
    if labels is not None and (index.labels is None or index.class_names is None):
        raise ValueError(f"These shards have no named classes: pass `labels=None`. Received: labels={labels!r}")
    if labels is None:
        if class_names is not None:
            raise ValueError(
                '`class_names` can only be passed with `labels="inferred"`. '
                f"Received: labels=None, class_names={class_names}"
            )
        return Annotations(paths, None, None), everything
    if labels != "inferred":
        raise ValueError(f'`labels` must be "inferred" or None with shards. Received: labels={labels!r}')
    is_multi_label = index.labels.ndim == 2
    old_labels = index.labels if is_multi_label else index.labels.astype("int32")
    if class_names is None:
        return Annotations(paths, old_labels, tuple(index.class_names)), everything
    if not 0 < len(class_names) == len(set(class_names) & set(index.class_names)):
        raise ValueError(
            f"`class_names` must be classes of the shards, which have {list(index.class_names)}. "
            f"Received: class_names={list(class_names)}"
        )
    old_numbers = [list(index.class_names).index(name) for name in class_names]
    if is_multi_label:
        return Annotations(paths, old_labels[:, old_numbers], tuple(class_names)), everything
    new_numbers = np.full(len(index.class_names), -1, "int32")
    new_numbers[old_numbers] = np.arange(len(class_names))
    renumbered = new_numbers[old_labels]
    return Annotations(paths, renumbered, tuple(class_names)), np.flatnonzero(renumbered >= 0)


def _check_service(service):
    """TensorFlow would ask an address at which nobody listens again and again, for ever."""
    parts = urllib.parse.urlsplit(service) if isinstance(service, str) else None
    try:
        is_address = bool(parts and parts.scheme and parts.hostname and parts.port)
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        raise ValueError(
            '`service` must be the address of a dispatcher, such as "grpc://localhost:5000". '
            f"Received: service={service!r}"
        )
    if parts.scheme == "grpc":
        try:
            socket.create_connection((parts.hostname, parts.port), timeout=10).close()
        except OSError as error:
            raise ValueError(
                f"`service` must be the address of a dispatcher that runs ({error}). Received: service={service!r}"
            ) from error


def _distributed(elements, service):
    """`elements` as the workers of a `tf.data` service make them.

    With dynamic sharding the dispatcher hands every part of a pass to one worker, whichever is free: each video comes
    once however many workers there are and however fast each is. Without sharding each worker would make the whole
    pass, and static sharding needs the workers' addresses beforehand.
    """
    return elements.apply(
        tf.data.experimental.service.distribute(
            processing_mode=tf.data.experimental.service.ShardingPolicy.DYNAMIC, service=service
        )
    )


# Sources give (clip, number of the video, whether it is good, what is wrong with it), and with a start its place


def _draw_order(chosen, shuffle, seed, number):
    """The order of pass `number` through files."""
    return np.random.default_rng((seed, 0, number)).permutation(chosen) if shuffle else np.asarray(chosen)


def _file_source(paths, chosen, clip, shuffle, reshuffle_each_iteration, seed, shard, num_parallel_calls, start):
    """Decodes video files. The order and the clips of pass n depend on `(seed, n)` only, not on TensorFlow's seed."""
    first_pass, first_position = start or (0, 0)
    passes = itertools.count(first_pass)

    def draw_pass():
        number = next(passes)
        order = _draw_order(chosen, shuffle, seed, number if reshuffle_each_iteration else 0)
        # A seed of its own for each clip: the clips do not depend on which thread comes first.
        seeds = np.random.default_rng((seed, 1, number)).integers(2**63 - 1, size=len(order))
        order, seeds = _share(order, shard).astype("int64"), _share(seeds, shard)
        places = np.stack([np.full(len(order), number), np.arange(len(order))], axis=1).astype("int64")
        skipped = first_position if number == first_pass else 0
        return order[skipped:], seeds[skipped:], places[skipped:]

    def pass_dataset(_):
        order, seeds, places = tf.numpy_function(draw_pass, [], (tf.int64, tf.int64, tf.int64))
        columns = (tf.ensure_shape(order, (None,)), tf.ensure_shape(seeds, (None,)))
        if start is not None:
            columns += (tf.ensure_shape(places, (None, 2)),)
        return tf.data.Dataset.from_tensor_slices(columns)

    def decode(number, seed):
        try:
            return load_clip(paths[number], clip, seed), True, b""
        except VideoError as error:
            return _blank(clip), False, str(error).encode("utf-8", "surrogateescape")

    def decode_element(number, seed, *place):
        frames, is_good, message = tf.numpy_function(decode, [number, seed], (tf.uint8, tf.bool, tf.string))
        frames, is_good = tf.ensure_shape(frames, clip.shape), tf.ensure_shape(is_good, ())
        return frames, number, is_good, tf.ensure_shape(message, ()), *place

    return (
        tf.data.Dataset.range(1)
        .flat_map(pass_dataset)
        .map(decode_element, num_parallel_calls=num_parallel_calls or tf.data.AUTOTUNE, deterministic=True)
    )


def _blank(clip):
    return np.zeros([clip.shorter_side[0] if size is None else size for size in clip.shape], "uint8")


def _received(elements, clip, num_videos, paths, labels, with_paths, report, on_error, start):
    """Reports on the elements of a source; gives (clip, label, path, place), or less of it, of those that stay."""
    is_cut = start is not None and start[1] > 0  # the pass that is read: what came before may have been good

    def receive(number, is_good, message, any_good):
        nonlocal is_cut
        if number < 0:
            was_cut, is_cut = is_cut, False
            if not any_good and not was_cut:
                raise VideoError(f"No video could be decoded: {report.summary()}")
            if report.broken or report.skipped_rows:
                _LOGGER.warning("End of a pass: %s", report.summary())
            return False
        if is_good:
            report.add_good(paths[number])
            return True
        message = message.decode("utf-8", "surrogateescape")
        if on_error == "raise":
            raise VideoError(message)
        report.add_broken(paths[number], message)
        return any_good

    def remember_good(any_good, element):
        frames, number, is_good, message, *place = element
        any_good = tf.numpy_function(receive, [number, is_good, message, any_good], tf.bool)
        stays = (is_good | (on_error == "black")) & (number >= 0)
        return tf.ensure_shape(any_good, ()), (frames, number, stays, *place)

    # One more element, which never stays, ends each pass.
    end = (_blank(clip), np.int64(-1), False, "")
    if start is not None:
        end += (np.zeros(2, "int64"),)
    dataset = elements.concatenate(tf.data.Dataset.from_tensors(end)).scan(tf.constant(False), remember_good)
    dataset = dataset.filter(lambda frames, number, stays, *place: stays)

    names = [os.fsencode(path) for path in paths]

    def labelled(frames, number, stays, *place):
        element = (tf.ensure_shape(frames, clip.shape),)
        if labels is not None:
            element += (tf.gather(labels, number),)
        if with_paths:
            element += (tf.gather(tf.constant(names), number),)
        element += place
        return element if len(element) > 1 else element[0]

    # One call at a time: without a number tf.data makes it as many as there are cores, each with a clip.
    dataset = dataset.map(labelled, num_parallel_calls=1)
    if on_error != "skip" and not is_cut:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(num_videos))
    return dataset
