"""Asks a running server (TensorFlow Serving, or server.py) for the class of a video.

    pip install ".[serve]"
    python examples/serve/client.py some.mp4 --export served/nonlocal           # gRPC; clips as in training
    python examples/serve/client.py some.mp4 --rest http://localhost:8501 --frame-stride 8 --shorter-side 256
    python examples/serve/client.py some.mp4 --signature jpeg --num-frames 32   # a tenth of the bytes
    python examples/serve/client.py frame-1.jpg frame-2.jpg frame-3.jpg …       # frames as they lie on disk

Prints the answer as JSON. `GrpcClient` and `RestClient` have the same methods; the latter needs NumPy alone.
"""

import argparse
import base64
import http.client
import io
import json
import pathlib
import sys
import urllib.parse

import numpy as np

FRAMES = (".jpg", ".jpeg", ".png")


class ServingError(Exception):
    """The server's refusal.

    Args:
        code: Name of a gRPC code, such as `"INVALID_ARGUMENT"`, or the number of an HTTP status.
        message: What the server says.
    """

    def __init__(self, code, message):
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class GrpcClient:
    """A model of a server, through gRPC.

    Args:
        address: `"host:port"`.
        name: Name of the model.
        timeout: Seconds to wait for an answer.
        max_bytes: The largest answer. gRPC's own limit, 4 MiB, is less than weights of attention may take.
    """

    def __init__(self, address, name="nonlocal", timeout=60.0, max_bytes=1 << 30):
        import grpc
        from tensorflow_serving.apis import prediction_service_pb2_grpc

        self.name, self._timeout = name, timeout
        limits = {"grpc.max_receive_message_length": max_bytes, "grpc.max_send_message_length": -1}
        self._channel = grpc.insecure_channel(address, options=list(limits.items()))
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)

    def predict(self, inputs, signature_name="serving_default", version=None):
        """Outputs by name, as arrays, of inputs by name: arrays (of bytes for strings), or `TensorProto`s."""
        import tensorflow as tf
        from tensorflow.core.framework import tensor_pb2
        from tensorflow_serving.apis import predict_pb2

        request = predict_pb2.PredictRequest()
        self._fill_spec(request.model_spec, version, signature_name)
        for name, value in inputs.items():
            is_proto = isinstance(value, tensor_pb2.TensorProto)
            request.inputs[name].CopyFrom(value if is_proto else tf.make_tensor_proto(value))
        response = self._call(self._stub.Predict, request)
        return {name: _texts(tf.make_ndarray(value)) for name, value in response.outputs.items()}

    def metadata(self, version=None):
        """`(version, {signature: (inputs, outputs)})` with dtype and shape of each, `None` where any size goes."""
        import tensorflow as tf
        from tensorflow_serving.apis import get_model_metadata_pb2

        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        self._fill_spec(request.model_spec, version, "")
        response = self._call(self._stub.GetModelMetadata, request)
        definitions = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(definitions)

        def described(infos):
            return {
                name: (tf.as_dtype(info.dtype).name, tf.TensorShape(info.tensor_shape).as_list())
                for name, info in infos.items()
            }

        signatures = definitions.signature_def.items()
        return response.model_spec.version.value, {
            name: (described(value.inputs), described(value.outputs)) for name, value in signatures if value.method_name
        }

    def close(self):
        self._channel.close()

    def _fill_spec(self, spec, version, signature_name):
        spec.name, spec.signature_name = self.name, signature_name
        if version is not None:
            spec.version.value = version

    def _call(self, method, request):
        import grpc

        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise ServingError(error.code().name, error.details()) from error


