"""Exact frames of video files: by PyAV, animated WebP by Pillow.

Frames are numbered in the order of display and found by their timestamps, never by
`time * rate`, which is wrong in files with a variable frame rate or an edit list.

A decoder is a class with one entry in `DECODERS`: `Decoder(path)` opens a file and has
`timestamps`, a list of seconds; `frames(indices)`, which yields pairs of an index and an
`av.VideoFrame` for sorted indices without repetition, leaving out what does not decode; and
`close()`. `VideoReader` is the public door to all of them.

Shape letters: T frames, H and W height and width, C = 3 colours (RGB).
"""

import bisect
import contextlib
import os
import re
import struct
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from keras_nonlocal.files import whole_file

# What a broken file can make a decoder raise, apart from PyAV's own errors: a stream list that is
# empty, a codec it does not know, a name the file system refuses; the last three are Pillow's.
_DECODE_ERRORS = (
    av.FFmpegError,
    OSError,
    ValueError,
    LookupError,
    EOFError,
    SyntaxError,
    Image.DecompressionBombError,
)

# Decoding on through fewer frames than this costs less than a seek, which restarts the decoder.
_SEEK_MIN_SKIP = 4

# Containers whose index leads to packets with the same timestamps as reading from the start does;
# after a seek in an MPEG program stream, for one, frames can be named after their neighbours.
_SEEKABLE = {"mp4", "matroska", "avi"}

# Codecs that mark each frame to which no other refers, and whose decoders go by exactly that mark: of such frames only
# those that are needed are decoded. (HEVC's mark leaves out the layers above.)
_MARKING_CODECS = {"h264"}

# FFmpeg's own decoders of these codecs leave out the alpha channel, which Matroska stores beside
# the frames; these do not.
_ALPHA_CODECS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class VideoError(ValueError):
    """A video file that cannot be opened, or whose frames cannot be decoded."""


