"""Foreign weight files: every row of every table, every container, and files that mean harm or are broken."""

import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from keras_nonlocal import checkpoints
from keras_nonlocal.checkpoints import files
from tests import checkpoint_files as write
from tests.checkpoint_files import Call, Global, Raw

ROOT = Path(__file__).parent.parent
MODELS = json.loads((ROOT / "tests" / "goldens" / "models.json").read_text())
VIDEO_PATHS = list(MODELS["I3DResNet50_5"])
IMAGE_PATHS = [path for path in VIDEO_PATHS if not path.startswith("nonlocal")]
VIDEO_FORMATS = ("release", "pyslowfast", "mmaction2", "keras3")
PATHS = {name: VIDEO_PATHS if name in VIDEO_FORMATS else IMAGE_PATHS for name in checkpoints.FORMATS}
FIRST = [path for path in IMAGE_PATHS if path.startswith(("conv1", "res_conv1", "res2_0", "pred"))]


def assert_same(weights, expected):
    assert set(weights) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(weights[path], value, err_msg=path)
        assert weights[path].dtype == "float32" and weights[path].flags.c_contiguous and weights[path].flags.writeable


def undo_keras_applications(expected):
    """What its reader makes of the arrays: RGB, another ε."""
    expected["conv1/kernel"] = np.stack([expected["conv1/kernel"][..., c, :] for c in (2, 1, 0)], axis=-2)
    for path in expected:
        if path.endswith("/moving_variance"):
            expected[path] = (expected[path].astype("float64") + 1e-8).astype("float32")
    return expected


# Tables


@pytest.mark.parametrize("name", checkpoints.FORMATS)
def test_every_weight_of_a_network_is_found(name):
    image = name not in VIDEO_FORMATS
    arrays, expected = write.file_of(name, PATHS[name], image)
    if name == "keras_applications":
        expected = undo_keras_applications(expected)
    checkpoint = checkpoints.from_arrays(arrays)
    assert checkpoint.format == name
    assert_same(checkpoint.weights, expected)
    assert checkpoint.sources == {path: (write.NAMES[name](path),) for path in expected}
    assert checkpoint.ignored == checkpoint.unknown == {}
    assert checkpoint.shapes == {theirs: array.shape for theirs, array in arrays.items()}


@pytest.mark.parametrize("name", checkpoints.FORMATS)
def test_no_row_is_idle(name):
    names = [write.NAMES[name](path) for path in PATHS[name]]
    # what some files have and others have not
    names += ["backbone.layer2.1.non_local_block.concat_project.conv.weight", "conv1_conv/bias"]
    names += ["conv2_block1_1_conv/bias", "nonlocal_conv3_1/0"]
    row_of = checkpoints.FORMATS[name].find
    found = {row_of(n)[0].split("/", 1)[1] for n in names if row_of(n)}
    used = set()
    for n in names:
        for row in checkpoints.FORMATS[name].rows:
            single = checkpoints.tables.Format("", (row,), checkpoints.FORMATS[name].words, None)
            if single.find(n):
                used.add(row)
    assert used == set(checkpoints.FORMATS[name].rows)
    assert "kernel" in found


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("release", "conv1_w", "conv1/kernel"),
        ("release", "res_conv1_bn_riv", "res_conv1_bn/moving_variance"),
        ("release", "res4_22_branch2b_bn_rm", "res4_22_branch2b_bn/moving_mean"),
        ("release", "res2_0_branch1_w", "res2_0_branch1/kernel"),
        ("release", "nonlocal_conv3_1_theta_b", "nonlocal_conv3_1/theta/bias"),
        ("release", "nonlocal_conv3_1_bn_s", "nonlocal_conv3_1/norm/gamma"),
        ("release", "pred_b", "pred/bias"),
        ("release", "res2_0_branch2a_bn_x", None),
        ("release", "res6_0_branch2a_w", None),
        ("pyslowfast", "s1.pathway0_stem.bn.running_var", "res_conv1_bn/moving_variance"),
        ("pyslowfast", "s4.pathway0_res5.branch2.c_bn.weight", "res4_5_branch2c_bn/gamma"),
        ("pyslowfast", "s3.pathway0_nonlocal1.conv_out.weight", "nonlocal_conv3_1/out/kernel"),
        ("pyslowfast", "s3.pathway0_nonlocal1.bn.running_mean", "nonlocal_conv3_1/norm/moving_mean"),
        ("pyslowfast", "s3.pathway0_nonlocal1.norm.running_mean", "nonlocal_conv3_1/norm/moving_mean"),
        ("pyslowfast", "s3.pathway1_res0.branch1.weight", None),
        ("mmaction2", "backbone.layer2.3.conv3.bn.bias", "res3_3_branch2c_bn/beta"),
        ("mmaction2", "backbone.layer3.1.non_local_block.g.0.conv.weight", "nonlocal_conv4_1/g/kernel"),
        ("mmaction2", "backbone.layer3.1.non_local_block.g.conv.weight", "nonlocal_conv4_1/g/kernel"),
        (
            "mmaction2",
            "backbone.layer3.1.non_local_block.conv_out.bn.running_mean",
            "nonlocal_conv4_1/norm/moving_mean",
        ),
        ("torchvision", "layer1.0.downsample.1.running_mean", "res2_0_branch1_bn/moving_mean"),
        ("torchvision", "layer4.2.conv2.weight", "res5_2_branch2b/kernel"),
        ("torchvision", "layer5.2.conv2.weight", None),
        ("keras_applications", "conv2_block1_0_conv/kernel", "res2_0_branch1/kernel"),
        ("keras_applications", "conv4_block23_3_bn/gamma", "res4_22_branch2c_bn/gamma"),
        ("keras_applications", "conv4_block0_3_bn/gamma", None),
        ("keras_hub", "stack2_block22_3_bn/beta", "res4_22_branch2c_bn/beta"),
    ],
)
def test_names(name, theirs, ours):
    found = checkpoints.FORMATS[name].find(theirs)
    assert (found and found[0]) == ours


