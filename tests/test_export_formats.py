"""LiteRT and ONNX files: each gives the scores of the Keras model in its own runtime, or is not written."""

import json
import sys
import zipfile

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf

from keras_nonlocal import NonLocal3D, cli
from keras_nonlocal.applications import I3DResNet11, insert_non_local, preprocess_input
from keras_nonlocal.applications.folded import Conv3D, MaxPooling3D
from keras_nonlocal.cli import main
from keras_nonlocal.data import load_views, write_video
from keras_nonlocal.export import FORMATS, export_litert, export_model, export_onnx
from keras_nonlocal.export import formats as formats_module
from keras_nonlocal.ops import PAIRWISE

layers = keras.layers
NAMES = ["sit ups", "röntgen", "c", "d"]
FRAMES, SIZE = 4, 16
WITHOUT_DELEGATES = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def awake(model):
    """Non-local blocks do something, which fresh ones do not, and the scores tell clips apart."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, NonLocal3D):
            layer.norm.gamma.assign(rng.normal(size=layer.norm.gamma.shape))
    model.layers[-1].kernel.assign(0.1 * rng.normal(size=model.layers[-1].kernel.shape))
    return model


def build(*body, input_shape=(FRAMES, SIZE, SIZE, 3)):
    model = keras.Sequential([keras.Input(input_shape), *body, layers.GlobalAveragePooling3D()])
    model.add(layers.Dense(len(NAMES), activation="softmax"))
    return awake(model)


def all_blocks(query_chunk_size=16):
    """Every pairwise function on all keys and on pooled ones, side by side; windows; what the ready networks have."""
    inputs = keras.Input((FRAMES, SIZE, SIZE, 3))
    x = Conv3D(8, (3, 1, 1), padding="same")(inputs)
    x = Conv3D(8, (1, 3, 3), padding="same", activation="relu")(x)
    x = MaxPooling3D((1, 2, 2))(x)
    blocks = [
        NonLocal3D(pairwise, pool_size=pool_size, scale=0.1) for pairwise in PAIRWISE for pool_size in (None, (1, 2, 2))
    ]
    blocks.append(NonLocal3D(window=(2, None, None), query_chunk_size=query_chunk_size, scale=0.1))
    x = layers.Concatenate()([block(x) for block in blocks])
    x = layers.Dense(len(NAMES), activation="softmax")(layers.GlobalAveragePooling3D()(x))
    return awake(keras.Model(inputs, x))


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return all_blocks()


def clips(count, frames=FRAMES, size=SIZE):
    """Of different colours and textures."""
    rng = np.random.default_rng(1)
    colours = rng.uniform(0, 255, (count, 1, 1, 1, 3))
    return (0.5 * colours + 0.5 * rng.uniform(0, 255, (count, frames, size, size, 3))).astype("float32")


def keras_scores(model, given):
    return np.asarray(model(preprocess_input(given), training=False))


def litert_scores(path, given, batch_size=1):
    runner = tf.lite.Interpreter(str(path)).get_signature_runner("serving_default")
    batches = given.reshape(-1, batch_size, *given.shape[1:])
    return np.concatenate([runner(clips=batch)["scores"] for batch in batches])


def onnx_scores(path, given):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"clips": given})[0]


def test_the_blocks_matter_to_these_scores(model):
    expected = keras_scores(model, clips(4))
    assert np.ptp(expected, axis=0).max() > 0.05  # scores that are all alike would prove nothing
    gammas = [layer.norm.gamma for layer in model.layers if isinstance(layer, NonLocal3D)]
    assert len(gammas) == 2 * len(PAIRWISE) + 1
    for gamma in gammas:
        value = gamma.numpy()
        gamma.assign(np.zeros_like(value))
        assert np.abs(keras_scores(model, clips(4)) - expected).max() > 1e-3
        gamma.assign(value)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"quantization": "float16", "batch_size": 2}, 5e-3),
        ({"quantization": "int8"}, 0.1),
    ],
)
def test_litert(model, tmp_path, options, tolerance):
    path = export_litert(model, tmp_path / "deep" / "a.tflite", NAMES, **options)
    given = clips(4)
    found = litert_scores(path, given, options.get("batch_size", 1))
    np.testing.assert_allclose(found, keras_scores(model, given), atol=tolerance)
    assert zipfile.ZipFile(path).read("class_names.txt").decode() == "sit ups\nröntgen\nc\nd\n"
    assert [file.name for file in path.parent.iterdir()] == ["a.tflite"]


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.slow
def test_activations_in_eight_bits(pairwise, tmp_path):
    keras.utils.set_random_seed(0)
    block = NonLocal3D(pairwise, scale=0.1, query_chunk_size=None)
    model = build(Conv3D(8, (1, 3, 3), padding="same", activation="relu"), MaxPooling3D((1, 2, 2)), block)
    options = {"quantization": "int8", "representative_clips": [clips(8), *clips(2)]}
    path = export_litert(model, tmp_path / "a.tflite", **options)
    expected = keras_scores(model, clips(4))
    assert 0 < np.abs(litert_scores(path, clips(4)) - expected).max() < 0.05
    details = tf.lite.Interpreter(str(path), experimental_op_resolver_type=WITHOUT_DELEGATES).get_tensor_details()
    assert sum(detail["dtype"] == np.int8 for detail in details) > len(details) / 2


def test_activations_in_eight_bits_of_chunks(model, tmp_path):
    with pytest.raises(ValueError, match="build the non-local blocks with `query_chunk_size=None`.* with loops$"):
        export_litert(model, tmp_path / "a.tflite", quantization="int8", representative_clips=clips(2))
    assert list(tmp_path.iterdir()) == []


def test_quantised_files_are_smaller(tmp_path):
    model = build(Conv3D(64, 1), Conv3D(1024, 1))  # 270 kB of float32
    sizes = [
        export_litert(model, tmp_path / str(quantization), quantization=quantization).stat().st_size
        for quantization in (None, "float16", "int8")
    ]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.35 * sizes[0]


def test_onnx_takes_any_number_of_clips(model, tmp_path):
    path = export_onnx(model, tmp_path / "a.onnx", class_names=NAMES)
    for count in (1, 3):
        np.testing.assert_allclose(onnx_scores(path, clips(count)), keras_scores(model, clips(count)), atol=1e-5)
    proto = onnx.load(path)
    shapes = [
        [size.dim_param or size.dim_value for size in tensor.type.tensor_type.shape.dim]
        for tensor in (*proto.graph.input, *proto.graph.output)
    ]
    assert shapes == [["batch", FRAMES, SIZE, SIZE, 3], ["batch", len(NAMES)]]
    assert {entry.key: json.loads(entry.value) for entry in proto.metadata_props} == {"class_names": NAMES}
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_litert_of_a_ready_network(tmp_path):
    model = awake(I3DResNet11(classes=4))
    path = export_litert(model, tmp_path / "a.tflite", num_frames=3, image_size=(40, 32))
    given = clips(1, 3, 40)[:, :, :, :32]
    np.testing.assert_allclose(litert_scores(path, given), keras_scores(model, given), atol=1e-5)


@pytest.mark.slow
def test_onnx_of_a_ready_network_takes_any_size(tmp_path):
    model = awake(I3DResNet11(classes=4))
    path = export_onnx(model, tmp_path / "a.onnx", num_frames=3)
    for size in (40, 56):
        np.testing.assert_allclose(
            onnx_scores(path, clips(2, 3, size)), keras_scores(model, clips(2, 3, size)), atol=1e-5
        )
    sizes = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 3, "height", "width", 3]


def test_inserted_blocks_other_pixels_and_what_replaces_average_pooling(tmp_path):
    body = [
        layers.Conv3D(8, 3, strides=2, padding="same", activation="relu", name="conv"),
        layers.TimeDistributed(layers.AveragePooling2D(2)),
    ]
    model = awake(insert_non_local(build(*body), after=["conv"], pairwise="dot_product"))
    path = export_litert(model, tmp_path / "a.tflite", preprocess_input=lambda x: x / 255.0)
    expected = np.asarray(model(clips(1) / 255.0, training=False))
    np.testing.assert_allclose(litert_scores(path, clips(1)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "layer", "message"),
    [
        (
            "litert",
            layers.MaxPooling3D(2),
            r"LiteRT lacks operations of the model: build it with `keras_nonlocal\.applications\.folded\.MaxPooling3D` "
            r"for `keras\.layers\.MaxPooling3D`, or take another format; .* Received: operations=\['MaxPool3D'\]$",
        ),
        (
            "litert",
            layers.AveragePooling3D(2),
            r"TimeDistributed\(keras\.layers\.AveragePooling2D\(…\)\)` .*Received: operations=\['AvgPool3D'\]$",
        ),
        (
            "litert",
            layers.Conv3D(6, 3, groups=3),
            r"build it of other layers, or take another format; .*Received: operations=\['Conv3D'\]$",
        ),
        ("onnx", layers.Conv3D(6, 3, groups=3), r"^ONNX lacks operations of the model: build it of other layers, or"),
    ],
)
def test_operations_that_a_runtime_lacks(format, layer, message, tmp_path, caplog):
    with pytest.raises(ValueError, match=message):
        export_model(build(layer), tmp_path / "a", format)
    assert list(tmp_path.iterdir()) == []
    assert not [record for record in caplog.records if record.name.startswith("tf2onnx")]


def test_channels_first(tmp_path):
    """Layers that have no data format run in both; others in ONNX."""
    body = [layers.Permute((2, 3, 4, 1)), layers.Conv3D(2, 1)]
    plain, pooled = (
        build(*before, *body, input_shape=(3, FRAMES, SIZE, SIZE))
        for before in ([], [MaxPooling3D(2, data_format="channels_first")])
    )
    for model, format, run in (
        (plain, "litert", litert_scores),
        (plain, "onnx", onnx_scores),
        (pooled, "onnx", onnx_scores),
    ):
        path = export_model(model, tmp_path / f"{model.name}.{format}", format)
        expected = np.asarray(model(np.moveaxis(preprocess_input(clips(1)), -1, 1), training=False))
        np.testing.assert_allclose(run(path, clips(1)), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"^LiteRT lacks operations of networks with channels first: build it after"):
        export_model(pooled, tmp_path / "b", "litert")


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_a_file_of_other_scores_is_not_kept(format, tmp_path):
    model = build(layers.Conv3D(2, 1))
    with pytest.raises(ValueError, match=r"was not kept: its scores differ .* Received: tolerance=-1\.0$"):
        export_model(model, tmp_path / "a", format, tolerance=-1.0)
    model.layers[-1].bias.assign([np.nan] * 4)
    with pytest.raises(ValueError, match=r"by nan\. .* Received: tolerance=0\.0001$"):
        export_model(model, tmp_path / "a", format)
    assert list(tmp_path.iterdir()) == []


def test_never_overwrites(model, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("precious")
    for format in ("litert", "onnx"):
        with pytest.raises(FileExistsError, match=rf"never overwritten\. Received: path='{path}'$"):
            export_model(model, path, format)
    path.unlink()
    # Nor what another process writes meanwhile.
    monkeypatch.setattr(formats_module, "_compare", lambda *args: path.write_text("precious"))
    with pytest.raises(FileExistsError):
        export_litert(build(layers.Conv3D(2, 1)), path)
    assert path.read_text() == "precious"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_a_format_takes(model, tmp_path, monkeypatch):
    path = tmp_path / "a"
    still_open = build(layers.Conv3D(2, 1), input_shape=(None, None, None, 3))
    for call, message in (
        (lambda: export_model(model, path, "torch"), "'saved_model', 'litert', 'onnx'. Received: format='torch'"),
        (lambda: export_model(model, path, "onnx", quantization="int8"), "tolerance, preprocess_input; 'quantization'"),
        (lambda: export_litert(model, path, quantization="int4"), "Received: quantization='int4'"),
        (lambda: export_litert(model, path, representative_clips=clips(1)), 'for `quantization="int8"`'),
        (lambda: export_litert(model, path, batch_size=0), "Received: batch_size=0"),
        (lambda: export_litert(still_open, path, image_size=8), "leaves open: .* Received: num_frames=None"),
        (lambda: export_litert(model, path, num_frames=5), r"\(4, 16, 16\)\. Received: num_frames=5, image_size=None"),
        (
            lambda: export_litert(model, path, quantization="int8", representative_clips=clips(1, 3)),
            r"of the shape \(4, 16, 16, 3\)\. Received: a clip of \(3, 16, 16, 3\)",
        ),
        (
            lambda: export_litert(model, path, quantization="int8", representative_clips=[]),
            "must hold clips. Received: none",
        ),
        (lambda: export_onnx(model, path, class_names=["a"]), r"Received: class_names=\['a'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tf2onnx", None)
        with pytest.raises(ImportError, match=r'keras-nonlocal\[onnx\]"\. Missing: tf2onnx$'):
            export_onnx(model, path)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"Received: keras\.config\.backend\(\)='jax'$"):
        export_litert(model, path)
    assert list(tmp_path.iterdir()) == []


def test_export_model_writes_saved_models(tmp_path):
    path = export_model(build(layers.Conv3D(2, 1)), tmp_path / "a", warmup=False, views=None, version=7)
    assert path == tmp_path / "a" / "7" and (path / "saved_model.pb").exists()


# The command


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "a.keras"
    build(layers.Conv3D(4, 3), input_shape=(FRAMES, None, None, 3)).save(path)
    settings = {"class_names": NAMES, "num_frames": FRAMES, "frame_stride": 1, "image_size": 12, "shorter_side": [16]}
    path.with_name("a.keras.json").write_text(json.dumps(settings))
    return path


def test_the_command_knows_every_format():
    assert tuple(FORMATS) == cli.EXPORT_FORMATS


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_the_command_takes_sizes_and_names_from_the_training(format, file, tmp_path, capsys):
    path = tmp_path / "a"
    assert main(["export", str(file), str(path), "--format", format]) == 0
    assert capsys.readouterr().out == f"Wrote {path} for 4 classes: sit ups, röntgen, c, d\n"
    run = {"litert": litert_scores, "onnx": onnx_scores}[format]
    expected = keras_scores(keras.saving.load_model(file), clips(1))
    np.testing.assert_allclose(run(path, clips(1)), expected, atol=1e-5)


def test_the_command_shows_the_videos_to_int8(file, tmp_path, monkeypatch):
    shown = []
    listed = formats_module._listed
    monkeypatch.setattr(formats_module, "_listed", lambda *args: shown.extend(args[0]) or listed(*args))
    videos = [tmp_path / f"{number}.mp4" for number in range(2)]
    for number, video in enumerate(videos):
        write_video(video, np.random.default_rng(number).integers(0, 256, (6, 16, 24, 3)).astype("uint8"))
    arguments = ["--format", "litert", "--quantization", "int8", "--representative-videos", *map(str, videos)]
    assert main(["export", str(file), str(tmp_path / "a"), *arguments]) == 0
    options = {"num_frames": FRAMES, "frame_stride": 1, "image_size": 16, "shorter_side": 16, "views": (1, 1)}
    np.testing.assert_array_equal(shown, [load_views(video, **options)[0] for video in videos])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "torch"], "--format: invalid choice: 'torch'"),
        (["--format", "onnx", "--version", "2"], "'version' is none. Received: version=2"),
        (["--format", "litert", "--no-warmup"], "'warmup' is none. Received: warmup=False"),
        (["--quantization", "int8"], "'quantization' is none. Received: quantization='int8'"),
        (
            ["--format", "onnx", "--shorter-side", "16"],
            "--shorter-side and --frame-stride need --format saved_model or",
        ),
        (["--representative-videos", "a.mp4"], "--representative-videos needs --format litert"),
        (
            ["--format", "litert", "--quantization", "int8", "--representative-videos", "missing.mp4"],
            "Cannot decode missing.mp4",
        ),
    ],
)
def test_what_the_command_refuses_is_one_line(arguments, message, file, tmp_path, capsys):
    assert main(["export", str(file), str(tmp_path / "a"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
