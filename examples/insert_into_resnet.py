"""Non-local blocks in a ResNet-50 of Keras that is trained already, and fine-tuning with and without them.

    python examples/insert_into_resnet.py                        # some minutes on 2 cores, offline
    python examples/insert_into_resnet.py --weights imagenet     # Keras downloads its ImageNet weights, once
    python examples/insert_into_resnet.py --quick                # the same steps, hardly any training: no meaning

The images are the real handwritten digits that ship in scikit-learn, enlarged to 64×64; those to test with are other
people's. Nothing is downloaded unless you ask for it: by default a network that has learned the digits 0 to 4 here
stands in for one that has learned ImageNet.

`insert_non_local` puts two blocks into the trained network, whose outputs stay what they were, to the last bit. Then
both networks learn all ten digits in the same way: the early stages frozen, the same batches, as many steps. The script
says what comes out, whichever it is. A digit is one small thing, and nothing here asks for a relation between distant
places: `examples/quickstart.py` has a task that does.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

from keras_nonlocal.applications import insert_non_local
from keras_nonlocal.evaluation import wilson_interval

IMAGE_SIZE = 64
NUM_TEST_DIGITS = 360  # the last ones; the data set is ordered by writer, so these are other people's hands
FIRST_CLASSES = 5  # what the stand-in for ImageNet learns: the digits below
LAST_FROZEN = "conv3_block3_out"
AFTER = ["conv3_block4_out", "conv4_block6_out"]  # maps of 8×8 and of 4×4
LAST = "conv4_block6_out"  # the network ends here: at this size, the maps of conv5 would be 2×2
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Size:
    """How many digits, and for how long each network trains."""

    train_digits: int | None
    test_digits: int
    first_epochs: int
    epochs: int


FULL = Size(train_digits=None, test_digits=NUM_TEST_DIGITS, first_epochs=3, epochs=3)
QUICK = Size(train_digits=32, test_digits=16, first_epochs=1, epochs=1)


# --- The data ---------------------------------------------------------------------------------------------------------


def load_images(size):
    """Images `(digits, 64, 64, 3)` as the network wants them, and classes: `(train, test)`."""
    digits = load_digits()
    train = slice(0, size.train_digits or len(digits.images) - NUM_TEST_DIGITS)
    test = slice(len(digits.images) - NUM_TEST_DIGITS, len(digits.images) - NUM_TEST_DIGITS + size.test_digits)
    return [(prepare(digits.images[part]), digits.target[part].astype("int32")) for part in (train, test)]


def prepare(images):
    """From 8×8 in 0..16 to what `keras.applications.ResNet50` takes."""
    enlarged = [
        Image.fromarray((image * (255 / 16)).astype("uint8")).resize((IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC)
        for image in images
    ]
    pixels = np.stack([np.asarray(image, "float32") for image in enlarged])
    return keras.applications.resnet.preprocess_input(np.repeat(pixels[..., None], 3, axis=-1))


# --- The networks -----------------------------------------------------------------------------------------------------


def build(weights, classes):
    """ResNet-50 up to conv4, an average over the places, and a classifier."""
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    network = keras.applications.ResNet50(include_top=False, weights=weights, input_shape=shape)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # 0.99 is for more steps than these
    features = keras.layers.GlobalAveragePooling2D(name="average")(network.get_layer(LAST).output)
    return keras.Model(network.input, keras.layers.Dense(classes, activation="softmax")(features), name="resnet50")


def give_new_head(model, classes):
    features = model.get_layer("average").output
    return keras.Model(model.input, keras.layers.Dense(classes, activation="softmax")(features), name=model.name)


def fit(model, x, y, epochs, learning_rate, seed):
    keras.utils.set_random_seed(seed)  # the same order of the images for every network
    steps = epochs * -(-len(x) // BATCH_SIZE)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps))
    eagerly = steps == 1  # of the quick run: making a graph of so deep a network takes half a minute
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=eagerly)
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, verbose=2)


def freeze(model):
    """Freezes all up to `LAST_FROZEN`."""
    names = [layer.name for layer in model.layers]
    for layer in model.layers[: names.index(LAST_FROZEN) + 1]:
        layer.trainable = False


def fine_tune(model, features, y, epochs, seed):
    """Trains what is not frozen, on the features of what is: those are the same in every epoch and network."""
    rest = keras.Model(model.get_layer(LAST_FROZEN).output, model.output)  # the same layers: training it trains `model`
    fit(rest, features, y, epochs, 1e-3, seed)


def predict(model, x):
    batches = [model(x[i : i + BATCH_SIZE], training=False) for i in range(0, len(x), BATCH_SIZE)]
    return np.concatenate([keras.ops.convert_to_numpy(batch) for batch in batches])


# --- What came out ----------------------------------------------------------------------------------------------------


def compare(right, right_before):
    """What two networks tell differently of the same images, by the exact sign test."""
    gained, lost = int((right & ~right_before).sum()), int((~right & right_before).sum())
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    verdict = "no difference shown" if p >= 0.05 else ("better" if gained > lost else "worse") + " with blocks"
    sentence = (
        f"Of {len(right)} digits, {gained} are told with blocks only and {lost} without only: p = {p:.2g}, {verdict}."
    )
    return {"with_only": gained, "without_only": lost, "p": p, "verdict": verdict, "sentence": sentence}


def table(rows):
    lines = [
        "| network | parameters | accuracy on other people's digits | 95 % interval | fine-tuning, seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['accuracy']:.1%} | {low:.1%} – {high:.1%} | "
            f"{row['training_seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="hardly any training: shows that it runs")
    parser.add_argument("--out", default="insert-results", help="folder of the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    parser.add_argument(
        "--weights",
        default="none",
        help='"imagenet" (downloaded by Keras), the path of weights of `keras.applications.ResNet50` without top, or '
        '"none": trained here first (default: %(default)s)',
    )
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"argument --seed: must be at least 0. Received: {arguments.seed}")
    if arguments.weights not in ("none", "imagenet") and not os.path.exists(arguments.weights):
        parser.error(f'argument --weights: must be "none", "imagenet" or a file. Received: {arguments.weights}')
    return arguments


def main(argv=None):
    arguments = parse(argv)
    size, seed = QUICK if arguments.quick else FULL, arguments.seed
    out = pathlib.Path(arguments.out + ("-quick" if arguments.quick else "")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"The folder of the results cannot be made; give another by --out. {error}")
    keras.utils.set_random_seed(seed)
    (x, y), (x_test, y_test) = load_images(size)
    print(f"{len(x)} digits to train with, {len(x_test)} of other people to test with")

    if arguments.weights == "none":
        origin = f"trained here on the digits 0 to {FIRST_CLASSES - 1}"
        print(f"\n1. ResNet-50, {origin}: it stands in for one that was trained on ImageNet")
        trained, first = build(None, FIRST_CLASSES), y < FIRST_CLASSES
        fit(trained, x[first], y[first], size.first_epochs, 1e-3, seed)
    else:
        origin = f"weights: {arguments.weights}"
        print(f"\n1. ResNet-50, {origin}")
        try:
            trained = build(arguments.weights, FIRST_CLASSES)
        except Exception as error:  # Keras raises plain ones
            sys.exit(f"The weights cannot be loaded: {error}")

    print("\n2. Two non-local blocks")
    without = give_new_head(trained, classes=10)
    freeze(without)
    networks = {
        "ResNet-50 to conv4": without,
        "+ 2 non-local blocks": insert_non_local(without, AFTER, scale="sqrt"),
    }
    outputs = [predict(model, x_test) for model in networks.values()]
    difference = float(np.abs(outputs[0] - outputs[1]).max())
    print(f"After {' and '.join(AFTER)}. Largest difference of the outputs: {difference}")

    features = predict(keras.Model(without.input, without.get_layer(LAST_FROZEN).output), x)
    rows, right = [], []
    for name, model in networks.items():
        print(f"\n3. Fine-tuning: {name}")
        started = time.perf_counter()
        fine_tune(model, features, y, size.epochs, seed)
        seconds = time.perf_counter() - started
        right.append(predict(model, x_test).argmax(axis=-1) == y_test)
        rows.append(
            {
                "name": name,
                "parameters": model.count_params(),
                "accuracy": float(right[-1].mean()),
                "interval": wilson_interval(float(right[-1].sum()), len(y_test)),
                "training_seconds": round(seconds, 1),
            }
        )

    comparison = compare(right[1], right[0])
    results = {
        "weights": origin,
        "difference_at_start": difference,
        "rows": rows,
        "comparison": comparison,
        "train_digits": len(x),
        "test_digits": len(x_test),
        "epochs": size.epochs,
        "seed": seed,
        "quick": arguments.quick,
        "processor_seconds": round(time.process_time()),  # over all cores; what a busy machine does not change
        "versions": {"keras": keras.__version__, "python": platform.python_version()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    summary = "\n\n".join(
        [
            *(["This is the quick run: hardly any training. Its figures mean nothing."] if arguments.quick else []),
            table(rows),
            f"The network: ResNet-50, {origin}. Largest difference that inserting the blocks made: {difference}. Then "
            f"{size.epochs} epoch(s) on {len(x)} images of ten digits with all up to {LAST_FROZEN} frozen; "
            f"{results['processor_seconds']} processor seconds in all. Chance is 10%.",
            comparison["sentence"],
        ]
    )
    (out / "results.md").write_text(summary + "\n")
    print(f"\n{summary}\n\nWritten to {out}: results.md, results.json")


if __name__ == "__main__":
    main()
