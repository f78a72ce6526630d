"""The input pipeline of every peer, and the process in which `data.py` runs one of them.

Every pipeline gives the same: batches of random training clips as a network takes them. A random start, T frames at a
stride, the shorter side resized to a random size, a random crop, every second clip mirrored, pixels normalised to
float32. `workers` clips are decoded at a time, each by one thread: calls of `tf.data`, or processes of a `DataLoader`.
A peer is left what is its own way of doing it, where its way is faster than ours too: decord resizes while it decodes.

Before anything is timed, `check` reads from clips of a video that grows brighter by one step a frame how far apart
their frames are.
"""

import functools
import importlib.metadata
import time
from fractions import Fraction

import numpy as np
import peers

MEAN, STD = 114.75, 57.375
FPS = 30

# Pipeline: the packages whose versions the report names.
PIPELINES = {
    "ours": ("tensorflow", "keras", "av"),
    "shards": ("tensorflow", "keras"),
    "decord_tfdata": ("tensorflow", "decord2"),
    "decord_loader": ("torch", "decord2"),
    "pytorchvideo": ("torch", "torchvision", "pytorchvideo", "av"),
}
OURS = ("ours", "shards")


def describe(pipeline):
    """The versions of its packages, or that one of them is not installed."""
    try:
        return {"versions": {name: importlib.metadata.version(name) for name in PIPELINES[pipeline]}}
    except importlib.metadata.PackageNotFoundError as error:
        return {"failure": f"not installed ({error.name})"}


# Builders: each returns an iterable of batches; one iteration is a pass, with a clip of every video.


def our_dataset(folder, clip, workers, **options):
    from keras_nonlocal.data import video_dataset_from_directory

    return video_dataset_from_directory(
        folder,
        batch_size=clip["batch_size"],
        num_frames=clip["num_frames"],
        frame_stride=clip["frame_stride"],
        image_size=clip["crop"],
        shorter_side=tuple(clip["shorter_side"]),
        num_parallel_calls=workers,
        seed=0,
        verbose=False,
        **options,
    )


def build_ours(folder, clip, workers):
    from keras_nonlocal.applications import preprocess_input

    return our_dataset(folder, clip, workers, labels=None).map(preprocess_input)


def build_shards(folder, clip, workers):
    from keras_nonlocal.applications import preprocess_input

    # Shards hold every video once; its copies are passes, so that as many clips come.
    return our_dataset(folder, clip, workers, labels=None).repeat(clip["copies"]).map(preprocess_input)


def decord_clip(path, clip, rng):
    import decord

    # The size that all files have is known here, so that decord can resize while it decodes, its fastest way.
    height, width = clip["size"]
    side = rng.integers(*clip["shorter_side"], endpoint=True)
    size = {"height": int(side), "width": round(width * int(side) / height)}
    reader = decord.VideoReader(path, num_threads=1, **size)
    span = clip["num_frames"] * clip["frame_stride"]
    start = rng.integers(max(len(reader) - span, 0), endpoint=True)
    frames = reader.get_batch((start + np.arange(0, span, clip["frame_stride"])) % len(reader)).asnumpy()
    top, left = (int(rng.integers(room - clip["crop"], endpoint=True)) for room in frames.shape[1:3])
    frames = frames[:, top : top + clip["crop"], left : left + clip["crop"]]
    return np.ascontiguousarray(frames[:, :, ::-1] if rng.random() < 0.5 else frames)


def build_decord_tfdata(folder, clip, workers):
    import decord  # noqa: F401  a package that is missing is told here
    import tensorflow as tf

    files = list_files(folder)

    def load(number, seed):
        return decord_clip(files[number], clip, np.random.default_rng(seed))

    def element(number, seed):
        frames = tf.numpy_function(load, [number, seed], tf.uint8)
        return tf.ensure_shape(frames, (clip["num_frames"], clip["crop"], clip["crop"], 3))

    order = tf.data.Dataset.range(len(files)).shuffle(len(files), seed=0)
    seeds = tf.data.Dataset.random(seed=0, rerandomize_each_iteration=True)
    dataset = tf.data.Dataset.zip(order, seeds).map(element, num_parallel_calls=workers)
    dataset = dataset.batch(clip["batch_size"]).prefetch(tf.data.AUTOTUNE)
    return dataset.map(lambda clips: (tf.cast(clips, "float32") - MEAN) / STD)


