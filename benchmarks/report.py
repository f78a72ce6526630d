"""The table, the targets and the plot of what `layers.py` has measured."""

import dataclasses
import math
import statistics

import peers

NAMES = {
    "ours": "**ours**",
    "mmcv": "mmcv `NonLocal3d`",
    "pytorchvideo": "pytorchvideo `NonLocal`",
    "sdpa": "PyTorch SDPA",
    "mha": "Keras MHA",
    "naive": "naive TF",
    "broadcast": "naive TF, broadcast",
}
MODES = {"forward": "forward", "both": "forward + backward"}
SOFTMAX = ("gaussian", "embedded_gaussian", "euclidean_gaussian")
# In the table, but no peer of the targets: nobody publishes it, it is half of what the algebra gives.
NOT_PUBLISHED = ("broadcast",)


# Ratios


def value(cell, quantity):
    """The median time in seconds or the extra memory in bytes; `None` where the run failed."""
    if cell is None or "failure" in cell:
        return None
    return statistics.median(cell["seconds"]) if quantity == "time" else cell["extra_bytes"]


def best_peer(case, mode, quantity, without=()):
    """`(peer, value)` of the best other peer that computes the same function, or `None`."""
    values = {
        peer: value(cell, quantity)
        for peer, cell in case["modes"].get(mode, {}).items()
        if peer not in ("ours", *without) and not peers.pools_projections(peer, case["pairwise"], case["pool"])
    }
    values = {peer: v for peer, v in values.items() if v is not None}
    return min(values.items(), key=lambda item: item[1]) if values else None


def ratio(case, mode, quantity, without=()):
    """Ours / best peer; 0 where no peer finished, `None` where ours did not or no peer was there."""
    ours = value(case["modes"].get(mode, {}).get("ours"), quantity)
    others = [
        peer
        for peer in case["modes"].get(mode, {})
        if peer not in ("ours", *without) and not peers.pools_projections(peer, case["pairwise"], case["pool"])
    ]
    if ours is None or not others:
        return None
    best = best_peer(case, mode, quantity, without)
    if best is None:
        return 0.0
    return ours / best[1] if best[1] else math.inf


def fit_exponent(positions, values):
    """The slope of log(value) over log(positions) by least squares; `None` for fewer than two points."""
    points = [(math.log(n), math.log(v)) for n, v in zip(positions, values, strict=True) if v]
    if len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def growth(results, pairwise, peer):
    """`(positions, seconds)` of the growth cases, `None` seconds where the run failed."""
    cases = [c for c in results["cases"].values() if c["size"].startswith("growth") and c["pairwise"] == pairwise]
    cases.sort(key=lambda case: math.prod(case["shape"][:-1]))
    if not any(peer in case["modes"]["both"] for case in cases):
        return [], []
    return [math.prod(c["shape"][:-1]) for c in cases], [value(c["modes"]["both"].get(peer), "time") for c in cases]


# Targets


@dataclasses.dataclass
class Target:
    name: str
    limit: float
    measured: float | None = None  # the worst value
    where: str = ""

    @property
    def verdict(self):
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "**missed**"


def worst_ratio(results, name, limit, quantity, modes, chosen, without=NOT_PUBLISHED):
    """The target that holds for all chosen cases: judged by the worst of them. A case in which ours fails is one."""
    target = Target(name, limit)
    num_cases = num_alone = 0
    for case in results["cases"].values():
        if case["size"].startswith("growth") or not chosen(case):
            continue
        for mode in modes:
            cell = case["modes"].get(mode, {}).get("ours")
            if cell is None:
                continue
            measured = math.inf if "failure" in cell else ratio(case, mode, quantity, without)
            if measured is None:
                continue
            num_cases += 1
            num_alone += "failure" not in cell and best_peer(case, mode, quantity, without) is None
            if target.measured is None or measured > target.measured:
                target.measured = measured
                target.where = f"{case['size']}{', pooled' if case['pool'] else ''}, {case['pairwise']}, {MODES[mode]}"
    if num_cases:
        target.where = f"worst of {num_cases}: {target.where}"
        if num_alone:
            target.where += f"; in {num_alone} no peer finished"
    return target


