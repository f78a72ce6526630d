"""`keras-nonlocal …`: trains, evaluates, predicts, visualizes, tunes, exports, verifies and converts in the shell.

Every command parses, calls the package and prints. Bad input is one line on stderr and exit code 2.
"""

import argparse
import collections
import contextlib
import json
import logging
import math
import os
import pathlib
import re
import sys
import warnings

from keras_nonlocal.applications.resnet import NETWORKS
from keras_nonlocal.data.annotations import FORMATS, SPLITS
from keras_nonlocal.data.sampling import SAMPLERS
from keras_nonlocal.evaluation import VIEW_REDUCTIONS
from keras_nonlocal.files import write_text
from keras_nonlocal.ops import PAIRWISE
from keras_nonlocal.training.building import accuracy
from keras_nonlocal.training.recipes import RECIPES, parse_overrides, read_recipe
from keras_nonlocal.training.run import save_model

# What `train` writes beside the model, so that the other commands prepare clips as it did.
SETTINGS = ("class_names", "num_frames", "frame_stride", "image_size", "shorter_side")
# Of `keras_nonlocal.export`, which imports TensorFlow: named here so that `--help` does not wait for it.
EXPORT_FORMATS = ("saved_model", "litert", "onnx")
EXPORT_OPTIONS = (
    "quantization",
    "batch_size",
    "tolerance",
    "version",
    "views",
    "sampling",
    "top_k",
    "jit_compile",
    "warmup",
)
# Options of `train` that are keys of recipes, and those that need one.
RECIPE_KEYS = (
    "model",
    "non_local",
    "weights",
    "num_frames",
    "frame_stride",
    "image_size",
    "shorter_side",
    "batch_size",
)
RECIPE_ONLY = ("--run-dir", "--set", "--checkpoint-steps", "--dry-run")
# Of `keras_nonlocal.tuning`, which needs Keras Tuner.
TUNING_METHODS = ("random", "bayesian", "hyperband")
SHORTER_SIDE_HELP = "frames are resized to it before the crops (default: the smallest of the training)"


def main(argv=None):
    """Runs the command line.

    Args:
        argv: List of strings, the arguments. `None`: those of the process.

    Returns:
        The exit code: 0 for success, 1 where `predict` had to leave out a video or what was verified has a fault, 2 for
        bad arguments or data, 130 after Ctrl-C.
    """
    try:
        args = _parser().parse_args(argv)
        return args.command(args)
    except _BadInput as error:
        print(f"keras-nonlocal: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkeras-nonlocal: interrupted", file=sys.stderr)
        return 130


# Commands


def _train(args):
    if args.recipe is not None:
        return _train_by_recipe(args)
    needs = [option for option in RECIPE_ONLY if option in args.given]
    if needs:
        raise _BadInput(f"{needs[0]} needs --recipe")
    if args.out is None:
        raise _BadInput("the following arguments are required: --out")
    out = pathlib.Path(args.out)
    _check_out(out, args.overwrite, ".keras")

    import keras

    with _reported_as_bad_input():
        keras.utils.set_random_seed(args.seed)
        training, validation = _labelled_videos(args, validates=bool(args.validation_split))
        class_names, report = training.class_names, training.report
        options = {} if args.non_local is None else {"non_local": args.non_local}
        is_multi_label = training.element_spec[1].shape.rank == 2
        if is_multi_label:
            options["classifier_activation"] = "sigmoid"
        if args.pairwise:
            options["non_local_options"] = {"pairwise": args.pairwise}
        model = NETWORKS[args.model](
            input_shape=(args.num_frames, None, None, 3),  # other sizes may be tested than trained on
            classes=len(class_names),
            weights=args.weights,
            new_head=args.new_head,
            **options,
        )
        # Symbolically, before any video is read: a crop may be too small for the network.
        model.compute_output_shape((None, args.num_frames, args.image_size, args.image_size, 3))

    model.compile(
        keras.optimizers.SGD(args.learning_rate, momentum=0.9, nesterov=True),
        "binary_crossentropy" if is_multi_label else "sparse_categorical_crossentropy",
        metrics=[accuracy(is_multi_label)],
    )
    with _reported_as_bad_input(), warnings.catch_warnings():
        # Broken videos are left out, so that the number of batches is unknown until the first epoch ends, which
        # Keras then calls an interruption. It is none.
        warnings.filterwarnings("ignore", message=".*[Yy]our input ran out of data.*")
        # The dataset shuffles itself; Keras would warn that it cannot.
        model.fit(_normalised(training), validation_data=_normalised(validation), epochs=args.epochs, shuffle=False)
        save_model(model, out, _settings(args, class_names, SETTINGS))
    print(report.summary())
    if validation is not None:
        print(f"validation: {validation.report.summary()}")
    print(f"Wrote {out} for {len(class_names)} classes: {', '.join(class_names)}")
    return 0


def _labelled_videos(args, validates):
    """The videos to train on, and those to validate on or `None`."""
    from keras_nonlocal.data import video_dataset_from_directory

    datasets = video_dataset_from_directory(
        args.data,
        batch_size=args.batch_size,
        **_clips(args),
        **_annotations(args),
        validation_split=args.validation_split if validates else None,
        subset="both" if validates else None,
    )
    training, validation = datasets if validates else (datasets, None)
    if len(training.class_names) < 2:
        raise _BadInput(
            f"a classifier needs at least 2 classes. Received: DATA={args.data!r} with {training.class_names}"
        )
    return training, validation


