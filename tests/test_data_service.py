"""Shards through the tf.data service: a dispatcher and two workers, each a process that knows TensorFlow alone."""

import contextlib
import os
import select
import subprocess
import sys

import numpy as np
import pytest

from keras_nonlocal.data import video_dataset_from_directory
from keras_nonlocal.data.shards import write_shards
from tests.test_data_shards import make_videos

OPTIONS = {"num_frames": 4, "frame_stride": 2, "image_size": (24, 28), "shorter_side": (32, 40), "seed": 5}
OPTIONS |= {"batch_size": None, "with_paths": True, "verbose": False}

# Each serves until its standard input is closed.
DISPATCHER = """
import sys
import tensorflow as tf
server = tf.data.experimental.service.DispatchServer()
print(server.target, flush=True)
sys.stdin.read()
"""
# Says which modules it has imported, for every line that it is sent.
WORKER = """
import sys
import tensorflow as tf
server = tf.data.experimental.service.WorkerServer(
    tf.data.experimental.service.WorkerConfig(dispatcher_address=sys.argv[1].split("://")[1], heartbeat_interval_ms=100)
)
print("started", flush=True)
for line in sys.stdin:
    print(*{name.split(".")[0] for name in sys.modules}, flush=True)
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


def read_line(running, seconds=600):
    """The next line that a process prints, of which no other waits to be read."""
    assert select.select([running.stdout], [], [], seconds)[0], f"Nothing came in {seconds} seconds."
    return running.stdout.readline().strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    annotations = make_videos(folder / "videos", count=12)
    write_shards(annotations, folder / "shards", 36, videos_per_shard=4, verbose=False)
    return folder / "shards"


@pytest.fixture(scope="module")
def service():
    """The address of a dispatcher with two workers."""
    with process(DISPATCHER) as dispatcher:
        address = read_line(dispatcher)
        assert address.startswith("grpc://")
        with process(WORKER, address) as first, process(WORKER, address) as second:
            workers = first, second
            assert [read_line(worker) for worker in workers] == ["started"] * 2
            yield address, workers


def one_pass(dataset):
    """`{path: (clip, label)}` of a pass, in which every path comes once."""
    elements = list(dataset.as_numpy_iterator())
    found = {path.decode(): (clip, label) for clip, label, path in elements}
    assert len(found) == len(elements)
    return found


def test_every_video_once_by_two_workers(folder, service):
    address, _ = service
    fixed = {"reshuffle_each_iteration": False, **OPTIONS}
    here = video_dataset_from_directory(folder, **fixed)
    expected = one_pass(here)
    assert sorted(expected) == sorted(here.file_paths) and len(expected) == 12
    through = video_dataset_from_directory(folder, service=address, **fixed)
    for _ in range(2):
        found = one_pass(through)
        assert found.keys() == expected.keys()
        for path, (clip, label) in found.items():
            np.testing.assert_array_equal(clip, expected[path][0])
            assert label == expected[path][1] == path.startswith("two")
    assert through.report.num_good == 12 and not through.report.broken


def test_passes_of_their_own(folder, service):
    """The clips differ from pass to pass, although the workers' generators start anew."""
    anew = video_dataset_from_directory(folder, service=service[0], **OPTIONS)
    first, second = one_pass(anew), one_pass(anew)
    assert sorted(first) == sorted(second) == sorted(anew.file_paths)
    assert sum(np.array_equal(first[path][0], second[path][0]) for path in first) < 6


def test_both_workers_read(folder, service):
    address, workers = service
    before = [read_so_far(worker) for worker in workers]
    size = max(file.stat().st_size for file in folder.glob("*.tfrecord"))
    dataset = video_dataset_from_directory(folder, service=address, **OPTIONS)
    for _ in range(300):  # many passes, so that both get a share however slow one is to start
        assert len(one_pass(dataset)) == 12
        if all(now - then > size for now, then in zip(map(read_so_far, workers), before, strict=True)):
            return
    raise AssertionError("A worker reads nothing.")


def read_so_far(worker):
    """Bytes that the process has read, by the operating system's count."""
    with open(f"/proc/{worker.pid}/io") as file:
        return int(file.readline().split()[1])


def test_workers_know_tensorflow_alone(folder, service):
    address, workers = service
    one_pass(video_dataset_from_directory(folder, service=address, **OPTIONS))
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
        modules = set(read_line(worker).split())
        assert "tensorflow" in modules and not {"keras_nonlocal", "av"} & modules