def targets(results):
    def softmax(case):
        return case["pairwise"] in SOFTMAX

    def concatenation_at_res4(case):
        return case["pairwise"] == "concatenation" and case["size"].startswith("res4")

    def dot_product_at_res3(case):
        return case["pairwise"] == "dot_product" and case["size"].startswith("res3") and not case["pool"]

    def softmax_at_16_frames(case):
        return softmax(case) and case["size"].startswith("res3 16×28×28")

    every, both = ("forward", "both"), ("both",)
    rows = [
        worst_ratio(results, "dot product, res3 whole: time", 0.15, "time", every, dot_product_at_res3),
        worst_ratio(results, "concatenation, res4: time", 0.02, "time", every, concatenation_at_res4),
        worst_ratio(results, "concatenation, res4: extra memory", 0.05, "memory", every, concatenation_at_res4),
        worst_ratio(results, "… time, against *broadcast* too", 0.02, "time", every, concatenation_at_res4, ()),
        worst_ratio(
            results, "… extra memory, against *broadcast* too", 0.05, "memory", every, concatenation_at_res4, ()
        ),
        trainable(results, concatenation_at_res4),
        worst_ratio(results, "softmax forms, every size: time forward + backward", 1.0, "time", both, softmax),
        worst_ratio(results, "softmax forms, 16×28×28: extra memory", 0.25, "memory", every, softmax_at_16_frames),
    ]
    for pairwise in ("dot_product", "concatenation"):
        exponent = fit_exponent(*growth(results, pairwise, "ours"))
        rows.append(Target(f"{pairwise}: growth exponent", 1.2, exponent, "time forward + backward"))
    return rows


def trainable(results, chosen):
    """Not a ratio: how many of the cases have no finite gradient."""
    cells = [case["modes"]["both"]["ours"] for case in results["cases"].values() if chosen(case)]
    failed = sum("failure" in cell for cell in cells)
    where = f"failures in {len(cells)} cases, forward + backward"
    return Target("concatenation, res4: trainable", 0, failed if cells else None, where if cells else "")


# The table


def in_short(results):
    """Ours over the best peer in time and in extra memory, forward and backward: what the README shows."""
    cases = [case for case in results["cases"].values() if not case["size"].startswith("growth")]
    sizes = list(dict.fromkeys(case["size"] for case in cases))
    by_row = {}
    for case in cases:
        by_row.setdefault((case["pairwise"], case["pool"]), {})[case["size"]] = case
    yield row(["f", "keys", *map(short, sizes)])
    yield row(["---"] * 2 + ["---:"] * len(sizes))
    for (pairwise, pool), of_size in sorted(by_row.items()):
        texts = [in_short_text(of_size[size]) if size in of_size else "" for size in sizes]
        yield row([pairwise.replace("_", " "), "pooled" if pool else "whole", *texts])


def in_short_text(case):
    if value(case["modes"]["both"].get("ours"), "time") is None:
        return "fails"
    if best_peer(case, "both", "time", NOT_PUBLISHED) is None:
        return "alone"
    return " / ".join(f"{ratio(case, 'both', quantity, NOT_PUBLISHED):.2f}" for quantity in ("time", "memory"))


def time_text(seconds):
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 0.1
        else f"{seconds * 1e3:.0f} ms"
    )


def memory_text(num_bytes):
    mebibytes = num_bytes / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def cell_text(cell):
    if cell is None:
        return ""
    if "failure" in cell:
        return f"fails: {cell['failure']}"
    return f"{time_text(value(cell, 'time'))} / {memory_text(value(cell, 'memory'))}"


def ratio_text(case, mode, quantity):
    measured = ratio(case, mode, quantity)
    if measured is None:
        return ""
    best = best_peer(case, mode, quantity)
    return f"{measured:.3g} ({best[0]})" if best else "no peer"


