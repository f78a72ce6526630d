"""Convolutions and poolings of single frames: in 2-D, as the builders make them, against `keras.layers.Conv3D`.

    python benchmarks/convolutions.py      # about 5 minutes on 2 cores; writes benchmarks/results/convolutions.md

Whole networks with the same weights, taking turns in one process: forward, and a training step (with backward and SGD),
as a `tf.function` and compiled by XLA.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from keras_nonlocal.applications import resnet  # noqa: E402

FOLDED = (resnet.Conv3D, resnet.MaxPooling3D)
PLAIN = (keras.layers.Conv3D, keras.layers.MaxPooling3D)


def build(name, layers, shape):
    """A network of the builders, with other layers for convolution and pooling. They have the same weights."""
    resnet.Conv3D, resnet.MaxPooling3D = layers
    try:
        return getattr(resnet, name)(input_shape=shape, classes=400)
    finally:
        resnet.Conv3D, resnet.MaxPooling3D = FOLDED


def steps(model, clips, labels, jit_compile):
    """`{pass: function without arguments that runs it to its end}`"""
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit_compile)
    def forward():
        return model(clips, training=False)

    @tf.function(jit_compile=jit_compile)
    def train():
        with tf.GradientTape() as tape:
            scores = model(clips, training=True)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, scores))
        optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]))
        return loss

    return {"forward": lambda: forward().numpy(), "training step": lambda: train().numpy()}


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(name, shape, batch, jit_compile, rounds):
    """`{pass: (median seconds folded, median seconds plain)}`"""
    rng = np.random.default_rng(0)
    clips = tf.constant(rng.normal(size=(batch, *shape)).astype("float32"))
    labels = tf.constant(rng.integers(0, 400, batch))
    folded, plain = (build(name, layers, shape) for layers in (FOLDED, PLAIN))
    plain.set_weights(folded.get_weights())
    sides = [steps(model, clips, labels, jit_compile) for model in (folded, plain)]
    difference = np.abs(sides[0]["forward"]() - sides[1]["forward"]()).max()
    assert difference <= 1e-5, difference
    medians = {}
    for kind in sides[0]:
        times = ([], [])
        for turn in range(rounds + 1):
            for side, kept in zip(sides, times, strict=True):
                taken = seconds(side[kind])
                if turn:  # the first traces and compiles
                    kept.append(taken)
        medians[kind] = tuple(map(statistics.median, times))
        print(
            f"{name} {shape} {'XLA' if jit_compile else 'graph'} {kind}: {medians[kind]}", file=sys.stderr, flush=True
        )
    return medians


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "convolutions.md")
    parser.add_argument("--quick", action="store_true", help="a small network: shows that it works, measures nothing")
    options = parser.parse_args()
    cases = [("C2DResNet50", (8, 224, 224, 3), 1), ("I3DResNet50", (8, 224, 224, 3), 1)]
    if options.quick:
        cases, options.rounds = [("I3DResNet11", (4, 64, 64, 3), 1)], 1
    lines = [
        "# Convolutions of single frames in 2-D",
        "",
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} cores, no accelerator, float32; "
        f"medians of {options.rounds} rounds in turns; {time.strftime('%Y-%m-%d')}. "
        "Written by `python benchmarks/convolutions.py`.",
        "",
        "| network | clips | | pass | folded | `Conv3D` | folded ÷ `Conv3D` |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for name, shape, batch in cases:
        for jit_compile in (False, True):
            for kind, (folded, plain) in measure(name, shape, batch, jit_compile, options.rounds).items():
                clips = "×".join(map(str, (batch, *shape)))
                mode = "XLA" if jit_compile else "graph"
                lines.append(
                    f"| {name} | {clips} | {mode} | {kind} | {folded:.2f} s | {plain:.2f} s | {folded / plain:.2f} |"
                )
            keras.backend.clear_session()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
