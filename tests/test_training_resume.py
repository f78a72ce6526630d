"""Trainings on videos in processes of their own, killed by `kill -9` and started again."""

import csv
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.test_data_shards import make_videos

NUM_VIDEOS, BROKEN, STEPS = 12, (3, 7), 60  # 5 steps are a pass

# A training with all that has a state. What the loop takes from the dataset goes to a file before it is trained on.
TRAINING = """
import json, sys
import keras
import numpy as np
from keras_nonlocal.applications import C2DResNet11, preprocess_input
from keras_nonlocal.data import video_dataset_from_directory
from keras_nonlocal.training import train

data, directory, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])

def dataset(start):
    videos = video_dataset_from_directory(
        data, batch_size=2, num_frames=4, frame_stride=2, image_size=32, shorter_side=(32, 40), seed=1,
        with_paths=True, start=start, verbose=False,
    )
    return Noted(videos.map(lambda clips, labels, *rest: (preprocess_input(clips), labels, *rest)))

class Noted:
    def __init__(self, videos):
        self.videos = videos

    def __iter__(self):
        for x, y, names, places in self.videos:
            row = [places.numpy().tolist(), [name.decode() for name in names.numpy()], float(np.abs(x.numpy()).sum())]
            with open(directory + ".order", "a") as file:
                file.write(json.dumps(row) + "\\n")
            yield x, y, names, places

keras.utils.set_random_seed(int(sys.argv[4]))
model = C2DResNet11(input_shape=(4, 32, 32, 3), classes=2, weights=None, non_local=1)
optimizer = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True, use_ema=True, ema_momentum=0.9)
model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
rng = np.random.default_rng(0)
validation = rng.normal(size=(6, 4, 32, 32, 3)).astype("float32"), np.arange(6) % 2
history = train(
    model, dataset, directory, steps=steps, checkpoint_steps=2, num_checkpoints=2, verbose=0,
    validation_data=validation, callbacks=[keras.callbacks.SwapEMAWeights()],
)
np.savez(directory + ".npz", *model.get_weights())
with open(directory + ".json", "w") as file:
    json.dump(history.history, file)
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "videos"
    make_videos(folder, NUM_VIDEOS, BROKEN)
    return folder


class Run:
    """One training, of one or more processes."""

    def __init__(self, videos, directory, steps=STEPS):
        self.videos, self.directory, self.steps = videos, directory, steps
        self.num_starts = 0

    def start(self):
        # Another seed at each start: the first process alone says how the weights began.
        command = [sys.executable, "-c", TRAINING, self.videos, self.directory, self.steps, self.num_starts]
        self.num_starts += 1
        return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)

    def finish(self):
        process = self.start()
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    def kill_after(self, num_batches, seconds):
        """`kill -9`, once a process has begun that many batches and some more time has gone."""
        before = len(self.order())
        with self.start() as process:
            while len(self.order()) < before + num_batches and process.poll() is None:
                time.sleep(0.01)
            time.sleep(seconds)
            process.kill()
            errors = process.stderr.read()
        assert process.returncode == -9, errors

    def order(self):
        """Of each batch in the order of training: places, files, and the sum of the pixels."""
        path = self.directory.with_name(self.directory.name + ".order")
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def history(self):
        return json.loads(self.directory.with_name(self.directory.name + ".json").read_text())

    def weights(self):
        with np.load(self.directory.with_name(self.directory.name + ".npz")) as arrays:
            return [arrays[name] for name in arrays.files]

    def log(self):
        with open(self.directory / "log.csv", newline="") as file:
            return list(csv.DictReader(file))


def check_same(run, whole):
    """The same steps on the same pixels in the same order, and what they came to."""
    expected, batches = whole.order(), run.order()
    assert len(expected) == whole.steps
    begun = 0
    for batch in batches:
        if begun < len(expected) and batch == expected[begun]:
            begun += 1
        else:  # from the last checkpoint on: 2 steps are made from one to the next, and one may have begun
            assert begun - 3 <= expected.index(batch) < begun
            begun = expected.index(batch) + 1
    assert begun == len(expected) and not [batch for batch in expected if batch not in batches]
    assert [row["step"] for row in run.log()] == [row["step"] for row in whole.log()]
    figures = [(run.history()[name], whole.history()[name]) for name in ("loss", "accuracy", "val_loss")]
    losses = [pair for figure in figures for pair in zip(*figure, strict=True)]
    loss_difference = max(abs(one - two) for one, two in losses)
    difference = max(float(np.abs(one - two).max()) for one, two in zip(run.weights(), whole.weights(), strict=True))
    print(
        f"{run.num_starts} starts, {len(batches)} batches begun of {len(expected)}: "
        f"losses {loss_difference:.2g} apart, weights {difference:.2g}"
    )
    assert loss_difference <= 1e-5 and difference <= 1e-5


@pytest.mark.slow
def test_ten_kills(videos, tmp_path):
    whole = Run(videos, tmp_path / "whole")
    whole.finish()
    run = Run(videos, tmp_path / "killed")
    draw = random.Random(0)
    for _ in range(10):
        # In steps, between them, in validations and while checkpoints are written.
        run.kill_after(draw.randint(1, 8), draw.random() / 10)
    run.finish()
    check_same(run, whole)
