"""The command line, in process, on tiny rendered videos: from a folder of classes to a served model."""

import collections
import contextlib
import csv
import errno
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_nonlocal import NonLocal3D
from keras_nonlocal.applications import C2DResNet11, fully_convolutional, preprocess_input
from keras_nonlocal.cli import _Classifier, main
from keras_nonlocal.data import VideoReader, clips, load_views, write_video
from keras_nonlocal.export import read_metadata
from keras_nonlocal.visualization import attend, draw_arrows, draw_attention, write_attention_video

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"blue": (20, 20, 230), "red": (230, 20, 20)}
CLIPS = ["--num-frames", "4", "--frame-stride", "1", "--image-size", "32", "--shorter-side", "32", "36"]
TRAIN = ["--model", "c2d_resnet11", "--non-local", "1", *CLIPS, "--batch-size", "4", "--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(4):
            frames = np.array(colour) + rng.integers(-20, 20, (6, 32, 40, 3))
            write_video(root / name / f"{number}.mp4", frames.clip(0, 255).astype("uint8"))
    return root


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "colours.keras"
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        code = main(["train", str(videos), "--out", str(path), *TRAIN, "--epochs", "6"])
    assert code == 0
    messages = " ".join(str(warning.message) for warning in caught)
    assert "ran out of data" not in messages and "shuffle" not in messages
    assert f"decoded 8 videos\nWrote {path} for 2 classes: blue, red\n" in printed.getvalue()
    assert "Epoch 6/6" in printed.getvalue()
    return path


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "colours"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["export", str(trained), str(path), "--views", "2", "3"]) == 0
    assert printed.getvalue().splitlines() == [
        f"Wrote {path}/1 for 2 classes: blue, red",
        "clips of 4 frames at stride 1, resized to a shorter side of 32 and cropped to 32x32 unless "
        "they are that large",
        "serving_default: clips uint8 (any, 4, any, any, 3) -> scores float32 (any, 2)",
        "float: clips float32 (any, 4, any, any, 3) -> scores float32 (any, 2)",
        "classify: clips uint8 (any, 4, any, any, 3) -> labels string (any, 2), scores float32 (any, 2)",
        "jpeg: frames string (any, 4) -> scores float32 (any, 2)",
        "views: clips uint8 (any, any, any, any, 3) -> scores float32 (any, 2)",
        "features: clips uint8 (any, 4, any, any, 3) -> features float32 (any, 128)",
        "attention: clips uint8 (any, 4, any, any, 3), positions int32 (any, 3) -> weights float32 (any, any, 2, 2, 2)",
    ]
    return path


@pytest.fixture
def untrained(monkeypatch):
    """Training takes no time where only what surrounds it is tested."""
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **kwargs: None)


