"""Random access to frames, proved by the number that each frame carries."""

import os
import struct
import warnings

import av
import numpy as np
import pytest

from keras_nonlocal.data import VideoError, VideoReader, write_video
from tests.video_files import (
    BREAKERS,
    camera_clip,
    decode_all,
    encode,
    numbered_frames,
    read_numbers,
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
    frames_of = VideoReader._frames

    def counted(self, packets):
        for frame in frames_of(self, packets):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(VideoReader, "_frames", counted)
    with VideoReader(path) as video:
        assert decoded == []  # the index decodes nothing
        assert read_numbers(video.read([*range(190, 200), 0, 1])) == [*range(190, 200), 0, 1]
        assert len(decoded) == 12
        decoded.clear()
        video.read([15, 18, 21, 25])  # the next key frame, 20, is too near for a seek
        assert len(decoded) == 16


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


def test_rotation_of_a_telephone(tmp_path):
    """The matrix that a telephone held upright writes: x' = -y, y' = x, that is clockwise."""
    path = tmp_path / "a.mp4"
    encode(path, marked_frames())
    content = path.read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    in_track = content.index(identity, content.index(b"tkhd"))
    path.write_bytes(content[:in_track] + clockwise + content[in_track + 36 :])
    with VideoReader(path) as video:
        frame = video.read([0])[0]
    assert frame.shape == (64, 32, 3)
    assert corners(frame) == (0, 1)


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
