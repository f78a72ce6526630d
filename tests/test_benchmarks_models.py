"""The arithmetic of the benchmark of networks on made-up results; `test_benchmarks_models_peers.py` builds them."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import layers  # noqa: E402
import models  # noqa: E402
import networks  # noqa: E402

MEBIBYTE = 2**20


def cell(seconds, mebibytes=100):
    return {"seconds": [seconds * 3, seconds, seconds / 2], "extra_bytes": mebibytes * MEBIBYTE}


def case(inference, training):
    """Each `{blocks: cells}`."""
    macs = {
        "0": {"valid": 20_000_000_000, "same": 21_000_000_000},
        "5": {"valid": 30_000_000_000, "same": 31_500_000_000},
    }
    return {
        "costs": {blocks: {"parameters": 24_330_000, "macs": macs[blocks]} for blocks in inference},
        "differences": {blocks: {"pytorchvideo": 2e-6} for blocks in inference},
        "modes": {"inference": inference, "training": training},
    }


def made_up(**cases):
    return {
        "machine": {"cpu": "abacus", "cores": 1, "memory_gib": 1.0, "system": "none", "python": "3"},
        "threads": 1,
        "rounds": 3,
        "quick": False,
        "date": "2018-06-18",
        "peers": {
            "ours": {"versions": {"keras": "3"}},
            "pytorchvideo": {"versions": {"pytorchvideo": "0.1.5"}},
            "twin": {"failure": "not installed (No module named 'torch')"},
        },
        "cases": {name.replace("_", " "): value for name, value in cases.items()},
    }


def verdicts(results):
    return [(target.measured, target.verdict) for target in models.targets(results)]


def test_targets_are_judged_by_the_worst_case_and_the_best_peer():
    inference = {
        "0": {"ours": cell(0.5), "pytorchvideo": cell(1.0), "twin": cell(0.6)},
        "5": {"ours": cell(0.9), "pytorchvideo": cell(1.0), "twin": cell(1.2)},
    }
    training = {
        "0": {"ours": cell(2.0, 300), "pytorchvideo": cell(4.0, 600), "twin": cell(5.0, 100)},
        "5": {"ours": cell(2.5), "pytorchvideo": cell(5.0)},
    }
    slower = {blocks: {**cells, "ours": cell(4.0)} for blocks, cells in training.items()}
    results = made_up(C2D_R50=case(inference, training))
    found = verdicts(results)
    assert found == [(0.5, "met"), (pytest.approx(0.9), "met"), (1.25, "met")]
    results["cases"]["I3D R50"] = case(inference, slower)
    assert verdicts(results)[0] == (1.0, "**missed**")
    assert [target.where for target in models.targets(results)] == [
        "worst of 4: I3D R50, 0 blocks",
        "worst of 4: C2D R50, 5 blocks",
        "worst of 2: C2D R50",
    ]
    assert models.best_peer(training["0"], "memory") == ("twin", 100 * MEBIBYTE)
    assert models.ratio(training["0"], "memory") == 3.0


def test_failures_of_ours_miss_and_those_of_peers_are_no_peers():
    failed = {"failure": "out of memory"}
    cells = {"0": {"ours": failed, "pytorchvideo": cell(1.0)}, "5": {"ours": cell(1.0), "pytorchvideo": failed}}
    results = made_up(C2D_R50=case(cells, cells))
    assert verdicts(results) == [(math.inf, "**missed**"), (math.inf, "**missed**"), (None, "not measured")]
    alone = {"0": {"ours": cell(1.0)}, "5": {"ours": cell(1.4)}}
    results = made_up(C2D_R50=case(alone, alone))
    assert verdicts(results) == [(None, "not measured")] * 2 + [(pytest.approx(1.4), "**missed**")]


def test_table_shows_cells_costs_and_missing_peers(tmp_path):
    inference = {
        "0": {"ours": cell(0.5), "pytorchvideo": cell(1.0)},
        "5": {"ours": cell(1.0), "pytorchvideo": cell(1.5)},
    }
    training = {"0": {"ours": cell(2.0), "pytorchvideo": {"failure": "> 300 s"}}, "5": {"ours": cell(2.2)}}
    models.write(made_up(C2D_R50=case(inference, training)), tmp_path)
    text = (tmp_path / "models.md").read_text()
    assert "| inference | 0 | 500 ms / 100 MiB | 1.00 s / 100 MiB | 0.50 (PyTorchVideo) | 1.00 (PyTorchVideo) |" in text
    assert "| training step | 0 | 2.00 s / 100 MiB | fails: > 300 s |  |  |" in text
    assert "| C2D R50 | 5 | 0.67 / 1.00 | – / – | 1.10 |" in text
    assert "| C2D R50 | inference | 2.00 | 1.50 | 1.50 |" in text
    assert "| C2D R50 | 5 | 24.33 M | 30.00 G | 31.50 G | 2.0e-06 |  |" in text
    assert "PyTorch, channels last: not installed (No module named 'torch')." in text


def built(ours=None, **changes):
    """Replies of ours and of both peers, which agree up to a padding, with changes to those of a peer."""
    scores = {"valid": [[-1.0, -2.0], [-3.0, -0.5]], "same": [[-1.1, -2.0], [-3.0, -0.5]]}
    replies = {
        "ours": {"parameters": 10, "macs": {"valid": 5, "same": 6}, "scores": scores, **(ours or {})},
        "pytorchvideo": {"parameters": 10, "scores": scores["same"]},
        "twin": {"parameters": 10, "scores": scores["valid"]},
    }
    for peer, change in changes.items():
        replies[peer] = replies[peer] | change
    return {(peer, blocks): reply for peer, reply in replies.items() for blocks in (0, 5)}


def test_peers_that_compute_something_else_are_not_measured():
    failures, costs, differences = models.compare(built())
    assert failures == {}
    assert costs["5"] == {"parameters": 10, "macs": {"valid": 5, "same": 6}}
    assert differences == {"0": {"pytorchvideo": 0.0, "twin": 0.0}, "5": {"pytorchvideo": 0.0, "twin": 0.0}}

    def failures_of(*arguments, **changes):
        return {key[0]: failure for key, failure in models.compare(built(*arguments, **changes))[0].items()}

    other = {"scores": [[-1.0, -2.0], [-3.0, -0.501]]}
    assert failures_of(twin=other) == {"twin": "computes another function: scores differ by 3.3e-04"}
    not_a_number = {"scores": [[-1.0, float("nan")], [-3.0, -0.5]]}
    assert failures_of(twin=not_a_number) == {"twin": "computes another function: scores differ by nan"}
    assert failures_of(twin={"parameters": 9}) == {"twin": "has 9 parameters, ours 10"}
    assert failures_of(pytorchvideo={"failure": "x"}) == {"pytorchvideo": "x"}
    assert failures_of({"failure": "y"}) == {
        "ours": "y",
        "pytorchvideo": "nothing to compare with",
        "twin": "nothing to compare with",
    }
    same = {"valid": [[-1.0, -2.0]] * 2, "same": [[-1.1, -2.0], [-3.0, -0.5]]}
    assert failures_of({"scores": same}, twin={"scores": same["valid"]}) == {
        "ours": "two clips have the same scores, so that none can be compared"
    }


def test_log_probabilities_of_logits_and_of_probabilities(rng):
    logits = 5 * rng.normal(size=(2, 7))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = networks.log_probabilities(np.float32(probabilities), are_logits=False)
    assert networks.difference(networks.log_probabilities(logits + 300, are_logits=True), expected) < 1e-6
    assert np.isfinite(networks.log_probabilities(np.float32([[0, 1]]), are_logits=False)).all()


def test_options(capsys):
    options = models.parse([])
    assert options.peers == ("ours", "pytorchvideo", "twin") and options.networks == ["C2D R50", "I3D R50"]
    assert (options.rounds, options.batch, options.shape) == (7, 1, (8, 224, 224))
    options = models.parse(["--quick", "--networks", "I3D"])
    assert (options.rounds, options.networks) == (1, ["I3D R50"])
    with pytest.raises(SystemExit):
        models.parse(["--networks", "X3D"])
    assert "--networks must name some of C2D R50, I3D R50. Received: X3D" in capsys.readouterr().err


def test_rounds_are_of_all_peers_and_blocks_in_turns():
    """Each is asked once for memory, then as often as told, one after the other."""
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self, timeout, do, mode, probe):
            asked.append((self.name, probe))
            if self.name == "b" and len(asked) > 4:
                return {"failure": "x"}
            return {"seconds": 1.0} | ({"extra_bytes": 7} if probe else {})

    options = models.parse([])
    cells = layers.measure_mode("training", {n: Fake(n) for n in "ab"}, {}, options, lambda seconds: (3, False))
    assert asked == [("a", True), ("b", True), ("a", False), ("b", False), ("a", False), ("b", False), ("a", False)]
    assert cells == {"a": {"seconds": [1.0] * 3, "extra_bytes": 7}, "b": {"failure": "x"}}


@pytest.mark.slow
def test_quick(tmp_path):
    """Without peers: the plain tests do not need the extra `bench`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "models.py"), "--quick", "--threads", "2"]
    subprocess.run([*command, "--peers", "ours", "--out", str(tmp_path)], check=True)
    (found,) = json.loads((tmp_path / "models.json").read_text())["cases"].values()
    assert all(len(found["modes"][mode][str(n)]["ours"]["seconds"]) == 1 for mode in models.MODES for n in (0, 5))
    assert found["costs"]["0"]["macs"]["valid"] < found["costs"]["5"]["macs"]["valid"]
    assert "**Small clips (`--quick`)" in (tmp_path / "models.md").read_text()
