"""Load test: many clients at once, good and bad requests among each other, against a running server.

    pip install ".[serve]"
    python examples/serve/load.py                 # exports a small network and has server.py serve it
    python examples/serve/load.py model.keras --grpc localhost:8500 --rest http://localhost:8501 --pid 4711

Every good request must get the scores of the Keras model in this process, every bad one a refusal that says why; the
server must live on, with as much memory as before. Latencies are from a clip to its scores, encoding included. The exit
code is 1 where something is not so. In the second form MODEL is what the server serves; --pid is only for its memory.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.core.framework import tensor_pb2  # noqa: E402

from keras_nonlocal.applications import C2DResNet11, preprocess_input  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from client import GrpcClient, RestClient, ServingError, encode_jpeg  # noqa: E402

TOLERANCE = 1e-5
REFUSALS = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", 400, 413)
PROTOCOLS = {"gRPC": GrpcClient, "REST": RestClient}
CLIPS = 8
BAD_SHARE = 5  # one in so many
DIRECT_CALLS = 50


# Requests


class Clip:
    """A clip and what the model says of it: of its pixels, and of its frames as JPEG files."""

    def __init__(self, model, num_frames, height, width, rng):
        # Large patches: after JPEG, and for a network, noise is all alike.
        patches = rng.integers(0, 256, (num_frames, 4, 4, 3), np.uint8)
        rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
        self.pixels = patches[:, rows][:, :, columns][None]
        self.files = encode_jpeg(self.pixels[0])[None]
        decoded = np.stack([decode_jpeg(file) for file in self.files[0]])[None]
        self.scores = {"serving_default": scores(model, self.pixels), "jpeg": scores(model, decoded)}


def scores(model, pixels):
    return np.asarray(model(preprocess_input(pixels), training=False), "float32")


def decode_jpeg(file):
    # The DCT of the signature `jpeg`; TensorFlow's usual one is less exact.
    return tf.io.decode_jpeg(file, 3, dct_method="INTEGER_ACCURATE").numpy()


def _proto(shape, content):
    return tensor_pb2.TensorProto(
        dtype=tf.uint8.as_datatype_enum, tensor_shape=tf.TensorShape(shape).as_proto(), tensor_content=content
    )


def _truncated(clip):
    files = clip.files.copy()
    files[0, 0] = files[0, 0][: len(files[0, 0]) // 2]
    return {"frames": files}


# What → (signature, inputs from a clip), or the whole body for REST. `huge` is a number of bytes.
GOOD = {
    "pixels": ("serving_default", lambda clip: {"clips": clip.pixels}),
    "JPEG": ("jpeg", lambda clip: {"frames": clip.files}),
}
BAD = {
    "gRPC": {
        "wrong rank": ("serving_default", lambda clip, huge: {"clips": clip.pixels[0]}),
        "wrong dtype": ("serving_default", lambda clip, huge: {"clips": clip.pixels.astype("float32")}),
        "truncated JPEG": ("jpeg", lambda clip, huge: _truncated(clip)),
        "empty batch": ("serving_default", lambda clip, huge: {"clips": clip.pixels[:0]}),
        # As told in its shape: 3 bytes that say they were 30 GB a frame.
        "huge size": (
            "serving_default",
            lambda clip, huge: {"clips": _proto([1, clip.pixels.shape[1], 10**5, 10**5, 3], b"abc")},
        ),
        "huge message": ("serving_default", lambda clip, huge: {"clips": _proto([huge], bytes(huge))}),
    },
    "REST": {
        "wrong rank": ("serving_default", lambda clip, huge: {"clips": clip.pixels[0]}),
        "wrong dtype": ("serving_default", lambda clip, huge: {"clips": clip.pixels / 2}),
        "truncated JPEG": ("jpeg", lambda clip, huge: _truncated(clip)),
        "empty batch": (None, lambda clip, huge: b'{"instances": []}'),
        "huge message": (None, lambda clip, huge: b'{"instances": [%s0]}' % (b"0," * (huge // 2))),
    },
}


def plan(requests, seed):
    """`(protocol, what, is_good)` of each request: all kinds equally often, in random order."""
    good = itertools.cycle([(protocol, what, True) for what in GOOD for protocol in PROTOCOLS])
    bad = itertools.cycle([(protocol, what, False) for protocol, kinds in BAD.items() for what in kinds])
    chosen = [next(good) if index % BAD_SHARE else next(bad) for index in range(requests)]
    np.random.default_rng(seed).shuffle(chosen)
    return [(str(protocol), str(what), is_good == "True") for protocol, what, is_good in np.array(chosen)]


# The test


class LoadTest:
    """Sends requests and keeps what came of them.

    Args:
        model: The Keras model that is served.
        shape: `(num_frames, height, width)` of its clips.
        addresses: Protocol → address.
        name: Name of the model on the server.
        pid: Process of the server, to read its memory, or `None`.
        huge: Size of the huge messages, in bytes.
    """

    def __init__(self, model, shape, addresses, name, pid=None, huge=129 << 20, seed=0):
        self._addresses, self._name, self._pid, self._huge, self._seed = addresses, name, pid, huge, seed
        rng = np.random.default_rng(seed)
        self._clips = [Clip(model, *shape, rng) for _ in range(CLIPS)]
        self._direct = self._time_direct(model)
        self._lock, self._huge_lock = threading.Lock(), threading.Lock()
        self._seconds = collections.defaultdict(list)
        self._refusals, self._problems, self._memory = {}, [], []

    def _time_direct(self, model):
        """Seconds of calls one after the other: of the model as it is, and as a graph."""
        graph = tf.function(lambda pixels: model(preprocess_input(pixels), training=False))
        calls = {"model(x)": lambda x: scores(model, x), "as a graph": lambda x: graph(tf.constant(x)).numpy()}
        times = {}
        for name, call in calls.items():
            call(self._clips[0].pixels)
            clips = itertools.islice(itertools.cycle(self._clips), DIRECT_CALLS)
            times[name] = [_timed(call, clip.pixels)[0] for clip in clips]
        return times

    def run(self, requests, clients):
        """Sends so many requests from so many clients, and returns the figures."""
        with contextlib.ExitStack() as stack:
            alone = self._open(stack)
            for protocol, what in itertools.product(PROTOCOLS, GOOD):  # one client, for what the way alone costs
                for clip in (*self._clips, *self._clips):
                    self._send(alone, protocol, what, True, clip, "alone")
            todo = iter(list(enumerate(plan(requests, self._seed))))
            crowd = [self._open(stack) for _ in range(clients)]
            threads = [threading.Thread(target=self._work, args=(client, todo)) for client in crowd]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - start
            try:
                alone["gRPC"].metadata()
                alone["REST"].metadata()
            except ServingError as error:
                self._problems.append(f"The server does not live: {error}")
        return self._figures(requests, clients, seconds)

    def _open(self, stack):
        opened = {key: client(self._addresses[key], self._name, timeout=300) for key, client in PROTOCOLS.items()}
        for client in opened.values():
            stack.callback(client.close)
        return opened

    def _work(self, client, todo):
        while True:
            with self._lock:
                index, request = next(todo, (None, None))
            if index is None:
                return
            try:
                self._send(client, *request, self._clips[index % CLIPS], "loaded")
            except Exception as error:  # a thread's end would go unseen
                self._problems.append(f"{request}: {type(error).__name__}: {error}")
            with self._lock:
                self._memory.append(resident_bytes(self._pid) if self._pid else 0)

    def _send(self, client, protocol, what, is_good, clip, when):
        signature, make = GOOD[what] if is_good else BAD[protocol][what]
        # One at a time: what is tested is the server's memory, not this process's.
        with self._huge_lock if what == "huge message" else contextlib.nullcontext():
            inputs = make(clip) if is_good else make(clip, self._huge)
            seconds, answer = _timed(_ask, client[protocol], signature, inputs)
        problem = None
        if is_good:
            problem = _wrong(answer, clip.scores[signature])
            self._seconds[when, protocol, what].append(seconds)
        elif not isinstance(answer, ServingError):
            problem = "was answered"
        elif answer.code not in REFUSALS or not answer.message or len(answer.message) > 1000:
            problem = f"was refused by {answer.code}: {answer.message[:1000]!r}"
        else:
            self._refusals[f"{protocol}, {what}"] = str(answer)
        if problem:
            self._problems.append(f"{protocol}, {what}: {problem}")

    def _figures(self, requests, clients, seconds):
        loaded = [time for key, times in self._seconds.items() if key[0] == "loaded" for time in times]
        alone = [time for key, times in self._seconds.items() if key[0] == "alone" for time in times]
        direct = {name: _percentiles(times) for name, times in self._direct.items()}
        base = direct["model(x)"]

        def described(times):
            found = _percentiles(times)
            return found | {
                "p50_ratio": found["p50_ms"] / base["p50_ms"],
                "p99_ratio": found["p99_ms"] / base["p99_ms"],
            }

        throughput = len(loaded) / seconds
        expected = np.concatenate([clip.scores["serving_default"] for clip in self._clips])
        gaps = np.abs(expected[:, None] - expected).max(-1)[~np.eye(CLIPS, dtype=bool)]
        figures = {
            "requests": requests,
            "clients": clients,
            "good": len(loaded),
            "bad": requests - len(loaded),
            "seconds": seconds,
            "direct": direct,
            "alone": described(alone),
            "loaded": described(loaded),
            "loaded_by_kind": {
                ", ".join(key[1:]): described(x) for key, x in self._seconds.items() if key[0] == "loaded"
            },
            "good_per_second": throughput,
            "throughput_ratio": throughput * base["mean_ms"] / 1000,
            "smallest_gap_between_clips": float(gaps.min()),
            "refusals": dict(sorted(self._refusals.items())),
            "problems": self._problems,
        }
        if self._pid:
            settled = requests // 5
            mebibytes = np.array(self._memory) / (1 << 20)
            figures["memory_mib"] = {
                "after_requests": settled,
                "then": mebibytes[settled - 1],
                "at_the_end": mebibytes[-1],
                "growth": mebibytes[-1] - mebibytes[settled - 1],
                "largest": mebibytes.max(),
            }
        return figures


def _timed(call, *arguments):
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


def _ask(client, signature, inputs):
    try:
        return client.post(inputs) if signature is None else client.predict(inputs, signature)
    except ServingError as error:
        return error


def _wrong(answer, expected):
    """What is wrong with the answer to a good request, or `None`."""
    if isinstance(answer, ServingError):
        return f"was refused: {answer}"
    found = answer["scores"]
    if found.shape != expected.shape:
        return f"gives scores of the shape {found.shape} instead of {expected.shape}"
    difference = np.abs(found - expected).max()
    return None if difference <= TOLERANCE else f"gives scores that are off by {difference:.2g}"


def _percentiles(seconds):
    milliseconds = 1000 * np.array(seconds)
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "mean_ms": float(milliseconds.mean())}


def resident_bytes(pid):
    """Memory that a process holds now, by the operating system's count."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