def _normalised(dataset):
    from keras_nonlocal.applications import preprocess_input

    return dataset and dataset.map(lambda clips, labels: (preprocess_input(clips), labels))


def _settings(args, class_names, names):
    return {name: vars(args).get(name) for name in names} | {"class_names": class_names}


def _train_by_recipe(args):
    recipe = _recipe(args)
    if args.run_dir is None and not args.dry_run:
        raise _BadInput("--recipe needs --run-dir, where the checkpoints go, or --dry-run")
    if args.out is not None:
        _check_out(pathlib.Path(args.out), args.overwrite, ".keras")

    from keras_nonlocal.data import video_dataset_from_directory
    from keras_nonlocal.training import plan_training, train_recipe

    validation_split = args.validation_split or None
    with _reported_as_bad_input():
        if args.dry_run:
            listed = video_dataset_from_directory(
                args.data,
                label_mode=recipe.label_mode,
                seed=args.seed,
                validation_split=validation_split,
                subset="training" if validation_split else None,
                **recipe.clip_options,
                **_annotations(args),
            )
            print(plan_training(recipe, len(listed.class_names), len(listed.file_paths)))
            return 0
        trained = train_recipe(
            recipe,
            args.data,
            args.run_dir,
            validation_split=validation_split,
            seed=args.seed,
            checkpoint_steps=args.checkpoint_steps,
            out=args.out,
            **_annotations(args),
        )
    if trained.path is not None:
        if trained.report.num_good:  # not of a training that was finished before
            print(trained.report.summary())
        print(f"Wrote {trained.path} for {len(trained.class_names)} classes: {', '.join(trained.class_names)}")
        views = f"--clips {recipe.test_num_clips} --crops {recipe.test_num_crops} --image-size {recipe.test_image_size}"
        views += " --annotations ANNOTATIONS" if args.annotations else ""
        print(f"The recipe's test: keras-nonlocal evaluate {trained.path} VIDEOS {views}")
    return 0


def _recipe(args):
    """The recipe with what other options say of it."""
    for option, key in (("--learning-rate", "learning_rate"), ("--epochs", "total_steps")):
        if option in args.given:
            raise _BadInput(f"with --recipe, {option} is --set {key}=…, see `keras_nonlocal.training.Recipe`")
    with _reported_as_bad_input():
        overrides = {key: getattr(args, key) for key in RECIPE_KEYS if f"--{key.replace('_', '-')}" in args.given}
        if args.new_head:
            overrides["new_head"] = True
        if args.no_flip:
            overrides["horizontal_flip"] = False
        if args.pairwise:
            options = read_recipe(args.recipe).non_local_options or {}
            overrides["non_local_options"] = options | {"pairwise": args.pairwise}
        if "--shorter-side" in args.given:  # tested at the scale of the training, as without a recipe
            overrides["test_shorter_side"] = overrides["test_image_size"] = min(args.shorter_side)
        return read_recipe(args.recipe, **(overrides | parse_overrides(args.set or ())))


def _tune(args):
    with _reported_as_bad_input():
        from keras_nonlocal.tuning import NonLocalHyperModel, tune

        training, validation = _labelled_videos(args, validates=True)
        class_names = training.class_names
        sizes = (args.image_size, args.image_size, 3)
        hypermodel = NonLocalHyperModel(
            len(class_names),
            (args.num_frames, None, None, 3),  # other sizes may be tested than trained on
            (args.num_frames, *sizes),
            networks=args.networks,
            non_local=args.non_local,
            pairwise=args.pairwise,
            learning_rate=tuple(args.learning_rate),
            weight_decay=tuple(args.weight_decay),
            max_parameters=args.max_parameters,
            max_gmacs=args.max_gmacs,
            multi_label=training.element_spec[1].shape.rank == 2,
        )
        # As `train` writes it, and what else must be the same for a search to go on.
        names = (*SETTINGS, "no_flip", "batch_size", "split", "validation_split")
        result = tune(
            hypermodel,
            _normalised(training),
            _normalised(validation),
            args.out,
            max_trials=args.max_trials,
            epochs=args.epochs,
            method=args.method,
            seed=args.seed,
            metadata=_settings(args, class_names, names),
            verbose=2,
        )
    print(f"\n{result.table()}\n")
    print(f"training: {training.report.summary()}")
    print(f"validation: {validation.report.summary()}")
    best = result.best
    print(f"Wrote {result.model_path} of trial {best.trial}, {result.objective} {best.score:.4f}")
    return 0


