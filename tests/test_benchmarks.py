"""The benchmark's arithmetic on made-up results, and the whole of it on tiny maps. No clock is looked at."""

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
import peers  # noqa: E402
import report  # noqa: E402

MEBIBYTE = 2**20


def cell(seconds, mebibytes=10):
    return {"seconds": [seconds * 3, seconds, seconds / 2], "extra_bytes": mebibytes * MEBIBYTE}


def made_up(*cases):
    """Results of `(size, pairwise, pool, both)`: the same cells forward, and forward + backward."""
    results = {
        "machine": {"cpu": "abacus", "cores": 1, "memory_gib": 1.0, "system": "none", "python": "3"},
        "threads": 1,
        "timeout": 120.0,
        "memory_limit": 18.0,
        "quick": False,
        "date": "2018-06-18",
        "peers": {
            "ours": {"versions": {"keras": "3"}},
            "mmcv": {"versions": {"mmcv-lite": "2"}},
            "naive": {"versions": {"tensorflow": "2"}},
            "broadcast": {"versions": {"tensorflow": "2"}},
            "sdpa": {"failure": "not installed (No module named 'torch')"},
        },
        "cases": {},
    }
    for size, pairwise, pool, cells in cases:
        growth = size.startswith("growth")
        shape = (int(size.split()[1]), 1, 1, 64) if growth else tuple(map(int, size.split()[1].split("×")))
        results["cases"][f"{size}, {pool}, {pairwise}"] = {
            "size": size,
            "shape": list(shape),
            "pool": pool,
            "pairwise": pairwise,
            "modes": {"both": cells} if growth else {"forward": cells, "both": cells},
        }
    return results


def verdicts(results):
    return {target.name: (target.measured, target.verdict) for target in report.targets(results)}


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_exponent_of_known_growth(exponent):
    positions = [2048, 4096, 8192, 16384]
    seconds = [3e-9 * n**exponent for n in positions]
    assert report.fit_exponent(positions, seconds) == pytest.approx(exponent)
    assert report.fit_exponent(positions, [*seconds[:3], None]) == pytest.approx(exponent)
    assert report.fit_exponent(positions[:1], seconds[:1]) is None


def test_ratio_is_of_medians_to_the_best_peer_that_computes_the_same():
    cells = {"ours": cell(1.0, 30), "naive": cell(4.0, 10), "mmcv": cell(2.0, 60)}
    whole, pooled = made_up(
        ("res3 4×28×28×512", "dot_product", False, cells), ("res3 4×28×28×512", "dot_product", True, cells)
    )["cases"].values()
    assert report.ratio(whole, "both", "time") == 0.5
    assert report.ratio(whole, "both", "memory") == 3.0
    assert report.ratio(pooled, "both", "time") == 0.25  # mmcv pools something else


def test_targets_are_judged_by_the_worst_case():
    results = made_up(
        ("res3 4×28×28×512", "dot_product", False, {"ours": cell(0.1), "naive": cell(1.0)}),
        ("res3 16×28×28×512", "dot_product", False, {"ours": cell(0.15), "naive": cell(1.0)}),
        ("res3 16×28×28×512", "dot_product", True, {"ours": cell(2.0), "naive": cell(1.0)}),  # no part of the target
        ("res4 4×14×14×1024", "concatenation", False, {"ours": cell(0.1, 1), "naive": cell(1.0, 100)}),
        ("res3 16×28×28×512", "gaussian", False, {"ours": cell(0.5, 30), "naive": cell(1.0, 100)}),
        ("growth 2048", "dot_product", False, {"ours": cell(1.0)}),
        ("growth 4096", "dot_product", False, {"ours": cell(2.0)}),
    )
    found = verdicts(results)
    assert found["dot product, res3 whole: time"] == (pytest.approx(0.15), "met")
    assert found["concatenation, res4: time"] == (pytest.approx(0.1), "**missed**")
    assert found["concatenation, res4: extra memory"] == (pytest.approx(0.01), "met")
    assert found["concatenation, res4: trainable"] == (0, "met")
    assert found["softmax forms, every size: time forward + backward"] == (0.5, "met")
    assert found["softmax forms, 16×28×28: extra memory"] == (pytest.approx(0.3), "**missed**")
    assert found["dot_product: growth exponent"] == (pytest.approx(1.0), "met")
    assert found["concatenation: growth exponent"] == (None, "not measured")


