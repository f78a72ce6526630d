"""Attention as pictures and as video.

Shape letters:
    T, H, W: frames, height and width of the clip, in pixels
    h, w: height and width of a drawn frame
"""

import fractions
import math
import os
import pathlib

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_nonlocal.files import whole_file

# Colours of weights from 0 to the largest, and from the largest negative one over 0 to the largest positive one. The
# first is seen on grey and on black, the second leaves 0 to the picture below.
SEQUENTIAL = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))
DIVERGING = ((24, 92, 255), (120, 170, 255), (200, 200, 200), (255, 140, 110), (240, 20, 20))

GAP, TITLE, FOOTER = 4, 20, 44
BAR = (220, 12)
TEXT = (40, 40, 40)


def draw_attention(clip, attention, path=None, max_frames=8, frame_height=160, colormap=None):
    """Draws what a position attends to: frames of the clip side by side, below them the weights laid over.

    The query's frame is the first picture, its position a white square. The other frames are spread evenly over the
    clip. The bar below says which colour is which weight. If any weight is negative, as the dot product's may be, blue
    is negative, red positive and no colour 0.

    Args:
        clip: Array of pixels in 0..255, of shape `(frames, height, width, 3)`.
        attention: What `attend` returned for the clip.
        path: PNG file to write. `None`: none.
        max_frames: Number of frames to show.
        frame_height: Height in pixels at which a frame is drawn.
        colormap: Name of a Matplotlib colour map, from 0 to the largest weight, or from the largest negative one to
            the largest positive one. `None`: the built-in colours. Others need the extra `keras-nonlocal[viz]`.

    Returns:
        The picture, as a `PIL.Image.Image`.

    Raises:
        ValueError: if `clip` is not the one of `attention`, or an argument is out of range.
        ImportError: if `colormap` is given and Matplotlib is not installed.
    """
    clip, scale = _check_clip(clip, attention, frame_height), _Scale(attention.weights, colormap)
    frames = _spread(len(clip), attention.position[0], _check_count("max_frames", max_frames))
    sheet = _Sheet(clip, attention, frames, frame_height, rows=2)
    heat = attention.pixels()
    for column, frame in enumerate(frames):
        picture = sheet.frame(frame)
        sheet.put(picture, column, 0)
        sheet.put(_overlaid(picture, heat[frame], scale), column, 1)
    for row in range(2):
        sheet.mark_query(row)
    sheet.footer(scale)
    return sheet.save(path)


def draw_arrows(clip, attention, path=None, count=20, max_frames=8, frame_height=160, colormap=None):
    """Draws the paper's figure 3: arrows from the position that asks to those that it attends to most, in all frames.

    The query's frame is the first picture, its position a white square. Then come, in order, the frames that hold the
    strongest positions, and others evenly between them if there is room. Where there is none, an arrow ends in the
    nearest frame that is shown. Colour and width of an arrow are its weight's; a ring is a position in the query's own
    place.

    Args:
        clip: Array of pixels in 0..255, of shape `(frames, height, width, 3)`.
        attention: What `attend` returned for the clip.
        path: PNG file to write. `None`: none.
        count: Number of arrows.
        max_frames: Number of frames to show.
        frame_height: Height in pixels at which a frame is drawn.
        colormap: As for `draw_attention`.

    Returns:
        The picture, as a `PIL.Image.Image`.

    Raises:
        ValueError: if `clip` is not the one of `attention`, or an argument is out of range.
        ImportError: if `colormap` is given and Matplotlib is not installed.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), figure 3
    """
    clip, scale = _check_clip(clip, attention, frame_height), _Scale(attention.weights, colormap)
    centres, weights, times = _strongest(attention, count)
    frames = _holding(times, weights, len(clip), attention.position[0], _check_count("max_frames", max_frames))
    sheet = _Sheet(clip, attention, frames, frame_height, rows=1)
    for column, frame in enumerate(frames):
        sheet.put(sheet.frame(frame), column, 0)
    ends = [
        sheet.point(int(np.abs(np.array(frames) - time).argmin()), y, x)
        for time, (_, y, x) in zip(times, centres, strict=True)
    ]
    sheet.draw_arrows(ends, weights, scale)
    sheet.mark_query(0)
    sheet.footer(scale, _remark(attention, ends))
    return sheet.save(path)


