"""The ablation: its clips, its intervals, what its networks can see, and that a stopped run goes on where it was."""

import json
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import ablation  # noqa: E402

# --- The clips --------------------------------------------------------------------------------------------------------


def test_answers_are_what_the_clips_show():
    """Digits are replaced by squares whose brightness tells their class, and which of its two pictures it is."""
    classes = np.arange(20) % 10
    brightness = 0.4 + 0.05 * classes + 0.02 * (np.arange(20) >= 10)
    glyphs = np.broadcast_to(brightness[:, None, None], (20, ablation.GLYPH, ablation.GLYPH))
    rng = np.random.default_rng(0)
    seen = {question: set() for question in ablation.QUESTIONS}
    for _ in range(100):
        clip, answers = ablation.render_clip(rng, glyphs, classes, np.arange(20), gap=5)
        cue, gap, question = np.split(clip.astype(int), [3, 8])
        assert len(question) == 2 and (question[0] == question[1]).all() and not gap.any()
        pictures = {np.abs(frame.max() / 255 - brightness).argmin() for frame in cue}
        assert len(pictures) == 1 and (cue[..., 0] == cue[..., 2]).all()  # one picture, in white
        (picture,) = pictures
        assert answers["digit"] == classes[picture]
        places = [np.nonzero(frame[..., 0])[1].mean() for frame in cue]
        steps = np.diff(places)
        assert (steps == (4 if answers["motion"] else -4)).all()
        # Of each colour that is there: the picture by the brightness of the largest channel.
        shown = {}
        for number, colour in enumerate(ablation.COLOURS):
            there = (question[0].argmax(axis=-1) == np.argmax(colour)) & question[0].any(axis=-1)
            if there.any():
                assert there.sum() == ablation.GLYPH**2  # the two do not cover each other
                shown[number] = np.abs(question[0][there].max() / max(colour) - brightness).argmin()
        assert len(shown) == 2
        matches = [number for number, other in shown.items() if classes[other] == classes[picture]]
        assert matches == [answers["recall"]] and shown[answers["recall"]] != picture  # the same class, another picture
        for name, answer in answers.items():
            seen[name].add(answer)
    assert {name: len(values) for name, values in seen.items()} == ablation.QUESTIONS


def test_backwards_the_frames_of_a_cue_are_the_same_frames():
    """Where the white digit is says nothing of where it went: first places to the right are last places to the left."""
    clips, answers = ablation.render_clips(0, 2000, "train", 1)
    lefts = clips[:, :3].max(axis=(1, 2, 4)).argmax(axis=-1)  # the leftmost lit column of the cue
    by_motion = [lefts[answers["motion"] == motion] for motion in (0, 1)]
    assert abs(by_motion[0].mean() - by_motion[1].mean()) < 4 * lefts.std() * (4 / 2000) ** 0.5
    assert abs(len(by_motion[0]) - 1000) < 4 * 500**0.5


def test_train_and_test_digits_are_other_writers():
    _, classes, train, test = ablation.load_glyphs()
    assert len(train) + len(test) == len(classes) and train.max() < test.min() and len(test) == 360


# --- The networks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_model():
    keras.utils.set_random_seed(0)
    return ablation.pretrain(ablation.QUICK, 0)


def test_reach_by_hand():
    x = keras.Input((32, 4, 4, 1))
    y = keras.layers.Conv3D(1, (3, 1, 1), strides=(2, 1, 1))(x)  # 3 frames, one position every 2
    y = keras.layers.MaxPooling3D((2, 1, 1), strides=(2, 1, 1))(y)  # 3 + 2, every 4
    y = keras.layers.Conv3D(1, 3)(y)  # 5 + 2 × 4
    assert ablation.reach(keras.Model(x, y)) == 13