def _evaluate(args):
    classifier = _Classifier(args.model)
    clips = classifier.clip_options(args)

    from keras_nonlocal.data import video_dataset_from_directory
    from keras_nonlocal.evaluation import evaluate_views

    with _reported_as_bad_input():
        if args.fully_convolutional:
            classifier.make_fully_convolutional(args.image_size)
            clips |= {"views": (args.clips, 1), "image_size": "whole"}
        num_clips, num_crops = clips["views"]
        dataset = video_dataset_from_directory(
            args.data,
            class_names=classifier.class_names,  # in the order of the scores; a folder that is missing is an error
            with_paths=True,
            # Whole frames have the sizes of their videos.
            batch_size=1 if args.fully_convolutional else max(args.batch_size // (num_clips * num_crops), 1),
            **_annotations(args),
            **clips,
        )
        if len(dataset.class_names) != classifier.num_classes:
            raise _BadInput(
                f"the classes of the videos must be those of the model, {classifier.num_classes} classes. "
                f"Received: DATA={args.data!r} with {dataset.class_names}"
            )
        result = evaluate_views(
            classifier,
            dataset,
            num_clips,
            num_crops,
            view_reduction=args.view_reduction,
            view_batch_size=args.batch_size,
            resume=args.resume,
        )
        print(result.headline())
        print(f"{result.num_videos} videos, {result.num_views} views of each; {dataset.report.summary()}")
        print(f"\n{result.table()}")
        if args.out:
            print(f"\nWrote {', '.join(result.save(args.out))}")
        if args.json:
            figures = result.figures() | {"broken": dataset.report.broken}
            write_text(pathlib.Path(args.json), json.dumps(figures, indent=2) + "\n")
    return 0


def _predict(args):
    classifier = _Classifier(args.model)
    clips = classifier.clip_options(args)

    import numpy as np

    names = classifier.class_names or [str(index) for index in range(classifier.num_classes)]
    exit_code = 0
    with _Progress(len(args.videos)) as progress:
        for video, scores in _scores_of_videos(classifier, args.videos, clips, args.batch_size):
            progress.clear()
            if isinstance(scores, Exception):
                print(f"keras-nonlocal: error: {scores}", file=sys.stderr)
                exit_code = 1
            else:
                best = np.argsort(-scores, kind="stable")[: args.top_k]
                if args.json:
                    top = [{"class": names[index], "score": float(scores[index])} for index in best]
                    print(json.dumps({"video": video, "predictions": top}), flush=True)
                else:
                    print("\n".join([video, *(f"  {scores[index]:.4f}  {names[index]}" for index in best)]), flush=True)
            progress.advance()
    return exit_code


def _scores_of_videos(classifier, videos, clips, batch_size):
    """Yields each video with its mean scores, or with the error that it cannot be decoded. Batches hold the views of
    several videos."""
    import numpy as np

    from keras_nonlocal.data import VideoError, load_views

    num_views = math.prod(clips["views"])
    waiting, views, scores = collections.deque(), [], []  # `views` are still to be scored
    for number, video in enumerate(videos, start=1):
        error = None
        with _reported_as_bad_input():
            try:
                views.extend(load_views(video, **clips))
            except VideoError as broken:
                error = broken
        waiting.append((video, error))
        while len(views) >= batch_size or (views and number == len(videos)):
            scores.extend(classifier.predict_on_batch(np.stack(views[:batch_size])))
            del views[:batch_size]
        while waiting and (waiting[0][1] is not None or len(scores) >= num_views):
            video, error = waiting.popleft()
            if error is None:
                yield video, np.mean(scores[:num_views], axis=0)
                del scores[:num_views]
            else:
                yield video, error


class _Progress:
    """A count of what is done, on a terminal's last line."""

    def __init__(self, total):
        self._done, self._total = 0, total
        self._is_shown = sys.stderr.isatty()

    def __enter__(self):
        self._show()
        return self

    def __exit__(self, *exception):
        self.clear()

    def advance(self):
        self._done += 1
        self._show()

    def clear(self):
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self):
        if self._is_shown and self._done < self._total:
            print(f"\r{self._done} of {self._total} videos", end="", file=sys.stderr, flush=True)


def _inspect(args):
    _check_out(pathlib.Path(args.out), args.overwrite, ".png")

    from keras_nonlocal.data import inspect_videos

    with _reported_as_bad_input():
        inspection = inspect_videos(
            args.data,
            **_annotations(args),
            contact_sheet=args.out,
            num_clips=args.clips,
            **_clips(args),
        )
    print(inspection.summary())
    if not inspection.facts:
        raise _BadInput(f"no video can be decoded. Received: DATA={args.data!r}")
    print(f"Wrote {inspection.contact_sheet}")
    return 0


def _export(args):
    model, settings = _load_keras(args.model), _read_settings(args.model)
    names = args.class_names.split(",") if args.class_names else settings.get("class_names")

    sizes = _clip_sizes(args, model.input_shape[1:], settings)
    options = {name: value for name, value in vars(args).items() if name in EXPORT_OPTIONS}  # those that were given
    if "views" in options:
        options["views"] = tuple(options["views"])
    if args.format != "saved_model":
        if args.representative_videos:
            options["representative_clips"] = _representative_clips(args, sizes)
        elif args.shorter_side or args.frame_stride:
            raise _BadInput("--shorter-side and --frame-stride need --format saved_model or --representative-videos")
        sizes = {name: sizes[name] for name in ("num_frames", "image_size")}
    elif args.representative_videos:
        raise _BadInput("--representative-videos needs --format litert")

    from keras_nonlocal.export import export_model, read_metadata

    with _reported_as_bad_input():
        path = export_model(model, args.out, args.format, class_names=names, **sizes, **options)
    print(f"Wrote {path}" + ("" if names is None else f" for {len(names)} classes: {', '.join(names)}"))
    if args.format != "saved_model":
        return 0
    with _reported_as_bad_input():
        metadata = read_metadata(path)
    print(_described_preparation(metadata["preprocessing"]))
    for name, signature in metadata["signatures"].items():
        inputs, outputs = (
            ", ".join(f"{key} {spec['dtype']} {_shape(spec['shape'])}" for key, spec in signature[side].items())
            for side in ("inputs", "outputs")
        )
        print(f"{name}: {inputs} -> {outputs}")
    for name, reason in metadata["left_out"].items():
        print(f"no {name}: {reason}")
    return 0


