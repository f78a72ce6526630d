"""One worker of a training, as tests start them: `python -m tests.distributed_training DIRECTORY STEPS [options]`.

What it comes to is written beside the directory: weights, figures, and the order of the videos it was trained on.
"""

import argparse
import json
import os
import pathlib

import keras
import numpy as np

from keras_nonlocal.layers import NonLocal3D
from keras_nonlocal.normalization import BatchNormalization
from keras_nonlocal.training import distribute, train

NUM_VIDEOS, BATCH_SIZE, CLASSES = 21, 8, 3  # of all workers; 5 videos of a pass are left out
SHAPE = (2, 6, 6, 3)


def make_videos():
    rng = np.random.default_rng(0)
    return rng.normal(size=(NUM_VIDEOS, *SHAPE)).astype("float32"), rng.integers(CLASSES, size=NUM_VIDEOS)


def make_model(gradient_accumulation_steps=None, ema=False):
    """Has what a step must share: a loss that is a mean, a penalty that is none, and statistics of the batch."""
    inputs = keras.Input(SHAPE)
    x = keras.layers.Conv3D(8, 3, padding="same", use_bias=False, kernel_regularizer="l2")(inputs)
    x = keras.layers.Activation("relu")(BatchNormalization()(x))
    block = NonLocal3D()
    x = block(x)
    block.norm.gamma.assign(np.ones(block.norm.gamma.shape, "float32"))  # or nothing would come out of it
    # Drops nothing, but draws random numbers.
    x = keras.layers.Dropout(1e-9)(keras.layers.GlobalAveragePooling3D()(x))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax")(x))
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.9),
        momentum=0.9,
        nesterov=True,
        gradient_accumulation_steps=gradient_accumulation_steps,
        use_ema=ema,
        ema_momentum=0.5,
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Videos:
    """A worker's share of the videos in the order of a pass, as `video_dataset_from_directory` gives it."""

    def __init__(self, shard, batch_size, trained_on):
        self.shard, self.batch_size, self.trained_on = shard or (1, 0), batch_size, trained_on

    def __call__(self, start):
        self.place = start
        return self

    def __iter__(self):
        number, position = self.place
        self.place = (number + 1, 0)
        order = np.random.default_rng(number).permutation(NUM_VIDEOS)[self.shard[1] :: self.shard[0]]
        x, y = make_videos()
        for first in range(position, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            if len(chosen) == self.batch_size:
                with open(self.trained_on, "a") as file:
                    file.write(json.dumps([number, *map(int, chosen)]) + "\n")
            elif self.shard == (1, 0):  # what several workers leave out
                return
            places = [(number, first + place) for place in range(len(chosen))]
            yield x[chosen], y[chosen], [b"%d" % video for video in chosen], places


RAISE, STOP = 0, -1  # what no signal has for a number


class At(keras.callbacks.Callback):
    """Sends a signal to its own process in a step, raises an error there, or asks for the end of the training."""

    def __init__(self, step, number):
        super().__init__()
        self.left, self.number = step, number

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left == 0 and self.number == RAISE:
            raise RuntimeError("here alone")
        if self.left == 0 and self.number == STOP:
            self.model.stop_training = True
        elif self.left == 0:
            os.kill(os.getpid(), self.number)


def main(directory, steps, devices=1, gradient_accumulation_steps=None, ema=False, signal_at=None):
    strategy = None
    if devices > 1:
        import tensorflow as tf

        devices_of = tf.config.LogicalDeviceConfiguration
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [devices_of()] * devices)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(devices)])
    with distribute(strategy) as workers:
        beside = f"{directory}-{workers.index}"
        # TensorFlow gives the first worker's weights to all; JAX wants the same of all.
        keras.utils.set_random_seed(workers.index if keras.backend.backend() == "tensorflow" else 0)
        model = make_model(gradient_accumulation_steps, ema)
        batch_size = BATCH_SIZE // workers.num_workers
        videos = Videos(workers.shard, batch_size, f"{beside}.order")
        # Shares of the validation differ.
        x, y = (part[workers.index :: workers.num_workers] for part in make_videos())
        callbacks = []
        if signal_at:
            index, step, number = signal_at
            if index == workers.index:
                callbacks.append(At(step, number))
        history = train(
            model,
            workers.dataset(videos, batch_size),
            directory,
            steps=steps,
            validation_data=(x, y),
            checkpoint_steps=3,
            step=workers.step(model),
            callbacks=callbacks,
            verbose=0,
        )
        weights = [keras.ops.convert_to_numpy(variable) for variable in workers.step(model).variables]
        np.savez(f"{beside}.npz", *weights)
        pathlib.Path(f"{beside}.json").write_text(json.dumps(history.history))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("steps", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--gradient-accumulation-steps", type=int)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--signal-at", type=int, nargs=3)
    main(**vars(parser.parse_args()))
