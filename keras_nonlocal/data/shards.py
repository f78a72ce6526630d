"""Videos as shards: TFRecord files of JPEG frames, written once and then read by TensorFlow's own operations.

A directory of shards holds `videos-00000-of-00042.tfrecord` and so on, and the index `shards.json`, which knows every
video's place, label and size. A video is a record that describes it, its head, a `tf.train.Example`, and after it one
record a frame, a JPEG. So a clip costs one read of the head, which says where the frames are, and one from the clip's
first frame to its last, in any order, wherever `tf.io.gfile` reads from. No Python function takes part in it: the
datasets run in the workers of the `tf.data` service too.

Shape letters: V views (clips x crops), T frames, F frames of the whole video, H and W height and width, C = 3 colours.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import logging
import os

import numpy as np
import PIL.Image
import tensorflow as tf

from .clips import check_positive
from .decode import VideoError, VideoReader
from .resizing import resized_size, resized_window
from .sampling import random_crop_position, training_positions, view_crop_positions, view_positions

INDEX = "shards.json"
# What is being written, and with which options, until the index takes its place.
_UNFINISHED = "shards.partial.json"
_VERSION = 2

# A record of a TFRecord file is the data and around them 16 bytes: their length and its checksum, their checksum.
_AROUND_BYTES = 16
_BUFFER_BYTES = 256 * 1024

# Where frames become smaller than this, random clips too are resized with wider triangles, against aliasing.
_LEAST_LINEAR_SCALE = 0.75

# What differs between the file systems that TensorFlow knows and those of tensorflow-io, whose last release
# loads in this release of TensorFlow only.
_IO_PACKAGES = ("tensorflow==2.16.2", "tensorflow-io==0.37.1")

_LOGGER = logging.getLogger("keras_nonlocal")


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What a directory of shards holds. The videos are numbered in the order of the shards.

    Attributes:
        directory: String, where the shards are.
        class_names: Tuple of strings, or `None`.
        paths: Tuple of strings, for each video its path below the directory that all came from.
        labels: int32 array of shape `(n,)`, float32 array of zeros and ones of shape `(n, num_classes)`, or `None`.
        num_frames: int64 array of shape `(n,)`.
        sizes: int64 array of shape `(n, 2)`, the height and width of the stored frames.
        files: Tuple of strings, the names of the shards.
        file_numbers: int64 array of shape `(n,)`, for each video which of `files` holds it.
        offsets: int64 array of shape `(n,)`, where its first record begins in that file.
        skipped: Dict from the path of a video that could not be decoded to what was wrong with it.
    """

    directory: str
    class_names: tuple | None
    paths: tuple
    labels: np.ndarray | None
    num_frames: np.ndarray
    sizes: np.ndarray
    files: tuple
    file_numbers: np.ndarray
    offsets: np.ndarray
    skipped: dict


# Writing


