"""Foreign weight files in the networks: which network a file is of, every weight's way, the command, and what fails."""

import re

import keras
import numpy as np
import pytest

from keras_nonlocal import applications, checkpoints, cli
from keras_nonlocal.applications import (
    C2DResNet11,
    C2DResNet50,
    I3DResNet11,
    I3DResNet50,
    convert_checkpoint,
    preprocess_input,
)
from keras_nonlocal.applications import weights as network_weights
from keras_nonlocal.applications.conversion import identify
from tests import checkpoint_files as write
from tests.descriptors import randomise

CLIP = (4, 33, 27, 3)
OPTIONS = {"classes": 5, "non_local": 2, "input_shape": CLIP}


def as_file(values, format, images=False):
    """Arrays under our paths, as those of a file of the format."""
    arrays = {}
    for path, value in values.items():
        if value.ndim == 5:
            value = np.einsum("thwio->oithw", value)
            value = value[:, :, 0] if images else value
        elif value.ndim == 2:
            value = value.T if path.startswith("pred") else value.T[..., None, None, None]
        arrays[write.NAMES[format](path)] = np.ascontiguousarray(value)
    return arrays


def values_of(model):
    return {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}


def write_release(path, values, affine=False, images=False):
    values = dict(values)
    if affine:
        for gamma in [name for name in values if name.endswith("/gamma")]:
            layer = gamma.removesuffix("/gamma")
            mean, variance = values.pop(layer + "/moving_mean"), values.pop(layer + "/moving_variance")
            factor = values[gamma] / np.sqrt(np.float64(variance) + 1e-5)
            values[layer + "/beta"] = np.float32(values[layer + "/beta"] - mean * factor)
            values[gamma] = np.float32(factor)
    write.write_caffe2(path, as_file(values, "release", images), flat=affine)
    return path


def without_norms(model):
    """The values of a network whose non-local blocks have no normalization."""
    return {path: value for path, value in values_of(model).items() if "/norm/" not in path}


@pytest.fixture
def clip(rng):
    return rng.normal(size=(2, *CLIP)).astype("float32")


@pytest.fixture
def source():
    return randomise(I3DResNet11(**OPTIONS))


def predict(model, clip):
    return keras.ops.convert_to_numpy(model(clip, training=False))


# Files in builders


@pytest.mark.parametrize("format", ["release", "pyslowfast", "mmaction2"])
def test_every_weight_arrives(tmp_path, source, format):
    values = values_of(source)
    arrays = as_file(values, format)
    if format == "release":
        write.write_caffe2(tmp_path / "file", arrays)
    else:
        key = {"pyslowfast": "model_state", "mmaction2": "state_dict"}[format]
        write.write_torch(tmp_path / "file", {key: write.ordered(arrays)})
    model = I3DResNet11(weights=tmp_path / "file", **OPTIONS | {"input_shape": (8, 33, 27, 3)})
    for weight in model.weights:
        np.testing.assert_array_equal(weight, values[weight.path], err_msg=weight.path)
    stem = {layer.name for layer in model.layers if layer.name in ("pixels", "pool1_pad")}
    assert stem == {"release": set(), "pyslowfast": {"pool1_pad"}, "mmaction2": {"pixels", "pool1_pad"}}[format]
    block = model.get_layer("nonlocal_conv3_0")
    assert (block.scale, block.pool_size, block.pool_after_projection) == {
        "release": ("sqrt", (1, 2, 2), False),
        "pyslowfast": ("sqrt", (1, 2, 2), False),
        "mmaction2": (None, (1, 2, 2), True),
    }[format]


def test_what_is_given_goes_over_what_the_file_says(tmp_path, source):
    write.write_torch(tmp_path / "file", {"state_dict": write.ordered(as_file(values_of(source), "mmaction2"))})
    given = {
        "pool1_padding": "valid",
        "pixels": "release",
        "temporal_strides": (1, 1, 1),
        "non_local_options": {"scale": 0.5, 3: {"pool_size": None}},
    }
    model = I3DResNet11(weights=tmp_path / "file", **OPTIONS | given)
    assert not {"pixels", "pool1_pad", "pool2"} & {layer.name for layer in model.layers}
    block = model.get_layer("nonlocal_conv3_1")
    assert (block.scale, block.pool_size, block.pool_after_projection) == (0.5, None, True)


