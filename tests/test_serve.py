"""The serving example, end to end: a server process that has no Keras, its clients, the load test, and C."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from PIL import Image
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

from keras_nonlocal.applications import preprocess_input
from keras_nonlocal.export import export_saved_model
from tests.video_files import encode

ROOT = Path(__file__).resolve().parent.parent
SERVE = ROOT / "examples" / "serve"
NAMES = ["sit ups", "röntgen", "c", "d"]
FRAMES, SIZE = 4, 32
LIMIT = 4 << 20


def module(name):
    spec = importlib.util.spec_from_file_location(name, SERVE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


load = module("load")
import client as client_module  # noqa: E402
from client import GrpcClient, RestClient, ServingError, encode_jpeg  # noqa: E402  load.py knows where it is

CLIENTS = {"gRPC": GrpcClient, "REST": RestClient}


@pytest.fixture(scope="module")
def model():
    return load.example_network(FRAMES, SIZE, len(NAMES))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """What is served: `nonlocal`, and `swapped`, which the test of new versions changes."""
    folder = tmp_path_factory.mktemp("served")
    export_saved_model(model, folder / "nonlocal", NAMES, version=3, frame_stride=2, views=(2, 3), shorter_side=40)
    export_saved_model(mean_colour(1.0), folder / "swapped", views=None, warmup=False)
    config = (SERVE / "models.config").read_text().replace("/models/", f"{folder}/")
    other = config[config.index("  config {") : config.rindex("}")].replace("nonlocal", "swapped")
    (folder / "models.config").write_text(config[: config.rindex("}")] + other + "}\n")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """`(process, addresses)` of a server with the flags of docker-compose.yml."""
    compose = (SERVE / "docker-compose.yml").read_text()
    flags = re.findall(r"^      - (--\w+)=(.*)", compose, re.MULTILINE)
    assert dict(flags) == {"--model_config_file": "/config/models.config", "--file_system_poll_wait_seconds": "5"}
    with load.server(
        f"--model_config_file={folder}/models.config",
        "--file_system_poll_wait_seconds=0.1",
        f"--grpc_channel_arguments=grpc.max_receive_message_length={LIMIT}",
        path=bomb(folder / "bomb"),
    ) as started:
        yield started


@pytest.fixture(params=CLIENTS)
def asking(request, server):
    client = CLIENTS[request.param](server[1][request.param])
    yield client
    client.close()


def bomb(folder):
    """A folder with packages in the places of Keras and this one, which end the process that imports them."""
    for name in ("keras", "keras_nonlocal"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("import os\nos._exit(99)\n")
    return folder


def mean_colour(factor):
    import keras

    inputs = keras.Input((None, None, None, 3))
    outputs = keras.layers.Rescaling(factor)(keras.layers.GlobalAveragePooling3D()(inputs))
    return keras.Model(inputs, outputs)


def clip(seed=0, batch=1, frames=FRAMES, size=SIZE):
    patches = np.random.default_rng(seed).integers(0, 256, (batch, frames, 4, 4, 3), np.uint8)
    return patches.repeat(size // 4, 2).repeat(size // 4, 3)


def keras_scores(model, clips):
    return np.asarray(model(preprocess_input(clips), training=False), "float32")


# Answers


def test_every_signature_by_every_protocol(asking, model):
    pixels = clip(1, batch=2)
    expected = keras_scores(model, pixels)
    assert np.ptp(expected) > 0.1 and np.abs(expected[0] - expected[1]).max() > 0.01  # or the rest proves little

    def ask(signature, **inputs):
        return asking.predict(inputs, signature)

    np.testing.assert_allclose(ask("serving_default", clips=pixels)["scores"], expected, atol=1e-5)
    np.testing.assert_allclose(ask("float", clips=pixels.astype("float32"))["scores"], expected, atol=1e-5)
    answer = ask("classify", clips=pixels)
    assert answer["labels"].tolist() == [[NAMES[i] for i in np.argsort(-row)] for row in expected]
    np.testing.assert_allclose(answer["scores"], -np.sort(-expected), atol=1e-5)
    files = np.stack([encode_jpeg(one) for one in pixels])
    decoded = np.stack([[load.decode_jpeg(file) for file in row] for row in files])
    np.testing.assert_allclose(ask("jpeg", frames=files)["scores"], keras_scores(model, decoded), atol=1e-5)
    assert ask("views", clips=clip(2, frames=9, size=40))["scores"].shape == (1, 4)
    assert ask("features", clips=pixels)["features"].shape[0] == 2
    weights = ask("attention", clips=pixels, positions=np.array([[0, 0, 0], [1, 1, 1], [0, 1, 0]], "int32"))["weights"]
    assert weights.shape[:2] == (2, 3)
    np.testing.assert_allclose(weights.sum((2, 3, 4)), np.ones((2, 3)), atol=1e-5)


def test_metadata_is_the_exports(asking, folder):
    version, signatures = asking.metadata()
    told = json.loads((folder / "nonlocal" / "3" / "assets" / "metadata.json").read_text())["signatures"]
    assert version == 3 and set(told) == set(signatures)
    for name, (inputs, outputs) in signatures.items():
        for found, expected in ((inputs, told[name]["inputs"]), (outputs, told[name]["outputs"])):
            assert found == {key: (value["dtype"], value["shape"]) for key, value in expected.items()}


def test_rest_by_row(server, model):
    """The forms of a body that `RestClient.predict` does not use."""
    client = RestClient(server[1]["REST"])
    pixels = clip(3, batch=2)
    expected = keras_scores(model, pixels)
    for instances in (pixels.tolist(), [{"clips": one} for one in pixels.tolist()]):
        answer = client.post(json.dumps({"instances": instances}).encode())
        np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)
    answer = client.post(json.dumps({"instances": pixels.tolist(), "signature_name": "classify"}).encode())
    assert [row["labels"][0] for row in answer["predictions"]] == [NAMES[i] for i in expected.argmax(1)]
    client.close()


def test_versions_and_status(server, asking):
    assert asking.predict({"clips": clip()}, version=3)["scores"].shape == (1, 4)
    with pytest.raises(ServingError, match="nonlocal serves version 3. Received: version 2$"):
        asking.predict({"clips": clip()}, version=2)
    with contextlib.closing(http.client.HTTPConnection(server[1]["REST"].split("//")[1])) as connection:
        connection.request("GET", "/v1/models/nonlocal")
        (status,) = json.loads(connection.getresponse().read())["model_version_status"]
    assert status == {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    with channel(server) as opened:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "nonlocal"
        (status,) = model_service_pb2_grpc.ModelServiceStub(opened).GetModelStatus(request).model_version_status
    assert (status.version, status.state) == (3, get_model_status_pb2.ModelVersionStatus.AVAILABLE)


def channel(server):
    import grpc

    return grpc.insecure_channel(server[1]["gRPC"])


def test_output_filter(server):
    request = predict_pb2.PredictRequest(output_filter=["labels"])
    request.model_spec.name, request.model_spec.signature_name = "nonlocal", "classify"
    request.inputs["clips"].CopyFrom(tf.make_tensor_proto(clip()))
    with channel(server) as opened:
        response = prediction_service_pb2_grpc.PredictionServiceStub(opened).Predict(request)
    assert list(response.outputs) == ["labels"]
    assert (response.model_spec.signature_name, response.model_spec.version.value) == ("classify", 3)


def test_a_dropped_connection_is_opened_anew(server):
    client = RestClient(server[1]["REST"])
    assert client.metadata()[0] == 3
    client._connection.sock.shutdown(socket.SHUT_RDWR)
    assert client.metadata()[0] == 3
    client.close()


# Refusals


def truncated():
    files = encode_jpeg(clip()[0])
    files[2] = files[2][:100]
    return files[None]


BAD = {
    "rank": (
        "serving_default",
        {"clips": clip()[0]},
        r"`clips` must have the shape \(None, 4, .*Received: \(4, 32, 32, 3\)",
    ),
    "frames": ("serving_default", {"clips": clip()[:, :2]}, r"Received: \(1, 2, 32, 32, 3\)$"),
    "channels": ("serving_default", {"clips": clip()[..., :1]}, r"Received: \(1, 4, 32, 32, 1\)$"),
    "dtype": ("serving_default", {"clips": clip() / 2}, "`clips` must be uint8. Received: float64$"),
    "strings": ("serving_default", {"clips": truncated()}, "`clips` must "),
    "jpeg": ("jpeg", {"frames": truncated()}, "Invalid JPEG data"),
    "no jpeg": ("jpeg", {"frames": np.full((1, FRAMES), b"<html>", object)}, "Unknown image file format|decode"),
    "empty batch": ("float", {"clips": np.zeros((0, 4, 32, 32, 3), "float32")}, "`clips` must "),
    "signature": ("regress", {"clips": clip()}, r"The signature must be one of \['attention', .*Received: 'regress'$"),
    "inputs": (
        "serving_default",
        {"video": clip(), "clips": clip()},
        r"inputs must be \['clips'\]. Received: \['clips', 'video'\]$",
    ),
    "no inputs": ("attention", {"clips": clip()}, r"must be \['clips', 'positions'\]. Received: \['clips'\]$"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refusals_say_why(asking, kind):
    signature, inputs, text = BAD[kind]
    with pytest.raises(ServingError, match=text) as caught:
        asking.predict(inputs, signature)
    assert caught.value.code in ("INVALID_ARGUMENT", 400)
    assert "\n" not in caught.value.message


def test_huge_sizes_are_refused_unmade(server, asking):
    """In gRPC a few bytes may stand for any number of equal values; nothing of that size may come to be."""
    before = load.resident_bytes(server[0].pid)
    if isinstance(asking, GrpcClient):
        value = tf.make_tensor_proto(7, tf.uint8, [])
        value.tensor_shape.CopyFrom(tf.TensorShape([1, FRAMES, 60_000, 60_000, 3]).as_proto())
        with pytest.raises(ServingError, match=r"at most 4194304 bytes. Received: the shape \(1, 4, 60000,") as caught:
            asking.predict({"clips": value})
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        value.tensor_shape.CopyFrom(tf.TensorShape([1, FRAMES, SIZE, SIZE, 3]).as_proto())
        value.tensor_content = b"abc"
        with pytest.raises(ServingError, match="`clips` does not hold the values of its shape") as caught:
            asking.predict({"clips": value})
        assert caught.value.code == "INVALID_ARGUMENT"
        with pytest.raises(ServingError, match="larger than max") as caught:
            asking.predict({"clips": np.zeros((2, FRAMES, 512, 512, 3), np.uint8)})
        assert caught.value.code == "RESOURCE_EXHAUSTED"
    else:
        with pytest.raises(ServingError, match="at most 4194304 bytes. Received: 5000000 bytes$") as caught:
            asking.post(b"0" * 5_000_000)
        assert caught.value.code == 413
    assert load.resident_bytes(server[0].pid) - before < 64 << 20
    assert asking.predict({"clips": clip()})["scores"].shape == (1, 4)


BAD_BODIES = {
    b'{"instances": []}': "must be a list that is not empty",
    b'{"instances": [[[1, 2], [3]]]}': "must be lists of equal lengths",
    b'{"inputs": {"clips": 1}, "instances": [1]}': "either",
    b'{"clips": []}': "either",
    b'{"instances": [256]}': "must have the shape",
    b'{"instances"': "must be JSON",
    b"[" * 100_000: "must be JSON",
    b'{"signature_name": "jpeg", "instances": [[{"b64": "%"}, "", "", ""]]}': "must be base64",
    b'{"signature_name": "jpeg", "instances": [[1, 2, 3, 4]]}': 'must be strings or {"b64": string}. Received: int',
    json.dumps({"instances": clip().astype(int).tolist()}).encode().replace(b"[[[[[", b"[[[[[-", 1): "values -",
}


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bodies_are_refused(server, body):
    client = RestClient(server[1]["REST"])
    with pytest.raises(ServingError, match=re.escape(BAD_BODIES[body])) as caught:
        client.post(body)
    assert caught.value.code == 400
    client.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/nonlocal/versions/9/metadata", 404),
        ("GET", "/v1/models/nonlocal:predict", 501),
        ("POST", "/v1/models/nonlocal", 501),
        ("POST", "/v1/models/nonlocal:classify", 404),
        ("DELETE", "/v1/models/nonlocal", 501),
    ],
)
def test_addresses_that_are_none(server, method, path, status):
    with contextlib.closing(http.client.HTTPConnection(server[1]["REST"].split("//")[1])) as connection:
        connection.request(method, path, b"{}" if method == "POST" else None)
        assert connection.getresponse().status == status


# Versions


def test_new_versions_take_over_between_requests(server, folder):
    """Requests go on all the while; each gets the scores of one whole version."""
    pixels = clip()
    colours = preprocess_input(pixels).mean((1, 2, 3))
    answers, stop = [], threading.Event()

    def ask(client):
        while not stop.is_set():
            answers.append(client.predict({"clips": pixels})["scores"] / colours)

    clients = [kind(server[1][protocol], "swapped") for protocol, kind in CLIENTS.items()]
    threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        (folder / "swapped" / "2").mkdir()  # no model at all: the former one goes on
        wait(lambda: len(answers) > 4)
        wrong = warm_up_request(np.zeros((1, 1, 1, 1), np.uint8))
        refused = export_saved_model(mean_colour(3.0), folder / "other", version=3, views=None)
        with tf.io.TFRecordWriter(str(refused / "assets.extra" / "tf_serving_warmup_requests")) as writer:
            writer.write(wrong.SerializeToString())
        refused.rename(folder / "swapped" / "3")  # cannot answer its warm-up
        time.sleep(0.5)
        export_saved_model(mean_colour(4.0), folder / "swapped", version=4, views=None)
        wait(lambda: np.allclose(answers[-1], 4))
        wait(lambda: np.allclose(answers[-1], 4) and np.allclose(answers[-2], 4))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    factors = np.array(answers)
    assert np.allclose(factors, factors.mean((1, 2), keepdims=True), atol=1e-4)
    assert set(factors.mean((1, 2)).round(3)) == {1.0, 4.0}
    assert clients[0].metadata()[0] == clients[1].metadata()[0] == 4
    assert server[0].poll() is None
    for client in clients:
        client.close()


def wait(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def warm_up_request(pixels):
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.name = "swapped"
    log.predict_log.request.inputs["clips"].CopyFrom(tf.make_tensor_proto(pixels))
    return log


# The command of the client


@pytest.mark.parametrize("protocol", CLIENTS)
def test_client_command(server, model, folder, tmp_path, capsys, protocol):
    (frames,) = clip(5, frames=8)
    option = {"gRPC": "--grpc", "REST": "--rest"}[protocol], server[1][protocol]
    paths = []
    for index, frame in enumerate(frames[:FRAMES]):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(frame).save(paths[-1])
    client_module.main([*paths, *option])
    scores = json.loads(capsys.readouterr().out)["scores"]
    np.testing.assert_allclose(scores, keras_scores(model, frames[None, :FRAMES])[0], atol=1e-5)

    video = encode(tmp_path / "some.mp4", frames)
    client_module.main([str(video), *option, "--frame-stride", "2", "--shorter-side", str(SIZE)])
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert sorted(labels) == sorted(NAMES)
    answers = []
    for clips in (["--export", str(folder / "nonlocal")], ["--frame-stride", "2", "--shorter-side", "40"]):
        client_module.main([str(video), *option, *clips])
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    with pytest.raises(SystemExit, match="Cannot decode .*missing.mp4"):
        client_module.main([str(tmp_path / "missing.mp4"), *option])
    with pytest.raises(SystemExit, match="must have the shape"):
        client_module.main([str(video), *option, "--num-frames", "3"])
    with pytest.raises(SystemExit, match="2"):
        client_module.main([str(video), str(video), *option])


def test_client_names_a_server_that_is_not_there(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    for option in (["--rest", "http://127.0.0.1:9"], ["--grpc", "127.0.0.1:9"]):
        with pytest.raises(SystemExit, match="UNAVAILABLE: .*[Cc]onnect"):
            client_module.main([str(tmp_path / "a.png"), *option])


# Load


def run_load(model, server, tmp_path, *options):
    model.save(tmp_path / "model.keras")
    process, addresses = server
    given = ["--grpc", addresses["gRPC"], "--rest", addresses["REST"], "--pid", str(process.pid), "--huge", "5"]
    code = load.main([str(tmp_path / "model.keras"), *given, *options, "--out", str(tmp_path / "out")])
    return code, json.loads((tmp_path / "out" / "load.json").read_text())


def check_load(figures, requests, clients):
    assert figures["problems"] == []
    assert (figures["requests"], figures["clients"], figures["bad"]) == (requests, clients, requests // load.BAD_SHARE)
    assert figures["good"] == requests - figures["bad"]
    assert len(figures["loaded_by_kind"]) == 4
    assert set(figures["refusals"]) == {f"{protocol}, {kind}" for protocol in load.BAD for kind in load.BAD[protocol]}
    assert figures["smallest_gap_between_clips"] > 1e-3  # answers to other clips would be seen
    for row in (figures["alone"], figures["loaded"]):
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["p50_ratio"] == pytest.approx(row["p50_ms"] / figures["direct"]["model(x)"]["p50_ms"])
    assert figures["throughput_ratio"] == pytest.approx(
        figures["good_per_second"] * figures["direct"]["model(x)"]["mean_ms"] / 1000
    )


def test_load(model, server, tmp_path, capsys):
    code, figures = run_load(model, server, tmp_path, "--requests", "60", "--clients", "4")
    assert code == 0
    check_load(figures, 60, 4)
    assert figures["memory_mib"]["growth"] < 64
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "load.md").read_text().strip() == printed.strip()
    assert "60 requests from 4 clients" in printed and "| REST, truncated JPEG | 400: " in printed


def test_load_sees_wrong_scores_and_answers_that_ought_to_be_refusals(model, server, tmp_path, monkeypatch, capsys):
    import keras

    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    head = other.get_layer("pred")
    head.bias.assign(head.bias + np.array([0.01, 0, 0, 0], "float32"))
    answered = {"wrong rank": ("serving_default", lambda clip, huge: {"clips": clip.pixels})}
    monkeypatch.setattr(load, "BAD", {protocol: answered for protocol in load.BAD})
    code, figures = run_load(other, server, tmp_path, "--requests", "20", "--clients", "2", "--max-growth=-1e9")
    assert code == 1
    problems = figures["problems"]
    assert sum("scores that are off by" in problem for problem in problems) >= figures["good"]
    assert {"gRPC, wrong rank: was answered", "REST, wrong rank: was answered"} <= set(problems)
    assert any(problem.startswith("The server's memory grew") for problem in problems)
    assert "Problems:" in capsys.readouterr().out


@pytest.mark.slow
def test_load_in_full(tmp_path):
    """1,000 requests from 16 clients; in the same process pair as the README's figures."""
    code = load.main(["--out", str(tmp_path)])
    figures = json.loads((tmp_path / "load.json").read_text())
    check_load(figures, 1000, 16)
    assert code == 0