class VideoReader:
    """Reads any frames of a video file, exactly.

    The file is scanned once for the timestamps of its frames; `read` then seeks to the key frame
    before the first frame needed and decodes until the last. Use it in a `with` statement.

    - Files without usable timestamps (H.264 in AVI) are decoded from the start and counted, which
      is slower and as exact; GIF and animated WebP have no key frames and are decoded from the
      start too. A file that was cut off is the shorter video of the frames it still holds, an
      animated WebP that was cut off is broken.
    - Frames are turned and mirrored upright by the file's display matrix, to the nearest quarter
      turn. Pixels are taken as square: the sample aspect ratio is ignored.
    - What is transparent is laid on black, before frames are resized.
    - Colours are converted by the matrix (BT.601, BT.709, BT.2020) and the range (limited or full)
      that the file states, BT.601 and limited where it states none. Deeper pixels are rounded to
      8 bits; transfer functions are not undone, so HDR looks flat.

    Args:
        path: String or path-like, the video file.

    Attributes:
        num_frames: Integer, the number of frames.
        timestamps: float64 array of shape `(num_frames,)`, the time of each frame in seconds.

    Raises:
        VideoError: If the file has no video stream, no frame, or cannot be opened. Its message
            is one line that names the path.

    Example:

    >>> import numpy as np, tempfile, os
    >>> from keras_nonlocal.data import VideoReader, write_video
    >>> path = os.path.join(tempfile.mkdtemp(), "grey.mp4")
    >>> write_video(path, np.full((20, 48, 64, 3), 128, "uint8"))
    >>> with VideoReader(path) as video:
    ...     video.num_frames, video.read([19, 0, 0], shorter_side=24).shape
    (20, (3, 24, 32, 3))
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        with self._naming_the_path():
            self._decoder = _choose_decoder(self.path)(self.path)
        self.timestamps = np.array(self._decoder.timestamps, "float64")
        self.num_frames = len(self.timestamps)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Closes the file. Closing twice is fine."""
        self._decoder.close()

    def _error(self, reason):
        return VideoError(f"Cannot decode {self.path}: {' '.join(reason.split())}")

    @contextlib.contextmanager
    def _naming_the_path(self):
        try:
            yield
        except _DECODE_ERRORS as error:
            # The rest of FFmpeg's messages is an error number and the path again.
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise self._error(reason) from error

    def read(self, indices, shorter_side=None):
        """Decodes frames.

        Args:
            indices: 1-D integers in `[0, num_frames)`, in any order, repeated or not; each frame
                is decoded once.
            shorter_side: Integer, the size in pixels to which the frames' shorter side is resized
                (bilinear, during decoding), the aspect being kept. `None`: the file's own size.

        Returns:
            A uint8 array of shape `(T, H, W, 3)`, RGB, in the order of `indices`.

        Raises:
            ValueError: If `indices` is not a non-empty list of frames of the video.
            VideoError: If some of the frames cannot be decoded.
        """
        indices = np.asarray(indices)
        if (
            indices.ndim != 1
            or indices.size == 0
            or indices.dtype.kind not in "iu"
            or indices.min() < 0
            or indices.max() >= self.num_frames
        ):
            raise ValueError(
                f"`indices` must be a non-empty list of integers in [0, {self.num_frames}). "
                f"Received: indices={indices.tolist()}"
            )
        if shorter_side is not None and shorter_side < 1:
            raise ValueError(f"`shorter_side` must be at least 1 or None. Received: shorter_side={shorter_side}")
        unique, inverse = np.unique(indices, return_inverse=True)
        images = self._decode(unique.tolist(), _FrameConverter(shorter_side))
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:  # turned midway
            raise self._error(f"its frames are of several sizes, {sorted(sizes)}")
        return np.stack([images[position] for position in inverse])

    def map_frames(self, function, shorter_side=None):
        """Applies a function to every frame of the video, of which one at a time is held in memory.

        Args:
            function: Takes a frame, a uint8 array of shape `(H, W, 3)`, RGB.
            shorter_side: As in `read`, but frames that are smaller stay as they are.

        Returns:
            A list of what the function returned, in the order of display.

        Raises:
            VideoError: If some of the frames cannot be decoded.
        """
        to_rgb = _FrameConverter(shorter_side, enlarge=False)
        return self._decode(range(self.num_frames), lambda frame: function(to_rgb(frame)))

    def _decode(self, indices, convert):
        """What `convert` makes of the frames with these sorted numbers."""
        with self._naming_the_path():
            converted = {index: convert(frame) for index, frame in self._decoder.frames(indices)}
        missing = len(indices) - len(converted)
        if missing:
            raise self._error(f"{missing} of the {len(indices)} frames needed do not decode")
        return [converted[index] for index in indices]


def _choose_decoder(path):
    with open(path, "rb") as file:
        start = file.read(16)
    return next(decoder for pattern, decoder in DECODERS.items() if re.match(pattern, start, re.DOTALL))