def error_of(capsys, arguments):
    """The one line that a failing command writes to stderr, its exit code having been checked."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0]
    assert lines[0].startswith("keras-nonlocal: error: ")
    return lines[0].removeprefix("keras-nonlocal: error: ")


def predictions(capsys, arguments):
    capsys.readouterr()
    assert main(["predict", "--json", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_train_writes_what_the_other_commands_need(trained, videos):
    assert sorted(path.name for path in trained.parent.iterdir()) == ["colours.keras", "colours.keras.json"]
    assert json.loads(Path(f"{trained}.json").read_text()) == {
        "class_names": ["blue", "red"],
        "num_frames": 4,
        "frame_stride": 1,
        "image_size": 32,
        "shorter_side": [32, 36],
    }
    assert keras.saving.load_model(trained).input_shape == (None, 4, None, None, 3)


def test_evaluate_prints_and_writes_the_figures(trained, videos, tmp_path, capsys):
    data = shutil.copytree(videos, tmp_path / "data")
    (data / "red" / "broken.mp4").write_bytes(b"no video")
    shutil.copy(data / "red" / "0.mp4", data / "blue" / "wrong.mp4")
    views = ["--clips", "2", "--crops", "3"]
    assert main(["evaluate", str(trained), str(data), *views, "--json", str(tmp_path / "f.json")]) == 0
    printed = capsys.readouterr().out
    # 8 of 9: Wilson's interval by hand, centre (8/9 + 1.9207/9) / (1 + 3.8415/9), half-width 0.2116.
    assert "top-1  0.8889  (95 % interval 0.5650 to 0.9801)\ntop-5  1.0000\n" in printed
    assert "9 videos, 6 views of each; decoded 9 videos; skipped 1 broken file: broken.mp4 (" in printed
    assert printed.endswith(
        "\n\nclass  videos   top-1   top-5\nblue        5  0.8000  1.0000\nred         4  1.0000  1.0000\n"
    )
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["confusion"] == [[4, 1], [0, 4]]
    assert figures["per_class"] == [0.8, 1.0]
    assert (figures["num_videos"], figures["num_views"], figures["top_1"]) == (9, 6, 8 / 9)
    assert list(figures["broken"]) == [str(data / "red" / "broken.mp4")]
    assert figures["class_names"] == ["blue", "red"]


def test_evaluate_reads_annotations(trained, videos, tmp_path, capsys):
    (tmp_path / "val.txt").write_text("blue/0.mp4 0\nblue/1.mp4 1\nred/2.mp4 1\nred/9.mp4 1\n")
    arguments = ["--annotations", str(tmp_path / "val.txt"), "--clips", "1", "--crops", "1"]
    assert main(["evaluate", str(trained), str(videos), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\n3 videos, 1 views of each; decoded 3 videos; skipped 1 wrong row of the annotations\n" in printed
    assert printed.endswith(
        "\nclass  videos   top-1   top-5\nblue        1  1.0000  1.0000\nred         2  0.5000  1.0000\n"
    )
    line = error_of(capsys, ["evaluate", trained, videos, *arguments, "--split", "val"])
    assert line == "`split` needs a format with splits; 'list' has none. Received: split='val'"


def test_train_on_several_labels_a_video(videos, tmp_path, monkeypatch):
    losses = []
    monkeypatch.setattr(keras.Model, "fit", lambda model, *args, **kwargs: losses.append(model.loss))
    (tmp_path / "charades.csv").write_text("id,actions\n0,c000 0 1;c156 0 1\n1,\n")
    arguments = ["--annotations", str(tmp_path / "charades.csv"), "--out", str(tmp_path / "m.keras"), *TRAIN]
    assert main(["train", str(videos), *arguments]) == 0
    model = keras.saving.load_model(tmp_path / "m.keras")
    assert model.output_shape == (None, 157) and model.layers[-1].activation is keras.activations.sigmoid
    assert losses == ["binary_crossentropy"]
    names = json.loads((tmp_path / "m.keras.json").read_text())["class_names"]
    assert names[0] == "c000" and len(names) == 157


class _CountedReader(VideoReader):
    """Counts how often files are opened and frames are read."""

    opened, frames = collections.Counter(), collections.Counter()

    def __init__(self, path, *args, **kwargs):
        super().__init__(path, *args, **kwargs)
        self.path_of_count = str(path)
        self.opened[str(path)] += 1

    def read(self, indices, *args, **kwargs):
        self.frames.update((self.path_of_count, int(index)) for index in indices)
        return super().read(indices, *args, **kwargs)


def test_evaluate_decodes_the_frames_of_a_video_once(trained, videos, monkeypatch, capsys):
    """30 views of 4 frames, of videos of 6 frames, each opened and each of its frames read once."""
    monkeypatch.setattr(clips, "VideoReader", _CountedReader)
    _CountedReader.opened.clear()
    _CountedReader.frames.clear()
    assert main(["evaluate", str(trained), str(videos)]) == 0
    assert "8 videos, 30 views of each" in capsys.readouterr().out
    files = {str(path) for path in videos.rglob("*.mp4")}
    assert _CountedReader.opened == dict.fromkeys(files, 1)
    assert _CountedReader.frames == {(file, index): 1 for file in files for index in range(6)}


def test_evaluate_saves_and_resumes(trained, exported, videos, tmp_path, monkeypatch, capsys):
    options = ["--clips", "2", "--resume", str(tmp_path / "scores.jsonl"), "--view-reduction", "max"]
    assert main(["evaluate", str(trained), str(videos), *options, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"Wrote {tmp_path}/out/summary.json, {tmp_path}/out/per_class.csv, " in printed
    _, *rows = map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())
    assert sorted(row["name"] for row in rows) == sorted(map(str, videos.rglob("*.mp4")))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["top_1"] == 1.0
    with open(tmp_path / "out" / "confusion.csv", newline="") as file:
        assert list(csv.reader(file)) == [["true \\ predicted", "blue", "red"], ["blue", "4", "0"], ["red", "0", "4"]]
    scored = []
    predict = _Classifier.predict_on_batch
    monkeypatch.setattr(
        _Classifier, "predict_on_batch", lambda self, clips: scored.append(len(clips)) or predict(self, clips)
    )
    assert main(["evaluate", str(trained), str(videos), *options]) == 0
    assert sum(scored) == 6 and "top-1  1.0000" in capsys.readouterr().out
    line = error_of(capsys, ["evaluate", trained, videos, *options[:-1], "mean"])
    assert "It is of another `view_reduction`: view_reduction 'max', not 'mean'." in line
    other = tmp_path / "other.keras"
    C2DResNet11(input_shape=(4, None, None, 3), classes=2, non_local=1).save(other)
    shutil.copy(f"{trained}.json", f"{other}.json")
    assert "It is of a model of other weights" in error_of(capsys, ["evaluate", other, videos, *options])
    # An export's weights are read, too.
    of_export = [*options[:2], "--resume", str(tmp_path / "export.jsonl")]
    for expected in (8 * 6, 6):
        scored.clear()
        assert main(["evaluate", str(exported), str(videos), *of_export]) == 0
        assert sum(scored) == expected
    line = error_of(capsys, ["evaluate", exported, videos, "--fully-convolutional"])
    assert line == f"--fully-convolutional needs a .keras file. Received: MODEL={str(exported)!r}"


def test_evaluate_scores_whole_frames(trained, videos, tmp_path, capsys):
    file = tmp_path / "scores.jsonl"
    options = ["--fully-convolutional", "--clips", "2", "--resume", str(file)]
    assert main(["evaluate", str(trained), str(videos), *options]) == 0
    assert "8 videos, 2 views of each" in capsys.readouterr().out
    whole = fully_convolutional(keras.saving.load_model(trained), 32)
    scores = [json.loads(line)["scores"] for line in file.read_text().splitlines()[1:]]
    for found, path in zip(scores, sorted(videos.rglob("*.mp4")), strict=True):
        views = load_views(path, 4, 1, views=(2, 1), shorter_side=32, image_size="whole")
        assert views.shape == (2, 4, 32, 40, 3)
        np.testing.assert_allclose(found, np.mean(whole(preprocess_input(views)), axis=0), atol=1e-5)


def test_evaluate_takes_several_labels_a_video(videos, tmp_path, capsys):
    """As the rows of Charades give them: the classes of a video, with their times. One of no class comes last."""
    data, model, file = tmp_path / "data", tmp_path / "model.keras", tmp_path / "scores.jsonl"
    data.mkdir()
    C2DResNet11(input_shape=(4, 32, 32, 3), classes=157, classifier_activation="sigmoid").save(model)
    actions = {"AAAAA": [3, 7], "BBBBB": [], "CCCCC": [7], "DDDDD": [0, 3]}
    rows = ["id,actions"]
    for number, (name, classes) in enumerate(actions.items()):
        shutil.copy(videos / ("red", "blue")[number % 2] / f"{number}.mp4", data / f"{name}.mp4")
        rows.append(f"{name}," + ";".join(f"c{k:03} 0.00 1.00" for k in classes))
    (tmp_path / "test.csv").write_text("\n".join(rows) + "\n")
    options = ["--annotations", tmp_path / "test.csv", "--clips", 2, "--crops", 1, "--frame-stride", 1]
    options += ["--resume", file, "--json", tmp_path / "figures.json", "--out", tmp_path / "out"]
    assert main(["evaluate", str(model), str(data), *map(str, options)]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    scores = np.array([json.loads(line)["scores"] for line in file.read_text().splitlines()[1:]])
    expected = {}
    for k in (0, 3, 7):
        order = np.array(list(actions))[np.argsort(-scores[:, k])]
        shown = [k in actions[name] for name in order if actions[name]]
        places = np.flatnonzero(shown) + 1
        expected[k] = np.mean(np.arange(1, len(places) + 1) / places)
    assert {k: value for k, value in enumerate(figures["per_class"]) if value is not None} == pytest.approx(expected)
    assert figures["mean_average_precision"] == pytest.approx(np.mean(list(expected.values())))
    printed = capsys.readouterr().out
    assert (
        f"mean average precision  {figures['mean_average_precision']:.4f}  (of 3 classes)\n4 videos, 2 views" in printed
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["per_class.csv", "summary.json"]


def test_predict_averages_the_views(trained, videos, capsys):
    files = [videos / "red" / "0.mp4", videos / "blue" / "3.mp4"]
    model = keras.saving.load_model(trained)
    results = predictions(capsys, [trained, *files, "--clips", 3, "--crops", 3, "--batch-size", 4])
    assert [result["video"] for result in results] == list(map(str, files))
    assert [result["predictions"][0]["class"] for result in results] == ["red", "blue"]
    for result, file in zip(results, files, strict=True):
        # As trained: 4 frames at stride 1, crops as large as the smallest shorter side.
        views = load_views(file, 4, 1, views=(3, 3), shorter_side=32, image_size=(32, 32))
        expected = np.mean([model(preprocess_input(view[None]))[0] for view in views], axis=0)
        scores = {entry["class"]: entry["score"] for entry in result["predictions"]}
        np.testing.assert_allclose([scores["blue"], scores["red"]], expected, atol=1e-5)


def test_predict_prints_the_best_classes(trained, videos, capsys):
    file = videos / "red" / "1.mp4"
    (result,) = predictions(capsys, [trained, file])
    assert main(["predict", str(trained), str(file), "--top-k", "1"]) == 0
    assert capsys.readouterr().out == f"{file}\n  {result['predictions'][0]['score']:.4f}  red\n"


def test_a_saved_model_gives_the_scores_of_the_keras_file(trained, exported, videos, capsys):
    """Without any option about clips: the export says what it wants."""
    metadata = read_metadata(exported)["preprocessing"]
    names = ("num_frames", "frame_stride", "image_size", "shorter_side", "views")
    assert [metadata[name] for name in names] == [4, 1, [32, 32], 32, [2, 3]]
    files = [videos / "blue" / "0.mp4", videos / "red" / "2.mp4"]
    views = ["--clips", 2, "--crops", 3, "--sampling", "even"]
    expected = predictions(capsys, [trained, *files, *views])
    for model in (exported, exported / "1"):
        results = predictions(capsys, [model, *files, *views])
        for result, entry in zip(results, expected, strict=True):
            for a, b in zip(result["predictions"], entry["predictions"], strict=True):
                assert a["class"] == b["class"] and a["score"] == pytest.approx(b["score"], abs=1e-5)
    assert [entry["predictions"][0]["class"] for entry in expected] == ["blue", "red"]
    line = error_of(capsys, ["predict", exported, files[0], "--image-size", 24])
    assert line == "the model takes frames of 32x32 pixels. Received: --image-size 24"
    line = error_of(capsys, ["predict", exported, files[0], "--num-frames", 8])
    assert line == "the model takes clips of 4 frames. Received: --num-frames 8"


def test_the_newest_version_predicts(trained, exported, videos, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "colours")
    options = ["--class-names", "azure,rose", "--jit-compile", "--no-warmup", "--sampling", "even", "--frame-stride", 2]
    assert main(list(map(str, ["export", trained, folder, *options, "--top-k", 1]))) == 0
    assert f"Wrote {folder}/2 for 2 classes: azure, rose\n" in capsys.readouterr().out
    metadata = read_metadata(folder)
    assert metadata["jit_compile"] and metadata["preprocessing"]["frame_stride"] == 2
    assert metadata["preprocessing"]["views"] == [10, 3] and metadata["preprocessing"]["sampling"] == "even"
    assert metadata["signatures"]["classify"]["outputs"]["labels"]["shape"] == [None, 1]
    assert not (folder / "2" / "assets.extra").exists()
    (result,) = predictions(capsys, [folder, videos / "red" / "0.mp4"])
    assert result["predictions"][0]["class"] == "rose"
    (result,) = predictions(capsys, [folder / "1", videos / "red" / "0.mp4"])
    assert result["predictions"][0]["class"] == "red"
    line = error_of(capsys, ["export", trained, folder, "--version", 2])
    assert line == f"The version exists, and exports are never overwritten. Received: '{folder}/2'"


def test_a_saved_model_without_names_is_evaluated(trained, videos, tmp_path, capsys):
    """Without the settings beside it, options and the model's shape say the rest."""
    bare = shutil.copy(trained, tmp_path / "bare.keras")
    assert main(["export", str(bare), str(tmp_path / "bare")]) == 0
    printed = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'bare' / '1'}\n" in printed
    assert "\nno classify: there are no class names\nno views: it needs frame_stride and image_size\n" in printed
    clips = ["--frame-stride", "1", "--image-size", "32"]
    assert main(["evaluate", str(tmp_path / "bare"), str(videos), "--clips", "1", "--crops", "1", *clips]) == 0
    assert "top-1  1.0000" in capsys.readouterr().out
    (result,) = predictions(capsys, [tmp_path / "bare", videos / "red" / "0.mp4", *clips])
    assert result["predictions"][0]["class"] == "1"
    line = error_of(capsys, ["predict", tmp_path / "bare", videos / "red" / "0.mp4"])
    file = tmp_path / "bare" / "1" / "assets" / "metadata.json"
    assert line == (
        f"neither {file} nor the model says what --frame-stride and --image-size should be. Give the option"
    )


