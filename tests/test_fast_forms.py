"""What makes the operation fast changes nothing: sorted concatenation, written-out gradients, a table of one entry."""

import dataclasses

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_nonlocal import layers
from keras_nonlocal import ops as knl_ops
from tests import reference
from tests.backends import assert_close, gradients, to_numpy
from tests.descriptors import layer_weights, randomise


@pytest.fixture
def linear(monkeypatch):
    """Takes the linear forms at any size."""
    force_linear(monkeypatch)


def force_linear(monkeypatch, answer=True):
    for name, function in knl_ops.PAIRWISE.items():
        forced = dataclasses.replace(function, is_linear_cheaper=lambda *sizes: answer)
        monkeypatch.setitem(knl_ops.PAIRWISE, name, forced)


def concatenation(theta, phi, g, score_kernel, mask=None):
    return knl_ops.non_local(theta, phi, g, "concatenation", score_kernel=score_kernel, mask=mask)


def make(rng, batch=2, num_queries=9, num_keys=7, channels=3, values=4):
    shapes = ((batch, num_queries, channels), (batch, num_keys, channels), (batch, num_keys, values), (2 * channels, 1))
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def expected_gradients(arrays, direction, mask=None):
    """Of Σ y · direction for the concatenation, in float64 and written straight from its derivatives."""
    theta, phi, g, kernel = (np.float64(x) for x in arrays)
    channels = theta.shape[-1]
    w_theta, w_phi = kernel[:channels, 0], kernel[channels:, 0]
    result = [np.zeros_like(x) for x in (theta, phi, g, kernel)]
    for b in range(len(theta)):
        valid = [j for j in range(phi.shape[1]) if mask is None or mask[b, j]]
        for i in range(theta.shape[1]):
            for j in valid:
                score = theta[b, i] @ w_theta + phi[b, j] @ w_phi
                if score <= 0:
                    continue  # the derivative of ReLU is 0 at 0
                d_score = direction[b, i] @ g[b, j] / len(valid)
                result[0][b, i] += d_score * w_theta
                result[1][b, j] += d_score * w_phi
                result[2][b, j] += score / len(valid) * direction[b, i]
                result[3][:channels, 0] += d_score * theta[b, i]
                result[3][channels:, 0] += d_score * phi[b, j]
    return result