def test_affine_files(tmp_path, source, clip):
    """Backbone with its statistics in γ and β, non-local blocks without any."""
    options = OPTIONS | {"non_local_options": {"normalization": None}}
    model = randomise(I3DResNet11(**options), seed=1)
    path = write_release(tmp_path / "file.pkl", values_of(model), affine=True)
    loaded = I3DResNet11(weights=path, **OPTIONS)
    assert loaded.get_layer("nonlocal_conv3_0").normalization is None
    np.testing.assert_allclose(predict(loaded, clip), predict(model, clip), atol=1e-6)


def test_normalization_of_blocks_is_taken_into_them(tmp_path, source, clip):
    """From a network that trains its batch norms to one in which they are frozen, and back."""
    path = write_release(tmp_path / "norm.pkl", values_of(source))
    frozen = I3DResNet11(weights=path, **OPTIONS, non_local_options={"normalization": None})
    assert not any("/norm/" in weight.path for weight in frozen.weights)
    np.testing.assert_allclose(predict(frozen, clip), predict(source, clip), atol=1e-6)

    path = write_release(tmp_path / "none.pkl", values_of(frozen))
    again = I3DResNet11(weights=path, **OPTIONS, non_local_options={"normalization": "batch"})
    assert any("/norm/" in weight.path for weight in again.weights)
    np.testing.assert_allclose(predict(again, clip), predict(source, clip), atol=1e-6)


def test_any_length(tmp_path, rng, source):
    """The file of 4 frames at 32, there in groups; in groups of all frames, the windows change nothing."""
    path = write_release(tmp_path / "file.pkl", values_of(source))
    options = OPTIONS | {"weights": path, "input_shape": (32, 33, 27, 3), "temporal_strides": (2, 2, 2)}
    groups = I3DResNet11(**options, non_local_options={3: {"window": (2, None, None)}})
    assert values_of(groups).keys() == values_of(source).keys()
    for path, value in values_of(groups).items():
        np.testing.assert_array_equal(value, values_of(source)[path], err_msg=path)
    clip = rng.normal(size=(1, 32, 33, 27, 3)).astype("float32")
    whole, one_group = (
        I3DResNet11(**options, non_local_options={3: {"window": window}}) for window in (None, (4, None, None))
    )
    np.testing.assert_allclose(predict(one_group, clip), predict(whole, clip), rtol=1e-5)
    assert not np.allclose(predict(groups, clip), predict(whole, clip), rtol=1e-3, atol=0)


def test_blocks_that_the_file_lacks_start_as_the_identity(tmp_path, clip):
    baseline = randomise(I3DResNet11(**OPTIONS | {"non_local": 0}))
    path = write_release(tmp_path / "baseline.pkl", values_of(baseline))
    np.testing.assert_array_equal(predict(I3DResNet11(weights=path, **OPTIONS), clip), predict(baseline, clip))


def test_a_c2d_file_is_no_i3d(tmp_path):
    """Only weights of images are repeated along time: a video network's file is of that network."""
    path = write_release(tmp_path / "file.pkl", values_of(C2DResNet11(classes=5)))
    with pytest.raises(ValueError, match=r"conv1/kernel \(5, 7, 7, 3, 16\) of the model, 'conv1_w' \(16, 3, 1, 7, 7\)"):
        I3DResNet11(weights=path, **OPTIONS)


def test_new_head(tmp_path, source):
    path = write_release(tmp_path / "file.pkl", values_of(source))
    model = I3DResNet11(weights=path, **OPTIONS | {"classes": 9}, new_head=True)
    for name, value in values_of(model).items():
        if not name.startswith("pred/"):
            np.testing.assert_array_equal(value, values_of(source)[name])
    assert model.output_shape == (None, 9)
    assert not np.any(model.get_layer("pred").bias)


def test_tensors_of_another_network_are_named(tmp_path, source):
    arrays = as_file(values_of(source), "release") | {"res2_0_se_w": np.zeros((2, 2), "f4")}
    write.write_caffe2(tmp_path / "file.pkl", arrays)
    with pytest.warns(UserWarning, match=r"file\.pkl' has tensors that are not used: 'res2_0_se_w'\."):
        I3DResNet11(weights=tmp_path / "file.pkl", **OPTIONS)


@pytest.mark.parametrize("name", ["a.weights.h5", "a.keras"])
def test_files_of_keras_by_the_names_of_layers(tmp_path, name, clip):
    """Keras itself goes by order, and would put the first block's weights into whichever comes first."""
    source = randomise(I3DResNet11(**OPTIONS, non_local_options={"pairwise": "concatenation"}))
    path = tmp_path / name
    source.save(path) if name.endswith(".keras") else source.save_weights(path)
    options = OPTIONS | {"non_local_options": {"pairwise": "concatenation"}}
    model = I3DResNet11(weights=path, **options)
    assert values_of(model).keys() == values_of(source).keys()
    np.testing.assert_array_equal(predict(model, clip), predict(source, clip))
    for placement in (0, 1, {2: [0], 3: [0]}):
        with pytest.raises(ValueError, match=r"file with nonlocal_conv3_\d/.* and \d+ more, which .* does not have"):
            I3DResNet11(weights=path, **options | {"non_local": placement})


