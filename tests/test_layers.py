"""Whole blocks against the float64 twin, and everything a block promises."""

import dataclasses
import itertools
import re

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_nonlocal import NonLocal1D, NonLocal2D, NonLocal3D
from keras_nonlocal import ops as knl_ops
from tests import reference
from tests.backends import assert_close, assert_equal, gradients, to_numpy, weight_gradients
from tests.descriptors import layer_weights, randomise

PAIRWISE = ("gaussian", "embedded_gaussian", "euclidean_gaussian", "dot_product", "concatenation")
SHAPES = {NonLocal1D: (2, 8, 5), NonLocal2D: (2, 4, 6, 5), NonLocal3D: (2, 4, 4, 3, 5)}
SETTINGS = {
    NonLocal1D: [
        {},
        {"pool_size": 2},
        {"pool_size": 3},  # 8 = 3 + 3 + 2: the rest is dropped
        {"window": 4},
        {"window": 4, "pool_size": 2},
    ],
    NonLocal2D: [
        {},
        {"pool_size": 2},
        {"pool_size": (3, 1)},
        {"window": (2, None)},
        {"window": (None, 3), "pool_size": (2, 2)},
        {"pool_size": (2, 1), "pool_after_projection": True},
    ],
    NonLocal3D: [
        {},
        {"pool_size": (1, 2, 2)},
        {"pool_size": (2, 1, 3)},
        {"window": (1, None, None)},
        {"window": (None, 1, 1)},
        {"window": (2, 2, 3), "pool_size": (2, 1, 2)},
        {"window": (2, None, None), "pool_size": (1, 2, 2), "pool_after_projection": True},
    ],
}
CASES = [(cls, setting) for cls, settings in SETTINGS.items() for setting in settings]
CASE_IDS = [f"{cls.__name__}-{setting}" for cls, setting in CASES]


def make_layer(cls, seed=0, shape=None, **options):
    layer = cls(**options)
    layer.build(shape or SHAPES[cls])
    return randomise(layer, seed)


def make_inputs(rng, cls):
    return rng.normal(size=SHAPES[cls]).astype("float32")


def make_mask(rng, cls):
    """Random, with a whole pooling cell, a whole window and most of a sample invalid."""
    mask = rng.random(SHAPES[cls][:-1]) < 0.6
    mask[0, :2] = False
    mask[1] = False
    mask[1, 2] = True
    return mask


def twin_options(options):
    return {k: v for k, v in options.items() if k in ("pool_size", "window", "scale", "pool_after_projection")}


def as_twin(cls, options):
    """The options with an integer spelled out per dimension."""
    options = twin_options(options)
    for name in ("pool_size", "window"):
        if isinstance(options.get(name), int):
            options[name] = (options[name],) * cls.rank
    return options


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize(("cls", "setting"), CASES, ids=CASE_IDS)
def test_block(rng, monkeypatch, cls, setting, pairwise, masked):
    x = make_inputs(rng, cls)
    mask = make_mask(rng, cls) if masked else None
    layer = make_layer(cls, pairwise=pairwise, **setting)
    expected = reference.block(x, layer_weights(layer), pairwise, mask=mask, **as_twin(cls, setting))
    assert np.abs(expected - x).max() > 0.1  # something happened
    assert_close(layer(x, mask=mask), expected)
    chunks = make_layer(cls, pairwise=pairwise, query_chunk_size=5, **setting)
    assert_close(chunks(x, mask=mask), expected)
    if layer.function.linear:  # maps of this size take one of the forms only
        linear = dataclasses.replace(layer.function, is_linear_cheaper=lambda *sizes: True)
        monkeypatch.setitem(knl_ops.PAIRWISE, pairwise, linear)
        assert_close(layer(x, mask=mask), expected)


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize(("cls", "setting"), CASES, ids=CASE_IDS)
def test_gradients_of_a_block(rng, cls, setting, pairwise):
    """To the inputs and to every weight, in a random direction, against the twin's difference quotient."""
    x, mask = make_inputs(rng, cls), make_mask(rng, cls)
    layer = make_layer(cls, pairwise=pairwise, query_chunk_size=5, **setting)
    cotangent = rng.normal(size=x.shape).astype("float32")
    _, (d_x,) = gradients(lambda x: ops.multiply(layer(x, mask=mask), cotangent), [x])
    _, d_weights = weight_gradients(layer, lambda z: ops.sum(ops.multiply(z, cotangent)), x, mask=mask)
    weights = layer_weights(layer)
    d_weights = {
        tuple(weight.path.split("/")[-2:]): gradient
        for weight, gradient in zip(layer.trainable_weights, d_weights, strict=True)
    }

    def loss(x, weights):
        return np.sum(reference.block(x, weights, pairwise, mask=mask, **as_twin(cls, setting)) * cotangent)

    def assert_slope(gradient, value, moved):
        direction = rng.normal(size=np.shape(value))
        ends = [loss(*moved(np.float64(value) + sign * 1e-6 * direction)) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(np.sum(np.float64(gradient) * direction) - slope) <= 1e-4 * np.linalg.norm(gradient) + 1e-5

    assert_slope(d_x, x, lambda x: (x, weights))
    for part in set(weights) - {"score_kernel"}:
        for index, name in enumerate(("gamma", "beta") if part == "norm" else ("kernel", "bias")):

            def moved(value, part=part, index=index):
                return x, weights | {part: [*weights[part][:index], value, *weights[part][index + 1 :]]}

            assert_slope(d_weights[part, name], weights[part][index], moved)
    if "score_kernel" in weights:
        name = next(key for key in d_weights if key[-1] == "score_kernel")
        assert_slope(d_weights[name], weights["score_kernel"], lambda value: (x, weights | {"score_kernel": value}))


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": None},
        {"scale": "sqrt"},
        {"scale": 0.25, "inner_channels": 3},
        {"query_chunk_size": 5},
        {"query_chunk_size": 5, "window": (2, None, None), "pool_size": (1, 2, 1)},
    ],
)
def test_block_options(rng, options):
    x = make_inputs(rng, NonLocal3D)
    layer = make_layer(NonLocal3D, **options)
    expected = reference.block(x, layer_weights(layer), "embedded_gaussian", **as_twin(NonLocal3D, options))
    assert_close(layer(x), expected)


