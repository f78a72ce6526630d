"""The table against files whose lengths, rates and sizes are known; the contact sheet pixel by pixel."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_nonlocal import cli
from keras_nonlocal.data import inspect_videos, read_annotations
from keras_nonlocal.data.inspection import draw_contact_sheet
from keras_nonlocal.data.shards import read_index, write_shards
from tests.test_data_decode import packet_places
from tests.video_files import BREAKERS, encode, grey_frames, numbered_frames, read_greys

TEXT_WIDTH, FRAME_HEIGHT, GAP, TOP = 200, 112, 4, 21


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two classes of grey videos with files broken in every way, and a class without a good one."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("long", "short", "bad"):
        (root / name).mkdir()
    lossless = {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"qp": "0"}}
    encode(root / "long" / "a.mp4", grey_frames(50), **lossless)  # 30 frames a second
    encode(root / "long" / "b.mp4", grey_frames(40, 64, 48), frame_numbers=range(0, 80, 2), **lossless)  # 15
    encode(root / "long" / "c.mp4", grey_frames(50), rotation=90, **lossless)
    encode(root / "short" / "d.mkv", grey_frames(20), codec="ffv1", pix_fmt="bgr0")
    encode(root / "short" / "e.gif", grey_frames(1), codec="gif", pix_fmt="gray")
    for name, write in BREAKERS.items():
        write(root / "bad" / f"{name}.mp4")
    return root


def test_what_is_in_a_directory(directory):
    found = inspect_videos(directory)
    assert {name: [path.rsplit("/", 1)[1] for path in paths] for name, paths in found.classes.items()} == {
        "bad": [],
        "long": ["a.mp4", "b.mp4", "c.mp4"],
        "short": ["d.mkv", "e.gif"],
    }
    facts = {path.rsplit("/", 1)[1]: fact for path, fact in found.facts.items()}
    assert {name: fact.num_frames for name, fact in facts.items()} == {
        "a.mp4": 50,
        "b.mp4": 40,
        "c.mp4": 50,
        "d.mkv": 20,
        "e.gif": 1,
    }
    expected = {"a.mp4": (50 / 30, 30), "b.mp4": (80 / 30, 15), "d.mkv": (20 / 30, 30), "e.gif": (0, 0)}
    for name, (duration, fps) in expected.items():
        assert facts[name].duration == pytest.approx(duration, abs=2e-3)
        assert facts[name].fps == pytest.approx(fps, rel=2e-3)
    assert facts["b.mp4"].size == facts["c.mp4"].size == (64, 48)  # turned upright
    assert facts["a.mp4"].size == (48, 64)
    assert sorted(found.broken) == sorted(str(path) for path in (directory / "bad").iterdir())
    assert all(message.startswith(f"Cannot decode {path}: ") for path, message in found.broken.items())
    assert found.contact_sheet is None


def test_table(directory):
    lines = inspect_videos(directory).summary().splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["class", "clips", "total", "shortest", "median", "longest", "frames/s", "size"],
        ["bad", "0", "-", "-", "-", "-", "-", "-"],
        "long 3 0:00:06 1.7 s 1.7 s 2.7 s 15 to 30 48x64 (2), 64x48 (1)".split(),
    ]
    assert lines[4].split()[:3] == ["all", "5", "0:00:07"]
    assert lines[6] == "5 good, 5 broken"
    assert f"  Cannot decode {directory}/bad/audio_only.mp4: the file has no video stream" in lines[7:]
    assert len({line.index("clips") + 5 for line in lines[:1]} | {line.index(" 3 ") + 2 for line in lines[2:3]}) == 1


def test_several_labels_and_wrong_rows(directory, tmp_path):
    rows = ["id,actions", "a,c001 0.0 1.0;c003 0.5 2.0", "b,", "d,c003 0.0 0.5", "nowhere,c001 0.0 1.0"]
    (tmp_path / "charades.csv").write_text("\n".join(rows) + "\n")
    found = inspect_videos(directory, tmp_path / "charades.csv", "charades")
    assert len(found.classes) == 157
    names = [[path.rsplit("/", 1)[1] for path in paths] for paths in found.classes.values()]
    assert names[1] == ["a.mp4"] and names[3] == ["a.mp4", "d.mkv"] and not names[0]
    assert len(found.facts) == 3 and not found.broken
    (message,) = found.skipped
    assert "nowhere" in message
    assert found.summary().endswith(f"1 wrong rows of the annotations\n  {message}")


def cells(sheet, num_columns, width=FRAME_HEIGHT):
    """The frames of a contact sheet, (rows, columns, H, W, 3)."""
    pixels = np.asarray(sheet)
    rows = (len(pixels) - TOP) // (FRAME_HEIGHT + GAP)
    tops = [TOP + row * (FRAME_HEIGHT + GAP) for row in range(rows)]
    lefts = [TEXT_WIDTH + column * (width + GAP) for column in range(num_columns)]
    return np.array([[pixels[t : t + FRAME_HEIGHT, left : left + width] for left in lefts] for t in tops])


def test_contact_sheet_shows_evenly_chosen_frames(rng):
    clips = rng.integers(256, size=(3, 15, FRAME_HEIGHT, 80, 3), dtype="uint8")
    sheet = draw_contact_sheet([(f"class {n}", f"/x/{n}.mp4", clip) for n, clip in enumerate(clips)], num_columns=8)
    assert sheet.size == (TEXT_WIDTH + 8 * (80 + GAP), TOP + 3 * (FRAME_HEIGHT + GAP))
    np.testing.assert_array_equal(cells(sheet, 8, 80), clips[:, ::2])
    # Names beside the frames, and gaps around them, where nothing else is drawn.
    pixels = np.asarray(sheet.convert("L"))
    assert all(pixels[TOP + row * 116 : TOP + row * 116 + 40, :TEXT_WIDTH].min() < 128 for row in range(3))
    assert pixels[TOP + 45 : TOP + 110, :TEXT_WIDTH].min() == 255
    # A name too long for its place does not run into the frames.
    long_name = draw_contact_sheet([("w" * 99, "/x/" + "m" * 99, clips[0])], num_columns=8)
    np.testing.assert_array_equal(cells(long_name, 8, 80), clips[:1, ::2])
    assert np.asarray(long_name)[TOP:, TEXT_WIDTH - GAP : TEXT_WIDTH].min() == 255


def test_contact_sheet_of_few_frames(rng):
    clip = rng.integers(256, size=(3, FRAME_HEIGHT, FRAME_HEIGHT, 3), dtype="uint8")
    np.testing.assert_array_equal(cells(draw_contact_sheet([("a", "a", clip)]), 3)[0], clip)


def sheet_of(directory, path, **options):
    options = {"num_frames": 4, "frame_stride": 3, "image_size": 32, "shorter_side": (32, 40), **options}
    found = inspect_videos(directory, contact_sheet=path, **options)
    return found, None if found.contact_sheet is None else Image.open(found.contact_sheet)


def test_contact_sheet_shows_training_clips(directory, tmp_path):
    found, sheet = sheet_of(directory, tmp_path / "sheet.png")
    assert found.contact_sheet == str(tmp_path / "sheet.png")
    shown = cells(sheet, 4)
    lengths = [50, 40, 50, 20, 1]  # by class, then by name
    assert len(shown) == len(lengths)
    starts = set()
    for row, length in zip(shown, lengths, strict=True):
        numbers = read_greys(row)
        assert numbers == [(numbers[0] + 3 * n) % length for n in range(4)]
        starts.add(numbers[0])
    assert len(starts) > 1  # they start anywhere
    # The same with the same seed, others with another.
    again = np.asarray(sheet_of(directory, tmp_path / "again.png")[1])
    np.testing.assert_array_equal(again, np.asarray(sheet))
    other = np.asarray(sheet_of(directory, tmp_path / "other.png", seed=1)[1])
    assert (other != np.asarray(sheet)).any()
    # Fewer rows: the classes take turns.
    for seed in range(4):
        found, sheet = sheet_of(directory, tmp_path / "two.png", num_clips=2, seed=seed)
        last_greys = [read_greys(row)[-1] for row in cells(sheet, 4)]
        assert len(last_greys) == 2 and last_greys[1] < 20  # a long one, then a short one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "other.png", "sheet.png", "two.png"]


def test_contact_sheet_shows_mirrored_clips(tmp_path):
    (tmp_path / "videos" / "a").mkdir(parents=True)
    frames = np.zeros((4, 32, 32, 3), "uint8")
    frames[:, :, 16:] = 255
    for number in range(12):
        encode(tmp_path / "videos" / "a" / f"{number}.mp4", frames)
    sides = {}
    for flip in (False, True):
        options = {"shorter_side": (32, 32), "horizontal_flip": flip}
        _, sheet = sheet_of(tmp_path / "videos", tmp_path / "sheet.png", **options)
        sides[flip] = {bool(row[0, 50, 20, 0] > 128) for row in cells(sheet, 4)}
    assert sides == {False: {False}, True: {False, True}}


def test_what_breaks_in_the_middle_is_broken_when_the_sheet_needs_it(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("good", "late"):
        encode(tmp_path / "a" / f"{name}.mp4", numbered_frames(12), codec="mpeg4", options={"g": "1"})
    path = tmp_path / "a" / "late.mp4"
    content = bytearray(path.read_bytes())
    for position, size in packet_places(path)[1:]:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    assert not inspect_videos(tmp_path).broken
    found, sheet = sheet_of(tmp_path, tmp_path / "sheet.png")
    assert list(found.broken) == [str(path)] and "do not decode" in found.broken[str(path)]
    assert found.classes == {"a": [str(tmp_path / "a" / "good.mp4")]}
    assert len(cells(sheet, 4)) == 1


@pytest.fixture(scope="module")
def shard_folder(directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    write_shards(read_annotations(directory), out, quality=95, videos_per_shard=1, verbose=False)
    return out


def relative(paths, directory):
    return [path.removeprefix(f"{directory}/") for path in paths]


def test_shards_tell_what_their_videos_tell(directory, shard_folder, tmp_path):
    of_videos, (found, sheet) = inspect_videos(directory), sheet_of(shard_folder, tmp_path / "sheet.png")
    assert found.facts.keys() == set(relative(of_videos.facts, directory))
    for path, fact in of_videos.facts.items():
        same = found.facts[path.removeprefix(f"{directory}/")]
        assert (same.num_frames, same.size) == (fact.num_frames, fact.size)
        assert (same.duration, same.fps) == pytest.approx((fact.duration, fact.fps), rel=1e-5)
    assert {name: sorted(paths) for name, paths in found.classes.items()} == {
        name: relative(paths, directory) for name, paths in of_videos.classes.items()
    }
    assert {f"{directory}/{path}": message for path, message in found.broken.items()} == of_videos.broken
    assert found.summary().splitlines()[:7] == of_videos.summary().splitlines()[:7]
    shown = cells(sheet, 4)
    assert len(shown) == 5
    lengths = [found.facts[path].num_frames for paths in found.classes.values() for path in sorted(paths)]
    for row, length in zip(shown, lengths, strict=True):
        numbers = read_greys(row)
        assert numbers == [(numbers[0] + 3 * n) % length for n in range(4)]
    again = sheet_of(shard_folder, tmp_path / "again.png")[1]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(sheet))


def test_damaged_shards(shard_folder, tmp_path):
    """A damaged head is found at once, a damaged frame where the sheet needs it."""
    shutil.copytree(shard_folder, tmp_path / "shards")
    index = read_index(tmp_path / "shards")
    files = dict(zip(index.paths, (tmp_path / "shards" / index.files[n] for n in index.file_numbers), strict=True))
    for path, position in (("long/a.mp4", 30), ("short/e.gif", -20)):
        content = bytearray(files[path].read_bytes())
        content[position] ^= 255
        files[path].write_bytes(content)
    found = inspect_videos(tmp_path / "shards")
    message = f"Cannot decode long/a.mp4: its records in {files['long/a.mp4'].name} from byte 0 on are damaged"
    assert found.broken["long/a.mp4"] == message and len(found.broken) == 6 and "short/e.gif" in found.facts
    found, sheet = sheet_of(tmp_path / "shards", tmp_path / "sheet.png")
    assert "short/e.gif" in found.broken and len(found.broken) == 7 and len(cells(sheet, 4)) == 3


def test_shards_without_class_names(directory, tmp_path):
    videos = read_annotations(directory / "long", labels=None)
    hot = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0]], "float32")
    for labels, expected in ((None, {"all": "abc"}), (hot, {"0": "a", "1": "", "2": "ab"})):
        out = tmp_path / ("none" if labels is None else "several")
        write_shards(dataclasses.replace(videos, labels=labels), out, verbose=False)
        classes = inspect_videos(out).classes
        assert {name: "".join(sorted(path[0] for path in paths)) for name, paths in classes.items()} == expected


def test_shards_have_their_labels(shard_folder):
    message = "`annotation_format` cannot be passed with shards.* Received: annotation_format='list'"
    with pytest.raises(ValueError, match=message):
        inspect_videos(shard_folder, annotation_format="list")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_clips": 0}, "`num_clips` must be a positive integer. Received: num_clips=0"),
        ({"seed": -1}, r"`seed` must be an integer from 0 to .* Received: seed=-1"),
        ({"image_size": 300}, r"not be larger than `shorter_side`.* Received: image_size=\(300, 300\)"),
        ({"sampling": "odd"}, "Received: sampling='odd'"),
    ],
)
def test_guards(directory, options, message):
    with pytest.raises(ValueError, match=message):
        inspect_videos(directory, **options)


SMALL = ["--num-frames", "4", "--frame-stride", "3", "--image-size", "32", "--shorter-side", "32", "40"]


def test_command(directory, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert cli.main(["inspect", str(directory), "--out", str(out), *SMALL]) == 0
    printed = capsys.readouterr().out
    expected, sheet = sheet_of(directory, tmp_path / "expected.png")
    assert printed == f"{expected.summary()}\nWrote {out}\n"
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(sheet))
    out.write_bytes(b"a picture of somebody's")
    assert cli.main(["inspect", str(directory), "--out", str(out), *SMALL]) == 2
    message = f"keras-nonlocal: error: --out exists; --overwrite replaces it. Received: --out {out}\n"
    assert capsys.readouterr().err == message and out.read_bytes() == b"a picture of somebody's"
    assert cli.main(["inspect", str(directory), "--out", str(out), "--overwrite", *SMALL]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(sheet))


def test_command_where_nothing_is_good(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name, write in BREAKERS.items():
        write(tmp_path / "a" / f"{name}.mp4")
    assert cli.main(["inspect", str(tmp_path), "--out", str(tmp_path / "sheet.png"), *SMALL]) == 2
    printed = capsys.readouterr()
    assert "0 good, 5 broken" in printed.out and "no video stream" in printed.out
    assert printed.err == f"keras-nonlocal: error: no video can be decoded. Received: DATA='{tmp_path}'\n"
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image-size", "300"], "`image_size` must not be larger"),
        (["--clips", "0"], "must be a positive integer"),
        (["--out", "sheet.jpg"], "--out must end with .png. Received: --out sheet.jpg"),
    ],
)
def test_command_guards(directory, arguments, message, capsys):
    assert cli.main(["inspect", str(directory), *arguments]) == 2
    assert message in capsys.readouterr().err