def write_shards(
    annotations,
    out,
    shorter_side=320,
    quality=90,
    videos_per_shard=32,
    num_parallel_calls=None,
    on_error="skip",
    verbose=True,
):
    """Writes videos as shards: TFRecord files of JPEG frames.

    The videos are dealt out to the shards in a random order, always the same. A shard appears under its name only
    when it is complete. A run that was interrupted goes on where it stopped when it is started again: shards that
    are there are compared with their checksums and written anew if they are damaged, if the file of one of their
    videos has another size than before, or if a video that they lack can now be decoded.

    Memory is bounded: of each video that is decoded, one raw frame and the JPEGs are held.

    Args:
        annotations: An `Annotations`: the `paths` of the videos, their `labels` and `class_names`.
        out: String or path-like, the directory to write to, on any file system that `tf.io.gfile` knows.
        shorter_side: Integer, the size in pixels to which the frames' shorter side is resized. Smaller videos are
            not enlarged.
        quality: Integer from 1 to 100, of the JPEGs.
        videos_per_shard: Integer, how many videos a shard holds.
        num_parallel_calls: Integer, how many videos are decoded at a time. `None`: as many as there are processors.
        on_error: `"skip"` leaves out a video that cannot be decoded, logs it and lists it in the index; `"raise"`
            makes it an error.
        verbose: Whether to print a line a shard.

    Returns:
        The `ShardIndex` of what was written.

    Raises:
        ValueError: If an argument is out of range, or `out` holds shards of other paths, labels or options.
        VideoError: If no video can be decoded, with `on_error="raise"` if one cannot.

    Example:

    >>> import tempfile, os, numpy as np
    >>> from keras_nonlocal.data import write_video
    >>> from keras_nonlocal.data.annotations import Annotations
    >>> from keras_nonlocal.data.shards import write_shards
    >>> folder = tempfile.mkdtemp()
    >>> path = os.path.join(folder, "grey.mp4")
    >>> write_video(path, np.full((20, 48, 64, 3), 128, "uint8"))
    >>> annotations = Annotations(paths=(path,), labels=np.array([0]), class_names=("grey",))
    >>> index = write_shards(annotations, os.path.join(folder, "shards"), shorter_side=24, verbose=False)
    >>> index.paths, index.num_frames, index.sizes
    (('grey.mp4',), array([20]), array([[24, 32]]))
    """
    check_positive(shorter_side=shorter_side, quality=quality, videos_per_shard=videos_per_shard)
    if quality > 100:
        raise ValueError(f"`quality` must be an integer from 1 to 100. Received: quality={quality}")
    if num_parallel_calls is not None:
        check_positive(num_parallel_calls=num_parallel_calls)
    if on_error not in ("skip", "raise"):
        raise ValueError(f'`on_error` must be "skip" or "raise". Received: on_error={on_error!r}')
    out = _directory(out)
    encoder = _Encoder(annotations, int(shorter_side), int(quality))
    plan = {
        "version": _VERSION,
        "options": {
            "shorter_side": int(shorter_side),
            "quality": int(quality),
            "videos_per_shard": int(videos_per_shard),
        },
        "class_names": None if annotations.class_names is None else list(annotations.class_names),
        "label_kind": _label_kind(annotations.labels),
        "num_classes": None if np.ndim(annotations.labels) < 2 else int(np.shape(annotations.labels)[1]),
        "num_videos": len(annotations.paths),
        "videos": encoder.digest(),
    }
    # The classes come mixed in every shard although annotations list one after the other.
    order = np.random.default_rng(0).permutation(len(annotations.paths))
    parts = [order[start : start + videos_per_shard] for start in range(0, len(order), videos_per_shard)]

    finished = _open_directory(out, plan)
    shards = []
    num_threads = num_parallel_calls or os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as executor:
        encode = functools.partial(_mapped, executor, encoder, ahead=num_threads + 1)
        for number, part in enumerate(parts):
            file = f"videos-{number:05d}-of-{len(parts):05d}.tfrecord"
            state = _join(out, file + ".json")
            shard = _read_json(state) if tf.io.gfile.exists(state) else finished.get(file)
            is_there = shard is not None and _is_up_to_date(out, shard, part, encoder, encode, on_error)
            if not is_there:
                if tf.io.gfile.exists(_join(out, INDEX)):  # from here on it would be wrong
                    tf.io.gfile.rename(_join(out, INDEX), _join(out, _UNFINISHED), overwrite=True)
                shard = _write_shard(out, file, part, encoder, encode, on_error)
                _write_json(state, shard)
            shards.append(shard)
            if verbose:
                print(
                    f"{file}: {len(shard['videos'])} videos, {len(shard['skipped'])} broken, "
                    f"{shard['bytes'] / 1e6:.1f} MB{', was there' if is_there else ''}",
                    flush=True,
                )
    if not any(shard["videos"] for shard in shards):
        reasons = [reason for shard in shards for reason in shard["skipped"].values()]
        raise VideoError(f"No video could be decoded: {len(reasons)} are broken, the first: {reasons[:1]}")
    _write_json(_join(out, INDEX), plan | {"shards": shards})
    for name in (_UNFINISHED, *(shard["file"] + ".json" for shard in shards)):
        if tf.io.gfile.exists(_join(out, name)):
            tf.io.gfile.remove(_join(out, name))
    return read_index(out)