def _described_preparation(preparation):
    frames, stride, size = (preparation[name] for name in ("num_frames", "frame_stride", "image_size"))
    clips = f"clips of {frames or 'any number of'} frames" + (f" at stride {stride}" if stride else "")
    if size is None:
        return f"{clips}, taken as large as they come"
    crops = f"cropped to {size[0]}x{size[1]}"
    return f"{clips}, resized to a shorter side of {preparation['shorter_side']} and {crops} unless they are that large"


def _representative_clips(args, sizes):
    """One clip of each video, for the export in int8."""
    missing = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is None]
    if missing:
        raise _BadInput(f"neither MODEL nor what stands beside it says {' and '.join(missing)}. Give the option")

    from keras_nonlocal.data import load_views

    with _reported_as_bad_input():
        return [load_views(video, **sizes, views=(1, 1))[0] for video in args.representative_videos]


def _shape(sizes):
    return f"({', '.join('any' if size is None else str(size) for size in sizes)})"


def _verify(args):
    from keras_nonlocal.export import verify_saved_model

    with _reported_as_bad_input():
        checks = verify_saved_model(args.model)
    for check in checks:
        inputs, outputs = (
            ", ".join(f"{key} {value}" for key, value in side.items()) for side in (check.inputs, check.outputs)
        )
        ran = f"{inputs} -> {outputs}, {check.seconds:.2f} s" if check.outputs else inputs
        print(f"{check.signature:16} {check.problem or 'ok'}" + (f"  ({ran})" if ran else ""))
    return 1 if any(check.problem for check in checks) else 0


def _visualize(args):
    out = pathlib.Path(args.out)
    suffix = out.suffix.lower()
    if suffix not in (".png", ".mp4", ".gif"):
        raise _BadInput(f"--out must end with .png, .mp4 or .gif. Received: --out {out}")
    if args.fps and suffix == ".png":
        raise _BadInput(f"--fps needs --out with .mp4 or .gif. Received: --out {out}")
    if args.clip > args.clips:
        raise _BadInput(f"--clip must be at most --clips, {args.clips}. Received: --clip {args.clip}")
    _check_out(out, args.overwrite, out.suffix)
    if os.path.isdir(args.model):
        raise _BadInput(f"visualize needs a .keras file. Received: MODEL={args.model!r}")
    classifier = _Classifier(args.model)
    clips = classifier.clip_options(args)

    from keras_nonlocal import visualization
    from keras_nonlocal.data import load_views

    with _reported_as_bad_input():
        clip = load_views(args.video, **clips)[args.clip - 1]
        attention = classifier.attend(clip, args.position, args.layer)
        if suffix != ".png":
            count = args.count if args.arrows else None
            visualization.write_attention_video(clip, attention, out, fps=args.fps or 4, count=count)
        elif args.arrows:
            visualization.draw_arrows(clip, attention, out, count=args.count)
        else:
            visualization.draw_attention(clip, attention, out)
        centres, weights = attention.strongest(args.count)
    position = ",".join(map(str, attention.position))
    asked = "" if args.position else ", the most attended"
    print(f"layer {attention.layer_name}; position {position} (frame, row, column){asked}")
    print(f"its {len(weights)} strongest keys of {attention.weights.size}: frame, row, column, weight")
    for centre, weight in zip(centres, weights, strict=True):
        print("".join(f"{coordinate:8.1f}" for coordinate in centre) + f"  {weight:.6g}")
    print(f"Wrote {out}")
    return 0


def _convert(args):
    from keras_nonlocal.applications import convert_checkpoint

    with _reported_as_bad_input():
        print(convert_checkpoint(args.checkpoint, args.out, args.model))
    return 0


def _shard(args):
    if (args.verify is None) == (args.out is None) or (args.verify is not None and args.data is not None):
        raise _BadInput(
            "give either DATA and OUT or --verify OUT. "
            f"Received: DATA={args.data!r}, OUT={args.out!r}, --verify {args.verify}"
        )

    from keras_nonlocal.data.annotations import read_annotations
    from keras_nonlocal.data.shards import read_index, verify_shards, write_shards

    with _reported_as_bad_input():
        if args.verify is not None:
            damages = verify_shards(args.verify)
            for file, damage in damages.items():
                print(f"{file}: {damage}", file=sys.stderr)
            if not damages:
                print(f"{len(read_index(args.verify).files)} shards are as they were written")
            return 1 if damages else 0
        index = write_shards(
            read_annotations(args.data, **_annotations(args)),
            args.out,
            shorter_side=args.shorter_side,
            quality=args.quality,
            videos_per_shard=args.videos_per_shard,
            num_parallel_calls=args.num_parallel_calls,
            on_error=args.on_error,
        )
    classes = "" if index.class_names is None else f" of {len(index.class_names)} classes"
    skipped = len(index.skipped)
    broken = f"; skipped {skipped} broken file{'s' * (skipped != 1)}, listed in shards.json" if skipped else ""
    print(f"Wrote {len(index.paths)} videos{classes} in {len(index.files)} shards to {args.out}{broken}")
    return 0


def _clips(args):
    """Arguments about random clips, those of `_training_clips` and the seed."""
    return {
        "num_frames": args.num_frames,
        "frame_stride": args.frame_stride,
        "image_size": args.image_size,
        "shorter_side": tuple(args.shorter_side),
        "horizontal_flip": not args.no_flip,
        "seed": args.seed,
    }


def _annotations(args):
    """Arguments of `video_dataset_from_directory` about what says the labels."""
    return {"annotations": args.annotations, "annotation_format": args.annotation_format, "split": args.split}


# Models