def test_inner_channels():
    for channels, inner_channels, expected in ((6, None, 3), (7, None, 3), (1, None, 1), (6, 9, 9)):
        layer = NonLocal1D(inner_channels=inner_channels)
        layer.build((None, 4, channels))
        assert layer.theta.kernel.shape == (channels, expected)
        assert layer.out.kernel.shape == (expected, channels)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalization", ["batch", None])
@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("cls", SHAPES)
def test_identity_at_the_start(rng, cls, pairwise, normalization, training):
    x = make_inputs(rng, cls)
    layer = cls(pairwise=pairwise, normalization=normalization)
    assert_equal(layer(x, training=training), x)


def test_no_two_projections_start_equal():
    for initializer in ("he_normal", keras.initializers.RandomNormal(stddev=0.01)):
        layer = NonLocal2D(inner_channels=4, kernel_initializer=initializer)
        layer.build((None, 3, 3, 4))
        kernels = [np.asarray(part.kernel) for part in (layer.theta, layer.phi, layer.g, layer.out)]
        for a, b in itertools.combinations(kernels, 2):
            assert not np.isclose(a, b).any()


def test_initializers():
    layer = NonLocal2D(
        pairwise="concatenation",
        normalization=None,
        kernel_initializer="ones",
        bias_initializer=keras.initializers.Constant(2.0),
    )
    layer.build((None, 3, 3, 4))
    for part in (layer.theta, layer.phi, layer.g):
        assert (np.asarray(part.kernel) == 1).all() and (np.asarray(part.bias) == 2).all()
    assert (np.asarray(layer.score_kernel) == 1).all()
    assert (np.asarray(layer.out.kernel) == 0).all()


def test_regularizer(rng):
    layer = make_layer(NonLocal1D, pairwise="concatenation", kernel_regularizer=keras.regularizers.L2(0.5))
    layer(make_inputs(rng, NonLocal1D))
    kernels = [layer.theta.kernel, layer.phi.kernel, layer.g.kernel, layer.out.kernel]
    kernels.append(layer.score_kernel)
    expected = sum(0.5 * np.sum(np.square(np.asarray(kernel))) for kernel in kernels)
    np.testing.assert_allclose(to_numpy(sum(layer.losses)), expected, rtol=1e-5)
    assert len(layer.losses) == 5


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize(("cls", "setting"), [case for case in CASES if "window" in case[1]])
def test_windows_are_layers_of_their_own(rng, cls, setting, pairwise):
    x = make_inputs(rng, cls)
    layer = make_layer(cls, pairwise=pairwise, **setting)
    z = to_numpy(layer(x))
    alone = cls(**(setting | {"window": None, "pairwise": pairwise}))
    window = layer.window
    sizes = [size if w is None else w for size, w in zip(x.shape[1:-1], window, strict=True)]
    alone.build((None, *sizes, x.shape[-1]))
    alone.set_weights(layer.get_weights())
    starts = [range(0, size, w) for size, w in zip(x.shape[1:-1], sizes, strict=True)]
    for start in itertools.product(*starts):
        part = (
            slice(None),
            *[slice(s, s + w) for s, w in zip(start, sizes, strict=True)],
        )
        assert_close(z[part], alone(x[part]), 1e-6)