def row(cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def size_table(cases, present):
    yield row(["f", "keys", "pass", *(NAMES[peer] for peer in present), "time ÷ best", "memory ÷ best"])
    yield row(["---"] * 3 + ["---:"] * (len(present) + 2))
    for case in cases:
        for mode, cells in case["modes"].items():
            texts = []
            for peer in present:
                mark = "*" if peers.pools_projections(peer, case["pairwise"], case["pool"]) and peer in cells else ""
                texts.append(cell_text(cells.get(peer)) + mark)
            ratios = [ratio_text(case, mode, quantity) for quantity in ("time", "memory")]
            keys = "pooled" if case["pool"] else "whole"
            yield row([case["pairwise"].replace("_", " "), keys, MODES[mode], *texts, *ratios])


def growth_table(results, present):
    functions = dict.fromkeys(c["pairwise"] for c in results["cases"].values() if c["size"].startswith("growth"))
    positions = next(growth(results, pairwise, "ours")[0] for pairwise in functions)
    yield row(["f", "peer", *(f"N = {n}" for n in positions), "exponent"])
    yield row(["---"] * 2 + ["---:"] * (len(positions) + 1))
    for pairwise in functions:
        for peer in present:
            ns, seconds = growth(results, pairwise, peer)
            if ns:
                exponent = fit_exponent(ns, seconds)
                texts = ["fails" if s is None else time_text(s) for s in seconds]
                yield row(
                    [pairwise.replace("_", " "), NAMES[peer], *texts, "" if exponent is None else f"{exponent:.2f}"]
                )


def machine_text(results, script):
    """Where and when the figures were measured, with which versions."""
    machine, versions = results["machine"], {}
    for description in results["peers"].values():
        versions |= description.get("versions", {})
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {results['threads']} threads for every peer, "
        f"{machine['memory_gib']:g} GiB; {machine['system']}; Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {results['date']}. Written by `python benchmarks/{script}.py`."
    )


def markdown(results):
    present = [p for p in NAMES if "failure" not in results["peers"].get(p, {"failure": 1})]
    yield "# The non-local block against its peers"
    yield ""
    yield machine_text(results, "layers")
    if results["quick"]:
        yield ""
        yield "**Tiny maps (`--quick`): shows that everything runs. The numbers mean nothing.**"
    yield ""
    yield (
        "Each cell: median time / extra memory of the whole block (θ, φ, g, pooling, operation, W_z, sum; batch 1, "
        "float32, no normalisation layer). Extra memory is the peak of a run above what the process held before it. "
        "Backward is to the inputs and all weights. ÷ best: ours over the fastest, or leanest, peer that computes the "
        "same function. Before it ran, every peer was checked on a small map against the formula in float64: output "
        "and gradient of the inputs."
    )
    yield from ("", "## In short: time / extra memory of ours over the best peer's, forward + backward", "")
    yield from in_short(results)
    yield from ("", "*Alone*: no peer finished. The peers here are without *broadcast*, see the notes.")
    missing = {peer: d["failure"] for peer, d in results["peers"].items() if "failure" in d}
    for peer, failure in missing.items():
        yield ""
        yield f"{NAMES[peer]}: {failure}."
    for size in dict.fromkeys(case["size"] for case in results["cases"].values()):
        if size.startswith("growth"):
            continue
        cases = sorted(
            (case for case in results["cases"].values() if case["size"] == size),
            key=lambda case: (case["pairwise"] in SOFTMAX, case["pairwise"], case["pool"]),
        )
        yield from ("", f"## {size}", "", *size_table(cases, present))
    if any(case["size"].startswith("growth") for case in results["cases"].values()):
        yield from ("", "## Growth: time forward + backward, 64 channels, whole keys", "")
        yield from growth_table(results, present)
    yield from ("", "## Notes", "", *notes(results))
    yield from ("", "## Targets", "", row(["target", "limit", "measured", "", "verdict"]), "|---|---:|---:|---|---|")
    for target in targets(results):
        measured = "" if target.measured is None else f"{target.measured:.3g}"
        yield row([target.name, f"≤ {target.limit:g}", measured, target.where, target.verdict])


