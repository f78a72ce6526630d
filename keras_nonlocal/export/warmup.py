"""The requests with which TensorFlow Serving warms up a model, written without its package."""

import tensorflow as tf

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"

# Where neither the model nor the export says a size.
_NUM_FRAMES, _IMAGE_SIZE = 8, (224, 224)


def example_requests(signatures, preparation):
    """The shapes of a request for each signature: `{signature: {input: shape}}`."""
    size = preparation["image_size"] or _IMAGE_SIZE
    sizes = {"clips": (1, preparation["num_frames"] or _NUM_FRAMES, *size, 3), "positions": (1, 3)}
    sizes["frames"] = sizes["clips"][:2]
    return {
        name: {
            spec.name: [
                example if size is None else size for size, example in zip(spec.shape, sizes[spec.name], strict=True)
            ]
            for spec in signature.input_signature
        }
        for name, signature in signatures.items()
    }


def write_warmup(folder, model_name, signatures, requests):
    """Writes the warm-up file of a version: a TFRecord of `PredictionLog`, a request a record."""
    file = folder / WARMUP_FILE
    file.parent.mkdir(parents=True)
    side = requests["serving_default"]["clips"][2:4]
    frame = tf.io.encode_jpeg(tf.zeros((*side, 3), tf.uint8)).numpy()
    with tf.io.TFRecordWriter(str(file)) as writer:
        for name, signature in signatures.items():
            inputs = {
                spec.name: _tensor(frame if spec.dtype == tf.string else 0, spec.dtype, requests[name][spec.name])
                for spec in signature.input_signature
            }
            writer.write(_prediction_log(model_name, name, inputs))


def _tensor(value, dtype, shape):
    """A serialized `TensorProto` of one value, which is stored once."""
    tensor = tf.make_tensor_proto(value, dtype, shape=[])
    tensor.tensor_shape.CopyFrom(tf.TensorShape(shape).as_proto())
    return tensor.SerializeToString()


# The numbers are those of the fields in tensorflow_serving/apis/{prediction_log,predict,model}.proto.


def _prediction_log(model_name, signature, inputs):
    """A serialized `PredictionLog` of a `PredictRequest`."""
    model_spec = _message((1, model_name.encode()), (3, signature.encode()))
    entries = [(2, _message((1, name.encode()), (2, tensor))) for name, tensor in inputs.items()]
    predict_request = _message((1, model_spec), *entries)
    predict_log = _message((1, predict_request))
    return _message((6, predict_log))


def _message(*fields):
    """Pairs of a number and bytes in protocol buffers' wire format: all of these fields are of the type 2, bytes."""
    return b"".join(bytes([number << 3 | 2]) + _varint(len(value)) + value for number, value in fields)


def _varint(number):
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])
