"""A stand-in for TensorFlow Serving: its REST and gRPC API over SavedModels, in Python.

    pip install ".[serve]"
    python examples/serve/server.py --model_name=nonlocal --model_base_path=served/nonlocal

For tests, development and machines that cannot run TensorFlow Serving's container (docker-compose.yml does). The flags
are those of `tensorflow_model_server`. The newest version is served, the next one as soon as it is loaded and has
answered its warm-up requests. Requests are not batched.

    gRPC  PredictionService.Predict, PredictionService.GetModelMetadata, ModelService.GetModelStatus
    REST  POST /v1/models/NAME[/versions/N]:predict, GET /v1/models/NAME[/versions/N][/metadata]

Keras and keras_nonlocal are not used, and cannot be: an export stands alone.
"""

import argparse
import base64
import binascii
import concurrent.futures
import contextlib
import copy
import http.server
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.modules["keras"] = sys.modules["keras_nonlocal"] = None  # whoever imports them gets an ImportError

import grpc  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from google.protobuf import json_format, text_format  # noqa: E402
from tensorflow.core.protobuf import saved_model_pb2  # noqa: E402
from tensorflow_serving.apis import (  # noqa: E402
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2  # noqa: E402

WARM_UP = "assets.extra/tf_serving_warmup_requests"
METHOD = "tensorflow/serving/predict"
LIMIT = "grpc.max_receive_message_length"
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNIMPLEMENTED: 501,
}
CODES = {code.value[0]: code for code in grpc.StatusCode}
# More requests at a time would share the same cores, and hold more memory.
_slots = threading.Semaphore(os.cpu_count())


class Refused(Exception):
    """An answer that is an error, with gRPC's code."""

    def __init__(self, message, code=grpc.StatusCode.INVALID_ARGUMENT):
        super().__init__(message)
        self.code = code


# Models


class Version:
    """One loaded SavedModel."""

    def __init__(self, path, limit):
        self.number = int(path.name)
        self._limit = math.inf  # what comes with the model may be of any size
        self._loaded = tf.saved_model.load(str(path))
        (graph,) = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs
        self.signatures = {name: copy.deepcopy(value) for name, value in graph.signature_def.items()}  # not the graph
        if (path / WARM_UP).exists():
            for record in tf.data.TFRecordDataset(str(path / WARM_UP)).as_numpy_iterator():
                request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
                self.predict(request.model_spec.signature_name, request.inputs, self.tensor_from_proto)
        self._limit = limit

    def predict(self, signature_name, inputs, to_tensor):
        """Outputs by name; `to_tensor(name, value, info)` checks and converts a value of `inputs`."""
        signature = self.signature(signature_name)
        if set(inputs) != set(signature.inputs):
            raise Refused(f"The inputs must be {sorted(signature.inputs)}. Received: {sorted(inputs)}")
        tensors = {name: to_tensor(name, inputs[name], info) for name, info in signature.inputs.items()}
        try:
            outputs = self._loaded.signatures[signature_name or "serving_default"](**tensors)
        except tf.errors.OpError as error:
            raise Refused(_cause(error.message), CODES.get(error.error_code, grpc.StatusCode.INTERNAL)) from error
        return {name: value.numpy() for name, value in outputs.items()}

    def signature(self, name):
        name = name or "serving_default"
        known = sorted(key for key, value in self.signatures.items() if value.method_name == METHOD)
        if name not in known:
            raise Refused(f"The signature must be one of {known}. Received: {name!r}")
        return self.signatures[name]

    def tensor_from_proto(self, name, proto, info):
        shape = tuple(dimension.size for dimension in proto.tensor_shape.dim)
        if proto.dtype != info.dtype:
            raise Refused(f"`{name}` must be {_dtype(info.dtype)}. Received: {_dtype(proto.dtype)}")
        # Before anything of that size is made: a proto of a few bytes may stand for any number of equal values.
        self._check_shape(name, shape, info)
        try:
            return tf.constant(tf.make_ndarray(proto))
        except ValueError as error:
            raise Refused(f"`{name}` does not hold the values of its shape {shape}: {error}") from error

    def tensor_from_json(self, name, value, info):
        dtype = tf.as_dtype(info.dtype)
        if dtype == tf.string:
            value = _strings(name, value)
        try:
            array = np.array(value, object if dtype == tf.string else None)
        except (ValueError, OverflowError) as error:
            raise Refused(f"`{name}` must be lists of equal lengths. Received: {error}") from error
        self._check_shape(name, array.shape, info)
        if dtype != tf.string:
            kinds = "iu" if dtype.is_integer else "iuf"
            if array.dtype.kind not in kinds:
                raise Refused(f"`{name}` must be {dtype.name}. Received: {array.dtype.name}")
            if dtype.is_integer and not dtype.min <= array.min() <= array.max() <= dtype.max:
                raise Refused(f"`{name}` must be {dtype.name}. Received: values {array.min()} to {array.max()}")
            array = array.astype(dtype.as_numpy_dtype)
        return tf.constant(array, dtype)

    def _check_shape(self, name, shape, info):
        wanted = tuple(dimension.size if dimension.size >= 0 else None for dimension in info.tensor_shape.dim)
        if not info.tensor_shape.unknown_rank and (
            len(shape) != len(wanted) or any(w not in (None, s) for s, w in zip(shape, wanted, strict=True))
        ):
            raise Refused(f"`{name}` must have the shape {wanted}. Received: {shape}")
        if any(size <= 0 for size in shape):
            raise Refused(f"`{name}` must not be empty. Received: the shape {shape}")
        size = math.prod(shape) * (tf.as_dtype(info.dtype).size or 8)
        if size > self._limit:
            raise Refused(
                f"`{name}` must take at most {self._limit} bytes. Received: the shape {shape}, {size} bytes",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )


