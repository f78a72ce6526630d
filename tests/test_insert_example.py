"""The example of blocks in a trained ResNet-50, at a small size."""

import json
import pathlib
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import insert_into_resnet as example  # noqa: E402


def test_quick_prints_what_it_writes(tmp_path, capsys):
    example.main(["--quick", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out-quick" / "results.json").read_text())
    summary = (tmp_path / "out-quick" / "results.md").read_text()
    assert "Its figures mean nothing." in summary and summary in printed
    assert results["difference_at_start"] == 0.0
    without, blocks = results["rows"]
    assert blocks["parameters"] - without["parameters"] == sum(count_block(channels) for channels in (512, 1024))
    for row in results["rows"]:
        low, high = row["interval"]
        line = f"| {row['name']} | {row['parameters']:,} | {row['accuracy']:.1%} | {low:.1%} – {high:.1%} |"
        assert line in summary and low <= row["accuracy"] <= high
    counts = [row["accuracy"] * results["test_digits"] for row in results["rows"]]
    comparison = results["comparison"]
    assert comparison["with_only"] - comparison["without_only"] == pytest.approx(counts[1] - counts[0])
    assert comparison["sentence"] in summary
    assert [path.name for path in tmp_path.iterdir()] == ["out-quick"]


def count_block(channels):
    """Four projections with biases, and four numbers a channel of batch norm."""
    return 4 * channels * (channels // 2) + 3 * (channels // 2) + channels + 4 * channels


def test_tests_are_other_images_than_training():
    (x, y), (x_test, y_test) = example.load_images(example.FULL)
    digits = load_digits()
    assert len(x) + len(x_test) == len(digits.target) and len(x_test) == 360
    np.testing.assert_array_equal(np.concatenate([y, y_test]), digits.target)
    # Undone, what the network takes are the pixels: Keras' means of ImageNet, in blue, green, red, are subtracted.
    pixels = x_test + np.array([103.939, 116.779, 123.68], "float32")
    assert -1e-3 < pixels.min() and pixels.max() < 255 + 1e-3
    places = (np.arange(8) * 8 + 4)[:, None], (np.arange(8) * 8 + 4)[None]
    small = pixels[0][places].mean(axis=-1)
    assert np.corrcoef(small.ravel(), digits.images[-360].ravel())[0, 1] > 0.95


def test_comparison_by_hand():
    right = np.array([True] * 12 + [False] * 3)
    before = np.array([False] * 6 + [True] * 6 + [False] * 3)
    found = example.compare(right, before)
    assert (found["with_only"], found["without_only"]) == (6, 0)
    assert found["p"] == pytest.approx(2 / 2**6) and found["verdict"] == "better with blocks"
    assert example.compare(before, right)["verdict"] == "worse with blocks"
    assert example.compare(right, right) | {"sentence": ""} == {
        "with_only": 0,
        "without_only": 0,
        "p": 1.0,
        "verdict": "no difference shown",
        "sentence": "",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere.h5"], 'must be "none", "imagenet" or a file. Received: nowhere.h5'),
        (["--seed", "-1"], "argument --seed: must be at least 0. Received: -1"),
    ],
)
def test_errors(arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert message in capsys.readouterr().err
