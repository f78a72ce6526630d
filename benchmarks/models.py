"""Time and memory of the networks: a training step and an inference of C2D and I3D ResNet-50, against PyTorch's.

    pip install ".[bench]"
    python benchmarks/models.py            # about 15 minutes on 2 cores; writes benchmarks/results/models.{md,json}
    python benchmarks/models.py --quick    # small clips, minutes, numbers without meaning

Networks without and with the five non-local blocks of the paper, on clips of 8×224×224. Each runs in a process of its
own, with the same number of threads, and only one computes at a time: first each once to get warm and once to measure
memory, then rounds in which they take turns, so that the cost of the five blocks, too, is of the same minutes.
Finished cases are kept in models.json and not measured again (`--fresh` does). Linux only.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import layers  # noqa: E402
import networks  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

SHAPE, QUICK_SHAPE = (8, 224, 224), (4, 64, 64)
BLOCKS = (0, 5)
MODES = {"inference": "inference", "training": "training step"}
NAMES = {"ours": "**ours**", "pytorchvideo": "PyTorchVideo", "twin": "PyTorch, channels last"}
TOLERANCE = 1e-4
LIMITS = {"training": 0.7, "inference": 1.0}  # of the best peer's time
MAX_COST = 1.3  # a training step with the five blocks, of one without


class Process(layers.Process):
    script = __file__


# Measuring


def measure(network, weights, able, options):
    """What the report shows of one network: costs, differences of the scores, and cells by pass, blocks and peer."""
    running = {(peer, blocks): Process(peer, options) for blocks in BLOCKS for peer in able}
    try:
        built = {}
        for (peer, blocks), process in running.items():
            described = process.ask(options.start_timeout, do="describe")
            built[peer, blocks] = (
                described
                if "failure" in described
                else process.ask(
                    options.start_timeout,
                    do="build",
                    network=network,
                    blocks=blocks,
                    shape=options.shape,
                    batch=options.batch,
                    weights=weights[blocks],
                )
            )
        failures, costs, differences = compare(built)
        modes = {}
        for mode in MODES:
            cells = layers.measure_mode(mode, running, failures, options, lambda seconds: (options.rounds, False))
            modes[mode] = {
                str(blocks): {peer: cells[peer, blocks] for peer in able if (peer, blocks) in cells}
                for blocks in BLOCKS
            }
        return {"costs": costs, "differences": differences, "modes": modes}
    finally:
        for process in running.values():
            process.close()


def compare(built):
    """Ours and the peers, as they were built: `(failures, costs by blocks, differences of scores by blocks and peer)`.

    A peer with other parameters or scores than ours computes another function, and is not measured.
    """
    failures = {key: reply["failure"] for key, reply in built.items() if "failure" in reply}
    costs, differences = {}, {}
    for peer, blocks in built:
        ours, theirs = built["ours", blocks], built[peer, blocks]
        if peer == "ours":
            differences[str(blocks)] = {}
            if "failure" not in ours:
                costs[str(blocks)] = {"parameters": ours["parameters"], "macs": ours["macs"]}
                first, second = ours["scores"]["valid"]
                if networks.difference(first, second) < 100 * TOLERANCE:
                    failures["ours", blocks] = "two clips have the same scores, so that none can be compared"
        elif "failure" not in theirs and "failure" in ours:
            failures[peer, blocks] = "nothing to compare with"
        elif "failure" not in theirs:
            found = networks.difference(theirs["scores"], ours["scores"][networks.PEERS[peer][2]])
            differences[str(blocks)][peer] = found
            if theirs["parameters"] != ours["parameters"]:
                failures[peer, blocks] = f"has {theirs['parameters']} parameters, ours {ours['parameters']}"
            elif not found <= TOLERANCE:
                failures[peer, blocks] = f"computes another function: scores differ by {found:.1e}"
    return failures, costs, differences


# The report


def best_peer(cells, quantity):
    """`(peer, value)` of the best other peer, or `None`."""
    values = {peer: report.value(cell, quantity) for peer, cell in cells.items() if peer != "ours"}
    values = {peer: value for peer, value in values.items() if value is not None}
    return min(values.items(), key=lambda item: item[1]) if values else None


def ratio(cells, quantity):
    """Ours / best peer; infinite where ours failed, `None` where no peer ran."""
    best, ours = best_peer(cells, quantity), report.value(cells.get("ours"), quantity)
    if best is None or not best[1]:
        return None
    return math.inf if ours is None else ours / best[1]


def cost_of_blocks(by_blocks, peer):
    """The time with five blocks ÷ the time without; `None` where one was not measured."""
    without, five = (report.value(by_blocks.get(str(blocks), {}).get(peer), "time") for blocks in BLOCKS)
    return five / without if five and without else None


def worst(name, limit, found):
    """The target, judged by the worst of `(value or None, where)`.

    One that was not measured leaves it open, unless ours failed elsewhere.
    """
    missing = [where for value, where in found if value is None]
    found = [(value, where) for value, where in found if value is not None]
    if not found or (missing and max(found)[0] < math.inf):
        return report.Target(name, limit, None, f"not measured: {'; '.join(missing)}")
    value, where = max(found, key=lambda item: item[0])
    return report.Target(name, limit, value, f"worst of {len(found)}: {where}")


def targets(results):
    cases = results["cases"]
    for mode, limit in LIMITS.items():
        yield worst(
            f"{MODES[mode]}: time of the best peer's",
            limit,
            [
                (ratio(cells, "time"), f"{key}, {blocks} blocks")
                for key, case in cases.items()
                for blocks, cells in case["modes"][mode].items()
            ],
        )
    costs = [(cost_of_blocks(case["modes"]["training"], "ours"), key) for key, case in cases.items()]
    yield worst("five blocks: time of the training step without", MAX_COST, costs)


def in_short(results):
    """Ours over the best peer in time and memory: what the README shows."""
    yield report.row(["network", "blocks", *MODES.values(), "five blocks ÷ none, training step"])
    yield report.row(["---"] * 2 + ["---:"] * (len(MODES) + 1))
    for key, case in results["cases"].items():
        for blocks in BLOCKS:
            texts = []
            for mode in MODES:
                ratios = [ratio(case["modes"][mode].get(str(blocks), {}), quantity) for quantity in ("time", "memory")]
                texts.append(" / ".join("–" if value is None else f"{value:.2f}" for value in ratios))
            cost = cost_of_blocks(case["modes"]["training"], "ours") if blocks else None
            yield report.row([key, blocks, *texts, "" if cost is None else f"{cost:.2f}"])


def cell_table(case, present):
    yield report.row(["pass", "blocks", *(NAMES[peer] for peer in present), "time ÷ best", "memory ÷ best"])
    yield report.row(["---"] * 2 + ["---:"] * (len(present) + 2))
    for mode, by_blocks in case["modes"].items():
        for blocks, cells in by_blocks.items():
            ratios = []
            for quantity in ("time", "memory"):
                value = ratio(cells, quantity)
                ratios.append("" if value is None else f"{value:.2f} ({NAMES[best_peer(cells, quantity)[0]]})")
            texts = [report.cell_text(cells.get(peer)) for peer in present]
            yield report.row([MODES[mode], blocks, *texts, *ratios])


def block_table(results, present):
    yield report.row(["network", "pass", *(NAMES[peer] for peer in present), "multiply-adds"])
    yield report.row(["---"] * 2 + ["---:"] * (len(present) + 1))
    for key, case in results["cases"].items():
        macs = [case["costs"].get(str(blocks), {}).get("macs", {}).get("valid") for blocks in BLOCKS]
        for mode, by_blocks in case["modes"].items():
            values = [cost_of_blocks(by_blocks, peer) for peer in present]
            values.append(macs[1] / macs[0] if all(macs) else None)
            yield report.row([key, MODES[mode], *("" if value is None else f"{value:.2f}" for value in values)])


def network_table(results):
    checked = [peer for peer in NAMES if peer != "ours"]
    paddings = {padding: [NAMES[p] for p in NAMES if networks.PEERS[p][2] == padding] for padding in ("valid", "same")}
    yield report.row(
        ["network", "blocks", "parameters", *(f"multiply-adds: {', '.join(who)}" for who in paddings.values())]
        + [f"scores of {NAMES[peer]} differ by" for peer in checked]
    )
    yield report.row(["---", "---:"] + ["---:"] * (1 + len(paddings) + len(checked)))
    for key, case in results["cases"].items():
        for blocks, costs in case["costs"].items():
            differences = case["differences"][blocks]
            yield report.row(
                [key, blocks, f"{costs['parameters'] / 1e6:.2f} M"]
                + [f"{costs['macs'][padding] / 1e9:.2f} G" for padding in paddings]
                + [f"{differences[peer]:.1e}" if peer in differences else "" for peer in checked]
            )


def markdown(results):
    descriptions = results["peers"]
    present = [peer for peer in NAMES if "failure" not in descriptions.get(peer, {"failure": "not asked"})]
    yield "# ResNet-50 video networks against PyTorch's"
    yield ""
    yield report.machine_text(results, "models")
    if results["quick"]:
        yield ""
        yield "**Small clips (`--quick`): shows that everything runs. The numbers mean nothing.**"
    yield ""
    yield (
        f"Each cell: median time of {results['rounds']} turns, in each the second of two runs / memory, the peak of a "
        "run above what the process held with its libraries loaded (weights, momentum and compiled graphs count). "
        "Float32. A training step: forward, cross-entropy, backward to all weights, SGD with Nesterov momentum and "
        "weight decay. Ours: `train_on_batch`, the compiled step of `fit`, and `predict_on_batch`; PyTorch: eager. "
        "÷ best: ours over the fastest, or leanest, peer."
    )
    yield from ("", "## In short: time / memory of ours over the best peer's", "", *in_short(results))
    for peer, description in descriptions.items():
        if "failure" in description:
            yield from ("", f"{NAMES[peer]}: {description['failure']}.")
    for key, case in results["cases"].items():
        yield from ("", f"## {key}", "", *cell_table(case, present))
    yield from ("", "## The five blocks: time with ÷ time without", "", *block_table(results, present))
    yield from ("", "## The networks", "", *network_table(results), "", *NOTES)
    yield from ("", "## Targets", "", report.row(["target", "limit", "measured", "", "verdict"]))
    yield "|---|---:|---:|---|---|"
    for target in targets(results):
        measured = "" if target.measured is None else f"{target.measured:.2f}"
        yield report.row([target.name, f"≤ {target.limit:g}", measured, target.where, target.verdict])


NOTES = (
    "- The blocks stand after the same residual blocks (res3: 1, 3; res4: 1, 3, 5), with sub-sampled keys and batch "
    "normalization.",
    "- Before it ran, every peer got the same weights, and its log-probabilities of two clips were compared with ours, "
    f"relative to the largest: at most {TOLERANCE:g}. PyTorchVideo pads its first pooling, which makes res2 56×56 and "
    "not 55×55; it was compared with ours built so, and runs as it comes.",
    "- PyTorchVideo runs in PyTorch's own layout, channels first, as it comes. *Channels last* is our very network "
    "(`tests/release_twin.py`) with weights and clips in `channels_last_3d` and ReLUs in place.",
)


# The command


def fingerprint():
    """Of the code that is measured and that measures: cells of other code are not kept."""
    package = ROOT / "keras_nonlocal"
    files = [package / name for name in ("ops.py", "normalization.py", "layers.py")]
    files += sorted((package / "applications").glob("*.py"))
    files += [ROOT / "benchmarks" / name for name in ("layers.py", "models.py", "networks.py", "peers.py")]
    files.append(ROOT / "tests" / "release_twin.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    layers.add_options(parser, "models.json", networks.PEERS, tiny="small clips", report="the table", timeout=300.0)
    known = ", ".join(networks.NETWORKS)
    parser.add_argument("--networks", type=layers.names, metavar="A,B", help=f"how their names begin: {known}")
    parser.add_argument("--batch", type=int, default=1, help="clips of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = layers.parse_options(parser, networks.PEERS, arguments)
    prefixes = options.networks or (("C2D",) if options.quick else ("",))
    options.networks = [name for name in networks.NETWORKS if name.startswith(tuple(prefixes))]
    if not options.networks:
        parser.error(f"--networks must name some of {known}. Received: {','.join(prefixes)}")
    options.shape = QUICK_SHAPE if options.quick else SHAPE
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def write(results, folder):
    (folder / "models.md").write_text("\n".join(markdown(results)) + "\n")


def main(arguments=None):
    options = parse(arguments)
    if options.worker:
        return peers.serve(networks.Worker(options.worker, options.threads))
    path = options.out / "models.json"
    if options.report:
        return write(json.loads(path.read_text()), options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    descriptions = layers.describe_peers(options, Process)
    if "failure" in descriptions["ours"]:
        sys.exit(f"keras_nonlocal does not run: {descriptions['ours']['failure']}")
    for peer, description in descriptions.items():
        if "failure" in description:
            layers.log(f"{peer}: {description['failure']}")
    able = [peer for peer, description in descriptions.items() if "failure" not in description]
    settings = {
        "machine": layers.describe_machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "quick": options.quick,
        "sources": fingerprint(),
        "peers": descriptions,
    }
    results = layers.load(path, settings, options.fresh)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            key = f"{network}, {'×'.join(map(str, (options.batch, *options.shape)))}"
            if key in results["cases"]:
                continue
            weights = networks.make_weights(pathlib.Path(folder), network)
            results["cases"][key] = measure(network, weights, able, options)
            layers.save(path, results)
            layers.log(f"[{time.monotonic() - start:5.0f} s] {key}")
            for mode, by_blocks in results["cases"][key]["modes"].items():
                for blocks, cells in by_blocks.items():
                    texts = (f"{peer} {report.cell_text(cell)}" for peer, cell in cells.items())
                    layers.log(f"    {MODES[mode]}, {blocks} blocks: {'; '.join(texts)}")
    write(json.loads(json.dumps(results)), options.out)
    layers.log(f"{options.out / 'models.md'}")


if __name__ == "__main__":
    main()
