"""The quickstart: its data, its claim about the gap, and the whole of it at both sizes."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import quickstart  # noqa: E402


def test_clips_show_cue_then_nothing_then_choices():
    glyphs, classes, train, _ = quickstart.load_glyphs()
    rng = np.random.default_rng(0)
    for _ in range(20):
        video, name = quickstart.render_clip(rng, glyphs, classes, train)
        colour = np.array(quickstart.COLOURS[name])
        cue, gap, question = np.split(video.astype(int), [quickstart.CUE_END, quickstart.QUESTION])
        assert cue.max() > 200 and (cue[..., 0] == cue[..., 2]).all()  # white
        assert not gap.any()
        # The answer's colour is there, and so is one other: what is there does not tell.
        brightest = question[0].reshape(-1, 3)
        scores = {
            key: (brightest.max(axis=1) > 150)[np.argmax(brightest, axis=1) == np.argmax(value)].sum()
            for key, value in quickstart.COLOURS.items()
        }
        assert scores[name] > 0 and sum(count > 0 for count in scores.values()) == 2
        assert colour.max() == 255 or colour.max() == 220


def test_train_and_test_digits_are_other_writers():
    _, classes, train, test = quickstart.load_glyphs()
    assert len(train) + len(test) == len(classes) and train.max() < test.min() and len(test) == 360


def test_no_temporal_convolution_sees_cue_and_question():
    """Frames of the clip that reach a position of the small I3D's last map, by gradient: 12, and 13 would be needed."""
    model = quickstart.applications.I3DResNet11(
        input_shape=(quickstart.NUM_FRAMES, 48, 48, 3), non_local=0, include_top=False
    )
    clip = tf.constant(np.random.default_rng(0).normal(size=(1, *model.input_shape[1:])).astype("float32"))
    reach = []
    for position in range(model.output_shape[1]):
        with tf.GradientTape() as tape:
            tape.watch(clip)
            response = tf.reduce_sum(model(clip)[:, position] ** 2)
        frames = np.abs(tape.gradient(response, clip)).sum(axis=(0, 2, 3, 4)).nonzero()[0]
        reach.append(frames.max() - frames.min() + 1)
    assert max(reach) == 12
    for start in range(quickstart.VIDEO_FRAMES - quickstart.NUM_FRAMES * quickstart.FRAME_STRIDE + 1):
        frames = start + quickstart.FRAME_STRIDE * np.arange(quickstart.NUM_FRAMES)
        last_cue = np.flatnonzero(frames < quickstart.CUE_END).max()
        first_question = np.flatnonzero(frames >= quickstart.QUESTION).min()
        assert first_question - last_cue + 1 > max(reach)


def test_only_what_is_new_trains():
    image_model = quickstart.applications.C2DResNet11(
        input_shape=(1, 48, 48, 3), temporal_strides=(1, 1, 1), non_local=0, include_top=False
    )
    trained = {
        row: sorted(
            {weight.path.split("/")[0] for weight in quickstart.build_row(row, image_model, 3).trainable_weights}
        )
        for row in quickstart.ROWS
    }
    inflated = ["res3_0_branch2a"]
    blocks = ["nonlocal_conv3_0", "nonlocal_conv3_1"]
    assert list(trained.values()) == [
        ["pred"],
        ["hidden1", "hidden2", "pred"],
        sorted([*inflated, "pred"]),
        sorted([*blocks, "pred"]),
        sorted([*inflated, *blocks, "pred"]),
    ]


def test_data_set_is_made_once_and_again_after_an_interruption(tmp_path, capsys):
    size = quickstart.Size(images=4, image_epochs=1, train_clips=2, test_clips=2, clip_epochs=1)
    quickstart.make_dataset(tmp_path, size)
    files = sorted(tmp_path.rglob("*.mp4"))
    assert len(files) == 4
    quickstart.make_dataset(tmp_path, size)
    assert "Using the data set" in capsys.readouterr().out
    strange = tmp_path / "mine"
    (strange / "images").mkdir(parents=True)
    with pytest.raises(SystemExit, match="not the quickstart's"):
        quickstart.make_dataset(strange, size)
    (tmp_path / "complete.json").unlink()  # as if the first run had been killed
    files[0].write_bytes(b"")
    quickstart.make_dataset(tmp_path, size)
    assert sorted(tmp_path.rglob("*.mp4")) == files and files[0].stat().st_size > 0


def run(tmp_path, *options):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *options]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((next(tmp_path.glob("out*")) / "results.json").read_text())


def test_quick(tmp_path):
    printed, results = run(tmp_path, "--quick")
    assert [row["name"] for row in results["rows"]] == list(quickstart.ROWS)
    assert all(row["test_videos"] == quickstart.QUICK.test_clips and row["views"] == 6 for row in results["rows"])
    assert results["export_difference"] <= 1e-5
    for name in ("results.md", "attention-1.png", "attention-2.png", "model.keras", "saved_model/1/saved_model.pb"):
        assert (tmp_path / "out-quick" / name).stat().st_size > 0
    assert keras.saving.load_model(tmp_path / "out-quick" / "model.keras").output_shape == (None, 3)
    for row in quickstart.ROWS:
        assert row in printed


@pytest.mark.slow
def test_full_quickstart(tmp_path):
    _, results = run(tmp_path)
    accuracy = {row["name"]: row["accuracy"] for row in results["rows"]}
    assert accuracy["C2D"] <= 0.65
    assert accuracy["C2D, two hidden layers in the head"] <= 0.65
    assert accuracy["C2D + 2 non-local blocks"] >= 0.90
    assert accuracy["I3D + 2 non-local blocks"] >= 0.90
    for drawn in results["attention"]:  # the cue looks at its match
        assert max(drawn["attention"], key=drawn["attention"].get) == drawn["answer"]
