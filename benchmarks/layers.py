"""Time and memory of the non-local block, against everything else that computes it.

    pip install ".[bench]"
    python benchmarks/layers.py            # about an hour on 2 cores; writes benchmarks/results/layers.{md,png,json}
    python benchmarks/layers.py --quick    # tiny maps, a minute, numbers without meaning

Each peer runs in a process of its own, with the same number of threads, and only one computes at a time: first one
run each, which also measures memory, then rounds in which the peers take turns. A case is a size, with or without
pooling, and a pairwise function; finished cases are kept in layers.json and not measured again (`--fresh` does).
What runs out of memory, raises or takes too long is reported as such. Linux only.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import selectors
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import report  # noqa: E402

SIZES = {
    "res2 8×56×56×256": (8, 56, 56, 256),
    "res3 4×28×28×512": (4, 28, 28, 512),
    "res3 16×28×28×512": (16, 28, 28, 512),
    "res4 4×14×14×1024": (4, 14, 14, 1024),
    "res4 16×14×14×1024": (16, 14, 14, 1024),
    **{f"growth {frames * 256} positions": (frames, 16, 16, 64) for frames in (8, 16, 32, 64)},
}
QUICK_SIZES = {
    "res3 4×28×28×512": (2, 8, 8, 16),
    **{f"growth {frames * 16} positions": (frames, 4, 4, 8) for frames in (2, 4)},
}
GROWTH_PEERS = ("ours", "mmcv", "sdpa", "naive", "broadcast")
GIBIBYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    size: str
    shape: tuple
    pool: bool
    pairwise: str
    embedded: bool
    peers: tuple

    @property
    def key(self):
        return f"{self.size}, {'pooled' if self.pool else 'whole'}, {self.pairwise}"

    @property
    def modes(self):
        return ("both",) if self.size.startswith("growth") else ("forward", "both")


class Process:
    """A worker: one peer, until it fails or is closed."""

    script = __file__  # which serves the worker

    def __init__(self, peer, options):
        self.peer, self.options = peer, options
        threads = str(options.threads)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "KERAS_BACKEND": "tensorflow",
            "MKL_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.process = subprocess.Popen(
            [sys.executable, self.script, "--worker", peer, "--threads", threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            env=environment,
            bufsize=0,  # a second reply in a buffer would not wake the selector
        )

    def tell(self, **request):
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `hear` says why

    def hear(self, timeout):
        """The next reply, or why there is none. Watches time and memory meanwhile."""
        deadline = time.monotonic() + timeout
        limit = self.options.memory_limit * GIBIBYTE
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not selector.select(timeout=0.02):
                if self._resident() > limit:
                    return self._stop(f"out of memory (> {self.options.memory_limit:g} GiB)")
                if time.monotonic() > deadline:
                    return self._stop(f"> {timeout:g} s")
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        return {"failure": "out of memory (killed)" if code == -9 else f"the process died (exit status {code})"}

    def ask(self, timeout, **request):
        self.tell(**request)
        return self.hear(timeout)

    def close(self):
        self._stop(None)

    def _resident(self):
        try:
            pages = int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0  # gone
        return pages * os.sysconf("SC_PAGESIZE")

    def _stop(self, failure):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return {"failure": failure}


def describe_peers(options, process_class=Process):
    """What every peer says of itself, as its versions, or that it is not installed."""
    processes = {peer: process_class(peer, options) for peer in options.peers}
    for process in processes.values():
        process.tell(do="describe")
    replies = {peer: process.hear(options.start_timeout) for peer, process in processes.items()}
    for process in processes.values():
        process.close()
    return replies


def list_cases(descriptions, options):
    table = descriptions["ours"]["table"]  # pairwise function: whether it has θ and φ
    cases = []
    for size, shape in (QUICK_SIZES if options.quick else SIZES).items():
        growth = size.startswith("growth")
        for pairwise, embedded in table.items():
            for pool in (False,) if growth else (True,) if options.quick else (False, True):
                able = tuple(
                    peer
                    for peer, description in descriptions.items()
                    if "failure" not in description
                    and pairwise in (description["functions"] or table)
                    and (not growth or peer in GROWTH_PEERS)
                )
                cases.append(Case(size, shape, pool, pairwise, embedded, able))
    return [
        case
        for case in cases
        if (not options.cases or any(case.size.startswith(prefix) for prefix in options.cases))
        and (not options.pairwise or case.pairwise in options.pairwise)
    ]


def num_rounds(seconds):
    """How often a run is repeated after its probe, and whether the probe counts too: where it takes long, what a first
    run does once weighs nothing."""
    if seconds < 1:
        return 7, False
    if seconds < 5:
        return 3, False
    return (2, True) if seconds < 20 else (0, True)


def measure(case, options):
    """`{mode: {peer: {"seconds": [...], "extra_bytes": ...} or {"failure": ...}}}`"""
    processes = {peer: Process(peer, options) for peer in case.peers}
    try:
        for process in processes.values():
            process.tell(do="describe")
            process.tell(do="build", pairwise=case.pairwise, embedded=case.embedded, shape=case.shape, pool=case.pool)
        built = {}
        for peer, process in processes.items():
            described = process.hear(options.start_timeout)
            built[peer] = described if "failure" in described else process.hear(options.start_timeout)
        failures = {peer: reply["failure"] for peer, reply in built.items() if "failure" in reply}
        modes = {}
        for mode in case.modes:
            for peer, reply in built.items():
                error = reply.get("check", {}).get(mode)
                if peer not in failures and not isinstance(error, float):
                    failures[peer] = error
            modes[mode] = measure_mode(mode, processes, failures, options)
        return modes
    finally:
        for process in processes.values():
            process.close()


def measure_mode(mode, processes, failures, options, num_rounds=num_rounds):
    """Fills `failures`: what failed forward is not tried forward and backward."""
    cells, rounds = {}, {}
    for peer, process in processes.items():
        if peer not in failures:
            reply = process.ask(options.timeout, do="run", mode=mode, probe=True)
            if "failure" in reply:
                failures[peer] = reply["failure"]
                continue
            rounds[peer], probe_counts = num_rounds(reply["seconds"])
            seconds = [reply["seconds"]] if probe_counts else []
            cells[peer] = {"seconds": seconds, "extra_bytes": reply["extra_bytes"]}
    for turn in range(max(rounds.values(), default=0)):
        for peer in rounds:
            if turn < rounds[peer] and peer not in failures:
                time.sleep(0.02)  # the threads of the one before have gone to sleep
                reply = processes[peer].ask(options.timeout, do="run", mode=mode, probe=False)
                if "failure" in reply:
                    failures[peer] = reply["failure"]
                else:
                    cells[peer]["seconds"].append(reply["seconds"])
    return {**cells, **{peer: {"failure": failure} for peer, failure in failures.items()}}


def describe_machine():
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line), "?")
    simd = next((name for name in ("amx_bf16", "avx512f", "avx2") if f" {name}" in cpuinfo), "")
    memory = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES") / GIBIBYTE
    return {
        "cpu": f"{model}{f' ({simd})' if simd else ''}",
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def fingerprint():
    """Of the code that is measured and that measures: cells of other code are not kept."""
    files = [ROOT / "keras_nonlocal" / name for name in ("ops.py", "layers.py")]
    files += [ROOT / "benchmarks" / name for name in ("layers.py", "peers.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def load(path, settings, fresh):
    """The results so far, if they were measured with the same settings and versions."""
    if path.exists() and not fresh:
        results = json.loads(path.read_text())
        if all(results.get(key) == value for key, value in settings.items()):
            return results
        log(f"{path} has other settings or versions: starting anew")
    return {**settings, "date": time.strftime("%Y-%m-%d"), "cases": {}}


def save(path, results):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


def log(text):
    print(text, file=sys.stderr, flush=True)


def names(text):
    return tuple(text.split(","))


def add_options(parser, results, known_peers, tiny, report, timeout):
    """The options of every benchmark of `known_peers`, whose results are in the file `results`."""
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results, with --quick results-quick")
    parser.add_argument("--peers", type=names, default=tuple(known_peers), metavar="A,B", help=", ".join(known_peers))
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds a run may take")
    parser.add_argument("--memory-limit", type=float, default=18.0, help="GiB a process may hold")
    parser.add_argument("--quick", action="store_true", help=f"{tiny}: shows that it works, measures nothing")
    parser.add_argument("--fresh", action="store_true", help=f"forget what is in {results}")
    parser.add_argument("--report", action="store_true", help=f"measure nothing, write {report} of {results}")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def parse_options(parser, known_peers, arguments):
    """The options, those that were left out filled in; ours is always the first peer."""
    options = parser.parse_args(arguments)
    options.start_timeout = 300.0
    options.peers = ("ours", *(peer for peer in options.peers if peer != "ours"))
    if set(options.peers) - set(known_peers):
        parser.error(f"--peers must be some of {', '.join(known_peers)}. Received: {','.join(options.peers)}")
    if options.out is None:
        options.out = ROOT / "benchmarks" / ("results-quick" if options.quick else "results")
    return options


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "layers.json", peers.PEERS, tiny="tiny maps", report="table and plot", timeout=120.0)
    sizes = "sizes by how their names begin: res2, res3, res4, growth"
    parser.add_argument("--cases", type=names, default=(), metavar="A,B", help=sizes)
    parser.add_argument("--pairwise", type=names, default=(), metavar="A,B", help="pairwise functions")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parse_options(parser, peers.PEERS, arguments)


def main(arguments=None):
    options = parse(arguments)
    if options.worker:
        return peers.serve(peers.Worker(options.worker, options.threads))
    path = options.out / "layers.json"
    if options.report:
        return report.write(json.loads(path.read_text()), options.out)
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit('The plot needs matplotlib, which is not installed: pip install ".[bench]"')
    options.out.mkdir(parents=True, exist_ok=True)
    descriptions = describe_peers(options)
    if "failure" in descriptions["ours"]:
        sys.exit(f"keras_nonlocal does not run: {descriptions['ours']['failure']}")
    for peer, description in descriptions.items():
        if "failure" in description:
            log(f"{peer}: {description['failure']}")
    settings = {
        "machine": describe_machine(),
        "threads": options.threads,
        "timeout": options.timeout,
        "memory_limit": options.memory_limit,
        "quick": options.quick,
        "sources": fingerprint(),
        "peers": descriptions,
    }
    results = load(path, settings, options.fresh)
    cases = list_cases(descriptions, options)
    start = time.monotonic()
    for number, case in enumerate(cases, 1):
        if case.key in results["cases"]:
            continue
        modes = measure(case, options)
        results["cases"][case.key] = {
            "size": case.size,
            "shape": case.shape,
            "pool": case.pool,
            "pairwise": case.pairwise,
            "modes": modes,
        }
        save(path, results)
        log(f"[{time.monotonic() - start:5.0f} s] {number}/{len(cases)} {case.key}")
        for mode, cells in modes.items():
            log(f"    {mode}: " + "; ".join(f"{peer} {report.cell_text(cell)}" for peer, cell in cells.items()))
    report.write(json.loads(json.dumps(results)), options.out)
    log(f"{options.out / 'layers.md'}")


if __name__ == "__main__":
    main()