def test_layouts_by_hand():
    kernel = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6).astype("float32")  # O I T H W
    dense = np.arange(6.0).reshape(2, 3, 1, 1, 1)
    arrays = {"res2_0_branch2a_w": kernel, "nonlocal_conv3_1_theta_w": dense, "pred_w": dense[..., 0, 0, 0]}
    weights = checkpoints.from_arrays(arrays).weights
    converted = weights["res2_0_branch2a/kernel"]
    assert converted.shape == (4, 5, 6, 3, 2)
    for o, i, t, h, w in ((0, 0, 0, 0, 0), (1, 2, 3, 4, 5), (1, 0, 2, 3, 1)):
        assert converted[t, h, w, i, o] == kernel[o, i, t, h, w]
    assert weights["nonlocal_conv3_1/theta/kernel"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert weights["pred/kernel"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("name", ["release", "mmaction2", "torchvision"])
def test_image_kernels_have_one_time_step(name):
    arrays, expected = write.file_of(name, IMAGE_PATHS, image=True)
    assert arrays[checkpoints.FORMATS[name].signature].ndim == 4
    assert_same(checkpoints.from_arrays(arrays).weights, expected)


def is_statistic(path):
    return path.endswith(("/moving_mean", "/moving_variance"))


@pytest.mark.parametrize(
    ("kept", "affine", "options"),
    [
        # which weights of a file with all statistics there are, layers of which the statistics are not in the file
        (
            lambda path: not is_statistic(path) and "/norm/" not in path,
            ["res_conv1_bn", "res4_5_branch2c_bn"],
            {"non_local_options": {"normalization": None}},
        ),
        (lambda path: not is_statistic(path), ["res_conv1_bn", "nonlocal_conv4_5/norm"], {}),
        (
            lambda path: not (is_statistic(path) and "/norm/" in path),
            ["nonlocal_conv3_1/norm", "nonlocal_conv4_5/norm"],
            {},
        ),
        (lambda path: not is_statistic(path) or "/norm/" in path, ["res_conv1_bn", "res4_5_branch2c_bn"], {}),
        (lambda path: "/norm/" not in path, [], {"non_local_options": {"normalization": None}}),
    ],
    ids=["backbone", "all", "blocks", "all but blocks", "no norm in blocks"],
)
def test_affine_layers_of_the_release_keep_their_scale_and_shift(kept, affine, options):
    with_norms = any("/norm/" in path and kept(path) for path in VIDEO_PATHS)
    arrays, expected = write.file_of("release", [path for path in VIDEO_PATHS if kept(path)])
    checkpoint = checkpoints.from_arrays(arrays)
    assert set(checkpoint.weights) == {path for path in VIDEO_PATHS if with_norms or "/norm/" not in path}
    assert checkpoint.settings == RELEASE | options
    for path, value in expected.items():
        np.testing.assert_array_equal(checkpoint.weights[path], value)
    for layer in affine:
        gamma, beta, mean, variance = (
            checkpoint.weights[f"{layer}/{weight}"] for weight in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        x = np.linspace(-3, 3, 6)
        y = (x - mean) / np.sqrt(variance.astype("float64") + 1e-5) * gamma + beta
        np.testing.assert_allclose(y, x * expected[layer + "/gamma"] + expected[layer + "/beta"], rtol=1e-6, atol=1e-7)
        assert checkpoint.sources[layer + "/moving_mean"] == checkpoint.sources[layer + "/moving_variance"] == ()


@pytest.mark.parametrize(("lost", "path"), [("rm", "moving_mean"), ("riv", "moving_variance")])
def test_one_lost_statistic_stays_lost(lost, path):
    """For whoever fills a network to see."""
    arrays, _ = write.file_of("release", VIDEO_PATHS)
    del arrays["res4_5_branch2c_bn_" + lost]
    weights = checkpoints.from_arrays(arrays).weights
    assert set(VIDEO_PATHS) - set(weights) == {"res4_5_branch2c_bn/" + path}


def test_keras_applications_means_the_same_here():
    """Its own first layers, on BGR pixels, against plain arithmetic with the converted weights on RGB ones."""
    rng = np.random.default_rng(1)
    inputs = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(4, 7, name="conv1_conv")(inputs)
    x = keras.layers.BatchNormalization(epsilon=1.001e-5, name="conv1_bn")(x)
    x = keras.layers.Conv2D(4, 1, name="conv2_block1_1_conv")(x)
    x = keras.layers.BatchNormalization(epsilon=1.001e-5, name="conv2_block1_1_bn")(x)
    model = keras.Model(inputs, x)
    # Variances near ε, where another ε is seen.
    model.set_weights([rng.uniform(0.5e-5, 2e-5, weight.shape) for weight in model.get_weights()])
    bgr = rng.uniform(-1, 1, (2, 9, 9, 3)).astype("float32")
    expected = model.predict(bgr, verbose=0)
    checkpoint = checkpoints.from_arrays({weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights})
    assert checkpoint.sources["res_conv1_bn/moving_mean"] == ("conv1_bn/moving_mean", "conv1_conv/bias")
    weights = {path: value.astype("float64") for path, value in checkpoint.weights.items()}
    assert not [path for path in weights if path.endswith("/bias")]

    def norm(x, layer):
        x = (x - weights[layer + "/moving_mean"]) / np.sqrt(weights[layer + "/moving_variance"] + 1e-5)
        return x * weights[layer + "/gamma"] + weights[layer + "/beta"]

    patches = np.lib.stride_tricks.sliding_window_view(bgr[..., ::-1], (7, 7), axis=(1, 2))
    y = norm(np.einsum("bxyihw,hwio->bxyo", patches, weights["conv1/kernel"][0]), "res_conv1_bn")
    y = norm(y @ weights["res2_0_branch2a/kernel"][0, 0, 0], "res2_0_branch2a_bn")
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-8)


def test_keras_applications_own_models_are_whole():
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3))
    checkpoint = checkpoints.from_arrays({weight.path: np.broadcast_to(0.0, weight.shape) for weight in model.weights})
    shapes = {path: tuple(shape) for path, shape in MODELS["C2DResNet50_5"].items() if not path.startswith("nonlocal")}
    shapes |= {"pred/kernel": (2048, 1000), "pred/bias": (1000,)}
    assert {path: value.shape for path, value in checkpoint.weights.items()} == shapes
    assert checkpoint.unknown == {}


# Settings

RELEASE = {"pixels": "release", "stride_in_1x1": False, "pool1_padding": "valid"}
PYSLOWFAST = {"pixels": "release", "stride_in_1x1": False, "pool1_padding": "same"}
V1_5 = {"pixels": "torch", "stride_in_1x1": False}
MMACTION2 = V1_5 | {"pool1_padding": "same", "temporal_strides": (2, 2, 2), "pool1_temporal_size": 1}


@pytest.mark.parametrize(
    ("name", "image", "settings"),
    [
        ("release", False, RELEASE),
        ("release", True, {}),
        ("pyslowfast", False, PYSLOWFAST),
        ("mmaction2", False, MMACTION2),
        ("mmaction2", True, V1_5),
        ("torchvision", True, V1_5),
        ("keras_applications", True, {"pixels": "caffe", "stride_in_1x1": True}),
        ("keras_hub", True, V1_5),
        ("keras3", False, {}),
    ],
)
def test_settings(name, image, settings):
    arrays, _ = write.file_of(name, IMAGE_PATHS, image)
    checkpoint = checkpoints.from_arrays(arrays)
    assert checkpoint.settings == settings
    # MMAction2's C2D has kernels of images, and a head for videos.
    assert checkpoint.images == (image and name != "mmaction2")
    headless = {theirs: array for theirs, array in arrays.items() if not theirs.startswith("cls_head.")}
    assert checkpoints.from_arrays(headless).images == image


PYSLOWFAST_CONFIGURATION = """\
NONLOCAL:
  GROUP:
  - - 1
  - - 1
  INSTANTIATION: {}
  LOCATION:
  - - []
NUM_GPUS: 8
"""