def test_predict_scores_several_videos_in_a_batch(trained, videos, tmp_path, monkeypatch, capsys):
    """Also across a broken one; the order stays."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    good = [str(path) for path in sorted(videos.rglob("*.mp4"))]
    expected = {file: predictions(capsys, [trained, file])[0] for file in (good[0], good[4])}
    sizes = []
    predict = _Classifier.predict_on_batch
    monkeypatch.setattr(
        _Classifier, "predict_on_batch", lambda self, clips: sizes.append(len(clips)) or predict(self, clips)
    )
    for options, batches in (((), [5, 3]), (("--clips", "1", "--crops", "3"), [5, 5, 5, 5, 4])):
        sizes.clear()
        files = [*good[:2], str(tmp_path / "broken.mp4"), *good[2:]]
        assert main(["predict", "--json", str(trained), *files, "--batch-size", "5", *options]) == 1
        captured = capsys.readouterr()
        results = [json.loads(line) for line in captured.out.splitlines()]
        assert [result["video"] for result in results] == good and sizes == batches
        assert captured.err.count("Cannot decode") == 1 and len(captured.err.splitlines()) == 1
        if not options:
            for result in results:
                alone = expected.get(result["video"], result)
                for a, b in zip(result["predictions"], alone["predictions"], strict=True):
                    assert a["class"] == b["class"] and a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_predict_shows_its_progress_on_a_terminal(trained, videos, monkeypatch, capsys):
    files = [str(videos / "red" / f"{number}.mp4") for number in range(3)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["predict", str(trained), *files, "--batch-size", "2"]) == 0
    captured = capsys.readouterr()
    assert [text for text in re.split(r"\r|\x1b\[K", captured.err) if text] == [
        f"{done} of 3 videos" for done in range(3)
    ]
    assert captured.err.endswith("\r\x1b[K") and "of 3" not in captured.out  # the line is clean again


def test_verify_prints_a_row_a_signature(exported, tmp_path, capsys):
    assert main(["verify", str(exported)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [
        [name, "ok"] for name in ("serving_default", "float", "classify", "jpeg", "views", "features", "attention")
    ]
    assert re.fullmatch(
        r"serving_default  ok  \(clips uint8 \(2, 4, 35, 42, 3\) -> scores float32 \(2, 2\), \d+\.\d\d s\)", rows[0]
    )
    damaged = shutil.copytree(exported / "1", tmp_path / "1")
    (damaged / "variables" / "variables.index").unlink()
    assert main(["verify", str(damaged)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 7 and all("the process ended with code 1: " in row for row in rows)


def test_a_broken_video_does_not_stop_the_others(trained, videos, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    good = [str(videos / "red" / "0.mp4"), str(videos / "blue" / "0.mp4")]
    assert main(["predict", str(trained), good[0], str(broken), "missing.mp4", good[1]]) == 1
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if line.endswith(".mp4")] == good
    first, second = captured.err.splitlines()
    assert first.startswith(f"keras-nonlocal: error: Cannot decode {broken}: ")
    assert second == "keras-nonlocal: error: Cannot decode missing.mp4: No such file or directory"


def test_train_continues_from_weights(trained, videos, tmp_path):
    out = tmp_path / "more.keras"
    out.write_text("the old one")
    arguments = [*TRAIN, "--learning-rate", "1e-12", "--weights", str(trained), "--epochs", "1"]
    arguments += ["--validation-split", "0.25", "--no-flip", "--overwrite"]
    assert main(["train", str(videos), "--out", str(out), *arguments]) == 0
    before, after = keras.saving.load_model(trained), keras.saving.load_model(out)
    for a, b in zip(before.trainable_weights, after.trainable_weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_train_builds_the_network_asked_for(videos, tmp_path, untrained):
    out = tmp_path / "a.keras"
    options = ["--model", "i3d_resnet11", "--non-local", "1", "--pairwise", "dot_product", *CLIPS]
    assert main(["train", str(videos), "--out", str(out), *options]) == 0
    model = keras.saving.load_model(out)
    assert model.name == "i3d_resnet11" and model.output_shape == (None, 2)
    assert [layer.pairwise for layer in model.layers if isinstance(layer, NonLocal3D)] == ["dot_product"]
    assert model.get_layer("conv1").kernel.shape[0] == 5


def test_train_starts_a_new_head(trained, videos, tmp_path, untrained):
    """Of the same classes, so that only the flag tells."""
    out = tmp_path / "a.keras"
    assert main(["train", str(videos), "--out", str(out), *TRAIN, "--weights", str(trained), "--new-head"]) == 0
    before, after = keras.saving.load_model(trained), keras.saving.load_model(out)
    for a, b in zip(before.weights, after.weights, strict=True):
        same = np.array_equal(a, b)
        assert same != a.path.startswith("pred/"), a.path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train", "@DATA"], "the following arguments are required: --out"),
        (["train", "@DATA", "--out", "@OUT", "--epochs", "0"], "--epochs: must be a positive integer. Received: '0'"),
        (["train", "@DATA", "--out", "@OUT", "--learning-rate", "nan"], "--learning-rate: must be a positive number"),
        (["train", "@DATA", "--out", "a.h5"], "--out must end with .keras. Received: --out a.h5"),
        (["train", "@DATA", "--out", "missing/a.keras"], "--out must be a file in a folder that can be written to"),
        (["train", "@DATA", "--out", "@MODEL"], "--out exists; --overwrite replaces it. Received: --out @MODEL"),
        (["train", "missing", "--out", "@OUT"], "must be an existing directory. Received: directory='missing'"),
        (["train", "@DATA/red", "--out", "@OUT"], "Expected videos in the sub-directories"),
        (["train", "@DATA", "--out", "@OUT", *TRAIN, "--num-frames", "1"], "Clips must have at least 2 frames"),
        (["train", "@DATA", "--out", "@OUT", *TRAIN, "--image-size", "64"], "must not be larger than `shorter_side`"),
        (["train", "@DATA", "--out", "@OUT", *TRAIN, "--image-size", "4"], "Computed output size would be zero"),
        (["train", "@DATA", "--out", "@OUT", *TRAIN, "--non-local", "7"], "Received: non_local=7"),
        (["train", "@DATA", "--out", "@OUT", *TRAIN, "--seed", "-1"], "Seed must be between 0 and 2**32 - 1"),
        (["train", "@DATA", "--out", "@OUT", *TRAIN, "--validation-split", "2"], "Received: validation_split=2.0"),
        (["train", "@DATA", "--out", "@OUT", *TRAIN, "--weights", "no.keras"], "Received: weights='no.keras'"),
        (
            ["train", "@DATA", "--out", "@OUT", *TRAIN, "--weights", "@TEXT"],
            "`weights` must be a file of weights. The file must be a Caffe2 pickle, a torch file, safetensors",
        ),
        (
            ["train", "@OTHER", "--out", "@OUT", *TRAIN, "--weights", "@MODEL"],
            "`classes` must be the file's, or `new_head=True` (`--new-head`) given. Received: pred/bias (3,) of",
        ),
        (["evaluate", "@MODEL", "missing"], "`directory` must be an existing directory"),
        (["evaluate", "@MODEL", "@DATA", "--num-frames", "8"], "takes clips of 4 frames. Received: --num-frames 8"),
        (
            ["evaluate", "@MODEL", "@OTHER"],
            "must be sub-directories of @OTHER, which has ['a', 'b', 'c']. Received: class_names=['blue', 'red']",
        ),
        (["evaluate", "@BARE", "@OTHER", "--frame-stride", "1", "--image-size", "32"], "those of the model, 2 classes"),
        (
            ["evaluate", "@MODEL", "@DATA", "--resume", "@TEXT"],
            "`evaluate_views` wrote, or a new one; its line 1 is",
        ),
        (
            ["evaluate", "@MODEL", "@DATA", "--fully-convolutional", "--view-reduction", "vote"],
            "invalid choice: 'vote'",
        ),
        (["predict", "@TEXT", "a.mp4"], "cannot load @TEXT: File not found: filepath=@TEXT. Please ensure"),
        (["predict", "missing.keras", "a.mp4"], "MODEL does not exist. Received: MODEL='missing.keras'"),
        (["predict", __file__, "a.mp4"], "MODEL must be a .keras file or an exported SavedModel"),
        (["predict", "@DATA", "a.mp4"], "cannot load @DATA: `path` must be a folder that `export_saved_model` wrote"),
        (["verify", "@DATA"], "`path` must be a folder that `export_saved_model` wrote, or that of a version in it."),
        (["predict", "@BARE", "a.mp4"], "model says what --frame-stride and --image-size should be. Give the option"),
        (["predict", "@MODEL", "@DATA/red/0.mp4", "--image-size", "64"], "must not be larger than `shorter_side`"),
        (["predict", "@MODEL", "@DATA/red/0.mp4", "--image-size", "4"], "of the shape (1, 4, 4, 4, 3): ValueError"),
        (["predict", "@NAMES", "a.mp4"], "must be 2, as its scores. Received: class_names=['one']"),
        (["export", "@MODEL", "@DATA/red/0.mp4"], "`path` must be a folder, or not exist. Received: path='@DATA/red"),
        (["export", "@MODEL", "@OUT", "--num-frames", "8"], "`num_frames` must be the model's, 4. Received: num_fra"),
        (["export", "@MODEL", "@OUT", "--version", "0"], "--version: must be a positive integer. Received: '0'"),
        (
            ["export", "@MODEL", "@OUT", "--class-names", "a,b,c"],
            "each of the model's 2 scores. Received: class_names=['a', 'b', 'c']",
        ),
        (["visualize", "@MODEL", "@DATA/red/0.mp4"], "the following arguments are required: --out"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "a.avi"], "--out must end with .png, .mp4 or .gif. Received: --ou"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "missing/a.png"], "--out must be a file in a folder that can be"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "@OLD"], "--out exists; --overwrite replaces it. Received: --out"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--fps", "9"], "--fps needs --out with .mp4 or .gif. Rec"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "@GIF", "--fps", "200"], "of at most 100. Received: fps=200.0"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--clip", "3", "--clips", "2"], "at most --clips, 2. Rec"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--count", "0"], "--count: must be a positive integer."),
        (["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--position", "1,2"], "such as 0,112,80. Received: '1,2'"),
        (["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--position=-1,2,3"], "0,112,80. Received: '-1,2,3'"),
        (
            ["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--position", "4,0,0"],
            "`position` must be a frame, a row and a column (t, y, x) inside of (4, 32, 32). Received: position=(4, 0,",
        ),
        (
            ["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--layer", "conv1"],
            "which has ['nonlocal_conv3_1']. Received: layer_name='conv1'",
        ),
        (
            ["visualize", "@MODEL", "@VIDEO", "--out", "@PNG", "--image-size", "4"],
            "`clip` must be of a size on which the model runs. Received: clip.shape=(4, 4, 4, 3)",
        ),
        (["visualize", "@DATA", "@VIDEO", "--out", "@PNG"], "visualize needs a .keras file. Received: MODEL='@DATA'"),
        (["visualize", "no.keras", "@VIDEO", "--out", "@PNG"], "MODEL does not exist. Received: MODEL='no.keras'"),
        (["visualize", "@MODEL", "no.mp4", "--out", "@PNG"], "Cannot decode no.mp4: "),
        (["visualize", "@MODEL", "@TEXT", "--out", "@PNG"], "Cannot decode @TEXT: Invalid data"),
        (["visualize", "@BARE", "@VIDEO", "--out", "@PNG"], "says what --frame-stride and --image-size should be."),
        (["export", "@IMAGES", "@OUT"], "MODEL must take clips (batch, frames, height, width, 3) and give scores"),
    ],
)
def test_bad_input_is_one_line(arguments, message, trained, videos, tmp_path, capsys):
    paths = {"DATA": str(videos), "MODEL": str(trained), "VIDEO": str(videos / "red" / "0.mp4")}
    paths |= {name: str(tmp_path / f"a.{name.lower()}") for name in ("PNG", "GIF")}
    paths |= {"OLD": str(tmp_path / "old.png")}
    paths |= {name: str(tmp_path / name.lower()) for name in ("OUT", "BARE", "TEXT", "OTHER", "NAMES", "IMAGES")}
    paths |= {name: paths[name] + ".keras" for name in ("OUT", "BARE", "TEXT", "NAMES", "IMAGES")}
    used = " ".join(arguments)
    for name in ("a", "b", "c"):
        shutil.copytree(videos / "red", tmp_path / "other" / name)
    shutil.copy(trained, paths["BARE"])
    Path(paths["TEXT"]).write_text("no model")
    Path(paths["OLD"]).write_text("a picture")
    if "NAMES" in used:
        shutil.copy(trained, paths["NAMES"])
        settings = json.loads(Path(f"{trained}.json").read_text()) | {"class_names": ["one"]}
        Path(paths["NAMES"] + ".json").write_text(json.dumps(settings))
    if "IMAGES" in used:
        keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()]).save(paths["IMAGES"])
    before = sorted(path.name for path in tmp_path.iterdir())

    def filled(text):
        return re.sub("@([A-Z]+)", lambda match: paths[match[1]], text)

    assert filled(message) in error_of(capsys, [filled(argument) for argument in arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_single_class_is_refused(videos, tmp_path, capsys):
    shutil.copytree(videos / "red", tmp_path / "data" / "red")
    line = error_of(capsys, ["train", tmp_path / "data", "--out", tmp_path / "a.keras", *TRAIN])
    assert line == (f"a classifier needs at least 2 classes. Received: DATA='{tmp_path / 'data'}' with ['red']")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_no_decodable_video_is_one_sentence(command, trained, tmp_path, capsys):
    data = tmp_path / "data"
    for name in COLOURS:
        (data / name).mkdir(parents=True)
        (data / name / f"{name}.mp4").write_bytes(b"no video")
    arguments = {
        "train": ["train", data, "--out", tmp_path / "a.keras", *TRAIN, "--non-local", "0"],
        "evaluate": ["evaluate", trained, data],
    }
    line = error_of(capsys, arguments[command])
    assert re.fullmatch(
        r"No video could be decoded: decoded 0 videos; skipped 2 broken files: "
        r"blue\.mp4 \([^()]*\), red\.mp4 \([^()]*\)",
        line,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_full_disk_is_one_line_and_leaves_nothing(videos, tmp_path, untrained, monkeypatch, capsys):
    def save(self, path):
        Path(path).write_bytes(b"half of a model")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", save)
    line = error_of(capsys, ["train", videos, "--out", tmp_path / "a.keras", *TRAIN])
    assert line == "[Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_interrupted_training_leaves_the_old_model(videos, tmp_path, monkeypatch, capsys):
    def fit(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "fit", fit)
    out = tmp_path / "a.keras"
    out.write_text("the old one")
    assert main(["train", str(videos), "--out", str(out), *TRAIN, "--overwrite"]) == 130
    assert capsys.readouterr().err == "\nkeras-nonlocal: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.keras"] and out.read_text() == "the old one"


def test_a_programming_error_keeps_its_traceback(videos, tmp_path, monkeypatch):
    def fit(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(keras.Model, "fit", fit)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(videos), "--out", str(tmp_path / "a.keras"), *TRAIN])


def test_a_model_of_a_fixed_size_says_its_size(tmp_path, videos, capsys):
    path = tmp_path / "fixed.keras"
    C2DResNet11(input_shape=(4, 32, 32, 3), classes=2).save(path)
    file = videos / "red" / "0.mp4"
    (result,) = predictions(capsys, [path, file, "--frame-stride", 1])
    assert sum(entry["score"] for entry in result["predictions"]) == pytest.approx(1, abs=1e-5)
    line = error_of(capsys, ["predict", path, file, "--frame-stride", 1, "--image-size", 24])
    assert line == "the model takes frames of 32x32 pixels. Received: --image-size 24"


def test_visualize_draws_a_clip(trained, videos, tmp_path, capsys):
    """The third of three clips, by its settings, as `attend` and the drawings have it."""
    video = videos / "red" / "1.mp4"
    model = keras.saving.load_model(trained)
    clip = load_views(video, 4, 1, views=(3, 1), shorter_side=32, image_size=(32, 32))[2]
    asked, most = attend(model, clip, (2, 20, 9)), attend(model, clip)
    write_attention_video(clip, most, tmp_path / "expected.gif", fps=8, count=20)
    options = {
        "heat.png": ["--position", "2,20,9", "--layer", "nonlocal_conv3_1"],
        "arrows.png": ["--arrows", "--count", "3"],
        "arrows.gif": ["--arrows", "--fps", "8"],
    }
    printed = {}
    for name, given in options.items():
        arguments = ["visualize", trained, video, "--out", tmp_path / name, "--clip", 3, "--clips", 3, *given]
        assert main(list(map(str, arguments))) == 0
        printed[name] = capsys.readouterr().out.splitlines()
    for name, picture in (
        ("heat.png", draw_attention(clip, asked)),
        ("arrows.png", draw_arrows(clip, most, count=3)),
    ):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), np.asarray(picture))
    assert (tmp_path / "arrows.gif").read_bytes() == (tmp_path / "expected.gif").read_bytes()
    first, second, *rows, last = printed["heat.png"]
    assert first == "layer nonlocal_conv3_1; position 2,20,9 (frame, row, column)"
    assert second == "its 8 strongest keys of 8: frame, row, column, weight"
    centres, weights = asked.strongest()
    table = np.array([row.split() for row in rows], float)
    np.testing.assert_allclose(table[:, :3], centres)
    np.testing.assert_allclose(table[:, 3], weights, rtol=1e-4)
    assert last == f"Wrote {tmp_path / 'heat.png'}"
    position = ",".join(map(str, most.position))
    first, second, *rows, _ = printed["arrows.png"]
    assert first == f"layer nonlocal_conv3_1; position {position} (frame, row, column), the most attended"
    assert second == "its 3 strongest keys of 8: frame, row, column, weight" and len(rows) == 3


COMMANDS = "train evaluate predict visualize tune inspect export verify convert shard".split()


def test_help_names_every_command(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: keras-nonlocal {command}" in capsys.readouterr().out


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "keras_nonlocal.cli", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("train", "evaluate", "predict", "export", "verify"))
