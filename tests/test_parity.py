"""Parity with the authors' release: a file in, and the class probabilities of the release's graph out.

The graph is `tests/release_twin.py`, in PyTorch; its own parts are proved here against `tests/reference.py`.
Needs the extra `backends`.
"""

import functools
import pickle
import pickletools

import keras
import numpy as np
import pytest
import torch

from keras_nonlocal import applications
from tests import reference
from tests.release_twin import ReleaseTwin, positions, random_blobs, random_clips, write_release

TOLERANCE = 1e-4
SMALL = (8, 64, 64, 3)


@pytest.fixture(autouse=True)
def _let_go():
    yield
    keras.utils.clear_session()


def names(inflated, depth):
    return f"{'I3D' if inflated else 'C2D'}ResNet{depth}"


blobs_of = functools.lru_cache(3)(random_blobs)


def cases(depths, numbers):
    return [
        pytest.param(depth, inflated, number, affine, id=f"{names(inflated, depth)}-{number}-{form}")
        for depth in depths
        for inflated in (False, True)
        for number in numbers
        for affine, form in ((False, "bn"), (True, "affine"))
    ]


def spread_scores(blobs, features):
    """Sets the head so that neither clip is of one class for certain: the blobs are made for other sizes."""
    w, b = blobs["pred_w"], blobs["pred_b"]
    w *= 1 / (w @ (features - features.mean(0)).T).std()
    b[:] = 0.5 * np.random.default_rng(0).standard_normal(len(b)) - w @ features.mean(0)


def assert_parity(path, depth, inflated, non_local, affine, shape, twin_options=None, momentum=False, **options):
    blobs = random_blobs(depth, inflated, non_local, affine, momentum=momentum)
    twin = ReleaseTwin(blobs, depth, inflated, non_local, affine, **twin_options or {})
    clips = random_clips(shape, count=2, seed=1)
    features = np.concatenate([twin.features(clip[None]) for clip in clips])
    spread_scores(blobs, features)
    write_release(path, blobs, affine)
    builder = getattr(applications, names(inflated, depth))
    model = builder(weights=str(path), non_local=non_local, input_shape=shape, **options)
    expected = twin.head(features)
    for clip, probabilities in zip(clips, expected, strict=True):
        actual = keras.ops.convert_to_numpy(model(clip[None], training=False))[0]
        assert np.abs(actual - probabilities).max() <= TOLERANCE
    # Scores that hardly differ would agree whatever the network does.
    assert np.abs(expected[0] - expected[1]).max() > 100 * TOLERANCE
    assert np.max(expected) > 100 * TOLERANCE


# The models


@pytest.mark.parametrize(("depth", "inflated", "non_local", "affine"), cases([50], [5]))
def test_parity_of_small_clips(tmp_path, depth, inflated, non_local, affine):
    assert_parity(tmp_path / "release.pkl", depth, inflated, non_local, affine, SMALL, momentum=affine)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 224, 224, 3), (32, 224, 224, 3), (8, 256, 320, 3)], ids=str)
@pytest.mark.parametrize(("depth", "inflated", "non_local", "affine"), cases([50, 101], [0, 5, 10]))
def test_parity(tmp_path, depth, inflated, non_local, affine, shape):
    assert_parity(tmp_path / "release.pkl", depth, inflated, non_local, affine, shape)


@pytest.mark.parametrize(
    ("options", "twin_options"),
    [
        pytest.param({"temporal_strides": (2, 2, 2)}, {"temporal_strides": (2, 2, 2)}, id="strides of 32x2 and 128x1"),
        pytest.param({"non_local_options": {3: {"window": (4, None, None)}}}, {"groups": 4}, id="groups of 4 frames"),
        pytest.param({"pool1_padding": "same"}, {"pool1_padding": 1}, id="pool1 padded"),
    ],
)
def test_parity_of_other_arrangements(tmp_path, options, twin_options):
    assert_parity(tmp_path / "release.pkl", 50, True, 5, False, (16, 64, 64, 3), twin_options, **options)


# The twin


@pytest.fixture(scope="module")
def i3d():
    return blobs_of(50, True, 5)


def channels_last(x):
    return x.permute(0, 2, 3, 4, 1).numpy()


def channels_first(x):
    return torch.from_numpy(np.float32(x)).permute(0, 4, 1, 2, 3)