class _Classifier:
    """A `.keras` file or an exported SavedModel: from uint8 clips to scores, with what is known of its clips."""

    def __init__(self, path):
        self.path = path
        if os.path.isdir(path):
            self._load_export()
        else:
            self._load_keras()
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise _BadInput(
                f"the class names beside the model must be {self.num_classes}, as its scores. "
                f"Received: class_names={self.class_names}"
            )

    def _load_export(self):
        import tensorflow as tf

        from keras_nonlocal.export.saved_model import METADATA_FILE, read_class_names, read_metadata, version_folder

        # TensorFlow warns that gradients may be missing, which nobody asks for here.
        logging.getLogger("absl").setLevel(logging.ERROR)
        with _loading(self.path):
            folder = version_folder(self.path)
            self._says = folder / "assets" / METADATA_FILE
            self.settings = dict(read_metadata(folder)["preprocessing"])
            self.class_names = read_class_names(folder)
            self._loaded = tf.saved_model.load(str(folder))  # kept: the signature holds no reference to it
            signature = self._loaded.signatures["serving_default"]
            frames, *size = signature.structured_input_signature[1]["clips"].shape[1:4]
            # Frames of another size than this would be resized in it.
            self.clip_shape = (frames, *(self.settings["image_size"] or size), 3)
            self.num_classes = signature.structured_outputs["scores"].shape[-1]
        self._predict = lambda clips: signature(clips=tf.constant(clips))["scores"].numpy()
        self.get_weights = lambda: [variable.numpy() for variable in signature.variables]

    def _load_keras(self):
        model = _load_keras(self.path)

        from keras_nonlocal.applications import preprocess_input

        self._says = _settings_path(self.path)
        self.settings = _read_settings(self.path)
        self.class_names = self.settings.get("class_names")
        self.clip_shape, self.num_classes = tuple(model.input_shape[1:]), model.output_shape[-1]
        self._predict = lambda clips: model.predict_on_batch(preprocess_input(clips))
        self.get_weights = model.get_weights
        self._model = model

    def make_fully_convolutional(self, image_size):
        """From now on it takes whole frames, and scores them at every position of the crops of its training."""
        from keras_nonlocal.applications import fully_convolutional, preprocess_input

        if os.path.isdir(self.path):
            raise _BadInput(f"--fully-convolutional needs a .keras file. Received: MODEL={self.path!r}")
        trained = self.settings.get("image_size") if None in self.clip_shape[1:3] else None
        model = fully_convolutional(self._model, image_size or trained)
        self._predict = lambda clips: model.predict_on_batch(preprocess_input(clips))

    def predict_on_batch(self, clips):
        import tensorflow as tf

        try:
            return self._predict(clips)
        except (ValueError, tf.errors.OpError) as error:
            # Such as frames that are smaller than its strides; what TensorFlow says then is a page long.
            raise _BadInput(
                f"the model does not run on clips of the shape {clips.shape}: {type(error).__name__}"
            ) from error

    def attend(self, clip, position, layer_name):
        """What a position of a clip attends to, a `visualization.Attention`; of a `.keras` file."""
        from keras_nonlocal.visualization import attend

        return attend(self._model, clip, position, layer_name)

    def clip_options(self, args):
        """Arguments of `load_views`: from the options, else from the model's shape, else from its settings."""
        frames, height, width, _ = self.clip_shape
        static_size = None if None in (height, width) else (height, width)
        sizes = _clip_sizes(args, self.clip_shape, self.settings)
        num_frames, frame_stride, image_size, shorter_side = sizes.values()
        needed = {"--num-frames": num_frames, "--frame-stride": frame_stride, "--image-size": image_size}
        missing = [option for option, value in needed.items() if value is None]
        if missing:
            raise _BadInput(
                f"neither {self._says} nor the model says what {' and '.join(missing)} should be. Give the option"
            )
        if frames not in (None, num_frames):
            raise _BadInput(f"the model takes clips of {frames} frames. Received: --num-frames {num_frames}")
        if static_size not in (None, image_size):
            raise _BadInput(
                f"the model takes frames of {height}x{width} pixels. Received: --image-size {args.image_size}"
            )
        return {
            **sizes,
            "shorter_side": shorter_side or max(image_size),
            "views": (args.clips, args.crops),
            "sampling": args.sampling,
        }


def _clip_sizes(args, clip_shape, settings):
    """Which frames a model wants: from the options, else from its shape, else from its settings; `None` if unknown."""
    frames, height, width, _ = clip_shape
    static_size = None if None in (height, width) else (height, width)
    shorter_side = args.shorter_side or settings.get("shorter_side")
    if isinstance(shorter_side, list):  # those of the training
        shorter_side = min(shorter_side)
    # The paper tests on crops as large as the shorter side, the smallest of those trained on.
    image_size = (args.image_size,) * 2 if args.image_size else static_size or (shorter_side and (shorter_side,) * 2)
    return {
        "num_frames": args.num_frames or frames or settings.get("num_frames"),
        "frame_stride": args.frame_stride or settings.get("frame_stride"),
        "image_size": image_size,
        "shorter_side": shorter_side,
    }


def _load_keras(path):
    if not os.path.exists(path):
        raise _BadInput(f"MODEL does not exist. Received: MODEL={path!r}")
    if not os.path.isfile(path) or not path.endswith(".keras"):
        raise _BadInput(f"MODEL must be a .keras file or an exported SavedModel. Received: MODEL={path!r}")

    import keras

    import keras_nonlocal.applications  # noqa: F401  registers the layers

    with _loading(path):
        model = keras.saving.load_model(path, compile=False)
        shapes = [tuple(tensor.shape) for tensor in (*model.inputs, *model.outputs)]
    if [len(shape) for shape in shapes] != [5, 2]:
        raise _BadInput(
            "MODEL must take clips (batch, frames, height, width, 3) and give scores (batch, classes). "
            f"Received: MODEL={path!r} with the shapes {shapes}"
        )
    return model


