"""Two workers on this machine make the same training as one process."""

import collections
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_nonlocal.training import TrainingError, Workers, distribute
from tests.distributed_training import RAISE, STOP, main

BACKEND = keras.backend.backend()
ROOT = Path(__file__).resolve().parent.parent
STEPS = 10  # 2 are a pass, of which 5 videos are left out
TOLERANCE = 1e-4


def environment(num_workers, index, port):
    """What the README tells users to set."""
    if BACKEND == "jax":
        names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
        values = (f"127.0.0.1:{port}", num_workers, index)
        return {f"KERAS_DISTRIBUTION_{name}": str(value) for name, value in zip(names, values, strict=True)}
    addresses = [f"127.0.0.1:{port + worker}" for worker in range(num_workers)]
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}


def free_port():
    """One of two that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def start(directory, steps, *options, num_workers=2):
    port = free_port()
    command = [sys.executable, "-m", "tests.distributed_training", directory, steps, *options]
    return [
        subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | (environment(num_workers, index, port) if num_workers > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(num_workers)
    ]


def finish(processes, timeout=480):
    """The return codes and what was printed."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def run(*arguments, **options):
    codes, outputs = finish(start(*arguments, **options))
    assert not any(codes), "\n".join(outputs)


def results(directory, index=0):
    """Weights with the optimizer's, figures, and the numbers of the videos in the order of training."""
    beside = f"{directory}-{index}"
    with np.load(f"{beside}.npz") as arrays:
        weights = [arrays[name] for name in arrays.files]
    return weights, json.loads(Path(f"{beside}.json").read_text()), order(directory, index)


def order(directory, index=0):
    path = Path(f"{directory}-{index}.order")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def difference(one, two):
    return max(float(np.abs(np.float64(a) - np.float64(b)).max(initial=0)) for a, b in zip(one, two, strict=True))


def check_same(directory, whole, num_workers):
    """Weights and figures of all workers are those of one process."""
    expected_weights, expected, expected_order = whole
    # Something was learned, or equal weights say nothing.
    assert expected["loss"][-1] < expected["loss"][0] - 0.01
    for index in range(num_workers):
        weights, figures, _ = results(directory, index)
        assert set(figures) == set(expected)
        far = max(np.abs(np.subtract(figures[name], expected[name])).max() for name in expected)
        print(f"worker {index}: weights {difference(weights, expected_weights):.1e}, figures {far:.1e}")
        assert difference(weights, expected_weights) <= TOLERANCE
        assert far <= TOLERANCE
    # The same videos in every step, none of them twice in a pass.
    batches = list(zip(*(results(directory, index)[2] for index in range(num_workers)), strict=True))
    seen = collections.defaultdict(list)
    for parts, batch in zip(batches, expected_order, strict=True):
        videos = [video for part in parts for video in part[1:]]
        assert {part[0] for part in parts} == {batch[0]} and sorted(videos) == sorted(batch[1:])
        seen[batch[0]] += videos
    assert all(len(set(videos)) == len(videos) for videos in seen.values()) and len(seen) > 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, which sees the batch of all workers."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    main(directory, STEPS)
    return results(directory)


def test_two_workers(tmp_path, alone):
    run(tmp_path / "run", STEPS)
    check_same(tmp_path / "run", alone, num_workers=2)


OPTIMIZERS = [("--ema",)] + [("--gradient-accumulation-steps", 2, "--ema")] * (BACKEND == "jax")


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIMIZERS)
def test_optimizers(tmp_path, options):
    for num_workers in (1, 2):
        run(tmp_path / str(num_workers), STEPS, *options, num_workers=num_workers)
    check_same(tmp_path / "2", results(tmp_path / "1"), num_workers=2)