def test_mask_of_time(rng):
    x = make_inputs(rng, NonLocal3D)
    time = np.array([[True, True, False, False], [True, False, True, True]])
    full = np.broadcast_to(time[:, :, None, None], x.shape[:-1])
    layer = make_layer(NonLocal3D, pool_size=(2, 2, 1))
    expected = layer(x, mask=full)
    assert_equal(layer(x, mask=time), expected)
    rows = np.broadcast_to(time[:, :, None], x.shape[:-2])
    assert_equal(layer(x, mask=rows), expected)
    assert_equal(layer(x, mask=time.astype("float32")), expected)
    assert not np.allclose(to_numpy(layer(x)), to_numpy(expected))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
@pytest.mark.parametrize(("cls", "setting"), CASES, ids=CASE_IDS)
def test_masked_positions_have_no_influence(rng, cls, setting, pairwise, training):
    """Neither as keys, nor through pooling, nor through the statistics of the batch."""
    x = make_inputs(rng, cls)
    mask = make_mask(rng, cls)
    other = x.copy()
    other[~mask] = 1e3 * rng.normal(size=other[~mask].shape)
    results = []
    for inputs in (x, other):
        layer = make_layer(cls, pairwise=pairwise, **setting)
        z = to_numpy(layer(inputs, mask=mask, training=training))
        statistics = [np.asarray(layer.norm.moving_mean), np.asarray(layer.norm.moving_variance)]
        results.append((z[mask], *statistics))
    for before, after in zip(*results, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_batch_statistics_of_valid_positions(rng):
    """The moving mean is 0.9 of the old one and 0.1 of the mean over valid positions."""
    x = make_inputs(rng, NonLocal2D)
    mask = make_mask(rng, NonLocal2D)
    layer = make_layer(NonLocal2D)
    weights = layer_weights(layer)
    gamma, beta, mean, variance = weights["norm"]
    neutral = [np.ones(5), np.zeros(5), np.zeros(5), np.ones(5) - 1e-5]
    z = reference.block(x, weights | {"norm": neutral}, "embedded_gaussian", mask=mask) - x
    valid = z[mask]
    layer(x, mask=mask, training=True)
    assert_close(layer.norm.moving_mean, 0.9 * mean + 0.1 * valid.mean(0))
    assert_close(layer.norm.moving_variance, 0.9 * variance + 0.1 * valid.var(0))


def all_queries(cls):
    return np.array(list(np.ndindex(*SHAPES[cls][1:-1])))


@pytest.mark.parametrize(("pairwise", "masked"), [(p, p in ("gaussian", "dot_product")) for p in PAIRWISE])
@pytest.mark.parametrize(("cls", "setting"), CASES, ids=CASE_IDS)
def test_attention(rng, cls, setting, pairwise, masked):
    x = make_inputs(rng, cls)
    mask = make_mask(rng, cls) if masked else None
    queries = rng.permutation(all_queries(cls))[:5]
    layer = make_layer(cls, pairwise=pairwise, **setting)
    weights = layer_weights(layer)
    expected = reference.block_attention(x, queries, weights, pairwise, mask=mask, **as_twin(cls, setting))
    assert_close(layer.attention(x, queries, mask=mask), expected)


@pytest.mark.parametrize("pairwise", ["gaussian", "concatenation"])
@pytest.mark.parametrize(("cls", "setting"), CASES, ids=CASE_IDS)
def test_attention_makes_the_outputs(rng, cls, setting, pairwise):
    x = make_inputs(rng, cls)
    layer = make_layer(cls, pairwise=pairwise, **setting)
    weights = layer_weights(layer)
    a = np.float64(to_numpy(layer.attention(x, all_queries(cls))))
    a = a.reshape(*a.shape[:2], -1)
    # g of the pooled map: windows of sizes that the pooling divides give the pooled map of all.
    options = as_twin(cls, setting)
    sizes = [s if w is None else w for s, w in zip(x.shape[1:-1], layer.window or (None,) * 9, strict=False)]
    pool_size = options.get("pool_size", (1,) * cls.rank)
    parts = x
    for axis, (size, p) in enumerate(zip(sizes, pool_size, strict=True), start=1):
        kept = np.arange(parts.shape[axis]) % size < size // p * p
        parts = np.compress(kept, parts, axis=axis)
    mask = np.ones(parts.shape[:-1], bool)
    after = layer.pool_after_projection
    g, _ = reference.keys_of(np.float64(parts), mask, weights, "g", pool_size, after)
    g = g.reshape(len(x), -1, g.shape[-1])
    z = reference.batch_norm(reference.dense(a @ g, weights["out"]), weights["norm"])
    assert_close(layer(x), z.reshape(x.shape) + x, 2e-5)


@st.composite
def any_blocks(draw):
    """Sizes down to 1, batches down to 0, and whatever fits them."""
    cls = draw(st.sampled_from(tuple(SHAPES)))
    largest = {1: 9, 2: 4, 3: 3}[cls.rank]
    sizes = draw(st.tuples(*[st.integers(1, largest)] * cls.rank))
    window = [draw(st.sampled_from([None, *(w for w in range(1, n + 1) if n % w == 0)])) for n in sizes]
    pool_size = [draw(st.integers(1, min(w or n, 3))) for w, n in zip(window, sizes, strict=True)]
    options = {
        "pairwise": draw(st.sampled_from(PAIRWISE)),
        "window": draw(st.sampled_from([None, tuple(window)])),
        "pool_size": draw(st.sampled_from([None, tuple(pool_size)])),
        "scale": draw(st.sampled_from([None, "sqrt"])),
        "query_chunk_size": draw(st.sampled_from([None, "auto", 1, 4])),
        "inner_channels": draw(st.sampled_from([None, 1, 3])),
        "pool_after_projection": draw(st.booleans()),
    }
    return cls, options, (draw(st.integers(0, 3)), *sizes, draw(st.integers(1, 4)))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(block=any_blocks(), masked=st.booleans(), seed=st.integers(0, 2**16))
@example((NonLocal1D, {"pairwise": "gaussian"}, (0, 5, 2)), False, 0)
@example((NonLocal2D, {"pool_size": 2, "query_chunk_size": 1}, (0, 4, 4, 2)), True, 0)
@example((NonLocal3D, {"window": 1, "pairwise": "dot_product"}, (0, 2, 1, 3, 2)), True, 0)
def test_any_shape(block, masked, seed):
    cls, options, shape = block
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype("float32")
    mask = rng.random(shape[:-1]) < 0.6 if masked else None
    layer = make_layer(cls, shape=shape, **options)
    weights, pairwise, options = layer_weights(layer), layer.pairwise, as_twin(cls, options)
    assert_close(layer(x, mask=mask), reference.block(x, weights, pairwise, mask=mask, **options), 2e-5)
    queries = rng.integers(0, shape[1:-1], (3, cls.rank))
    expected = reference.block_attention(x, queries, weights, pairwise, mask=mask, **options)
    assert_close(layer.attention(x, queries, mask=mask), expected, 2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_one_headed_attention_of_keras(rng, masked):
    """An embedded Gaussian without normalization is a residual `MultiHeadAttention` of one head, weight for weight."""
    x = make_inputs(rng, NonLocal1D)
    mask = make_mask(rng, NonLocal1D) if masked else None
    layer = make_layer(NonLocal1D, normalization=None, scale="sqrt", inner_channels=3)
    peer = keras.layers.MultiHeadAttention(num_heads=1, key_dim=3)
    peer.build(x.shape, x.shape)
    names = {"query": layer.theta, "key": layer.phi, "value": layer.g, "attention_output": layer.out}
    for weight in peer.weights:
        *_, name, kind = weight.path.split("/")
        weight.assign(ops.reshape(getattr(names[name], kind), weight.shape))
    expected = peer(x, x, attention_mask=None if mask is None else mask[:, None, :])
    assert_close(to_numpy(layer(x, mask=mask)) - x, expected)


def test_attention_channels_first(rng):
    x = make_inputs(rng, NonLocal2D)
    queries = [[0, 0], [3, 5], [2, 1]]
    layer = make_layer(NonLocal2D, window=(2, None), pool_size=(1, 2))
    expected = layer.attention(x, queries)
    first = NonLocal2D(window=(2, None), pool_size=(1, 2), data_format="channels_first")
    first.build((None, 5, 4, 6))
    first.set_weights(layer.get_weights())
    assert_equal(first.attention(np.moveaxis(x, -1, 1), queries), expected)


def test_attention_builds_the_layer(rng):
    layer = NonLocal1D()
    weights = layer.attention(make_inputs(rng, NonLocal1D), [[0]])
    np.testing.assert_allclose(to_numpy(weights).sum(-1), 1.0, rtol=1e-6)


def test_sequential(rng):
    model = keras.Sequential([keras.Input((4, 4, 4, 2)), keras.layers.Conv3D(3, 1)])
    model.add(NonLocal3D())
    x = rng.normal(size=(2, 4, 4, 4, 2)).astype("float32")
    assert_equal(model(x), model.layers[0](x))
    deferred = keras.Sequential()
    deferred.add(NonLocal3D(pool_size=2))
    assert_equal(deferred(x), x)


def test_fit_with_a_mask_from_masking(rng):
    model = keras.Sequential(
        [
            keras.Input((6, 3)),
            keras.layers.Masking(),
            NonLocal1D(),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    x = rng.normal(size=(8, 6, 3)).astype("float32")
    x[:, 4:] = 0.0  # masked
    seen = []
    layer = model.layers[1]
    call = layer.call

    def spy(inputs, mask=None, training=None):
        seen.append(mask)
        return call(inputs, mask=mask, training=training)

    layer.call = spy
    model.compile("sgd", "mse", run_eagerly=True)
    before = [w.copy() for w in model.get_weights()]
    model.fit(x, np.ones((8, 1)), epochs=2, batch_size=8, verbose=0)
    assert_equal(seen[-1], (x != 0).any(-1))  # the first ones may be symbolic
    assert np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
    # The mask goes on to the pooling: the layer supports masking.
    assert layer.supports_masking


X3 = np.zeros((2, 4, 4, 4, 6), "float32")


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (
            NonLocal1D,
            {"pairwise": "euclid"},
            r"`pairwise` must be one of 'gaussian', 'embedded_.*'\. Received: pairwise='euclid'",
        ),  # noqa: E501
        (
            NonLocal1D,
            {"inner_channels": 0},
            r"`inner_channels` must be .*Received: inner_channels=0",
        ),
        (NonLocal1D, {"inner_channels": 2.0}, r"`inner_channels` .*Received: inner_channels=2.0"),
        (NonLocal1D, {"inner_channels": True}, r"`inner_channels` .*Received: inner_channels=True"),
        (NonLocal1D, {"scale": "cube"}, r"`scale` must be .*Received: scale='cube'"),
        (
            NonLocal1D,
            {"normalization": "layer"},
            r"`normalization` .*Received: normalization='layer'",
        ),
        (NonLocal1D, {"query_chunk_size": 0}, r"`query_chunk_size` .*Received: query_chunk_size=0"),
        (NonLocal1D, {"data_format": "last"}, r"`data_format` must .*Received: data_format='last'"),
        (
            NonLocal3D,
            {"pool_size": (1, 2)},
            r"`pool_size` .* 3 integers.*Received: pool_size=\(1, 2\)",
        ),
        (NonLocal3D, {"pool_size": 0}, r"`pool_size` must be .*Received: pool_size=0"),
        (
            NonLocal3D,
            {"pool_size": (1, None, 1)},
            r"`pool_size`.*Received: pool_size=\(1, None, 1\)",
        ),
        (NonLocal3D, {"pool_size": True}, r"`pool_size` must be .*Received: pool_size=True"),
        (
            NonLocal3D,
            {"window": (1, None)},
            r"`window` .* or `None`\. Received: window=\(1, None\)",
        ),
        (NonLocal3D, {"window": "space"}, r"`window` must be .*Received: window='space'"),
        (NonLocal2D, {"window": 2.5}, r"`window` must be .*Received: window=2.5"),
    ],
)
def test_constructor_errors(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        (
            {"window": (3, None, None)},
            (2, 4, 4, 4, 6),
            r"`window` must divide .*\(4, 4, 4\)\. Received: window=\(3, None, None\)",
        ),  # noqa: E501
        (
            {"pool_size": (1, 5, 1)},
            (2, 4, 4, 4, 6),
            r"`pool_size` must not be larger .*\(4, 4, 4\).*Received: pool_size=\(1, 5, 1\)",
        ),  # noqa: E501
        (
            {"pool_size": 2, "window": (1, None, None)},
            (2, 4, 4, 4, 6),
            r"window \(\(1, None, None\)\)\. Received: pool_size=\(2, 2, 2\)",
        ),  # noqa: E501
        (
            {"pool_size": 2, "window": (1, None, None)},
            (None, None, None, None, 6),
            r"Received: pool_size=\(2, 2, 2\)",
        ),  # noqa: E501
        (
            {},
            (2, 4, 4, 6),
            r"`NonLocal3D` expects inputs of rank 5.*Received: input_shape=\(2, 4, 4, 6\)",
        ),  # noqa: E501
        (
            {},
            (2, 4, 4, 4, None),
            r"channels must be known.*Received: input_shape=\(2, 4, 4, 4, None\)",
        ),
        (
            {"data_format": "channels_first"},
            (2, None, 4, 4, 4),
            r"channels must be known.*Received: ",
        ),
    ],
)
def test_shape_errors(options, shape, message):
    with pytest.raises(ValueError, match=message):
        NonLocal3D(**options).build(shape)
    with pytest.raises(ValueError, match=message):
        NonLocal3D(**options).compute_output_shape(shape)
    with pytest.raises(ValueError, match=message):
        NonLocal3D(**options)(keras.KerasTensor(shape))


@pytest.mark.parametrize("options", [{"window": 3}, {"pool_size": (1, 1, 5)}])
def test_shape_errors_of_a_layer_built_for_any_size(options):
    layer = NonLocal3D(**options)
    layer.build((None, None, None, None, 6))
    with pytest.raises(ValueError, match="Received"):
        layer(X3)
    with pytest.raises(ValueError, match="Received"):
        layer.attention(X3, [[0, 0, 0]])


def test_other_inputs_than_built_for():
    layer = NonLocal3D()
    layer(X3)
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(X3[..., :4])


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 4, 3), (2, 4, 4, 4, 6), (3, 4)])
def test_mask_errors(shape):
    message = r"`mask` must have .*\(2, 4, 4, 4\) or \(2, 4\)\. Received: mask.shape="
    message += re.escape(str(shape))
    with pytest.raises(ValueError, match=message):
        NonLocal3D()(X3, mask=np.ones(shape, bool))
    with pytest.raises(ValueError, match=message):
        NonLocal3D().attention(X3, [[0, 0, 0]], mask=np.ones(shape, bool))


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (
            [0, 0, 0],
            r"`queries` must be integers of shape \(num_queries, 3\)\. Received: queries=array",
        ),
        ([[0, 0]], r"`queries` must be integers of shape \(num_queries, 3\)\. Received: queries="),
        ([[0.0, 0.0, 0.0]], r"`queries` must be integers .*Received: queries="),
        (
            [[0, 4, 0]],
            r"`queries` must lie inside .*\(4, 4, 4\).*Received: queries=\[\[0, 4, 0\]\]",
        ),
        ([[0, 0, -1]], r"`queries` must lie inside .*Received: queries=\[\[0, 0, -1\]\]"),
    ],
)
def test_query_errors(queries, message):
    with pytest.raises(ValueError, match=message):
        NonLocal3D().attention(X3, queries)


