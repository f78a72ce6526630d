"""Training of whole networks: the memory of long clips with and without `remat`, and what XLA costs or gains.

    pip install ".[bench]" jax
    python benchmarks/training.py            # writes benchmarks/results/training.{md,json}
    python benchmarks/training.py --quick    # tiny clips, minutes, numbers without meaning

Each row is a network that takes some steps of `train_on_batch` on the same clips from the same weights, in a process of
its own, one at a time. The networks of one case differ in one setting only, and their losses are compared step by step.
Finished rows are kept in training.json and not measured again (`--fresh` does). Linux only.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import layers  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

# Backend: the packages whose versions the report names.
BACKENDS = {"tensorflow": ("tensorflow", "keras"), "jax": ("jax", "keras"), "torch": ("torch", "keras")}
# Options of the builders by table: the paper's arrangement for 128 frames, and the release's for 8. No dropout, as XLA
# draws other numbers.
OPTIONS = {
    "remat": {
        "temporal_strides": (2, 2, 2),
        "non_local_options": {3: {"window": (4, None, None)}},
        "dropout": 0.0,
    },
    "xla": {"dropout": 0.0},
}
MAX_MEMORY = 24.0  # GiB, for the step of 128 frames
TOLERANCE = 1e-3  # of losses, relative
LONGEST = "I3DResNet50 1×128×224×224"


@dataclasses.dataclass(frozen=True)
class Row:
    """One network in training.

    Args:
        table: "remat" or "xla": what the rows of a case differ in.
        network: Name of its builder.
        shape: (clips, frames, height, width).
        backend: One of `BACKENDS`.
        jit_compile: As in `compile`.
        remat: As in the builder.
        steps: Number of steps; the first also traces and compiles, and is not timed.
    """

    table: str
    network: str
    shape: tuple
    backend: str = "tensorflow"
    jit_compile: bool = False
    remat: bool = False
    steps: int = 3

    @property
    def case(self):
        return f"{self.network} {'×'.join(map(str, self.shape))}"

    @property
    def key(self):
        return f"{self.case}, {self.backend}, jit_compile={self.jit_compile}, remat={self.remat}"


def list_rows(options):
    if options.quick:
        rows = [Row("remat", "I3DResNet11", (1, 32, 32, 32), remat=remat) for remat in (True, False)]
        networks, size = {"C2DResNet11": 3}, (1, 4, 32, 32)
    else:
        rows = [
            Row("remat", "I3DResNet50", (batch, frames, 224, 224), remat=remat)
            for batch, frames in ((1, 32), (1, 128), (4, 128))
            for remat in (True, False)
        ]
        networks = {"C2DResNet11": 10, "I3DResNet11": 10, "C2DResNet50": 4, "I3DResNet50": 4}
        size = (1, 8, 224, 224)
    for network, steps in networks.items():
        for backend in options.backends:
            # PyTorch in Keras has its own compiler there, and no XLA.
            for jit_compile in (False,) if backend == "torch" else (False, True):
                rows.append(Row("xla", network, size, backend, jit_compile, steps=steps))
    return [row for row in rows if row.table in options.tables and row.case.startswith(options.cases)]


# The process of one row


class Worker:
    def __init__(self, backend, threads):
        self.backend, self.threads = backend, threads
        os.environ["KERAS_BACKEND"] = backend

    def describe(self):
        if self.backend == "tensorflow":
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(self.threads)
            tf.config.threading.set_inter_op_parallelism_threads(self.threads)
        elif self.backend == "torch":
            import torch

            torch.set_num_threads(self.threads)
        import keras_nonlocal.applications  # noqa: F401

        return {"versions": {name: importlib.metadata.version(name) for name in BACKENDS[self.backend]}}

    def train(self, table, network, shape, jit_compile, remat, steps):
        import keras

        from keras_nonlocal import applications

        peers.reset_peak()
        before = peers.resident("VmRSS")
        batch, *sizes = shape
        model = getattr(applications, network)(input_shape=(*sizes, 3), remat=remat, **OPTIONS[table])
        fill(model)
        # A rate at which no step brings the loss of so few clips to 0, where all curves would be equal.
        optimizer = keras.optimizers.SGD(1e-4, momentum=0.9, nesterov=True)
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit_compile)
        clips, labels = make_batch(batch, sizes)
        losses, seconds = [], []
        for _ in range(steps):
            start = time.perf_counter()
            losses.append(float(model.train_on_batch(clips, labels)))
            seconds.append(time.perf_counter() - start)
        if not all(map(math.isfinite, losses)):
            return {"failure": f"losses are not finite: {losses}"}
        peak = peers.resident("VmHWM")
        return {
            "losses": losses,
            "first_seconds": seconds[0],
            "seconds": seconds[1:],
            "extra_bytes": max(peak - before, 0),
            "peak_bytes": peak,
        }


def fill(model):
    """The same weights on every backend.

    Every block adds a little, so that losses see it, and not more: in a deep network of random weights each block would
    enlarge what the ones before it lost by rounding.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name == "kernel":
            fan_in = math.prod(weight.shape[:-1])
            weight.assign(rng.normal(size=weight.shape, scale=(2 / fan_in) ** 0.5).astype("float32"))
        elif weight.path.endswith(("branch2c_bn/gamma", "norm/gamma")):
            weight.assign(np.full(weight.shape, 0.1, "float32"))