class Model:
    """A folder of versions, of which the newest is served."""

    def __init__(self, name, base_path, limit):
        self.name, self._base_path, self._limit = name, pathlib.Path(base_path), limit
        self._current = None
        self._broken = set()

    def refresh(self):
        """Loads the newest version; until it can answer, and if it cannot, the former one goes on."""
        numbers = {int(path.name) for path in self._base_path.glob("*") if path.name.isdecimal() and path.is_dir()}
        newest = max(numbers - self._broken, default=None)
        if newest is None or (self._current and newest == self._current.number):
            return
        try:
            self._current = Version(self._base_path / str(newest), self._limit)
        except Exception as error:  # whatever is wrong with the files, the server lives
            self._broken.add(newest)
            print(f"{self.name}: version {newest} cannot be served: {_cause(str(error))}", file=sys.stderr, flush=True)
            self.refresh()
        else:
            print(f"{self.name}: serving version {newest}", flush=True)

    def version(self, number=None):
        current = self._current
        if current is None or number not in (None, current.number):
            served = "no version" if current is None else f"version {current.number}"
            wanted = "any" if number is None else f"version {number}"
            raise Refused(f"{self.name} serves {served}. Received: {wanted}", grpc.StatusCode.NOT_FOUND)
        return current


class Models(dict):
    """Name → Model."""

    def version(self, name, number=None):
        if name not in self:
            raise Refused(f"The model must be one of {sorted(self)}. Received: {name!r}", grpc.StatusCode.NOT_FOUND)
        return self[name].version(number)

    def poll(self, seconds, stopped):
        while not stopped.wait(seconds):
            for model in self.values():
                model.refresh()


def _cause(message):
    """What went wrong, in one line, out of TensorFlow's page about where."""
    message = message.split("\n\t [[")[0]
    if message.startswith("Graph execution error:"):  # then comes where, then what
        message = message.strip().split("\n")[-1]
    return " ".join(message.split())[:1000]


def _refusal(error):
    """What the client hears of an error; one that nobody foresaw is told here too."""
    if isinstance(error, Refused):
        return error
    traceback.print_exception(error)
    return Refused(f"{type(error).__name__}: {_cause(str(error))}", grpc.StatusCode.INTERNAL)


def _dtype(number):
    try:
        return tf.as_dtype(number).name
    except TypeError:
        return f"type {number}"


def _strings(name, value):
    """Nested lists with bytes in the place of texts and of `{"b64": …}`."""
    if isinstance(value, list):
        return [_strings(name, item) for item in value]
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except binascii.Error as error:
            raise Refused(f"`{name}` must be base64. Received: {error}") from error
    raise Refused(f'`{name}` must be strings or {{"b64": string}}. Received: {type(value).__name__}')


