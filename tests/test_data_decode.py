"""Random access to frames, proved by the number that each frame carries."""

import os
import re
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest

from keras_nonlocal.data import VideoError, VideoReader, write_video
from keras_nonlocal.data.decode import _AVDecoder
from tests.video_files import (
    BREAKERS,
    camera_clip,
    decode_all,
    encode,
    numbered_frames,
    read_numbers,
    write_display_matrix,
    write_images,
)

NUM_FRAMES = 60

# name → (extension, arguments of `encode`)
FILES = {
    "default": ("mp4", {}),
    "one_key_frame": ("mp4", {"options": {"g": "600"}}),
    "gop_1": ("mp4", {"options": {"g": "1"}}),
    "gop_7_b_frames": ("mp4", {"options": {"g": "7", "bf": "3"}}),
    "no_b_frames": ("mov", {"options": {"g": "12", "bf": "0"}}),
    "open_gop": ("mp4", {"options": {"g": "8", "bf": "3", "x264-params": "open-gop=1"}}),
    "open_gop_mkv": ("mkv", {"options": {"g": "8", "bf": "3", "x264-params": "open-gop=1"}}),
    "intra_refresh": ("mkv", {"options": {"g": "10", "x264-params": "intra-refresh=1"}}),
    "fragmented": (
        "mp4",
        {"options": {"g": "10"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "h264_avi": ("avi", {"options": {"g": "12", "bf": "2"}}),
    "mpeg4_avi": ("avi", {"codec": "mpeg4"}),
    "mpeg4_avi_b_frames": ("avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "mjpeg_avi": ("avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "ffv1_mkv": ("mkv", {"codec": "ffv1"}),
    "mpeg1": ("mpg", {"codec": "mpeg1video"}),
    "mpeg2_b_frames": ("mpg", {"codec": "mpeg2video", "options": {"bf": "2"}}),
    "vp8_webm": ("webm", {"codec": "libvpx", "options": {"g": "20", "deadline": "realtime"}}),
    "mpeg4_avi_open_gop": ("avi", {"codec": "mpeg4", "options": {"g": "6", "bf": "2"}}),
    "mpeg2_mkv_open_gop": ("mkv", {"codec": "mpeg2video", "options": {"g": "6", "bf": "2"}}),
    "mpeg2_mov_open_gop": ("mov", {"codec": "mpeg2video", "options": {"g": "6", "bf": "2"}}),
    "vp9_webm": ("webm", {"codec": "libvpx-vp9", "options": {"g": "20", "deadline": "realtime"}}),
    "variable_rate": ("mp4", {"frame_numbers": [n * n // 3 + n for n in range(NUM_FRAMES)]}),
    "hevc_open_gop": (
        "mp4",
        {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12:open-gop=1"}},
    ),
    "av1": ("mp4", {"codec": "libsvtav1", "options": {"g": "20", "preset": "12"}}),
    "gif": ("gif", {"codec": "gif", "pix_fmt": "rgb8"}),
}


@pytest.fixture(scope="module", params=FILES)
def video_path(request, tmp_path_factory):
    extension, options = FILES[request.param]
    path = tmp_path_factory.mktemp(request.param) / f"video.{extension}"
    return encode(path, numbered_frames(NUM_FRAMES), **options)


def test_any_frames_of_any_file(video_path):
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    sequential = decode_all(video_path)
    assert read_numbers(sequential) == list(range(NUM_FRAMES))
    rng = np.random.default_rng(0)
    with VideoReader(video_path) as video:
        assert video.num_frames == NUM_FRAMES == len(video.timestamps)
        assert np.all(np.diff(video.timestamps) > 0)
        for indices in (
            np.arange(NUM_FRAMES),
            np.arange(NUM_FRAMES)[::-1],
            [*range(45, 60), 0, 1, 2],  # a clip that wraps
            [59, 59, 0],
            *([index] for index in (0, 1, 6, 7, 8, 13, 31, 58, 59)),
            *(rng.integers(NUM_FRAMES, size=6) for _ in range(6)),
        ):
            frames = video.read(indices)
            assert read_numbers(frames) == list(indices)
            np.testing.assert_array_equal(frames, sequential[np.asarray(indices)])


def test_timestamps_are_seconds(tmp_path):
    numbers = [0, 1, 5, 6, 30]
    path = encode(tmp_path / "a.mp4", numbered_frames(5), frame_numbers=numbers)
    with VideoReader(path) as video:
        np.testing.assert_allclose(video.timestamps, np.array(numbers) / 30)


@pytest.mark.parametrize("options", [{"bf": "0", "g": "12"}, {"bf": "2", "g": "12"}, {"g": "600"}])
def test_edit_list_hides_the_first_frames(tmp_path, options):
    path = encode(
        tmp_path / "a.mp4",
        numbered_frames(40),
        frame_numbers=[number - 15 for number in range(40)],
        container_options={"avoid_negative_ts": "disabled"},
        options=options,
    )
    with av.open(path) as container:
        assert container.streams.video[0].frames == 40  # the header does not know
    with VideoReader(path) as video:
        assert video.num_frames == 25
        for index in range(25):
            assert read_numbers(video.read([index])) == [index + 15]


def test_vp8_packets_that_are_never_shown(tmp_path):
    """Alternate reference frames: here frame 10, by clearing its show_frame bit."""
    source = encode(tmp_path / "a.webm", numbered_frames(30), codec="libvpx")
    path = str(tmp_path / "b.webm")
    with av.open(source) as shown, av.open(path, "w") as hidden:
        stream = hidden.add_stream_from_template(shown.streams.video[0])
        for number, packet in enumerate(p for p in shown.demux(video=0) if p.size):
            content = bytearray(bytes(packet))
            content[0] &= 0xFF if number != 10 else 0xEF
            packet.update(memoryview(content))
            packet.stream = stream
            hidden.mux(packet)
    expected = [*range(10), *range(11, 30)]
    assert read_numbers(decode_all(path)) == expected
    with VideoReader(path) as video:
        assert read_numbers(video.read(np.arange(video.num_frames))) == expected
        assert read_numbers(video.read([12, 10])) == [13, 11]


@pytest.mark.parametrize("name", ["carphone_pristine.mp4", "bikes.mp4", "bigbuckbunny.mp4"])
def test_camera_footage_bit_for_bit(name):
    path = camera_clip(name)
    rng = np.random.default_rng(1)
    with VideoReader(path) as video:
        stop = min(video.num_frames, 100)
        chosen = [rng.integers(stop, size=4), [stop - 1, 0], [stop // 2]]
        frames = [video.read(indices) for indices in chosen]
        wanted = {int(index) for indices in chosen for index in indices}
    with av.open(path) as container:
        sequential = {}
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                sequential[number] = frame.to_ndarray(format="rgb24")
            if number >= stop:
                break
    for indices, got in zip(chosen, frames, strict=True):
        np.testing.assert_array_equal(got, np.stack([sequential[int(i)] for i in indices]))


def test_decodes_no_more_than_the_groups_needed(tmp_path, monkeypatch):
    options = {"g": "10", "bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "a.mp4", numbered_frames(200), options=options)
    decoded = []
    frames_of = _AVDecoder._frames

    def counted(self, packets, wanted=None):
        for frame in frames_of(self, packets, wanted):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(_AVDecoder, "_frames", counted)
    with VideoReader(path) as video:
        assert decoded == []  # the index decodes nothing
        assert read_numbers(video.read([*range(190, 200), 0, 1])) == [*range(190, 200), 0, 1]
        assert len(decoded) == 12
        decoded.clear()
        video.read([15, 18, 21, 25])  # the next key frame, 20, is too near for a seek
        assert len(decoded) == 16


def test_frames_of_no_use_are_not_decoded(tmp_path, monkeypatch):
    """x264 tells which frames no other refers to: of those, the ones that are not needed are left out."""
    path = encode(tmp_path / "a.mp4", numbered_frames(60), options={"g": "60", "bf": "3", "b-adapt": "0"})
    with VideoReader(path) as video:
        everything = video.read(range(60))
        skipping = _AVDecoder._frames
        counts = {}
        for name, frames_of in {
            "all": lambda self, packets, wanted=None: skipping(self, packets),
            "needed": skipping,
        }.items():

            def counted(self, packets, wanted=None, name=name, frames_of=frames_of):
                for frame in frames_of(self, packets, wanted):
                    counts[name] = counts.get(name, 0) + 1
                    yield frame

            monkeypatch.setattr(_AVDecoder, "_frames", counted)
            for indices in ([50], [3, 17, 18, 40], [*range(0, 60, 7)], [59]):
                np.testing.assert_array_equal(video.read(indices), everything[indices])
    assert counts["needed"] < 0.7 * counts["all"]


def corners(frame):
    """The brightest corner, as (bottom, right)."""
    height, width = frame.shape[:2]
    grey = frame[..., 1]
    return np.unravel_index(grey[:: height - 1, :: width - 1].argmax(), (2, 2))


def marked_frames():
    frames = np.full((4, 32, 64, 3), 16, "uint8")
    frames[:, :16, :32] = 235  # upper left
    return frames


@pytest.mark.parametrize(
    "rotation, shape, corner",
    [
        (0, (32, 64), (0, 0)),
        (90, (64, 32), (1, 0)),  # counterclockwise: the upper left goes to the lower left
        (180, (32, 64), (1, 1)),
        (-90, (64, 32), (0, 1)),
    ],
)
def test_rotation_metadata(tmp_path, rotation, shape, corner):
    path = encode(tmp_path / "a.mp4", marked_frames(), rotation=rotation)
    with VideoReader(path) as video:
        frames = video.read([0, 3])
        assert frames.shape[1:3] == shape
        assert corners(frames[1]) == corner
        assert video.read([1], shorter_side=16).shape[1:3] == (shape[0] // 2, shape[1] // 2)


# The display matrix (a, b, c, d): (x, y) is shown at (a x + c y, b x + d y) → what NumPy makes of the frame.
ORIENTATIONS = {
    (1, 0, 0, 1): lambda frame: frame,
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (-1, 0, 0, -1): lambda frame: frame[::-1, ::-1],
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),  # what a telephone held upright writes: clockwise
    (0, -1, 1, 0): np.rot90,
    (0, 1, 1, 0): lambda frame: frame.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda frame: np.rot90(frame, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_display_matrices(tmp_path, matrix):
    path = tmp_path / "a.mp4"
    encode(path, marked_frames())
    upright = [ORIENTATIONS[matrix](frame) for frame in decode_all(path)]
    write_display_matrix(path, *matrix)
    with VideoReader(path) as video:
        np.testing.assert_array_equal(video.read([3, 0]), [upright[3], upright[0]])
        assert video.read([1], shorter_side=16).shape[1:3] == tuple(size // 2 for size in upright[0].shape[:2])


# Names of files → arguments of `encode` that lose nothing.
LOSSLESS = {
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "ffv1.avi": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "h264.mp4": {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"qp": "0", "g": "9"}},
    "h264.mkv": {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"qp": "0", "g": "9", "bf": "3"}},
    "hevc.mp4": {
        "codec": "libx265",
        "pix_fmt": "gbrp",
        "options": {"x265-params": "log-level=none:lossless=1:keyint=9"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "pix_fmt": "gbrp", "options": {"lossless": "1", "g": "9"}},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "png.avi": {"codec": "png", "pix_fmt": "rgb24"},
    "animation.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "rgb24"},
    "raw.avi": {"codec": "rawvideo", "pix_fmt": "bgr24"},
    "image.webp": None,
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_bit_for_bit(tmp_path, rng, name):
    frames = rng.integers(256, size=(23, 18, 34, 3), dtype="uint8")
    if LOSSLESS[name] is None:
        path = write_images(tmp_path / name, frames, lossless=True, duration=40)
    else:
        path = encode(tmp_path / name, frames, **LOSSLESS[name])
    with VideoReader(path) as video:
        for indices in (np.arange(23), [22, 3, 3, 10], *rng.integers(23, size=(6, 1))):
            np.testing.assert_array_equal(video.read(indices), frames[np.asarray(indices)])


# Files with an alpha channel: name → arguments of `encode`, and by how much a frame of theirs may be off.
WITH_ALPHA = {
    "png.mov": ({"codec": "png", "pix_fmt": "rgba"}, 0),
    "animation.mov": ({"codec": "qtrle", "pix_fmt": "argb"}, 0),
    "ffv1.mkv": ({"codec": "ffv1", "pix_fmt": "bgra"}, 0),
    "prores.mov": ({"codec": "prores_ks", "pix_fmt": "yuva444p10le"}, 3),
    "vp8.webm": ({"codec": "libvpx", "pix_fmt": "yuva420p", "options": {"auto-alt-ref": "0", "g": "7", "crf": "4"}}, 6),
    "vp9.webm": ({"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "options": {"lossless": "1", "g": "7"}}, 3),
    "image.webp": (None, 0),
}


@pytest.mark.parametrize("name", WITH_ALPHA)
def test_transparent_pixels_are_black(tmp_path, name):
    options, tolerance = WITH_ALPHA[name]
    frames = np.zeros((20, 32, 48, 4), "uint8")
    frames[..., :3] = np.array([200, 120, 40]) + np.arange(20)[:, None, None, None]
    frames[:, :, 16:32, 3], frames[:, :, 32:, 3] = 128, 255
    if options is None:
        path = write_images(tmp_path / name, frames, lossless=True, exact=True)
    else:
        path = encode(tmp_path / name, frames, pixels="rgba", **options)
    expected = np.rint(frames[..., :3] * (frames[..., 3:] / 255))
    # Colours and alpha are stored at half the resolution in 4:2:0: not at the seams.
    inside = np.r_[2:14, 18:30, 34:46]
    with VideoReader(path) as video:
        assert video.num_frames == 20
        for indices in (np.arange(20), [19, 0], [8], [13], [2]):
            got = video.read(indices)
            np.testing.assert_allclose(got[:, :, inside], expected[indices][:, :, inside], atol=tolerance)


def test_what_is_transparent_does_not_bleed_when_resized(tmp_path):
    frames = np.zeros((2, 32, 48, 4), "uint8")
    frames[:, :, :23], frames[:, :, 23:] = [0, 200, 0, 255], [255, 0, 255, 0]
    path = encode(tmp_path / "a.mkv", frames, pixels="rgba", codec="ffv1", pix_fmt="bgra")
    with VideoReader(path) as video:
        got = video.read([0, 1], shorter_side=20)
    assert got[..., 0].max() == 0 and got[..., 2].max() == 0
    assert got[..., 1].max() == 200


def test_alpha_with_a_display_matrix(tmp_path):
    frames = np.zeros((2, 32, 48, 4), "uint8")
    frames[:, :8, :8] = 255
    path = tmp_path / "a.mov"
    encode(path, frames, pixels="rgba", codec="png", pix_fmt="rgba")
    write_display_matrix(path, 0, 1, -1, 0)
    with VideoReader(path) as video:
        np.testing.assert_array_equal(video.read([1])[0], np.rot90(frames[1, ..., :3], -1))


# How a GIF treats a frame before the next one is drawn → which of the squares drawn so far are then seen.
DISPOSALS = {0: range, 1: range, 2: lambda _: (), 3: lambda _: ()}


@pytest.mark.parametrize("disposal", DISPOSALS)
def test_gif_composes_its_frames(tmp_path, disposal):
    def draw(*numbers):
        image = np.zeros((24, 40, 4), "uint8")
        for number in numbers:
            image[4:12, 10 * number : 10 * number + 8] = [250, 60 * number, 5, 255]
        return image

    path = write_images(
        tmp_path / "a.gif", [draw(n) for n in range(4)], disposal=disposal, duration=[100, 50, 200, 30], loop=0
    )
    expected = np.stack([draw(*DISPOSALS[disposal](number), number) for number in range(4)])[..., :3]
    with VideoReader(path) as video:
        np.testing.assert_allclose(video.timestamps, [0, 0.1, 0.15, 0.35])
        np.testing.assert_array_equal(video.read([0, 1, 2, 3]), expected)
        for index in (3, 1, 2):
            np.testing.assert_array_equal(video.read([index])[0], expected[index])


def test_webp_with_durations_of_their_own(tmp_path):
    frames = numbered_frames(30)
    durations = np.arange(30) % 7 * 10 + 10
    path = write_images(tmp_path / "a.webp", frames, duration=durations.tolist(), quality=90)
    with VideoReader(path) as video:
        np.testing.assert_allclose(video.timestamps, (np.cumsum(durations) - durations) / 1000)
        for indices in (np.arange(30), np.arange(30)[::-1], [29, 0, 1, 0], [7], [6]):
            assert read_numbers(video.read(indices)) == list(indices)
        assert video.read([3], shorter_side=24).shape == (1, 24, 40, 3)


def test_webp_composes_its_frames(tmp_path, rng):
    """Frames that store only what changes, on a transparent ground."""
    frames = np.zeros((12, 40, 40, 4), "uint8")
    for number, image in enumerate(frames):
        image[:20, :20] = [10, 200, 30, 255]
        image[20 + number : 25 + number, 8:16] = [*rng.integers(256, size=3), 255]
    path = write_images(tmp_path / "a.webp", frames, lossless=True, minimize_size=True)
    with VideoReader(path) as video:
        np.testing.assert_array_equal(video.read(np.arange(12)), frames[..., :3])
        np.testing.assert_array_equal(video.read([5])[0], frames[5, ..., :3])


def test_a_webp_picture_is_a_video_of_one_frame(tmp_path):
    picture = numbered_frames(6)[5]
    write_images(tmp_path / "a.webp", [picture], lossless=True)
    with VideoReader(tmp_path / "a.webp") as video:
        assert video.timestamps.tolist() == [0]
        np.testing.assert_array_equal(video.read([0, 0]), [picture, picture])


def test_broken_webp(tmp_path):
    path = tmp_path / "a.webp"
    write_images(path, numbered_frames(20), lossless=True)
    content = path.read_bytes()
    for stop in (14, 60, len(content) // 2):
        path.write_bytes(content[:stop])
        with pytest.raises(VideoError, match="Cannot decode .*a.webp: "):
            VideoReader(path)
    # The tenth frame's picture is no picture.
    places = [match.start() for match in re.finditer(b"ANMF", content)]
    place = places[10] + 37  # behind its size
    path.write_bytes(content[:place] + b"\xff" * 20 + content[place + 20 :])
    with VideoReader(path) as video:
        assert read_numbers(video.read([9, 2])) == [9, 2]
        with pytest.raises(VideoError, match="2 of the 3 frames needed do not decode"):
            video.read([9, 10, 15])


def test_the_name_of_a_file_does_not_matter(tmp_path):
    write_images(tmp_path / "a.mp4", numbered_frames(5), lossless=True, format="WEBP")
    encode(tmp_path / "a.mkv", numbered_frames(5))
    (tmp_path / "a.mkv").rename(tmp_path / "a.webp")
    for name in ("a.mp4", "a.webp"):
        with VideoReader(tmp_path / name) as video:
            assert read_numbers(video.read([4, 1])) == [4, 1]


@pytest.mark.parametrize("color_range", [1, 2], ids=["limited", "full"])
@pytest.mark.parametrize("colorspace", [1, 5, 9], ids=["bt709", "bt601", "bt2020"])
def test_colours_are_those_that_the_file_states(tmp_path, colorspace, color_range):
    frames = np.full((3, 32, 32, 3), [200, 60, 30], "uint8")
    path = encode(
        tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="yuv444p", colorspace=colorspace, color_range=color_range
    )
    with av.open(path) as container:
        luma = next(container.decode(video=0)).to_ndarray()[0, 0, 0]
    red, green, blue = {1: (0.2126, 0.7152, 0.0722), 5: (0.299, 0.587, 0.114), 9: (0.2627, 0.678, 0.0593)}[colorspace]
    full = 200 * red + 60 * green + 30 * blue
    assert abs(luma - (full if color_range == 2 else 16 + full * 219 / 255)) <= 1  # the file is what it says
    with VideoReader(path) as video:
        np.testing.assert_allclose(video.read([1]), frames[:1], atol=1)


def test_silent_colours_are_bt601_limited(tmp_path):
    path = encode(tmp_path / "a.mkv", np.full((2, 32, 32, 3), [200, 60, 30], "uint8"), "ffv1", pix_fmt="yuv444p")
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (2, 0)  # unspecified
        luma = frame.to_ndarray()[0, 0, 0]
    assert abs(luma - (16 + (200 * 0.299 + 60 * 0.587 + 30 * 0.114) * 219 / 255)) <= 1
    with VideoReader(path) as video:
        np.testing.assert_allclose(video.read([0]), np.full((1, 32, 32, 3), [200, 60, 30]), atol=1)


@pytest.mark.parametrize(
    "pix_fmt", ["gray", "gray16le", "yuv420p10le", "yuv444p10le", "yuv422p", "yuv410p", "gbrp10le", "gbrp12le"]
)
def test_pixel_formats(tmp_path, pix_fmt):
    level = np.arange(9, dtype="uint8") * 25 + 10
    frames = np.broadcast_to(level[:, None, None, None], (9, 32, 48, 3))
    path = encode(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt=pix_fmt)
    with VideoReader(path) as video:
        got = video.read([8, 0, 5])
        assert got.dtype == np.uint8
        np.testing.assert_allclose(got, frames[[8, 0, 5]], atol=2)


def test_pixels_are_taken_as_square(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(4), aspect_ratio=Fraction(2, 1))
    with av.open(path) as container:
        assert container.streams.video[0].sample_aspect_ratio == 2
    with VideoReader(path) as video:
        assert video.read([3]).shape == (1, 48, 80, 3)


@pytest.mark.parametrize(
    "height, width, shorter_side, expected",
    [
        (48, 80, 24, (24, 40)),
        (80, 48, 24, (40, 24)),
        (48, 80, 96, (96, 160)),
        (48, 50, 24, (24, 25)),
        (48, 78, 47, (47, 76)),  # 76.375
        (32, 36, 4, (4, 5)),  # 4.5 rounds up
        (48, 80, 48, (48, 80)),
    ],
)
def test_resizing(tmp_path, height, width, shorter_side, expected):
    path = tmp_path / "a.mp4"
    write_video(path, numbered_frames(10, height, width))
    with VideoReader(path) as video:
        frames = video.read([9, 2, 5], shorter_side)
        whole = video.read([9, 2, 5])
    assert frames.dtype == np.uint8
    assert frames.shape == (3, *expected, 3)
    assert whole.shape == (3, height, width, 3)
    if expected == (height, width):
        np.testing.assert_array_equal(frames, whole)
    elif shorter_side > 4:
        assert read_numbers(frames) == [9, 2, 5]


def test_odd_sizes(tmp_path):
    frames = numbered_frames(12, 45, 77)
    path = encode(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="yuv444p")
    with VideoReader(path) as video:
        got = video.read([11, 3])
        assert got.shape == (2, 45, 77, 3)
        assert read_numbers(got) == [11, 3]
        np.testing.assert_allclose(got, frames[[11, 3]].astype(int), atol=3)
        assert video.read([3], 15).shape == (1, 15, 26, 3)  # 25.67


@pytest.mark.parametrize("options", [{"g": "12"}, {"g": "12", "bf": "0"}, {"g": "600"}])
@pytest.mark.parametrize("whole_packets", [9, 25, 58])
@pytest.mark.parametrize("extension, container_options", [("mp4", {"movflags": "faststart"}), ("mkv", {}), ("avi", {})])
def test_a_cut_off_file_is_a_shorter_video(tmp_path, options, whole_packets, extension, container_options):
    path = tmp_path / f"a.{extension}"
    encode(path, numbered_frames(60), options=options, container_options=container_options)
    position, size = packet_places(path)[whole_packets]
    path.write_bytes(path.read_bytes()[: position + size // 2])
    with VideoReader(path) as video:
        assert video.num_frames == whole_packets
        # A frame may be lost among those that refer to one behind the cut, hence "increasing".
        numbers = read_numbers(video.read(np.arange(video.num_frames)))
        assert numbers == sorted(set(numbers)) and numbers[:5] == [0, 1, 2, 3, 4]
        one_by_one = [read_numbers(video.read([i]))[0] for i in range(video.num_frames)]
        assert one_by_one == numbers


def packet_places(path):
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def test_frames_that_do_not_decode_are_counted(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(20), codec="mpeg4", options={"g": "1"})
    content = bytearray(open(path, "rb").read())
    for position, size in packet_places(path)[4:6]:
        content[position : position + size] = bytes(size)
    with open(path, "wb") as file:
        file.write(content)
    with VideoReader(path) as video:
        assert video.num_frames == 20
        assert read_numbers(video.read([3, 6])) == [3, 6]
        with pytest.raises(VideoError, match=r"2 of the 4 frames needed do not decode") as info:
            video.read([3, 4, 5, 6])
    assert path in str(info.value)


@pytest.mark.parametrize("how", BREAKERS)
def test_broken_files(tmp_path, how):
    path = tmp_path / "broken.mp4"
    BREAKERS[how](path)
    with pytest.raises(VideoError) as info:
        VideoReader(path)
    assert str(info.value).startswith(f"Cannot decode {path}: ")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["missing.mp4", "", "a folder", "nul\0l.mp4"])
def test_names_that_are_no_files(tmp_path, name):
    (tmp_path / "a folder").mkdir()
    path = os.path.join(tmp_path, name)
    with pytest.raises(VideoError, match="Cannot decode"):
        VideoReader(path)


@pytest.mark.parametrize("indices", [[], [-1], [10], [0.5], [[1]], 3], ids=["none", "low", "high", "float", "2d", "0d"])
def test_indices_guard(tmp_path, indices):
    write_video(tmp_path / "a.mp4", numbered_frames(10))
    with VideoReader(tmp_path / "a.mp4") as video:
        with pytest.raises(ValueError, match=r"integers in \[0, 10\)\. Received: indices="):
            video.read(indices)


def test_shorter_side_guard(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(10))
    with VideoReader(tmp_path / "a.mp4") as video:
        with pytest.raises(ValueError, match="at least 1 or None. Received: shorter_side=0"):
            video.read([0], shorter_side=0)


@pytest.mark.parametrize("fps", [30, 29.97, 12.5])
def test_write_video_round_trip(tmp_path, fps):
    frames = numbered_frames(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_video(tmp_path / "a.mp4", frames, fps=fps)
        write_video(tmp_path / "a.avi", frames, fps=fps, codec="mpeg4")
        write_video(tmp_path / "a.webm", frames, fps=fps, codec="libvpx-vp9")
    for name in ("a.mp4", "a.avi", "a.webm"):
        with VideoReader(tmp_path / name) as video:
            assert read_numbers(video.read(np.arange(20))) == list(range(20))
            np.testing.assert_allclose(np.diff(video.timestamps), 1 / fps, atol=1.1e-3)
    assert sorted(os.listdir(tmp_path)) == ["a.avi", "a.mp4", "a.webm"]


def test_write_video_leaves_nothing_half_done(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(5))
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError):
        write_video(tmp_path / "a.mp4", numbered_frames(5), codec="no such codec")
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(
    "frames, message",
    [
        (np.zeros((4, 8, 8, 3)), r"uint8 array .*\(4, 8, 8, 3\) and dtype float64"),
        (np.zeros((8, 8, 3), "uint8"), r"\(T, H, W, 3\)\. Received: frames of shape \(8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), "uint8"), r"non-empty .*\(0, 8, 8, 3\)"),
        (np.zeros((4, 9, 8, 3), "uint8"), r"must be even\. Received: frames of shape \(4, 9, 8"),
        (np.zeros((4, 8, 9, 3), "uint8"), r"must be even"),
    ],
)
def test_write_video_guards(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames)