# Configuration


def test_configurations_are_what_they_should_be():
    config = text_format.Parse((SERVE / "models.config").read_text(), model_server_config_pb2.ModelServerConfig())
    (served,) = config.model_config_list.config
    assert (served.name, served.base_path, served.model_platform) == ("nonlocal", "/models/nonlocal", "tensorflow")
    compose = (SERVE / "docker-compose.yml").read_text()
    assert "\t" not in compose
    for mounted in re.findall(r"- \./(\S+?):", compose):
        assert (SERVE / mounted).exists()
    # The names of the fields of BatchingParameters, whose proto is in no package.
    names = re.findall(r"^(\w+)(?: \{ value: \d+ \}|: \w+)$", (SERVE / "batching.config").read_text(), re.MULTILINE)
    assert names == [
        "max_batch_size",
        "batch_timeout_micros",
        "num_batch_threads",
        "max_enqueued_batches",
        "pad_variable_length_inputs",
    ]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model_config_file"], "serves the newest version only"),
        (["--grpc_channel_arguments", "grpc.keepalive_time_ms=1"], "must be grpc.max_receive_message_length=BYTES"),
    ],
)
def test_server_refuses_what_it_cannot_do(tmp_path, flags, text):
    config = (SERVE / "models.config").read_text().replace("latest { num_versions: 1 }", "all {}")
    (tmp_path / "models.config").write_text(config)
    given = flags if len(flags) == 2 else [*flags, str(tmp_path / "models.config")]
    done = subprocess.run([sys.executable, str(SERVE / "server.py"), *given], capture_output=True, text=True)
    assert done.returncode and text in done.stderr