if BACKEND == "tensorflow":

    @pytest.mark.slow
    def test_two_devices(tmp_path, alone):
        run(tmp_path / "run", STEPS, "--devices", 2, num_workers=1)
        check_same(tmp_path / "run", alone, num_workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_killed_worker(tmp_path, alone, index):
    """The other ends too, soon and with a message; started again, both go on where they were."""
    directory = tmp_path / "run"
    processes = start(directory, STEPS, "--signal-at", index, 6, int(signal.SIGKILL))
    processes[index].wait()
    begun = time.monotonic()
    codes, outputs = finish(processes)
    print(f"worker {index} killed, the other ended with {codes[1 - index]} after {time.monotonic() - begun:.0f} s")
    assert codes[index] == -signal.SIGKILL
    assert codes[1 - index] not in (0, -signal.SIGKILL)
    assert "All workers must be there at every step" in outputs[1 - index] or codes[1 - index] < 0, outputs[1 - index]
    assert [path.name[:14] for path in (directory / "checkpoints").iterdir()]
    run(directory, STEPS)
    check_resumed(directory, alone)


def check_resumed(directory, whole):
    expected_weights, expected, _ = whole
    for index in range(2):
        weights, figures, _ = results(directory, index)
        assert difference(weights, expected_weights) <= TOLERANCE
        assert all(np.abs(np.subtract(figures[name], expected[name])).max() <= TOLERANCE for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_stopped_worker(tmp_path, alone, index):
    """SIGTERM to one of them: all stop after the same step, which is kept."""
    directory = tmp_path / "run"
    codes, outputs = finish(start(directory, STEPS, "--signal-at", index, 5, int(signal.SIGTERM)))
    assert codes == [143, 143], "\n".join(outputs)
    assert len(order(directory, 0)) == len(order(directory, 1))
    assert max(path.name for path in (directory / "checkpoints").iterdir()).startswith("step-000000005-")
    run(directory, STEPS)
    check_resumed(directory, alone)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_an_error_in_one_worker(tmp_path, alone, index):
    """The other does not wait for it for ever."""
    codes, outputs = finish(start(tmp_path / "run", STEPS, "--signal-at", index, 3, RAISE))
    assert codes[0] and codes[1]
    assert "RuntimeError: here alone" in outputs[index]
    assert "All workers must be there" in outputs[1 - index] or codes[1 - index] < 0, outputs[1 - index]


@pytest.mark.slow
def test_one_worker_ends_the_training(tmp_path, alone):
    """As a callback may: all end after the same step."""
    run(tmp_path / "run", STEPS, "--signal-at", 1, 3, STOP)
    (one, _, batches), (two, _, others) = (results(tmp_path / "run", index) for index in range(2))
    assert len(batches) == len(others) == 3 and difference(one, two) == 0


@pytest.mark.slow
def test_each_with_its_own_directory(tmp_path, alone):
    """One of them has checkpoints that the other does not see."""
    run(tmp_path / "run", 3)
    command = [sys.executable, "-m", "tests.distributed_training"]
    port = free_port()
    processes = [
        subprocess.Popen(
            [*command, str(tmp_path / name), str(STEPS)],
            cwd=ROOT,
            env=os.environ | environment(2, index, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, name in enumerate(("run", "elsewhere"))
    ]
    codes, outputs = finish(processes)
    assert codes[0] and codes[1]
    assert all("must see the same checkpoints" in output for output in outputs), "\n".join(outputs)


@pytest.mark.slow
def test_other_number_of_workers(tmp_path, alone):
    """A training of two workers goes on in one process, with the same clips in a batch."""
    directory = tmp_path / "run"
    run(directory, 5)
    assert len(order(directory)) == 5  # in the middle of a pass
    run(directory, STEPS, num_workers=1)
    weights, figures, batches = results(directory)
    assert difference(weights, alone[0]) <= TOLERANCE
    assert [sorted(batch) for batch in batches[5:]] == [sorted(batch) for batch in alone[2][5:]]


# Workers as threads, which meet where processes would


class Threads(Workers):
    def __init__(self, num_workers, index, meeting, table):
        super().__init__(num_workers, index)
        self.meeting, self.table = meeting, table

    def gather(self, values):
        self.table[self.index] = values
        self.meeting.wait(timeout=10)
        found = np.array(self.table)
        self.meeting.wait(timeout=10)
        return found


def gathered(num_workers, function):
    """`function(workers)` of each worker, or its error."""
    meeting, table, found = threading.Barrier(num_workers), [None] * num_workers, [None] * num_workers

    def work(index):
        try:
            found[index] = function(Threads(num_workers, index, meeting, table))
        except TrainingError as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def passes(workers, batch_size, num_videos, start=(0, 0), count=1, shift=0):
    """The places of the clips of `count` passes."""
    share = range(num_videos)[workers.index :: workers.num_workers]

    def dataset(start):
        number, position = start
        own = [(number, place + shift) for place in range(position, len(share))]
        for first in range(0, len(own), batch_size):
            part = own[first : first + batch_size]
            x = np.array([share[place] for _, place in part])
            yield x, x, [b""] * len(part), part

    return [(x.tolist(), places[-1].tolist()) for x, _, _, places in workers.dataset(dataset, batch_size)(start)]


@pytest.mark.parametrize("num_videos", [11, 12, 13, 14, 15])
def test_tail(num_videos):
    """Whole batches of all workers, then the pass is over for all."""
    one, two = gathered(2, lambda workers: passes(workers, 2, num_videos))
    steps = num_videos // 4
    assert len(one) == len(two) == steps
    videos = [video for worker in (one, two) for batch, _ in worker for video in batch]
    assert sorted(videos) == list(range(4 * steps))
    # The places are those in the batches of a single process, of which the next begins behind them.
    assert [place for _, place in one] == [place for _, place in two] == [[0, 4 * n + 3] for n in range(steps)]


def test_start_with_another_number_of_workers():
    """After 12 videos of 24, whatever number of workers saw them."""
    for num_workers, batch_size in ((2, 6), (3, 4), (4, 3)):
        found = gathered(num_workers, lambda workers, size=batch_size: passes(workers, size, 24, start=(0, 12)))
        assert sorted(video for worker in found for batch, _ in worker for video in batch) == list(range(12, 24))


def test_workers_at_different_places():
    one, two = gathered(2, lambda workers: passes(workers, 2, 12, shift=workers.index))
    for error in (one, two):
        with pytest.raises(TrainingError, match=r"must be at the same place: .* Received: .* \(2, 0, 3\), \(2, 0, 5\)"):
            raise error


def test_alone():
    """A process with one device takes nothing away."""
    with distribute() as workers:
        assert (workers.num_workers, workers.index, workers.shard, workers.is_chief) == (1, 0, None, True)
        assert workers.gather([3, 4]).tolist() == [[3, 4]]

        def dataset(start):
            return start

        assert workers.dataset(dataset, 3) is dataset


def test_batch_that_devices_cannot_share():
    with pytest.raises(ValueError, match="divisible by the 2 devices of a worker. Received: batch_size=3"):
        Workers(num_devices=2).dataset(list, 3)


CLUSTER = {"worker": ["a:1", "b:1"]}
WRONG = [
    "no json",
    "[]",
    json.dumps({"cluster": CLUSTER}),
    json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 2}}),
    json.dumps({"cluster": CLUSTER, "task": {"type": "chief", "index": 0}}),
    json.dumps({"cluster": {**CLUSTER, "ps": ["c:1"]}, "task": {"type": "worker", "index": 0}}),
]

if BACKEND == "tensorflow":

    @pytest.mark.parametrize("text", WRONG)
    def test_wrong_tf_config(monkeypatch, text):
        monkeypatch.setenv("TF_CONFIG", text)
        with pytest.raises(ValueError, match="`TF_CONFIG` must be JSON such as .* Received: TF_CONFIG="):
            with distribute():
                pass

    def test_too_late(monkeypatch):
        """TensorFlow has computed: it joins no cluster any more."""
        keras.ops.convert_to_numpy(keras.ops.ones(1))
        monkeypatch.setenv("TF_CONFIG", environment(2, 0, 1)["TF_CONFIG"])
        with pytest.raises(TrainingError, match="must come before anything is computed"):
            with distribute():
                pass

    def test_model_of_outside():
        import tensorflow as tf

        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        with distribute(tf.distribute.MirroredStrategy(["CPU:0"])) as workers:
            with pytest.raises(ValueError, match="built inside of the block of `distribute`. Received: model="):
                workers.step(model)

    def test_gradient_accumulation():
        import tensorflow as tf

        with distribute(tf.distribute.MirroredStrategy(["CPU:0"])) as workers:
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
            model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), "mse")
            with pytest.raises(ValueError, match="must be `None` where .* Received: gradient_accumulation_steps=2"):
                workers.step(model)


def test_environment_of_another_backend(monkeypatch):
    name, backend = {"tensorflow": ("KERAS_DISTRIBUTION_JOB_ADDRESSES", "jax"), "jax": ("TF_CONFIG", "tensorflow")}[
        BACKEND
    ]
    monkeypatch.setenv(name, "here:1")
    with pytest.raises(ValueError, match=f"`{name}` is for the backend '{backend}'. Received: {name}='here:1'"):
        with distribute():
            pass
