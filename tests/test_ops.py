"""The operation against the float64 twin: values, gradients, extremes."""

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_nonlocal import ops as knl_ops
from tests import reference
from tests.backends import assert_close, assert_equal, dtype_of, gradients, to_numpy

PAIRWISE = ("gaussian", "embedded_gaussian", "euclidean_gaussian", "dot_product", "concatenation")
SIZES = ((7, 5), (5, 7), (1, 5), (7, 1), (1, 1))  # N, M
TENSORS = ("theta", "phi", "g", "score_kernel")


def make_arguments(rng, pairwise, num_queries=7, num_keys=5, batch=2, channels=3, values=4):
    arguments = {
        "theta": rng.normal(size=(batch, num_queries, channels)),
        "phi": rng.normal(size=(batch, num_keys, channels)),
        "g": rng.normal(size=(batch, num_keys, values)),
    }
    if pairwise == "concatenation":
        arguments["score_kernel"] = rng.normal(size=(2 * channels, 1))
    return {name: value.astype("float32") for name, value in arguments.items()}


def make_mask(rng, batch, num_keys):
    """Random, but the first sample has a valid key and the last has none."""
    mask = rng.random((batch, num_keys)) < 0.6
    mask[0, 0], mask[-1] = True, False
    return mask


@pytest.mark.parametrize("query_chunk_size", [None, 3, "auto"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_forward(rng, pairwise, sizes, masked, query_chunk_size):
    arguments = make_arguments(rng, pairwise, *sizes)
    mask = make_mask(rng, 2, sizes[1]) if masked else None
    expected = reference.non_local(**arguments, pairwise=pairwise, mask=mask)
    y = knl_ops.non_local(**arguments, pairwise=pairwise, mask=mask, query_chunk_size=query_chunk_size)
    assert_close(y, expected, 1e-5)
    if masked:
        assert not np.any(to_numpy(y)[-1])  # no valid key


@pytest.mark.parametrize("scale", [None, "sqrt", 0.3, 2])
@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian"])
def test_scale(rng, pairwise, scale):
    arguments = make_arguments(rng, pairwise, channels=5)
    expected = reference.non_local(**arguments, pairwise=pairwise, scale=scale)
    assert_close(knl_ops.non_local(**arguments, pairwise=pairwise, scale=scale), expected, 1e-5)


@pytest.mark.parametrize("pairwise", ["dot_product", "concatenation"])
def test_no_scale_without_softmax(rng, pairwise):
    arguments = make_arguments(rng, pairwise)
    expected = knl_ops.non_local(**arguments, pairwise=pairwise)
    y = knl_ops.non_local(**arguments, pairwise=pairwise, scale="sqrt")
    assert_equal(y, expected)


def numerical_gradient(function, arguments, name, epsilon=1e-6):
    values = {key: np.float64(value) for key, value in arguments.items()}
    gradient = np.zeros_like(values[name])
    for at in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = dict(values)
            moved[name] = values[name].copy()
            moved[name][at] += sign * epsilon
            ends.append(function(moved))
        gradient[at] = (ends[0] - ends[1]) / (2 * epsilon)
    return gradient


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_gradients(rng, pairwise, masked):
    arguments = make_arguments(rng, pairwise, 4, 3, channels=2, values=2)
    mask = make_mask(rng, 2, 3) if masked else None
    direction = rng.normal(size=(2, 4, 2))
    names = [name for name in TENSORS if name in arguments]

    def loss(values):
        y = reference.non_local(**values, pairwise=pairwise, mask=mask, scale=0.7)
        return np.sum(y * direction)

    expected = {name: numerical_gradient(loss, arguments, name) for name in names}
    for query_chunk_size in (None, 3):

        def weighted(*tensors, query_chunk_size=query_chunk_size):
            y = knl_ops.non_local(
                **dict(zip(names, tensors, strict=True)),
                pairwise=pairwise,
                mask=mask,
                scale=0.7,
                query_chunk_size=query_chunk_size,
            )
            return y * ops.cast(direction, "float32")

        _, actual = gradients(weighted, [arguments[name] for name in names])
        for name, gradient in zip(names, actual, strict=True):
            assert_close(gradient, expected[name], 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_half_precision_is_finite_up_to_scores_of_1e4(rng, pairwise, masked, dtype):
    arguments = make_arguments(rng, pairwise, 6, 5, channels=4)
    # Scores of exactly ±1e4 and less: every channel gives ±50·50 times a factor.
    for name in ("theta", "phi"):
        signs = np.where(rng.random(arguments[name].shape) < 0.5, -50.0, 50.0)
        arguments[name] = signs.astype("float32")
    arguments["phi"][:, 0] = arguments["theta"][:, 0]
    if pairwise == "concatenation":
        arguments["score_kernel"][:] = 25.0
        arguments["theta"][:, 0] = 50.0
        arguments["phi"][:, 0] = 50.0
    mask = make_mask(rng, 2, 5) if masked else None
    tensors = {name: ops.cast(value, dtype) for name, value in arguments.items()}

    def function(*tensors):
        tensors = dict(zip(arguments, tensors, strict=True))
        return knl_ops.non_local(**tensors, pairwise=pairwise, mask=mask, query_chunk_size=4)

    y = function(*tensors.values())
    assert dtype_of(y) == dtype
    assert np.isfinite(to_numpy(y)).all()
    _, actual = gradients(lambda *tensors: ops.cast(function(*tensors), "float32") * 1e-3, tensors.values())
    for gradient in actual:
        # The gradient of w_f is the sum over all pairs of ±50·g: it may leave float16, no other.
        assert np.isfinite(gradient).all()
    rounded = {name: np.float64(to_numpy(value)) for name, value in tensors.items()}
    expected = reference.non_local(**rounded, pairwise=pairwise, mask=mask)
    assert np.abs(expected).max() > (0.1 if pairwise in reference.SOFTMAX else 100)
    assert_close(y, expected, 2e-2)


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_masked_keys_have_no_influence(rng, pairwise):
    arguments = make_arguments(rng, pairwise)
    mask = make_mask(rng, 2, 5)
    before = knl_ops.non_local(**arguments, pairwise=pairwise, mask=mask)
    arguments["phi"][~mask] = 1e4
    arguments["g"][~mask] = -1e4
    after = knl_ops.non_local(**arguments, pairwise=pairwise, mask=mask)
    assert_equal(before, after)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_attention_weights(rng, pairwise, masked):
    arguments = make_arguments(rng, pairwise)
    g = arguments.pop("g")
    mask = make_mask(rng, 2, 5) if masked else None
    weights = knl_ops.attention_weights(**arguments, pairwise=pairwise, scale=0.5, mask=mask)
    expected = reference.attention(**arguments, pairwise=pairwise, scale=0.5, mask=mask)
    assert_close(weights, expected, 1e-5)
    y = knl_ops.non_local(**arguments, g=g, pairwise=pairwise, scale=0.5, mask=mask)
    assert_close(to_numpy(weights) @ g, y, 1e-5)
    if pairwise in reference.SOFTMAX:
        sums = to_numpy(weights).sum(-1)
        np.testing.assert_allclose(sums[0], 1.0, atol=1e-6)
        np.testing.assert_allclose(sums[1], 0.0 if masked else 1.0, atol=1e-6)


def test_attention_weights_are_float32_in_half_precision():
    x = ops.ones((1, 3, 2), "float16")
    for pairwise in ("gaussian", "dot_product"):
        assert dtype_of(knl_ops.attention_weights(x, x, pairwise)) == "float32"


def test_by_hand():
    # Two queries, two keys, one channel.
    theta, phi = np.array([[[1.0], [-2.0]]]), np.array([[[0.0], [np.log(3.0)]]])
    g = np.array([[[4.0], [8.0]]])
    theta, phi, g = (x.astype("float32") for x in (theta, phi, g))
    # exp(0) : exp(log 3) is 1 : 3; exp(0) : exp(-2 log 3) is 9 : 1.
    y = knl_ops.non_local(theta, phi, g)
    np.testing.assert_allclose(to_numpy(y)[0, :, 0], [(4 + 3 * 8) / 4, (9 * 4 + 8) / 10], rtol=1e-6)
    # 1/2 (0·4 + log 3·8) and -2 times that.
    y = knl_ops.non_local(theta, phi, g, "dot_product")
    np.testing.assert_allclose(to_numpy(y)[0, :, 0], [4 * np.log(3), -8 * np.log(3)], rtol=1e-6)
    # w_f = [1, 1]: ReLU(1 + 0), ReLU(1 + log 3); ReLU(-2 + 0), ReLU(-2 + log 3), which are both 0.
    kernel = np.ones((2, 1), "float32")
    y = knl_ops.non_local(theta, phi, g, "concatenation", score_kernel=kernel)
    np.testing.assert_allclose(to_numpy(y)[0, :, 0], [(4 + 8 * (1 + np.log(3))) / 2, 0.0], rtol=1e-6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pairwise=st.sampled_from(PAIRWISE),
    sizes=st.tuples(*[st.integers(1, high) for high in (3, 9, 9, 5, 5)]),
    query_chunk_size=st.sampled_from([None, "auto", 1, 2, 4, 50]),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(pairwise, sizes, query_chunk_size, masked, seed):
    batch, num_queries, num_keys, channels, values = sizes
    rng = np.random.default_rng(seed)
    arguments = make_arguments(rng, pairwise, num_queries, num_keys, batch, channels, values)
    mask = rng.random((batch, num_keys)) < 0.5 if masked else None
    y = knl_ops.non_local(**arguments, pairwise=pairwise, mask=mask, query_chunk_size=query_chunk_size)
    expected = reference.non_local(**arguments, pairwise=pairwise, mask=mask)
    assert_close(y, expected, 2e-5)


def test_automatic_chunks(rng, monkeypatch):
    assert knl_ops.AUTO_MAX_SCORES == 2**24
    assert knl_ops.chunk_size("auto", 4096, 4096) is None
    assert knl_ops.chunk_size("auto", 4097, 4096) == 1024
    assert knl_ops.chunk_size("auto", 10**6, 10**6) == 32  # never less
    assert knl_ops.chunk_size("auto", 5, None) == knl_ops.chunk_size("auto", None, None) == 1024
    assert knl_ops.chunk_size("auto", None, 4096) == 1024  # the keys alone bound the rows
    assert knl_ops.chunk_size(8, 8, 5) is None  # one chunk is no chunk
    assert knl_ops.chunk_size(8, 9, 5) == 8
    assert knl_ops.chunk_size(None, 10**9, 10**9) is None
    monkeypatch.setattr(knl_ops, "AUTO_MAX_SCORES", 100)
    calls = []

    def spy(attend, theta, chunk, original=knl_ops._by_chunks):
        calls.append(chunk)
        return original(attend, theta, chunk)

    monkeypatch.setattr(knl_ops, "_by_chunks", spy)
    arguments = make_arguments(rng, "gaussian", 70, 5)
    y = knl_ops.non_local(**arguments, pairwise="gaussian")
    assert calls == [32]  # 70 rows are 24, 24 and 22
    assert_close(y, reference.non_local(**arguments, pairwise="gaussian"), 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pairwise": "euclid"},
            r"`pairwise` must be one of 'gaussian'.*Received: pairwise='euclid'",
        ),
        ({"scale": "cube"}, r"`scale` must be .*Received: scale='cube'"),
        ({"scale": True}, r"`scale` must be .*Received: scale=True"),
        ({"query_chunk_size": 0}, r"`query_chunk_size` must be .*Received: query_chunk_size=0"),
        ({"query_chunk_size": True}, r"`query_chunk_size` must.*Received: query_chunk_size=True"),
        ({"query_chunk_size": 2.0}, r"`query_chunk_size` must.*Received: query_chunk_size=2.0"),
        ({"query_chunk_size": "all"}, r"`query_chunk_size` must.*Received: query_chunk_size='all'"),
    ],
)
def test_errors(options, message):
    x = np.zeros((1, 3, 2), "float32")
    with pytest.raises(ValueError, match=message):
        knl_ops.non_local(x, x, x, **options)


def test_the_table_is_complete():
    assert set(knl_ops.PAIRWISE) == set(PAIRWISE)


@pytest.mark.parametrize("pairwise", ["dot_product", "concatenation"])
def test_half_precision_with_many_keys(pairwise):
    """1 / M is below the normal numbers of float16 here, and the sum over M is above its largest."""
    rng = np.random.default_rng(0)
    arguments = make_arguments(rng, pairwise, num_queries=1, num_keys=30_000, batch=1)
    arguments["g"] = np.abs(arguments["g"]) * 0.01  # so that the sum does not cancel
    expected = reference.non_local(**arguments, pairwise=pairwise)
    half = {name: value.astype("float16") for name, value in arguments.items()}
    actual = knl_ops.non_local(**half, pairwise=pairwise, query_chunk_size=None)
    assert dtype_of(actual) == "float16"
    assert_close(actual, expected, 0.02)


def test_score_kernel_is_checked():
    arguments = make_arguments(np.random.default_rng(0), "concatenation")
    kernel = arguments.pop("score_kernel")
    for function in (knl_ops.non_local, knl_ops.attention_weights):
        tensors = arguments if function is knl_ops.non_local else {k: arguments[k] for k in ("theta", "phi")}
        with pytest.raises(ValueError, match=r"shape \(6, 1\).*Received: score_kernel.shape=None"):
            function(**tensors, pairwise="concatenation")
        with pytest.raises(ValueError, match=r"Received: score_kernel.shape=\(5, 1\)"):
            function(**tensors, pairwise="concatenation", score_kernel=kernel[:5])
        with pytest.raises(ValueError, match=r"Only the concatenation.*Received: score_kernel.shape=\(6, 1\)"):
            function(**tensors, pairwise="dot_product", score_kernel=kernel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"theta": (6, 4)},
            r"`theta` must have .* \(batch, queries, channels\).*Received: theta.shape=\(6, 4\)",
        ),
        ({"phi": (2, 5, 3)}, r"here \(2, 5, 4\)\. Received: phi.shape=\(2, 5, 3\)"),
        ({"phi": (1, 5, 4)}, r"here \(2, keys, 4\)\. Received: phi.shape=\(1, 5, 4\)"),
        ({"g": (2, 6, 4)}, r"here \(2, 5, value_channels\)\. Received: g.shape=\(2, 6, 4\)"),
        (
            {"mask": (2, 6)},
            r"`mask` must have .* \(batch, keys\), here \(2, 5\)\. Received: mask.shape=\(2, 6\)",
        ),
    ],
)
def test_shapes_are_checked(changes, message):
    shapes = {"theta": (2, 6, 4), "phi": (2, 5, 4), "g": (2, 5, 7), "mask": (2, 5)}
    tensors = {name: np.ones(shape, "float32") for name, shape in (shapes | changes).items()}
    tensors["mask"] = tensors["mask"] > 0
    with pytest.raises(ValueError, match=message):
        knl_ops.non_local(**tensors)
    if "g" not in changes:
        del tensors["g"]
        with pytest.raises(ValueError, match=r"Received: "):
            knl_ops.attention_weights(**tensors)


def test_symbolic_tensors_are_refused():
    x = keras.Input((None, 4))
    with pytest.raises(ValueError, match=r"`theta` must be an array or tensor; .* Received: theta=<KerasTensor"):
        knl_ops.non_local(x, x, x)