@pytest.mark.parametrize("format", ["release", "torchvision"])
def test_weights_of_images_are_repeated_along_time(tmp_path, format):
    images = randomise(C2DResNet11(classes=7, non_local=0))
    arrays = as_file(values_of(images), format, images=True)
    if format == "release":
        write.write_caffe2(tmp_path / "file", arrays)
    else:
        write.write_safetensors(tmp_path / "file", arrays)
    model = I3DResNet11(weights=tmp_path / "file", **OPTIONS)
    expected = values_of(images)
    inflated = 0
    for path, value in values_of(model).items():
        if path.startswith(("pred/", "nonlocal_")):
            continue
        frames = value.shape[0] if value.ndim == 5 else 1
        inflated += frames > 1
        np.testing.assert_array_equal(value, np.broadcast_to(expected[path] / np.float32(frames), value.shape))
    assert inflated == 3  # conv1, and branch2a of res2_0 and res3_0
    assert not np.any(model.get_layer("nonlocal_conv3_0").norm.gamma)


def test_imagenet(monkeypatch, rng):
    """An image network of `keras.applications` and its video network see the same in an image, raw pixels in."""
    original = keras.applications.ResNet50
    network = randomise(original(weights=None, include_top=False, input_shape=(64, 96, 3)))
    calls = []

    def resnet50(**options):
        calls.append(options)
        return network

    monkeypatch.setattr(keras.applications, "ResNet50", resnet50)
    model = C2DResNet50(
        include_top=False,
        weights="imagenet",
        input_shape=(1, 64, 96, 3),
        temporal_strides=(1, 1, 1),
        pool1_padding="same",
    )
    assert calls == [{"weights": "imagenet", "include_top": False}]
    image = rng.integers(0, 256, (2, 64, 96, 3)).astype("float32")
    expected = np.asarray(network(keras.applications.resnet.preprocess_input(image.copy()), training=False))
    result = predict(model, preprocess_input(image)[:, None])[:, 0]
    assert expected.std() > 1e-3
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_a_checkpoint_in_memory(source, clip):
    checkpoint = checkpoints.from_arrays(as_file(values_of(source), "pyslowfast"))
    model = I3DResNet11(weights=checkpoint, **OPTIONS, pool1_padding="valid")
    np.testing.assert_array_equal(predict(model, clip), predict(source, clip))


def test_imagenet_offline(monkeypatch):
    def no_network(**options):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "ResNet50", no_network)
    with pytest.raises(
        ValueError, match=r"does not get its weights \(URL fetch failure\)\. Received: weights=\"imagenet\""
    ):
        C2DResNet50(weights="imagenet")


# Which network


@pytest.mark.parametrize(
    ("builder", "options", "name", "found"),
    [
        (C2DResNet11, {"non_local": 0}, "c2d_resnet11", {"non_local": 0, "classes": 400}),
        (I3DResNet11, {"non_local": 1, "classes": 6}, "i3d_resnet11", {"non_local": 1, "classes": 6}),
        (
            I3DResNet11,
            {"non_local": {2: [0], 3: [1]}, "inflation": "3x3x3", "include_top": False},
            "i3d_resnet11",
            {"inflation": "3x3x3", "non_local": {2: [0], 3: [1]}, "include_top": False},
        ),
        (I3DResNet50, {"non_local": 10}, "i3d_resnet50", {"non_local": 10, "classes": 400}),
    ],
)
def test_identify(builder, options, name, found):
    arrays = as_file(values_of(builder(**options)), "release")
    assert identify(checkpoints.from_arrays(arrays)) == (name, found)


def test_identify_refuses_other_networks():
    arrays = as_file({p: v for p, v in values_of(C2DResNet11()).items() if "res3_1" not in p}, "release")
    with pytest.raises(ValueError, match=r"ResNet-50: \(3, 4, 6, 3\) blocks.*Received: \(1, 1\) blocks, width 16"):
        identify(checkpoints.from_arrays(arrays))


# The conversion


