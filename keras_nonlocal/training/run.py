"""A training from a recipe and a collection of videos to a model, in a directory from which it goes on."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import zlib

import keras

from keras_nonlocal.applications import preprocess_input
from keras_nonlocal.files import whole_file, write_text

from .batch_norm import PreciseBatchNormalization
from .building import build_model
from .distribution import distribute, others_needed
from .loop import train
from .recipes import Recipe, read_recipe

STATISTICS_PASS = 10**9  # that no training gets to
# Keys of a recipe that may change as a training goes on: how it is computed, and how its model is tested.
FREE_KEYS = ("remat", "jit_compile", "test_num_clips", "test_num_crops", "test_shorter_side", "test_image_size")


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What `train_recipe` gives.

    Args:
        model: The compiled `keras.Model`, with the moving averages of batch normalization.
        history: A `keras.callbacks.History` of all epochs.
        path: Where the model was written, a `pathlib.Path`; `None` in all workers but the first.
        class_names: Tuple of strings, in the order of the scores.
        report: `keras_nonlocal.data.DecodeReport` of the last pass over the training videos.
    """

    model: keras.Model
    history: keras.callbacks.History
    path: pathlib.Path | None
    class_names: tuple
    report: object


def train_recipe(
    recipe,
    directory,
    run_dir,
    annotations=None,
    annotation_format=None,
    split=None,
    validation_split=None,
    seed=0,
    callbacks=(),
    checkpoint_steps=1000,
    num_checkpoints=3,
    out=None,
    verbose=1,
):
    """Trains a network on videos by a recipe; the same call goes on where it was stopped, as `train` does.

    It joins the workers that the environment names, as `distribute` does; each is started by the same call. Where there
    are several, broken videos are black clips with their labels, so that workers stay at the same place. Validations
    and the statistics for them take batches of the size that one device has of a training batch.

    `run_dir` gets the `checkpoints`, `log.csv` with a row an epoch, `recipe.yaml`, `run.json`, the logs for TensorBoard
    where that is installed, and at the end `model.keras`. That model has the statistics of `precise_batch_norm` and,
    with `ema_momentum`, the averages of the weights; `model.keras.json` says which clips it takes.

    Args:
        recipe: A `Recipe`, or what `read_recipe` takes: the name of one, or the path of a YAML file.
        directory: String or path-like, the videos, as `video_dataset_from_directory` takes them.
        run_dir: String or path-like, the directory of this training alone, which all workers see.
        annotations: As for `video_dataset_from_directory`.
        annotation_format: Likewise.
        split: Likewise.
        validation_split: Number between 0 and 1, the share of the videos to validate on after every pass, or `None`.
            One view of each is taken, of the recipe's `test_image_size`.
        seed: Integer of at least 0, of weights, dropout, the split, the order and the clips.
        callbacks: List of further `keras.callbacks.Callback`.
        checkpoint_steps: Integer, how many steps of the optimizer come to one checkpoint.
        num_checkpoints: Integer, how many checkpoints are kept.
        out: String or path-like, where to write the model in place of `run_dir`.
        verbose: 0 is silent, 1 shows a progress bar, 2 one line per epoch.

    Returns:
        A `TrainedModel`.

    Raises:
        ValueError: if an argument is none of the above, there are fewer than two classes, or `run_dir` holds another
            training; `out` is checked before the training.
        TrainingError: as `train` raises it.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 4.1

    Example:

    ```python
    trained = train_recipe("kinetics-8x8", "videos", "run", validation_split=0.1)
    trained.model.predict(clips)
    ```
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    run_dir = pathlib.Path(run_dir)
    path = pathlib.Path(out or run_dir / "model.keras")
    if path.suffix != ".keras" or not (out is None or path.parent.is_dir()):
        raise ValueError(f"`out` must be a file `.keras` in a directory that exists. Received: out={str(out)!r}")
    with contextlib.ExitStack() as inside:
        # Workers are joined before all that computes: TensorFlow and JAX want it so.
        with distribute() as workers:
            verbose = verbose if workers.is_chief else 0
            batch_size = recipe.micro_batch_size(workers.num_workers)
            videos = _Videos(
                recipe, directory, annotations, annotation_format, split, validation_split, seed, batch_size, workers
            )
            class_names, num_videos = videos.check(verbose)
            keras.utils.set_random_seed(seed)
            with others_needed():
                model = build_model(recipe, len(class_names))
                step = workers.step(model)
            # Symbolically, before any video is read: a crop may be too small for the network.
            model.compute_output_shape((None, recipe.num_frames, recipe.image_size, recipe.image_size, 3))
            run = {"class_names": class_names, "num_videos": num_videos, "validation_split": validation_split}
            run |= {"seed": seed}
            _check_workers(workers, recipe, run)
            _begin_run(run_dir, recipe, run, workers.is_chief)

            callbacks = [*callbacks, *(_tensorboard(run_dir, verbose) if workers.is_chief else [])]
            if recipe.ema_momentum is not None:
                callbacks.append(keras.callbacks.SwapEMAWeights())  # validations are of the averages
            norms = None
            if recipe.precise_batch_norm_batches:
                norms = PreciseBatchNormalization(videos.for_statistics, recipe.precise_batch_norm_batches)
                callbacks.append(norms)
            history = train(
                model,
                workers.dataset(videos.training, batch_size),
                run_dir,
                steps=recipe.num_steps * recipe.gradient_accumulation_steps,
                validation_data=videos.validation() if validation_split else None,
                callbacks=callbacks,
                checkpoint_steps=checkpoint_steps * recipe.gradient_accumulation_steps,
                num_checkpoints=num_checkpoints,
                step=step,
                verbose=verbose,
            )
            if norms is not None:
                inside.enter_context(norms.precise())  # the model is tested with them
        # Behind the block: inside, what Keras makes to write a file would be made by all workers.
        if workers.is_chief:
            save_model(model, path, _settings(recipe, class_names))
        workers.gather([0])  # nobody leaves before that
    return TrainedModel(model, history, path if workers.is_chief else None, tuple(class_names), videos.report)


def save_model(model, path, settings):
    """Writes a model, and beside it how its clips are prepared, as `path` with `.json` at its end.

    Args:
        model: Keras model.
        path: String or path-like, with the extension `.keras`.
        settings: Dictionary for JSON.
    """
    with whole_file(path) as scratch:
        model.save(scratch)
        write_text(f"{path}.json", json.dumps(settings, indent=2) + "\n")


def _settings(recipe, class_names):
    return {
        "class_names": list(class_names),
        "num_frames": recipe.num_frames,
        "frame_stride": recipe.frame_stride,
        "image_size": recipe.image_size,
        "shorter_side": recipe.test_shorter_side,
    }


class _Videos:
    """The datasets of a training: what it learns from, what it is validated on, what gives the statistics."""

    def __init__(
        self, recipe, directory, annotations, annotation_format, split, validation_split, seed, batch_size, workers
    ):
        self.report = None
        self._directory, self._recipe, self._workers = directory, recipe, workers
        self._share = max(1, batch_size // workers.num_devices)  # Keras gives every device all that is no step
        self._options = {
            **recipe.clip_options,
            "annotations": annotations,
            "annotation_format": annotation_format,
            "split": split,
            "label_mode": recipe.label_mode,
            "batch_size": batch_size,
            "seed": seed,
        }
        if validation_split:
            self._options |= {"validation_split": validation_split, "subset": "training"}

    def check(self, verbose):
        """Lists the videos of all workers. Returns the names of the classes, and how many there are to train on."""
        listed = self.dataset(verbose=bool(verbose))
        if len(listed.class_names) < 2:
            raise ValueError(
                "A classifier needs at least 2 classes. "
                f"Received: directory={str(self._directory)!r} with {listed.class_names}"
            )
        counts = {"train on": len(listed.file_paths)}
        if "validation_split" in self._options:
            counts["validate on"] = len(self.dataset(subset="validation", verbose=False).file_paths)
        for purpose, count in counts.items():
            if count < self._workers.num_workers:
                raise ValueError(
                    f"Each of {self._workers.num_workers} workers needs a video to {purpose}. Received: {count} videos"
                )
        return list(listed.class_names), len(listed.file_paths)

    def dataset(self, **options):
        from keras_nonlocal.data import video_dataset_from_directory  # and TensorFlow, which no other part needs

        return video_dataset_from_directory(self._directory, **self._options | options)

    def training(self, start):
        # Workers must stay at the same place, whatever is broken.
        on_error = "skip" if self._workers.num_workers == 1 else "black"
        dataset = self.dataset(
            with_paths=True, start=start, shard=self._workers.shard, on_error=on_error, verbose=False
        )
        self.report = dataset.report
        return _normalised(dataset)

    def for_statistics(self):
        """The same clips for each evaluation and worker."""
        return _normalised(self.dataset(start=(STATISTICS_PASS, 0), batch_size=self._share, verbose=False))

    def validation(self):
        """One view of each video, as it will be tested."""
        dataset = self.dataset(
            subset="validation",
            batch_size=self._share,
            shard=self._workers.shard,
            image_size=self._recipe.test_image_size,
            shorter_side=self._recipe.test_shorter_side,
            views=(1, 1),
            horizontal_flip=False,
            verbose=False,
        )
        return _normalised(dataset).map(lambda clips, labels: (clips[:, 0], labels))


def _normalised(dataset):
    return dataset.map(lambda clips, *rest: (preprocess_input(clips), *rest))


def _check_workers(workers, recipe, run):
    """Another rate in one worker, and the weights would part without a word."""
    checksums = [zlib.crc32(text.encode()) >> 1 for text in (recipe.to_yaml(), json.dumps(run))]
    if len({tuple(row) for row in workers.gather(checksums).tolist()}) > 1:
        raise ValueError(f"All workers must have the same recipe and the same videos. Received: {recipe}, {run}")


def _begin_run(run_dir, recipe, run, is_chief):
    """Compares what stands beside the checkpoints with this training, which goes on as it began; or writes it."""
    recipe_path, run_path = run_dir / "recipe.yaml", run_dir / "run.json"
    if run_path.exists():
        try:
            before = vars(read_recipe(recipe_path)) | json.loads(run_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{recipe_path} and {run_path} must be as they were written: mend or delete both. Received: {error}"
            ) from error
        now = vars(recipe) | run
        changed = [
            f"{key} (was {before.get(key)!r}, is {now[key]!r})"
            for key in now
            if before.get(key) != now[key] and key not in FREE_KEYS
        ]
        if changed:
            raise ValueError(
                f"`run_dir` must be new or that of this training; it holds one with another {', '.join(changed)}. "
                f"Received: run_dir={str(run_dir)!r}"
            )
    elif is_chief:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(recipe_path, recipe.to_yaml())
        write_text(run_path, json.dumps(run, indent=2) + "\n")


def _tensorboard(run_dir, verbose):
    if importlib.util.find_spec("tensorboard") is not None:
        return [keras.callbacks.TensorBoard(str(run_dir / "tensorboard"), write_graph=False)]
    if verbose:
        print("No logs for TensorBoard, which is not installed: pip install 'keras-nonlocal[viz]'")
    return []