def test_block_that_is_not_trainable_does_not_train():
    """What counts is the model's list of weights, not the layer's."""
    model = keras.Sequential([keras.Input((4, 8)), NonLocal1D(trainable=False), keras.layers.Dense(1, name="head")])
    assert [weight.path.split("/")[-2] for weight in model.trainable_variables] == ["head", "head"]
    for weight in model.layers[0].weights:
        weight.assign(np.full(weight.shape, 0.1, "float32"))
    before = [np.array(weight) for weight in model.layers[0].weights]
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 4, 8), "float32"), np.zeros((2, 4, 1), "float32"), verbose=0)
    for old, weight in zip(before, model.layers[0].weights, strict=True):
        assert np.array_equal(old, weight)


@pytest.mark.parametrize("initializer", [keras.initializers.HeNormal(seed=1), lambda shape, dtype: np.ones(shape)])
def test_seeded_initializers_and_functions(initializer):
    layer = NonLocal1D(kernel_initializer=initializer)
    layer.build((None, 4, 8))
    theta, phi, g = (np.asarray(getattr(layer, name).kernel) for name in ("theta", "phi", "g"))
    if callable(initializer) and not isinstance(initializer, keras.Initializer):
        assert (theta == 1).all()
    else:
        assert np.abs(theta - phi).min() > 0 and np.abs(phi - g).min() > 0