@pytest.mark.parametrize("inflation", ["3x1x1", "3x3x3"])
def test_no_temporal_convolution_sees_cue_and_question(inflation):
    """Frames that reach a position of the last map, by gradient."""
    model = ablation.build_features(ablation.Row(inflation=inflation), ablation.FRAMES)
    maps = keras.Model(model.inputs[0], model.layers[-1].input)
    clip = tf.constant(np.random.default_rng(0).normal(size=(1, *model.input_shape[1:])).astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(clip)
        response = tf.reduce_sum(maps(clip)[:, ablation.FRAMES // 2] ** 2)
    frames = np.abs(tape.gradient(response, clip)).sum(axis=(0, 2, 3, 4)).nonzero()[0]
    assert frames.max() - frames.min() + 1 == ablation.reach(model) == 9
    # From the last frame of the cue to the first of the question, both counted.
    for gap in (ablation.GAP, ablation.LONG_GAP):
        assert ablation.reach(model) < gap + 2
    assert ablation.reach(ablation.build_features(ablation.Row(), ablation.FRAMES)) == 1


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("C2D, hidden layers", ["hidden1", "hidden2"]),
        ("3 blocks", ["nonlocal_conv2_0", "nonlocal_conv3_0", "nonlocal_conv3_1"]),
        ("I3D 3×3×3", ["res2_0_branch2b", "res3_0_branch2b"]),
        ("NL I3D, long", ["nonlocal_conv3_0", "nonlocal_conv3_1", "res2_0_branch2a", "res3_0_branch2a"]),
    ],
)
def test_only_what_is_new_trains_and_on_the_features_of_what_is_not(name, new, image_model):
    row = ablation.ROWS[name]
    model = ablation.build_row(row, image_model)
    trained = {weight.path.split("/")[0] for weight in model.trainable_weights}
    assert trained == {*new, *ablation.QUESTIONS}
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:  # as trained: blocks no longer return what they get
        weight.assign(weight + 0.05 * rng.normal(size=weight.shape).astype("float32"))
    layer = ablation.last_frozen(row)
    features = ablation.Features(image_model, ablation.QUICK, 0)
    _, (x, _) = features.get(row.frames, layer)
    rest = keras.Model(model.get_layer(layer).output, model.output)
    clips, _ = ablation.render_clips((0, 2), ablation.QUICK.test_clips, "test", row.frames - 5)
    clips = ablation.applications.preprocess_input(clips)
    whole = ablation.predict(model, clips)
    for question, scores in ablation.predict(rest, x).items():
        np.testing.assert_allclose(scores, whole[question], atol=1e-5)
    # Backwards: without temporal convolutions the same, so nothing tells which way the digit moved.
    backwards = ablation.predict(model, clips[:, ::-1])
    difference = max(np.abs(backwards[question] - whole[question]).max() for question in ablation.QUESTIONS)
    assert difference > 1e-2 if row.inflation else difference < 1e-5


# --- Intervals --------------------------------------------------------------------------------------------------------


def test_interval_by_hand():
    # Means of seeds 1/2 and 1, of clips 1 and 1/2: both have variance 1/8, and Student's t is 12.706 for two.
    mean, low, high = ablation.interval([[1, 0], [1, 1]])
    half = (2 * 12.706205**2 * 0.125 / 2) ** 0.5
    assert (mean, low, high) == pytest.approx((0.75, 0.75 - half, 0.75 + half), abs=1e-5)
    # Seeds that agree: 4 clips with variance 1/3, for which it is 3.182.
    mean, low, high = ablation.interval([[1, 0, 1, 0]] * 3)
    half = 3.182446 * (1 / 12) ** 0.5
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)
    assert ablation.interval([[1, 1], [1, 1]]) == (1.0, 1.0, 1.0)


def test_interval_of_accuracy_stays_inside_and_is_no_narrower_than_wilsons():
    low, high = ablation.wilson_interval(30, 30)
    assert ablation.accuracy_interval(np.ones((3, 30))) == (1.0, pytest.approx(low), pytest.approx(high))
    right = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])  # seeds that contradict each other
    assert ablation.accuracy_interval(right) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_interval_covers_the_truth(spread):
    """3 seeds and 50 clips, 1000 times: of accuracies whose mean over all seeds and clips is 1/2 by symmetry."""
    rng = np.random.default_rng(0)
    covered, naive = 0, 0
    for _ in range(1000):
        odds = rng.normal(size=(3, 1)) * spread + rng.normal(size=(1, 50)) * 1.5
        right = rng.random((3, 50)) < 1 / (1 + np.exp(-odds))
        _, low, high = ablation.interval(right)
        covered += low <= 0.5 <= high
        naive += abs(right.mean() - 0.5) <= 1.96 * right.std() / right.size**0.5
    assert covered / 1000 >= 0.94
    assert naive / 1000 <= (0.6 if spread else 0.92)  # as if all values were independent


# --- Tables and report ------------------------------------------------------------------------------------------------


def test_tables_name_rows_that_are_there():
    named = {entry[0] for _, _, entries, _ in ablation.TABLES for entry in entries}
    assert named == set(ablation.ROWS)
    for size in (ablation.FULL, ablation.QUICK):
        for name in size.rows:
            assert ablation.ROWS[name].against in (None, *size.rows)


@pytest.fixture
def made_up(tmp_path):
    """Rows of runs that are known: without the block half of 40 clips right, with it 36; motion as before."""
    runs = ablation.Runs(tmp_path / "runs.json", {})
    half = "01" * 20
    for name, recall, macs in (("C2D", half, 100), ("embedded Gaussian", "1111111110" * 4, 250)):
        for seed in range(2):
            right = {"recall": recall, "motion": half, "digit": recall}
            costs = {"parameters": 1000, "trained": 10, "macs": macs, "processor_seconds": 30.0}
            runs.add(name, seed, {"right": right} | costs)
    size = ablation.dataclasses.replace(ablation.QUICK, rows=("C2D", "embedded Gaussian"))
    return ablation.collect(runs, size)


