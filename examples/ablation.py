"""The paper's Table 2 in small: which non-local blocks help, where, and with what.

    pip install ".[test]"
    python examples/ablation.py            # an hour on 2 busy cores; stopped and called again, it goes on where it was
    python examples/ablation.py --quick    # three of the networks, hardly any training: its figures mean nothing

Tables a to g are those of the paper: pairwise functions, stage, number of blocks, space/time/spacetime, against 3-D
convolution, with 3-D convolution, longer clips. The clips are made of the real handwritten digits that ship in
scikit-learn; the digits to test with are other people's. A white digit moves to the left or to the right and vanishes;
after a gap, two digits of different classes and colours appear. Every network is asked three questions of every clip:

- recall: which colour has the digit of the white one's class? What decides lies on both sides of the gap, which is
  longer than the reach of all temporal convolutions together. A guess between the two colours is right in 50 %.
- motion: did the white digit move to the left or to the right? What decides lies in adjacent frames, and in their
  order, to which a non-local block is blind: backwards, the frames are the same frames.
- digit: which class has the digit that is shown most? Every frame tells by itself.

The way is that of `examples/quickstart.py`: an image network learns the digit and the colour of single digits; of a
video network on its weights, which are frozen, only what is new trains: the heads, the non-local blocks, and the
temporal convolutions, inflated at their centre. Each seed has its own image network, clips, and new weights.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import stats  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from keras_nonlocal import applications  # noqa: E402
from keras_nonlocal.evaluation import wilson_interval  # noqa: E402

COLOURS = ((255, 60, 60), (60, 220, 60), (90, 110, 255))
WHITE = (255, 255, 255)
NUM_TEST_DIGITS = 360  # the last ones; the data set is ordered by writer, so these are other people's hands
SIDE, GLYPH, STEP = 32, 14, 4  # pixels: of a frame, of a digit, and by how much the white one moves from frame to frame

# Frames that show the white digit, nothing, and the two coloured ones. All temporal convolutions of the small I3D
# together reach over 9 frames, see `reach`; the last frame of the cue and the first of the question span 10.
CUE, GAP, LONG_GAP, QUESTION = 3, 8, 16, 2
FRAMES, LONG = CUE + GAP + QUESTION, CUE + LONG_GAP + QUESTION

QUESTIONS = {"recall": len(COLOURS), "motion": 2, "digit": 10}  # classes of each
CHANCE = {"recall": 1 / 2, "motion": 1 / 2, "digit": 1 / 10}

# The other questions are learned in a fraction of the steps. With the same weight for all, two blocks came to 68 % of
# recall in as many steps as to 88 % alone.
LOSS_WEIGHTS = {"recall": 1.0, "motion": 0.1, "digit": 0.1}

# On black frames a drawn digit is an outlier to batch norm: its features have norms of 80, and only scores so scaled
# start inside of the softmax's range.
BLOCK = {"pool_size": (1, 2, 2), "inner_channels": 32, "kernel_initializer": "he_normal", "scale": 0.01}


# --- The rows and the tables ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One network.

    Args:
        non_local: Residual blocks after which non-local blocks stand, as the builders take them.
        options: Arguments of the blocks, over `BLOCK`.
        inflation: Kernels of the temporal convolutions, `None` for a C2D.
        hidden: Whether the heads stand on two hidden layers.
        frames: Frames of a clip.
        against: Name of the row that it is compared with.
    """

    non_local: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    inflation: str | None = None
    hidden: bool = False
    frames: int = FRAMES
    against: str | None = "C2D"