@pytest.mark.parametrize(
    ("configuration", "options"),
    [
        (PYSLOWFAST_CONFIGURATION.format("softmax"), {"pairwise": "embedded_gaussian", "scale": "sqrt"}),
        (PYSLOWFAST_CONFIGURATION.format("dot_product"), {"pairwise": "dot_product", "scale": None}),
        (PYSLOWFAST_CONFIGURATION.format("'dot_product'"), {"pairwise": "dot_product", "scale": None}),
        (PYSLOWFAST_CONFIGURATION.format("another"), None),
        (PYSLOWFAST_CONFIGURATION.format("dot_product # or softmax"), None),
        ("INSTANTIATION: dot_product\n", None),
        ("", None),
        (3, None),
    ],
)
def test_pyslowfast_pairwise_function(configuration, options, tmp_path):
    paths = [path for path in VIDEO_PATHS if path.startswith(("res2_0", "nonlocal_conv3_1"))]
    arrays, _ = write.file_of("pyslowfast", paths)
    write.write_torch(tmp_path / "a", {"model_state": write.ordered(arrays), "cfg": configuration})
    checkpoint = checkpoints.read(tmp_path / "a")
    assert checkpoint.settings == PYSLOWFAST | ({} if options is None else {"non_local_options": options})
    assert set(checkpoint.ignored) == {"cfg"}
    # A network without such blocks has no such function.
    arrays = {name: array for name, array in arrays.items() if "nonlocal" not in name}
    write.write_torch(tmp_path / "b", {"model_state": write.ordered(arrays), "cfg": configuration})
    assert checkpoints.read(tmp_path / "b").settings == PYSLOWFAST


def mmaction2_file(**options):
    paths = [path for path in VIDEO_PATHS if not path.endswith("/out/bias")]
    arrays, _ = write.file_of("mmaction2", paths)
    if not options.get("pooled", True):
        arrays = {name.replace(".0.conv.", ".conv.") if "non_local" in name else name: a for name, a in arrays.items()}
    return arrays


def test_mmaction2_non_local_blocks():
    checkpoint = checkpoints.from_arrays(mmaction2_file())
    options = {"scale": None, "pool_after_projection": True, "pool_size": (1, 2, 2)}
    assert checkpoint.settings == MMACTION2 | {"non_local_options": options}
    assert set(checkpoint.weights) == set(VIDEO_PATHS)
    assert checkpoint.weights["nonlocal_conv3_1/out/bias"].tolist() == [0.0] * 6
    assert checkpoint.sources["nonlocal_conv3_1/out/bias"] == ()
    unpooled = checkpoints.from_arrays(mmaction2_file(pooled=False))
    assert unpooled.settings["non_local_options"] == options | {"pool_size": None}
    assert_same(unpooled.weights, checkpoint.weights)


def test_mmaction2_pairwise_functions_that_weights_tell():
    arrays = mmaction2_file()
    gaussian = {name: a for name, a in arrays.items() if ".theta." not in name and ".phi." not in name}
    assert checkpoints.from_arrays(gaussian).settings["non_local_options"]["pairwise"] == "gaussian"
    score = np.arange(8.0).reshape(1, 8, 1, 1)
    blocks = [name.removesuffix("g.0.conv.bias") for name in arrays if name.endswith(".g.0.conv.bias")]
    concatenation = checkpoints.from_arrays(arrays | {b + "concat_project.conv.weight": score for b in blocks})
    assert concatenation.settings["non_local_options"]["pairwise"] == "concatenation"
    assert concatenation.weights["nonlocal_conv4_5/score_kernel"].tolist() == [[float(i)] for i in range(8)]
    plain = {name: a for name, a in arrays.items() if ".conv_out.bn." not in name}
    assert checkpoints.from_arrays(plain).settings["non_local_options"]["normalization"] is None


def test_mmaction2_strides_are_the_i3ds_only():
    arrays = mmaction2_file() | {"backbone.conv1.conv.weight": np.zeros((6, 3, 1, 7, 7), "float32")}
    settings = checkpoints.from_arrays(arrays).settings
    assert "temporal_strides" not in settings and "pool1_temporal_size" not in settings


# The account of all tensors


def test_what_is_no_weight_is_ignored_with_a_reason():
    arrays, expected = write.file_of("release", FIRST)
    arrays |= {"conv1_w_momentum": np.zeros(3), "lr": np.zeros(1), "model_iter": np.zeros(1)}
    checkpoint = checkpoints.from_arrays(arrays)
    assert checkpoint.ignored == {
        "conv1_w_momentum": "momentum of the optimizer",
        "lr": "the learning rate",
        "model_iter": "a counter of training steps",
    }
    for name, counter in (
        ("pyslowfast", "s1.pathway0_stem.bn.num_batches_tracked"),
        ("mmaction2", "backbone.conv1.bn.num_batches_tracked"),
        ("torchvision", "layer1.0.downsample.1.num_batches_tracked"),
    ):
        arrays, _ = write.file_of(name, FIRST)
        checkpoint = checkpoints.from_arrays(arrays | {counter: np.array(7)})
        assert checkpoint.ignored == {counter: "a counter of training steps"} and checkpoint.unknown == {}


@pytest.mark.parametrize("name", checkpoints.FORMATS)
def test_unknown_tensors_are_reported(name):
    arrays, _ = write.file_of(name, FIRST, image=name not in VIDEO_FORMATS)
    checkpoint = checkpoints.from_arrays(arrays | {"mystery.weight": np.zeros((2, 3))})
    assert checkpoint.unknown == {"mystery.weight": (2, 3)}
    assert checkpoint.shapes["mystery.weight"] == (2, 3)


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod."])
def test_prefixes_of_wrapped_models(prefix):
    arrays, expected = write.file_of("torchvision", FIRST, image=True)
    checkpoint = checkpoints.from_arrays({prefix + name: array for name, array in arrays.items()})
    assert_same(checkpoint.weights, expected)
    assert checkpoint.sources["conv1/kernel"] == (prefix + "conv1.weight",)


