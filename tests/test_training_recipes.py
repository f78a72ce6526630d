"""The shipped recipes against the numbers of the paper and of the authors' release; files that change them; the
networks and plans that come of them."""

import dataclasses
import re
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_nonlocal.training import RECIPES, Recipe, build_model, parse_overrides, plan_training, read_recipe
from keras_nonlocal.training.building import accuracy
from keras_nonlocal.training.recipes import CHECKS, FOLDER

SMALL = {"model": "i3d_resnet11", "non_local": 1, "weights": None, "num_frames": 4, "image_size": 32}


def small(**overrides):
    return read_recipe("kinetics-8x8", **SMALL | overrides)


# Shipped

# What all share: section 4.1 of the paper.
SHARED = {
    "non_local": 5,
    "pool1_padding": "valid",
    "dropout": 0.5,
    "horizontal_flip": True,
    "sampling": "recipe",
    "schedule": "step",
    "decay_factor": 0.1,
    "warmup_steps": 0,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "label_smoothing": 0.0,
    "gradient_accumulation_steps": 1,
    "ema_momentum": None,
    "remat": False,
    "dtype_policy": "float32",
    "jit_compile": "auto",
    "test_num_clips": 10,
    "test_num_crops": 3,
}
SHORT = {
    "model": "i3d_resnet50",
    "non_local_options": None,
    "weights": "imagenet",
    "starts_from": None,
    "new_head": False,
    "multi_label": False,
    "image_size": 224,
    "shorter_side": (256, 320),
    "test_image_size": 256,
    "test_shorter_side": 256,
    "batch_size": 64,
    "learning_rate": 0.01,
    "total_steps": 400_000,
    "milestones": (150_000, 300_000),
    "freeze_batch_norm": False,
    "precise_batch_norm_batches": 200,
}
LONG = SHORT | {
    # The release's long models have W_z = 0 in place of the normalization, and groups of 4 frames in res3.
    "non_local_options": {"normalization": None, 3: {"window": (4, None, None)}},
    "weights": None,
    "batch_size": 16,
    "learning_rate": 0.0025,
    "freeze_batch_norm": True,
    "precise_batch_norm_batches": 0,
}
FRAMES = ("num_frames", "frame_stride", "temporal_strides", "starts_from")
TABLE = {
    "kinetics-8x8": SHORT | dict(zip(FRAMES, (8, 8, (1, 1, 2), None), strict=True)),
    "kinetics-32x2": SHORT | dict(zip(FRAMES, (32, 2, (2, 2, 2), None), strict=True)),
    "kinetics-128x1": LONG | dict(zip(FRAMES, (128, 1, (2, 2, 2), "kinetics-32x2"), strict=True)),
    "kinetics-32x4": LONG | dict(zip(FRAMES, (32, 4, (1, 1, 2), "kinetics-8x8"), strict=True)),
    "charades": LONG
    | dict(zip(FRAMES, (128, 1, (2, 2, 2), "kinetics-128x1"), strict=True))
    | {
        "model": "i3d_resnet101",
        "new_head": True,
        "multi_label": True,
        "image_size": 288,
        "shorter_side": (329, 411),  # 256 and 320 times 288 / 224
        "test_image_size": 320,
        "test_shorter_side": 320,
        "batch_size": 8,
        "learning_rate": 0.00125,
        "total_steps": 200_000,
        "milestones": (75_000, 150_000),
    },
}


def test_numbers_of_the_paper():
    assert sorted(TABLE) == list(RECIPES)
    for name, expected in TABLE.items():
        recipe = dataclasses.asdict(read_recipe(name))
        # Nothing is scaled: the batch is the one that the numbers are meant for; and no warm-up starts anywhere.
        assert recipe.pop("reference_batch_size") == recipe["batch_size"]
        assert recipe.pop("warmup_factor") == 0.1
        assert recipe == SHARED | expected, name
        # The rate is 0.01 for 64 clips, everywhere.
        assert recipe["learning_rate"] == pytest.approx(0.01 * recipe["batch_size"] / 64)


