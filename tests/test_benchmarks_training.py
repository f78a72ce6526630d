"""The benchmark of training: its arithmetic on made-up results, and the whole of it on tiny clips."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import training  # noqa: E402

GIBIBYTE = 2**30


def made_up(*rows):
    """Results of `(row, reply)`."""
    return {
        "machine": {"cpu": "abacus", "cores": 1, "memory_gib": 24.0, "system": "none", "python": "3"},
        "threads": 1,
        "memory_limit": 20.0,
        "quick": False,
        "date": "2018-06-18",
        "peers": {
            "tensorflow": {"versions": {"tensorflow": "2"}},
            "jax": {"failure": "not installed (No module named 'jax')"},
        },
        "cases": {row.key: {**dataclasses.asdict(row), "case": row.case, **reply} for row, reply in rows},
    }


def reply(seconds, gibibytes=1, losses=(2.0, 1.0)):
    return {
        "losses": list(losses),
        "first_seconds": 10 * seconds,
        "seconds": [seconds, 3 * seconds, seconds / 2],
        "extra_bytes": gibibytes * GIBIBYTE,
        "peak_bytes": (gibibytes + 1) * GIBIBYTE,
    }


LONG = training.Row("remat", "I3DResNet50", (1, 128, 224, 224))
SHORT = training.Row("xla", "C2DResNet11", (1, 8, 224, 224), "jax")


def with_remat(row):
    return dataclasses.replace(row, remat=True)


def test_targets_and_tables():
    short = dataclasses.replace(LONG, shape=(1, 32, 224, 224))
    results = made_up(
        (with_remat(LONG), reply(4.0, 2, (2.0, 1.0008))),
        (LONG, reply(3.0, 5)),
        (with_remat(short), reply(1.0, 30)),
        (short, {"failure": "out of memory (> 20 GiB)"}),
        (SHORT, reply(0.5, 4)),
        (dataclasses.replace(SHORT, jit_compile=True), reply(0.25, 1, (2.01, 1.0))),
        (dataclasses.replace(SHORT, backend="tensorflow"), reply(1.0, 4, (2.02, 1.0))),
        (dataclasses.replace(SHORT, backend="torch"), reply(0.5, 4)),
    )
    memory, remat, xla = training.targets(results)
    assert (memory.measured, memory.verdict) == (3.0, "met")
    assert (remat.measured, remat.verdict) == (pytest.approx(4e-4), "met")
    assert (xla.measured, xla.verdict) == (pytest.approx(5e-3), "**missed**")
    assert xla.where == "C2DResNet11 1×8×224×224, jax"
    text = "\n".join(training.markdown(results))
    for line in (
        "| I3DResNet50 1×128×224×224 | yes | 2.0 GiB | 3.0 GiB | 0.40 | 4.00 s | 1.33 | 4e-04 |",
        "| I3DResNet50 1×128×224×224 | no | 5.0 GiB | 6.0 GiB |  | 3.00 s |  |  |",
        "| I3DResNet50 1×32×224×224 | yes | 30.0 GiB | 31.0 GiB |  | 1.00 s |  |  |",
        "| I3DResNet50 1×32×224×224 | no |  |  |  | fails: out of memory (> 20 GiB) |  |  |",
        "| C2DResNet11 1×8×224×224 | jax | 500 ms | 250 ms | 0.50 | 2.50 s | 0.25 | 5e-03 | 1e-02 |",
        "| C2DResNet11 1×8×224×224 | torch | 500 ms | has none |  |  |  |  | 1e-02 |",
        "| C2DResNet11 1×8×224×224 | tensorflow | 1.00 s |  |  |  |  |  |  |",
        "jax: not installed (No module named 'jax').",
    ):
        assert line in text
    results["cases"][with_remat(LONG).key] = {
        **results["cases"][with_remat(LONG).key],
        "peak_bytes": 25 * GIBIBYTE,
    }
    assert next(training.targets(results)).verdict == "**missed**"


def test_a_failure_misses_and_nothing_is_not_measured():
    verdicts = [target.verdict for target in training.targets(made_up((with_remat(LONG), {"failure": "> 1 s"})))]
    assert verdicts == ["**missed**", "not measured", "not measured"]
    assert [target.verdict for target in training.targets(made_up())] == ["not measured"] * 3
    compiled = (dataclasses.replace(SHORT, jit_compile=True), {"failure": "does not compile"})
    assert [target.verdict for target in training.targets(made_up((SHORT, reply(1.0)), compiled))][2] == "**missed**"


def test_rows_of_a_case_differ_in_one_setting():
    rows = training.list_rows(training.parse(["--out", "x"]))
    assert len({row.key for row in rows}) == len(rows)
    assert LONG in rows and with_remat(LONG) in rows
    assert training.LONGEST == LONG.case
    assert not any(row.jit_compile for row in rows if row.backend == "torch" or row.table == "remat")
    chosen = training.parse(["--tables", "xla", "--backends", "torch", "--cases", "C2D"])
    assert [row.key for row in training.list_rows(chosen)] == [
        f"C2DResNet{depth} 1×8×224×224, torch, jit_compile=False, remat=False" for depth in (11, 50)
    ]
    with pytest.raises(SystemExit):
        training.parse(["--backends", "numpy"])


@pytest.mark.slow
def test_quick(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), "--quick", "--backends", "tensorflow"]
    command += ["--threads", "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "training.json").read_text())
    for row in results["cases"].values():
        assert len(row["losses"]) == 3 and len(row["seconds"]) == 2
        assert 0 < row["extra_bytes"] < row["peak_bytes"]
    measured = [target.measured for target in training.targets(results)]
    assert measured[0] is None  # that clip is not tiny
    assert 0 <= measured[1] <= training.TOLERANCE and 0 <= measured[2] <= training.TOLERANCE
    assert "numbers mean nothing" in (tmp_path / "training.md").read_text()
    # What is there is not measured again.
    before = (tmp_path / "training.json").stat().st_mtime_ns
    subprocess.run(command, check=True)
    assert (tmp_path / "training.json").stat().st_mtime_ns == before