# gRPC


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models):
        self._models = models

    def Predict(self, request, context):
        with _answering(context), _slots:
            version = self._models.version(request.model_spec.name, _version_number(request.model_spec))
            signature_name = request.model_spec.signature_name or "serving_default"
            outputs = version.predict(signature_name, request.inputs, version.tensor_from_proto)
            unknown = set(request.output_filter) - set(outputs)
            if unknown:
                raise Refused(f"The outputs are {sorted(outputs)}. Received: output_filter={sorted(unknown)}")
            response = predict_pb2.PredictResponse()
            _fill_spec(response.model_spec, request.model_spec, version, signature_name)
            for name in request.output_filter or outputs:
                response.outputs[name].CopyFrom(tf.make_tensor_proto(outputs[name]))
            return response

    def GetModelMetadata(self, request, context):
        with _answering(context):
            version = self._models.version(request.model_spec.name, _version_number(request.model_spec))
            if list(request.metadata_field) != ["signature_def"]:
                raise Refused(f"`metadata_field` must be ['signature_def']. Received: {list(request.metadata_field)}")
            response = get_model_metadata_pb2.GetModelMetadataResponse()
            _fill_spec(response.model_spec, request.model_spec, version, "")
            response.metadata["signature_def"].Pack(_definitions(version))
            return response


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, models):
        self._models = models

    def GetModelStatus(self, request, context):
        with _answering(context):
            version = self._models.version(request.model_spec.name, _version_number(request.model_spec))
            return _status(version)


@contextlib.contextmanager
def _answering(context):
    """Turns an error into gRPC's."""
    try:
        yield
    except Exception as error:
        refusal = _refusal(error)
        context.abort(refusal.code, str(refusal))


def _version_number(spec):
    return spec.version.value if spec.HasField("version") else None


def _fill_spec(spec, asked, version, signature_name):
    spec.name, spec.signature_name = asked.name, signature_name
    spec.version.value = version.number


def _definitions(version):
    return get_model_metadata_pb2.SignatureDefMap(signature_def=version.signatures)


def _status(version):
    response = get_model_status_pb2.GetModelStatusResponse()
    response.model_version_status.add(version=version.number, state="AVAILABLE").status.error_code = 0
    return response


# REST


class RestHandler(http.server.BaseHTTPRequestHandler):
    """One connection; `models` and `limit` are set by `serve`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of an answer waits for the client to acknowledge its head
    timeout = 60
    path_pattern = re.compile(r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<number>\d+))?(?P<what>/metadata|:predict)?")

    def do_GET(self):
        self._answer(self._describe)

    def do_POST(self):
        body = self._read_body()
        if body is not None:
            self._answer(lambda match: self._predict(match, body))

    def _read_body(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            return self._send(411, {"error": "A request must have a Content-Length"})
        length = int(length)
        if length <= self.limit:
            return self.rfile.read(length)
        # Read and forgotten, as a client reads no answer before it has sent; one that sends for ever is cut off.
        self.close_connection = length > 8 * self.limit
        for start in range(0, min(length, 8 * self.limit), 1 << 20):
            self.rfile.read(min(1 << 20, length - start))
        self._send(413, {"error": f"A request must have at most {self.limit} bytes. Received: {length} bytes"})

    def _answer(self, make):
        try:
            match = self.path_pattern.fullmatch(self.path)
            if not match:
                raise Refused(f"No such address. Received: {self.path}", grpc.StatusCode.NOT_FOUND)
            status, answer = 200, make(match)
        except Exception as error:
            refusal = _refusal(error)
            status, answer = HTTP_STATUS.get(refusal.code, 500), {"error": str(refusal)}
        self._send(status, answer)

    def _send(self, status, answer):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _version(self, match):
        return self.models.version(match["name"], match["number"] and int(match["number"]))

    def _describe(self, match):
        version = self._version(match)
        if match["what"] is None:
            return json_format.MessageToDict(
                _status(version), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        if match["what"] == ":predict":
            raise Refused("Predictions are asked for by POST. Received: GET", grpc.StatusCode.UNIMPLEMENTED)
        definitions = json_format.MessageToDict(
            _definitions(version), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        spec = {"name": match["name"], "signature_name": "", "version": str(version.number)}
        return {"model_spec": spec, "metadata": {"signature_def": definitions}}

    def _predict(self, match, body):
        if match["what"] != ":predict":
            raise Refused(f"A POST must be to :predict. Received: {self.path}", grpc.StatusCode.UNIMPLEMENTED)
        version = self._version(match)
        with _slots:
            try:
                request = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise Refused(f"The body must be JSON. Received: {error}") from error
            if not isinstance(request, dict) or ("instances" in request) == ("inputs" in request):
                raise Refused('The body must be an object with either "instances" or "inputs"')
            signature_name = request.get("signature_name", "serving_default")
            names = list(version.signature(signature_name).inputs)
            by_row = "instances" in request
            inputs = _columns(request["instances"], names) if by_row else _named(request["inputs"], names)
            outputs = version.predict(signature_name, inputs, version.tensor_from_json)
            outputs = {name: _json(array) for name, array in outputs.items()}
        if not by_row:
            return {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
        if len(outputs) == 1:
            return {"predictions": next(iter(outputs.values()))}
        return {"predictions": [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]}

    def log_message(self, *args):
        pass


def _named(value, names):
    """A value for each input: an object with them, or the one there is."""
    if isinstance(value, dict) and set(value) != {"b64"}:
        return value
    if len(names) > 1:
        raise Refused(f"The inputs must be an object with {sorted(names)}. Received: {type(value).__name__}")
    return {names[0]: value}


def _columns(instances, names):
    """A list for each input, from one object (or the one input's value) an instance."""
    if not isinstance(instances, list) or not instances:
        raise Refused(f'"instances" must be a list that is not empty. Received: {json.dumps(instances)[:100]}')
    rows = [_named(instance, names) for instance in instances]
    for row in rows:
        if set(row) != set(names):
            raise Refused(f"The inputs must be {sorted(names)}. Received: {sorted(row)}")
    return {name: [row[name] for row in rows] for name in names}


def _json(array):
    """Nested lists; bytes as texts where they are."""

    def text(value):
        if isinstance(value, list):
            return [text(item) for item in value]
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"b64": base64.b64encode(value).decode()}

    return text(array.tolist()) if array.dtype == object else array.tolist()