# The strongest runtime at hand: TensorFlow's own library in a C program, as TensorFlow Serving embeds it


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The compiled program."""
    if shutil.which("gcc") is None:
        pytest.fail("This test compiles a C program: install gcc (`apt-get install gcc libc6-dev`).")
    program = tmp_path_factory.mktemp("runtime") / "serving_runtime"
    libraries = Path(tf.sysconfig.get_lib())
    subprocess.run(
        [
            *("gcc", "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", ROOT / "tests" / "serving_runtime.c"),
            *("-o", program, f"-I{tf.sysconfig.get_include()}", f"-Wl,-rpath,{libraries}"),
            *(libraries / "libtensorflow_cc.so.2", libraries / "libtensorflow_framework.so.2"),
        ],
        check=True,
    )
    return program


def run_in_c(program, export, signature, inputs, folder):
    """Outputs of a signature by name, from a process without Python."""
    from tensorflow.core.protobuf import saved_model_pb2

    (graph,) = saved_model_pb2.SavedModel.FromString((export / "saved_model.pb").read_bytes()).meta_graphs
    definition = graph.signature_def[signature]
    arguments = []
    for name, value in inputs.items():
        content = value.tobytes()
        if value.dtype == object:
            content = b"".join(len(item).to_bytes(8, "little") + item for item in value.flat)
        (folder / name).write_bytes(content)
        dtype = tf.string if value.dtype == object else tf.as_dtype(value.dtype)
        shape = ",".join(map(str, value.shape))
        arguments += [definition.inputs[name].name, str(dtype.as_datatype_enum), shape, folder / name]
    arguments.append("--")
    for name, info in definition.outputs.items():
        arguments += [info.name, folder / f"out-{name}"]
    done = subprocess.run(
        [program, export, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": "", "PYTHONHOME": "/no"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    outputs = {}
    for name, line in zip(definition.outputs, done.stdout.splitlines(), strict=True):
        dtype, shape = line.split()
        content = (folder / f"out-{name}").read_bytes()
        if tf.as_dtype(int(dtype)) == tf.string:
            flat = []
            while content:
                length = int.from_bytes(content[:8], "little")
                flat.append(content[8 : 8 + length].decode())
                content = content[8 + length :]
        else:
            flat = np.frombuffer(content, tf.as_dtype(int(dtype)).as_numpy_dtype)
        outputs[name] = np.array(flat).reshape([int(size) for size in shape.split(",")])
    return outputs


@pytest.mark.slow
def test_c_gives_the_scores_of_keras(runtime, model, folder, tmp_path):
    export = folder / "nonlocal" / "3"
    pixels = clip(7, batch=2)
    expected = keras_scores(model, pixels)
    found = run_in_c(runtime, export, "serving_default", {"clips": pixels}, tmp_path)
    np.testing.assert_allclose(found["scores"], expected, atol=1e-5)
    found = run_in_c(runtime, export, "classify", {"clips": pixels}, tmp_path)
    assert found["labels"].tolist() == [[NAMES[i] for i in np.argsort(-row)] for row in expected]
    files = np.stack([encode_jpeg(one) for one in pixels])
    decoded = np.stack([[load.decode_jpeg(file) for file in row] for row in files])
    found = run_in_c(runtime, export, "jpeg", {"frames": files}, tmp_path)
    np.testing.assert_allclose(found["scores"], keras_scores(model, decoded), atol=1e-5)
    positions = np.array([[0, 0, 0], [1, 1, 1]], "int32")
    found = run_in_c(runtime, export, "attention", {"clips": pixels, "positions": positions}, tmp_path)
    np.testing.assert_allclose(found["weights"].sum((2, 3, 4)), np.ones((2, 2)), atol=1e-5)
    with pytest.raises(RuntimeError, match="Invalid JPEG data"):
        run_in_c(runtime, export, "jpeg", {"frames": truncated()}, tmp_path)
    with pytest.raises(RuntimeError, match="Expects arg|uint8"):
        run_in_c(runtime, export, "serving_default", {"clips": pixels.astype("float32")}, tmp_path)