def test_table_of_made_up_runs(made_up):
    with_block = made_up["embedded Gaussian"]
    assert with_block["accuracy"]["recall"][0] == 0.9 and with_block["by_seed"]["recall"] == [0.9, 0.9]
    assert with_block["difference"]["recall"][0] == pytest.approx(0.4)
    text = ablation.table(*ablation.TABLES[0], made_up)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 3  # the rows that were not run are left out
    low, high = (100 * value for value in with_block["accuracy"]["recall"][1:])
    assert lines[2].startswith(f"| embedded Gaussian | 1.00× | 2.50× | 90.0 ({low:.1f} – {high:.1f}) | 50.0 (")
    assert lines[2].endswith("| *72.7* |")


def test_differences_and_verdicts_of_made_up_runs(made_up):
    *_, line = ablation.table_of_differences(made_up).splitlines()
    name, against, recall, motion, _ = (cell.strip() for cell in line.strip("|").split("|"))
    assert (name, against) == ("embedded Gaussian", "C2D")
    assert recall.startswith("**+40.0 (+") and motion == "+0.0 (+0.0 to +0.0)"
    by_question = ablation.verdicts(made_up).split("- **")[1:]
    recall, motion, digit = (part.splitlines() for part in by_question)
    assert recall[1:] == [
        "  - better: embedded Gaussian.",
        "  - not shown to be better than a guess: C2D.",
    ]
    assert motion[1:] == [
        "  - no difference shown: embedded Gaussian.",
        "  - not shown to be better than a guess: C2D; embedded Gaussian.",
    ]
    assert digit[1:] == ["  - better: embedded Gaussian."]  # half of ten classes is no guess


# --- The whole --------------------------------------------------------------------------------------------------------


def test_quick_goes_on_after_a_stop_and_prints_what_it_writes(tmp_path, monkeypatch, capsys):
    done, run_row = [], ablation.run_row

    def counted(row, seed, *arguments):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        run = run_row(row, seed, *arguments)
        done.append((row, seed))
        return run

    monkeypatch.setattr(ablation, "run_row", counted)
    command = ["--quick", "--out", str(tmp_path / "out")]
    out = tmp_path / "out-quick"
    stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        ablation.main(command)
    first = json.loads((out / "runs.json").read_text())["runs"]
    assert len(first) == 2
    stop_after = None
    ablation.main(command)
    names, size = list(ablation.QUICK.rows), ablation.QUICK
    assert len(done) == len(names) * size.seeds  # those before the stop are not run again
    assert all(done.count((ablation.ROWS[name], seed)) == 1 for name in names for seed in range(size.seeds))
    runs = json.loads((out / "runs.json").read_text())["runs"]
    assert {key: runs[key] for key in first} == first and len(runs) == len(done)

    printed = capsys.readouterr().out
    summary = (out / "results.md").read_text()
    assert "Its figures mean nothing." in summary and summary.strip() in printed
    results = json.loads((out / "results.json").read_text())
    assert list(results["rows"]) == names and results["quick"]
    for name, row in results["rows"].items():
        for question in ablation.QUESTIONS:
            right = np.array([[int(digit) for digit in runs[f"{name} | {seed}"]["right"][question]] for seed in (0, 1)])
            assert right.shape == (2, size.test_clips)
            mean, low, high = row["accuracy"][question]
            assert mean == pytest.approx(right.mean()) and 0 <= low <= mean <= high <= 1
    costs = {name: (row["parameters"], row["macs"]) for name, row in results["rows"].items()}
    assert costs["C2D"] < costs["I3D 3×1×1"] and costs["C2D"] < costs["time"]
    for name in ("accuracy.png", "cost.png"):
        assert (out / name).stat().st_size > 10000 and f"({name})" in summary

    monkeypatch.setitem(ablation.LOSS_WEIGHTS, "motion", 0.2)
    with pytest.raises(SystemExit, match="has runs of other settings: give another folder by --out"):
        ablation.main(command)
    assert json.loads((out / "runs.json").read_text())["runs"] == runs
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["accuracy.png", "cost.png", "results.json", "results.md", "runs.json"]
    )


def test_runs_on_disk_are_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "runs.json"
    runs = ablation.Runs(path, {"a": 1})
    runs.add("C2D", 0, {"seconds": 1})
    before = path.read_text()

    def full_disk(*_):
        raise OSError("no space")

    monkeypatch.setattr(ablation.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        runs.add("C2D", 1, {"seconds": 2})
    assert path.read_text() == before and ablation.Runs(path, {"a": 1}).has("C2D", 0)


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot be made; give another by --out"):
        ablation.main(["--quick", "--out", str(tmp_path / "file" / "out")])


def test_committed_report_is_made_of_the_committed_runs():
    folder = ROOT / "examples" / "results" / "ablation"
    content = json.loads((folder / "runs.json").read_text())
    size = ablation.FULL
    assert len(content["runs"]) == len(size.rows) * size.seeds
    rows = ablation.collect(ablation.Runs(folder / "runs.json", content["settings"]), size)
    summary = (folder / "results.md").read_text()
    for entry in ablation.TABLES:
        assert ablation.table(*entry, rows) in summary
    assert ablation.table_of_differences(rows) in summary and ablation.verdicts(rows) in summary
    settings = ablation.settings_of(size)
    del settings["versions"], content["settings"]["versions"]
    assert settings == content["settings"]  # the script is that of the runs
