"""SavedModels: the scores of the Keras model, in a process without Keras, under a signature that does not change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_nonlocal.applications import C2DResNet11, preprocess_input
from keras_nonlocal.export import export_saved_model, read_class_names

GOLDEN = Path(__file__).parent / "goldens" / "serving_signature.json"
NAMES = ["sit ups", "röntgen", "c", "d"]

WITHOUT_KERAS = """
import sys
sys.modules["keras"] = sys.modules["keras_nonlocal"] = None
import numpy as np
import tensorflow as tf
export, clips, scores = sys.argv[1:]
loaded = tf.saved_model.load(export)
serve = loaded.signatures["serving_default"]
with np.load(clips) as file:
    np.savez(scores, **{name: serve(clips=tf.constant(file[name]))["scores"].numpy() for name in file})
"""


def build(**options):
    """A network whose non-local blocks do something, which fresh ones do not, and which tells clips apart."""
    model = C2DResNet11(classes=4, **options)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if layer.name.startswith("nonlocal"):
            layer.norm.gamma.assign(rng.normal(size=layer.norm.gamma.shape))
    model.get_layer("pred").kernel.assign(0.1 * rng.normal(size=model.get_layer("pred").kernel.shape))
    return model


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return build()


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    return export_saved_model(model, tmp_path_factory.mktemp("models") / "deep" / "1", NAMES)


def clips(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3)).astype("uint8")


def keras_scores(model, clips):
    return np.asarray(model(preprocess_input(clips), training=False), "float32")


def test_gives_the_scores_without_keras(model, export, tmp_path):
    given = {str(shape): clips(*shape) for shape in ((1, 2, 32, 32), (3, 4, 32, 48), (2, 7, 56, 40))}
    np.savez(tmp_path / "clips.npz", **given)
    subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS, export, tmp_path / "clips.npz", tmp_path / "scores.npz"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
    )
    with np.load(tmp_path / "scores.npz") as scores:
        for name, value in given.items():
            expected = keras_scores(model, value)
            np.testing.assert_allclose(scores[name], expected, atol=1e-5)
            assert np.ptp(expected) > 0.1  # scores that are all alike would prove nothing


def test_the_blocks_matter_to_these_scores(model):
    value = clips(1, 4, 32, 32)
    plain = C2DResNet11(classes=4, non_local=0)
    for layer in filter(lambda layer: layer.weights, plain.layers):
        layer.set_weights(model.get_layer(layer.name).get_weights())
    assert np.abs(keras_scores(model, value) - keras_scores(plain, value)).max() > 1e-3


def test_signature_is_the_golden_one(export):
    loaded = tf.saved_model.load(str(export))
    assert list(loaded.signatures) == ["serving_default"]
    signature = loaded.signatures["serving_default"]

    def described(specs):
        return {name: {"dtype": spec.dtype.name, "shape": spec.shape.as_list()} for name, spec in specs.items()}

    found = {
        "inputs": described(signature.structured_input_signature[1]),
        "outputs": described(signature.structured_outputs),
    }
    assert found == json.loads(GOLDEN.read_text())


def test_class_names_travel_along(export, model, tmp_path):
    assert (export / "assets" / "class_names.txt").read_text(encoding="utf-8") == "sit ups\nröntgen\nc\nd\n"
    assert read_class_names(export) == NAMES
    assert read_class_names(tmp_path) is None


def test_leaves_nothing_but_the_export(export):
    assert [path.name for path in export.parent.iterdir()] == ["1"]


def test_takes_other_preprocessing_and_a_fixed_size(tmp_path):
    inputs = keras.Input((2, 4, 4, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling3D()(inputs))
    path = export_saved_model(model, tmp_path / "1", preprocess_input=lambda x: tf.cast(x, "float32") / 255.0)
    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    assert serve.structured_input_signature[1]["clips"].shape.as_list() == [None, 2, 4, 4, 3]
    value = clips(3, 2, 4, 4)
    np.testing.assert_allclose(serve(clips=tf.constant(value))["scores"], value.mean((1, 2, 3)) / 255, atol=1e-6)
    assert read_class_names(path) is None


def test_half_precision_serves_float32_scores(policy, tmp_path):
    policy("mixed_bfloat16")
    model = build(input_shape=(4, 32, 32, 3))
    path = export_saved_model(model, tmp_path / "1")
    loaded = tf.saved_model.load(str(path))
    value = clips(2, 4, 32, 32)
    scores = loaded.signatures["serving_default"](clips=tf.constant(value))["scores"]
    assert scores.dtype == tf.float32
    # A graph may round to bfloat16 (8 bits) elsewhere than eager execution does.
    np.testing.assert_allclose(scores, keras_scores(model, value), atol=0.03)


def test_never_overwrites(model, tmp_path):
    path = tmp_path / "1"
    path.mkdir()
    (path / "precious").write_text("kept")
    with pytest.raises(FileExistsError, match=rf"never overwritten\. Received: path='{path}'$"):
        export_saved_model(model, path)
    assert (path / "precious").read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["1"]


def test_a_failing_export_leaves_nothing(model, tmp_path, monkeypatch):
    def save(module, path, signatures):
        Path(path).mkdir()
        (Path(path) / "saved_model.pb").write_text("half of a model")
        raise OSError("No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", save)
    with pytest.raises(OSError, match="No space"):
        export_saved_model(model, tmp_path / "1", NAMES)
    assert list(tmp_path.iterdir()) == []


def test_errors_say_what_was_expected(model, tmp_path, monkeypatch):
    images = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])
    with pytest.raises(ValueError, match=r"Received: model.inputs=\[\(None, 4, 4, 3\)\]$"):
        export_saved_model(images, tmp_path / "1")
    two = [keras.Input((2, 4, 4, 3)), keras.Input((2, 4, 4, 3))]
    with pytest.raises(ValueError, match=r"must take one tensor of clips.*Received: model.inputs="):
        export_saved_model(keras.Model(two, keras.layers.Add()(two)), tmp_path / "1")
    with pytest.raises(ValueError, match=r"each of the model's 4 scores\. Received: class_names=\['a', 'b'\]$"):
        export_saved_model(model, tmp_path / "1", class_names=["a", "b"])
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"Received: keras\.config\.backend\(\)='jax'$"):
        export_saved_model(model, tmp_path / "1")
    assert list(tmp_path.iterdir()) == []