def build_decord_loader(folder, clip, workers):
    import decord  # noqa: F401
    import torch

    files = list_files(folder)

    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, number):
            seed = int(torch.randint(2**62, ()))
            return torch.from_numpy(decord_clip(files[number], clip, np.random.default_rng(seed)))

    loader = data_loader(Clips(), clip, workers, shuffle=True)
    return Mapped(loader, lambda clips: (clips.float() - MEAN) / STD)


def build_pytorchvideo(folder, clip, workers):
    import_pytorchvideo()
    from pytorchvideo import transforms
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
    from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

    transform = transforms.ApplyTransformToKey(
        key="video",
        transform=Compose(
            [
                transforms.UniformTemporalSubsample(clip["num_frames"]),
                transforms.RandomShortSideScale(*clip["shorter_side"]),
                RandomCrop(clip["crop"]),
                RandomHorizontalFlip(),
                transforms.Normalize((MEAN,) * 3, (STD,) * 3),
            ]
        ),
    )
    dataset = LabeledVideoDataset(
        [(file, {"label": 0}) for file in list_files(folder)],
        make_clip_sampler("random", Fraction(clip["num_frames"] * clip["frame_stride"], FPS)),
        transform=transform,
        decode_audio=False,
    )
    return Mapped(data_loader(dataset, clip, workers), lambda batch: batch["video"].permute(0, 2, 3, 4, 1))


BUILDERS = {
    "ours": build_ours,
    "shards": build_shards,
    "decord_tfdata": build_decord_tfdata,
    "decord_loader": build_decord_loader,
    "pytorchvideo": build_pytorchvideo,
}


class Mapped:
    """An iterable whose items go through a function; what a training loop does with a batch of a `DataLoader`."""

    def __init__(self, items, function):
        self.items, self.function = items, function

    def __iter__(self):
        return map(self.function, self.items)


def data_loader(dataset, clip, workers, **options):
    import torch

    return torch.utils.data.DataLoader(
        dataset, batch_size=clip["batch_size"], num_workers=workers, persistent_workers=True, **options
    )


def import_pytorchvideo():
    """Makes pytorchvideo 0.1.5 importable by what no pipeline uses.

    torchvision's compiled operations do not load beside a build of torch without CUDA; its import then misses the
    signatures of two of them. And pytorchvideo wants a module of torchvision that has been renamed since.
    """
    import sys

    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.transforms._functional_tensor as renamed

    sys.modules.setdefault("torchvision.transforms.functional_tensor", renamed)


def list_files(folder):
    import pathlib

    return sorted(str(path) for path in pathlib.Path(folder).glob("*/*.mp4"))


# Checking


def check(pipeline, clip, batches):
    """Raises a `ValueError` unless the frames of the brightening video are as far apart as they must be."""
    shape = (clip["num_frames"], clip["crop"], clip["crop"], 3)
    steps = []
    for batch in batches:
        batch = np.asarray(batch)
        if batch.shape[1:] != shape or batch.dtype != np.float32:
            raise ValueError(f"Expected float32 clips of {shape}. Received: {batch.dtype} of {batch.shape[1:]}")
        levels = (batch * STD + MEAN).mean((2, 3, 4))
        steps += ((levels[:, -1] - levels[:, 0]) / (clip["num_frames"] - 1)).tolist()
    expected = clip["frame_stride"]
    if pipeline == "pytorchvideo":  # which spreads the frames evenly over the span, the last frame included
        expected = (clip["num_frames"] * clip["frame_stride"] - 1) / (clip["num_frames"] - 1)
    # Levels are stored as integers, and not all 256 of them: the first and the last may each be one off.
    if not np.allclose(steps, expected, rtol=0, atol=2.5 / (clip["num_frames"] - 1)):
        raise ValueError(f"Expected frames {expected:.2f} apart. Received: {np.round(steps, 2).tolist()}")