class _Encoder:
    """From the number of a video to its records."""

    def __init__(self, annotations, shorter_side, quality):
        self.annotations = annotations
        self._shorter_side = shorter_side
        self._quality = quality
        paths = [os.path.abspath(path) for path in annotations.paths]
        root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        self.names = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]

    def label(self, video):
        """An integer, a list of the classes that are set, or `None`."""
        labels = self.annotations.labels
        if labels is None:
            return None
        return int(labels[video]) if np.ndim(labels) == 1 else np.flatnonzero(labels[video]).tolist()

    def digest(self):
        """What tells one list of videos from another."""
        rows = [[name, self.label(video)] for video, name in enumerate(self.names)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def file_sizes(self, videos):
        """What tells a file from one that took its place."""
        return [_file_size(self.annotations.paths[video]) for video in videos]

    def __call__(self, video):
        """Returns the records and what the index says of them, or else the `VideoError`."""
        try:
            with VideoReader(self.annotations.paths[video]) as reader:
                sizes = set()

                def jpeg(image):
                    sizes.add(image.shape[:2])
                    return self._jpeg(image)

                jpegs = reader.map_frames(jpeg, self._shorter_side)
                if len(sizes) > 1:
                    raise VideoError(f"Cannot decode {reader.path}: its frames are of several sizes, {sorted(sizes)}")
                timestamps = reader.timestamps
            return self._records(video, jpegs, timestamps, sizes.pop())
        except VideoError as error:
            return error

    def _jpeg(self, image):
        stream = io.BytesIO()
        PIL.Image.fromarray(np.ascontiguousarray(image)).save(stream, "JPEG", quality=self._quality)
        return stream.getvalue()

    def _records(self, video, jpegs, timestamps, size):
        name, label, (height, width) = self.names[video], self.label(video), map(int, size)
        ends = np.cumsum([len(jpeg) + _AROUND_BYTES for jpeg in jpegs])
        features = {
            "name": tf.train.Feature(bytes_list=tf.train.BytesList(value=[os.fsencode(name)])),
            "label": tf.train.Feature(
                int64_list=tf.train.Int64List(value=[] if label is None else np.atleast_1d(label).tolist())
            ),
            "timestamps": tf.train.Feature(float_list=tf.train.FloatList(value=timestamps)),
            "height": tf.train.Feature(int64_list=tf.train.Int64List(value=[height])),
            "width": tf.train.Feature(int64_list=tf.train.Int64List(value=[width])),
            # Where each frame's record begins, counted from the end of this one.
            "frame_offsets": tf.train.Feature(int64_list=tf.train.Int64List(value=[0, *ends[:-1]])),
        }
        head = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
        entry = {"path": name, "label": label, "num_frames": len(jpegs), "height": height, "width": width}
        return [head, *jpegs], entry


def _write_shard(out, file, videos, encoder, encode, on_error):
    """Writes one shard and returns what the index says of it."""
    path = _join(out, file)
    entries, skipped, position = [], {}, 0
    source_bytes = encoder.file_sizes(videos)
    with _whole(path) as scratch, tf.io.TFRecordWriter(scratch) as writer:
        for video, result in zip(videos, encode(videos), strict=True):
            if isinstance(result, VideoError):
                _skip(result, on_error)
                skipped[encoder.names[video]] = str(result)
                continue
            records, entry = result
            entries.append(entry | {"offset": position})
            for record in records:
                writer.write(record)
                position += len(record) + _AROUND_BYTES
    shard = {
        "file": file,
        "bytes": position,
        "sha256": _sha256(path),
        "source_bytes": source_bytes,
        "videos": entries,
        "skipped": skipped,
    }
    damage = _damage(out, shard, checksum=False)
    if damage is not None:
        raise OSError(f"Writing {path} failed: {damage}")
    return shard


def _is_up_to_date(out, shard, videos, encoder, encode, on_error):
    """Whether a shard is as it would be if it were written now."""
    if shard.get("source_bytes") != encoder.file_sizes(videos) or _damage(out, shard) is not None:
        return False
    errors = []
    # A disk that was away or a decoder that is newer: the same file may be good now.
    for result in encode([video for video in videos if encoder.names[video] in shard["skipped"]]):
        if not isinstance(result, VideoError):
            return False
        errors.append(result)
    for error in errors:
        _skip(error, on_error)
    return True


def _skip(error, on_error):
    if on_error == "raise":
        raise error
    _LOGGER.warning("Skipped a broken video. %s", error)


def _mapped(executor, function, items, ahead):
    """`map` by threads that are at most `ahead` items ahead of who takes the results."""
    futures = collections.deque()
    try:
        for item in items:
            if len(futures) == ahead:
                yield futures.popleft().result()
            futures.append(executor.submit(function, item))
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def _open_directory(out, plan):
    """Makes the directory, or checks that what it holds was planned alike; returns its shards by their names."""
    tf.io.gfile.makedirs(out)
    for name in (INDEX, _UNFINISHED):
        if tf.io.gfile.exists(_join(out, name)):
            before = _read_json(_join(out, name))
            different = [key for key in plan if before.get(key) != plan[key]]
            if different:
                # Of the videos only a digest is known.
                told = {key: (before.get(key), plan[key]) for key in different if key != "videos"}
                listed = [f"{key} (before {was!r}, now {now!r})" for key, (was, now) in told.items()]
                listed += ["videos (their paths or labels)"] * ("videos" in different)
                raise ValueError(
                    "`out` must be empty or hold shards of the same videos, written with the same options. It differs "
                    f"in {', '.join(listed)}. Pass what was passed before, or another `out`, or delete this one. "
                    f"Received: out={out!r}"
                )
            return {shard["file"]: shard for shard in before.get("shards", ())}
    _write_json(_join(out, _UNFINISHED), plan)
    return {}


def _label_kind(labels):
    return None if labels is None else "int" if np.ndim(labels) == 1 else "multi_hot"


# The index


def is_shards(directory):
    """Whether a directory holds shards that are complete, that is their index `shards.json`."""
    return tf.io.gfile.exists(_join(_directory(directory), INDEX))


def read_index(directory):
    """Reads the index of a directory of shards.

    Args:
        directory: String or path-like, on any file system that `tf.io.gfile` knows.

    Returns:
        A `ShardIndex`.

    Raises:
        ValueError: If there is no index, it is damaged or of a newer version.
    """
    directory = _directory(directory)
    if not is_shards(directory):
        raise ValueError(
            f"`directory` must hold shards, complete with their {INDEX}. Received: directory={directory!r}"
        )
    content = _read_json(_join(directory, INDEX))
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{INDEX} must be of version {_VERSION}. Received: version={content.get('version')!r} in {directory!r}"
        )
    shards, class_names = content["shards"], content["class_names"]
    videos = [video for shard in shards for video in shard["videos"]]
    labels = [video["label"] for video in videos]
    if content["label_kind"] is None:
        labels = None
    elif content["label_kind"] == "int":
        labels = np.array(labels, "int32")
    else:
        classes = labels
        labels = np.zeros((len(videos), content["num_classes"]), "float32")
        for row, columns in zip(labels, classes, strict=True):
            row[columns] = 1

    def column(*names):
        return np.array([[video[name] for name in names] for video in videos], "int64").reshape(-1, len(names))

    return ShardIndex(
        directory=directory,
        class_names=None if class_names is None else tuple(class_names),
        paths=tuple(video["path"] for video in videos),
        labels=labels,
        num_frames=column("num_frames")[:, 0],
        sizes=column("height", "width"),
        files=tuple(shard["file"] for shard in shards),
        file_numbers=np.repeat(np.arange(len(shards)), [len(shard["videos"]) for shard in shards]),
        offsets=column("offset")[:, 0],
        skipped={path: reason for shard in shards for path, reason in shard["skipped"].items()},
    )


