"""A training from a recipe and a collection of videos to a model, in a directory from which it goes on."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib

import keras

from keras_nonlocal.applications import preprocess_input
from keras_nonlocal.files import whole_file

from .batch_norm import PreciseBatchNormalization
from .building import build_model
from .distribution import distribute
from .loop import train
from .recipes import Recipe, read_recipe

STATISTICS_PASS = 10**9  # that no training gets to


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

    It joins the workers that the environment names, as `distribute` does; each is started by the same call.

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
        checkpoint_steps: Integer, how many steps come to one checkpoint.
        num_checkpoints: Integer, how many checkpoints are kept.
        out: String or path-like, where to write the model in place of `run_dir`.
        verbose: 0 is silent, 1 shows a progress bar, 2 one line per epoch.

    Returns:
        A `TrainedModel`.

    Raises:
        ValueError: if an argument is none of the above, there are fewer than two classes, or `run_dir` holds another
            training.
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
    # Before all that computes: TensorFlow and JAX join workers only then.
    with distribute() as workers:
        verbose = verbose if workers.is_chief else 0
        batch_size = recipe.micro_batch_size(workers.num_workers)
        videos = _Videos(
            recipe, directory, annotations, annotation_format, split, validation_split, seed, batch_size, workers
        )
        listed = videos.dataset(verbose=bool(verbose))
        class_names, num_videos = listed.class_names, len(listed.file_paths)
        if len(class_names) < 2:
            raise ValueError(
                f"A classifier needs at least 2 classes. Received: directory={str(directory)!r} with {class_names}"
            )
        keras.utils.set_random_seed(seed)
        model = build_model(recipe, len(class_names))
        # Symbolically, before any video is read: a crop may be too small for the network.
        model.compute_output_shape((None, recipe.num_frames, recipe.image_size, recipe.image_size, 3))

        run_dir = pathlib.Path(run_dir)
        callbacks = list(callbacks)
        if workers.is_chief:
            run = {"class_names": list(class_names), "num_videos": num_videos, "validation_split": validation_split}
            _begin_run(run_dir, recipe, run | {"seed": seed})
            callbacks += _tensorboard(run_dir, verbose)
        if recipe.ema_momentum is not None:
            callbacks.append(keras.callbacks.SwapEMAWeights())  # evaluations are of the averages, their statistics too
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
            checkpoint_steps=checkpoint_steps,
            num_checkpoints=num_checkpoints,
            step=workers.step(model),
            verbose=verbose,
        )
        path = pathlib.Path(out or run_dir / "model.keras")
        with norms.precise() if norms else contextlib.nullcontext():  # all workers together; it is tested with them
            if workers.is_chief:
                save_model(model, path, _settings(recipe, class_names))
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
        _write_text(f"{path}.json", json.dumps(settings, indent=2) + "\n")


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
        return _normalised(self.dataset(start=(STATISTICS_PASS, 0), verbose=False))

    def validation(self):
        """One view of each video, as it will be tested."""
        dataset = self.dataset(
            subset="validation",
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


def _begin_run(run_dir, recipe, run):
    """Writes beside the checkpoints what they are of, or compares it: a run goes on as it began."""
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe_path, run_path = run_dir / "recipe.yaml", run_dir / "run.json"
    if not run_path.exists():
        _write_text(recipe_path, recipe.to_yaml())
        _write_text(run_path, json.dumps(run, indent=2) + "\n")
        return
    before = vars(read_recipe(recipe_path)) | json.loads(run_path.read_text(encoding="utf-8"))
    now = vars(recipe) | run
    changed = [f"{key} (was {before.get(key)!r}, is {now[key]!r})" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"`run_dir` must be that of the same training; it holds one with another {', '.join(changed)}. "
            f"Received: run_dir={str(run_dir)!r}"
        )


def _tensorboard(run_dir, verbose):
    if importlib.util.find_spec("tensorboard") is not None:
        return [keras.callbacks.TensorBoard(str(run_dir / "tensorboard"), write_graph=False)]
    if verbose:
        print("No logs for TensorBoard, which is not installed: pip install 'keras-nonlocal[viz]'")
    return []


def _write_text(path, text):
    with whole_file(path) as scratch:
        pathlib.Path(scratch).write_text(text, encoding="utf-8")