@pytest.mark.parametrize("name", ["out.weights.h5", "out.keras"])
def test_convert(tmp_path, source, clip, name):
    values = values_of(source)
    arrays = as_file(values, "release")
    arrays |= {"conv1_w_momentum": np.zeros(3, "f4"), "model_iter": np.zeros(1, "f4"), "odd": np.zeros((2, 3), "f4")}
    write.write_caffe2(tmp_path / "file.pkl", arrays)
    conversion = convert_checkpoint(tmp_path / "file.pkl", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pkl", name]
    assert (conversion.network, conversion.options["non_local"]) == ("i3d_resnet11", 2)
    names = {**vars(applications), "keras": keras}
    np.testing.assert_array_equal(predict(eval(conversion.code, names), clip), predict(source, clip))
    report = str(conversion)
    assert f"release file, {len(values)} arrays\n" in report
    assert f"i3d_resnet11: {len(values)} weights filled, 0 of them inflated in time" in report
    assert "ignored, momentum of the optimizer (1):\n    'conv1_w_momentum'" in report
    assert "not used, as the format has no such name (1):\n    'odd' (2, 3)" in report
    assert "not filled" not in report


def test_converted_weights_remember_what_they_need(tmp_path, rng, source):
    """Padding, pixels and where blocks pool are not in weights: the file says them to the builder."""
    arrays = as_file(values_of(source), "mmaction2")
    write.write_torch(tmp_path / "file.pth", {"state_dict": write.ordered(arrays)})
    out = tmp_path / "out.weights.h5"
    conversion = convert_checkpoint(tmp_path / "file.pth", out)
    clip = rng.normal(size=(1, 8, 33, 27, 3)).astype("float32")
    options = OPTIONS | {"input_shape": clip.shape[1:]}
    expected = predict(I3DResNet11(weights=tmp_path / "file.pth", **options), clip)
    np.testing.assert_array_equal(predict(I3DResNet11(weights=out, **options), clip), expected)
    np.testing.assert_array_equal(predict(eval(conversion.code, vars(applications)), clip), expected)


def test_convert_does_not_replace_what_came_meanwhile(tmp_path, source, monkeypatch):
    path = write_release(tmp_path / "file.pkl", values_of(source))
    out = tmp_path / "out.weights.h5"
    save = keras.Model.save_weights

    def slowly(model, written):
        save(model, written)
        out.write_text("another's")

    monkeypatch.setattr(keras.Model, "save_weights", slowly)
    with pytest.raises(ValueError, match=r"`out` must not exist yet"):
        convert_checkpoint(path, out)
    assert out.read_text() == "another's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.pkl", "out.weights.h5"]


def test_convert_into_another_network(tmp_path, clip):
    images = randomise(C2DResNet11(classes=7, non_local=0))
    write_release(tmp_path / "file.pkl", values_of(images), images=True)
    conversion = convert_checkpoint(tmp_path / "file.pkl", tmp_path / "out.weights.h5", model="i3d_resnet11")
    report = str(conversion)
    assert " of an image network" in report and "3 of them inflated in time" in report
    assert "not used, as the network has no such weights (2):\n    pred/kernel\n    pred/bias" in report
    assert conversion.options["include_top"] is False


def damaged(values, **changes):
    """Without the weights whose new value is `None`, with others changed or added."""
    values = values | changes
    return {path: value for path, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"res3_0_branch2b/kernel": None},
            r"release file with nothing, which .* and without res3_0_branch2b/kernel, which it has$",
        ),
        (
            {"res_conv1_bn/beta": np.zeros(9, "f4")},
            r"res_conv1_bn/beta \(16,\) of the model, 'res_conv1_bn_b' \(9,\) of",
        ),
        ({"nonlocal_conv3_1/g/bias": np.zeros(3, "f4")}, r"g/bias \(64,\) of the model, 'nonlocal_conv3_1_g_b' \(3,\)"),
        ({"nonlocal_conv3_1/theta/kernel": None}, r"without nonlocal_conv3_1/theta/kernel, which it has$"),
        ({"nonlocal_conv3_1/out/bias": None}, r"without nonlocal_conv3_1/out/bias, which it has$"),
        ({"nonlocal_conv3_1/norm/moving_mean": None}, r"without nonlocal_conv3_1/norm/moving_mean, which it has$"),
        (
            {"res3_0_branch2a/kernel": np.zeros((3, 1, 1, 9, 32), "f4")},
            r"'res3_0_branch2a_w' \(32, 9, 3, 1, 1\) of the",
        ),
        ({"conv1/kernel": None}, r"Received: \(1, 2\) blocks, width None"),
        (
            {"res4_0_branch2c/kernel": np.zeros((1, 1, 1, 2, 2), "f4")},
            r"with res4_0_branch2c/kernel, which 'i3d_resnet11' does not have, and without nothing, which it has$",
        ),
    ],
)
def test_a_mismatch_writes_nothing(tmp_path, source, changes, message):
    path = write_release(tmp_path / "file.pkl", damaged(values_of(source), **changes))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, tmp_path / "out.weights.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pkl"]