@contextlib.contextmanager
def _loading(path):
    try:
        yield
    except Exception as error:  # a file that is no model can fail anywhere in the loaders
        raise _BadInput(f"cannot load {path}: {error}") from error


def _settings_path(model_path):
    return pathlib.Path(f"{str(model_path).rstrip('/')}.json")


def _read_settings(model_path):
    path = _settings_path(model_path)
    if not path.exists():
        return {}
    with _loading(path):
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {name: settings[name] for name in SETTINGS}


# Errors and files


class _BadInput(Exception):
    """What the user can mend, in one line."""


class _Given(argparse.Action):
    """Stores a value, and that the option was given; of one that takes any number, all that it was given."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest) or [] if self.nargs == "+" else None
        setattr(namespace, self.dest, values if before is None else [*before, *values])
        if self.option_strings:
            namespace.given = (*namespace.given, self.option_strings[-1])


class _GivenFlag(_Given):
    """Stores true, likewise."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, default=False, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, True, option_string)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise _BadInput(message)  # instead of the usage and an exit


@contextlib.contextmanager
def _reported_as_bad_input():
    """The package's own words on bad arguments and data become the command's error line."""
    import tensorflow as tf

    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise _BadInput(error) from error
    except tf.errors.OpError as error:
        # Errors inside of tf.data and of file systems arrive wrapped in a graph's traceback.
        reason = re.search(r"No video could be decoded: .*|No space left on device", str(error))
        if reason is None:
            raise
        raise _BadInput(reason.group()) from error