def test_names_of_files_cannot_write_to_a_terminal(tmp_path):
    evil = "x\x1b[2J\n"
    arrays = {"layer1.0.conv1.weight": np.ones((1, 1, 1, 1), "float32"), evil: np.ones(1, "float32")}
    reference = write.tensor("torch.FloatStorage", evil, 9, 0, (9,), (1,))
    legacy = {"layer1.0.conv1.weight": np.ones((1, 1, 1, 1), "float32")}
    header = json.dumps({evil: {"dtype": evil, "shape": [], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    write.write_torch(tmp_path / "reference", {evil: reference}, storages=[bytes(4)])
    write.write_torch_legacy(tmp_path / "legacy", legacy, [evil])
    write.write_caffe2(tmp_path / "array", {evil: np.ones(1, "float32")})
    (tmp_path / "global").write_bytes(b"\x80\x04\x8c\x02os\x8c\x06" + evil.encode() + b"\x93.")
    for name in ("safetensors", "reference", "legacy", "array", "global"):
        with pytest.raises(ValueError, match="Received: path=") as caught:
            checkpoints.read(tmp_path / name)
        assert str(caught.value).isprintable() and "[2J" in str(caught.value), name
    with pytest.raises(ValueError, match="layer1.0.conv1.weight' and 'module") as caught:
        checkpoints.from_arrays(arrays | {"module.layer1.0.conv1.weight": np.ones((1, 1, 1, 1))})
    assert str(caught.value).isprintable()


def test_two_tensors_for_one_weight():
    arrays, _ = write.file_of("torchvision", FIRST, image=True)
    with pytest.raises(ValueError, match="'conv1.weight' and 'module.conv1.weight' must not both be 'conv1/kernel'"):
        checkpoints.from_arrays(arrays | {"module.conv1.weight": arrays["conv1.weight"]})


@pytest.mark.parametrize(
    ("name", "theirs", "array", "match"),
    [
        (
            "release",
            "conv1_w",
            np.zeros((2, 3)),
            "'conv1_w', for 'conv1/kernel', must have the axes of a kernel.*\\(2, 3\\)",
        ),
        ("release", "pred_w", np.zeros((2, 3, 2, 2)), "none but ones after them"),
        ("release", "pred_b", np.zeros((2, 3)), "must have one axis"),
        ("release", "pred_b", np.zeros(3, "complex64"), "must have real numbers.*complex64"),
        ("keras_applications", "conv1_conv/kernel", np.zeros((2, 3)), "must have the axes \\(H, W, I, O\\)"),
        ("keras_applications", "predictions/kernel", np.zeros(3), "must have the axes \\(I, O\\)"),
    ],
)
def test_tensors_of_the_wrong_rank(name, theirs, array, match):
    arrays, _ = write.file_of(name, FIRST)
    with pytest.raises(ValueError, match=match + ".*Received: arrays of 2"):
        checkpoints.from_arrays(arrays | {theirs: array})


def test_format_argument(tmp_path):
    arrays, _ = write.file_of("release", FIRST)
    write.write_caffe2(tmp_path / "a.pkl", arrays)
    assert checkpoints.read(tmp_path / "a.pkl", "release").format == "release"
    for call in (checkpoints.read, checkpoints.from_arrays):
        with pytest.raises(ValueError, match="`format` must be `None` or one of release, .*Received: format='caffe'"):
            call({}, "caffe")
    with pytest.raises(ValueError, match="a tensor 'layer1.0.conv1.weight' .torchvision.; it has .*Received: path"):
        checkpoints.read(tmp_path / "a.pkl", "torchvision")
    with pytest.raises(ValueError, match="'res2_0_branch2a_w' .release., .*it has 1 others, such as 'a'"):
        checkpoints.from_arrays({"a": np.zeros(2)})


# Containers: the same file in each


def torch_tree(arrays):
    return {"epoch": 3, "model_state": write.ordered(arrays), "optimizer_state": {"lr": 0.1}, "cfg": "MODEL: x\n"}


CONTAINERS = {
    "caffe2": (write.write_caffe2, "release"),
    "caffe2 flat": (lambda path, arrays: write.write_caffe2(path, arrays, flat=True), "release"),
    "torch": (lambda path, arrays: write.write_torch(path, torch_tree(arrays)), "pyslowfast"),
    "torch bare": (lambda path, arrays: write.write_torch(path, write.ordered(arrays)), "torchvision"),
    "torch mmaction2": (lambda path, arrays: write.write_torch(path, {"state_dict": arrays}), "mmaction2"),
    "torch legacy": (lambda path, arrays: write.write_torch_legacy(path, torch_tree(arrays)), "pyslowfast"),
    "safetensors": (write.write_safetensors, "torchvision"),
    "hdf5": (write.write_hdf5, "keras_applications"),
    "hdf5 split": (lambda path, arrays: write.write_hdf5(path, arrays, split=True), "keras_applications"),
}


def example(container, path):
    writer, name = CONTAINERS[container]
    image = name not in VIDEO_FORMATS
    arrays, expected = write.file_of(name, FIRST, image)
    if name == "keras_applications":
        expected = undo_keras_applications(expected)
    writer(path, arrays)
    return name, expected


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container, tmp_path):
    path = tmp_path / "weights.bin"  # no extension helps
    name, expected = example(container, path)
    checkpoint = checkpoints.read(path)
    assert checkpoint.format == name
    assert_same(checkpoint.weights, expected)
    assert checkpoint.unknown == {}
    if container in ("torch", "torch legacy"):
        beside = "not among the weights, which are in 'model_state'"
        assert checkpoint.ignored == {"epoch": beside, "optimizer_state": beside, "cfg": beside}
    else:
        assert checkpoint.ignored == {}


@pytest.mark.parametrize("container", CONTAINERS)
def test_cut_off_files(container, tmp_path):
    path, cut = tmp_path / "whole", tmp_path / "cut"
    example(container, path)
    content = path.read_bytes()
    points = {*np.linspace(0, len(content) - 1, 60).astype(int).tolist(), *range(1, 20), len(content) - 2}
    for point in points:
        cut.write_bytes(content[:point])
        with pytest.raises(ValueError, match="Received: path=.*cut"):
            checkpoints.read(cut)


@pytest.mark.parametrize("low_byte", [0x80, 0x50, 0x89])
def test_safetensors_that_begin_as_another_file(low_byte, tmp_path):
    """With the first byte of a pickle, of a zip file, of HDF5: it is of a length."""
    arrays, expected = write.file_of("torchvision", FIRST, image=True)
    write.write_safetensors(tmp_path / "a", arrays, low_byte)
    assert (tmp_path / "a").read_bytes()[0] == low_byte
    assert_same(checkpoints.read(tmp_path / "a").weights, expected)


def at_numbers(content, expected):
    """Positions in a file of the numbers of `expected`, as they are or as the file has them."""
    positions = set()
    for value in expected.values():
        axes = {1: (0,), 2: (1, 0), 5: (4, 3, 0, 1, 2)}[value.ndim]
        for raw in (np.ascontiguousarray(value).tobytes(), np.ascontiguousarray(value.transpose(axes)).tobytes()):
            start = content.find(raw)
            if start >= 0:
                positions.update(range(start, start + len(raw)))
    return positions


# HDF5 has a library of its own, which can loop for ever on a damaged file.
@pytest.mark.parametrize("container", [name for name in CONTAINERS if not name.startswith("hdf5")])
def test_damaged_files(container, tmp_path):
    """Whatever byte is changed: a `ValueError` that names the file, or all but the tensor that the byte belongs to."""
    path, damaged = tmp_path / "whole", tmp_path / "damaged"
    _, expected = example(container, path)
    content, rng, refused, read = path.read_bytes(), np.random.default_rng(0), 0, 0
    numbers = at_numbers(content, expected)
    assert len(numbers) == 4 * sum(value.size for value in expected.values())
    structure = sorted(set(range(len(content))) - numbers)
    # Zip files have a sum for every part.
    most = 0 if container in ("torch", "torch bare", "torch mmaction2") else 1
    for position in [*rng.choice(structure, 120), *rng.choice(sorted(numbers), 30)]:
        changed = bytearray(content)
        changed[position] ^= int(rng.integers(1, 256))
        damaged.write_bytes(changed)
        try:
            weights = checkpoints.read(damaged).weights
        except ValueError as error:
            refused += 1
            assert str(error).endswith(f"Received: path={str(damaged)!r}")
            continue
        read += 1
        same = [name for name in expected if name in weights and np.array_equal(weights[name], expected[name])]
        assert len(expected) - len(same) <= most and len(weights) - len(same) <= most, position
    assert refused and (read or not most)


def test_arrays_of_every_pickling_numpy(tmp_path):
    kernel = np.arange(24, dtype="float32").reshape(2, 3, 4, 1)
    path = tmp_path / "a"
    for array in (kernel, kernel.astype("f8"), kernel.astype(">f4"), kernel.astype("f2"), np.asfortranarray(kernel)):
        for core in ("numpy.core", "numpy._core"):
            for python2 in (True, False):
                blobs = {"res2_0_branch2a_w": array}
                path.write_bytes(write.pickled(blobs, lambda a, core=core: write.numpy_array(a, core), python2))
                weights = checkpoints.read(path).weights
                np.testing.assert_array_equal(weights["res2_0_branch2a/kernel"][0], kernel.transpose(2, 3, 1, 0))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_this_python(protocol, tmp_path):
    import collections
    import pickle

    kernel = np.arange(24, dtype="float32").reshape(2, 3, 4, 1)
    blobs = {"res2_0_branch2a_w": kernel, "lr": np.float32(0.5), "pred_b": np.asfortranarray(kernel)[0, 0, :, 0]}
    blobs |= {"note": "text", "model_iter": 7}
    (tmp_path / "a").write_bytes(pickle.dumps({"blobs": collections.OrderedDict(blobs)}, protocol))
    checkpoint = checkpoints.read(tmp_path / "a")
    np.testing.assert_array_equal(checkpoint.weights["res2_0_branch2a/kernel"][0], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(checkpoint.weights["pred/bias"], [0, 1, 2, 3])
    assert checkpoint.ignored == {"lr": "the learning rate", "note": "no array", "model_iter": "no array"}


def test_half_precision(tmp_path):
    values = np.array([1.0, -2.5, 3.0e38, 0.0078125], "float32")
    bfloat16 = (values.view("<u4") >> 16).astype("<u2")
    signature = write.tensor("torch.BFloat16Storage", "0", 4, 0, (4, 1, 1, 1), (1, 1, 1, 1))
    write.write_torch(tmp_path / "a.pth", {"layer1.0.conv1.weight": signature}, storages=[bfloat16.tobytes()])
    expected = (bfloat16.astype("<u4") << 16).view("<f4")
    assert checkpoints.read(tmp_path / "a.pth").weights["res2_0_branch2a/kernel"].ravel().tolist() == expected.tolist()
    header = {"layer1.0.conv1.weight": {"dtype": "BF16", "shape": [4, 1, 1, 1], "data_offsets": [0, 8]}}
    header = json.dumps(header).encode()
    (tmp_path / "b").write_bytes(struct.pack("<Q", len(header)) + header + bfloat16.tobytes())
    assert checkpoints.read(tmp_path / "b").weights["res2_0_branch2a/kernel"].ravel().tolist() == expected.tolist()
    half = np.array([1.0, -2.5], "f2").reshape(2, 1, 1, 1)
    write.write_torch(tmp_path / "c", {"layer1.0.conv1.weight": half})
    assert checkpoints.read(tmp_path / "c").weights["res2_0_branch2a/kernel"].ravel().tolist() == [1.0, -2.5]


def test_views_of_one_storage(tmp_path):
    """Transposed, shifted, and twice the same numbers."""
    numbers = np.arange(24, dtype="float32")
    kernel = write.tensor("torch.FloatStorage", "0", 24, 0, (2, 3, 4, 1), (12, 4, 1, 1))
    flipped = write.tensor("torch.FloatStorage", "0", 24, 1, (4, 3, 1, 1), (1, 4, 1, 1))
    tree = {
        "layer1.0.conv1.weight": Call(
            "torch._utils._rebuild_parameter", (kernel, True, Call("collections.OrderedDict"))
        ),
        "layer1.0.conv2.weight": flipped,
        "empty": write.tensor("torch.FloatStorage", "0", 24, 0, (0, 5), (5, 1)),
    }
    write.write_torch(tmp_path / "a", tree, storages=[numbers.tobytes()])
    checkpoint = checkpoints.read(tmp_path / "a")
    expected = numbers.reshape(2, 3, 4, 1).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(checkpoint.weights["res2_0_branch2a/kernel"][0], expected)
    expected = [[1 + o + 4 * i for o in range(4)] for i in range(3)]
    np.testing.assert_array_equal(checkpoint.weights["res2_0_branch2b/kernel"][0, 0, 0], expected)
    assert checkpoint.unknown == {"empty": (0, 5)}


def test_whole_keras_models_in_hdf5(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(2, 1, name="conv2_block1_1_conv")])
    model.save(tmp_path / "model.h5")
    checkpoint = checkpoints.read(tmp_path / "model.h5")
    np.testing.assert_array_equal(checkpoint.weights["res2_0_branch2a/kernel"][0], model.get_weights()[0])


# Files that mean harm

SIGNATURES = {"caffe2": "res2_0_branch2a_w", "torch": "layer1.0.conv1.weight"}
KERNEL = np.ones((2, 3, 1, 1), "float32")


def write_tree(kind, path, tree):
    if kind == "caffe2":
        path.write_bytes(write.pickled(tree))
    elif kind == "torch":
        write.write_torch(path, tree)
    else:
        write.write_torch_legacy(path, tree)


ATTACKS = {
    "os.system": Call("os.system", ("touch PWNED",)),
    "posix.system": Call("posix.system", ("touch PWNED",)),
    "builtins.eval": Call("builtins.eval", ("open('PWNED', 'w')",)),
    "__builtin__.eval": Call("__builtin__.eval", ("open('PWNED', 'w')",)),
    "builtins.exec": Call("builtins.exec", ("open('PWNED', 'w')",)),
    "builtins.open": Call("builtins.open", ("PWNED", "w")),
    "builtins.__import__": Call("builtins.__import__", ("os",)),
    "builtins.getattr": Call("builtins.getattr", (Global("numpy.ndarray"), "tofile")),
    "subprocess.Popen": Call("subprocess.Popen", (["touch", "PWNED"],)),
    "numpy.load": Call("numpy.load", ("PWNED",)),
    "numpy.f2py.compile": Call("numpy.f2py.compile", ("x",)),
    "numpy.core.multiarray.fromfile": Call("numpy.core.multiarray.fromfile", ("PWNED",)),
    "numpy.testing._private.utils.runstring": Call("numpy.testing._private.utils.runstring", ("x", {})),
    "torch.load": Call("torch.load", ("PWNED",)),
    "torch.hub.load": Call("torch.hub.load", ("PWNED",)),
    "torch.utils.cpp_extension.load": Call("torch.utils.cpp_extension.load", ("x", ["y"])),
    "argparse.FileType": Call("argparse.FileType", ("w",)),
    # Newer protocols split names at their dots; here they are one name.
    "collections.OrderedDict.__init__": Call("collections.OrderedDict.__init__", ()),
    "numpy.ndarray.tofile": Call("numpy.ndarray.tofile", ()),
}


@pytest.mark.parametrize("kind", ["caffe2", "torch", "legacy"])
@pytest.mark.parametrize("name", ATTACKS)
def test_foreign_functions_are_refused_by_name(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = ATTACKS[name]
    places = {
        "beside": {SIGNATURES["caffe2"]: KERNEL, "x": attack},
        "nested": {"a": [({"b": (attack,)},)]},
        "not even called": {"x": attack.function},
        "in the place of an array": {SIGNATURES["torch"]: attack},
        "as a state": {"x": Call("collections.OrderedDict", (), {"y": attack})},
        "as a new object": {"x": Call(name, attack.arguments, opcode=b"\x81")},
    }
    for tree in places.values():
        write_tree(kind, tmp_path / "evil", tree)
        with pytest.raises(ValueError, match=f"asks for '{name}', which is no array.*; nothing was run.*path='.*evil'"):
            checkpoints.read(tmp_path / "evil")
    assert [file.name for file in tmp_path.iterdir()] == ["evil"]


HARMLESS_IN_TORCH = ["argparse.Namespace", "builtins.set", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"]


@pytest.mark.parametrize("name", HARMLESS_IN_TORCH)
def test_pickles_of_arrays_admit_arrays_only(name, tmp_path):
    write_tree("caffe2", tmp_path / "a", {SIGNATURES["caffe2"]: KERNEL, "x": Global(name)})
    with pytest.raises(ValueError, match=f"asks for '{name}', which is no array"):
        checkpoints.read(tmp_path / "a")


def opcodes(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def nested(levels, pair=b"]({0}{0}e", start=b"]"):
    """A list of one list twice, and so on: few bytes, and 2 ** levels lists if it is written out."""
    code = start + b"q\0"
    for level in range(levels):
        code += b"0" + pair.replace(b"{0}", b"h" + bytes([level])) + b"q" + bytes([level + 1])
    return Raw(code)


LISTS, TUPLES = nested(22), nested(22, b"{0}{0}\x86", b")")


def text(length):
    return b"X" + struct.pack("<I", length) + b"a" * length


def of_parts(*parts, repeated, times=1000):
    """Remembers the parts (as 0, 1, …), then repeats instructions that recall them."""
    remembered = b"".join(part + b"q" + bytes([i]) + b"0" for i, part in enumerate(parts))
    return opcodes(remembered, b"]", repeated * times)


SUBARRAY = write.pickled(Call("numpy.core.multiarray._reconstruct", (Global("numpy.ndarray"), (0,), b"b")))[2:-1]
STATE = write.pickled((1, (10**5,), Call("numpy.dtype", ("i1",)), False, Raw(text(10**5))))[2:-1]


TRICKS = {
    "shown: a dtype": (write.pickled({"a": Call("numpy.dtype", (LISTS,))}), "plain numbers, and has one of dtype"),
    "shown: a byte order": (write.pickled({"a": Call("numpy.dtype", ("f4",), (3, LISTS))}), "a byte order"),
    "shown: an encoding": (write.pickled({"a": Call("_codecs.encode", ("x", LISTS))}), "the text encoding"),
    "shown: a function": (write.pickled({"a": Call(LISTS)}), "calls "),
    "shown: a key": (write.pickled({"a": Call("collections.OrderedDict", ([(TUPLES, 1)],))}), "type tuple"),
    "copies: of text as bytes": (
        of_parts(b"c_codecs\nencode\n", text(10**5) + b"\x85", repeated=b"h\0h\1Ra"),
        "copies parts of itself time and again",
    ),
    "copies: of text as an array": (of_parts(STATE, repeated=SUBARRAY + b"h\0ba"), "copies parts of itself time"),
    "copies: of items": (
        of_parts(b"ccollections\nOrderedDict\n", b"(" + b"K\1K\2\x86" * 10**4 + b"l\x85", repeated=b"h\0h\1Ra"),
        "copies parts of itself time and again",
    ),
    "copies: of arguments": (
        of_parts(b"cnumpy.core.multiarray\n_reconstruct\n", b"(" + b"N" * 10**5 + b"t", repeated=b"h\0h\1Ra"),
        "copies parts of itself time and again",
    ),
    "copies: pairs of many": (
        opcodes(b"](" + b"N" * 2000 + b"eq\0", b"0ccollections\nOrderedDict\n](" + b"h\0" * 2000 + b"e\x85R"),
        "cut off or damaged",
    ),
    "a number that takes long to hash": (opcodes(b"}\x8b" + struct.pack("<i", 9999) + b"\1" * 9999 + b"Ns"), "length"),
    "text that takes long to compare": (opcodes(b"}" + text(10**5) + b"Ns"), "key of great length"),
    "long text that is no text": (
        opcodes(b"X" + struct.pack("<I", 10**6) + b"\xff" * 10**6),
        "cut off or damaged: .*UnicodeDecodeError",
    ),
    "more than one object": (opcodes(b"]}"), "cut off or damaged"),
    "attributes of a class": (write.pickled({"a": Call(Call("collections.OrderedDict"), ())}), "calls"),
    "setattr of a function": (opcodes(b"cnumpy\ndtype\n", b"N}X\x01\0\0\0aK\x01s\x86b"), "sets attributes of a Global"),
    "call of a string": (opcodes(b"X\x01\0\0\0a", b")R"), "calls"),
    "call of an admitted class": (opcodes(b"cnumpy\nndarray\n", b"(K\x05tR"), "calls 'numpy.ndarray'"),
    "instance by INST": (opcodes(b"(ios\nsystem\n"), "instruction INST"),
    "instance by OBJ": (opcodes(b"(cnumpy\ndtype\no"), "instruction OBJ"),
    "extension registry": (opcodes(b"\x82\x01"), "instruction EXT1"),
    "name from the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for 'os.system'"),
    "persistent id": (opcodes(b"X\x01\0\0\0aQ"), "refers to something outside"),
    "object array": (write.pickled({"a": Call("numpy.dtype", ("O8", 0, 1))}), "plain numbers.*'O8'"),
    "structured array": (write.pickled({"a": Call("numpy.dtype", ("V8", 0, 1))}), "plain numbers.*'V8'"),
    "dtype by words": (write.pickled({"a": Call("numpy.dtype", ("os.system",))}), "plain numbers"),
    "dtype by a list": (write.pickled({"a": Call("numpy.dtype", ([("a", "O")],))}), "plain numbers"),
    "byte order": (write.pickled({"a": Call("numpy.dtype", ("f4",), (3, "O", None))}), "byte order 'O'"),
    "codec": (write.pickled({"a": Call("_codecs.encode", ("x", "rot13"))}), "text encoding 'rot13'"),
    "codec of no text": (write.pickled({"a": Call("_codecs.encode", (1, "latin1"))}), "cut off or damaged"),
    "far memo": (opcodes(b"]r\xff\xff\xff\x7f0j\x01\0\0\0"), "cut off or damaged"),
    "long name of nothing": (opcodes(b"X\xff\xff\xff\x7fa"), "cut off or damaged"),
    "a key that takes long to hash": (opcodes(b"})" + b"\x85" * 100_000 + b"K\x01s"), "key of the type tuple"),
    "deep lists": (opcodes(b"]" * 100_000 + b"a" * 99_999), "must hold a dictionary of arrays, and holds a list"),
    "a set of lists": (b"\x80\x04\x8f(]\x90.", "key of the type list"),
    "no dictionary": (write.pickled([1, 2]), "must hold a dictionary of arrays, and holds a list"),
    "no arrays": (write.pickled({"blobs": {"a": 1}}), "must hold arrays, and holds none"),
    "nothing": (opcodes(), "cut off or damaged"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_of_pickles(name, tmp_path):
    content, match = TRICKS[name]
    (tmp_path / "evil").write_bytes(content)
    assert_refused(tmp_path / "evil", match)


def assert_refused(path, match):
    """With little memory, in little time, and in few words."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(ValueError, match=match + ".*Received: path=") as caught:
            checkpoints.read(path)
        assert tracemalloc.get_traced_memory()[1] < 40e6 and time.process_time() - started < 10
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2000


def test_tricks_of_torch_files(tmp_path):
    for key in (LISTS, TUPLES, "1" * 1000):
        reference = ("storage", Global("torch.FloatStorage"), key, "cpu", 6)
        tree = {"a": Call("torch._utils._rebuild_tensor_v2", (write.Reference(reference), 0, (6,), (1,)))}
        write.write_torch(tmp_path / "a", tree, storages=[bytes(24)])
        assert_refused(tmp_path / "a", "a storage of the name ")
    for shape, strides in (((LISTS,), (1,)), ((6,), (LISTS,)), (LISTS, LISTS), ((2**70,) * 2, (1, 1))):
        tensor = write.tensor("torch.FloatStorage", "0", 6, 0, shape, strides)
        write.write_torch(tmp_path / "a", {"a": tensor}, storages=[bytes(24)])
        assert_refused(tmp_path / "a", "must lie in their storages")
    write.write_torch_legacy(tmp_path / "a", {"a": np.ones(2, "float32")}, [TUPLES])
    assert_refused(tmp_path / "a", "names of the torch file's storages must be strings")


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_exhaustion_is_damage(error, tmp_path, monkeypatch):
    def exhausted(*_):
        raise error("too much")

    monkeypatch.setattr(files.pickles, "load", exhausted)
    write.write_caffe2(tmp_path / "a", {SIGNATURES["caffe2"]: KERNEL})
    with pytest.raises(ValueError, match="cut off or damaged.*too much.*Received: path="):
        checkpoints.read(tmp_path / "a")


def array_state(shape, raw, dtype="f4"):
    dtype = Call("numpy.dtype", (dtype, 0, 1), (3, "<", None, None, None, -1, -1, 0))
    reconstruct = ("numpy.core.multiarray._reconstruct", (Global("numpy.ndarray"), (0,), b"b"))
    return write.pickled({SIGNATURES["caffe2"]: Call(*reconstruct, (1, shape, dtype, False, raw))})


@pytest.mark.parametrize(
    ("shape", "raw"),
    [((2**40,), b"1234"), ((-1, -1), b"1234"), ((2,), b"1234"), ((1.0,), b"1234"), ((1,) * 40, b"1234"), ([1], b"1234")]
    + [((1,), [b"1234"]), ((1,), "\u0416\u0416"), ((True,), b"1234")],
)
def test_arrays_that_do_not_fit_their_bytes(shape, raw, tmp_path):
    (tmp_path / "a").write_bytes(array_state(shape, raw))
    with pytest.raises(ValueError, match="cut off or damaged.*Received: path="):
        checkpoints.read(tmp_path / "a")


def test_foreign_reconstruct_classes_make_nothing(tmp_path):
    """The class that `_reconstruct` is told to make is not looked at."""
    call = Call("numpy.core.multiarray._reconstruct", (Global("numpy.ndarray"), (10**9,), b"O"))
    (tmp_path / "a").write_bytes(write.pickled({SIGNATURES["caffe2"]: KERNEL, "x": call}))
    assert checkpoints.read(tmp_path / "a").ignored == {"x": "no array"}


def test_what_torch_files_hold_beside_weights_does_nothing(tmp_path):
    history = Global("mmengine.logging.history_buffer.HistoryBuffer")
    history = Call("copyreg._reconstructor", (history, Global("builtins.object"), None), {"a": KERNEL})
    tree = {
        "state_dict": write.ordered({SIGNATURES["torch"]: KERNEL}),
        "message_hub": {"log": history, "runtime": Call("collections.defaultdict", (Global("builtins.dict"),))},
        "meta": Call("argparse.Namespace", (), {"lr": 0.1}, b"\x81"),
        "config": Call("mmengine.config.config.ConfigDict", (), {"x": 1}, b"\x81"),
        "time": Call("datetime.datetime", (b"\x07\xe8\x01\x01\0\0\0\0\0\0",)),
        "where": Call("pathlib.PosixPath", ("tmp", "x")),
        "device": Call("torch.device", ("cuda", 0)),
        "number": Call("numpy._core.multiarray.scalar", (Call("numpy.dtype", ("f8", False, True)), b"\0" * 8)),
    }
    write.write_torch(tmp_path / "a.pth", tree)
    checkpoint = checkpoints.read(tmp_path / "a.pth")
    assert list(checkpoint.weights) == ["res2_0_branch2a/kernel"]
    assert set(checkpoint.ignored) == set(tree) - {"state_dict"}


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (2, 3, 2, 1), (6, 2, 1, 1)),
        (1, (2, 3, 1, 1), (3, 1, 1, 1)),
        (-1, (2, 3, 1, 1), (3, 1, 1, 1)),
        (0, (2, 3, 1, 1), (-3, 1, 1, 1)),
        (0, (2, -3, 1, 1), (3, 1, 1, 1)),
        (0, (10**6, 10**6, 1, 1), (0, 0, 0, 0)),
        (0, (2, 3), (3,)),
        (0, (2.0, 3), (3, 1)),
        (0, (2, 3, 1, 1), (2**62, 2**62, 1, 1)),
    ],
)
def test_tensors_outside_of_their_storage(offset, shape, strides, tmp_path):
    bad = write.tensor("torch.FloatStorage", "0", 6, offset, shape, strides)
    write.write_torch(tmp_path / "a", {SIGNATURES["torch"]: bad}, storages=[bytes(24)])
    with pytest.raises(ValueError, match="must lie in their storages.*Received: path="):
        checkpoints.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (("storage", Global("torch.FloatStorage"), "0", "cpu", 7), "24 bytes are no 7 numbers"),
        (("storage", Global("torch.FloatStorage"), "../data.pkl", "cpu", 6), "cut off or damaged"),
        (("storage", Global("torch.FloatStorage"), "0", "cpu", 6, ("view", 0, 6)), "view"),
        (("storage", Global("torch.FloatStorage"), "0", "cpu", 2**62), "are no 4611686018427387904 numbers"),
        (("module", Global("torch.FloatStorage"), "0", "cpu", 6), "something else than a storage"),
        (("storage", Global("torch.Size"), "0", "cpu", 6), "something else than a storage"),
        (("storage", "torch.FloatStorage", "0", "cpu", 6), "something else than a storage"),
        ("storage", "cut off or damaged"),
        (7, "cut off or damaged"),
    ],
)
def test_references_to_storages(key, match, tmp_path):
    arguments = (write.Reference(key), 0, (2, 3, 1, 1), (3, 1, 1, 1), False, {})
    tree = {SIGNATURES["torch"]: Call("torch._utils._rebuild_tensor_v2", arguments)}
    write.write_torch(tmp_path / "a", tree, storages=[bytes(24)])
    with pytest.raises(ValueError, match=match + ".*Received: path="):
        checkpoints.read(tmp_path / "a")


def test_no_file_makes_more_numbers_than_it_has_bytes(tmp_path):
    match = "bytes cannot be .* of them.*Received: path="
    many = {f"w{i}": write.tensor("torch.FloatStorage", "0", 6000, 0, (6000,), (1,)) for i in range(100)}
    write.write_torch(tmp_path / "torch", many, storages=[bytes(24000)])
    with pytest.raises(ValueError, match=match):
        checkpoints.read(tmp_path / "torch")
    with h5py.File(tmp_path / "hdf5", "w") as file:
        file.attrs["layer_names"] = [b"conv2_block1_1_conv"]
        group = file.create_group("conv2_block1_1_conv")
        group.attrs["weight_names"] = [b"kernel:0"]
        group.create_dataset("kernel:0", (10**6, 10**6), chunks=(1000, 1000), compression="gzip")
    with pytest.raises(ValueError, match=match):
        checkpoints.read(tmp_path / "hdf5")
    header = {f"w{i}": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]} for i in range(100)}
    header = json.dumps(header).encode()
    (tmp_path / "safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4000))
    with pytest.raises(ValueError, match=match):
        checkpoints.read(tmp_path / "safetensors")


def test_parts_of_zip_files_do_not_lie_over_each_other(tmp_path):
    """Every storage goes on to the end of the last one: n parts, n² numbers."""
    path, tree = tmp_path / "a", {}
    with zipfile.ZipFile(path, "w") as archive:
        for key in range(30):
            archive.writestr(f"archive/data/{key}", bytes(1))
        archive.fp.flush()
        content = path.read_bytes()
        for key, entry in enumerate(archive.filelist):
            start = entry.header_offset + 30 + len(entry.filename)
            entry.file_size = entry.compress_size = len(content) - start
            entry.CRC = zlib.crc32(content[start:])
            tree[f"w{key}"] = write.tensor("torch.ByteStorage", str(key), len(content) - start, 0, (1,), (1,))
        archive.writestr("archive/data.pkl", write.pickled(tree))
        total = sum(entry.file_size for entry in archive.filelist)
    assert total > 2 * path.stat().st_size
    with pytest.raises(ValueError, match="parts of it lie over each other.*Received: path="):
        checkpoints.read(path)


def test_compressed_torch_files_are_refused(tmp_path):
    write.write_torch(tmp_path / "bomb", {"a": np.zeros(10**6, "float32")}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="one that torch wrote; .* is compressed.*Received: path="):
        checkpoints.read(tmp_path / "bomb")


def test_hdf5_files_name_no_other_file(tmp_path):
    with h5py.File(tmp_path / "secret", "w") as file:
        file["kernel:0"] = np.ones((1, 1, 2, 3), "float32")
    (tmp_path / "raw").write_bytes(bytes(24))

    def links(group):
        group["kernel:0"] = h5py.ExternalLink(str(tmp_path / "secret"), "kernel:0")

    def external(group):
        group.create_dataset("kernel:0", (1, 1, 2, 3), "f4", external=[(str(tmp_path / "raw"), 0, 24)])

    def virtual(group):
        layout = h5py.VirtualLayout((1, 1, 2, 3), "f4")
        layout[...] = h5py.VirtualSource(str(tmp_path / "secret"), "kernel:0", shape=(1, 1, 2, 3))
        group.create_virtual_dataset("kernel:0", layout)

    def strings(group):
        group["kernel:0"] = np.array([b"a", b"b"])

    for fill, match in (
        (links, "must hold 'kernel:0' itself"),
        (external, "must lie in the file itself"),
        (virtual, "must lie in the file itself"),
        (strings, "plain numbers; .* is of .S1"),
    ):
        with h5py.File(tmp_path / "a", "w") as file:
            file.attrs["layer_names"] = [b"conv2_block1_1_conv"]
            group = file.create_group("conv2_block1_1_conv")
            group.attrs["weight_names"] = [b"kernel:0"]
            fill(group)
        with pytest.raises(ValueError, match=match + ".*Received: path="):
            checkpoints.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not lie in it"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "does not lie in it"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "does not lie in it"),
        *(
            ({"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}, "shape is no shape of an array")
            for shape in ([-1], [1.0], ["A", 5], "A", [[0], 10**10], [10**3999] * 30, [2**63, 0], [1] * 33)
        ),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "is of 'F8_E4M3'"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "cut off or damaged"),
        ({"dtype": "F32", "shape": [1]}, "cut off or damaged"),
        ([], "cut off or damaged"),
    ],
)
def test_safetensors_headers(entry, match, tmp_path):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=match + ".*Received: path="):
        checkpoints.read(tmp_path / "a")


# Files of other kinds


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is none of them; it begins with b''"),
        (b"<!DOCTYPE html><html>404</html>", "is none of them; it begins with b'<!DOCTYPE html>"),
        (b'{"error": {"code": 403}}', "is none of them"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is none of them"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "is none of them"),
        (b"\x10\0\0\0\0\0\0\0{not json", "cut off or damaged"),
        (struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 100_000, "cut off or damaged"),
    ],
)
def test_files_of_other_kinds(content, match, tmp_path):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=match + ".*Received: path='.*a.pkl'"):
        checkpoints.read(tmp_path / "a.pkl")


def test_files_of_keras_of_other_networks(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="last")])
    model.save(tmp_path / "a.keras")
    model.save_weights(tmp_path / "a.weights.h5")
    for name in ("a.keras", "a.weights.h5"):
        with pytest.raises(
            ValueError, match=r"must have a tensor .* it has 2 others, such as 'last/0', 'last/1'.*Received"
        ):
            checkpoints.read(tmp_path / name)


def test_groups_that_lie_in_each_other(tmp_path):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        group = file.create_group("layers/conv")
        group["again"] = group
        group.create_group("vars").attrs["name"] = "conv"
    with pytest.raises(ValueError, match=r"groups lie in each other without end\. Received: path="):
        checkpoints.read(tmp_path / "a.weights.h5")


def test_other_zip_files_and_no_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match="one that torch wrote, with one data.pkl.*Received: path="):
        checkpoints.read(tmp_path / "a")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="must be a file of that name; there is none. Received: path="):
            checkpoints.read(path)


def test_big_endian_torch_files(tmp_path):
    write.write_torch(tmp_path / "a", {SIGNATURES["torch"]: KERNEL})
    with zipfile.ZipFile(tmp_path / "a") as old, zipfile.ZipFile(tmp_path / "b", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(ValueError, match="from a little-endian machine.*Received: path="):
        checkpoints.read(tmp_path / "b")


def test_needs_no_torch_and_no_keras():
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, '.'); import types; "
        "package = types.ModuleType('keras_nonlocal'); package.__path__ = ['keras_nonlocal']; "
        "sys.modules['keras_nonlocal'] = package; import keras_nonlocal.checkpoints; "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"keras", "tensorflow", "safetensors", "h5py"} & set(result.stdout.split())
