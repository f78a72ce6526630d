"""The example on real footage, at a small size."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_nonlocal.data import VideoReader
from keras_nonlocal.visualization import attend

PATH = Path(__file__).resolve().parent.parent / "examples" / "footage.py"


@pytest.fixture(scope="module")
def footage():
    spec = importlib.util.spec_from_file_location("footage", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_and_says_what_its_scores_are_worth(footage, tmp_path, capsys):
    footage.main(["--out", str(tmp_path / "out"), "--frames", "4", "--size", "48"])
    printed = capsys.readouterr().out
    assert "RANDOM" in printed and "mean nothing" in printed
    for name in footage.CLIPS:
        scores = re.search(rf"{name}: class \d (0\.\d+), class \d (0\.\d+), class \d (0\.\d+)\n", printed)
        first, second, third = map(float, scores.groups())
        assert 1 > first >= second >= third > 0
        picture = Image.open(tmp_path / "out" / f"{Path(name).stem}.png")
        assert np.ptp(np.asarray(picture)[184:-44]) > 200  # the row of weights has dark and bright pixels
        for suffix in (".arrows.png", ".mp4"):
            assert (tmp_path / "out" / f"{Path(name).stem}{suffix}").stat().st_size > 5000


def test_the_bow_tie_attends_to_itself_in_every_frame(footage):
    """The example's claim: no training, and still the tie is found where the head has moved to."""
    with VideoReader(footage.locate("carphone_pristine.mp4")) as video:
        clip = video.read([0, 40, 80, 119], shorter_side=144)
    _, _, (row, column) = footage.CLIPS["carphone_pristine.mp4"]
    position = (0, int(row * clip.shape[1]), int(column * clip.shape[2]))
    heat = attend(footage.colour_model(cell=4), clip, position).pixels()
    red, green, blue = np.moveaxis(clip.astype(float), -1, 0)
    redness = red - (green + blue) / 2
    for frame, weights in enumerate(heat):
        assert np.average(redness[frame], weights=weights) > redness[frame].mean() + 10
        y, x = np.unravel_index(weights.argmax(), weights.shape)
        # The tie stays in the middle of the lower half.
        assert 0.6 < y / clip.shape[1] < 0.9 and 0.3 < x / clip.shape[2] < 0.75


def test_names_what_to_install(footage, monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(SystemExit, match=r'^[^\n]*not installed: pip install "\.\[test\]"$'):
        footage.locate("bikes.mp4")