def _check_out(out, overwrite, suffix):
    """Before the work, not after it."""
    if out.suffix != suffix:
        raise _BadInput(f"--out must end with {suffix}. Received: --out {out}")
    if out.exists() and not overwrite:
        raise _BadInput(f"--out exists; --overwrite replaces it. Received: --out {out}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise _BadInput(f"--out must be a file in a folder that can be written to. Received: --out {out}")


# Options


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer. Received: {text!r}")
    return int(text)


def _rate(text):
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number. Received: {text!r}")
    return rate


def _clip_position(text):
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be a frame, a row and a column, such as 0,112,80. Received: {text!r}")
    return tuple(map(int, parts))


def _parser():
    parser = _Parser(
        prog="keras-nonlocal",
        description="Trains, evaluates, applies and exports video classifiers with non-local blocks.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data_help = "folder of videos, a sub-folder for every class or with --annotations, or of shards"
    model_help = "a .keras file, or a folder that `keras-nonlocal export` wrote"

    train = _command(commands, "train", _train, "trains a network on a folder of videos")
    # With a recipe only what is given counts, not the defaults.
    train.set_defaults(given=())
    train.register("action", None, _Given)
    train.register("action", "store_true", _GivenFlag)
    train.add_argument("data", metavar="DATA", help=data_help)
    _annotation_options(train)
    train.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"recipe of the paper ({', '.join(RECIPES)}) or a YAML file, with --run-dir or --dry-run; "
        "of the options below, those that are given replace its values",
    )
    train.add_argument(
        "--set", nargs="+", metavar="KEY=VALUE", help="keys of the recipe to change, such as batch_size=16"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print what the recipe takes: parameters, memory, schedule; no training"
    )
    train.add_argument(
        "--run-dir", metavar="DIR", help="folder of a training by a recipe: checkpoints, logs; goes on where it was"
    )
    train.add_argument(
        "--checkpoint-steps",
        type=_positive,
        default=1000,
        metavar="N",
        help="steps between the checkpoints of --run-dir (default: %(default)s)",
    )
    train.add_argument("--out", metavar="MODEL.keras", help="file to write (with --run-dir by default in it)")
    train.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    train.add_argument("--model", choices=NETWORKS, default="i3d_resnet50", help="network (default: %(default)s)")
    train.add_argument("--non-local", type=int, metavar="N", help="non-local blocks: 0, 1, 5 (default) or 10")
    train.add_argument("--pairwise", choices=PAIRWISE, help="pairwise function (default: embedded_gaussian)")
    train.add_argument("--weights", metavar="PATH", help="weights to start from: a file of Keras or of another project")
    train.add_argument("--new-head", action="store_true", help="new head, as the weights are of other classes")
    _training_clips(train)
    train.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="clips in a batch (default: %(default)s)"
    )
    train.add_argument(
        "--epochs", type=_positive, default=10, metavar="N", help="passes over the videos (default: %(default)s)"
    )
    train.add_argument("--learning-rate", type=_rate, default=0.01, metavar="R", help="of SGD (default: %(default)s)")
    train.add_argument(
        "--validation-split", type=float, default=0.0, metavar="F", help="fraction kept for validation (default: none)"
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")

    tune = _command(commands, "tune", _tune, "searches for the best network within a budget")
    tune.add_argument("data", metavar="DATA", help=data_help)
    _annotation_options(tune)
    tune.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the trials and the best model; goes on where it was"
    )
    tune.add_argument("--networks", nargs="+", choices=NETWORKS, help="networks to try (default: all)")
    tune.add_argument(
        "--non-local", nargs="+", type=int, metavar="N", help="numbers of non-local blocks to try (default: all)"
    )
    tune.add_argument("--pairwise", nargs="+", choices=PAIRWISE, help="pairwise functions to try (default: all)")
    tune.add_argument("--max-parameters", type=_rate, metavar="N", help="most parameters of a network, such as 2e6")
    tune.add_argument("--max-gmacs", type=_rate, metavar="X", help="most multiply-adds for a clip, in 10^9")
    tune.add_argument(
        "--method", choices=TUNING_METHODS, default="random", help="how trials are chosen (default: %(default)s)"
    )
    tune.add_argument(
        "--max-trials", type=_positive, default=10, metavar="N", help="networks to train (default: %(default)s)"
    )
    tune.add_argument(
        "--epochs",
        type=_positive,
        default=10,
        metavar="N",
        help="passes of each over the videos (default: %(default)s)",
    )
    for option, default in (("--learning-rate", [1e-3, 1e-1]), ("--weight-decay", [1e-6, 1e-3])):
        tune.add_argument(
            option,
            type=_rate,
            nargs=2,
            metavar=("LOW", "HIGH"),
            default=default,
            help=f"of SGD, tried within this range (default: {default[0]:g} {default[1]:g})",
        )
    _training_clips(tune)
    tune.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="clips in a batch (default: %(default)s)"
    )
    tune.add_argument(
        "--validation-split", type=float, default=0.2, metavar="F", help="fraction to judge by (default: %(default)s)"
    )
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")

    evaluate = _command(commands, "evaluate", _evaluate, "measures a model over several views of each video")
    evaluate.add_argument("model", metavar="MODEL", help=model_help)
    evaluate.add_argument("data", metavar="DATA", help=data_help)
    _annotation_options(evaluate)
    _views(evaluate, clips=10, crops=3)
    evaluate.add_argument(
        "--fully-convolutional",
        action="store_true",
        help="score whole frames at every position of the crop of --image-size (default: as trained), without --crops",
    )
    evaluate.add_argument(
        "--view-reduction",
        choices=VIEW_REDUCTIONS,
        default="mean",
        help="from the scores of the views to those of the video (default: %(default)s)",
    )
    evaluate.add_argument("--out", metavar="DIR", help="also write the figures, the tables and the confusion matrix")
    evaluate.add_argument("--resume", metavar="FILE", help="keep the scores of videos here, and take those that it has")
    evaluate.add_argument("--json", metavar="FILE", help="also write the figures to this file")

    predict = _command(commands, "predict", _predict, "names the classes of videos")
    predict.add_argument("model", metavar="MODEL", help=model_help)
    predict.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    predict.add_argument(
        "--top-k", type=_positive, default=5, metavar="K", help="classes to print (default: %(default)s)"
    )
    predict.add_argument("--json", action="store_true", help="print a JSON object a line, for every video")
    _views(predict, clips=1, crops=1)

    inspect = _command(commands, "inspect", _inspect, "says what a collection of videos holds and draws training clips")
    inspect.add_argument("data", metavar="DATA", help=data_help)
    _annotation_options(inspect)
    inspect.add_argument(
        "--out",
        default="inspection.png",
        metavar="SHEET.png",
        help="contact sheet to write, a row a clip (default: %(default)s)",
    )
    inspect.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    inspect.add_argument(
        "--clips", type=_positive, default=12, metavar="N", help="clips on the contact sheet (default: %(default)s)"
    )
    _training_clips(inspect)
    inspect.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")

    export = _command(commands, "export", _export, "writes a model for other programs: pixels in, scores out, no Keras")
    export.add_argument("model", metavar="MODEL", help="a .keras file")
    export.add_argument(
        "out", metavar="OUT", help="the served model's folder, in which the version becomes a folder; else a file"
    )
    export.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        default="saved_model",
        help="saved_model: for TensorFlow Serving; litert: for phones and boards; onnx: with the extra of that name "
        "(default: %(default)s)",
    )
    export.add_argument(
        "--class-names", metavar="A,B,…", help="names of the scores (default: those that `train` wrote beside MODEL)"
    )
    _sizes(export)
    export.add_argument("--shorter-side", type=_positive, metavar="N", help=SHORTER_SIDE_HELP)
    export.add_argument(
        "--representative-videos", nargs="+", metavar="VIDEO", help="litert: to fit the ranges of int8 to, some hundred"
    )

    # What is not given has the default of the format's function; what is given and not the format's is an error.
    def option(flag, **kwargs):
        export.add_argument(flag, default=argparse.SUPPRESS, **kwargs)

    option("--quantization", choices=["float16", "int8"], help="litert: of the weights (default: float32)")
    option("--batch-size", type=_positive, metavar="N", help="litert: clips at a time (default: 1)")
    option("--tolerance", type=_rate, metavar="X", help="litert, onnx: accepted difference to the scores of MODEL")
    option("--version", type=_positive, metavar="N", help="saved_model: (default: one more than the highest in OUT)")
    option(
        "--views",
        type=_positive,
        nargs=2,
        metavar=("CLIPS", "CROPS"),
        help="saved_model: that the signature `views` averages (default: 10 3)",
    )
    option("--sampling", choices=SAMPLERS, help="saved_model: which frames make the clips of `views` (default: recipe)")
    option("--top-k", type=_positive, metavar="K", help="saved_model: classes that `classify` gives (default: 5)")
    option("--jit-compile", action="store_true", help="saved_model: compile the network by XLA where it is served")
    option(
        "--no-warmup",
        action="store_false",
        dest="warmup",
        help="saved_model: write no requests to warm up TensorFlow Serving",
    )

    visualize = _command(commands, "visualize", _visualize, "draws what a position of a video attends to")
    visualize.add_argument("model", metavar="MODEL", help="a .keras file")
    visualize.add_argument("video", metavar="VIDEO", help="video file")
    visualize.add_argument(
        "--out", required=True, metavar="FILE", help="file to write: .png for a strip of frames, .mp4 or .gif"
    )
    visualize.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    visualize.add_argument("--layer", metavar="NAME", help="the non-local block (default: the last)")
    visualize.add_argument(
        "--position",
        type=_clip_position,
        metavar="T,Y,X",
        help="frame, row and column of the clip that asks, from 0, after resizing and cropping "
        "(default: the most attended)",
    )
    visualize.add_argument(
        "--arrows", action="store_true", help="arrows to the strongest keys instead of all weights laid over"
    )
    visualize.add_argument(
        "--count", type=_positive, default=20, metavar="N", help="strongest keys (default: %(default)s)"
    )
    visualize.add_argument("--fps", type=_rate, metavar="R", help="frames of the clip a second (default: 4)")
    visualize.add_argument(
        "--clip", type=_positive, default=1, metavar="N", help="which of --clips, from 1 (default: %(default)s)"
    )
    visualize.add_argument(
        "--clips", type=_positive, default=1, metavar="N", help="clips of the video (default: %(default)s)"
    )
    _sizes(visualize)
    visualize.add_argument("--shorter-side", type=_positive, metavar="N", help=SHORTER_SIDE_HELP)
    _sampling(visualize)
    visualize.set_defaults(crops=1)

    verify = _command(
        commands, "verify", _verify, "runs every signature of an export in a process without Keras and this package"
    )
    verify.add_argument("model", metavar="SAVEDMODEL", help="a folder that `keras-nonlocal export` wrote")

    convert = _command(commands, "convert", _convert, "makes a weight file of another project one of Keras")
    convert.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a file of the authors' release, PySlowFast, MMAction2, torchvision …"
    )
    convert.add_argument("out", metavar="OUT", help="file to write, .weights.h5 or .keras")
    convert.add_argument("--model", choices=NETWORKS, help="network to fill (default: the one that the file is of)")

    shard = _command(
        commands, "shard", _shard, "writes videos as TFRecord files of JPEG frames, or verifies such files"
    )
    shard.add_argument("data", nargs="?", metavar="DATA", help="folder of videos")
    shard.add_argument(
        "out",
        nargs="?",
        metavar="OUT",
        help="folder to write to, also s3://… (see the extra `io`); goes on where it was",
    )
    shard.add_argument("--verify", metavar="OUT", help="compare the shards of OUT with their checksums instead")
    _annotation_options(shard)
    shard.add_argument(
        "--shorter-side", type=_positive, default=320, metavar="N", help="size of the frames (default: %(default)s)"
    )
    shard.add_argument(
        "--quality", type=_positive, default=90, metavar="N", help="of the JPEGs, to 100 (default: %(default)s)"
    )
    shard.add_argument(
        "--videos-per-shard", type=_positive, default=32, metavar="N", help="in one file (default: %(default)s)"
    )
    shard.add_argument(
        "--num-parallel-calls", type=_positive, metavar="N", help="videos decoded at a time (default: all processors)"
    )
    shard.add_argument(
        "--on-error", choices=["skip", "raise"], default="skip", help="of a broken video (default: %(default)s)"
    )
    return parser


