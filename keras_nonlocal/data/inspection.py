"""What a collection of videos holds: a table of its classes, its broken files, and a picture of what a network sees.

Shape letters: T frames, H and W height and width, C = 3 colours.
"""

import collections
import concurrent.futures
import dataclasses
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_nonlocal.files import whole_file

from . import shards
from .annotations import read_annotations
from .clips import check_positive, check_seed, clip_options, load_clip
from .decode import VideoError, VideoReader

# The contact sheet, in pixels.
_TEXT_WIDTH, _FRAME_HEIGHT, _GAP, _FONT_SIZE = 200, 112, 4, 13


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What the index and the first frame of a video tell, or the head of its records in a shard.

    Attributes:
        num_frames: Integer.
        duration: Float, seconds from the first frame until the last one would be followed by another.
        fps: Float, frames per second on average; 0 for a single frame.
        size: Pair `(height, width)` of the upright frames in pixels; in a shard, of those that it holds.
    """

    num_frames: int
    duration: float
    fps: float
    size: tuple


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect_videos` found.

    Attributes:
        facts: Dict from the path of each good video to its `VideoFacts`. In shards a path is below the directory
            that all videos came from.
        broken: Dict from the path of each broken video to what is wrong with it, in one line.
        classes: Dict from the name of each class to the paths of its good videos; the single entry `"all"` for
            videos without labels. A video with several labels stands in each of their classes.
        skipped: List of messages, one for each wrong row of the annotations.
        contact_sheet: The path of the picture, or `None` where none was made.
    """

    facts: dict
    broken: dict
    classes: dict
    skipped: tuple
    contact_sheet: str | None

    def summary(self):
        """The table of classes and the broken files, as text to print."""
        header = ("class", "clips", "total", "shortest", "median", "longest", "frames/s", "size")
        rows = [header, *([name, *self._row(paths)] for name, paths in self.classes.items())]
        if len(self.classes) > 1:
            rows.append(["all", *self._row(list(self.facts))])
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        left_aligned = (0, len(header) - 1)
        lines = [
            "  ".join(
                text.ljust(width) if column in left_aligned else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.append(f"\n{len(self.facts)} good, {len(self.broken)} broken")
        lines += [f"  {message}" for message in self.broken.values()]
        if self.skipped:
            lines += [f"{len(self.skipped)} wrong rows of the annotations", *(f"  {text}" for text in self.skipped)]
        return "\n".join(lines)

    def _row(self, paths):
        facts = [self.facts[path] for path in paths]
        if not facts:
            return ["0", *"------"]
        durations = [fact.duration for fact in facts]
        rates = sorted({f"{fact.fps:.4g}" for fact in facts}, key=float)
        sizes = collections.Counter(
            f"{width}x{height}" for height, width in (fact.size for fact in facts)
        ).most_common()
        return [
            str(len(facts)),
            _clock(sum(durations)),
            *(f"{value:.1f} s" for value in (min(durations), np.median(durations), max(durations))),
            rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}",
            # The commonest sizes; every video of a collection from the web may have its own.
            ", ".join(f"{size} ({count})" for size, count in sizes[:2])
            + (f", {len(sizes) - 2} more" if len(sizes) > 2 else ""),
        ]


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def inspect_videos(
    directory,
    annotations=None,
    annotation_format=None,
    split=None,
    contact_sheet=None,
    num_clips=12,
    num_frames=8,
    frame_stride=8,
    image_size=None,
    shorter_side=None,
    horizontal_flip=None,
    sampling="recipe",
    seed=0,
    num_parallel_calls=None,
):
    """Looks at all videos of a collection, and draws what a network would see of some of them.

    Of each video the index is read and the first frame decoded, several videos at a time. A file that breaks later
    is found only where a clip of the contact sheet needs the broken part. In shards, the head of each video is read;
    broken are also those that could not be decoded when the shards were written.

    Args:
        directory: String or path-like, the directory of the videos or of shards, as in
            `video_dataset_from_directory`.
        annotations: String or path-like, the file that names the videos and their labels, or `None`: a folder a class.
        annotation_format: String, a format of `read_annotations`, or `None` to tell by the file's first lines.
        split: `"train"`, `"val"` or `"test"`, to take only these rows of a format with splits.
        contact_sheet: String or path-like, a PNG file to write: a row for each of `num_clips` random training clips,
            as they are after resizing, cropping and mirroring, with up to 8 frames evenly chosen, and the names of
            the class and of the file beside them. The clips are dealt out to the classes in turn. `None`: none.
        num_clips: Integer, how many clips the contact sheet shows at most, each of another video.
        num_frames: Integer T, the frames of a clip.
        frame_stride: Integer, the step in the video from one frame of a clip to the next.
        image_size, shorter_side, horizontal_flip, sampling: What the clips are, as in
            `video_dataset_from_directory` without `views`.
        seed: Integer from 0 to 2**32 - 1, seed of the choice and of the clips.
        num_parallel_calls: Integer, how many videos are opened at a time. Defaults to the number of CPU cores.

    Returns:
        An `Inspection`. If no video is good its `facts` are empty, and there is no contact sheet.

    Raises:
        ValueError: If no video is found, an argument is out of range, or annotations are given for shards.

    Example:

    >>> import numpy as np, tempfile, os
    >>> from keras_nonlocal.data import inspect_videos, write_video
    >>> directory = tempfile.mkdtemp()
    >>> os.mkdir(os.path.join(directory, "dark"))
    >>> write_video(os.path.join(directory, "dark", "a.mp4"), np.zeros((60, 64, 96, 3), "uint8"), fps=30)
    >>> print(inspect_videos(directory).summary())
    class  clips    total  shortest  median  longest  frames/s  size
    dark       1  0:00:02     2.0 s   2.0 s    2.0 s        30  96x64 (1)
    <BLANKLINE>
    1 good, 0 broken
    """
    check_positive(num_clips=num_clips)
    check_seed(seed)
    clip = clip_options(num_frames, frame_stride, image_size, shorter_side, horizontal_flip, sampling=sampling)
    if shards.is_shards(directory):
        shards.check_no_annotations(annotations=annotations, annotation_format=annotation_format, split=split)
        found = shards.read_index(directory)
        facts, broken = _sort_out(found.paths, map(_shard_facts, shards.read_heads(found)))
        broken |= found.skipped
        skipped = ()
        read_clip = shards.clip_reader(found, clip)
        numbers = {path: number for number, path in enumerate(found.paths)}

        def load(path, seed):
            return read_clip(numbers[path], seed)
    else:
        found = read_annotations(directory, annotations, annotation_format, split)
        with concurrent.futures.ThreadPoolExecutor(num_parallel_calls or os.cpu_count()) as executor:
            facts, broken = _sort_out(found.paths, executor.map(_look_at, found.paths))
        skipped = tuple(found.skipped)

        def load(path, seed):
            return load_clip(path, clip, seed)

    by_class = _by_class(found)
    if contact_sheet is not None:
        clips = _sample_clips(by_class, facts, broken, load, num_clips, np.random.default_rng(seed))
        if clips:
            with whole_file(contact_sheet) as scratch:
                draw_contact_sheet(clips).save(scratch, format="PNG")
    return Inspection(
        facts=facts,
        broken=broken,
        classes={name: [path for path in paths if path in facts] for name, paths in by_class.items()},
        skipped=skipped,
        contact_sheet=os.fspath(contact_sheet) if contact_sheet is not None and clips else None,
    )


def _sort_out(paths, found):
    """Dicts of what is known of the good ones, and of what is wrong with the others."""
    facts, broken = {}, {}
    for path, fact in zip(paths, found, strict=True):
        if isinstance(fact, VideoError):
            broken[path] = str(fact)
        else:
            facts[path] = fact
    return facts, broken


def _look_at(path):
    """The `VideoFacts` of a video, or the error."""
    try:
        with VideoReader(path) as video:
            return _facts(video.timestamps, video.read([0]).shape[1:3])
    except VideoError as error:
        return error


def _shard_facts(head):
    return head if isinstance(head, VideoError) else _facts(*head)


def _facts(timestamps, size):
    count, span = len(timestamps), float(timestamps[-1] - timestamps[0])
    fps = (count - 1) / span if span else 0.0
    return VideoFacts(count, count / fps if fps else 0.0, fps, tuple(size))


def _by_class(found):
    """Dict from the classes' names to lists of paths."""
    if found.labels is None:
        return {"all": list(found.paths)}
    labels = np.asarray(found.labels)
    # Shards may have been written without the names.
    names = found.class_names or [str(k) for k in range(labels.max() + 1 if labels.ndim == 1 else labels.shape[1])]
    member = labels[:, None] == np.arange(len(names)) if labels.ndim == 1 else labels > 0
    return {
        name: [path for path, is_in in zip(found.paths, member[:, label], strict=True) if is_in]
        for label, name in enumerate(names)
    }


def _sample_clips(by_class, facts, broken, load, num_clips, rng):
    """Up to `num_clips` triples (class, path, clip) of different videos, dealt out to the classes in turn.

    `load` is a function from a path and a seed to a clip. What turns out to be broken goes from `facts` to `broken`.
    """
    waiting = {name: [paths[i] for i in rng.permutation(len(paths))] for name, paths in by_class.items()}
    turns = [list(waiting)[i] for i in rng.permutation(len(waiting))]
    clips, used = [], set()
    while len(clips) < num_clips and any(waiting.values()):
        for name in turns:
            while waiting[name] and len(clips) < num_clips:
                path = waiting[name].pop()
                if path not in facts or path in used:
                    continue
                try:
                    clips.append((name, path, load(path, int(rng.integers(2**63 - 1)))))
                except VideoError as error:
                    del facts[path]
                    broken[path] = str(error)
                    continue
                used.add(path)
                break
    order = {name: number for number, name in enumerate(by_class)}
    return sorted(clips, key=lambda row: (order[row[0]], row[1]))


def draw_contact_sheet(clips, num_columns=8):
    """Draws clips as a picture, a row each.

    Args:
        clips: List of triples: the name of the class, the path of the video, and a uint8 array of shape
            `(T, H, W, 3)`; all of one shape.
        num_columns: Integer, how many frames of a clip are shown at most, evenly chosen.

    Returns:
        A `PIL.Image.Image`.
    """
    frames, height, width = clips[0][2].shape[:3]
    shown = np.unique(np.linspace(0, frames - 1, min(num_columns, frames)).round().astype(int))
    cell = max(round(width * _FRAME_HEIGHT / height), 1), _FRAME_HEIGHT
    font = ImageFont.load_default(size=_FONT_SIZE)
    line = _FONT_SIZE + _GAP
    sheet = Image.new(
        "RGB",
        (_TEXT_WIDTH + len(shown) * (cell[0] + _GAP), line + _GAP + len(clips) * (cell[1] + _GAP)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    lefts = [_TEXT_WIDTH + column * (cell[0] + _GAP) for column in range(len(shown))]
    for left, frame in zip(lefts, shown, strict=True):
        draw.text((left, _GAP // 2), f"frame {frame}", fill="black", font=font)
    for row, (name, path, clip) in enumerate(clips):
        top = line + _GAP + row * (cell[1] + _GAP)
        for position, text in enumerate((name, os.path.basename(path))):
            place = (_GAP, top + position * line)
            draw.text(place, _fitted(text, font), fill="black" if position == 0 else "dimgray", font=font)
        for left, frame in zip(lefts, shown, strict=True):
            sheet.paste(Image.fromarray(np.ascontiguousarray(clip[frame])).resize(cell), (left, top))
    return sheet


def _fitted(text, font):
    """The text, or as much of it as there is room for."""
    room = _TEXT_WIDTH - 2 * _GAP
    if font.getlength(text) <= room:
        return text
    length = next(n for n in range(len(text), -1, -1) if font.getlength(text[:n] + "…") <= room)
    return text[:length] + "…"
