"""The arithmetic of the benchmark of input pipelines on made-up results, and the whole of it on tiny videos."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import data  # noqa: E402
import layers  # noqa: E402
import pipelines  # noqa: E402


def cell(rate):
    return {"clips_per_second": [rate / 3, rate, rate * 2], "first_seconds": [1.0, 0.5, 3.0]}


def made_up(cells, fit):
    return {
        "machine": {"cpu": "abacus", "cores": 1, "memory_gib": 1.0, "system": "none", "python": "3"},
        "date": "2018-06-18",
        "quick": False,
        "plan": json.loads(json.dumps(data.FULL)),
        "peers": {"ours": {"versions": {"av": "18"}}, "pytorchvideo": {"failure": "not installed (torch)"}},
        "bytes": {"files": 10_000_000, "shards": 70_000_000},
        "cases": {"32 frames, stride 2, 1 worker": cells},
        "fit": fit,
    }


def test_targets_compare_medians_with_the_fastest_peer_on_the_same_files():
    cells = {
        "ours": cell(22.0),
        "shards": cell(80.0),
        "decord_tfdata": cell(20.0),
        "decord_loader": {"failure": "> 600 s"},
        "pytorchvideo": cell(5.0),
    }
    fit = {
        "files, 1 worker": {"share": 0.04, "clips_per_second": 1.0, "steps": 9},
        "shards, 1 worker": {"failure": "x"},
    }
    results = made_up(cells, fit)
    assert [row[1:] for row in data.targets(results)] == [
        ("1.10 × decord2 in tf.data", "met"),
        ("4.0%", "met"),
        ("–", "**missed**"),
    ]
    text = "\n".join(data.markdown(results))
    assert "| 22.0 | 80.0 | 20.0 | fails: > 600 s | 5.0 | 1.10 (decord2 in tf.data) |" in text
    assert "7.0 times as large" in text and "3.6 times the clips a second" in text
    assert "PyTorchVideo: not installed (torch)." in text
    cells["decord_tfdata"] = cell(25.0)
    fit["files, 1 worker"]["share"] = 0.06
    assert [row[2] for row in data.targets(results)] == ["**missed**"] * 3
    alone = made_up({"ours": cell(1.0), "shards": cell(9.0)}, {})
    assert [row[2] for row in data.targets(alone)] == ["not measured"]
    failed = made_up({"ours": {"failure": "x"}, "pytorchvideo": cell(5.0)}, {})
    assert [row[2] for row in data.targets(failed)] == ["**missed**"]


def test_waiting_is_from_the_begin_of_a_step_to_its_batch():
    begins, ends = [0, 10, 20, 30], [9, 19, 30]  # the last begin finds the end of the data
    found = pipelines.waiting(begins, ends, arrivals=[5, 11, 23], batch_size=4)
    assert found == {"share": (1 + 3) / 20, "clips_per_second": 8 / 20, "steps": 2}
    with pytest.raises(ValueError, match="must arrive after the model asked .* Received: -1 seconds after"):
        pipelines.waiting(begins, ends, arrivals=[5, 9, 23], batch_size=4)


def test_the_check_reads_the_distance_of_frames():
    clip = {"num_frames": 4, "frame_stride": 8, "crop": 6}
    levels = 30 + np.arange(4)[:, None, None, None] * np.ones((2, 4, 6, 6, 3))

    def batches(stride):
        return [((levels * stride - pipelines.MEAN) / pipelines.STD).astype("float32")]

    pipelines.check("ours", clip, batches(8))
    pipelines.check("pytorchvideo", clip, batches(31 / 3))
    for pipeline, stride in (("ours", 31 / 3), ("ours", 7), ("pytorchvideo", 8)):
        with pytest.raises(ValueError, match=r"apart\. Received: \["):
            pipelines.check(pipeline, clip, batches(stride))
    with pytest.raises(ValueError, match=r"Expected float32 clips of \(4, 6, 6, 3\)\. Received: uint8"):
        pipelines.check("ours", clip, [np.zeros((2, 4, 6, 6, 3), "uint8")])


def test_options_of_both_benchmarks(capsys):
    for benchmark, timeout, known in ((data, 600.0, pipelines.PIPELINES), (layers, 120.0, layers.peers.PEERS)):
        options = benchmark.parse(["--peers", list(known)[-1]])
        assert options.peers == ("ours", list(known)[-1]) and options.timeout == timeout
        assert options.out == ROOT / "benchmarks" / "results" and options.threads == os.cpu_count()
        assert benchmark.parse(["--quick"]).out == ROOT / "benchmarks" / "results-quick"
        with pytest.raises(SystemExit):
            benchmark.parse(["--peers", "nobody"])
        assert f"must be some of {', '.join(known)}. Received: ours,nobody" in capsys.readouterr().err


@pytest.mark.slow
def test_our_pipelines(tmp_path):
    """In this process, which has loaded TensorFlow; the command and its processes are a slow proof."""
    options = data.parse(["--quick"])
    folders, num_bytes = data.make_videos(tmp_path, options)
    assert min(num_bytes.values()) > 1000
    clip = data.clip_of(options.plan, 4, 2)
    for pipeline, videos, ramp in (("ours", "links", "ramp"), ("shards", "shards", "ramp shards")):
        worker = pipelines.Worker(pipeline, threads=1)
        worker.build(folders[videos], folders[ramp], clip, workers=1)
        assert worker.run(num_clips=8).keys() == {"first_seconds", "seconds"}
        assert worker.run(num_clips=9) == {"failure": "gave 8 and 8 of 9 clips"}
    found = pipelines.Worker("ours", threads=1).fit(folders["files"], clip, workers=1, passes=2)
    assert found["steps"] == 3 and 0 <= found["share"] < 1


@pytest.mark.slow
def test_quick(tmp_path):
    """Without peers: the tests do not need the extra `bench`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), "--quick", "--threads", "2"]
    command += ["--peers", "shards", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "data.json").read_text())
    (cells,) = results["cases"].values()
    assert set(cells) == {"ours", "shards"}
    assert all(len(cell["clips_per_second"]) == 1 and cell["clips_per_second"][0] > 0 for cell in cells.values())
    assert [fit["steps"] for fit in results["fit"].values()] == [3]
    assert all(0 <= fit["share"] < 1 for fit in results["fit"].values())
    assert "**Quick run" in (tmp_path / "data.md").read_text()