def _command(commands, name, function, description):
    parser = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _annotation_options(parser):
    parser.add_argument(
        "--annotations", metavar="FILE", help="file that lists the videos of DATA and their classes, instead of folders"
    )
    parser.add_argument("--annotation-format", choices=FORMATS, help="its format (default: seen from its first lines)")
    parser.add_argument("--split", choices=SPLITS, help="only the rows of this split")


def _sizes(parser, num_frames=None, frame_stride=None, image_size=None):
    default = "(default: %(default)s)" if num_frames else "(default: as trained)"
    parser.add_argument(
        "--num-frames", type=_positive, default=num_frames, metavar="N", help=f"frames of a clip {default}"
    )
    parser.add_argument(
        "--frame-stride", type=_positive, default=frame_stride, metavar="N", help=f"step between them {default}"
    )
    size_default = default if num_frames else "(default: --shorter-side)"
    parser.add_argument(
        "--image-size", type=_positive, default=image_size, metavar="N", help=f"side of the square crops {size_default}"
    )


def _training_clips(parser):
    _sizes(parser, num_frames=8, frame_stride=8, image_size=224)
    parser.add_argument(
        "--shorter-side",
        type=_positive,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[256, 320],
        help="frames are resized to a random shorter side in this range before the crop (default: 256 320)",
    )
    parser.add_argument("--no-flip", action="store_true", help="never mirror a clip")


def _views(parser, clips, crops):
    _sizes(parser)
    parser.add_argument("--shorter-side", type=_positive, metavar="N", help=SHORTER_SIDE_HELP)
    parser.add_argument(
        "--clips", type=_positive, default=clips, metavar="N", help="clips of a video (default: %(default)s)"
    )
    parser.add_argument(
        "--crops", type=_positive, default=crops, metavar="N", help="crops of a clip (default: %(default)s)"
    )
    _sampling(parser)
    parser.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="views in a batch (default: %(default)s)"
    )


def _sampling(parser):
    parser.add_argument(
        "--sampling",
        choices=SAMPLERS,
        default="recipe",
        help="which frames make the clips: as in the authors' release, or otherwise (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