def make_batch(batch, sizes):
    import numpy as np

    rng = np.random.default_rng(1)
    return rng.normal(size=(batch, *sizes, 3)).astype("float32"), rng.integers(0, 400, batch)


class Process(layers.Process):
    script = __file__


def measure(row, options):
    process = Process(row.backend, options)
    try:
        described = process.ask(options.start_timeout, do="describe")
        if "failure" in described:
            return described
        request = dataclasses.asdict(row)
        del request["backend"]
        return process.ask(options.timeout, do="train", **request)
    finally:
        process.close()


# The report


def rows_of(results, table):
    """`{case: rows}` of one table."""
    cases = {}
    for row in results["cases"].values():
        if row["table"] == table:
            cases.setdefault(row["case"], []).append(row)
    return cases


def difference(row, other):
    """The largest difference of the losses of any step, relative to the other's first; `None` if one has none."""
    if "failure" in row or "failure" in other:
        return None
    return max(abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=True)) / other["losses"][0]


def partner(row, rows, setting):
    """The row that differs in `setting` alone, and has it off."""
    same = [key for key in ("backend", "jit_compile", "remat") if key != setting]
    return next((r for r in rows if not r[setting] and all(r[key] == row[key] for key in same)), None)


def pairs(results, table, setting):
    """`(row with the setting on, row with it off)` of every case that has both."""
    for rows in rows_of(results, table).values():
        for row in rows:
            other = partner(row, rows, setting) if row[setting] else None
            if other is not None:
                yield row, other


def targets(results):
    found = [row for row in rows_of(results, "remat").get(LONGEST, []) if row["remat"]]
    memory = report.Target(f"{LONGEST} with `remat`: peak memory, GiB", MAX_MEMORY)
    if found:
        memory.measured = found[0].get("peak_bytes", math.inf) / 2**30
    yield memory
    for table, setting, name in (("remat", "remat", "`remat`"), ("xla", "jit_compile", "XLA")):
        target = report.Target(f"losses with and without {name}: relative difference", TOLERANCE)
        for row, other in pairs(results, table, setting):
            value = math.inf if "failure" in row else difference(row, other)
            if value is not None and (target.measured is None or value > target.measured):
                target.measured, target.where = value, f"{row['case']}, {row['backend']}"
        yield target


def difference_text(row, other):
    value = difference(row, other)
    return "" if value is None else f"{value:.0e}"


def time_text(row):
    return f"fails: {row['failure']}" if "failure" in row else report.time_text(statistics.median(row["seconds"]))


def ratio_text(row, other, value):
    if other is None or other is row or "failure" in row or "failure" in other:
        return ""
    return f"{value(row) / value(other):.2f}"


def remat_table(results):
    yield report.row(
        ["network, clips", "`remat`", "memory of the step", "of the process", "÷ without", "time of a step"]
        + ["÷ without", "losses differ by"]
    )
    yield report.row(["---", "---"] + ["---:"] * 6)
    for case, rows in rows_of(results, "remat").items():
        for row in rows:
            other = partner(row, rows, "remat") if row["remat"] else None
            memory = [report.memory_text(row[key]) if key in row else "" for key in ("extra_bytes", "peak_bytes")]
            yield report.row(
                [case, "yes" if row["remat"] else "no", *memory]
                + [ratio_text(row, other, lambda r: r["extra_bytes"]), time_text(row)]
                + [ratio_text(row, other, lambda r: statistics.median(r["seconds"]))]
                + ["" if other is None else difference_text(row, other)]
            )


def xla_table(results):
    yield report.row(
        ["network, clips", "backend", "without XLA", "with XLA", "with ÷ without", "first step"]
        + ["memory ÷ without", "losses: with, without", "losses: backend, TensorFlow"]
    )
    yield report.row(["---", "---"] + ["---:"] * 7)
    for case, rows in rows_of(results, "xla").items():
        first = next((row for row in rows if row["backend"] == "tensorflow" and not row["jit_compile"]), None)
        for off in (row for row in rows if not row["jit_compile"]):
            of_backends = "" if first is None or off is first else difference_text(off, first)
            on = next((row for row in rows if row["jit_compile"] and row["backend"] == off["backend"]), None)
            if on is None:
                texts = ["has none" if off["backend"] == "torch" else "", *[""] * 4]
            else:
                texts = [
                    time_text(on),
                    ratio_text(on, off, lambda r: statistics.median(r["seconds"])),
                    report.time_text(on["first_seconds"]) if "first_seconds" in on else "",
                    ratio_text(on, off, lambda r: r["extra_bytes"]),
                    difference_text(on, off),
                ]
            yield report.row([case, off["backend"], time_text(off), *texts, of_backends])


