"""Shards through the tf.data service: a dispatcher and two workers, each a process that knows TensorFlow alone."""

import collections
import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal.data.shards import shard_source, write_shards
from tests.test_data_shards import SMALL, make_videos

# Each serves until its standard input is closed.
DISPATCHER = """
import sys
import tensorflow as tf
server = tf.data.experimental.service.DispatchServer()
print(server.target, flush=True)
sys.stdin.read()
"""
WORKER = """
import sys
import tensorflow as tf
server = tf.data.experimental.service.WorkerServer(
    tf.data.experimental.service.WorkerConfig(dispatcher_address=sys.argv[1].split("://")[1], heartbeat_interval_ms=100)
)
print("started", flush=True)
sys.stdin.read()
assert not any(name.split(".")[0] in ("keras_nonlocal", "av") for name in sys.modules)
print("TensorFlow alone", flush=True)
"""


@contextlib.contextmanager
def process(code, *arguments):
    """A Python without this package on its path; its standard input ends with the block."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=os.sep,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    annotations = make_videos(folder / "videos", count=12)
    return write_shards(annotations, folder / "shards", 36, videos_per_shard=4, verbose=False)


@pytest.fixture(scope="module")
def service():
    """The address of a dispatcher with two workers."""
    with process(DISPATCHER) as dispatcher:
        address = dispatcher.stdout.readline().strip()
        with process(WORKER, address) as first, process(WORKER, address) as second:
            workers = first, second
            assert [worker.stdout.readline() for worker in workers] == ["started\n"] * 2
            yield address, workers


def distributed(dataset, address):
    return dataset.apply(
        tf.data.experimental.service.distribute(tf.data.experimental.service.ShardingPolicy.DYNAMIC, address)
    )


def test_every_video_once_by_two_workers(index, service):
    address, _ = service
    assert address.startswith("grpc://")
    fixed = shard_source(index, None, SMALL, True, 5, reshuffle_each_iteration=False)
    expected = {int(number): clip for clip, number, _, _ in fixed.as_numpy_iterator()}
    # Passes of their own: the clips differ from pass to pass, although the workers' generators start anew.
    anew = shard_source(index, None, SMALL, True, 5, distributed=True)
    through, anew = distributed(fixed, address), distributed(anew, address)
    for _ in range(2):
        elements = list(through.as_numpy_iterator())
        assert collections.Counter(int(number) for _, number, _, _ in elements) == collections.Counter(range(12))
        for clip, number, good, message in elements:
            assert good and message == b""
            np.testing.assert_array_equal(clip, expected[number])
    passes = [{int(number): clip for clip, number, _, _ in anew.as_numpy_iterator()} for _ in range(2)]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert sum(np.array_equal(passes[0][number], passes[1][number]) for number in range(12)) < 6


def test_both_workers_read(index, service):
    address, workers = service
    before = [read_so_far(worker) for worker in workers]
    size = os.path.getsize(f"{index.directory}/{index.files[0]}")
    dataset = shard_source(index, None, SMALL, False, 5, reshuffle_each_iteration=False).repeat(20)
    for _ in range(20):  # many passes, so that both get a share however slow one is to start
        assert sum(1 for _ in distributed(dataset, address)) == 240
        if all(now - then > size for now, then in zip(map(read_so_far, workers), before, strict=True)):
            return
    raise AssertionError("A worker reads nothing.")


def read_so_far(worker):
    """Bytes that the process has read, by the operating system's count."""
    with open(f"/proc/{worker.pid}/io") as file:
        return int(file.readline().split()[1])


def test_workers_know_tensorflow_alone(service):
    """Run last: asks the workers what they have imported, which ends them."""
    for worker in service[1]:
        worker.stdin.close()
        assert worker.stdout.readline() == "TensorFlow alone\n"
        assert worker.wait() == 0