ONE, TWO, THREE = {3: (0,)}, {3: (0, 1)}, {2: (0,), 3: (0, 1)}
ROWS = {
    "C2D": Row(against=None),
    "C2D, hidden layers": Row(hidden=True),
    "Gaussian": Row(ONE, {"pairwise": "gaussian"}),
    "embedded Gaussian": Row(ONE),
    "Euclidean Gaussian": Row(ONE, {"pairwise": "euclidean_gaussian"}),
    "dot product": Row(ONE, {"pairwise": "dot_product"}),
    "concatenation": Row(ONE, {"pairwise": "concatenation"}),
    "res3, last": Row({3: (1,)}),
    "res2": Row({2: (0,)}),
    "2 blocks": Row(TWO),
    "3 blocks": Row(THREE),
    "space": Row(TWO, {"window": (1, None, None)}),
    "time": Row(TWO, {"window": (None, 1, 1), "pool_size": None}),
    "I3D 3×1×1": Row(inflation="3x1x1"),
    "I3D 3×3×3": Row(inflation="3x3x3"),
    "NL I3D": Row(TWO, inflation="3x1x1", against="I3D 3×1×1"),
    "C2D, long": Row(frames=LONG, against=None),
    "I3D, long": Row(inflation="3x1x1", frames=LONG, against="C2D, long"),
    "NL I3D, long": Row(TWO, inflation="3x1x1", frames=LONG, against="I3D, long"),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much data, for how long, and of which networks."""

    images: int
    image_epochs: int
    train_clips: int
    test_clips: int
    epochs: int
    seeds: int
    batch_size: int
    rows: tuple


FULL = Size(
    images=12000,
    image_epochs=4,
    train_clips=3000,
    test_clips=800,
    epochs=4,
    seeds=3,
    batch_size=16,
    rows=tuple(ROWS),
)
QUICK = Size(
    images=8,
    image_epochs=1,
    train_clips=4,
    test_clips=6,
    epochs=1,
    seeds=2,
    batch_size=4,
    rows=("C2D", "time", "I3D 3×1×1"),
)

# The tables: title, the row that counts as 1× of parameters and multiply-adds, rows `(row, label, what the paper has)`
# and a remark. The paper's figures are top-1 % on the validation set of Kinetics-400, with ResNet-50 but where it says
# ResNet-101.
TABLES = (
    (
        "a. Pairwise functions",
        "C2D",
        (
            ("C2D", "C2D", "71.8"),
            ("C2D, hidden layers", "C2D, two hidden layers in the head", ""),
            ("Gaussian", "Gaussian", "72.5"),
            ("embedded Gaussian", "embedded Gaussian", "72.7"),
            ("dot product", "dot product", "72.9"),
            ("concatenation", "concatenation", "72.8"),
            ("Euclidean Gaussian", "Euclidean Gaussian", ""),
        ),
        "One block, before the last residual block, as in the paper. The second row is ours: more weights, no block. "
        "The forms differ more here than in the paper. Gaussian and Euclidean Gaussian compare features as they are, "
        "colour and all, and these are frozen (scores a tenth as large, tried on one seed, were no better). "
        "Concatenation adds one number of the query to one of the key: its weight cannot peak where two of ten classes "
        "match.",
    ),
    (
        "b. Stage",
        "C2D",
        (
            ("C2D", "C2D", "71.8"),
            ("res2", "res2, 8×8 map", "72.7 (res2)"),
            ("embedded Gaussian", "res3, first block, 4×4 map", "72.9 (res3)"),
            ("res3, last", "res3, last block, 4×4 map", ""),
        ),
        "One block, embedded Gaussian. The small network has two stages; the paper's res4 has 72.7 and its res5 72.3.",
    ),
    (
        "c. Number of blocks",
        "C2D",
        (
            ("C2D", "C2D", "71.8"),
            ("embedded Gaussian", "1 block", "72.7"),
            ("2 blocks", "2 blocks: all of res3", "73.8 (5 blocks)"),
            ("3 blocks", "3 blocks: all of res3, and res2", "74.3 (10 blocks)"),
        ),
        "Embedded Gaussian.",
    ),
    (
        "d. Space, time, spacetime",
        "C2D",
        (
            ("C2D", "C2D", "71.8"),
            ("space", "space only", "72.9"),
            ("time", "time only", "73.1"),
            ("2 blocks", "spacetime", "73.8"),
        ),
        "Two blocks here, five in the paper. Space only cannot cross the gap; time only can where both digits of a "
        "class stand at one place of the 4×4 map. Keys are sub-sampled in space, where there is space.",
    ),
    (
        "e. Non-local blocks against 3-D convolution",
        "C2D",
        (
            ("C2D", "C2D", "73.1 (1×, 1×)"),
            ("I3D 3×3×3", "I3D 3×3×3", "74.1 (1.5×, 1.8×)"),
            ("I3D 3×1×1", "I3D 3×1×1", "74.4 (1.2×, 1.5×)"),
            ("2 blocks", "NL C2D", "75.1 (1.2×, 1.2×)"),
        ),
        "Two blocks here; the paper's column is ResNet-101 with five, in brackets its parameters and FLOPs.",
    ),
    (
        "f. 3-D convolution and non-local blocks",
        "C2D",
        (
            ("C2D", "C2D", "71.8"),
            ("2 blocks", "NL C2D", "73.8"),
            ("I3D 3×1×1", "I3D", "73.3"),
            ("NL I3D", "NL I3D", "74.9"),
        ),
        "Two blocks here, five in the paper.",
    ),
    (
        "g. Longer clips",
        "C2D, long",
        (
            ("C2D, long", "C2D", "73.8"),
            ("I3D, long", "I3D", "74.9"),
            ("NL I3D, long", "NL I3D", "76.5"),
        ),
        f"{LONG} frames with a gap of {LONG_GAP} in place of {FRAMES} with one of {GAP}: the same is shown, farther "
        "apart. The paper has 128 frames in place of 32, and more of the video in them.",
    ),
)


# --- The clips --------------------------------------------------------------------------------------------------------


@functools.cache
def load_glyphs():
    """Real handwritten digits as `(digits, 14, 14)` in 0..1, their classes, and the indices to train and test with."""
    digits = load_digits()
    glyphs = [
        Image.fromarray((image * (255 / 16)).astype("uint8")).resize((GLYPH, GLYPH), Image.Resampling.BICUBIC)
        for image in digits.images
    ]
    indices = np.arange(len(glyphs))
    return (
        np.stack([np.asarray(glyph) for glyph in glyphs]) / 255.0,
        digits.target,
        indices[:-NUM_TEST_DIGITS],
        indices[-NUM_TEST_DIGITS:],
    )


def draw(frame, glyph, x, y, colour):
    frame[y : y + GLYPH, x : x + GLYPH] = glyph[..., None] * colour


def render_clip(rng, glyphs, classes, pool, gap):
    """One clip `(frames, 32, 32, 3)` of uint8, and the answers to the three questions."""
    kinds = rng.permutation(10)[:2]
    colours = rng.permutation(len(COLOURS))[:2]
    cue, match = rng.choice(pool[classes[pool] == kinds[0]], size=2, replace=False)  # two pictures of one class
    other = rng.choice(pool[classes[pool] == kinds[1]])
    clip = np.zeros((CUE + gap + QUESTION, SIDE, SIDE, 3), "uint8")
    # To the left is to the right backwards: the same frames in another order.
    rightwards = int(rng.integers(2))
    x, y = rng.integers(SIDE - GLYPH - (CUE - 1) * STEP + 1), rng.integers(SIDE - GLYPH + 1)
    for frame, offset in zip(clip, range(CUE) if rightwards else range(CUE)[::-1], strict=False):
        draw(frame, glyphs[cue], x + offset * STEP, y, WHITE)
    half = SIDE // 2
    cells = rng.permutation(4)[:2]
    for glyph, cell, colour in zip((match, other), cells, colours, strict=True):
        x, y = (cell % 2) * half + rng.integers(half - GLYPH + 1), (cell // 2) * half + rng.integers(half - GLYPH + 1)
        draw(clip[-1], glyphs[glyph], x, y, COLOURS[colour])
    clip[-QUESTION:] = clip[-1]
    return clip, {"recall": int(colours[0]), "motion": rightwards, "digit": int(kinds[0])}


def render_clips(seed, count, pool, gap):
    """`count` clips and their answers by question."""
    rng = np.random.default_rng(seed)
    glyphs, classes, *pools = load_glyphs()
    rendered = [render_clip(rng, glyphs, classes, pools[pool == "test"], gap) for _ in range(count)]
    answers = {name: np.array([answer[name] for _, answer in rendered], "int32") for name in QUESTIONS}
    return np.stack([clip for clip, _ in rendered]), answers


def render_images(seed, count):
    """Clips of one frame with one digit, in a colour or in white, `(count, 1, 32, 32, 3)`, and their two labels."""
    rng = np.random.default_rng(seed)
    glyphs, classes, pool, _ = load_glyphs()
    chosen, colours = rng.choice(pool, count), rng.integers(len(COLOURS) + 1, size=count)
    frames = np.zeros((count, 1, SIDE, SIDE, 3), "uint8")
    for frame, glyph, colour in zip(frames, chosen, colours, strict=True):
        x, y = rng.integers(SIDE - GLYPH + 1, size=2)
        draw(frame[0], glyphs[glyph], x, y, (*COLOURS, WHITE)[colour])
    return frames, {"image_digit": classes[chosen].astype("int32"), "image_colour": colours.astype("int32")}


# --- The networks -----------------------------------------------------------------------------------------------------


def build_features(row, frames):
    """The small network of a row up to its pooled features. No temporal strides: every map has all frames."""
    builder = applications.I3DResNet11 if row.inflation else applications.C2DResNet11
    return builder(
        input_shape=(frames, SIDE, SIDE, 3),
        temporal_strides=(1, 1, 1),
        pool1_padding="same",
        include_top=False,
        pooling="avg",
        non_local=row.non_local,
        non_local_options=BLOCK | row.options,
        inflation=row.inflation or "3x1x1",
    )


def give_heads(model, heads, hidden=False):
    x = model.outputs[0]
    for number in (1, 2) if hidden else ():
        x = keras.layers.Dense(128, activation="relu", name=f"hidden{number}")(x)
    outputs = {name: keras.layers.Dense(units, activation="softmax", name=name)(x) for name, units in heads.items()}
    return keras.Model(model.inputs[0], outputs)


def build_row(row, image_model):
    """A row's network with the image network's weights, of which only what is new trains.

    I3D kernels are inflated at their centre, which keeps the features of a frame; the temporal convolutions of the
    residual blocks train, that of conv1, which would be the most expensive part of all, stays as it is.
    """
    model = give_heads(build_features(row, row.frames), QUESTIONS, row.hidden)
    new = applications.inflate_weights(image_model, model, method="center")
    for layer in model.layers:
        layer.trainable = layer.name in new or is_inflated(layer)
    return model


def is_inflated(layer):
    """Whether it is a temporal convolution that trains."""
    return layer.name.startswith("res") and getattr(layer, "kernel_size", (1,))[0] > 1


# Layers up to which all is frozen, and the same for every row: the image network's, for each frame.
FROZEN = ("pool5", "res3_1_out", "res3_0_out", "res2_0_out", "pool1")


def last_frozen(row):
    """The layer behind which the first one of a row stands that trains."""
    if row.inflation:
        return "pool1"
    places = [f"res{stage}_{block}_out" for stage, blocks in row.non_local.items() for block in blocks]
    return min(places, default="pool5")


def reach(model):
    """How many frames of a clip one position of the last map sees through convolutions and pooling, by geometry.

    Along the layers in their order: side by side stand only the shortcuts, which have one step of time.
    """
    frames, stride = 1, 1
    for layer in model.layers:
        size = getattr(layer, "kernel_size", getattr(layer, "pool_size", None))
        if size is not None and not hasattr(layer, "pairwise"):
            frames += (size[0] - 1) * stride
            stride *= layer.strides[0]
    return frames


def fit(model, x, y, epochs, learning_rate, batch_size, loss_weights=None):
    steps = epochs * -(-len(x) // batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
        {name: "sparse_categorical_crossentropy" for name in y},
        loss_weights=loss_weights,
        run_eagerly=steps == 1,  # of the quick run: making a graph takes longer than the step
    )
    model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0)


def predict(model, x, batch_size=64):
    batches = [model(x[i : i + batch_size], training=False) for i in range(0, len(x), batch_size)]
    if isinstance(batches[0], dict):
        return {name: np.concatenate([np.asarray(batch[name]) for batch in batches]) for name in batches[0]}
    return np.concatenate([np.asarray(batch) for batch in batches])


def pretrain(size, seed):
    """An image network, which is a C2D network on clips of one frame.

    It learns the digit and the colour as separate labels: were it one label, "a red 7", the pooled features would say
    which of a clip's digits has which colour, and recall would need no relation between positions.
    """
    model = give_heads(build_features(Row(), frames=1), {"image_digit": 10, "image_colour": len(COLOURS) + 1})
    images, labels = render_images((seed, 0), size.images)
    fit(model, applications.preprocess_input(images), labels, size.image_epochs, 4e-3, 64)
    return model


class Features:
    """What the frozen layers of one seed give: computed once for all rows that start at the same layer.

    One layer's at a time: rows are run in the order of their layers.
    """

    def __init__(self, image_model, size, seed):
        self.image_model, self.size, self.seed = image_model, size, seed
        self.networks, self.key, self.value = {}, None, None

    def get(self, frames, layer):
        """`(features, answers)` of the clips to train with, and of those to test with, which all seeds share."""
        if self.key != (frames, layer):
            self.value = None
            if frames not in self.networks:
                self.networks[frames] = build_features(Row(), frames)
                applications.inflate_weights(self.image_model, self.networks[frames])
            network = self.networks[frames]
            network = keras.Model(network.inputs[0], network.get_layer(layer).output)
            self.value = []
            for seed, count, pool in (
                ((self.seed, 1), self.size.train_clips, "train"),
                ((0, 2), self.size.test_clips, "test"),
            ):
                clips, answers = render_clips(seed, count, pool, frames - CUE - QUESTION)
                features = np.empty((count, *network.output_shape[1:]), "float32")
                for i in range(0, count, 64):
                    features[i : i + 64] = predict(network, applications.preprocess_input(clips[i : i + 64]))
                self.value.append((features, answers))
            self.key = frames, layer
        return self.value


# --- The runs ---------------------------------------------------------------------------------------------------------


class Runs:
    """The finished runs in a file, which is replaced as a whole: at any moment it is complete."""

    def __init__(self, path, settings):
        self.path, self.settings, self.runs = path, settings, {}
        if path.exists():
            content = json.loads(path.read_text())
            if content["settings"] != settings:
                sys.exit(
                    f"{path} has runs of other settings: give another folder by --out, or remove it.\n"
                    f"  there: {content['settings']}\n  here:  {settings}"
                )
            self.runs = content["runs"]

    def has(self, row, seed):
        return f"{row} | {seed}" in self.runs

    def get(self, row, seed):
        return self.runs[f"{row} | {seed}"]

    def add(self, row, seed, run):
        self.runs[f"{row} | {seed}"] = run
        write_text(self.path, json.dumps({"settings": self.settings, "runs": self.runs}, indent=1) + "\n")


def write_text(path, text):
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    os.replace(scratch, path)


def settings_of(size):
    """What runs must have in common to stand in one table."""
    packages = {name: importlib.metadata.version(name) for name in ("keras", keras.backend.backend(), "scikit-learn")}
    return dataclasses.asdict(size) | {
        "frames": [CUE, GAP, LONG_GAP, QUESTION],
        "block": BLOCK | {"pool_size": list(BLOCK["pool_size"])},  # as it comes back from JSON
        "loss_weights": LOSS_WEIGHTS,
        "rows": {name: repr(ROWS[name]) for name in size.rows},
        "versions": packages | {"python": platform.python_version()},
    }


def run_row(row, seed, image_model, features, size):
    """Trains one row, and says which test clips it tells: a digit 0 or 1 for each."""
    keras.utils.set_random_seed(seed)
    started, processor = time.perf_counter(), time.process_time()
    model = build_row(row, image_model)
    layer = last_frozen(row)
    (x, y), (x_test, y_test) = features.get(row.frames, layer)
    rest = keras.Model(model.get_layer(layer).output, model.output)  # the same layers: training it trains `model`
    fit(rest, x, y, size.epochs, 3e-3, size.batch_size, LOSS_WEIGHTS)
    scores = predict(rest, x_test)
    right = {name: scores[name].argmax(axis=-1) == y_test[name] for name in QUESTIONS}
    costs = applications.summarize(model)
    return {
        "right": {name: "".join(map(str, values.astype(int))) for name, values in right.items()},
        "parameters": costs.parameters,
        "macs": costs.macs,
        "trained": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "date": datetime.date.today().isoformat(),
    }


def run_seed(seed, size, runs):
    wanted = [name for name in size.rows if not runs.has(name, seed)]
    if not wanted:
        return
    keras.utils.set_random_seed(seed)
    image_model = pretrain(size, seed)
    features = Features(image_model, size, seed)
    for name in sorted(wanted, key=lambda name: (ROWS[name].frames, FROZEN.index(last_frozen(ROWS[name])))):
        run = run_row(ROWS[name], seed, image_model, features, size)
        runs.add(name, seed, run)
        told = ", ".join(f"{question} {right.count('1') / len(right):.1%}" for question, right in run["right"].items())
        print(f"  seed {seed}, {name}: {told}; {run['seconds']:.0f} s", flush=True)
        keras.utils.clear_session()


# --- What came out ----------------------------------------------------------------------------------------------------


def interval(values):
    """Mean and 95 % interval of `(seeds, clips)` values, where seeds and clips are both drawn at random.

    Every seed is asked the same clips, so values of one seed are related, and so are those of one clip. Half of the
    interval's width is the root of two squares: of half the t interval of the seeds' means, and of that of the clips'
    means. With three seeds that differ much, it is wide. The chance inside of each counts in both, so where seeds
    hardly differ it is rather too wide.
    """
    values = np.asarray(values, "float64")
    mean, square = values.mean(), 0.0
    for axis, count in enumerate(values.shape):
        means = values.mean(axis=1 - axis)
        square += stats.t.ppf(0.975, count - 1) ** 2 * means.var(ddof=1) / count
    return float(mean), float(mean - square**0.5), float(mean + square**0.5)


def accuracy_interval(right):
    """As `interval`, but inside of 0 to 1 and never narrower than Wilson's over the clips alone."""
    mean, low, high = interval(right)
    wilson = wilson_interval(mean * right.shape[1], right.shape[1])
    return mean, max(min(low, wilson[0]), 0.0), min(max(high, wilson[1]), 1.0)


def collect(runs, size):
    """All figures by row: costs, accuracy by question, and the difference to the row it is compared with."""
    seeds = range(size.seeds)
    right = {
        name: {
            question: np.array([[int(digit) for digit in runs.get(name, seed)["right"][question]] for seed in seeds])
            for question in QUESTIONS
        }
        for name in size.rows
    }
    rows = {}
    for name in size.rows:
        row, run = ROWS[name], runs.get(name, seeds[0])
        rows[name] = {key: run[key] for key in ("parameters", "trained", "macs")} | {"frames": row.frames}
        seconds = [runs.get(name, seed)["processor_seconds"] for seed in seeds]
        rows[name]["processor_seconds"] = round(float(np.mean(seconds)), 1)
        rows[name]["by_seed"] = {key: values.mean(axis=1).tolist() for key, values in right[name].items()}
        rows[name]["accuracy"] = {key: accuracy_interval(values) for key, values in right[name].items()}
        rows[name]["against"] = row.against
        if row.against:
            other = right[row.against]
            rows[name]["difference"] = {key: interval(right[name][key] - other[key]) for key in QUESTIONS}
    return rows


def format_accuracy(values):
    mean, low, high = (100 * value for value in values)
    return f"{mean:.1f} ({low:.1f} – {high:.1f})"


def format_difference(values):
    mean, low, high = (100 * value for value in values)
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def table(title, base, entries, remark, rows):
    questions = " | ".join(f"{name}, %" for name in QUESTIONS)
    lines = [
        f"## {title}\n\n{remark}\n",
        f"| network | parameters | multiply-adds | {questions} | *the paper: Kinetics, %* |",
        f"|---|---:|---:|{'---:|' * len(QUESTIONS)}---:|",
    ]
    for name, label, published in entries:
        if name not in rows:  # of the quick run
            continue
        row = rows[name]
        costs = " | ".join(f"{row[key] / rows[base][key]:.2f}×" for key in ("parameters", "macs"))
        figures = " | ".join(format_accuracy(row["accuracy"][question]) for question in QUESTIONS)
        lines.append(f"| {label} | {costs} | {figures} | {published and f'*{published}*'} |")
    return "\n".join(lines)


def table_of_differences(rows):
    lines = [
        "| network | against | " + " | ".join(f"{name}, points" for name in QUESTIONS) + " |",
        "|---|---|" + "---:|" * len(QUESTIONS),
    ]
    for name, row in rows.items():
        if row["against"]:
            figures = " | ".join(format_difference(row["difference"][question]) for question in QUESTIONS)
            lines.append(f"| {name} | {row['against']} | {figures} |")
    return "\n".join(lines)


def verdicts(rows):
    """For each question the rows that are better or worse than what they are compared with, and those that guess."""
    lines = []
    for question, chance in CHANCE.items():
        kinds = {"better": [], "worse": [], "no difference shown": [], "not shown to be better than a guess": []}
        for name, row in rows.items():
            if row["against"]:
                _, low, high = row["difference"][question]
                kinds["better" if low > 0 else "worse" if high < 0 else "no difference shown"].append(name)
            if row["accuracy"][question][1] <= chance:
                kinds["not shown to be better than a guess"].append(name)
        lines.append(f"- **{question}**")
        lines += [f"  - {kind}: {'; '.join(names)}." for kind, names in kinds.items() if names]
    return "\n".join(lines)


def report(rows, size, quick, seconds, versions, dates):
    base, compared = rows["C2D"], sum(bool(row["against"]) for row in rows.values()) * len(QUESTIONS)
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    reached = ", ".join(f"{name} {frames}" for name, frames in reaches().items())
    parts = [
        "# The paper's Table 2 in small",
        "This is the quick run: hardly any training. Its figures mean nothing." if quick else "",
        f"`python examples/ablation.py`, {' to '.join(sorted({min(dates), max(dates)}))}, {packages}; "
        f"{seconds / 60:.0f} minutes of processor time without the image networks.",
        f"Clips of {FRAMES} frames of {SIDE}×{SIDE} pixels, made of real handwritten digits: {CUE} with a white digit "
        f"that moves, {GAP} black, {QUESTION} with two coloured digits. Three questions:",
        "- **recall**: the colour of the digit of the white one's class, across the gap. A guess between the two: "
        "50 %.\n"
        "- **motion**: whether the white digit moved to the left or to the right, in adjacent frames. Chance is 50 %.\n"
        "- **digit**: the class that is shown most, in every frame. Chance is 10 %.",
        f"Convolutions and pooling together reach over (frames): {reached}; the last frame of the cue and the first of "
        f"the question span {GAP + 2}.",
        "Small C2D and I3D ResNets with frozen weights of images, of which only what is new trains: "
        f"{size.train_clips} clips, {size.epochs} epoch(s). {size.seeds} seeds, each with its own image network, "
        f"training clips and new weights. {size.test_clips} test clips of other people's digits, the same for all. "
        "Adam, cosine from 0.003; the losses' weights, chosen for recall, are "
        f"{', '.join(f'{name} {weight:g}' for name, weight in LOSS_WEIGHTS.items())}; the blocks' options "
        f"{', '.join(f'`{name}={value!r}`' for name, value in BLOCK.items())}, as far as a row does not say otherwise.",
        "In brackets: 95 % intervals over seeds and test clips. Half the width is the root of two squares: of half the "
        "t interval of the seeds' means, and of that of the clips' means; it is never narrower than Wilson's.",
        f"Parameters and multiply-adds by `applications.summarize`; the C2D has {base['parameters']:,} and "
        f"{base['macs'] / 1e6:.1f} M. The paper's figures are of other networks on another task: the last column is to "
        "compare orders, not numbers.",
        *(table(*entry, rows) for entry in TABLES if entry[1] in rows),
        "## Differences",
        "On the same seeds and clips, 95 % intervals as above; bold where the interval excludes 0. Of "
        f"{compared} such intervals about {compared * 0.05:.0f} may err by chance.",
        table_of_differences(rows),
        "## What helps, and what does not",
        "By the intervals above, each network against the one that is named there. Better than that, but not than a "
        "guess, is no answer to the question.",
        verdicts(rows),
        "![accuracy by network](accuracy.png)",
        "![recall and what it costs](cost.png)",
    ]
    return "\n\n".join(part for part in parts if part)


def reaches():
    return {
        "C2D": reach(build_features(Row(), FRAMES)),
        "I3D 3×1×1": reach(build_features(Row(inflation="3x1x1"), FRAMES)),
        "I3D 3×3×3": reach(build_features(Row(inflation="3x3x3"), FRAMES)),
    }


def draw_plots(rows, out, quick):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    note = "Orange: with non-local blocks. Dotted: a guess. Bars: 95 % intervals."
    note += " Quick run: these figures mean nothing." if quick else ""
    figure, axes = pyplot.subplots(1, len(QUESTIONS), figsize=(12, 6), sharey=True, layout="constrained")
    names = list(rows)
    for axis, question in zip(axes, QUESTIONS, strict=True):
        for place, name in enumerate(names):
            mean, low, high = (100 * value for value in rows[name]["accuracy"][question])
            colour = "tab:orange" if ROWS[name].non_local else "tab:blue"
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        axis.axvline(100 * CHANCE[question], color="grey", linestyle=":")
        axis.set(title=question, xlabel="accuracy, %", xlim=(0, 102))
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.suptitle(note, fontsize=10)
    save(figure, out / "accuracy.png")

    figure, axis = pyplot.subplots(figsize=(12, 6), layout="constrained")
    chosen = sorted((row["macs"], name) for name, row in rows.items() if row["frames"] == FRAMES)
    heights = itertools.cycle(range(36, 14, -3))  # of the names of those that guess, which would cover each other
    for macs, name in chosen:
        mean, low, high = (100 * value for value in rows[name]["accuracy"]["recall"])
        cost = macs / rows["C2D"]["macs"]
        colour = "tab:orange" if ROWS[name].non_local else "tab:blue"
        axis.errorbar(cost, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        place = (cost + 0.02, mean + 1) if low > 100 * CHANCE["recall"] else (cost + 0.02, next(heights))
        line = {"arrowstyle": "-", "color": "lightgrey", "relpos": (0, 0.5)} if place[1] < mean else None
        axis.annotate(name, (cost, mean), xytext=place, fontsize=8, arrowprops=line)
    axis.margins(x=0.1)
    axis.set(xlabel="multiply-adds, C2D = 1", ylabel="recall, %", ylim=(12, 102))
    axis.set_title(note, fontsize=10)
    axis.axhline(50, color="grey", linestyle=":")
    save(figure, out / "cost.png")


def save(figure, path):
    from matplotlib import pyplot

    scratch = path.with_name("part-" + path.name)
    figure.savefig(scratch, dpi=100)
    os.replace(scratch, path)
    pyplot.close(figure)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="hardly any training: shows that it runs")
    parser.add_argument("--out", default="ablation-results", help="folder of the results (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    size = QUICK if arguments.quick else FULL
    out = pathlib.Path(arguments.out + ("-quick" if arguments.quick else "")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"The folder of the results cannot be made; give another by --out. {error}")
    settings = settings_of(size)
    runs = Runs(out / "runs.json", settings)
    print(f"{len(size.rows)} networks, {size.seeds} seeds, {len(runs.runs)} runs are there", flush=True)
    for seed in range(size.seeds):
        run_seed(seed, size, runs)

    rows = collect(runs, size)
    seconds = sum(run["processor_seconds"] for run in runs.runs.values())
    dates = [run["date"] for run in runs.runs.values()]
    summary = report(rows, size, arguments.quick, seconds, settings["versions"], dates)
    results = {"quick": arguments.quick, "rows": rows, "settings": settings}
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "results.md", summary + "\n")
    draw_plots(rows, out, arguments.quick)
    print(f"\n{summary}\n\nWritten to {out}: results.md, results.json, runs.json, accuracy.png, cost.png")


if __name__ == "__main__":
    main()