def write_attention_video(clip, attention, path, fps=4, count=None, frame_height=256, colormap=None):
    """Writes what a position attends to as a video: the clip, and beside it the weights laid over, or arrows.

    The position is a white square in the query's frame, and a grey one in the others. Each frame has the arrows that
    end in it.

    Args:
        clip: Array of pixels in 0..255, of shape `(frames, height, width, 3)`.
        attention: What `attend` returned for the clip.
        path: File to write, `.mp4` (H.264) or `.gif`.
        fps: Frames of the clip per second.
        count: Number of arrows, as for `draw_arrows`. `None`: the weights of all keys laid over.
        frame_height: Height in pixels at which a frame is drawn.
        colormap: As for `draw_attention`.

    Returns:
        The pictures of the video, uint8 array of shape `(frames, height, width, 3)` with even sizes.

    Raises:
        ValueError: if `clip` is not the one of `attention`, `path` has another extension, or an argument is out of
            range.
        ImportError: if `colormap` is given and Matplotlib is not installed.
    """
    clip, scale = _check_clip(clip, attention, frame_height), _Scale(attention.weights, colormap)
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"`path` must end with one of {', '.join(WRITERS)}. Received: path={os.fspath(path)!r}")
    if not 0 < fps <= 100:
        raise ValueError(f"`fps` must be a number above 0 and of at most 100. Received: fps={fps!r}")
    centres, weights, times = _strongest(attention, count) if count is not None else ((), (), ())
    remark = None if count is None else _remark(attention, weights)
    heat, pictures = attention.pixels(), []
    for frame in range(len(clip)):
        sheet = _Sheet(clip, attention, [frame, frame], frame_height, rows=1)
        picture = sheet.frame(frame)
        sheet.put(picture, 0, 0)
        sheet.put(picture if count is not None else _overlaid(picture, heat[frame], scale), 1, 0)
        here = [number for number, time in enumerate(times) if time == frame]
        sheet.draw_arrows([sheet.point(1, *centres[n][1:]) for n in here], [weights[n] for n in here], scale, column=1)
        for column in range(2):
            sheet.mark_query(0, column, is_query=frame == attention.position[0])
        sheet.footer(scale, remark)
        pictures.append(np.asarray(sheet.picture))
    pictures = np.stack(pictures)
    height, width = pictures.shape[1:3]
    even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))  # yuv420p has half the sizes for colours
    pictures = np.pad(pictures, even, mode="edge")
    with whole_file(path) as scratch:
        WRITERS[suffix](scratch, pictures, fps, scale)
    return pictures


class _Scale:
    """From weights to colours, the same for all frames."""

    def __init__(self, weights, colormap):
        self.largest = float(np.abs(weights).max())
        self.is_signed = bool((weights < 0).any())
        self._table = _colour_table(DIVERGING if self.is_signed else SEQUENTIAL, colormap)

    def strength(self, weights):
        """|weight| in 0..1."""
        return np.abs(weights) / (self.largest or 1.0)

    def colours(self, weights):
        """RGB in 0..255, float."""
        value = np.asarray(weights) / (self.largest or 1.0)
        value = (value + 1) / 2 if self.is_signed else value
        return self._table[np.rint(value * 255).astype(int)]

    def labels(self):
        """What stands below the bar, from left to right."""
        return ([f"-{self.largest:.3g}"] if self.is_signed else []) + ["0", f"{self.largest:.3g}"]

    def bar(self, size):
        """The colours of all weights, from left to right."""
        weights = np.linspace(-self.largest if self.is_signed else 0, self.largest, size[0])
        return Image.fromarray(np.rint(self.colours(weights)).astype("uint8")[None]).resize(size)


def _colour_table(stops, colormap):
    """256 colours in 0..255."""
    if colormap is not None:
        try:
            from matplotlib import colormaps
        except ImportError:
            raise ImportError(
                "Colour maps other than the built-in ones need Matplotlib: pip install 'keras-nonlocal[viz]'"
            ) from None
        if colormap not in colormaps:
            raise ValueError(f"`colormap` must be one of Matplotlib's. Received: colormap={colormap!r}")
        return 255.0 * colormaps[colormap](np.linspace(0, 1, 256))[:, :3]
    places = np.linspace(0, 255, len(stops))
    return np.stack([np.interp(np.arange(256), places, channel) for channel in zip(*stops, strict=True)], axis=-1)


def _overlaid(picture, heat, scale):
    """Weights of a frame laid over it, which stays visible in grey: the stronger the weight, the less."""
    rows, columns = (
        np.arange(size) * pixels // size for size, pixels in zip(picture.size[::-1], heat.shape, strict=True)
    )
    heat = heat[np.ix_(rows, columns)]  # as blocks: a key has one weight
    grey = np.asarray(picture.convert("L"), "float32")[..., None] * 0.6
    # Half the colour at a tenth of the largest weight: a softmax over thousands of keys is mostly weak.
    alpha = 0.9 * np.sqrt(scale.strength(heat))[..., None]
    return Image.fromarray(np.rint(grey * (1 - alpha) + scale.colours(heat) * alpha).astype("uint8"))