# --- Concatenation by sort, prefix sums and look-up -------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(9, 7), (7, 9), (1, 6), (6, 1), (1, 1), (40, 33)])
def test_concatenation(rng, linear, sizes, masked):
    arrays = make(rng, 2, *sizes)
    mask = rng.random((2, sizes[1])) < 0.6 if masked else None
    direction = rng.normal(size=(2, sizes[0], 4)).astype("float32")
    assert_close(concatenation(*arrays, mask), reference.non_local(*arrays[:3], "concatenation", arrays[3], mask=mask))
    _, result = gradients(lambda *arrays: ops.multiply(concatenation(*arrays, mask), direction), arrays)
    for actual, expected in zip(result, expected_gradients(arrays, direction, mask), strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_ties_and_zeros(rng, linear, reach):
    """Small integers: many equal keys, and many pairs with a_i + b_j = 0, where the derivative of ReLU is 0."""
    arrays = [rng.integers(-reach, reach + 1, size=x.shape).astype("float32") for x in make(rng, 2, 12, 11, 1, 2)]
    arrays[3][:] = 1.0
    sums = arrays[0] + np.swapaxes(arrays[1], 1, 2)
    assert (sums == 0).any()
    direction = rng.normal(size=(2, 12, 2)).astype("float32")
    assert_close(concatenation(*arrays), reference.non_local(*arrays[:3], "concatenation", arrays[3]), 1e-6)
    _, result = gradients(lambda *arrays: ops.multiply(concatenation(*arrays), direction), arrays)
    for actual, expected in zip(result, expected_gradients(arrays, direction), strict=True):
        assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_a_common_offset_is_not_lost(rng, linear, offset, masked):
    """a_i S0 + S1 is a small difference of large numbers here, were b not taken relative to its mean."""
    arrays = make(rng, 1, 300, 280, 1, 3)
    arrays[3][:] = 1.0
    arrays[0] = (arrays[0] + offset).astype("float32")
    arrays[1] = (arrays[1] - offset).astype("float32")
    mask = rng.random((1, 280)) < 0.5 if masked else None
    assert_close(concatenation(*arrays, mask), reference.non_local(*arrays[:3], "concatenation", arrays[3], mask=mask))


def test_many_positions(rng, linear):
    """Prefix sums over many keys of one sign keep five digits."""
    theta, phi, g, kernel = make(rng, 1, 50, 20_000, 2, 3)
    g = np.abs(g)
    scores = np.maximum(np.float64(theta) @ kernel[:2] + (np.float64(phi) @ kernel[2:])[..., 0][:, None], 0.0)
    assert_close(concatenation(theta, phi, g, kernel), scores @ g / 20_000)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(rng, linear, dtype):
    arrays = make(rng, 1, 20, 2_000, 3, 4)
    arrays[2] = np.abs(arrays[2])  # so that the sum does not cancel
    half = [ops.cast(x, dtype) for x in arrays]
    y = concatenation(*half)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    rounded = [to_numpy(x) for x in half]
    assert_close(y, reference.non_local(*rounded[:3], "concatenation", rounded[3]), 2e-2)


def test_half_precision_overflows_only_where_the_result_does(linear):
    """The sum over the keys is above float16's largest number, and so is half-way divided; their mean is not."""
    theta, phi = np.full((1, 3, 1), 500.0, "float16"), np.full((1, 10_000, 1), 500.0, "float16")
    y = concatenation(theta, phi, np.ones((1, 10_000, 2), "float16"), np.ones((2, 1), "float16"))
    assert_close(y, np.full((1, 3, 2), 1000.0), 1e-2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.tuples(*[st.integers(0 if i == 0 else 1, high) for i, high in enumerate((3, 12, 12, 3, 4))]),
    masked=st.booleans(),
    whole_numbers=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(sizes, masked, whole_numbers, seed):
    rng = np.random.default_rng(seed)
    arrays = make(rng, *sizes)
    if whole_numbers:
        arrays = [np.round(x) for x in arrays]
    mask = rng.random(arrays[1].shape[:2]) < 0.5 if masked else None
    direction = rng.normal(size=(*arrays[0].shape[:2], sizes[-1])).astype("float32")
    with pytest.MonkeyPatch.context() as monkeypatch:
        force_linear(monkeypatch)
        y = concatenation(*arrays, mask)
        _, result = gradients(lambda *arrays: ops.multiply(concatenation(*arrays, mask), direction), arrays)
    assert_close(y, reference.non_local(*arrays[:3], "concatenation", arrays[3], mask=mask), 2e-5)
    for actual, expected in zip(result, expected_gradients(arrays, direction, mask), strict=True):
        assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("name", ["dot_product", "concatenation"])
def test_both_forms_agree(rng, monkeypatch, name):
    """Values and gradients of the linear form and of the scores, whichever the sizes would choose."""
    arrays = make(rng)
    options = {"pairwise": name}
    if name == "dot_product":
        arrays = arrays[:3]
    mask = np.array([[True] * 5 + [False] * 2, [False, True] * 3 + [True]])
    results = []
    for answer in (True, False):
        force_linear(monkeypatch, answer)

        def function(theta, phi, g, *kernel):
            kernel = {"score_kernel": kernel[0]} if kernel else {}
            return knl_ops.non_local(theta, phi, g, mask=mask, query_chunk_size=4, **options, **kernel) ** 2

        value, result = gradients(function, arrays)
        results.append([value, *result])
    for linear_form, scores_form in zip(*results, strict=True):
        assert_close(linear_form, scores_form, 1e-5)


def test_which_form_is_taken():
    dot, concatenation = (knl_ops.PAIRWISE[name].is_linear_cheaper for name in ("dot_product", "concatenation"))
    assert not dot(2, 2, 8, 8)  # 4·8·8 operations against 2·2·16
    assert dot(16, 16, 3, 3)  # 32·9 against 256·6
    assert not concatenation(49, 49, 256, 256) and concatenation(3136, 3136, 256, 256)


# --- Softmax forms: the written-out gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("pairwise", reference.SOFTMAX)
@pytest.mark.parametrize("query_chunk_size", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_the_formula(rng, pairwise, query_chunk_size, masked):
    """Against what the backend itself derives from softmax and matmul."""
    theta, phi, g, _ = make(rng)
    mask = np.array([[True] * 5 + [False] * 2, [False] * 7]) if masked else np.ones((2, 7), bool)
    direction = rng.normal(size=(2, 9, 4)).astype("float32")

    def formula(theta, phi, g):
        scores = ops.matmul(theta, ops.transpose(phi, (0, 2, 1)))
        if pairwise == "euclidean_gaussian":
            distance = ops.expand_dims(theta, 2) - ops.expand_dims(phi, 1)
            scores = -ops.sum(ops.square(distance), -1)
        weights = ops.softmax(ops.where(mask[:, None], scores * 0.7, -1e30)) * ops.cast(mask[:, None], "float32")
        return ops.multiply(ops.matmul(weights, g), direction)

    def operation(theta, phi, g):
        options = {"mask": mask if masked else None, "query_chunk_size": query_chunk_size, "scale": 0.7}
        return ops.multiply(knl_ops.non_local(theta, phi, g, pairwise, **options), direction)

    value, expected = gradients(formula, [theta, phi, g])
    actual_value, actual = gradients(operation, [theta, phi, g])
    assert_close(actual_value, value)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("query_chunk_size", [None, 4])
def test_large_scores(rng, query_chunk_size):
    """Scores of ±1e4 neither overflow nor lose the second largest key."""
    theta = np.array([[[100.0], [-100.0], [0.0]]], "float32")
    phi = np.array([[[100.0], [-100.0], [99.99]]], "float32")
    g = rng.normal(size=(1, 3, 2)).astype("float32")

    def operation(theta, phi, g):
        return knl_ops.non_local(theta, phi, g, query_chunk_size=query_chunk_size)

    assert_close(operation(theta, phi, g), reference.non_local(theta, phi, g, "embedded_gaussian"), 1e-3)
    _, result = gradients(operation, [theta, phi, g])
    assert all(np.isfinite(gradient).all() for gradient in result)


@pytest.mark.parametrize("masked", [False, True])
def test_euclidean_gaussian_far_from_the_origin(rng, masked):
    """Distances do not depend on where the origin is; squared norms of 1e8 would swallow them."""
    theta, phi, g, _ = make(rng)
    theta, phi = (np.round(x * 64) / 64 for x in (theta, phi))  # so that adding 8192 rounds nothing off
    mask = np.array([[True] * 4 + [False] * 3, [False, True] * 3 + [False]]) if masked else None
    expected = reference.non_local(theta, phi, g, "euclidean_gaussian", mask=mask)
    moved = knl_ops.non_local(theta + 8192, phi + 8192, g, "euclidean_gaussian", mask=mask)
    assert_close(moved, expected, 1e-5)


@pytest.mark.parametrize("pairwise", reference.SOFTMAX)
@pytest.mark.parametrize("query_chunk_size", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_one_key_has_all_the_weight(rng, pairwise, query_chunk_size, masked):
    """Whatever the scores: no gradient goes to them, and all of it to the key's g."""
    theta, phi, g, _ = make(rng, num_keys=3 if masked else 1)
    mask = np.array([[False, True, False]] * 2) if masked else None

    def operation(theta, phi, g):
        return knl_ops.non_local(theta, phi, g, pairwise, mask=mask, query_chunk_size=query_chunk_size)

    _, (d_theta, d_phi, d_g) = gradients(operation, [theta, phi, g])
    assert np.abs(d_theta).max() < 1e-5 and np.abs(d_phi).max() < 1e-4
    expected = np.zeros_like(g)
    expected[:, 1 if masked else 0] = 9.0  # queries
    assert_close(d_g, expected)


# --- A new pairwise function is one entry -----------------------------------------------------------------------------


@pytest.fixture
def laplacian(monkeypatch):
    """exp(-‖θ_i - φ_j‖₁), which is of no form that the operation knows: just scores."""

    def scores(theta, phi, score_kernel=None):
        return -ops.sum(ops.abs(ops.expand_dims(theta, 2) - ops.expand_dims(phi, 1)), axis=-1)

    monkeypatch.setitem(knl_ops.PAIRWISE, "laplacian", knl_ops.PairwiseFunction(softmax=True, scores=scores))


@pytest.mark.parametrize("query_chunk_size", [None, 3])
@pytest.mark.parametrize("cls", [layers.NonLocal1D, layers.NonLocal2D, layers.NonLocal3D])
def test_a_new_entry(rng, laplacian, cls, query_chunk_size):
    x = rng.normal(size=(2, *(4, 3, 2)[: cls.rank], 5)).astype("float32")
    mask = rng.random(x.shape[:-1]) < 0.7
    layer = cls("laplacian", scale=0.5, query_chunk_size=query_chunk_size, normalization=None)
    layer.build(x.shape)
    randomise(layer)
    weights = layer_weights(layer)
    theta, phi, g = (reference.dense(x.reshape(2, -1, 5), weights[name]) for name in ("theta", "phi", "g"))
    scores = -0.5 * np.abs(theta[:, :, None] - phi[:, None]).sum(-1)
    f = np.exp(scores) * mask.reshape(2, 1, -1)
    expected = reference.dense(f / f.sum(-1, keepdims=True) @ g, weights["out"]).reshape(x.shape) + x
    assert_close(layer(x, mask=mask), expected)
    attention = to_numpy(layer.attention(x, [[0] * cls.rank], mask=mask))
    assert_close(attention.reshape(2, -1), (f / f.sum(-1, keepdims=True))[:, 0])