def markdown(results):
    yield "# Training: long clips, and XLA"
    yield ""
    yield report.machine_text(results, "training")
    if results["quick"]:
        yield from ("", "**Tiny clips (`--quick`): shows that everything runs. The numbers mean nothing.**")
    for backend, description in results["peers"].items():
        if "failure" in description:
            yield from ("", f"{backend}: {description['failure']}.")
    yield ""
    yield (
        "Steps of `train_on_batch`, float32, 400 classes, SGD with Nesterov momentum, no dropout; the median time "
        "without the first step. The same weights and clips in all rows of a case; *losses differ by*: the most of any "
        "step, relative to the first loss. A network of 50 layers has five non-local blocks, one of 11 two."
    )
    if rows_of(results, "remat"):
        yield from ("", "## Long clips: `remat`", "")
        yield (
            "TensorFlow; the paper's arrangement for 128 frames (`temporal_strides=(2, 2, 2)`, windows of 4 frames in "
            "res3). Memory: the peak (`VmHWM`) above what the process held before the network was built, weights, "
            f"momentum and clips included, and the peak of the process. The limit was {results['memory_limit']:g} GiB."
        )
        yield from ("", *remat_table(results))
    if rows_of(results, "xla"):
        yield from (
            "",
            "## XLA: `jit_compile`",
            "",
            "The arrangement for 8 frames. JAX without XLA computes op by op.",
            "",
        )
        yield from xla_table(results)
    yield from ("", "## Targets", "", report.row(["target", "limit", "measured", "", "verdict"]))
    yield "|---|---:|---:|---|---|"
    for target in targets(results):
        measured = "" if target.measured is None else f"{target.measured:.3g}"
        yield report.row([target.name, f"≤ {target.limit:g}", measured, target.where, target.verdict])


# The command


def fingerprint():
    """Of the code that is measured and that measures: rows of other code are not kept."""
    package = ROOT / "keras_nonlocal"
    files = [package / f"{name}.py" for name in ("ops", "layers", "normalization")]
    files += [package / "applications" / f"{name}.py" for name in ("folded", "rematerialization", "resnet")]
    files += [ROOT / "benchmarks" / name for name in ("layers.py", "peers.py", "training.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results, with --quick results-quick")
    parser.add_argument("--backends", type=layers.names, default=tuple(BACKENDS), metavar="A,B", help="for XLA")
    parser.add_argument("--tables", type=layers.names, default=("remat", "xla"), metavar="A,B", help="remat, xla")
    parser.add_argument("--cases", type=layers.names, default=("",), metavar="A,B", help="how their names begin")
    parser.add_argument("--timeout", type=float, default=1500.0, help="seconds that a row may take")
    parser.add_argument("--memory-limit", type=float, default=20.0, help="GiB a process may hold")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="tiny clips: shows that it works, measures nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what is in training.json")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the tables of training.json")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, given, known in (("backends", options.backends, BACKENDS), ("tables", options.tables, ("remat", "xla"))):
        if set(given) - set(known):
            parser.error(f"--{name} must be some of {', '.join(known)}. Received: {','.join(given)}")
    options.start_timeout = 300.0
    if options.out is None:
        options.out = ROOT / "benchmarks" / ("results-quick" if options.quick else "results")
    return options


def write(results, folder):
    (folder / "training.md").write_text("\n".join(markdown(results)) + "\n")


def describe(backend, options):
    process = Process(backend, options)
    try:
        return process.ask(options.start_timeout, do="describe")
    finally:
        process.close()


def main(arguments=None):
    options = parse(arguments)
    if options.worker:
        return peers.serve(Worker(options.worker, options.threads))
    path = options.out / "training.json"
    if options.report:
        return write(json.loads(path.read_text()), options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    descriptions = {backend: describe(backend, options) for backend in BACKENDS}
    for backend, description in descriptions.items():
        if "failure" in description:
            layers.log(f"{backend}: {description['failure']}")
    settings = {
        "machine": layers.describe_machine(),
        "threads": options.threads,
        "memory_limit": options.memory_limit,
        "quick": options.quick,
        "sources": fingerprint(),
        "peers": descriptions,
    }
    results = layers.load(path, settings, options.fresh)
    rows = [row for row in list_rows(options) if "failure" not in descriptions[row.backend]]
    start = time.monotonic()
    for number, row in enumerate(rows, 1):
        if row.key in results["cases"]:
            continue
        reply = measure(row, options)
        results["cases"][row.key] = {**dataclasses.asdict(row), "case": row.case, **reply}
        layers.save(path, results)
        layers.log(f"[{time.monotonic() - start:5.0f} s] {number}/{len(rows)} {row.key}: {reply}")
    write(results, options.out)
    layers.log(f"{options.out / 'training.md'}")


if __name__ == "__main__":
    main()