def test_convolutions_and_norms_of_the_twin(rng, i3d):
    twin = ReleaseTwin(i3d, 50, True, 5)
    for name, norm, channels, kernel, strides in (
        ("conv1", "res_conv1_bn", 3, (5, 7, 7), (2, 2, 2)),
        ("res3_0_branch2b", "res3_0_branch2b_bn", 128, (1, 3, 3), (1, 2, 2)),
        ("res4_2_branch2a", "res4_2_branch2a_bn", 1024, (3, 1, 1), (1, 1, 1)),
    ):
        x = rng.normal(size=(2, 5, 7, 8, channels))
        actual = twin.norm(norm, twin.convolution(name, channels_first(x), kernel, strides))
        expected = reference.conv3d(x, i3d[f"{name}_w"].transpose(2, 3, 4, 1, 0), strides)
        expected = reference.batch_norm(expected, [i3d[f"{norm}_{part}"] for part in ("s", "b", "rm", "riv")])
        # Float32: the first channel of few that hardly vary is multiplied by hundreds.
        np.testing.assert_allclose(channels_last(actual), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("affine", [False, True])
def test_non_local_block_of_the_twin(rng, i3d, affine, groups):
    name = "nonlocal_conv3_1"
    blobs = blobs_of(50, True, 5, affine=True) if affine else i3d
    x = rng.normal(size=(2, 4, 3, 4, 512))
    weights = {
        part: (blobs[f"{name}_{part}_w"][:, :, 0, 0, 0].T, blobs[f"{name}_{part}_b"])
        for part in ("theta", "phi", "g", "out")
    }
    if not affine:
        weights["norm"] = [blobs[f"{name}_bn_{part}"] for part in ("s", "b", "rm", "riv")]
    window = groups and (groups, None, None)
    expected = reference.block(x, weights, "embedded_gaussian", (1, 2, 2), window, scale="sqrt")
    actual = channels_last(ReleaseTwin(blobs, 50, True, 5, affine).non_local_block(name, channels_first(x), groups))
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert np.abs(expected - x).max() > 0.1


def test_both_forms_mean_the_same(i3d):
    clips = random_clips(SMALL)
    affine = ReleaseTwin(blobs_of(50, True, 5, affine=True), 50, True, 5, affine=True)
    np.testing.assert_allclose(affine(clips), ReleaseTwin(i3d, 50, True, 5)(clips), atol=TOLERANCE / 2)


@pytest.mark.parametrize(
    "change",
    [
        {"scaled": False},
        {"non_local_pool": None},
        {"pool1_padding": 1},
        {"groups": 2},
        {"temporal_strides": (2, 2, 2)},
        {"temporal_strides": (1, 2, 2)},
    ],
    ids=str,
)
def test_every_choice_shows_in_the_probabilities(i3d, change):
    clips = random_clips(SMALL)
    right, wrong = (ReleaseTwin(i3d, 50, True, 5, **options)(clips) for options in ({}, change))
    assert np.abs(right - wrong).max() > 100 * TOLERANCE


def test_every_block_shows_in_the_probabilities(i3d):
    clips = random_clips(SMALL)
    right = ReleaseTwin(i3d, 50, True, 5)(clips)
    for stage, blocks in positions(50, 5).items():
        for block in blocks:
            parts = [f"nonlocal_conv{stage}_{block}_bn_{part}" for part in ("s", "b")]
            without = i3d | {part: 0 * i3d[part] for part in parts}
            assert np.abs(ReleaseTwin(without, 50, True, 5)(clips) - right).max() > 100 * TOLERANCE


def test_twin_uses_every_blob(i3d):
    with pytest.raises(AssertionError, match="nonlocal_conv4_5_bn_b"):
        ReleaseTwin(i3d, 50, True, {3: [1, 3], 4: [1, 3]})(random_clips(SMALL, count=1))


# Its files


@pytest.mark.parametrize(("depth", "millions"), [(50, "35.40"), (101, "59.11")])
def test_blobs_have_the_parameters_of_the_paper(depth, millions):
    trained = sum(blob.size for name, blob in blobs_of(depth, True, 5).items() if not name.endswith(("_rm", "_riv")))
    assert f"{trained / 1e6:.2f}" == millions


def test_file_is_of_python_2(tmp_path):
    path = tmp_path / "release.pkl"
    blobs = {"conv1_w": np.arange(300, dtype="float32").reshape(3, 100), "lr": np.float32([0.1])}
    write_release(path, blobs)
    operations = list(pickletools.genops(path.read_bytes()))
    assert {argument for operation, argument, _ in operations if operation.name == "GLOBAL"} == {
        "numpy.core.multiarray _reconstruct",
        "numpy dtype",
        "numpy ndarray",
    }
    assert not any("UNICODE" in operation.name or operation.proto > 2 for operation, _, _ in operations)
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    assert list(content) == ["blobs"] and list(content["blobs"]) == list(blobs)
    for name, blob in blobs.items():
        np.testing.assert_array_equal(content["blobs"][name], blob)
