"""SavedModels: the numbers of the Keras model, in a process without Keras, under signatures that do not change."""

import datetime
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from keras_nonlocal import NonLocal3D, __version__
from keras_nonlocal.applications import C2DResNet11, preprocess_input
from keras_nonlocal.data.annotations import Annotations
from keras_nonlocal.data.clips import ClipOptions
from keras_nonlocal.data.decode import write_video
from keras_nonlocal.data.sampling import view_crop_positions, view_indices
from keras_nonlocal.data.shards import shard_source, write_shards
from keras_nonlocal.export import export_saved_model, read_class_names, read_metadata, verify_saved_model
from keras_nonlocal.export.clean_process import check_signatures
from keras_nonlocal.visualization import attend
from tests.test_data_shards import records, resized_frames

GOLDEN = Path(__file__).parent / "goldens" / "serving_signature.json"
UPDATE = os.environ.get("KNL_UPDATE_GOLDENS") == "1"
NAMES = ["sit ups", "röntgen", "c", "d"]
SIZE = (32, 40)
CLIPS = {"num_frames": 4, "frame_stride": 2, "image_size": SIZE, "shorter_side": 44, "views": (2, 3)}
SIGNATURES = ["serving_default", "float", "classify", "jpeg", "views", "features", "attention"]

WITHOUT_KERAS = """
import sys
sys.modules["keras"] = sys.modules["keras_nonlocal"] = None
import numpy as np
import tensorflow as tf
export, given, results = sys.argv[1:]
loaded = tf.saved_model.load(export)
calls, found = {}, {}
with np.load(given) as file:
    for key in file:
        call, name = key.split("/")
        calls.setdefault(call, {})[name] = tf.constant(file[key])
for call, inputs in calls.items():
    for name, value in loaded.signatures[call.split("-")[0]](**inputs).items():
        found[call + "/" + name] = value.numpy().astype("S") if value.dtype == tf.string else value.numpy()
np.savez(results, **found)
"""