def test_failures_of_ours_miss_and_of_all_peers_meet():
    failed = {"failure": "out of memory"}
    alone = made_up(("res4 16×14×14×1024", "concatenation", False, {"ours": cell(1.0), "naive": failed}))
    assert verdicts(alone)["concatenation, res4: time"] == (0.0, "met")
    assert "in 2 no peer finished" in "\n".join(report.markdown(alone))
    # The broadcast form is in the table, but no peer of the targets.
    cells = {"ours": cell(1.0), "naive": failed, "broadcast": cell(2.0)}
    beside = made_up(("res4 16×14×14×1024", "concatenation", False, cells))
    assert verdicts(beside)["concatenation, res4: time"] == (0.0, "met")
    assert "0.5 (broadcast)" in "\n".join(report.markdown(beside))
    lost = made_up(("res4 16×14×14×1024", "concatenation", False, {"ours": failed, "naive": cell(1.0)}))
    assert verdicts(lost)["concatenation, res4: time"] == (math.inf, "**missed**")
    assert verdicts(lost)["concatenation, res4: trainable"] == (1, "**missed**")
    without_peers = made_up(("res4 16×14×14×1024", "concatenation", False, {"ours": cell(1.0)}))
    assert verdicts(without_peers)["concatenation, res4: time"] == (None, "not measured")


def test_table_names_failures_and_missing_peers(tmp_path):
    cells = {"ours": cell(0.01), "mmcv": {"failure": "in-place error"}, "naive": cell(2.0, 2048)}
    results = made_up(("res4 4×14×14×1024", "concatenation", False, cells))
    report.write(results, tmp_path)
    text = (tmp_path / "layers.md").read_text()
    assert "| concatenation | whole | forward | 10 ms / 10 MiB | fails: in-place error | 2.00 s / 2.0 GiB |" in text
    assert "0.005 (naive) | 0.00488 (naive) |" in text
    assert "PyTorch SDPA: not installed (No module named 'torch')." in text
    assert (tmp_path / "layers.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.01, (7, False)), (3.0, (3, False)), (10.0, (2, True)), (60.0, (0, True))]
)
def test_slow_runs_are_repeated_less(seconds, rounds):
    assert layers.num_rounds(seconds) == rounds


FUNCTIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    ("peer", "pairwise"),
    [(p, f) for p in ("ours", "naive", "broadcast", "mha") for f in FUNCTIONS if f in (peers.PEERS[p][0] or FUNCTIONS)],
)
@pytest.mark.slow
def test_tensorflow_peers_compute_the_formula(peer, pairwise, pool):
    """What the workers check before they measure; here, that the check also fails where it should."""
    embedded = pairwise != "gaussian"
    weights = peers.make_weights(peers.TINY_SHAPE[-1], embedded, pairwise == "concatenation")
    x, cotangent = peers.make_inputs(peers.TINY_SHAPE, seed=0)
    build = getattr(peers, f"build_{peer}")
    runs, _ = peers.tensorflow_passes(*build(weights, pairwise, embedded, peers.TINY_SHAPE, pool), x, cotangent)
    for mode in ("forward", "both"):
        assert peers.check(peer, runs[mode], x, cotangent, weights, pairwise, pool, mode) <= peers.TOLERANCE
        wrong = {**weights, "g_kernel": weights["g_kernel"] * np.float32(1.1)}
        with pytest.raises(ValueError, match="another function"):
            peers.check(peer, runs[mode], x, cotangent, wrong, pairwise, pool, mode)


def test_committed_results_are_those_that_were_measured():
    """The table is made of layers.json, and the README shows its summary."""
    folder = ROOT / "benchmarks" / "results"
    results = json.loads((folder / "layers.json").read_text())
    assert (folder / "layers.md").read_text() == "\n".join(report.markdown(results)) + "\n"
    readme = (ROOT / "README.md").read_text()
    assert [line for line in report.in_short(results) if line not in readme] == []


def test_a_worker_that_dies_or_hangs_is_reported(monkeypatch):
    options = layers.parse(["--threads", "1"])
    popen = subprocess.Popen
    for code, timeout, failure in (
        ("import os; os.kill(os.getpid(), 9)", 60, "out of memory (killed)"),
        ("raise SystemExit(3)", 60, "the process died (exit status 3)"),
        ("input()", 0.0, "> 0 s"),
    ):
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(subprocess, "Popen", lambda _, command=command, **kwargs: popen(command, **kwargs))
        process = layers.Process("naive", options)
        assert process.hear(timeout) == {"failure": failure}
        process.close()


@pytest.mark.slow
def test_quick(tmp_path):
    """TensorFlow peers only: the tests do not need the extra `bench`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "layers.py"), "--quick", "--threads", "2"]
    command += ["--peers", "naive,mha", "--pairwise", "embedded_gaussian", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "layers.json").read_text())
    pooled = next(case for case in results["cases"].values() if case["pool"])
    for mode in ("forward", "both"):
        assert {peer: len(c["seconds"]) for peer, c in pooled["modes"][mode].items()} == {
            "ours": 7,
            "naive": 7,
            "mha": 7,
        }
        assert report.ratio(pooled, mode, "time") > 0
    text = (tmp_path / "layers.md").read_text()
    assert "(naive) |" in text or "(mha) |" in text
    assert "N = 64" in text and "not measured" in text
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    # What is there is not measured again.
    before = (tmp_path / "layers.json").stat().st_mtime_ns
    subprocess.run([*command, "--report"], check=True)
    assert (tmp_path / "layers.json").stat().st_mtime_ns == before