# A server of our own


@contextlib.contextmanager
def server(*flags, path=""):
    """Starts server.py at free ports; gives `(process, addresses)` once it answers. It ends with the block."""
    environment = os.environ | {"PYTHONPATH": str(path)}  # not this package's: the server has to do without
    command = [sys.executable, str(HERE / "server.py"), "--port=0", "--rest_api_port=0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            addresses = {}
            for line in process.stdout:
                protocol, _, address = line.strip().partition(" ")
                if protocol in PROTOCOLS:
                    addresses[protocol] = address
                if len(addresses) == len(PROTOCOLS):
                    break
            else:
                raise RuntimeError(f"server.py ended with {process.wait()} before it served")
            yield process, addresses
        finally:
            process.terminate()


def example_network(num_frames, size, classes=10):
    """A network that is not trained, but tells clips apart, and whose non-local blocks do something."""
    keras.utils.set_random_seed(0)
    model = C2DResNet11(input_shape=(num_frames, size, size, 3), classes=classes)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if layer.name.startswith("nonlocal"):
            layer.norm.gamma.assign(rng.normal(size=layer.norm.gamma.shape))
    head = model.get_layer("pred")
    head.kernel.assign(0.02 * rng.normal(size=head.kernel.shape))
    return model


# Command


def markdown(figures):
    """The figures as a page."""
    direct = figures["direct"]["model(x)"]

    def row(name, times, per_second=None):
        ratios = [times["p50_ms"] / direct["p50_ms"], times["p99_ms"] / direct["p99_ms"]]
        rate, gain = "", ""
        if per_second is not None:
            rate, gain = f"{per_second:.1f}", f"{per_second * direct['mean_ms'] / 1000:.2f}"
        return (
            f"| {name} | {times['p50_ms']:.1f} | {times['p99_ms']:.1f} | {rate} "
            f"| {ratios[0]:.2f} | {ratios[1]:.2f} | {gain} |"
        )

    lines = [
        f"{figures['requests']} requests from {figures['clients']} clients in {figures['seconds']:.1f} s: "
        f"{figures['good']} good, {figures['bad']} bad; {len(figures['problems'])} problems.",
        "",
        "| | p50 ms | p99 ms | good requests/s | p50 ratio | p99 ratio | throughput ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(row(f"in process, {name}", times, 1000 / times["mean_ms"]) for name, times in figures["direct"].items()),
        row("server, 1 client", figures["alone"], 1000 / figures["alone"]["mean_ms"]),
        row(f"server, {figures['clients']} clients", figures["loaded"], figures["good_per_second"]),
        *(row(f"– of these {kind}", times) for kind, times in sorted(figures["loaded_by_kind"].items())),
    ]
    if "memory_mib" in figures:
        memory = figures["memory_mib"]
        lines += [
            "",
            f"The server's memory: {memory['then']:.0f} MiB after {memory['after_requests']} requests, "
            f"{memory['at_the_end']:.0f} MiB after the last ({memory['growth']:+.1f}), "
            f"at most {memory['largest']:.0f} MiB.",
        ]
    lines += ["", "| bad request | refusal |", "|---|---|"]
    lines += [f"| {kind} | {refusal.replace('|', '/')} |" for kind, refusal in figures["refusals"].items()]
    if figures["problems"]:
        counted = collections.Counter(figures["problems"])
        lines += ["", "Problems:", "", *(f"- {count} × {problem}" for problem, count in counted.most_common())]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "model", nargs="?", help=".keras file of what the server serves; none: a small network and server"
    )
    parser.add_argument("--grpc", default="localhost:8500", help="(default: %(default)s)")
    parser.add_argument("--rest", default="http://localhost:8501", help="(default: %(default)s)")
    parser.add_argument("--name", default="nonlocal", help="of the model on the server (default: %(default)s)")
    parser.add_argument("--pid", type=int, help="the server's process, to watch its memory")
    parser.add_argument("--requests", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument(
        "--num-frames", type=int, default=8, help="of clips, where MODEL takes any (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=int, default=64, help="likewise; that of the export's crops (default: %(default)s)"
    )
    parser.add_argument("--huge", type=int, default=129, help="MiB of a huge message (default: %(default)s)")
    parser.add_argument("--max-growth", type=float, default=64, help="MiB that count as flat (default: %(default)s)")
    parser.add_argument("--out", help="folder for load.md and load.json")
    args = parser.parse_args(argv)

    with contextlib.ExitStack() as stack:
        addresses, pid = {"gRPC": args.grpc, "REST": args.rest}, args.pid
        if args.model:
            model = keras.saving.load_model(args.model, compile=False)
        else:
            from keras_nonlocal.export import export_saved_model

            model = example_network(args.num_frames, args.image_size)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            export_saved_model(model, f"{folder}/{args.name}", frame_stride=8)
            process, addresses = stack.enter_context(
                server(f"--model_name={args.name}", f"--model_base_path={folder}/{args.name}")
            )
            pid = process.pid
        frames, height, width, _ = model.input_shape[1:]
        shape = (frames or args.num_frames, height or args.image_size, width or args.image_size)
        figures = LoadTest(model, shape, addresses, args.name, pid, args.huge << 20).run(args.requests, args.clients)
    figures["clip"] = shape
    if pid and figures["memory_mib"]["growth"] > args.max_growth:
        figures["problems"].append(f"The server's memory grew by {figures['memory_mib']['growth']:.1f} MiB")
    text = markdown(figures)
    print(text)
    if args.out:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "load.md").write_text(text)
        (out / "load.json").write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if figures["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