class RestClient:
    """A model of a server, through REST: the same methods as `GrpcClient`. One connection, for one thread.

    Args:
        address: `"http://host:port"`.
        name: Name of the model.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, address, name="nonlocal", timeout=60.0):
        self.name = name
        self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=timeout)

    def predict(self, inputs, signature_name="serving_default", version=None):
        """Outputs by name, as arrays, of inputs by name: arrays (of bytes for strings), or what goes into JSON."""
        request = {"signature_name": signature_name, "inputs": {name: _jsonable(x) for name, x in inputs.items()}}
        outputs = self.post(json.dumps(request).encode(), version)["outputs"]
        if not isinstance(outputs, dict):  # so is a single one answered, without its name
            (name,) = self.metadata(version)[1][signature_name][1]
            outputs = {name: outputs}
        return {name: np.array(value) for name, value in outputs.items()}

    def metadata(self, version=None):
        """As `GrpcClient.metadata`."""
        answer = self._request("GET", self._path(version) + "/metadata")

        def described(infos):
            return {name: (_dtype(info["dtype"]), _sizes(info["tensor_shape"])) for name, info in infos.items()}

        signatures = answer["metadata"]["signature_def"]["signature_def"].items()
        return int(answer["model_spec"]["version"]), {
            name: (described(value["inputs"]), described(value["outputs"]))
            for name, value in signatures
            if value["method_name"]
        }

    def post(self, body, version=None):
        """The server's answer to a body that is ready."""
        return self._request("POST", self._path(version) + ":predict", body)

    def close(self):
        self._connection.close()

    def _path(self, version):
        return f"/v1/models/{self.name}" + ("" if version is None else f"/versions/{version}")

    def _request(self, method, path, body=None):
        was_open = self._connection.sock is not None
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            if was_open and isinstance(error, BrokenPipeError | ConnectionResetError):
                return self._request(method, path, body)  # servers drop connections that were idle
            raise ServingError("UNAVAILABLE", f"{type(error).__name__}: {error}") from error
        if response.status != 200:
            raise ServingError(response.status, answer["error"])
        return answer


def _jsonable(value):
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind != "O" else [_jsonable(item) for item in value]
    return value


def _texts(array):
    return array if array.dtype != object else np.char.decode(array.astype("S"))


def _dtype(name):
    """`"DT_FLOAT"` → `"float32"`."""
    return {"DT_FLOAT": "float32", "DT_DOUBLE": "float64"}.get(name, name.removeprefix("DT_").lower())


def _sizes(shape):
    return None if shape.get("unknown_rank") else [None if int(d["size"]) < 0 else int(d["size"]) for d in shape["dim"]]


def as_strings(values):
    """A list of bytes as an array, which NumPy by itself would cut at zero bytes."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def encode_jpeg(clip, quality=95):
    """The frames `(frames, height, width, 3)` of a clip as an array of JPEG files."""
    from PIL import Image

    buffers = [io.BytesIO() for _ in clip]
    for frame, buffer in zip(clip, buffers, strict=True):
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return as_strings([buffer.getvalue() for buffer in buffers])


def read_video(args, client):
    """The inputs of the signature: the clip in the middle of a video."""
    from keras_nonlocal.data import load_views

    trained = {}
    if args.export:
        from keras_nonlocal.export import read_metadata

        trained = read_metadata(args.export)["preprocessing"]
    (shape,) = (shape for _, shape in client.metadata()[1]["serving_default"][0].values())
    (clip,) = load_views(
        args.paths[0],
        args.num_frames or shape[1] or trained.get("num_frames") or 8,
        args.frame_stride or trained.get("frame_stride") or 8,
        views=(1, 1),
        shorter_side=args.shorter_side or trained.get("shorter_side") or 256,
        image_size="whole",
    )
    return {"frames": encode_jpeg(clip)[None]} if args.signature == "jpeg" else {"clips": clip[None]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", help="a video, or the JPEG or PNG files of its frames")
    parser.add_argument("--rest", metavar="URL", help="ask by REST, such as http://localhost:8501, not by gRPC")
    parser.add_argument("--grpc", default="localhost:8500", help="(default: %(default)s)")
    parser.add_argument("--name", default="nonlocal", help="of the model (default: %(default)s)")
    parser.add_argument("--signature", default="classify", help="(default: %(default)s; of frames' files: jpeg)")
    parser.add_argument("--num-frames", type=int, help="of the clip (default: what the model takes, else 8)")
    parser.add_argument("--export", metavar="DIR", help="what is served, which says how its clips are made")
    parser.add_argument("--frame-stride", type=int, help="(default: what --export says, else 8)")
    parser.add_argument("--shorter-side", type=int, help="of what is sent (default: what --export says, else 256)")
    args = parser.parse_args(argv)
    client = RestClient(args.rest, args.name) if args.rest else GrpcClient(args.grpc, args.name)
    try:
        if all(path.lower().endswith(FRAMES) for path in args.paths):
            args.signature, files = "jpeg", [pathlib.Path(path).read_bytes() for path in args.paths]
            inputs = {"frames": as_strings(files)[None]}
        elif len(args.paths) == 1:
            inputs = read_video(args, client)
        else:
            parser.error(f"Give one video, or files of frames. Received: {args.paths}")
        outputs = client.predict(inputs, args.signature)
    except (ServingError, OSError, ValueError) as error:  # also files that are missing or no videos
        sys.exit(str(error))
    finally:
        client.close()
    print(json.dumps({name: value[0].tolist() for name, value in outputs.items()}, ensure_ascii=False))


if __name__ == "__main__":
    main()