class _Sheet:
    """Drawn frames of a clip in rows, with titles above and a footer below."""

    def __init__(self, clip, attention, frames, frame_height, rows):
        self.clip, self.attention, self.frames = clip, attention, frames
        self.zoom = frame_height / clip.shape[1]
        self.size = max(round(clip.shape[2] * self.zoom), 1), frame_height
        self.font = ImageFont.load_default(12)
        width = max(len(frames) * (self.size[0] + GAP) - GAP, BAR[0] + 2 * GAP)
        self.picture = Image.new("RGB", (width, TITLE + rows * (frame_height + GAP) + FOOTER), "white")
        self._draw = ImageDraw.Draw(self.picture)
        for column, frame in enumerate(frames):
            remark = " (query)" if frame == attention.position[0] else ""
            titles = [f"frame {frame}{remark}", f"{frame}{remark}", str(frame)]
            fitting = [title for title in titles if self.font.getlength(title) <= self.size[0]]
            self._text(column * (self.size[0] + GAP) + 2, 3, (fitting or titles[-1:])[0])

    def frame(self, number):
        """A frame at the size at which it is drawn."""
        return Image.fromarray(self.clip[number]).resize(self.size, Image.Resampling.BICUBIC)

    def put(self, picture, column, row):
        self.picture.paste(picture, self._corner(column, row))

    def point(self, column, y, x, row=0):
        """Where the middle of a pixel of the clip lies in the sheet, `(x, y)`."""
        left, top = self._corner(column, row)
        return left + (x + 0.5) * self.zoom, top + (y + 0.5) * self.zoom

    def mark_query(self, row, column=0, is_query=True):
        x, y = map(round, self.point(column, *self.attention.position[1:], row))
        half = max(self.size[1] // 24, 3)
        for grow, colour in (
            (1, "black"),
            (0, "white" if is_query else "grey"),
            (-1, "white" if is_query else "black"),
        ):
            self._draw.rectangle((x - half - grow, y - half - grow, x + half + grow, y + half + grow), outline=colour)

    def draw_arrows(self, ends, weights, scale, column=0):
        """From the query's place in a picture to points; the strongest on top."""
        fine = 3  # Pillow's lines have steps: drawn larger and shrunk, they have none
        start = np.array(self.point(column, *self.attention.position[1:]))
        # Bent to where the query has more room, the longer the more: many end in the same row.
        upwards = self.attention.position[1] >= self.clip.shape[1] / 2
        edge = TITLE if upwards else TITLE + self.size[1]
        layer = Image.new("RGBA", (self.picture.width * fine, self.picture.height * fine))
        draw = ImageDraw.Draw(layer)
        for end, weight in list(zip(ends, weights, strict=True))[::-1]:
            colour = tuple(np.rint(scale.colours(weight)).astype(int).tolist())
            end = np.array(end)
            one, other = (max(y - edge if upwards else edge - y, 0.0) for y in (start[1], end[1]))
            room = ((one + other) / 2 + math.sqrt(one * other)) / 2  # with this bend the curve touches the edge
            bend = min(0.2 * np.hypot(*(end - start)), 0.8 * room) * (-1 if upwards else 1)
            width = fine * (0.8 + 1.2 * float(scale.strength(weight)))
            _draw_arrow(draw, start * fine, end * fine, bend * fine, width, colour, edge=fine)
        layer = layer.resize(self.picture.size, Image.Resampling.BOX)
        self.picture.paste(layer, mask=layer)

    def footer(self, scale, remark=None):
        """The bar of colours with its ends, and what was asked."""
        top = self.picture.height - FOOTER + 4
        self.picture.paste(scale.bar(BAR), (GAP, top))
        self._draw.rectangle((GAP - 1, top - 1, GAP + BAR[0], top + BAR[1]), outline=TEXT)
        labels = scale.labels()
        for place, label in zip(np.linspace(0, 1, len(labels)), labels, strict=True):
            self._text(GAP + place * (BAR[0] - self.font.getlength(label)), top + BAR[1] + 3, label)
        t, y, x = self.attention.position
        lines = [f"{self.attention.layer_name}, weight of each key", f"asked: frame {t}, row {y}, column {x}"]
        lines[1] += f"; {remark}" if remark else ""
        left = 3 * GAP + BAR[0]
        if left + max(map(self.font.getlength, lines)) <= self.picture.width:
            for number, line in enumerate(lines):
                self._text(left, top - 2 + 16 * number, line)

    def save(self, path):
        if path is not None:
            with whole_file(path) as scratch:
                self.picture.save(scratch, format="PNG")
        return self.picture

    def _corner(self, column, row):
        return column * (self.size[0] + GAP), TITLE + row * (self.size[1] + GAP)

    def _text(self, x, y, text):
        self._draw.text((round(x), y), text, TEXT, self.font)


def _draw_arrow(draw, start, end, bend, width, colour, edge):
    """A bent arrow, or a ring where it would have no length; its edge is dark, or bright where the arrow is dark."""
    outline = (0, 0, 0, 160) if np.dot(colour, (0.3, 0.6, 0.1)) > 60 else (255, 255, 255, 160)
    head = 2.5 * width + 3.5 * edge
    if np.hypot(*(end - start)) < 2 * head:
        for extra, fill in ((edge, outline), (0, colour)):
            box = (*(end - head / 2 - extra), *(end + head / 2 + extra))
            draw.ellipse(box, outline=fill, width=round(width + 2 * extra))
        return
    middle = (start + end) / 2 + (0, 2 * bend)  # of which the curve goes half-way
    along = (end - middle) / np.hypot(*(end - middle))
    across = np.array([-along[1], along[0]])
    neck = end - along * head
    t = np.linspace(0, 1, 60)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * (neck + along)
    for extra, fill in ((edge, outline), (0, colour)):
        draw.line([tuple(point) for point in curve], fill=fill, width=round(width + 2 * extra), joint="curve")
        tip, back, half = end + 2 * along * extra, neck - along * extra, 0.45 * head + 1.5 * extra
        draw.polygon([tuple(tip), tuple(back + across * half), tuple(back - across * half)], fill=fill)


def _strongest(attention, count):
    """The strongest keys: their centres, weights, and nearest frames."""
    centres, weights = attention.strongest(count)
    times = [math.ceil(t - 0.5) for t in centres[:, 0]]  # of two frames at the same distance the earlier
    return centres, weights, [min(max(time, 0), attention.clip_shape[0] - 1) for time in times]


def _remark(attention, arrows):
    return f"{len(arrows)} strongest of {attention.weights.size}"


def _spread(num_frames, query_frame, max_frames):
    """The query's frame, then others evenly over the clip, its first and last one included."""
    others = [frame for frame in range(num_frames) if frame != query_frame]
    count = min(max_frames - 1, len(others))
    picked = np.linspace(0, len(others) - 1, count).round().astype(int) if count > 0 else []
    return [query_frame] + [others[i] for i in picked]


def _holding(times, weights, num_frames, query_frame, max_frames):
    """The query's frame, then in order those of the largest sums of |weight|, and others if there is room."""
    sums = np.bincount(times, np.abs(weights), num_frames)
    sums[query_frame] = 0
    picked = [frame for frame in np.argsort(-sums, kind="stable")[: max_frames - 1].tolist() if sums[frame] > 0]
    others = [frame for frame in range(num_frames) if frame not in (query_frame, *picked)]
    room = min(max_frames - 1 - len(picked), len(others))
    if room > 0:
        picked += [others[i] for i in np.linspace(0, len(others) - 1, room).round().astype(int)]
    return [query_frame, *sorted(picked)]


def _check_clip(clip, attention, frame_height):
    clip = np.asarray(clip)
    if clip.ndim != 4 or clip.shape[:3] != tuple(attention.clip_shape) or clip.shape[3] != 3:
        raise ValueError(
            f"`clip` must be the one of `attention`, of shape {(*attention.clip_shape, 3)}. "
            f"Received: clip.shape={clip.shape}"
        )
    _check_count("frame_height", frame_height)
    return clip.astype("uint8")


def _check_count(name, value):
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value!r}")
    return value


def _write_mp4(path, pictures, fps, scale):
    with av.open(path, "w") as container:
        rate = fractions.Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path, pictures, fps, scale):
    def in_256_colours(picture):
        # A quarter of them is the scale's, of which else only a few would be left: little of a picture has them.
        picture, palette = Image.fromarray(picture), Image.new("P", (1, 1))
        some = picture.resize([max(size // 3, 1) for size in picture.size], Image.Resampling.NEAREST)  # is faster
        palette.putpalette([*some.quantize(192).getpalette()[: 3 * 192], *scale.bar((64, 1)).tobytes()])
        return picture.quantize(palette=palette, dither=Image.Dither.NONE)

    first, *others = map(in_256_colours, pictures)
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, disposal=1)


WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}
