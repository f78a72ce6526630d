"""Shards on S3: in an environment of its own, where tensorflow-io loads, against a server on this machine.

Takes a few minutes and 2 GB of disk: `pytest -m slow tests/test_data_s3.py`.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "tensorflow-cpu==2.16.2",
    "tensorflow-io==0.37.1",
    "keras>=3.12",
    "numpy<2",
    "av>=18,<19",
    "pillow>=10",
    "moto[server]>=5",
)

# S3's file system aborts as the interpreter exits: what the process printed is the result.
SCRIPT = """
import os, sys
import boto3, numpy as np
import tensorflow as tf
from keras_nonlocal.data.annotations import Annotations
from keras_nonlocal.data.clips import ClipOptions
from keras_nonlocal.data.decode import write_video
from keras_nonlocal.data.shards import is_shards, shard_source, verify_shards, write_shards

folder = sys.argv[1]
client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT"])
client.create_bucket(Bucket="bucket")
paths = []
for number in range(5):
    paths.append(f"{folder}/{number}.mp4")
    write_video(paths[-1], np.full((8 + number, 48, 64, 3), 40 * number + 20, "uint8"))
annotations = Annotations(tuple(paths), np.arange(5) % 2, ("even", "odd"))
assert not is_shards("s3://bucket/shards")
clip = ClipOptions(4, 2, (32, 40), (24, 28), True, None, "recipe")
results = []
for out in ("s3://bucket/shards", f"{folder}/shards"):
    index = write_shards(annotations, out, 36, videos_per_shard=2, verbose=False)
    assert is_shards(out) and verify_shards(out) == {}
    results.append(list(shard_source(index, None, clip, True, 3, reshuffle_each_iteration=False).as_numpy_iterator()))
for one, other in zip(*results, strict=True):
    assert one[2] and one[1] == other[1]
    np.testing.assert_array_equal(one[0], other[0])
objects = client.list_objects_v2(Bucket="bucket")["Contents"]
print("objects", *sorted(item["Key"] for item in objects))
body = client.get_object(Bucket="bucket", Key="shards/videos-00001-of-00003.tfrecord")["Body"].read()
client.put_object(Bucket="bucket", Key="shards/videos-00001-of-00003.tfrecord", Body=body[:60] + b"?" + body[61:])
print("damaged", verify_shards("s3://bucket/shards"))
print("read", len(results[0]), "on", tf.__version__, flush=True)
"""


@pytest.mark.slow
def test_s3(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *PACKAGES], check=True)
    assert run_s3(python, tmp_path) == [
        "objects shards/shards.json " + " ".join(f"shards/videos-0000{n}-of-00003.tfrecord" for n in range(3)),
        "damaged {'videos-00001-of-00003.tfrecord': 'its content has changed'}",
        "read 5 on 2.16.2",
    ]


def accepts(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_for(server, port, log, seconds=120):
    deadline = time.monotonic() + seconds
    while not accepts(port):
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_waiting_for_the_port_ends(tmp_path):
    """A server that never listens is no reason to wait for ever, nor is one that has ended."""
    (tmp_path / "log").write_text("says nothing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        for code in ("import time; time.sleep(60)", ""):
            with subprocess.Popen([sys.executable, "-S", "-c", code]) as server:
                try:
                    with pytest.raises(AssertionError, match="says nothing"):
                        wait_for(server, free.getsockname()[1], tmp_path / "log", seconds=0.5 if code else 60)
                finally:
                    server.kill()


def run_s3(python, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "S3_USE_HTTPS": "0",
        "S3_VERIFY_SSL": "0",
        "PYTHONPATH": str(ROOT),
    }
    # A process of its own: TensorFlow waits for the server without letting go of Python's lock.
    command = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(folder / "server.log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            wait_for(server, port, folder / "server.log")
            result = subprocess.run(
                [python, "-c", SCRIPT, str(folder)], capture_output=True, text=True, env=environment, timeout=600
            )
        finally:
            server.kill()
    lines = [line for line in result.stdout.splitlines() if line.startswith(("objects", "damaged", "read"))]
    assert lines, result.stderr[-3000:]
    return lines
