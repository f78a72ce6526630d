"""The main job, from nothing to a served model: which colour had the digit that was shown before?

Cued recall: a white digit is shown and vanishes; after a gap, digits of different classes and colours appear. The class
of the clip is the colour of the digit that matches the cue. Every colour and every digit occurs in every role, so the
answer is not in what is there but in which things belong together, far apart in time.

The script makes its data set once (real MP4 files of the real handwritten digits that ship in scikit-learn; the test
digits are other people's), then walks the way of any video project: files, `tf.data`, `fit`, evaluation over several
views, a look at what the network attends to, export, and a check of the export in a process without Keras.

    python examples/quickstart.py            # the whole job, 10 to 15 minutes on 2 cores
    python examples/quickstart.py --quick    # the same steps on little data, under 2 minutes: it learns nothing
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits

from keras_nonlocal import applications, data, evaluation, export, visualization

COLOURS = {"blue": (90, 110, 255), "green": (60, 220, 60), "red": (255, 60, 60)}
WHITE = (255, 255, 255)
NUM_CHOICES = 2  # coloured digits in the question
NUM_TEST_DIGITS = 360  # the last ones; the data set is ordered by writer, so these are other people's hands

# A frame is a little wider than the network's crop, so that views differ; every crop holds every digit whole.
HEIGHT, WIDTH, CROP, GLYPH = 48, 56, 48, 16
# In frames of the video: the cue leaves after 6, the question comes at 28. A clip is every second frame of 32. The
# temporal convolutions of the small I3D reach over 12 frames of the clip, 23 of the video: no unit sees both.
VIDEO_FRAMES, CUE_END, QUESTION = 34, 6, 28
NUM_FRAMES, FRAME_STRIDE = 16, 2


@dataclasses.dataclass(frozen=True)
class Size:
    """How much data, and for how long."""

    images: int
    image_epochs: int
    train_clips: int
    test_clips: int
    clip_epochs: int


FULL = Size(images=20000, image_epochs=4, train_clips=6000, test_clips=600, clip_epochs=6)
QUICK = Size(images=400, image_epochs=1, train_clips=64, test_clips=16, clip_epochs=1)


# --- The data set -----------------------------------------------------------------------------------------------------


def load_glyphs():
    """Real handwritten digits as `(digits, 16, 16)` in 0..1, their classes, and the indices to train and test with."""
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


def draw(frame, glyph, place, colour):
    x, y = place
    patch = frame[y : y + GLYPH, x : x + GLYPH]
    np.maximum(patch, (glyph[..., None] * np.array(colour)).astype("uint8"), out=patch)


def places(rng, count):
    """Places of `count` digits that do not touch, inside of every crop."""
    cells = [(column, row) for column in range(2) for row in range(2)]
    margin = WIDTH - CROP
    return [
        (
            margin + cells[i][0] * 20 + int(rng.integers(0, 5)),
            cells[i][1] * HEIGHT // 2 + int(rng.integers(0, HEIGHT // 2 - GLYPH + 1)),
        )
        for i in rng.permutation(len(cells))[:count]
    ]


def render_clip(rng, glyphs, classes, pool):
    """One video `(34, 48, 56, 3)` and the name of its class."""
    digits = rng.permutation(10)[:NUM_CHOICES]
    colours = rng.permutation(list(COLOURS))[:NUM_CHOICES]
    examples = [pool[classes[pool] == digit] for digit in digits]
    cue, match = rng.choice(examples[0], size=2, replace=False)  # two different pictures of one class
    choices = [match] + [rng.choice(others) for others in examples[1:]]
    video = np.zeros((VIDEO_FRAMES, HEIGHT, WIDTH, 3), "uint8")
    draw(video[0], glyphs[cue], places(rng, 1)[0], WHITE)
    video[1:CUE_END] = video[0]
    for choice, place, colour in zip(choices, places(rng, NUM_CHOICES), colours, strict=True):
        draw(video[QUESTION], glyphs[choice], place, COLOURS[colour])
    video[QUESTION:] = video[QUESTION]
    return video, str(colours[0])


def render_image(rng, glyphs, classes, pool):
    """One image `(48, 48, 3)` of one digit in one colour, and the name of its class."""
    digit, colour = rng.choice(pool), rng.choice([*COLOURS, "white"])
    frame = np.zeros((HEIGHT, WIDTH, 3), "uint8")
    draw(frame, glyphs[digit], places(rng, 1)[0], COLOURS.get(colour, WHITE))
    left = int(rng.integers(0, WIDTH - CROP + 1))
    return frame[:, left : left + CROP], f"{colour}-{classes[digit]}"


def make_dataset(root, size):
    """Writes `images/{train,test}/<colour>-<digit>/*.png` and `clips/{train,test}/<colour>/*.mp4`, once."""
    wanted = {"images": size.images, "train_clips": size.train_clips, "test_clips": size.test_clips, "layout": 3}
    marker = root / "complete.json"
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        print(f"Using the data set in {root}.")
        return
    started = root / "started-by-quickstart"
    for part in ("images", "clips"):
        if (root / part).exists() and not started.exists():
            raise SystemExit(f"{root / part} exists and is not the quickstart's. Give another folder by --data.")
        shutil.rmtree(root / part, ignore_errors=True)
    marker.unlink(missing_ok=True)
    started.touch()
    glyphs, classes, train, test = load_glyphs()

    def write_image(path, seed, pool):
        image, name = render_image(np.random.default_rng(seed), glyphs, classes, pool)
        (path / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / name / f"{seed[1]:05d}.png")

    def write_clip(path, seed, pool):
        video, name = render_clip(np.random.default_rng(seed), glyphs, classes, pool)
        (path / name).mkdir(parents=True, exist_ok=True)
        data.write_video(path / name / f"{seed[1]:05d}.mp4", video, fps=25)

    jobs = []
    parts = (
        (write_image, "images/train", train, size.images),
        (write_image, "images/test", test, size.images // 10),
        (write_clip, "clips/train", train, size.train_clips),
        (write_clip, "clips/test", test, size.test_clips),
    )
    for number, (write, name, pool, count) in enumerate(parts):
        jobs += [(write, root / name, (number, i), pool) for i in range(count)]
    print(f"Rendering {len(jobs)} files into {root}:")
    progress = keras.utils.Progbar(len(jobs), interval=1.0, unit_name="file")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
        for done in [workers.submit(*job) for job in jobs]:
            done.result()
            progress.add(1)
    marker.write_text(json.dumps(wanted))


# --- The way of a user: files → tf.data → fit -------------------------------------------------------------------------


def image_dataset(root, split, shuffle):
    """Images as clips of one frame, with two labels: the digit, and the colour."""
    dataset = keras.utils.image_dataset_from_directory(
        root / "images" / split, batch_size=128, image_size=(CROP, CROP), shuffle=shuffle, seed=0, verbose=False
    )

    def prepare(images, labels):  # the folders are <colour>-<digit>, in alphabetical order
        return applications.preprocess_input(images)[:, None], {"digit": labels % 10, "colour": labels // 10}

    return dataset.map(prepare).prefetch(tf.data.AUTOTUNE)


def train_dataset(root):
    dataset = data.video_dataset_from_directory(
        root / "clips" / "train",
        batch_size=32,
        num_frames=NUM_FRAMES,
        frame_stride=FRAME_STRIDE,
        image_size=CROP,
        shorter_side=HEIGHT,
        horizontal_flip=False,  # a mirrored digit is another sign
        seed=0,
    )
    names = dataset.class_names
    # Every row sees the same clips: decoded once and kept as uint8 (0.7 GB).
    return dataset.cache().map(lambda x, y: (applications.preprocess_input(x), y)).prefetch(tf.data.AUTOTUNE), names


def test_dataset(root):
    return data.video_dataset_from_directory(
        root / "clips" / "test",
        batch_size=16,
        num_frames=NUM_FRAMES,
        frame_stride=FRAME_STRIDE,
        views=(2, 3),
        sampling="even",  # the recipe's wrapping starts would put the question before the cue
        image_size=CROP,
        shorter_side=HEIGHT,
    )


def load_clip(path):
    """One view of a video, `(1, 16, 48, 48, 3)`."""
    return data.load_views(path, NUM_FRAMES, FRAME_STRIDE, views=(1, 1), shorter_side=HEIGHT, image_size=(CROP, CROP))


def pretrain(root, size):
    """An image network, which is a C2D network on clips of one frame.

    It learns the digit and the colour as separate labels: were it one label, "a red 7", the pooled features would say
    which of a clip's digits has which colour, and the question would need no relation between positions.
    """
    train, test = image_dataset(root, "train", shuffle=True), image_dataset(root, "test", shuffle=False)
    backbone = applications.C2DResNet11(
        input_shape=(1, CROP, CROP, 3), temporal_strides=(1, 1, 1), non_local=0, include_top=False, pooling="avg"
    )
    features = backbone.outputs[0]
    heads = {
        "digit": keras.layers.Dense(10, activation="softmax", name="digit")(features),
        "colour": keras.layers.Dense(len(COLOURS) + 1, activation="softmax", name="colour")(features),
    }
    model = keras.Model(backbone.inputs[0], heads, name="image")
    compile_model(model, 4e-3, size.image_epochs * len(train))
    model.fit(train, epochs=size.image_epochs, validation_data=test, shuffle=False, verbose=2)
    return model


def compile_model(model, learning_rate, steps):
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
        {name: "sparse_categorical_crossentropy" for name in model.output_names},
        metrics={name: ["accuracy"] for name in model.output_names},
    )


# --- The five networks ------------------------------------------------------------------------------------------------

ROWS = {
    "C2D": (applications.C2DResNet11, 0, False),
    "C2D, two hidden layers in the head": (applications.C2DResNet11, 0, True),
    "I3D (temporal convolutions)": (applications.I3DResNet11, 0, False),
    "C2D + 2 non-local blocks": (applications.C2DResNet11, 2, False),
    "I3D + 2 non-local blocks": (applications.I3DResNet11, 2, False),
}


def build_row(row, image_model, classes):
    """A video network with the image network's weights, of which only what is new in it trains.

    That is: the head, the non-local blocks, and the I3D's temporal convolution of res3, where the blocks stand. Those
    of conv1 and res2 stay as inflated: training them would double the time, and no weights change the reach in time.
    They are inflated at their centre, which keeps the features of a frame. The paper's average over time dims a digit
    that is shown for 3 frames of the clip, and frozen layers cannot adapt: with it, the last row was at chance.
    """
    builder, non_local, hidden = ROWS[row]
    model = builder(
        input_shape=(NUM_FRAMES, CROP, CROP, 3),
        classes=classes,
        dropout=0.0,
        non_local=non_local,
        # The maps are 6×6: too small to sub-sample. On black frames a drawn digit is an outlier to batch norm: its
        # features have norms of 80, and only scores so scaled start inside of the softmax's range.
        non_local_options={"pool_size": None, "inner_channels": 32, "kernel_initializer": "he_normal", "scale": 0.01},
    )
    if hidden:
        x = model.get_layer("pool5").output
        for number in (1, 2):
            x = keras.layers.Dense(128, activation="relu", name=f"hidden{number}")(x)
        x = keras.layers.Dense(classes, activation="softmax", name="pred")(x)
        model = keras.Model(model.inputs[0], x, name=model.name + "_hidden")
    new = applications.inflate_weights(image_model, model, method="center")
    for layer in model.layers:
        layer.trainable = layer.name in new or is_inflated(layer)
    return model


def is_inflated(layer):
    """Whether it is a temporal convolution that trains."""
    return layer.name.startswith("res3") and getattr(layer, "kernel_size", None) == (3, 1, 1)


def train_row(model, dataset, epochs):
    """Trains what is not frozen, on the features of what is: those are the same in every epoch, and computed once."""
    first = next(layer for layer in model.layers if layer.trainable and layer.weights)
    frozen = keras.Model(model.inputs[0], first.input)
    rest = keras.Model(first.input, model.outputs[0])  # the same layers, so that training it trains `model`
    batches = [(frozen.predict_on_batch(clips), labels) for clips, labels in dataset]
    features, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    del batches
    # What is new learns first. An inflated convolution moves the features that the blocks behind it learn to match:
    # trained all at once, the last row was only half-way after as many epochs.
    inflated = [layer for layer in rest.layers if is_inflated(layer)]
    together = epochs // 3 if inflated else 0
    for trainable, count, learning_rate in ((False, epochs - together, 2e-3), (True, together, 1e-3)):
        for layer in inflated:
            layer.trainable = trainable
        if count:
            compile_model(rest, learning_rate, count * -(-len(labels) // 16))
            rest.fit(features, labels, batch_size=16, epochs=count, verbose=2)


def count_parameters(weights):
    return sum(int(np.prod(weight.shape)) for weight in weights)


# --- What it attends to, and what it exports --------------------------------------------------------------------------


def draw_two_clips(model, root, names, out):
    """Draws what the cue attends to in two test clips; returns how the weights fall on the coloured digits."""
    matches = []
    for number, name in enumerate(names[:2]):
        path = sorted((root / "clips" / "test" / name).glob("*.mp4"))[0]
        (clip,) = load_clip(path)
        rows, columns = np.nonzero(clip[0].min(axis=-1) > 128)  # the white digit
        position = (0, int(np.median(rows)), int(np.median(columns)))
        attention = visualization.attend(model, clip, position)
        visualization.draw_attention(clip, attention, out / f"attention-{number + 1}.png")
        pixels = attention.pixels()[-1]
        # Mean weight on the pixels of each colour in the last frame.
        share = {}
        for colour, rgb in COLOURS.items():
            distance = np.abs(clip[-1].astype(int) - np.array(rgb)).sum(axis=-1)
            if (distance < 150).any():
                share[colour] = float(pixels[distance < 150].mean())
        total = sum(share.values())
        share = {colour: value / total for colour, value in share.items()}
        matches.append({"clip": path.name, "answer": name, "attention": share})
        listing = ", ".join(f"{colour} {value:.0%}" for colour, value in share.items())
        print(f"  attention-{number + 1}.png: the answer is {name}; of the cue's weight on the digits: {listing}")
    return matches


LOADER = """
import sys
sys.modules["keras"] = sys.modules["keras_nonlocal"] = None  # importing either is an error now
import numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
clips = tf.constant(np.load(sys.argv[2]))
np.save(sys.argv[3], loaded.signatures["serving_default"](clips=clips)["scores"].numpy())
"""


def export_and_check(model, names, root, out):
    """Exports the model, scores clips with it in a process that has neither Keras nor this package; the difference."""
    version = export.export_saved_model(  # a new one every time: exports are never replaced
        model,
        out / "saved_model",
        class_names=names,
        frame_stride=FRAME_STRIDE,
        shorter_side=HEIGHT,
        views=(2, 3),
        sampling="even",
    )
    paths = [sorted((root / "clips" / "test" / name).glob("*.mp4"))[0] for name in names]
    clips = np.concatenate([load_clip(path) for path in paths])
    np.save(out / "clips.npy", clips)
    command = [sys.executable, "-c", LOADER, str(version), str(out / "clips.npy"), str(out / "scores.npy")]
    subprocess.run(command, check=True, cwd=out)
    served = np.load(out / "scores.npy")
    here = np.asarray(model.predict_on_batch(applications.preprocess_input(clips)))
    difference = float(np.abs(served - here).max())
    print(f"  {version}: {len(clips)} clips scored without Keras, largest difference {difference:.1e}")
    for path, scores in zip(paths, served, strict=True):
        listing = ", ".join(f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True))
        print(f"    {path.parent.name}/{path.name}: {listing}")
    for name in ("clips.npy", "scores.npy"):
        (out / name).unlink()
    if difference > 1e-5:
        raise SystemExit("The exported model's scores differ from the model's.")
    return difference


# --- The job ----------------------------------------------------------------------------------------------------------


def table(results):
    lines = [
        "| network | parameters | of these trained | accuracy on held-out digits | 95 % interval |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['trained']:,} | {row['accuracy']:.1%} | "
            f"{low:.1%} – {high:.1%} |"
        )
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data, under 2 minutes: shows that it runs")
    parser.add_argument("--data", default="quickstart-data", help="folder of the data set (default: %(default)s)")
    parser.add_argument("--out", default="quickstart-results", help="folder of the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    started = time.perf_counter()
    tf.get_logger().setLevel("ERROR")  # five networks are five graphs; TensorFlow warns of "retracing"
    size = QUICK if arguments.quick else FULL
    root = pathlib.Path(arguments.data + ("-quick" if arguments.quick else "")).resolve()
    out = pathlib.Path(arguments.out + ("-quick" if arguments.quick else "")).resolve()
    root.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(arguments.seed)

    if arguments.quick:
        print("This is the quick run: too little training to learn anything. Its figures mean nothing.")
    print("1. The data set")
    make_dataset(root, size)
    print("\n2. An image network for single coloured digits")
    image_model = pretrain(root, size)
    train, names = train_dataset(root)
    test = test_dataset(root)

    print("\n3. Five video networks on its frozen weights")
    results = {"rows": [], "chance": 1 / NUM_CHOICES, "quick": arguments.quick, "seed": arguments.seed}
    models = {}
    for row in ROWS:
        print(row)
        keras.utils.set_random_seed(arguments.seed)
        models[row] = model = build_row(row, image_model, len(names))
        row_started = time.perf_counter()
        train_row(model, train, size.clip_epochs)
        seconds = time.perf_counter() - row_started
        found = evaluation.evaluate_views(
            model, test, preprocess_input=applications.preprocess_input, view_batch_size=96
        )
        results["rows"].append(
            {
                "name": row,
                "parameters": count_parameters(model.trainable_weights + model.non_trainable_weights),
                "trained": count_parameters(model.trainable_weights),
                "accuracy": found.top_1,
                "interval": found.interval,
                "test_videos": found.num_videos,
                "views": found.num_views,
                "training_seconds": round(seconds, 1),
            }
        )
        print(f"  accuracy over {found.num_views} views of {found.num_videos} videos: {found.top_1:.1%}")

    chosen = models["C2D + 2 non-local blocks"]
    print("\n4. What the cue attends to")
    results["attention"] = draw_two_clips(chosen, root, names, out)
    print("\n5. Export")
    chosen.save(out / "model.keras")
    results["export_difference"] = export_and_check(chosen, names, root, out)

    results["seconds"] = round(time.perf_counter() - started)
    results["processor_seconds"] = round(time.process_time())  # over all cores; what a busy machine does not change
    versions = {"keras": keras.__version__, "tensorflow": tf.__version__, "python": platform.python_version()}
    results["versions"] = versions
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    summary = (
        f"{table(results)}\n\nChance is {results['chance']:.0%}. {size.train_clips} training clips, {size.clip_epochs} "
        f"epoch(s), {size.test_clips} test clips in 6 views each; {results['seconds']} s in all.\n"
    )
    (out / "results.md").write_text(summary)
    written = "results.md, results.json, attention-1.png, attention-2.png, model.keras, saved_model/"
    print(f"\n{summary}\nWritten to {out}: {written}")


if __name__ == "__main__":
    main()
