"""Which videos there are and what they show, in the formats in which the field's data sets say so.

A format says how a row is read. What is the same for all, finding the files, numbering the classes and leaving out
wrong rows, is done once, by `read_annotations`.
"""

import collections
import csv
import dataclasses
import functools
import itertools
import logging
import os
import re
from collections.abc import Callable

import numpy as np

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif", ".webp")

# What annotation files call their splits.
SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "validate", "validation", "valid"},
    "test": {"test", "testing"},
}

NUM_CHARADES_CLASSES = 157

# Of integer labels without names. A larger one is a slip, and names for all below it would fill the memory.
_MAX_CLASSES = 100_000

_LOGGER = logging.getLogger("keras_nonlocal")


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Videos and their labels.

    Attributes:
        paths: Tuple of strings, the video files.
        labels: int32 array of shape `(n,)`; with several labels a video, float32 of shape `(n, K)`, 1 where a class
            is shown; `None` without labels.
        class_names: Tuple of the K names in the order of the labels, or `None`.
        skipped: List of strings, one for each wrong row.
    """

    paths: tuple
    labels: np.ndarray | None
    class_names: tuple | None
    skipped: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a format reads.

    Attributes:
        directory: String, where the videos are.
        path: String, the annotation file; `None` for the format `"directory"`.
        class_names: The names that the caller gave, or `None`.
        follow_links: Whether to visit sub-directories that are symbolic links.
        classes: Tuple of the names of the classes that the format says, or `None`.
    """

    directory: str
    path: str | None
    class_names: tuple | None
    follow_links: bool
    classes: tuple | None = None

    def open(self):
        """Opens the annotation file as text; bytes that are none become a mark."""
        return open(self.path, encoding="utf-8-sig", errors="replace", newline="")

    def beside(self, name):
        """The path of another file in the folder of the annotation file."""
        return os.path.join(os.path.dirname(self.path), name)

    @functools.cached_property
    def files_by_stem(self):
        """The video files by their names without the extensions, found in one walk."""
        found = collections.defaultdict(list)
        for path in video_files(self.directory, self.follow_links):
            found[os.path.splitext(os.path.basename(path))[0]].append(path)
        return found


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row of annotations says.

    Attributes:
        videos: Tuple of names that the video's file may have, for the format's `find`.
        label: The class, as its number or its name; a tuple of names in a format with several; `None` if not given.
    """

    videos: tuple
    label: int | str | tuple | None


class WrongRow(ValueError):
    """A row that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How annotations are read.

    Attributes:
        fits: Function `(lines, path)`: whether a file that starts with these lines is of this format.
        rows: Function `(source)` to an iterator of `(line number, raw row)`.
        parse: Function `(source, raw row)` to a `Row`; raises `WrongRow`.
        find: Function `(source, row)` to the path of the row's video, or `None` if there is none.
        class_names: Function `(source)` to the names of the classes, if the format says them; `None`: they are the
            labels in alphanumeric order, or the numbers up to the largest label.
        is_multi_label: Whether a video can have several labels.
        split: Function `(raw row)` to the split that the row is of, or `None` where it does not say so; `None` if
            rows never do. It is called of wrong rows too.
    """

    fits: Callable
    rows: Callable
    parse: Callable
    find: Callable
    class_names: Callable | None = None
    is_multi_label: bool = False
    split: Callable | None = None


def video_files(folder, follow_links=False):
    """The video files under a folder, in the alphanumeric order of their paths."""
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder, followlinks=follow_links)
        for name in names
        if name.lower().endswith(VIDEO_EXTENSIONS) and not name.startswith(".")
    )


# Finding the file of a row


def _at_path(source, row):
    path = os.path.join(source.directory, row.videos[0])
    return path if os.path.isfile(path) else None


def _by_stem(source, row):
    top = os.path.dirname(os.path.join(source.directory, ""))
    folders = () if not isinstance(row.label, str) else (row.label, row.label.replace(" ", "_"))
    for stem in row.videos:
        paths = source.files_by_stem.get(stem, ())
        in_folder = [path for path in paths if os.path.basename(os.path.dirname(path)) in folders]
        flat = [path for path in paths if os.path.dirname(path) == top]
        for path in itertools.chain(in_folder, flat, paths):
            return path
    return None


# "directory": a folder for each class


def _class_folders(source):
    folders = sorted(
        entry.name for entry in os.scandir(source.directory) if entry.is_dir() and not entry.name.startswith(".")
    )
    if source.class_names is not None and not set(source.class_names) <= set(folders):
        raise ValueError(
            f"`class_names` must be sub-directories of {source.directory}, which has {folders}. "
            f"Received: class_names={list(source.class_names)}"
        )
    return folders if source.class_names is None else source.class_names


def _folder_rows(source):
    for name in source.classes:
        for path in video_files(os.path.join(source.directory, name), source.follow_links):
            yield path, Row((path,), name)


# CSV files with a header


def _csv_rows(source):
    with source.open() as file:
        reader = csv.DictReader(file)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for raw in reader:
                yield reader.line_num, raw
        except csv.Error as error:
            raise ValueError(
                f"`annotations` must be a CSV file; line {reader.line_num}: {error}. "
                f"Received: annotations={source.path!r}"
            ) from error


def _header_has(*names):
    return lambda lines, path: set(names) <= {name.strip() for name in next(csv.reader(lines[:1]), ())}


def _column(raw, name):
    value = raw.get(name)
    if value is None:
        raise WrongRow(f"the column {name!r} is missing. Received: row={_shown(raw)}")
    return value.strip()


def _shown(raw):
    text = repr({name: value for name, value in raw.items() if value is not None})
    return text if len(text) <= 200 else f"{text[:200]}…"


# "kinetics"


def _parse_kinetics(source, raw):
    youtube_id = _column(raw, "youtube_id")
    if not youtube_id:
        raise WrongRow(f"the column 'youtube_id' is empty. Received: row={_shown(raw)}")
    videos = (youtube_id,)
    if "time_start" in raw or "time_end" in raw:
        start, end = _column(raw, "time_start"), _column(raw, "time_end")
        if not (start.isdecimal() and end.isdecimal()):
            raise WrongRow(f"the times must be whole seconds. Received: time_start={start!r}, time_end={end!r}")
        videos = (f"{youtube_id}_{int(start):06d}_{int(end):06d}", youtube_id)
    return Row(videos, (raw.get("label") or "").strip() or None)


def _kinetics_split(raw):
    return (raw.get("split") or "").strip().lower() or None


# "list": lines of a path and a number


def _lines(source):
    with source.open() as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.strip()


_LIST_LINE = re.compile(r"(.+?)[\s,]+([^\s,]+)")


def _fits_list(lines, path):
    matches = map(_LIST_LINE.fullmatch, lines)
    return any(match and re.fullmatch(r"-?\d+", match[2]) for match in matches)


def _parse_list(source, line):
    match = _LIST_LINE.fullmatch(line)
    if match is None:
        raise WrongRow(f"expected a path and a label. Received: row={line!r}")
    path = match[1].strip('"')
    if re.search(r"[\s,]\d+$", path) and not path.lower().endswith(VIDEO_EXTENSIONS):
        raise ValueError(
            "`annotations` must list video files, as `path label`; folders of images, as `path total_frames label`, "
            f"are not read. Received: annotations={source.path!r} with the row {line!r}"
        )
    label = _integer(match[2])
    if not 0 <= label < _MAX_CLASSES:
        raise WrongRow(f"the label must be in [0, {_MAX_CLASSES}). Received: label={label}")
    return Row((path,), label)


def _integer(text):
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise WrongRow(f"the label must be an integer. Received: label={text!r}")
    return int(text)


# "ucf101": split files with the names of the classes beside them


def _fits_ucf101(lines, path):
    is_row = re.compile(r"[^/]+/[^/]+\.avi(\s+\d+)?").fullmatch
    return any(map(is_row, lines)) and os.path.isfile(os.path.join(os.path.dirname(path), "classInd.txt"))


def _ucf101_classes(source):
    return _named_lines(source.beside("classInd.txt"), r"\d+", lambda index: str(index + 1))


def _named_lines(path, number, expected):
    """The names in a file of lines `number name`, whose numbers must be the expected ones in order."""
    if not os.path.isfile(path):
        raise ValueError(f"The names of the classes must be in a file beside `annotations`. Received: no file {path!r}")
    names = []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in filter(None, map(str.strip, file)):
            match = re.fullmatch(rf"({number})\s+(.+)", line)
            if match is None or match[1] != expected(len(names)):
                raise ValueError(
                    f"Line {len(names) + 1} of {path} must be `{expected(len(names))} name`. Received: line={line!r}"
                )
            names.append(match[2])
    return names


def _parse_ucf101(source, line):
    path, number = re.fullmatch(r"(.+?)(?:\s+(\S+))?", line).groups()
    if number is None:  # the lists of the tests: the folder says the class
        folder = os.path.dirname(path)
        if not folder:
            raise WrongRow(f"expected `Class/video.avi`. Received: row={line!r}")
        return Row((path,), os.path.basename(folder))
    names, label = source.classes, _integer(number)
    if not 1 <= label <= len(names):
        raise WrongRow(f"the label must be in [1, {len(names)}]. Received: label={label}")
    return Row((path,), names[label - 1])


# "charades": several classes a video, with times


def _charades_classes(source):
    codes = [f"c{number:03d}" for number in range(NUM_CHARADES_CLASSES)]
    path = source.beside("Charades_v1_classes.txt")
    if not os.path.isfile(path):
        return codes
    names = _named_lines(path, r"c\d+", lambda index: f"c{index:03d}")
    if len(names) != NUM_CHARADES_CLASSES:
        raise ValueError(f"{path} must name {NUM_CHARADES_CLASSES} classes. Received: {len(names)} names")
    return names


def _parse_charades(source, raw):
    video, actions = _column(raw, "id"), _column(raw, "actions")
    if not video:
        raise WrongRow(f"the column 'id' is empty. Received: row={_shown(raw)}")
    names, label = source.classes, []
    for action in filter(None, map(str.strip, actions.split(";"))):
        match = re.fullmatch(r"c(\d{3}) (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)", action)
        if match is None:
            raise WrongRow(f"an action must be like 'c092 11.90 21.20'. Received: action={action!r}")
        if int(match[1]) >= len(names):
            raise WrongRow(f"an action must be in c000 to c{len(names) - 1}. Received: action={action!r}")
        label.append(names[int(match[1])])
    return Row((video,), tuple(label))


FORMATS = {
    "directory": Format(
        fits=lambda lines, path: False,
        rows=_folder_rows,
        parse=lambda source, row: row,
        find=lambda source, row: row.videos[0],
        class_names=_class_folders,
    ),
    "kinetics": Format(
        fits=_header_has("label", "youtube_id"),
        rows=_csv_rows,
        parse=_parse_kinetics,
        find=_by_stem,
        split=_kinetics_split,
    ),
    "charades": Format(
        fits=_header_has("id", "actions"),
        rows=_csv_rows,
        parse=_parse_charades,
        find=_by_stem,
        class_names=_charades_classes,
        is_multi_label=True,
    ),
    "ucf101": Format(fits=_fits_ucf101, rows=_lines, parse=_parse_ucf101, find=_at_path, class_names=_ucf101_classes),
    "list": Format(fits=_fits_list, rows=_lines, parse=_parse_list, find=_at_path),
}


def read_annotations(
    directory,
    annotations=None,
    annotation_format=None,
    split=None,
    labels="inferred",
    class_names=None,
    follow_links=False,
    on_error="skip",
):
    """Lists the videos of a data set with their labels.

    The formats are

    - `"directory"`: a folder of videos for each class; no file of annotations;
    - `"kinetics"`: a CSV file with the columns `label`, `youtube_id`, `time_start`, `time_end`, `split`. The videos
      `{youtube_id}_{time_start:06d}_{time_end:06d}.mp4` or `{youtube_id}.mp4`, or with other extensions, may be
      anywhere under the directory; of several, the one in a folder of the label's name is taken. They must be cut to
      their times already: clips are taken from all of a file;
    - `"charades"`: a CSV file with the columns `id` and `actions`, the latter like
      `"c092 11.90 21.20;c147 0.00 12.60"`: a video has any number of the 157 classes, whenever they are
      shown. Their names are taken from `Charades_v1_classes.txt` beside it, if there;
    - `"ucf101"`: `trainlist01.txt` and the like, lines `Class/video.avi 1` with labels from 1, or `testlist01.txt`
      without labels, with `classInd.txt` beside them;
    - `"list"`: lines `path label` of PySlowFast and MMAction2, separated by a space, a comma or a tab, with labels
      from 0 and paths that are relative to the directory.

    A row is wrong if it lacks something, its label is no class, its video is not on the disk or was listed before.
    Wrong rows are left out and logged once each as warnings of the logger `keras_nonlocal`.

    Args:
        directory: String or path-like, where the videos are.
        annotations: String or path-like, the annotation file. `None`: the format is `"directory"`.
        annotation_format: A name of the list above. `None`: it is seen from the file's first lines.
        split: `"train"`, `"val"` or `"test"`, to take only these rows of a format with splits. Rows of other splits
            are not reported, whatever is wrong with them.
        labels: `"inferred"` (as annotated), `None` (no labels), or, without `annotations`, a list of integer labels,
            one for each video in the alphanumeric order of their paths.
        class_names: List of strings, the classes in the order of their numbers. In a directory it chooses the folders.
            Defaults to the order of the format, or to alphanumeric order.
        follow_links: Whether to visit sub-directories that are symbolic links.
        on_error: `"raise"` makes the first wrong row an error; otherwise it is left out.

    Returns:
        An `Annotations`.

    Raises:
        ValueError: If an argument is out of range, the format is not known, or no video is found.

    Example:

    >>> import numpy as np, tempfile, pathlib
    >>> from keras_nonlocal.data import read_annotations, write_video
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> write_video(folder / "a.mp4", np.zeros((4, 32, 32, 3), "uint8"))
    >>> _ = (folder / "train.txt").write_text("a.mp4 1\\n")
    >>> read_annotations(folder, folder / "train.txt").labels
    array([1], dtype=int32)
    """
    directory = os.fspath(directory)
    if not os.path.isdir(directory):
        raise ValueError(f"`directory` must be an existing directory. Received: directory={directory!r}")
    if class_names is not None:
        if labels != "inferred":
            raise ValueError(
                f'`class_names` can only be passed with `labels="inferred"`. Received: class_names={class_names}'
            )
        class_names = tuple(class_names)
        if not class_names:
            raise ValueError("`class_names` must name at least one class. Received: class_names=[]")
        if len(set(class_names)) < len(class_names):
            raise ValueError(f"`class_names` must differ. Received: class_names={list(class_names)}")
    if annotations is None:
        if annotation_format not in (None, "directory"):
            raise ValueError(
                f"`annotation_format` needs the file `annotations`. Received: annotation_format={annotation_format!r}"
            )
        annotation_format = "directory"
        if labels != "inferred" and split is None:
            return _unlabelled(directory, labels, follow_links)
    else:
        annotations = os.fspath(annotations)
        if not os.path.isfile(annotations):
            raise ValueError(f"`annotations` must be an existing file. Received: annotations={annotations!r}")
        if labels not in ("inferred", None):
            raise ValueError('`labels` must be "inferred" or None with `annotations`. Received: labels=a list')
        annotation_format = annotation_format or _guess_format(annotations)
    if annotation_format not in FORMATS:
        raise ValueError(
            f"`annotation_format` must be None or one of {sorted(FORMATS)}. "
            f"Received: annotation_format={annotation_format!r}"
        )
    chosen_format = FORMATS[annotation_format]
    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` must be None or one of {sorted(SPLITS)}. Received: split={split!r}")
    if split is not None and chosen_format.split is None:
        raise ValueError(
            f"`split` needs a format with splits; {annotation_format!r} has none. Received: split={split!r}"
        )
    source = Source(directory, annotations, class_names, follow_links)
    return _read(source, chosen_format, split, labels, on_error)


def _unlabelled(directory, labels, follow_links):
    """All videos under a directory, without labels or with those of a list."""
    paths = video_files(directory, follow_links)
    if not paths:
        _raise_no_videos("in", directory)
    if labels is None:
        return Annotations(tuple(paths), None, None)
    if len(labels) != len(paths):
        raise ValueError(
            f"`labels` must have one label for each of the {len(paths)} videos. Received: len(labels)={len(labels)}"
        )
    for label in labels:
        if not isinstance(label, (int, np.integer)) or isinstance(label, bool) or not -(2**31) <= label < 2**31:
            raise ValueError(f"`labels` must be integers of 32 bits. Received: {label!r} in labels")
    return Annotations(tuple(paths), np.asarray(labels, "int32"), tuple(str(label) for label in sorted(set(labels))))


def _raise_no_videos(where, directory):
    raise ValueError(
        f"Expected videos {where} the directory, with one of the extensions "
        f"{VIDEO_EXTENSIONS}. Received: directory={directory!r}"
    )


def _guess_format(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [line.strip()[:10_000] for line in itertools.islice(file, 20) if line.strip()]
    for name, candidate in FORMATS.items():
        if candidate.fits(lines, path):
            return name
    raise ValueError(
        "`annotations` must be a CSV file of Kinetics (with the columns label and youtube_id) or Charades (id and "
        "actions), a split file of UCF-101 with classInd.txt beside it, or lines `path label`; name any other format "
        f"with `annotation_format`. Received: annotations={path!r}, which starts with {(lines or [''])[0][:100]!r}"
    )


def _read(source, chosen_format, split, labels, on_error):
    skipped = []

    def skip(place, reason):
        message = f"{source.path or source.directory}, line {place}: {reason}"
        if on_error == "raise":
            raise ValueError(f"Wrong row: {message}")
        skipped.append(message)
        _LOGGER.warning("Skipped a wrong row. %s", message)

    if chosen_format.class_names is not None:
        source = dataclasses.replace(source, classes=tuple(chosen_format.class_names(source)))
    rows = []
    for place, raw in chosen_format.rows(source):
        row_split = None if split is None else chosen_format.split(raw)
        try:
            rows.append((place, row_split, chosen_format.parse(source, raw)))
        except WrongRow as error:
            rows.append((place, row_split, error))
    good_rows = [row for _, _, row in rows if isinstance(row, Row)]
    class_names = source.class_names or source.classes or _classes_seen(good_rows)
    numbers = {name: number for number, name in enumerate(class_names)}

    paths, found_labels, first_places = [], [], {}
    for place, row_split, row in rows:
        if row_split is not None and row_split not in SPLITS[split]:
            continue
        if isinstance(row, WrongRow):
            skip(place, row)
            continue
        try:
            if split is not None and row_split is None:
                raise WrongRow("the row does not say its split. Received: split=''")
            label = None if labels is None else _class_numbers(row.label, numbers)
            path = chosen_format.find(source, row)
            if path is None:
                raise WrongRow(f"the video is not in {source.directory}. Received: video={row.videos[0]!r}")
            first_place = first_places.setdefault(os.path.normpath(path), place)
            if first_place != place:
                raise WrongRow(f"the video is in line {first_place} too. Received: video={row.videos[0]!r}")
        except WrongRow as error:
            skip(place, error)
            continue
        paths.append(path)
        found_labels.append(label)
    if not paths:
        if source.path is None:
            _raise_no_videos(f"in the sub-directories {list(class_names)} of", source.directory)
        splits = sorted({row_split for _, row_split, _ in rows if row_split is not None})
        raise ValueError(
            f"No row of the annotations can be used: {len(skipped)} are wrong"
            + (f", the first: {skipped[0]}" if skipped else "")
            + ("" if split is None else f"; there are rows of the splits {splits}, not split={split!r}")
            + f". Received: directory={source.directory!r}, annotations={source.path!r}"
        )
    if labels is None:
        return Annotations(tuple(paths), None, None, skipped)
    if not chosen_format.is_multi_label:
        return Annotations(tuple(paths), np.array(found_labels, "int32"), tuple(class_names), skipped)
    hot = np.zeros((len(paths), len(class_names)), "float32")
    for position, label in enumerate(found_labels):
        hot[position, list(label)] = 1
    return Annotations(tuple(paths), hot, tuple(class_names), skipped)


def _classes_seen(rows):
    """The labels of all rows, whether their videos are there or not, in order."""
    labels = {label for row in rows for label in (row.label if isinstance(row.label, tuple) else (row.label,))}
    labels.discard(None)
    if all(isinstance(label, int) for label in labels):
        return [str(number) for number in range(max(labels, default=-1) + 1)]
    return sorted(labels)


def _class_numbers(label, numbers):
    if label is None:
        raise WrongRow("there is no label. Received: label=''")
    if isinstance(label, tuple):
        return [_class_numbers(name, numbers) for name in label]
    if isinstance(label, int):
        if label >= len(numbers):
            raise WrongRow(f"the label must be in [0, {len(numbers)}). Received: label={label}")
        return label
    if label not in numbers:
        raise WrongRow(f"the label must be one of the {len(numbers)} classes. Received: label={label!r}")
    return numbers[label]