class _AVDecoder:
    """Whatever FFmpeg knows."""

    def __init__(self, path):
        self._path = path
        self._container = None
        try:
            self._open()
            self._index()
        except BaseException:
            self.close()
            raise

    def close(self):
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self):
        self.close()
        self._container = av.open(self._path, metadata_errors="replace")
        if not self._container.streams.video:
            raise ValueError("the file has no video stream")
        self._stream = self._container.streams.video[0]
        self._codec = self._stream.codec_context
        if self._codec is None:
            raise ValueError("no decoder for its video stream")
        if self._stream.metadata.get("alpha_mode") == "1" and self._codec.name in _ALPHA_CODECS:
            extradata = self._codec.extradata
            self._codec = av.CodecContext.create(_ALPHA_CODECS[self._codec.name], "r")
            self._codec.extradata = extradata
        # One thread, set before the first decode: parallelism is across files, and PyAV's frame
        # threads would change neither the frames nor, with several readers, the time.
        self._codec.thread_type = "NONE"
        self._codec.thread_count = 1

    def _packets(self):
        """Packets to the end of the file or to its cut, then None, which drains the decoder."""
        with contextlib.suppress(av.FFmpegError):
            for packet in self._container.demux(self._stream):
                # A packet that the cut went through would decode to a made-up frame.
                if packet.size and not packet.is_corrupt:
                    yield packet
        yield None

    def _frames(self, packets, wanted=None):
        """Decodes packets; with `wanted` times, those of no other use may be left out."""
        for packet in packets:
            if packet is not None and self._codec.name in _MARKING_CODECS:
                self._codec.skip_frame = "DEFAULT" if wanted is None or packet.pts in wanted else "NONREF"
            # A packet that does not decode is a frame less; whoever needs it will miss it.
            with contextlib.suppress(av.FFmpegError):
                yield from self._codec.decode(packet)

    def _index(self):
        packets = [
            (packet.pts, packet.is_keyframe) for packet in self._packets() if packet and _is_shown(packet, self._stream)
        ]
        pts = [time for time, _ in packets]
        time_base = self._stream.time_base
        formats = set(self._container.format.name.split(","))
        self._by_time = None not in pts and len(set(pts)) == len(pts)
        # AVI has no display times. Times that go up from packet to packet although the codec
        # reorders its frames only number the packets.
        if "avi" in formats and self._stream.codec_context.has_b_frames:
            self._by_time = self._by_time and pts != sorted(pts)
        if self._by_time:
            self._pts = sorted(pts)
            self._keys = sorted(time for time, is_key in packets if is_key and formats & _SEEKABLE)
        else:
            self._open()
            time_base = 1 / (self._stream.average_rate or self._stream.guessed_rate or 1)
            self._pts = list(range(sum(1 for _ in self._frames(self._packets()))))
            self._keys = []
        if not self._pts:
            raise ValueError("the file has no video frames")
        self.timestamps = [time * float(time_base) for time in self._pts]

    def frames(self, indices):
        for run in self._runs(indices):
            yield from self._decode_run(run)

    def _key_position(self, pts):
        """Where in the list of key frames the last one at or before `pts` stands, or -1."""
        return bisect.bisect_right(self._keys, pts) - 1

    def _runs(self, indices):
        """Splits sorted frame indices where a seek to a key frame skips enough frames."""
        runs = [[]]
        for index in indices:
            position = self._key_position(self._pts[index])
            if runs[-1] and position >= 0:
                key_index = bisect.bisect_left(self._pts, self._keys[position])
                if key_index - runs[-1][-1] > _SEEK_MIN_SKIP:
                    runs.append([])
            runs[-1].append(index)
        return runs

    def _decode_run(self, run):
        """Yields the run's frames, starting at ever earlier key frames as needed."""
        wanted = {self._pts[index]: index for index in run}
        position = self._key_position(min(wanted))
        # A seek can fail or land late, and a key frame of an "intra refresh" stream is not enough
        # to start on. Decoders give no frame that lacks what it refers to: start earlier for it,
        # at last from a newly opened file.
        for start in (position, position - 1, None):
            if start is None:
                self._open()
            elif start < 0 or not self._seek(self._keys[start]):
                continue
            skippable = wanted if self._by_time and start is not None else None
            for number, frame in enumerate(self._frames(self._packets(), skippable)):
                pts = frame.pts if self._by_time else number
                if pts in wanted:
                    yield wanted.pop(pts), frame
                if not wanted:
                    return

    def _seek(self, pts):
        try:
            self._container.seek(pts, stream=self._stream)
        except av.FFmpegError:
            return False
        self._codec.flush_buffers()
        return True


def _is_shown(packet, stream):
    """Whether a packet becomes a frame of the video."""
    if packet.is_discard:  # before the start that an edit list sets
        return False
    # VP8 stores its "alternate reference" frames, which are never shown, as packets of their own;
    # the bit is show_frame of RFC 6386, section 9.1.
    return stream.codec_context.name != "vp8" or bool(bytes(packet)[0] & 0x10)


class _WebPDecoder:
    """Animated WebP, which FFmpeg does not compose; one picture is a video of one frame."""

    def __init__(self, path):
        with open(path, "rb") as file:
            durations = list(_webp_durations(file)) or [0]
        self._image = Image.open(path, formats=("WEBP",))
        if self._image.n_frames != len(durations):
            self.close()
            raise ValueError(f"{len(durations)} frames in the file, of which {self._image.n_frames} are whole")
        self.timestamps = (np.cumsum([0, *durations[:-1]]) / 1000).tolist()

    def close(self):
        self._image.close()

    def frames(self, indices):
        for index in indices:
            try:
                self._image.seek(index)
                pixels = np.asarray(self._image.convert("RGBA"))
            except _DECODE_ERRORS:
                return  # the frames behind it build on it
            yield index, av.VideoFrame.from_ndarray(pixels, format="rgba")