def notes(results):
    yield (
        "- \\* mmcv pools φ(x) and g(x) instead of x. With pooling that is another function at about the same cost, "
        "and no peer of the ratios."
    )
    yield (
        "- pytorchvideo and `MultiHeadAttention` divide the scores by √D; their θ is multiplied by it here. SDPA and "
        "MHA stand in the same block: the same projections, pooling and sum."
    )
    yield (
        "- *naive TF* holds all scores, and repeats and concatenates for the concatenation form, as published code "
        "does. *Broadcast* is that form with a_i + b_j instead, which nobody publishes: it is in the ratios of the "
        "tables, and has lines of its own in the targets."
    )
    yield (
        f"- Fails: *> {results['timeout']:g} s* is the time limit of one run, *out of memory* a process of more than "
        f"{results['memory_limit']:g} GiB, *killed* one that "
        "the system stopped, as the case's other peers stay in memory. What fails forward is not tried forward + "
        "backward. Where no peer finishes but ours does, a target counts as met in that case."
    )
    yield "- 7 rounds in turns; 3 where a run takes 1 s or more; 1 from 20 s."


# The plot


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(
        zip(NAMES, ("#d62728", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#7f7f7f", "#bcbd22"), strict=True)
    )
    cases = [case for case in results["cases"].values() if not case["size"].startswith("growth")]
    functions = list(dict.fromkeys(case["pairwise"] for case in results["cases"].values()))
    figure, axes = pyplot.subplots(
        3, len(functions), figsize=(4.2 * len(functions), 12), squeeze=False, layout="constrained", sharey="row"
    )
    for column, pairwise in enumerate(functions):
        chosen = [case for case in cases if case["pairwise"] == pairwise]
        chosen.sort(key=lambda case: case["pool"])
        labels = [f"{short(case['size'])}{' pooled' if case['pool'] else ''}" for case in chosen]
        for line, quantity in enumerate(("time", "memory")):
            ax = axes[line, column]
            ax.set_yscale("log")
            ax.axhline(1, color="black", linewidth=0.8)
            for peer in NAMES:
                xs, ys = [], []
                for x, case in enumerate(chosen):
                    best = best_peer(case, "both", quantity)
                    v = value(case["modes"]["both"].get(peer), quantity)
                    if v and best and best[1]:
                        xs.append(x)
                        ys.append(v / best[1])
                if xs:
                    ax.plot(xs, ys, "D" if peer == "ours" else "o", color=colours[peer], label=plain(peer), zorder=3)
            ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
            ax.set_xlim(-0.5, max(len(labels), 1) - 0.5)
            ax.grid(axis="both", alpha=0.3)
            if line == 0:
                ax.set_title(pairwise.replace("_", " "))
        ax = axes[2, column]
        for peer in NAMES:
            ns, seconds = growth(results, pairwise, peer)
            points = [(n, s) for n, s in zip(ns, seconds, strict=True) if s]
            exponent = fit_exponent(ns, seconds)
            if points:
                label = plain(peer) + ("" if exponent is None else f": N^{exponent:.2f}")
                marker = "D-" if peer == "ours" else "o-"
                ax.loglog(*zip(*points, strict=True), marker, color=colours[peer], label=label)
                ax.set_xticks(ns, ns)
                ax.minorticks_off()
        ax.set_xlabel("positions (64 channels)")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    axes[0, 0].set_ylabel("time, forward + backward,\nrelative to the best peer")
    axes[1, 0].set_ylabel("extra memory, forward + backward,\nrelative to the leanest peer")
    axes[2, 0].set_ylabel("growth: seconds, forward + backward")
    handles = {label: h for ax in axes[:2].flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles) or 1, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def short(size):
    """`res3 4×28×28×512` to `res3 4×28×28`."""
    return size.rsplit("×", 1)[0]


def plain(peer):
    return NAMES[peer].replace("*", "").replace("`", "")


def write(results, folder):
    (folder / "layers.md").write_text("\n".join(markdown(results)) + "\n")
    plot(results, folder / "layers.png")