def test_every_key_is_documented_and_checked():
    names = [field.name for field in dataclasses.fields(Recipe)]
    documented = re.findall(r"^        (\w+): [A-Z`]", Recipe.__doc__.split("Raises:")[0], re.MULTILINE)
    assert documented == names == list(CHECKS)
    written = re.findall(r"^(\w+):", (FOLDER / "kinetics-8x8.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(written) == sorted(names)


def test_steps_keep_the_passes():
    recipe = read_recipe("kinetics-8x8", batch_size=24, warmup_steps=1000)
    assert recipe.num_steps == 1_066_667 and recipe.scaled_milestones == (400_000, 800_000)
    assert recipe.scaled_learning_rate == pytest.approx(0.00375)
    assert recipe.num_steps * 24 == pytest.approx(400_000 * 64, rel=1e-6)
    recipe = read_recipe("kinetics-8x8", batch_size=128, total_steps=1001, milestones=[0.5])
    assert (recipe.num_steps, recipe.scaled_milestones) == (501, (250,))


def test_shares_of_a_batch():
    recipe = read_recipe("kinetics-8x8", gradient_accumulation_steps=2)
    assert [recipe.micro_batch_size(workers) for workers in (1, 2, 8)] == [32, 16, 4]
    with pytest.raises(ValueError, match="steps`, 2, times the workers, 3. Received: batch_size=64"):
        recipe.micro_batch_size(3)


def test_what_the_datasets_are_told():
    recipe = read_recipe("kinetics-32x4")
    assert recipe.clip_options == {
        "num_frames": 32,
        "frame_stride": 4,
        "image_size": 224,
        "shorter_side": (256, 320),
        "horizontal_flip": True,
        "sampling": "recipe",
    }
    modes = [recipe, read_recipe("charades"), read_recipe("kinetics-8x8", label_smoothing=0.1)]
    assert [recipe.label_mode for recipe in modes] == ["int", "multi_label", "categorical"]


# Files


def test_a_file_overrides_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: kinetics-32x4\nweight_decay: 5e-5\nlearning_rate: 1\nweights: m.keras\n")
    recipe = read_recipe(tmp_path / "mine.yaml", batch_size=32)
    assert recipe == read_recipe(
        "kinetics-32x4", weight_decay=5e-5, learning_rate=1.0, weights="m.keras", batch_size=32
    )
    assert type(recipe.learning_rate) is float
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own.yaml").write_text("base: ../mine.yaml\nshorter_side: [300, 300]\n")
    assert read_recipe(str(tmp_path / "folder" / "own.yaml")) == dataclasses.replace(
        recipe, batch_size=16, shorter_side=(300, 300)
    )
    (tmp_path / "no_base.yaml").write_text("num_frames: 16\n")
    assert read_recipe(tmp_path / "no_base.yaml") == read_recipe("kinetics-8x8", num_frames=16)


@pytest.mark.parametrize("name", RECIPES)
def test_written_and_read(name, tmp_path):
    recipe = read_recipe(name, ema_momentum=0.9999, milestones=[0.25, 0.5], weights=Path("ü.keras"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert len(recipe.to_yaml().splitlines()) >= len(CHECKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 0.1", r"mine.yaml; the nearest: learning_rate. Received: 'learning_rat'"),
        ("lr: 0.1", r"mine.yaml; the nearest: model, non_local, .*test_image_size. Received: 'lr'"),
        ("3: 0.1", r"mine.yaml; the nearest: model, .*. Received: 3"),
        ("base: kinetics-8x16", r"no such recipe or file; the nearest: .*kinetics-8x8.*Received: '.*kinetics-8x16'"),
        ("base: mine.yaml", r"`base` must not lead back to the file itself. Received: base='.*mine.yaml'"),
        ("base: [1]", r"`base` must be the name or the path of a recipe. Received: base=\[1\]"),
        ("", r"must be lines `key: value`. Received: '.*mine.yaml'"),
        ("- dropout", r"must be lines `key: value`. Received: '.*mine.yaml'"),
        ("dropout: [", r"mine.yaml must be YAML. Received: .*line 1, column 11"),
        ("dropout: 0.1\ndropout: 0.2", r"must be YAML. Received: 'dropout' stands there twice in .*line 1"),
        ("weights: !!python/object/apply:os.getcwd []", r"must be YAML. Received: could not determine a constructor"),
        ("dropout: '0.5'", r"`dropout` must be a number from 0 to below 1. Received: dropout='0.5'"),
        ("dropout: 1.0", r"Received: dropout=1.0"),
        ("momentum: .nan", r"Received: momentum=nan"),
        ("learning_rate: 0", r"`learning_rate` must be a positive number. Received: learning_rate=0"),
        ("learning_rate: .inf", r"Received: learning_rate=inf"),
        ("decay_factor: 10", r"`decay_factor` must be a positive number of at most 1. Received: decay_factor=10"),
        ("total_steps: 1e5", r"`total_steps` must be an integer of at least 1. Received: total_steps=100000.0"),
        ("num_frames: true", r"`num_frames` must be an integer of at least 1. Received: num_frames=True"),
        ("nesterov: 1", r"`nesterov` must be one of True, False. Received: nesterov=1"),
        ("multi_label: 'yes'", r"Received: multi_label='yes'"),
        ("jit_compile: on_gpu", r"`jit_compile` must be one of 'auto', True, False. Received: jit_compile='on_gpu'"),
        ("model: i3d", r"`model` must be one of 'c2d_resnet11', .*'i3d_resnet101'. Received: model='i3d'"),
        ("schedule: steps", r"'step', 'cosine', 'constant'. Received: schedule='steps'"),
        ("shorter_side: 256", r"`shorter_side` must be a pair \(low, high\).*Received: shorter_side=256"),
        ("shorter_side: [320, 256]", r"Received: shorter_side=\(320, 256\)"),
        ("shorter_side: [200, 256]", r"larger than `shorter_side`, \(200, 256\). Received: image_size=224"),
        ("test_image_size: 257", r"than `test_shorter_side`, 256. Received: test_image_size=257"),
        ("milestones: [300000, 150000]", r"below `total_steps`, 400000, or .* Received: milestones=\(300000, 150000\)"),
        ("milestones: [400000]", r"below `total_steps`, 400000, or .* Received: milestones=\(400000,\)"),
        ("milestones: [1.5]", r"`milestones` must be a list of steps .*Received: milestones=\(1.5,\)"),
        ("warmup_steps: 400000", r"below `total_steps`, 400000. Received: warmup_steps=400000"),
        ("gradient_accumulation_steps: 5", r"`gradient_accumulation_steps`, 5. Received: batch_size=64"),
        ("temporal_strides: [1, 2]", r"`temporal_strides` must be `None` or 3 integers.*=\(1, 2\)"),
        ("non_local: five", r"`non_local` must be an integer or a dictionary. Received: non_local='five'"),
        ("ema_momentum: 1", r"`ema_momentum` must be `None` or a number from 0 to below 1. Received: ema_momentum=1"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_wrong_names(tmp_path):
    with pytest.raises(ValueError, match="the nearest: kinetics-8x8.* Received: 'kinetics8x8'"):
        read_recipe("kinetics8x8")
    with pytest.raises(ValueError, match="Unknown key in the arguments; the nearest: dropout. Received: 'drop_out'"):
        read_recipe("charades", drop_out=0.1)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be a text file in UTF-8. Received: '.*a.yaml'"):
        read_recipe(tmp_path / "a.yaml")


def test_overrides_of_a_command_line():
    texts = ["weight_decay=1e-5", "non_local_options={scale: null, 3: {window: [2, null, null]}}", "weights=a=b.keras"]
    assert parse_overrides(texts) == {
        "weight_decay": 1e-5,
        "non_local_options": {"scale": None, 3: {"window": [2, None, None]}},
        "weights": "a=b.keras",
    }
    for text, message in (
        (["dropout"], "Overrides must be `key=value`, each key once. Received: 'dropout'"),
        (["dropout=0", "dropout=1"], "each key once. Received: 'dropout=1'"),
        (["drop=0"], "Unknown key in the overrides; the nearest: dropout. Received: 'drop'"),
        (["dropout=["], "`dropout` must be YAML. Received: while parsing"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_overrides(text)


# Networks


def test_the_network_of_a_recipe(policy):
    policy("float64")
    model = build_model(small(dtype_policy="mixed_bfloat16", dropout=0.25, weight_decay=0.01, jit_compile=False), 3)
    assert keras.config.dtype_policy().name == "float64"  # as it was
    assert model.name == "i3d_resnet11" and model.input_shape == (None, 4, None, None, 3)
    assert model.get_layer("conv1").dtype_policy.name == "mixed_bfloat16"
    assert model.get_layer("dropout").rate == 0.25
    assert model.optimizer.coupled_weight_decay == 0.01
    assert model.get_layer("pred").activation is keras.activations.softmax
    assert len([layer for layer in model.layers if layer.name.startswith("nonlocal")]) == 1


@pytest.mark.slow
def test_losses(rng):
    """Cross-entropies by hand, for scores that all are 1 / 3 or 1 / 2."""
    x = np.zeros((2, 4, 32, 32, 3), "float32")
    cases = (
        ({}, np.array([0, 2]), np.log(3)),
        ({"label_smoothing": 0.3}, np.eye(3, dtype="float32")[[0, 2]], np.log(3)),
        ({"multi_label": True}, np.ones((2, 3), "float32"), np.log(2)),
    )
    for options, y, expected in cases:
        model = build_model(small(**options), 3)
        model.get_layer("pred").kernel.assign(np.zeros((128, 3)))
        assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(expected, rel=1e-5)
    smoothed = build_model(small(label_smoothing=0.3), 3).loss
    scores, label = np.array([[0.7, 0.2, 0.1]], "float32"), np.array([[1.0, 0.0, 0.0]], "float32")
    expected = -(0.8 * np.log(0.7) + 0.1 * np.log(0.2) + 0.1 * np.log(0.1))
    assert float(smoothed(label, scores)) == pytest.approx(expected, rel=1e-5)


def test_weights_that_a_recipe_starts_from(tmp_path):
    """A model of short clips, then one of long clips from it: the same scores at the start, BN frozen."""
    short = build_model(small(), 3)
    rng = np.random.default_rng(0)
    for weight in short.get_layer("nonlocal_conv3_1").weights:  # a block that does something
        weight.assign(rng.uniform(0.5, 1.0, weight.shape))
    short.save(tmp_path / "short.keras")
    long = {"model": "i3d_resnet11", "non_local": 1, "num_frames": 4, "image_size": 32, "non_local_options": None}
    options = long | {"non_local_options": {"normalization": None}}
    with pytest.raises(ValueError, match="starts from a model that 'kinetics-8x8' has trained: give .*weights=None"):
        build_model(read_recipe("kinetics-32x4", **options), 3)
    model = build_model(read_recipe("kinetics-32x4", **options, weights=tmp_path / "short.keras"), 3)
    clips = rng.normal(size=(1, 4, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(model.predict(clips, verbose=0), short.predict(clips, verbose=0), rtol=1e-4, atol=1e-5)
    assert not {weight.name for weight in model.trainable_weights} & {"gamma", "beta"}
    assert model.get_layer("nonlocal_conv3_1").norm is None
    with pytest.raises(ValueError, match=r"frozen at γ = 0 they never learn. Received: \['nonlocal_conv3_1'\]"):
        build_model(read_recipe("kinetics-32x4", **long, weights=None, starts_from=None), 3)
    # With a normalization that comes from the weights it learns.
    build_model(read_recipe("kinetics-32x4", **long, weights=tmp_path / "short.keras"), 3)


# Plans


def test_plan():
    recipe = small(batch_size=16, gradient_accumulation_steps=2, total_steps=100, milestones=[50], warmup_steps=10)
    plan = plan_training(recipe, 3, num_videos=80, num_workers=2)
    model = build_model(recipe, 3)
    assert len(plan.decayed) + len(plan.not_decayed) == len(model.trainable_weights) and plan.frozen == ()
    assert {path.split("/")[-1] for path in plan.not_decayed} == {"gamma", "beta"}
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    # Weights; gradients, momentum and accumulated gradients. Activations of 4 clips a worker.
    assert plan.state_bytes == 4 * (model.count_params() + 3 * trained)
    assert plan.activation_bytes == 4 * plan.summary.activation_bytes
    assert [stage[:2] for stage in plan.stages] == [(0, 39), (40, 199), (200, 399)]
    np.testing.assert_allclose(
        [stage[2:] for stage in plan.stages],
        [(0.00025, 0.0025 * (0.1 + 0.9 * 39 / 40)), (0.0025, 0.0025), (0.00025, 0.00025)],
        rtol=1e-5,
    )
    lines = str(plan).splitlines()
    assert "batch               16 clips: 2 workers x 2 parts x 4 clips" in lines
    assert lines[-2].split() == ["40", "to", "199", "0.0025", "8.0", "to", "40.0"]
    frozen = plan_training(dataclasses.replace(recipe, freeze_batch_norm=True, dtype_policy="mixed_bfloat16"), 3)
    assert frozen.not_decayed == () and sorted(frozen.frozen) == sorted(plan.not_decayed)
    assert frozen.activation_bytes * 2 == 8 * plan.summary.activation_bytes  # halves, of 8 clips
    assert str(frozen).splitlines()[-1].split() == ["200", "to", "399", "0.00025"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    # architecture.md; without the normalization of the five blocks there are 2 (2 x 512 + 3 x 1024) parameters less.
    [
        ("kinetics-8x8", 35.40, 36.24),
        ("kinetics-32x2", 35.40, 40.96),
        ("kinetics-32x4", 35.39, None),
        ("kinetics-128x1", 35.39, None),
        ("charades", None, None),
    ],
)
def test_plans_of_the_paper(name, parameters, macs):
    plan = plan_training(read_recipe(name), classes=400)
    if parameters:
        assert round(plan.summary.parameters / 1e6, 2) == parameters
    if macs:
        assert round(plan.summary.macs / 1e9, 2) == macs
    assert bool(plan.frozen) == (name not in ("kinetics-8x8", "kinetics-32x2"))
    print(plan)


def test_accuracy_of_several_labels():
    """Each score by itself: all but one of six are on their side of 0.5. The highest of each would be wrong."""
    metric = accuracy(multi_label=True)
    metric.update_state([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[0.6, 0.4, 0.9], [0.1, 0.7, 0.8]])
    assert metric.name == "accuracy" and float(metric.result()) == pytest.approx(5 / 6)
    assert accuracy(multi_label=False) == "accuracy"