def _webp_durations(file):
    """Yields the milliseconds of each frame of an animation; Pillow would decode all of it for them."""
    file.seek(12)
    while len(header := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", header)
        body = file.tell()
        if kind == b"ANMF":  # 12 bytes of place and size, 3 of duration
            yield int.from_bytes(file.read(15)[12:], "little")
        file.seek(body + size + size % 2)


# How a file begins → what decodes it; the first row that matches. The extension is not looked at.
DECODERS = {
    rb"RIFF....WEBP": _WebPDecoder,
    rb"": _AVDecoder,
}


class _FrameConverter:
    """Frame → upright RGB array without alpha, all frames at the size of the first."""

    def __init__(self, shorter_side, enlarge=True):
        self._shorter_side = shorter_side
        self._enlarge = enlarge
        self._to_rgb, self._to_rgba = VideoReformatter(), VideoReformatter()
        self._size = None

    def __call__(self, frame):
        if self._size is None:
            shorter_side = self._shorter_side
            if shorter_side is not None and not self._enlarge:
                shorter_side = min(shorter_side, frame.height, frame.width)
            self._size = _resized(frame.height, frame.width, shorter_side)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if _has_alpha(frame.format):
            frame = self._on_black(frame)
        height, width = self._size
        image = self._to_rgb.reformat(
            frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR, threads=1
        ).to_ndarray()
        return image if matrix is None else _upright(image, matrix)

    def _on_black(self, frame):
        pixels = self._to_rgba.reformat(frame, format="rgba", threads=1).to_ndarray()
        colours = (pixels[..., :3].astype("uint16") * pixels[..., 3:] + 127) // 255
        return av.VideoFrame.from_ndarray(colours.astype("uint8"), format="rgb24")


def _has_alpha(pixel_format):
    return pixel_format.has_palette or any(component.is_alpha for component in pixel_format.components)


def _upright(image, matrix):
    """Turns and mirrors by the display matrix: the pixel (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, _, c, d = np.frombuffer(matrix, "int32")[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _resized(height, width, shorter_side):
    if shorter_side is None:
        return height, width
    longer = int(max(height, width) * shorter_side / min(height, width) + 0.5)
    return (shorter_side, longer) if height <= width else (longer, shorter_side)


def write_video(path, frames, fps=30, codec="libx264", options=None):
    """Writes frames as a video file.

    The file appears under its name only when it is complete.

    Args:
        path: String or path-like; the extension chooses the container, e.g. `.mp4`.
        frames: uint8 array of shape `(T, H, W, 3)`, RGB, with H and W even (the pixel format is
            YUV 4:2:0, which every player knows).
        fps: Number, frames per second.
        codec: String, FFmpeg's name of the encoder.
        options: Dict of the encoder's own options, as strings. Defaults to `{"crf": "18"}`, which
            looks lossless in H.264 and which encoders without it ignore.

    Raises:
        ValueError: If `frames` has another shape or dtype, or an odd size.

    Example:

    >>> import numpy as np, tempfile, os
    >>> from keras_nonlocal.data import write_video
    >>> path = os.path.join(tempfile.mkdtemp(), "black.mp4")
    >>> write_video(path, np.zeros((8, 32, 32, 3), "uint8"), fps=25)
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            "`frames` must be a non-empty uint8 array of shape (T, H, W, 3). "
            f"Received: frames of shape {frames.shape} and dtype {frames.dtype}"
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"The height and width of a video must be even. Received: frames of shape {frames.shape}")
    with whole_file(path) as scratch, av.open(scratch, "w") as container:
        stream = container.add_stream(
            codec,
            rate=Fraction(fps).limit_denominator(100_000),
            options={"crf": "18"} if options is None else options,
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