# Start and end


def serve(models, host, port, rest_api_port, limit, poll_seconds):
    """Serves until the process is told to stop."""
    for model in models.values():
        model.refresh()
    grpc_server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(4 * os.cpu_count()),
        options=[(LIMIT, limit), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(models), grpc_server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(models), grpc_server)
    port = grpc_server.add_insecure_port(f"{host}:{port}")
    handler = type("Handler", (RestHandler,), {"models": models, "limit": limit})
    rest_server = http.server.ThreadingHTTPServer((host, rest_api_port), handler)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    grpc_server.start()
    threading.Thread(target=rest_server.serve_forever, daemon=True).start()
    print(f"gRPC {host}:{port}", f"REST http://{host}:{rest_server.server_port}", sep="\n", flush=True)
    models.poll(poll_seconds, stopped)
    rest_server.shutdown()
    grpc_server.stop(grace=5).wait()


def read_models(arguments, limit):
    """The models of `--model_config_file`, or the one of the other flags."""
    if not arguments.model_config_file:
        return Models({arguments.model_name: Model(arguments.model_name, arguments.model_base_path, limit)})
    text = pathlib.Path(arguments.model_config_file).read_text()
    configs = text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config
    for config in configs:
        policy = config.model_version_policy
        if policy.WhichOneof("policy_choice") not in (None, "latest") or policy.latest.num_versions > 1:
            sys.exit(f"This server serves the newest version only. Received: {config.name} with {policy}")
    return Models({config.name: Model(config.name, config.base_path, limit) for config in configs})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model_name", default="nonlocal", help="(default: %(default)s)")
    parser.add_argument("--model_base_path", default="served/nonlocal", help="folder of the versions")
    parser.add_argument("--model_config_file", help="such as models.config, in place of these two")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8500, help="of gRPC; 0: any free one (default: %(default)s)")
    parser.add_argument("--rest_api_port", type=int, default=8501, help="likewise (default: %(default)s)")
    parser.add_argument("--file_system_poll_wait_seconds", type=float, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--grpc_channel_arguments",
        default=f"{LIMIT}={128 << 20}",
        help="the largest message, of REST too (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    name, _, limit = arguments.grpc_channel_arguments.partition("=")
    if name != LIMIT or not limit.isdecimal():
        parser.error(f"--grpc_channel_arguments must be {LIMIT}=BYTES. Received: {arguments.grpc_channel_arguments}")
    models = read_models(arguments, int(limit))
    serve(
        models,
        arguments.host,
        arguments.port,
        arguments.rest_api_port,
        int(limit),
        arguments.file_system_poll_wait_seconds,
    )


if __name__ == "__main__":
    main()
