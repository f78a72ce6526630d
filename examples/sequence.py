"""Non-local blocks on real series: which exercise does a watch feel, on people it has never met?

    pip install ".[test]"
    python examples/sequence.py            # 230 processor seconds: two to three minutes on 2 idle cores
    python examples/sequence.py --quick    # the same steps, hardly any training: its figures mean nothing

The series are those that the PyPI package seglearn ships: 10 people do 7 shoulder exercises, 20 repetitions each, once
with the left and once with the right arm, and a smartwatch records acceleration and rotation at 50 Hz. That is 140
series of 19 to 52 seconds. They are as long as they are: batches are padded, and a mask says where each series ends.

The same small network is trained without and with two blocks. Everybody is held out once, so every series counts, and
the script says what comes out, whichever it is. An exercise is one movement, 20 times over: nothing here asks for a
relation between distant steps. `examples/quickstart.py` has a task that does.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

from keras_nonlocal import NonLocal1D  # noqa: E402
from keras_nonlocal.evaluation import wilson_interval  # noqa: E402

STEP = 10  # samples that become one: 50 Hz to 5 Hz, at which a repetition of some 2 seconds still has 10 steps
BATCH_SIZE = 14  # as many as each person has: no batch is cut off
PADDING = -100.0  # no normalised sample comes near it
ROWS = {
    "convolutions": None,
    "+ 2 blocks, embedded Gaussian": "embedded_gaussian",
    "+ 2 blocks, dot product": "dot_product",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How many groups of people are held out in turn, and for how long each network trains."""

    folds: int
    epochs: int


FULL = Size(folds=5, epochs=25)
QUICK = Size(folds=2, epochs=1)


# --- The data ---------------------------------------------------------------------------------------------------------


def locate():
    """The path of seglearn's file of series. The package itself is not imported: it needs more than it asks pip for."""
    install = 'pip install ".[test]"'
    try:
        path = importlib.metadata.distribution("seglearn").locate_file("seglearn/data/watch_dataset.npy")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"The series come with seglearn, which is not installed: {install}")
    if not os.path.exists(path):
        sys.exit(f"The installed seglearn has no {path}; the version that has it: {install}")
    return path


def load_series():
    """The series `(steps, 6)` at 5 Hz, their exercises 0 to 6, and who did them."""
    # A pickle runs code as it is loaded. This one came from pip, like every other code that runs here.
    content = np.load(locate(), allow_pickle=True).item()
    series = []
    for samples in content["X"]:
        steps = len(samples) // STEP
        series.append(samples[: steps * STEP].reshape(steps, STEP, -1).mean(axis=1))
    return series, content["y"].astype("int32"), content["subject"].astype("int32")


def split_people(people, folds, rng):
    """The people in `folds` groups, each to be held out once: `(train, test)` as masks over the series."""
    for group in np.array_split(rng.permutation(np.unique(people)), folds):
        held_out = np.isin(people, group)
        yield ~held_out, held_out


def pad(series, mean, deviation):
    """Normalises series and pads them to the longest: `(series, steps, 6)`."""
    batch = np.full((len(series), max(map(len, series)), len(mean)), PADDING, "float32")
    for row, samples in zip(batch, series, strict=True):
        row[: len(samples)] = (samples - mean) / deviation
    return batch


# --- The network ------------------------------------------------------------------------------------------------------


class MaskedConv1D(keras.layers.Conv1D):
    """A convolution to which the padding behind a series is what lies behind the batch's edge: zeros."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.supports_masking = True  # at stride 1 and with "same" padding, steps stay where they are

    def call(self, inputs, mask=None):
        return super().call(inputs if mask is None else keras.ops.where(mask[..., None], inputs, 0.0))


def build(row, channels=6, classes=7):
    """Three convolutions and an average over time; after the second and the third stands a block, if any.

    The mask comes from `Masking`, and Keras hands it on. `NonLocal1D` takes it: padding is no key and counts in no
    statistics of a batch.
    """
    series = keras.Input((None, channels))
    x = keras.layers.Masking(PADDING, name="masking")(series)
    for number in range(3):
        x = MaskedConv1D(32, 5, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        if ROWS[row] and number:
            x = NonLocal1D(ROWS[row], query_chunk_size=None)(x)  # series are short: all scores at once is faster
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dropout(0.3)(x)
    return keras.Model(series, keras.layers.Dense(classes, activation="softmax")(x))


def compile_model(model, steps):
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, steps)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy")


def start_anew(model, row, seed):
    """Weights as at the start, and an optimizer that has seen nothing: the same model, which is traced only once."""
    keras.utils.set_random_seed(seed)
    model.set_weights(build(row).get_weights())
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))


def normalised_for(series, train):
    """All series as one padded batch, by the mean and the deviation of those to train with."""
    known = np.concatenate([samples for samples, own in zip(series, train, strict=True) if own])
    return pad(series, known.mean(axis=0), known.std(axis=0))


def hold_everybody_out(row, series, exercises, people, size, seeds):
    """Which series are told by networks that never saw their person: `(seeds, series)`; parameters; training's seconds.

    All rows have the same groups of people, and the same order of the series.
    """
    right, seconds = np.zeros((len(seeds), len(series)), bool), 0.0
    keras.utils.set_random_seed(seeds[0])
    model = build(row)
    batches = len(series) * (size.folds - 1) // size.folds // BATCH_SIZE
    compile_model(model, size.epochs * batches)
    for number, seed in enumerate(seeds):
        for train, test in split_people(people, size.folds, np.random.default_rng(seed)):
            x = normalised_for(series, train)
            start_anew(model, row, seed)
            started = time.perf_counter()
            model.fit(x[train], exercises[train], batch_size=BATCH_SIZE, epochs=size.epochs, verbose=0)
            seconds += time.perf_counter() - started
            scores = keras.ops.convert_to_numpy(model(x[test]))
            right[number, test] = scores.argmax(axis=-1) == exercises[test]
        print(f"  {row}, seed {seed}: {right[number].sum()} of {len(series)} right", flush=True)
    return right, model.count_params(), seconds


# --- What came out ----------------------------------------------------------------------------------------------------


def per_person(right, people):
    """The fraction of each person's series that are told."""
    return np.array([right[people == person].mean() for person in np.unique(people)])