def test_a_mismatch_leaves_the_model_as_it_was(source):
    arrays = as_file(values_of(source), "release")
    arrays["res_conv1_bn_b"] = np.zeros(9, "float32")
    model = I3DResNet11(**OPTIONS)
    before = values_of(model)
    with pytest.raises(ValueError, match=r"must have the shapes of those in the release file"):
        network_weights.fill(model, checkpoints.from_arrays(arrays))
    for path, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[path])
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match=r"No name of the release file is one of 'other''s\. Received: conv1/kernel"):
        network_weights.fill(
            keras.Model(inputs, keras.layers.Dense(2)(inputs), name="other"), checkpoints.from_arrays(arrays)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 6}, r"pred/kernel \(128, 6\) of the model, 'pred_w' \(5, 128\) of the file"),
        ({"non_local": 1}, r"file with nonlocal_conv3_0/.* and \d+ more, which .* does not have"),
        ({"inflation": "3x3x3"}, r"res2_0_branch2a/kernel \(1, 1, 1, 16, 16\) of the model, .* \(16, 16, 3, 1, 1\)"),
    ],
)
def test_options_that_do_not_fit_the_file(tmp_path, source, options, message):
    path = write_release(tmp_path / "file.pkl", values_of(source))
    with pytest.raises(ValueError, match=message):
        I3DResNet11(weights=path, **OPTIONS | options)


def test_a_head_is_not_missed_where_there_is_none(tmp_path, source, clip):
    path = write_release(tmp_path / "file.pkl", values_of(source))
    model = I3DResNet11(weights=path, include_top=False, pooling="avg", non_local=2, input_shape=CLIP)
    pooled = keras.Model(source.inputs[0], source.get_layer("pool5").output)
    np.testing.assert_array_equal(predict(model, clip), predict(pooled, clip))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (3, r"`weights` must be `None`, a path, \"imagenet\" or a `Checkpoint`\. Received: weights=3"),
        ("imagenet", r"for the networks of 50 and 101 layers only\. Received: weights=\"imagenet\""),
        ("no.pkl", r"there is no such file\. Received: weights='no\.pkl'"),
    ],
)
def test_errors_of_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        I3DResNet11(weights=weights)


def test_errors_of_convert(tmp_path, source):
    path = write_release(tmp_path / "file.pkl", values_of(source))
    out, there = tmp_path / "out.weights.h5", tmp_path / "there.keras"
    there.write_text("kept")
    wrong = tmp_path / "wrong.pkl"
    wrong.write_text("<html>404</html>")
    for arguments, message in [
        ((path, tmp_path / "out.h5"), r"`out` must end with \.weights\.h5 or \.keras\. Received: out='.*out\.h5'"),
        ((path, there), r"`out` must not exist yet\. Received: out='.*there\.keras'"),
        ((path, tmp_path / "no" / "out.keras"), r"in a folder that exists\. Received: out="),
        ((tmp_path / "no.pkl", out), r"The checkpoint must be a file\. Received: '.*no\.pkl'"),
        (
            (path, out, "i3d_resnet50"),
            r"c2d_resnet11 or i3d_resnet11, .* of a resnet11\. Received: model='i3d_resnet50'",
        ),
        ((path, out, "c2d_resnet11"), r"conv1/kernel \(1, 7, 7, 3, 16\) of the model, 'conv1_w' \(16, 3, 5, 7, 7\)"),
        ((wrong, out), r"Received: path='.*wrong\.pkl'"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(*arguments)
    assert there.read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.pkl", "there.keras", "wrong.pkl"]


def test_command(tmp_path, source, capsys):
    path = write_release(tmp_path / "file.pkl", values_of(source))
    out = tmp_path / "out.weights.h5"
    assert cli.main(["convert", str(path), str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"release file.*\ni3d_resnet11: \d+ weights filled", printed)
    assert f"Wrote {out}: I3DResNet11(weights={str(out)!r}, non_local=2, classes=5" in printed
    assert cli.main(["convert", str(path), str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("keras-nonlocal: error: `out` must not exist yet.") and error.count("\n") == 1