def randomize(model):
    """Non-local blocks that do something, which fresh ones do not, and a head that tells clips apart."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, NonLocal3D):
            layer.norm.gamma.assign(rng.normal(size=layer.norm.gamma.shape))
    model.get_layer("pred").kernel.assign(rng.normal(size=model.get_layer("pred").kernel.shape))
    return model


def build(**options):
    model = randomize(C2DResNet11(classes=4, **options))
    model.get_layer("pred").kernel.assign(0.1 * model.get_layer("pred").kernel)
    return model


def build_small(shape=(None, None, None, 3), pool_size=(1, 2, 2)):
    """What exports, traces and compiles fast."""
    x = inputs = keras.Input(shape)
    x = keras.layers.Conv3D(6, 3, strides=(1, 2, 2), padding="same", activation="relu", name="conv")(x)
    x = NonLocal3D(name="first")(x)
    x = NonLocal3D(name="second", pool_size=pool_size)(x)
    x = keras.layers.GlobalAveragePooling3D(name="pool")(x)
    x = keras.layers.Dense(4, activation="softmax", name="pred")(x)
    return randomize(keras.Model(inputs, x, name="small"))


def build_pixels(num_frames, size):
    """Its scores are the pixels."""
    return keras.Sequential([keras.Input((num_frames, *size, 3)), keras.layers.Flatten(dtype="float32")])


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return build()


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    return export_saved_model(model, tmp_path_factory.mktemp("models") / "deep" / "model", NAMES, **CLIPS)


@pytest.fixture(scope="module")
def small():
    keras.utils.set_random_seed(0)
    return build_small()


@pytest.fixture(scope="module")
def tiny():
    """Where files are tested, not numbers."""
    inputs = keras.Input((2, 4, 4, 3))
    features = keras.layers.GlobalAveragePooling3D()(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="pred")(features), name="tiny")


@pytest.fixture(scope="module")
def small_export(small, tmp_path_factory):
    return export_saved_model(small, tmp_path_factory.mktemp("small"), NAMES, **CLIPS)


@pytest.fixture(scope="module")
def small_loaded(small_export):
    return tf.saved_model.load(str(small_export))


def clips(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3)).astype("uint8")


def keras_scores(model, clips):
    return np.asarray(model(preprocess_input(clips), training=False), "float32")


def encoded(frames, form="PNG", **options):
    """The frames of clips `(B, T, H, W, 3)` as files, `(B, T)`."""
    files = []
    for frame in frames.reshape(-1, *frames.shape[2:]):
        stream = io.BytesIO()
        PIL.Image.fromarray(frame).save(stream, form, **options)
        files.append(stream.getvalue())
    return np.array(files, "S").reshape(frames.shape[:2])


def cropped(frames, size, corner=None):
    height, width = frames.shape[-3:-1]
    top, left = ((height - size[0]) // 2, (width - size[1]) // 2) if corner is None else corner
    return frames[..., top : top + size[0], left : left + size[1], :]


def test_every_signature_gives_the_numbers_of_keras_without_keras(model, export, tmp_path):
    """≤ 1e-5, pixels that are not resized; where they are, see the tests of resizing."""
    exact, larger = clips(2, 4, *SIZE), clips(1, 5, 44, 60)
    fractions = exact + np.float32(0.25)
    video = clips(2, 11, 44, 60)
    positions = np.array([[0, 0, 0], [1, 1, 2], [9, -3, 9]], "int32")  # the last one lies outside of the map
    given = {
        "serving_default-exact/clips": exact,
        "serving_default-larger/clips": larger,
        "float-exact/clips": fractions,
        "float-larger/clips": larger.astype("float32"),
        "classify/clips": exact,
        "jpeg-png/frames": encoded(exact),
        "jpeg-larger/frames": encoded(larger),
        "views/clips": video,
        "features/clips": exact,
        "attention/clips": larger,
        "attention/positions": positions,
    }
    np.savez(tmp_path / "given.npz", **given)
    subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS, export, tmp_path / "given.npz", tmp_path / "found.npz"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
    )
    with np.load(tmp_path / "found.npz") as file:
        found = dict(file)
    scores, scores_of_larger = keras_scores(model, exact), keras_scores(model, cropped(larger, SIZE))
    order = np.argsort(-scores, axis=1)
    views = [
        keras_scores(model, cropped(video[:, frames], SIZE, corner))
        for frames in view_indices(11, 4, 2, 2)
        for corner in view_crop_positions(44, 60, SIZE, 3)
    ]
    assert np.ptp(views, axis=0).max() > 1e-3  # views that are all alike would prove nothing
    blocks = [layer for layer in model.layers if isinstance(layer, NonLocal3D)]
    maps = keras.Model(model.inputs[0], blocks[-1].input)(preprocess_input(cropped(larger, SIZE)))
    inside = positions.clip(0, np.array(maps.shape[1:4]) - 1)
    assert np.array_equal(inside[:2], positions[:2]) and not np.array_equal(inside[2], positions[2])
    expected = {
        "serving_default-exact/scores": scores,
        "serving_default-larger/scores": scores_of_larger,
        "float-exact/scores": keras_scores(model, fractions),
        "float-larger/scores": scores_of_larger,
        "classify/scores": np.take_along_axis(scores, order, 1),
        "jpeg-png/scores": scores,
        "jpeg-larger/scores": scores_of_larger,
        "views/scores": np.mean(views, axis=0),
        "features/features": np.asarray(
            keras.Model(model.inputs[0], model.get_layer("pred").input)(preprocess_input(exact))
        ),
        "attention/weights": np.asarray(blocks[-1].attention(maps, inside)),
    }
    labels = found.pop("classify/labels")
    assert [[label.decode() for label in row] for row in labels] == [[NAMES[k] for k in row] for row in order]
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == "float32"
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)
        assert np.ptp(value) > 0.01, name  # what is all alike would prove nothing


def test_attention_is_that_of_the_pictures(model, export):
    clip = clips(4, *SIZE)
    loaded = tf.saved_model.load(str(export))
    attention = loaded.signatures["attention"]
    expected = attend(model, clip, (1, 20, 30))
    weights = attention(clips=tf.constant(clip[None]), positions=tf.constant([expected.query]))["weights"]
    assert expected.weights.shape == weights.shape[2:] and min(expected.query[1:]) > 0
    np.testing.assert_allclose(weights[0, 0], expected.weights, atol=1e-6)
    np.testing.assert_allclose(tf.reduce_sum(weights), 1, atol=1e-5)


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Stored frames as JPEGs, and views that shards give of them, central ones and all: no size is a multiple of
    another."""
    folder = tmp_path_factory.mktemp("shards")
    smooth = np.random.default_rng(0).normal(size=(12, 10, 13, 3)).repeat(7, 1).repeat(7, 2)
    write_video(folder / "video.mp4", (128 + 50 * smooth).clip(0, 255).astype("uint8")[:, :, :90])
    annotations = Annotations(paths=(str(folder / "video.mp4"),), labels=None, class_names=None)
    index = write_shards(annotations, folder / "shards", shorter_side=60, verbose=False)

    def views(num_crops):
        options = ClipOptions(3, 2, (40, 40), (24, 28), False, (2, num_crops), "recipe")
        ((pixels, _, is_good, _),) = shard_source(index, None, options, False, 0).as_numpy_iterator()
        assert is_good and pixels.shape == (2 * num_crops, 3, 24, 28, 3) and pixels.std() > 20
        return pixels

    ((_, jpegs),) = records(index)
    return jpegs, views(1), views(3)