def compare(name, with_blocks, without):
    """The difference of two networks on the same people, and what it says.

    By Student's t over people, not over series: two series of one person are not two independent trials.
    """
    difference = with_blocks - without
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    mean, low, high = (float(100 * value) for value in (difference.mean(), *(difference.mean() + (-half, half))))
    if low > 0:
        verdict = "better than without blocks"
    elif high < 0:
        verdict = "worse than without blocks"
    else:
        verdict = "no difference shown"
    sentence = (
        f"{name}: {mean:+.1f} points against no blocks, 95 % interval over the {len(difference)} people "
        f"{low:+.1f} to {high:+.1f}: {verdict}."
    )
    return {"points": mean, "interval": [low, high], "verdict": verdict, "sentence": sentence}


def table(rows):
    lines = [
        "| network | parameters | accuracy on held-out people | 95 % interval | training, seconds |",
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
    parser.add_argument("--out", default="sequence-results", help="folder of the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of folds and training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how often all is repeated (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name, smallest in (("seed", 0), ("seeds", 1)):
        if getattr(arguments, name) < smallest:
            parser.error(f"argument --{name}: must be at least {smallest}. Received: {getattr(arguments, name)}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    logging.getLogger("tensorflow").setLevel("ERROR")  # many networks are many graphs; TensorFlow warns of "retracing"
    size = QUICK if arguments.quick else FULL
    series, exercises, people = load_series()
    out = pathlib.Path(arguments.out + ("-quick" if arguments.quick else "")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"The folder of the results cannot be made; give another by --out. {error}")
    lengths = [len(samples) for samples in series]
    print(
        f"{len(series)} series of {min(lengths)} to {max(lengths)} steps, {len(np.unique(people))} people in "
        f"{size.folds} groups, each held out once"
    )

    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    rows, persons = [], {}
    for name in ROWS:
        runs, parameters, seconds = hold_everybody_out(name, series, exercises, people, size, seeds)
        # Seeds are averaged: the same series told once more is no further trial.
        right = runs.mean(axis=0)
        persons[name] = per_person(right, people)
        rows.append(
            {
                "name": name,
                "parameters": parameters,
                "accuracy": float(right.mean()),
                "interval": wilson_interval(float(right.sum()), len(right)),
                "accuracy_by_seed": runs.mean(axis=1).tolist(),
                "accuracy_by_person": persons[name].tolist(),
                "training_seconds": round(seconds, 1),
            }
        )
    first, *others = ROWS
    comparisons = {name: compare(name, persons[name], persons[first]) for name in others}
    results = {
        "rows": rows,
        "comparisons": comparisons,
        "chance": 1 / 7,
        "series": len(series),
        "people": len(np.unique(people)),
        **dataclasses.asdict(size),
        "seeds": list(seeds),
        "quick": arguments.quick,
        "processor_seconds": round(time.process_time()),  # over all cores; what a busy machine does not change
        "versions": {
            "keras": keras.__version__,
            "seglearn": importlib.metadata.version("seglearn"),
            "python": platform.python_version(),
        },
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    warning = "This is the quick run: hardly any training. Its figures mean nothing."
    summary = "\n\n".join(
        [
            *([warning] if arguments.quick else []),
            table(rows),
            f"Chance is {results['chance']:.0%}. {results['people']} people in {size.folds} groups, each held out "
            f"once; {size.epochs} epoch(s), {len(seeds)} seed(s); {results['processor_seconds']} processor seconds in "
            "all. Intervals of the table: Wilson, over series.",
            *(comparison["sentence"] for comparison in comparisons.values()),
        ]
    )
    (out / "results.md").write_text(summary + "\n")
    print(f"\n{summary}\n\nWritten to {out}: results.md, results.json")


if __name__ == "__main__":
    main()