# The process


class Worker:
    def __init__(self, pipeline, threads):
        self.pipeline, self.threads = pipeline, threads

    def start(self):
        """Loads the libraries, which no time counts."""
        if "torch" in PIPELINES[self.pipeline]:
            import torch

            torch.set_num_threads(self.threads)
        else:
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(self.threads)
        if self.pipeline in OURS:
            import keras_nonlocal.applications
            import keras_nonlocal.data  # noqa: F401
        return {}

    def build(self, folder, ramp, clip, workers):
        """Gets ready to run, and checks the pipeline on the folder `ramp` of brightening videos."""
        build = BUILDERS[self.pipeline]
        check(self.pipeline, clip, build(ramp, clip, workers))
        self.make = functools.partial(build, folder, clip, workers)
        return {}

    def run(self, num_clips):
        """The seconds to the first batch of a new pipeline, and of a whole pass of it when it is warm."""
        start = time.perf_counter()
        batches = self.make()
        iterator = iter(batches)
        counts = [len(next(iterator))]
        first = time.perf_counter() - start
        counts += [len(batch) for batch in iterator]
        start = time.perf_counter()
        again = [len(batch) for batch in batches]
        seconds = time.perf_counter() - start
        if sum(counts) != num_clips or sum(again) != num_clips:
            return {"failure": f"gave {sum(counts)} and {sum(again)} of {num_clips} clips"}
        return {"first_seconds": first, "seconds": seconds}

    def fit(self, folder, clip, workers, passes):
        """The share of a `fit` of the small I3D in which it waits for the next batch, and clips a second."""
        import keras
        import tensorflow as tf

        from keras_nonlocal import applications

        dataset = our_dataset(folder, clip, workers)
        num_classes = len(dataset.class_names)
        dataset = dataset.repeat(passes)
        arrivals = []

        def note_arrival():
            arrivals.append(time.perf_counter())
            return np.int32(0)

        def stamped(clips, labels):
            with tf.control_dependencies([tf.numpy_function(note_arrival, [], tf.int32)]):
                return applications.preprocess_input(clips), tf.identity(labels)

        # The last step of the pipeline runs when the model asks for a batch and not before.
        dataset = dataset.map(stamped)
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        options.experimental_optimization.map_parallelization = False
        dataset = dataset.with_options(options)

        class Clock(keras.callbacks.Callback):
            def __init__(self):
                super().__init__()
                self.begins, self.ends = [], []

            def on_train_batch_begin(self, batch, logs=None):
                self.begins.append(time.perf_counter())

            def on_train_batch_end(self, batch, logs=None):
                self.ends.append(time.perf_counter())

        clock = Clock()
        sizes = (clip["num_frames"], clip["crop"], clip["crop"], 3)
        model = applications.I3DResNet11(input_shape=sizes, classes=num_classes)
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.fit(dataset, epochs=1, callbacks=[clock], verbose=0)
        return waiting(clock.begins, clock.ends, arrivals, clip["batch_size"])


def waiting(begins, ends, arrivals, batch_size):
    """What a `fit` waited for its data, from the times when its steps began and ended and its batches arrived.

    The first step, in which the model is traced, does not count; nor does the last, which finds the data at its end.
    """
    steps = range(1, len(ends))
    waits = [arrivals[step] - begins[step] for step in steps]
    if min(waits, default=-1) < 0:
        raise ValueError(
            "Batches must arrive after the model asked for them, or its waiting cannot be told. "
            f"Received: {min(waits, default=None)} seconds after"
        )
    seconds = ends[-1] - begins[1]
    return {"share": sum(waits) / seconds, "clips_per_second": len(waits) * batch_size / seconds, "steps": len(waits)}


def main(pipeline, threads):
    peers.serve(Worker(pipeline, threads))
