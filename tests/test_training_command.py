"""`keras-nonlocal train --recipe`: the plan, the run, and what it goes on from."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

from keras_nonlocal.applications import preprocess_input
from keras_nonlocal.cli import main
from keras_nonlocal.data import video_dataset_from_directory, write_video
from keras_nonlocal.training import SGD, precise_batch_norm, read_recipe, train_recipe
from keras_nonlocal.training.batch_norm import batch_norms
from tests.test_training_distribution import environment, finish, free_port

RECIPE = """
model: c2d_resnet11
non_local: 0
weights: null
num_frames: 4
frame_stride: 1
image_size: 32
shorter_side: [32, 36]
test_image_size: 32
test_shorter_side: 32
batch_size: 4
reference_batch_size: 4
total_steps: 6
milestones: [4]
precise_batch_norm_batches: 2
"""
COLOURS = {"blue": (20, 20, 230), "red": (230, 20, 20)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(5):
            frames = np.array(colour) + rng.integers(-20, 20, (6, 32, 40, 3))
            write_video(root / name / f"{number}.mp4", frames.clip(0, 255).astype("uint8"))
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


def arguments_of(videos, recipe, run_dir):
    options = ["--recipe", recipe, "--run-dir", run_dir, "--validation-split", 0.2, "--checkpoint-steps", 2]
    return [str(argument) for argument in ("train", videos, *options)]


@pytest.fixture(scope="module")
def run_dir(videos, recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "new" / "run"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ran out of data.*")  # a validation that was not interrupted
        assert main([*arguments_of(videos, recipe, path), "--seed", "3"]) == 0
    return path


def test_a_run_leaves_its_model_recipe_and_logs(run_dir, videos, recipe):
    expected = ["checkpoints", "log.csv", "model.keras", "model.keras.json", "recipe.yaml", "run.json"]
    expected += ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    assert sorted(path.name for path in run_dir.iterdir()) == expected
    assert read_recipe(run_dir / "recipe.yaml") == read_recipe(recipe)
    assert json.loads((run_dir / "model.keras.json").read_text()) == {
        "class_names": ["blue", "red"],
        "num_frames": 4,
        "frame_stride": 1,
        "image_size": 32,
        "shorter_side": 32,
    }
    rows = _rows(run_dir / "log.csv")
    # 8 of 10 videos are 2 steps a pass; the rate falls after 4 steps.
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    np.testing.assert_allclose([float(row["learning_rate"]) for row in rows], (0.01, 0.01, 0.001), rtol=1e-6)
    assert all(0 < float(row[name]) < 10 for row in rows for name in ("loss", "val_loss"))


def test_the_model_has_precise_statistics(run_dir, videos):
    """Those of 2 batches for its last weights, of clips that the training did not see; not the moving averages."""
    model = keras.saving.load_model(run_dir / "model.keras")
    assert type(model.optimizer) is SGD
    options = read_recipe(run_dir / "recipe.yaml").clip_options
    dataset = video_dataset_from_directory(
        videos, batch_size=4, **options, seed=3, start=(10**9, 0), validation_split=0.2, subset="training"
    )
    norms = batch_norms(model)
    saved = [np.array(norm.moving_variance) for norm in norms]
    with precise_batch_norm(model, dataset.map(lambda clips, *_: preprocess_input(clips)), 2):
        for norm, value in zip(norms, saved, strict=True):
            np.testing.assert_allclose(norm.moving_variance, value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_goes_on(run_dir, videos, recipe, tmp_path, capsys):
    """From a checkpoint in the middle to the same model."""
    again = shutil.copytree(run_dir, tmp_path / "run")
    (again / "model.keras").unlink()
    for path in (again / "checkpoints").glob("step-000000006*"):
        path.unlink()
    assert main([*arguments_of(videos, recipe, again), "--seed", "3"]) == 0
    assert "Goes on after step 4" in capsys.readouterr().out
    models = [keras.saving.load_model(folder / "model.keras", compile=False) for folder in (run_dir, again)]
    for a, b in zip(*(model.weights for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_all_options_together(videos, recipe, tmp_path):
    """Goes on from the middle, too: of two steps, each of two parts."""
    options = {"gradient_accumulation_steps": 2, "ema_momentum": 0.9, "label_smoothing": 0.1, "schedule": "cosine"}
    options |= {"dtype_policy": "mixed_bfloat16", "warmup_steps": 2, "non_local": 1, "remat": "true", "batch_size": 4}
    arguments = arguments_of(videos, recipe, tmp_path / "run")
    arguments += ["--set", *(f"{key}={value}" for key, value in options.items())]
    assert main(arguments) == 0
    rows = _rows(tmp_path / "run" / "log.csv")
    assert [row["step"] for row in rows] == ["4", "8", "12"]  # parts
    rates = [(0.1 + 0.9 * min(step / 2, 1)) * 0.01 * (1 + np.cos(np.pi * step / 6)) / 2 for step in (1, 3, 5)]
    np.testing.assert_allclose([float(row["learning_rate"]) for row in rows], rates, rtol=1e-5)
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    whole = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
    for path in (tmp_path / "run" / "checkpoints").glob("step-000000012*"):
        path.unlink()
    (tmp_path / "run" / "model.keras").unlink()
    assert main(arguments) == 0
    again = keras.saving.load_model(tmp_path / "run" / "model.keras")
    for a, b in zip(again.weights, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


# Of the extra `backends`.
OTHER_BACKENDS = [name for name in ("jax", "torch") if importlib.util.find_spec(name)]
if OTHER_BACKENDS:

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", OTHER_BACKENDS)
    def test_other_backends(backend, videos, recipe, tmp_path):
        command = [sys.executable, "-c", "import sys; from keras_nonlocal.cli import main; sys.exit(main())"]
        command += arguments_of(videos, recipe, tmp_path / "run")
        result = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": backend}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert [row["step"] for row in _rows(tmp_path / "run" / "log.csv")] == ["2", "4", "6"]
        assert (tmp_path / "run" / "model.keras").exists()


def test_what_must_be_right_before_the_training(videos, recipe, run_dir, tmp_path):
    with pytest.raises(ValueError, match="must be a file `.keras` in a directory that exists. Received: out='a.h5'"):
        train_recipe(recipe, videos, tmp_path / "run", out="a.h5")
    assert not (tmp_path / "run").exists()
    broken = shutil.copytree(run_dir, tmp_path / "broken")
    (broken / "run.json").write_text("")
    with pytest.raises(ValueError, match="run.json must be as they were written: mend or delete both. Received: "):
        train_recipe(recipe, videos, broken, validation_split=0.2, seed=3, verbose=0)


@pytest.mark.slow
def test_two_workers(videos, recipe, tmp_path):
    """Two processes as on two machines, each with its share of the videos, against one process."""
    base = arguments_of(videos, recipe, tmp_path / "alone") + ["--set", "dropout=0.0", "ema_momentum=0.5"]
    assert main(base) == 0
    base[base.index(str(tmp_path / "alone"))] = str(tmp_path / "both")
    port = free_port()
    command = [sys.executable, "-c", "import sys; from keras_nonlocal.cli import main; sys.exit(main())", *base]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | environment(2, index, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    codes, outputs = finish(processes)
    assert codes == [0, 0], "\n".join(outputs)
    assert "Wrote" in outputs[0] and "Wrote" not in outputs[1]
    models = [keras.saving.load_model(tmp_path / name / "model.keras") for name in ("alone", "both")]
    # Statistics are of batches of one worker, which are smaller.
    for a, b in zip(*(model.trainable_weights for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    logs = [_rows(tmp_path / name / "log.csv") for name in ("alone", "both")]
    for alone, both in zip(*logs, strict=True):
        for name in ("epoch", "step", "loss", "accuracy", "learning_rate"):
            assert float(alone[name]) == pytest.approx(float(both[name]), abs=1e-4)


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def error_of(capsys, arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("keras-nonlocal: error: ")


def test_a_run_goes_on_as_it_began(run_dir, videos, recipe, capsys):
    arguments = arguments_of(videos, recipe, run_dir)
    assert error_of(capsys, arguments) == (
        "`run_dir` must be new or that of this training; it holds one with another seed (was 3, is 0). "
        f"Received: run_dir='{run_dir}'"
    )
    line = error_of(capsys, [*arguments, "--seed", 3, "--batch-size", 8, "--set", "dropout=0.1"])
    assert "another dropout (was 0.5, is 0.1), batch_size (was 4, is 8). Received: " in line
    assert "another class_names (was ['blue', 'red'], is ['blue', 'red', 'x'])" in error_of(
        capsys, ["train", _three(videos, run_dir), *arguments[2:], "--seed", 3]
    )


def _three(videos, run_dir):
    root = shutil.copytree(videos, run_dir.parent / "three")
    shutil.copytree(root / "red", root / "x")
    return root


def test_dry_run_reads_no_video(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / f"{name}.mp4").write_bytes(b"no video")
    options = ["--recipe", "kinetics-32x4", "--model", "i3d_resnet11", "--non-local", "2", "--pairwise", "dot_product"]
    options += ["--batch-size", "8", "--no-flip", "--dry-run"]
    options += ["--set", "gradient_accumulation_steps=4", "milestones=[0.5]"]
    assert main(["train", str(tmp_path / "data"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Found 3 files belonging to 3 classes."
    assert lines[1] == "network             i3d_resnet11, non_local=2, weights=None"
    assert "batch               8 clips: 1 worker x 4 parts x 2 clips" in lines
    assert lines[-1].split() == ["400000", "to", "799999", "0.000125", *"1066666.7 to 2133333.3".split()]
    assert lines[-2].split()[:4] == ["0", "to", "399999", "0.00125"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_options_go_before_the_recipe():
    from keras_nonlocal import cli

    options = ["--recipe", "kinetics-32x4", "--weights", "a.keras", "--pairwise", "gaussian", "--new-head", "--no-flip"]
    options += ["--shorter-side", "100", "120", "--image-size", "96", "--set", "image_size=64", "--set", "dropout=0.1"]
    args = cli._parser().parse_args(["train", "DATA", *options])
    expected = read_recipe(
        "kinetics-32x4",
        weights="a.keras",
        new_head=True,
        horizontal_flip=False,
        shorter_side=(100, 120),
        image_size=64,
        dropout=0.1,
        test_shorter_side=100,
        test_image_size=100,
        non_local_options={"normalization": None, 3: {"window": (4, None, None)}, "pairwise": "gaussian"},
    )
    assert cli._recipe(args) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "kinetics"], "the nearest: kinetics-"),
        (["--recipe", "@RECIPE"], "--recipe needs --run-dir, where the checkpoints go, or --dry-run"),
        (["--recipe", "@RECIPE", "--run-dir", "r", "--epochs", "3"], "with --recipe, --epochs is --set total_steps=…"),
        (["--recipe", "@RECIPE", "--run-dir", "r", "--learning-rate", "3"], "--learning-rate is --set learning_rate=…"),
        (["--recipe", "@RECIPE", "--run-dir", "r", "--set", "drop=1"], "the nearest: dropout. Received: 'drop'"),
        (["--recipe", "@RECIPE", "--run-dir", "r", "--set", "dropout=1"], "from 0 to below 1. Received: dropout=1"),
        (
            ["--recipe", "@RECIPE", "--run-dir", "r", "--out", "a.h5"],
            "--out must end with .keras. Received: --out a.h5",
        ),
        (["--out", "a.keras", "--run-dir", "r"], "--run-dir needs --recipe"),
        (["--out", "a.keras", "--dry-run"], "--dry-run needs --recipe"),
        (["--out", "a.keras", "--set", "dropout=1"], "--set needs --recipe"),
    ],
)
def test_wrong_options(options, message, videos, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [str(recipe) if option == "@RECIPE" else option for option in options]
    assert message in error_of(capsys, ["train", videos, *options])
    assert list(tmp_path.iterdir()) == []


def test_weights_are_asked_for(videos, tmp_path, capsys):
    options = ["--recipe", "kinetics-32x4", "--run-dir", tmp_path / "r", "--model", "c2d_resnet11", "--non-local", 1]
    assert "starts from a model that 'kinetics-8x8' has trained" in error_of(capsys, ["train", videos, *options])
    assert list(tmp_path.iterdir()) == []  # nothing that another try would have to agree with