def test_resizing_is_that_of_shards_bit_for_bit(camera, tmp_path):
    jpegs, central, views = camera
    path = export_saved_model(
        build_pixels(3, (24, 28)),
        tmp_path / "pixels",
        frame_stride=2,
        shorter_side=40,
        views=(2, 3),
        preprocess_input=lambda pixels: pixels,
    )
    loaded = tf.saved_model.load(str(path))
    video = np.stack([tf.io.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE") for jpeg in jpegs])
    for number, frames in enumerate(view_indices(12, 3, 2, 2)):
        expected = central[number].astype("float32").reshape(1, -1)
        for name, value in (
            ("serving_default", {"clips": tf.constant(video[None, frames])}),
            ("float", {"clips": tf.constant(video[None, frames].astype("float32"))}),
            ("jpeg", {"frames": tf.constant([[jpegs[frame] for frame in frames]])}),
        ):
            found = loaded.signatures[name](**value)["scores"].numpy()
            assert np.array_equal(found, expected), (name, np.abs(found - expected).max())
    mean = loaded.signatures["views"](clips=tf.constant(video[None]))["scores"].numpy()
    np.testing.assert_allclose(mean[0], views.reshape(6, -1).mean(axis=0, dtype="float64"), rtol=1e-6)
    # Crops pass as they are, fractions included.
    crop = views[0][None] + np.float32(0.3)
    assert np.array_equal(loaded.signatures["float"](clips=tf.constant(crop))["scores"][0], crop.ravel())


@pytest.mark.parametrize("size", [(60, 90), (30, 26)])
def test_resizing_is_the_exact_one(size, tmp_path):
    """Down and up, against float64 NumPy: what lies between two levels may become either."""
    frames = clips(1, 2, *size)
    path = export_saved_model(
        build_pixels(2, (32, 36)), tmp_path / "a", shorter_side=40, preprocess_input=lambda pixels: pixels
    )
    loaded = tf.saved_model.load(str(path))
    found = loaded.signatures["serving_default"](clips=tf.constant(frames))["scores"].numpy().reshape(2, 32, 36, 3)
    exact = cropped(resized_frames(frames[0], 40), (32, 36))
    assert np.abs(found - exact).max() < 0.51 and np.array_equal(found, np.round(found))


def test_the_blocks_matter_to_these_scores(model):
    value = clips(1, 4, 32, 32)
    plain = C2DResNet11(classes=4, non_local=0)
    for layer in filter(lambda layer: layer.weights, plain.layers):
        layer.set_weights(model.get_layer(layer.name).get_weights())
    assert np.abs(keras_scores(model, value) - keras_scores(plain, value)).max() > 1e-3


def described(specs):
    return {name: {"dtype": spec.dtype.name, "shape": spec.shape.as_list()} for name, spec in specs.items()}


def test_signatures_are_the_golden_ones(export):
    loaded = tf.saved_model.load(str(export))
    found = {
        name: {
            "inputs": described(loaded.signatures[name].structured_input_signature[1]),
            "outputs": described(loaded.signatures[name].structured_outputs),
        }
        for name in SIGNATURES
    }
    assert set(loaded.signatures) == set(SIGNATURES)
    if UPDATE:
        lines = ",\n".join(f'  "{name}": {json.dumps(value, sort_keys=True)}' for name, value in found.items())
        GOLDEN.write_text("{\n" + lines + "\n}\n")
    assert found == json.loads(GOLDEN.read_text()), (
        "The signatures changed, and with them what clients send. Write the golden anew with KNL_UPDATE_GOLDENS=1 and "
        "say so in the change log."
    )
    of_metadata = read_metadata(export)["signatures"]
    assert {name: {key: value[key] for key in found[name]} for name, value in of_metadata.items()} == found


def test_metadata_say_where_it_comes_from_and_what_it_wants(model, export):
    before = datetime.datetime.now(datetime.UTC)
    metadata = read_metadata(export)
    assert metadata["keras_nonlocal"] == __version__
    assert (metadata["keras"], metadata["tensorflow"]) == (keras.__version__, tf.__version__)
    created = datetime.datetime.fromisoformat(metadata["created"])
    assert datetime.timedelta(0) <= before - created < datetime.timedelta(hours=1)
    digest = metadata["model"].pop("weights_sha256")
    assert len(digest) == 64
    parameters = sum(weight.numpy().size for weight in model.weights)
    assert metadata["model"] == {
        "name": "c2d_resnet11",
        "parameters": parameters,
        "classes": 4,
        "activation": "softmax",
    }
    assert metadata["preprocessing"] == {
        "num_frames": 4,
        "frame_stride": 2,
        "shorter_side": 44,
        "image_size": [32, 40],
        "views": [2, 3],
        "sampling": "recipe",
        "colours": "RGB",
        "function": "keras_nonlocal.applications.resnet.preprocess_input",
        "mean": 114.75,
        "std": 57.375,
    }
    assert metadata["left_out"] == {} and metadata["jit_compile"] is False
    assert read_metadata(export.parent) == read_metadata(export)


def test_the_digest_is_of_the_weights(tiny, tmp_path):
    model = keras.models.clone_model(tiny)
    model.set_weights(tiny.get_weights())
    digests = []
    for network, change in ((tiny, 0), (model, 0), (model, 1e-3)):
        bias = network.get_layer("pred").bias
        bias.assign(bias + change)
        path = export_saved_model(network, tmp_path / "model")
        digests.append(read_metadata(path)["model"]["weights_sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_class_names_travel_along(export, tiny, tmp_path):
    assert (export / "assets" / "class_names.txt").read_text(encoding="utf-8") == "sit ups\nröntgen\nc\nd\n"
    assert read_class_names(export) == read_class_names(export.parent) == NAMES
    strange = ["a\x85b", " c", "", "d\u2028"]  # what `str.splitlines` would split
    assert read_class_names(export_saved_model(tiny, tmp_path / "a", strange)) == strange


def test_leaves_nothing_but_the_export(export):
    assert [path.name for path in export.parent.iterdir()] == ["1"]
    assert sorted(str(path.relative_to(export)) for path in export.rglob("*") if path.is_file()) == [
        "assets.extra/tf_serving_warmup_requests",
        "assets/class_names.txt",
        "assets/metadata.json",
        "fingerprint.pb",
        "saved_model.pb",
        "variables/variables.data-00000-of-00001",
        "variables/variables.index",
    ]


def test_takes_other_preprocessing_and_a_fixed_size(tmp_path):
    inputs = keras.Input((2, 4, 4, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
    path = export_saved_model(model, tmp_path, preprocess_input=lambda x: tf.cast(x, "float32") / 255.0)
    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    # Frames of any size are brought to the model's.
    assert serve.structured_input_signature[1]["clips"].shape.as_list() == [None, 2, None, None, 3]
    value = clips(3, 2, 4, 4)
    np.testing.assert_allclose(serve(clips=tf.constant(value))["scores"], value.mean((1, 2, 3)) / 255, atol=1e-6)
    assert read_class_names(path) is None
    preprocessing = read_metadata(path)["preprocessing"]
    assert (preprocessing["num_frames"], preprocessing["image_size"], preprocessing["shorter_side"]) == (2, [4, 4], 4)
    assert "mean" not in preprocessing and "lambda" in preprocessing["function"]


def test_what_cannot_be_had_is_left_out_and_said(small, tmp_path):
    path = export_saved_model(small, tmp_path / "a")
    assert read_metadata(path)["left_out"] == {
        "classify": "there are no class names",
        "views": "it needs num_frames and frame_stride and image_size",
    }
    loaded = tf.saved_model.load(str(path))
    assert set(loaded.signatures) == {"serving_default", "float", "jpeg", "features", "attention"}
    for shape in ((1, 2, 12, 16), (2, 3, 20, 18)):  # whole frames
        value = clips(*shape)
        for name, given in (("serving_default", {"clips": value}), ("jpeg", {"frames": encoded(value).astype("O")})):
            scores = loaded.signatures[name](**{key: tf.constant(array) for key, array in given.items()})["scores"]
            np.testing.assert_allclose(scores, keras_scores(small, value), atol=1e-5)
    inputs = keras.Input((2, 4, 4, 3))
    for layer, reason in (
        (keras.layers.GlobalAveragePooling3D(), "the model has no layer with weights"),
        (
            keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)], name="whole"),
            "the inputs of 'whole', the last layer with weights, are not (batch, channels); name a layer by "
            "`features_layer`",
        ),
    ):
        path = export_saved_model(keras.Model(inputs, layer(inputs)), tmp_path / "b", views=None)
        assert read_metadata(path)["left_out"] == {
            "classify": "there are no class names",
            "views": "`views` is None",
            "features": reason,
            "attention": "the model has no non-local block",
        }


def test_layers_are_chosen_by_name(small, tmp_path):
    path = export_saved_model(small, tmp_path, attention_layer="first", features_layer="conv", views=None)
    loaded = tf.saved_model.load(str(path))
    value = clips(2, 2, 8, 12)
    maps = np.asarray(keras.Model(small.inputs[0], small.get_layer("conv").output)(preprocess_input(value)))
    found = loaded.signatures["features"](clips=tf.constant(value))["features"]
    np.testing.assert_allclose(found, maps, atol=1e-5)
    weights = loaded.signatures["attention"](clips=tf.constant(value), positions=tf.constant([[1, 2, 3]]))["weights"]
    assert weights.shape == (2, 1, 2, 4, 6)  # without the second block's sub-sampling
    np.testing.assert_allclose(weights, small.get_layer("first").attention(maps, [[1, 2, 3]]), atol=1e-5)


def test_classify_gives_top_k(small, tmp_path):
    path = export_saved_model(small, tmp_path, NAMES, top_k=2, views=None)
    loaded = tf.saved_model.load(str(path))
    value = clips(3, 2, 8, 12)
    found = loaded.signatures["classify"](clips=tf.constant(value))
    assert found["labels"].shape == found["scores"].shape == (3, 2)
    np.testing.assert_allclose(found["scores"], -np.sort(-keras_scores(small, value))[:, :2], atol=1e-5)


def compiled_functions(path):
    """How many functions of a SavedModel must be compiled by XLA, and how many it has."""
    proto = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    functions = proto.meta_graphs[0].graph_def.library.function
    return sum(function.attr["_XlaMustCompile"].b for function in functions), len(functions)


@pytest.mark.slow
def test_xla_gives_the_same(small, small_export, small_loaded, tmp_path):
    path = export_saved_model(small, tmp_path, NAMES, **CLIPS, jit_compile=True)
    assert read_metadata(path)["jit_compile"] is True
    assert compiled_functions(path)[0] == 3  # the scores, the features and the weights
    assert compiled_functions(small_export)[0] == 0
    compiled, plain = tf.saved_model.load(str(path)), small_loaded
    value = tf.constant(clips(2, 4, 44, 60))
    given = {name: {"clips": value} for name in SIGNATURES}
    given["float"] = {"clips": tf.cast(value, tf.float32)}
    given["jpeg"] = {"frames": tf.constant(encoded(value.numpy()).astype("O"))}
    given["attention"] |= {"positions": tf.constant([[0, 1, 2], [3, 9, 9]])}
    for name, inputs in given.items():
        expected = plain.signatures[name](**inputs)
        for key, found in compiled.signatures[name](**inputs).items():
            if key == "labels":
                assert np.array_equal(found, expected[key])
            else:
                np.testing.assert_allclose(found, expected[key], atol=1e-5)


@pytest.mark.slow
def test_half_precision_serves_float32_scores(policy, tmp_path):
    policy("mixed_bfloat16")
    model = build(input_shape=(4, 32, 32, 3))
    path = export_saved_model(model, tmp_path)
    loaded = tf.saved_model.load(str(path))
    value = clips(2, 4, 32, 32)
    scores = loaded.signatures["serving_default"](clips=tf.constant(value))["scores"]
    assert scores.dtype == tf.float32
    # A graph may round to bfloat16 (8 bits) elsewhere than eager execution does.
    np.testing.assert_allclose(scores, keras_scores(model, value), atol=0.03)


# What is wrong with a request


@pytest.mark.parametrize("shape", [(0, 4, 44, 60, 3), (1, 0, 44, 60, 3), (1, 4, 0, 60, 3)])
def test_empty_clips_are_an_error(small_loaded, shape):
    for name in ("serving_default", "views"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="`clips` must not be empty"):
            small_loaded.signatures[name](clips=tf.zeros(shape, tf.uint8))
    with pytest.raises(tf.errors.InvalidArgumentError, match="`clips` and `positions` must not be empty"):
        small_loaded.signatures["attention"](
            clips=tf.ones((1, 2, 44, 60, 3), tf.uint8), positions=tf.zeros((0, 3), tf.int32)
        )


def test_broken_frames_are_an_error(small_loaded):
    frames = encoded(clips(1, 2, 44, 60), "JPEG").astype("O")
    frames[0, 1] = frames[0, 1][:300]
    with pytest.raises(tf.errors.InvalidArgumentError, match="JPEG"):
        small_loaded.signatures["jpeg"](frames=tf.constant(frames))
    frames[0, 1] = b"no picture"
    with pytest.raises(tf.errors.InvalidArgumentError, match="image"):
        small_loaded.signatures["jpeg"](frames=tf.constant(frames))


# Files


def test_versions_count_up(tiny, tmp_path):
    def exported(**options):
        return export_saved_model(tiny, tmp_path / "model", warmup=False, **options).name

    assert [exported(), exported(version=7), exported(), exported(version=3), exported()] == ["1", "7", "8", "3", "9"]
    (tmp_path / "model" / "100x").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("kept")
    assert exported() == "10"
    assert read_metadata(tmp_path / "model") == read_metadata(tmp_path / "model" / "10")
    for version in (7, 10):
        with pytest.raises(FileExistsError, match=rf"never overwritten\. Received: '{tmp_path}/model/{version}'$"):
            exported(version=version)
    with pytest.raises(FileExistsError, match=r"it is itself one of them\. Received: path='.*/model/7'$"):
        export_saved_model(tiny, tmp_path / "model" / "7")
    with pytest.raises(FileExistsError, match=r"`path` must be a folder, or not exist\. Received: path='.*notes.txt'$"):
        export_saved_model(tiny, tmp_path / "model" / "notes.txt")


def test_never_overwrites(tiny, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "precious").write_text("kept")
    (tmp_path / "2").mkdir()  # an empty folder, which renaming would replace
    for version in (1, 2):
        with pytest.raises(FileExistsError, match=rf"never overwritten\. Received: '{tmp_path}/{version}'$"):
            export_saved_model(tiny, tmp_path, version=version)
    assert (tmp_path / "1" / "precious").read_text() == "kept"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_two_exports_at_once_are_two_versions(tiny, tmp_path, monkeypatch):
    """While the first is being written, a second comes and takes its number."""
    save, others = tf.saved_model.save, []

    def save_after_another(*arguments, **options):
        monkeypatch.setattr(tf.saved_model, "save", save)
        others.append(export_saved_model(tiny, tmp_path, version=given, warmup=False))
        save(*arguments, **options)

    given = None
    monkeypatch.setattr(tf.saved_model, "save", save_after_another)
    assert export_saved_model(tiny, tmp_path, warmup=False).name == "2" and others[0].name == "1"
    given = 5
    monkeypatch.setattr(tf.saved_model, "save", save_after_another)
    with pytest.raises(FileExistsError, match="never overwritten"):
        export_saved_model(tiny, tmp_path, version=5, warmup=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1", "2", "5"]


def test_a_failing_export_leaves_nothing(tiny, tmp_path, monkeypatch):
    def save(module, path, signatures):
        Path(path).mkdir()
        (Path(path) / "saved_model.pb").write_text("half of a model")
        raise OSError("No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", save)
    with pytest.raises(OSError, match="No space"):
        export_saved_model(tiny, tmp_path / "model", NAMES)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
import keras
from keras_nonlocal.export import saved_model

def waiting(function):
    def wrapped(*args, **kwargs):
        print("here", flush=True)
        sys.stdin.readline()
        return function(*args, **kwargs)
    return wrapped

saved_model.write_warmup = waiting(saved_model.write_warmup)
saved_model._move = waiting(saved_model._move)
inputs = keras.Input((2, 4, 4, 3))
model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
saved_model.export_saved_model(model, sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_half_version(tiny, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    for is_last in (False, True):  # before the warm-up is written, and when only the name is missing
        assert process.stdout.readline() == "here\n"
        assert list(tmp_path.rglob("saved_model.pb"))  # half of an export is there
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
        if not is_last:
            process.stdin.write("go on\n")
            process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    with pytest.raises(ValueError, match="must be a folder that `export_saved_model` wrote"):
        read_metadata(tmp_path)
    assert export_saved_model(tiny, tmp_path).name == "1"
    assert read_metadata(tmp_path)["model"]["name"] == "tiny"


def test_warmup_is_what_serving_reads(export, tmp_path):
    """Parsed by TensorFlow Serving's own messages, and sent to the signatures that it names."""
    loaded = tf.saved_model.load(str(export))
    file = export / "assets.extra" / "tf_serving_warmup_requests"
    seen = []
    for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        assert log.WhichOneof("log_type") == "predict_log"
        request = log.predict_log.request
        assert request.model_spec.name == "model"
        assert log.SerializeToString(deterministic=True) == type(log).FromString(record).SerializeToString(
            deterministic=True
        )
        inputs = {name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()}
        signature = loaded.signatures[request.model_spec.signature_name]
        specs = signature.structured_input_signature[1]
        assert {name: value.dtype for name, value in inputs.items()} == {
            name: spec.dtype for name, spec in specs.items()
        }
        for value in signature(**inputs).values():
            assert value.dtype == tf.string or np.isfinite(value).all()
        seen.append(request.model_spec.signature_name)
        if "clips" in inputs:
            assert inputs["clips"].shape == (1, 4, *SIZE, 3)
    assert seen == SIGNATURES
    assert file.stat().st_size < 10_000


def test_warmup_can_be_left_out_and_must_fit(tmp_path):
    model = build_small((None, None, None, 3), pool_size=(16, 2, 2))
    with pytest.raises(ValueError, match=r"8 frames of 224 x 224 pixels.*Received: num_frames=None, image_size=None$"):
        export_saved_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    path = export_saved_model(model, tmp_path / "model", views=None, warmup=False)
    assert not (path / "assets.extra").exists()


# Verification


def problems(path):
    return {row["signature"]: row["problem"] for row in check_signatures(path)}


def test_verification_finds_nothing(small_export):
    checks = verify_saved_model(small_export.parent)
    assert [(check.signature, check.problem) for check in checks] == [(name, None) for name in SIGNATURES]
    assert all(check.seconds > 0 for check in checks)
    by_name = {check.signature: check for check in checks}
    assert by_name["serving_default"].inputs == {"clips": "uint8 (2, 4, 35, 50, 3)"}
    assert by_name["jpeg"].inputs == {"frames": "string (2, 4)"}
    assert by_name["classify"].outputs == {"labels": "string (2, 4)", "scores": "float32 (2, 4)"}


def test_verification_runs_in_a_clean_process(small_export, tmp_path):
    """A package that Keras' own importer would load, in the place of TensorFlow, tells what the process may import."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        "import importlib\n"
        "found = []\n"
        "for name in ('keras', 'keras_nonlocal'):\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "        found.append(name)\n"
        "    except ImportError:\n"
        "        pass\n"
        "raise SystemExit(f'could import {found}')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
        checks = verify_saved_model(small_export)
    assert {check.problem for check in checks} == {"the process ended with code 1: could import []"}


@pytest.mark.slow
def test_verification_finds_faults(small, small_export, tmp_path):
    model = build_small()
    model.set_weights(small.get_weights())
    kernel = model.get_layer("pred").kernel
    kernel.assign(kernel * np.nan)
    path = export_saved_model(model, tmp_path / "nan", NAMES, **CLIPS)
    found = problems(path)
    assert found.pop("features") is None and found.pop("attention") is None
    assert set(found.values()) == {"`scores` is not finite"}

    path = Path(shutil.copytree(small_export, tmp_path / "changed" / "1"))
    (path / "assets" / "class_names.txt").write_text("d\nc\nb\na\n")
    metadata = read_metadata(path)
    metadata["signatures"]["lost"] = metadata["signatures"].pop("float")
    metadata["signatures"]["features"]["outputs"]["features"]["shape"] = [None, 7]
    metadata["signatures"]["views"]["outputs"] = {"score": {}}
    (path / "assets" / "metadata.json").write_text(json.dumps(metadata))
    found = problems(path)
    assert found.pop("lost").startswith("KeyError")
    assert found.pop("float") == "not in the metadata"
    assert found.pop("features") == "`features` has the shape (2, 6) instead of [None, 7]"
    assert found.pop("views") == "the outputs are ['scores'] instead of ['score']"
    assert found.pop("classify") == "the labels are not the names of the best scores"
    assert set(found.values()) == {None}

    linear = keras.Model(small.inputs[0], small.get_layer("pool").output * 100.0)
    path = export_saved_model(linear, tmp_path / "linear", num_frames=2, image_size=8, views=None)
    metadata = read_metadata(path)
    metadata["model"]["activation"] = "sigmoid"
    (path / "assets" / "metadata.json").write_text(json.dumps(metadata))
    assert "instead of 0 to 1" in problems(path)["serving_default"]

    path = Path(shutil.copytree(small_export, tmp_path / "damaged" / "1"))
    (path / "variables" / "variables.index").write_bytes(b"")
    (check, *_) = checks = verify_saved_model(path)
    assert [check.signature for check in checks] == SIGNATURES
    assert check.problem.startswith("the process ended with code 1: ")
    assert verify_saved_model(path, timeout=0.01)[0].problem == "not done after 0.01 seconds"


def test_errors_say_what_was_expected(small, tmp_path, monkeypatch):
    def failing(message, model=small, error=ValueError, **options):
        with pytest.raises(error, match=message):
            export_saved_model(model, tmp_path / "model", **options)

    failing(r"must be built, .* Received: model='later'$", keras.Sequential([keras.layers.Dense(2)], name="later"))
    images = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])
    failing(r"Received: model.inputs=\[\(None, 4, 4, 3\)\]$", images)
    two = [keras.Input((2, 4, 4, 3)), keras.Input((2, 4, 4, 3))]
    failing(r"must take one tensor of clips.*Received: model.inputs=", keras.Model(two, keras.layers.Add()(two)))
    maps = keras.Model(small.inputs[0], small.get_layer("conv").output)
    failing(r"must give one tensor of scores, \(batch, classes\)\. Received: model\.outputs=\[\(None, None,", maps)
    failing(r"each of the model's 4 scores\. Received: class_names=\['a', 'b'\]$", class_names=["a", "b"])
    failing(r"must be strings of one line\. Received: class_names=", class_names=["a", "b", "c", "d\ne"])
    for version in (0, -1, "1", True, 1.0):
        failing(rf"`version` must be a positive integer or None\. Received: version={version!r}$", version=version)
    failing(r"`top_k` must be a positive integer\. Received: top_k=0$", top_k=0)
    failing(r"`num_frames` must be a positive integer\. Received: num_frames=0$", num_frames=0)
    failing(r"`views` must be None or a pair .*Received: views=\(10,\)$", views=(10,))
    failing(r"`sampling` must be one of .*Received: sampling='x'$", sampling="x")
    failing(r"`shorter_side` needs `image_size`\. Received: shorter_side=8, image_size=None$", shorter_side=8)
    failing(r"must not be larger than `shorter_side`\. Received: image_size=\(9, 9\)", image_size=9, shorter_side=8)
    fixed = build_pixels(2, (4, 6))
    failing(r"`num_frames` must be the model's, 2\. Received: num_frames=4$", fixed, num_frames=4)
    failing(r"`image_size` must be the model's, \(4, 6\)\. Received: image_size=\(4, 4\)$", fixed, image_size=4)
    failing(
        r"`attention_layer` must be one of .*\['first', 'second'\]\. Received: attention_layer='conv'$",
        attention_layer="conv",
    )
    failing(r"`features_layer` must be one of .*Received: features_layer='res5'$", features_layer="res5")
    for read in (read_class_names, read_metadata, verify_saved_model):
        with pytest.raises(ValueError, match=rf"that of a version in it\. Received: path='{tmp_path}'$"):
            read(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ValueError, match=r"with assets/metadata.json\. Received: path='.*foreign'$"):
        read_metadata(tmp_path / "foreign")
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    failing(r"Received: keras\.config\.backend\(\)='jax'$", error=RuntimeError)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]