def check_no_annotations(**arguments):
    """Raises a `ValueError` if an argument says again where videos and their labels are."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` cannot be passed with shards, which hold their videos and labels. Received: {name}={value!r}"
            )


def verify_shards(directory):
    """Compares every shard of a directory with its checksum.

    Args:
        directory: String or path-like, a directory of shards.

    Returns:
        A dict from the names of damaged shards to what is wrong; empty if all are as they were written.

    Raises:
        ValueError: If `directory` holds no shards.
    """
    index = read_index(directory)
    shards = _read_json(_join(index.directory, INDEX))["shards"]
    damages = {shard["file"]: _damage(index.directory, shard) for shard in shards}
    return {file: damage for file, damage in damages.items() if damage is not None}


def _damage(directory, shard, checksum=True):
    """What is wrong with a shard, or `None`."""
    path = _join(directory, shard["file"])
    size = _file_size(path)
    if size is None:
        return "it is missing"
    if size != shard["bytes"]:
        return f"it has {size} bytes instead of {shard['bytes']}"
    if checksum and _sha256(path) != shard["sha256"]:
        return "its content has changed"
    return None


# Reading


def read_heads(index):
    """Reads the records that describe the videos of shards, and none of their frames.

    Args:
        index: A `ShardIndex`.

    Returns:
        An iterator of pairs for every video: the array of its frames' timestamps in seconds and the pair `(height,
        width)` of their size. Where the record is damaged, a `VideoError` instead.
    """
    paths = [_join(index.directory, file) for file in index.files]

    def read(name, file, offset):
        path = tf.gather(paths, file)
        return _read_records(path, offset, 1)[0], _damage_message(name, path, offset)

    places = tf.data.Dataset.from_tensor_slices((_as_bytes(index.paths), index.file_numbers, index.offsets))
    for head, message in places.map(read, num_parallel_calls=tf.data.AUTOTUNE).as_numpy_iterator():
        if not head:
            yield VideoError(os.fsdecode(message))
            continue
        features = tf.train.Example.FromString(head).features.feature
        height, width = (features[name].int64_list.value[0] for name in ("height", "width"))
        yield np.array(features["timestamps"].float_list.value), (height, width)


def clip_reader(index, clip):
    """Makes the function from the number of a video and a seed, from 0 to 2**63 - 1, to a clip of it as an array.

    It raises a `VideoError` where a record is damaged.
    """
    load = tf.function(_ClipLoader(index, np.arange(len(index.paths)), clip, seed=0))

    def read(number, seed):
        frames, _, is_good, message = load(tf.constant(number, tf.int64), tf.constant(seed, tf.int64))
        if not is_good:
            raise VideoError(os.fsdecode(message.numpy()))
        return frames.numpy()

    return read


def shard_source(
    index,
    chosen,
    clip,
    shuffle,
    seed,
    shard=None,
    num_parallel_calls=None,
    reshuffle_each_iteration=True,
    distributed=False,
    start=None,
):
    """The clips of shards, as a dataset that is TensorFlow's own operations from end to end.

    Each clip reads its own part of its own video, so that any order costs the same: the shuffle is over all videos,
    not over a buffer, and takes no memory. Only the frames of the clip are decoded, each once and of each only the
    window under the crop. The videos' numbers, not file names or threads, seed the random draws.

    Views are exactly the windows of the whole frame, had it been resized. The window of a random clip is rounded to
    whole stored pixels, half a pixel at most, which makes resizing three times as fast.

    A clip of which a record is damaged, that is its checksum is wrong, or whose file is missing or too short, is black
    with `is_good` false; the other clips of its file are read.

    Args:
        index: A `ShardIndex`.
        chosen: Integer array, the numbers of the videos to read, or `None` for all.
        clip: A `ClipOptions`.
        shuffle: Whether to draw an order of the videos.
        seed: Integer seed of the order and the random clips.
        shard: `None`, or a pair `(num, index)`: only every `num`-th of `chosen`, from the `index`-th on.
        num_parallel_calls: Integer, how many clips are decoded at a time. `None` lets `tf.data` decide.
        reshuffle_each_iteration: Whether every pass has an order and clips of its own, else all are as the first.
        distributed: Whether the dataset goes to workers of the `tf.data` service, which cannot tell the passes apart:
            with `reshuffle_each_iteration` the clips then depend on the clock, no longer on `seed` alone, and the
            order is a fixed random one of which stretches (64 videos, less for fewer than 4,096) are shuffled anew.
        start: `None`, or a pair `(pass, position)`: the first pass is the one of that number, from that position on.
            Not with `distributed`.

    Returns:
        A `tf.data.Dataset` of `(clip, number, is_good, message)`: a uint8 tensor of the shape `clip.shape`, the int64
        number of the video, a bool, and a string that says what is wrong where `is_good` is false. With `start`, of
        `(clip, number, is_good, message, place)`, int64 of the pass and the position in it.
    """
    numbers = np.arange(len(index.paths)) if chosen is None else np.asarray(chosen, "int64")
    if shard is not None:
        numbers = numbers[shard[1] :: shard[0]]
    order = _order(len(numbers), shuffle, seed, reshuffle_each_iteration, distributed, start)
    load = _ClipLoader(index, numbers, clip, seed)
    return order.map(
        lambda position, epoch, *place: (*load(position, epoch), *place),
        num_parallel_calls=num_parallel_calls or tf.data.AUTOTUNE,
        deterministic=True,
    )


def _order(count, shuffle, seed, reshuffle, distributed, start=None):
    """A dataset of `(position, epoch)`: every position from 0 to `count` once, and what tells a pass from others.

    With `start` it begins there, and the place of each, `(pass, position)`, comes third.
    """

    def shuffled(position, epoch, count):
        """A permutation that is a function: no buffer, and the same in every worker."""
        if not shuffle:
            return position
        return tf.random.experimental.index_shuffle(position, tf.stack([tf.constant(seed, tf.int64), epoch]), count - 1)

    first = tf.constant(0, tf.int64)
    if not reshuffle and start is None:
        return tf.data.Dataset.range(count).map(lambda position: (shuffled(position, first, count), first))
    if not distributed:
        first_pass, first_position = start or (0, 0)
        # Not `Dataset.random`, which TensorFlow's global seed changes.
        passes = tf.Variable(first_pass, dtype=tf.int64)

        def one_pass(_):
            number = passes.assign_add(1)  # 1 in the first pass
            epoch = number if reshuffle else first
            skipped = tf.where(number == first_pass + 1, tf.constant(first_position, tf.int64), first)

            def element(position):
                place = () if start is None else (tf.stack([number - 1, position]),)
                return shuffled(position, epoch, count), epoch, *place

            return tf.data.Dataset.range(skipped, count).map(element)

        return tf.data.Dataset.range(1).flat_map(one_pass)
    # The service deals out the elements of the source, here stretches. It restarts the random generators of its
    # workers in every pass: only the clock tells passes apart.
    length = min(max(count // 64, 1), 64)

    def stretch(start):
        epoch = tf.bitcast(tf.timestamp(), tf.int64)
        size = tf.minimum(tf.constant(length, tf.int64), count - start)
        return tf.data.Dataset.range(size).map(
            lambda position: (shuffled(start + shuffled(position, epoch, size), first, count), epoch)
        )

    return tf.data.Dataset.range(0, count, length).flat_map(stretch)


class _ClipLoader:
    """From a position among the chosen records to `(clip, number, is_good, message)`, in graph operations."""

    def __init__(self, index, numbers, clip, seed):
        self._clip = clip
        self._seed = seed
        self._paths = [_join(index.directory, file) for file in index.files]
        self._columns = {
            "number": numbers,
            "file": index.file_numbers[numbers],
            "offset": index.offsets[numbers],
            "num_frames": index.num_frames[numbers],
            "size": index.sizes[numbers],
        }
        self._names = _as_bytes(index.paths[number] for number in numbers)

    def __call__(self, position, epoch):
        clip = self._clip
        video = {name: tf.gather(tf.constant(column, tf.int64), position) for name, column in self._columns.items()}
        # Seeded by video and pass: whoever loads it, and whatever was loaded before, the clip is the same.
        key = tf.stack([tf.constant(self._seed, tf.int64), epoch])
        key = tf.random.experimental.stateless_fold_in(key, video["number"])
        uniform = tf.random.stateless_uniform([clip.num_frames + 4], key, dtype=tf.float64)
        frames, corners, size, resized = self._geometry(video, uniform)
        unique, places = tf.unique(tf.reshape(frames, [-1]))
        jpegs, is_good = self._read(video, unique)
        top_left = tf.reduce_min(corners, axis=0)
        extent = tf.reduce_max(corners, axis=0) + size - top_left
        images = tf.cond(
            is_good,
            lambda: self._decode(jpegs, video["size"], resized, top_left, extent),
            lambda: tf.zeros(tf.concat([tf.shape(unique, tf.int64), extent, [3]], 0), tf.uint8),
        )
        places = tf.reshape(places, tf.shape(frames))
        num_corners = 1 if clip.views is None else clip.views[1]
        crops = []
        for corner in tf.unstack(corners - top_left, num=num_corners):
            crop = images[:, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
            crops.append(tf.gather(crop, places))
        if clip.views is None:
            result = crops[0]
            if clip.horizontal_flip:
                result = tf.cond(uniform[-1] < 0.5, lambda: tf.reverse(result, [2]), lambda: result)
        else:
            result = tf.stack(crops, axis=1)
            result = tf.reshape(result, tf.concat([[clip.views[0] * clip.views[1]], tf.shape(result)[2:]], 0))
        name = tf.gather(tf.constant(self._names, tf.string), position)
        message = _damage_message(name, tf.gather(self._paths, video["file"]), video["offset"])
        return tf.ensure_shape(result, clip.shape), video["number"], is_good, tf.where(is_good, "", message)

    def _read(self, video, frames):
        """The JPEGs of `frames`, and whether they are as they were written."""
        path = tf.gather(self._paths, video["file"])
        head = _read_records(path, video["offset"], 1)[0]

        def read():
            feature = tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)
            offsets = tf.io.parse_single_example(head, {"frame_offsets": feature})["frame_offsets"]
            first = tf.reduce_min(frames)
            start = video["offset"] + tf.cast(tf.strings.length(head), tf.int64) + _AROUND_BYTES + offsets[first]
            return tf.gather(_read_records(path, start, tf.reduce_max(frames) + 1 - first), frames - first)

        jpegs = tf.cond(head != "", read, lambda: tf.fill(tf.shape(frames), ""))
        return jpegs, tf.reduce_all(jpegs != "")

    def _geometry(self, video, uniform):
        """Frame numbers, the crops' corners and size, and the size of the whole frame that they lie in."""
        clip, xp = self._clip, tf.experimental.numpy
        arguments = (video["num_frames"], clip.num_frames, clip.frame_stride)
        low, high = clip.shorter_side
        side = low + tf.cast(uniform[-2] * (high - low + 1), tf.int64)
        resized = resized_size(video["size"], side)
        size = resized if clip.image_size is None else tf.constant(clip.image_size, tf.int64)
        if clip.views is None:
            frames = training_positions(*arguments, uniform[: clip.num_frames], clip.sampling, xp=xp)
            corners = random_crop_position(resized[0], resized[1], size, uniform[-4:-2], xp=xp)[None]
        else:
            frames = view_positions(*arguments, clip.views[0], clip.sampling, xp=xp)
            corners = view_crop_positions(resized[0], resized[1], size, clip.views[1], xp=xp)
        return frames, corners, size, resized

    def _decode(self, jpegs, stored, resized, top_left, extent):
        """The windows of `extent` at `top_left` of the frames, had they been resized from `stored` to `resized`."""
        scale = tf.cast(resized, tf.float64) / tf.cast(stored, tf.float64)
        # In pixels of the stored frame, the window and where it ends.
        first, last = (tf.cast(place, tf.float64) / scale for place in (top_left, top_left + extent))
        is_linear = self._clip.views is None and tf.reduce_min(scale) >= _LEAST_LINEAR_SCALE

        def decoded(first, last, resize):
            # Colours are stored at half the resolution: at its border a window lacks what they are interpolated from.
            before = tf.minimum(first, 2)
            window = tf.concat([first - before, tf.minimum(last + 2, tf.cast(stored, tf.float64)) - first + before], 0)
            window, before, size = (tf.cast(pixels, tf.int32) for pixels in (window, before, last - first))

            def image(jpeg):  # one at a time: resized frames are four times as large before they are rounded
                pixels = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3, dct_method="INTEGER_ACCURATE")
                pixels = pixels[before[0] : before[0] + size[0], before[1] : before[1] + size[1]]
                return pixels if resize is None else tf.cast(resize(pixels[None])[0], tf.uint8)

            return tf.map_fn(image, jpegs, fn_output_signature=tf.TensorSpec([None, None, 3], tf.uint8))

        def linear():
            corner = tf.minimum(tf.round(first), tf.cast(stored, tf.float64) - 1)

            def resize(image):
                size = tf.cast(extent, tf.int32)
                return tf.round(tf.raw_ops.ResizeBilinear(images=image, size=size, half_pixel_centers=True))

            return decoded(corner, tf.maximum(tf.round(last), corner + 1), resize)

        is_same = tf.reduce_all(resized == stored)
        return tf.case(
            [(is_same, lambda: decoded(first, last, None)), (tf.convert_to_tensor(is_linear), linear)],
            default=lambda: decoded(*resized_window(stored, resized, top_left, extent)),
        )


def _read_records(path, offset, count):
    """`count` records of a file from `offset` on, empty from where they cannot be read."""
    # The public `TFRecordDataset` does not take offsets.
    source = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path],
        compression_type="",
        buffer_size=tf.constant(_BUFFER_BYTES, tf.int64),
        byte_offsets=[offset],
    )
    records = tf.data.experimental.from_variant(source, tf.TensorSpec([], tf.string))
    # The range ends `ignore_errors`, which would read a missing file for ever.
    records = tf.data.Dataset.zip(tf.data.Dataset.range(count), records).ignore_errors()
    records = records.map(lambda _, record: record).concatenate(tf.data.Dataset.from_tensors("").repeat(count))
    return records.take(count).batch(count).get_single_element()


def _damage_message(name, path, offset):
    """In the words of a `VideoError`."""
    file = tf.strings.split(path, "/")[-1]
    place = tf.strings.join([file, " from byte ", tf.strings.as_string(offset)])
    return tf.strings.join(["Cannot decode ", name, ": its records in ", place, " on are damaged"])


def _as_bytes(names):
    """Names of files need not be UTF-8."""
    return [os.fsencode(name) for name in names]


# Files, wherever they are


def _directory(directory):
    """The directory as a string, its file system being there."""
    directory = os.fspath(directory)
    if "://" not in directory:
        directory = os.path.abspath(directory)  # for workers of a service, which stand elsewhere
    else:
        scheme = directory.split("://")[0]
        if scheme not in tf.io.gfile.get_registered_schemes():
            _register_file_systems()
        if scheme not in tf.io.gfile.get_registered_schemes():
            raise ValueError(
                f"{scheme}:// is read through tensorflow-io, which is not installed or does not load in TensorFlow "
                f"{tf.__version__}. Install {' and '.join(_IO_PACKAGES)}. Received: directory={directory!r}"
            )
    return directory.rstrip("/")


def _register_file_systems():
    try:
        importlib.import_module("tensorflow_io")
    except (ImportError, OSError, tf.errors.OpError):
        # Not installed, or built for another TensorFlow: the caller sees that nothing was registered.
        return


def _join(directory, name):
    return f"{directory}/{name}"


def _file_size(path):
    """In bytes; `None` if there is no such file."""
    try:
        return int(tf.io.gfile.stat(path).length)
    except tf.errors.NotFoundError:
        return None


def _sha256(path):
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path):
    with tf.io.gfile.GFile(path, "r") as file:
        text = file.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"Expected JSON ({error}). Received: {path!r}") from error


def _write_json(path, content):
    with _whole(path) as scratch, tf.io.gfile.GFile(scratch, "w") as file:
        file.write(json.dumps(content, separators=(",", ":")) + "\n")


@contextlib.contextmanager
def _whole(path):
    """A name beside `path` that becomes `path` once the block has written it, on any file system.

    It is always the same: what a failure leaves is written over by the next try.
    """
    scratch = path + ".partial"
    yield scratch
    tf.io.gfile.rename(scratch, path, overwrite=True)
