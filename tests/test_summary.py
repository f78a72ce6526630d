"""What models cost: the numbers of architecture.md and of the paper, and small networks counted by hand."""

import dataclasses

import keras
import numpy as np
import pytest

from keras_nonlocal import applications, layers
from keras_nonlocal.applications import C2DResNet11, insert_non_local, resnet, summarize
from keras_nonlocal.applications.summary import PRODUCTS
from tests.descriptors import summary

SHORT = {"input_shape": (8, 224, 224, 3)}
LONG = {"input_shape": (32, 224, 224, 3), "temporal_strides": (2, 2, 2)}  # the paper's stem


def of(name, non_local, clip, **options):
    # name="model" as in test_conformance and test_applications, so that the same network is built once for all.
    return summary(getattr(applications, name), name="model", non_local=non_local, **clip, **options)


# 400 classes, 224²: millions of parameters, GMACs of 8 frames and of 32; then of 8 frames MiB of activations, and the
# blocks' shares of parameters, GMACs and activations. As README prints them: tests/test_docs.py compares.
TABLE = [
    ("C2DResNet50", 0, {}, "24.33", "19.29", "20.23", "851", "–"),
    ("C2DResNet50", 5, {}, "31.69", "27.42", "28.36", "968", "23 / 30 / 12 %"),
    ("I3DResNet50", 0, {}, "28.04", "28.11", "32.83", "854", "–"),
    ("I3DResNet50", 5, {}, "35.40", "36.24", "40.96", "971", "21 / 22 / 12 %"),
    ("I3DResNet50", 10, {}, "42.76", "44.36", "49.09", "1088", "34 / 37 / 22 %"),
    ("C2DResNet101", 0, {}, "43.32", "34.14", "35.08", "1137", "–"),
    ("C2DResNet101", 5, {}, "50.68", "42.27", "43.21", "1254", "15 / 19 / 9 %"),
    ("I3DResNet101", 0, {}, "51.75", "46.66", "51.38", "1140", "–"),
    ("I3DResNet101", 5, {}, "59.11", "54.79", "59.51", "1257", "12 / 15 / 9 %"),
    ("I3DResNet101", 0, {"inflation": "3x3x3"}, "63.04", "57.14", "61.86", "1145", "–"),
]
# What no other test of the plain run builds, and other lengths of clips.
SLOW = ("34.14", "46.66", "57.14", "59.51", "42.27", "32.83", "49.09", "40.96", "28.36")
CASES = [
    pytest.param(
        *(name, non_local, options, parameters, clip, macs, memory),
        marks=[pytest.mark.slow] if macs in SLOW else [],
        id=f"{name}-{non_local}-{macs}",
    )
    for name, non_local, options, parameters, short, long, *memory in TABLE
    for clip, macs, memory in ((SHORT, short, memory), (LONG, long, None))
]


@pytest.mark.parametrize(("name", "non_local", "options", "parameters", "clip", "macs", "memory"), CASES)
def test_sizes(name, non_local, options, parameters, clip, macs, memory):
    model = of(name, non_local, clip, **options)
    sizes = model["sizes"]
    assert f"{sizes.parameters / 1e6:.2f}" == parameters
    assert f"{sizes.macs / 1e9:.2f}" == macs
    assert sizes.parameters == model["trainable"]
    assert sizes.not_counted == ()
    blocks = [row for row in sizes.rows if row.kind == "NonLocal3D"]
    assert len(blocks) == non_local
    fields = ("parameters", "macs", "activation_bytes")
    of_blocks = [sum(getattr(row, field) for row in blocks) for field in fields]
    assert [getattr(sizes, f"non_local_{field}") for field in fields] == of_blocks
    if memory is not None:
        activations, shares = memory
        assert f"{sizes.activation_bytes / 2**20:.0f}" == activations
        percent = [f"{100 * part / getattr(sizes, field):.0f}" for part, field in zip(of_blocks, fields, strict=True)]
        assert (" / ".join(percent) + " %" if blocks else "–") == shares


def test_ratios_of_the_paper():
    """Table 2e: parameters and FLOPs relative to C2D ResNet-101, 32 frames."""
    base = of("C2DResNet101", 0, LONG)["sizes"]
    for name, non_local, options, parameters, flops in (
        ("I3DResNet101", 0, {"inflation": "3x3x3"}, ("1.46", "1.5"), ("1.76", "1.8")),
        ("I3DResNet101", 0, {}, ("1.19", "1.2"), ("1.46", "1.5")),
        ("C2DResNet101", 5, {}, ("1.17", "1.2"), ("1.23", "1.2")),
    ):
        sizes = of(name, non_local, LONG, **options)["sizes"]
        for ratio, expected in ((sizes.parameters / base.parameters, parameters), (sizes.macs / base.macs, flops)):
            assert (f"{ratio:.2f}", f"{ratio:.1f}") == expected  # README's, the paper's


@pytest.mark.parametrize(("channels", "expected"), [(512, 526_592), (1024, 2_101_760)])
def test_parameters_of_one_block(channels, expected):
    inputs = keras.Input((4, 14, 14, channels))
    model = keras.Model(inputs, layers.NonLocal3D(**resnet.RELEASE_OPTIONS)(inputs))
    sizes = summarize(model)
    assert sizes.parameters == sizes.non_local_parameters == expected


# Counted by hand


def test_layers_by_hand():
    """Every kind of layer: entries of the outputs times the products of each."""
    layers_of_2d = [  # (layer, output shape, parameters, multiply-adds)
        (keras.layers.Conv2D(8, 3, strides=2, padding="same"), (5, 6, 8), 9 * 4 * 8 + 8, 30 * 8 * 9 * 4),
        (keras.layers.Conv2D(12, (1, 3), groups=2), (5, 4, 12), 3 * 4 * 12 + 12, 20 * 12 * 3 * 4),
        (keras.layers.BatchNormalization(), (5, 4, 12), 24, 0),
        (keras.layers.DepthwiseConv2D(3, depth_multiplier=2), (3, 2, 24), 9 * 24 + 24, 6 * 24 * 9),
        (keras.layers.SeparableConv2D(5, 2, padding="same"), (3, 2, 5), 4 * 24 + 24 * 5 + 5, 6 * 24 * 4 + 6 * 24 * 5),
        (keras.layers.Conv2DTranspose(2, 4, strides=2, padding="same"), (6, 4, 2), 16 * 5 * 2 + 2, 6 * 16 * 5 * 2),
        (keras.layers.MaxPooling2D(2), (3, 2, 2), 0, 0),
        (keras.layers.Dense(7, use_bias=False), (3, 2, 7), 14, 6 * 14),
        (keras.layers.EinsumDense("bhwx,wxy->bhy", output_shape=(3, 4)), (3, 4), 2 * 7 * 4, 3 * 2 * 7 * 4),
        (keras.layers.EinsumDense("...x,xy->...y", output_shape=5, bias_axes="y"), (3, 5), 4 * 5 + 5, 3 * 4 * 5),
        (keras.layers.Conv1D(6, 2), (2, 6), 2 * 5 * 6 + 6, 2 * 6 * 2 * 5),
        (keras.layers.Conv1DTranspose(3, 2, strides=2), (4, 3), 2 * 6 * 3 + 3, 2 * 2 * 6 * 3),
        (keras.layers.DepthwiseConv1D(2), (3, 3), 2 * 3 + 3, 3 * 3 * 2),
        (keras.layers.SeparableConv1D(2, 3), (1, 2), 3 * 3 + 6 + 2, 9 + 6),
        (keras.layers.LayerNormalization(), (1, 2), 4, 0),
        (keras.layers.Reshape((1, 1, 1, 2)), (1, 1, 1, 2), 0, 0),
        (keras.layers.Conv3D(4, (2, 3, 1), padding="same"), (1, 1, 1, 4), 6 * 8 + 4, 6 * 8),
        (keras.layers.Conv3DTranspose(2, 2, strides=2), (2, 2, 2, 2), 8 * 8 + 2, 8 * 8),
        (keras.layers.TimeDistributed(keras.layers.Conv2D(3, 2)), (2, 1, 1, 3), 4 * 6 + 3, 2 * 3 * 4 * 2),
    ]
    inputs = x = keras.Input((10, 12, 4))
    for layer, *_ in layers_of_2d:
        x = layer(x)
    sizes = summarize(keras.Model(inputs, x))
    expected = [tuple(numbers) for _, *numbers in layers_of_2d]
    assert [(row.output_shape, row.parameters, row.macs) for row in sizes.rows] == expected
    assert sizes.not_counted == ()
    assert sizes.parameters == sum(parameters for _, parameters, _ in expected)
    assert sizes.macs == sum(macs for _, _, macs in expected)
    assert sizes.activation_bytes == 4 * sum(int(np.prod(shape)) for shape, _, _ in expected)
    assert sizes.non_local_macs == sizes.non_local_parameters == sizes.non_local_activation_bytes == 0


# A map of 4×6×8 positions with 6 channels: 192 queries, and the inner channels are 3.
QUERIES, CHANNELS, INNER = 192, 6, 3
PROJECTION = CHANNELS * INNER
# Every block has the weighted sum, W_z's outputs, its normalization and the block's outputs.
ALWAYS = QUERIES * (INNER + 3 * CHANNELS)
BLOCKS = {  # options → multiply-adds, entries of activations
    "plain": ({}, 4 * QUERIES * PROJECTION + QUERIES**2 * 6, ALWAYS + 3 * QUERIES * INNER + QUERIES**2),
    "pool": (  # 4×3×4 keys
        {"pool_size": (1, 2, 2)},
        2 * QUERIES * PROJECTION + 2 * 48 * PROJECTION + QUERIES * 48 * 6,
        ALWAYS + 48 * CHANNELS + (QUERIES + 2 * 48) * INNER + QUERIES * 48,
    ),
    "pool_after": (
        {"pool_size": (1, 2, 2), "pool_after_projection": True},
        4 * QUERIES * PROJECTION + QUERIES * 48 * 6,
        ALWAYS + 2 * 48 * INNER + 3 * QUERIES * INNER + QUERIES * 48,
    ),
    "window": (  # 2 windows of 2×6×8 queries and 2×2×8 keys
        {"window": (2, None, None), "pool_size": (1, 3, 1)},
        2 * QUERIES * PROJECTION + 2 * 64 * PROJECTION + 2 * 96 * 32 * 6,
        ALWAYS + 64 * CHANNELS + (QUERIES + 2 * 64) * INNER + 2 * 96 * 32,
    ),
    "gaussian": (  # scores of x's own channels
        {"pairwise": "gaussian", "normalization": None},
        2 * QUERIES * PROJECTION + QUERIES**2 * (CHANNELS + INNER),
        ALWAYS - QUERIES * CHANNELS + QUERIES * INNER + QUERIES**2,
    ),
    "concatenation": (  # w_f has 6 entries; here scores are cheaper than sorting
        {"pairwise": "concatenation"},
        4 * QUERIES * PROJECTION + QUERIES**2 * (6 + INNER),
        ALWAYS + 3 * QUERIES * INNER + QUERIES**2,
    ),
    "dot_product": (  # no scores
        {"pairwise": "dot_product"},
        4 * QUERIES * PROJECTION + QUERIES**2 * 6,
        ALWAYS + 3 * QUERIES * INNER,
    ),
    "chunks": (
        {"query_chunk_size": 10},
        4 * QUERIES * PROJECTION + QUERIES**2 * 6,
        ALWAYS + 3 * QUERIES * INNER + 10 * QUERIES,
    ),
    "inner_channels": (
        {"inner_channels": 5},
        4 * QUERIES * 6 * 5 + QUERIES**2 * 10,
        ALWAYS + QUERIES * 2 + 3 * QUERIES * 5 + QUERIES**2,
    ),
}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_by_hand(name, data_format):
    options, macs, entries = BLOCKS[name]
    inputs = keras.Input((4, 6, 8, 6) if data_format == "channels_last" else (6, 4, 6, 8))
    sizes = summarize(keras.Model(inputs, layers.NonLocal3D(data_format=data_format, **options)(inputs)))
    assert sizes.macs == sizes.non_local_macs == macs
    assert sizes.activation_bytes == sizes.non_local_activation_bytes == 4 * entries


@pytest.mark.parametrize("options", [{"pool_size": 2}, {"pairwise": "gaussian"}, {"pairwise": "dot_product"}], ids=str)
def test_a_block_for_every_frame(options):
    """The same as a block whose windows are the frames."""
    inputs = keras.Input((4, 6, 8, 6))
    wrapped = keras.layers.TimeDistributed(layers.NonLocal2D(**options))
    frames = summarize(keras.Model(inputs, wrapped(inputs)))
    if "pool_size" in options:
        options = {"pool_size": (1, 2, 2)}
    windows = summarize(keras.Model(inputs, layers.NonLocal3D(window=(1, None, None), **options)(inputs)))
    fields = [field.name for field in dataclasses.fields(frames) if field.name not in ("name", "rows")]
    assert [getattr(frames, field) for field in fields] == [getattr(windows, field) for field in fields]
    assert frames.non_local_activation_bytes == frames.activation_bytes > 0
    nested = keras.layers.TimeDistributed(wrapped)
    inputs = keras.Input((3, 4, 6, 8, 6))
    assert summarize(keras.Model(inputs, nested(inputs))).non_local_macs == 3 * windows.macs


# Models


def test_unknown_sizes_and_inserted_blocks():
    """Sizes given later are those given at once; and a block in a network of Keras' own is counted."""
    early = summarize(C2DResNet11(input_shape=(8, 64, 64, 3)))
    model = C2DResNet11()
    late = summarize(model, (8, 64, 64, 3))
    assert late == early
    assert late != summarize(model, (8, 96, 64, 3))
    assert model.get_layer("conv1").output.shape[1:4] == (None, None, None)  # the model is as it was
    plain = C2DResNet11(non_local=0, input_shape=(8, 64, 64, 3))
    inserted = summarize(insert_non_local(plain, "res3_1_out", pool_size=(1, 2, 2)))
    built = summarize(C2DResNet11(non_local=1, input_shape=(8, 64, 64, 3)))
    fields = [field.name for field in dataclasses.fields(built) if field.name != "rows"]
    assert [getattr(inserted, field) for field in fields] == [getattr(built, field) for field in fields]
    assert built.macs - built.non_local_macs == summarize(plain).macs


def test_a_network_of_keras_applications():
    """MobileNetV2's authors count 300 million multiply-adds (arXiv 1801.04381, table 4)."""
    model = keras.applications.MobileNetV2(weights=None)
    sizes = summarize(model)
    assert sizes.macs == pytest.approx(300e6, rel=0.01)
    assert sizes.parameters == sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert sizes.not_counted == ()


def test_frozen_and_shared_layers_and_models_within():
    dense = keras.layers.Dense(3, name="dense")
    inner = keras.Sequential([keras.Input((5, 4)), dense, keras.layers.BatchNormalization(name="norm")], name="inner")
    outer_input = {"a": keras.Input((5, 4), name="a"), "b": keras.Input((5, 4), name="b")}
    pair = [inner(outer_input["a"]), inner(outer_input["b"])]
    model = keras.Model(outer_input, keras.ops.add(*pair), name="outer")
    model.trainable = False
    model.compile("sgd", "mse")
    sizes = summarize(model)
    names = ["inner/dense", "inner/norm"] * 2 + ["add"]
    assert [row.name for row in sizes.rows[:4]] == names[:4] and len(sizes.rows) == 5
    assert [row.parameters for row in sizes.rows] == [15, 6, 0, 0, 0]
    assert [row.macs for row in sizes.rows] == [60, 0, 60, 0, 0]
    assert sizes == summarize(model, [(5, 4), (5, 4)])


class Mystery(keras.layers.Layer):
    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), name="scale")

    def call(self, inputs):
        return inputs * self.scale


def test_what_is_not_counted_is_said():
    inputs = keras.Input((5, 4))
    x = Mystery(name="mystery")(inputs)
    x = keras.layers.MultiHeadAttention(2, 3, name="heads")(x, x)
    x = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1)))
    x = keras.layers.Dot(1, name="dot")([x, x])
    x = keras.layers.TimeDistributed(keras.layers.GRU(2), name="steps")(keras.layers.Reshape((5, 5, 1))(x))
    sizes = summarize(keras.Model(inputs, x))
    assert sizes.macs == 0
    assert sizes.not_counted[:2] == ("mystery", "heads") and sizes.not_counted[3:] == ("dot", "steps")
    assert sizes.not_counted[2].startswith("matmul")
    assert "not counted: mystery, heads" in str(sizes)
    assert sizes.rows[0].parameters == 4


def vector(x):
    return x[0, :, 0]


KERNEL = np.ones((2, 4, 4), "float32")
PRODUCT_OF = {
    "AdditiveAttention": lambda x: keras.layers.AdditiveAttention(use_scale=False)([x, x]),
    "Attention": lambda x: keras.layers.Attention()([x, x]),
    "Conv": lambda x: keras.ops.conv(x, KERNEL),
    "ConvTranspose": lambda x: keras.ops.conv_transpose(x, KERNEL, strides=1),
    "Correlate": lambda x: keras.ops.correlate(vector(x), vector(x)),
    "DepthwiseConv": lambda x: keras.ops.depthwise_conv(x, KERNEL),
    "Dot": lambda x: keras.layers.Dot(1)([x, x]),
    "DotProductAttention": lambda x: keras.ops.dot_product_attention(*[keras.ops.expand_dims(x, 1)] * 3),
    "Einsum": lambda x: keras.ops.einsum("bij,bik->bjk", x, x),
    "Inner": lambda x: keras.ops.inner(vector(x), vector(x)),
    "Kron": lambda x: keras.ops.kron(x[0], x[0]),
    "Matmul": lambda x: x @ KERNEL[0],
    "Outer": lambda x: keras.ops.outer(vector(x), vector(x)),
    "SeparableConv": lambda x: keras.ops.separable_conv(x, KERNEL[..., :1], KERNEL[:1]),
    "Tensordot": lambda x: keras.ops.tensordot(x, KERNEL[0], 1),
    "Vdot": lambda x: keras.ops.vdot(vector(x), vector(x)),
}


@pytest.mark.parametrize("kind", PRODUCT_OF)
def test_products_are_not_counted_and_said(kind):
    inputs = keras.Input((5, 4))
    sizes = summarize(keras.Model(inputs, PRODUCT_OF[kind](inputs)))
    assert sizes.macs == 0
    assert sizes.not_counted == tuple(row.name for row in sizes.rows if row.kind == kind) != ()


def test_every_product_is_tested():
    assert sorted(PRODUCT_OF) == sorted(PRODUCTS)


def test_table():
    lines = str(summarize(C2DResNet11(classes=5, input_shape=(8, 64, 64, 3)))).splitlines()
    assert [line.split()[0] for line in lines] == ["c2d_resnet11", "parameters,", "multiply-adds,", "activations,"]
    assert len({len(line) for line in lines}) == 1
    empty = summarize(keras.Sequential([keras.Input((3,)), keras.layers.Flatten()]))
    assert "0.0%" in str(empty)  # no division by zero


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    ("model", "input_shape", "message"),
    [
        (Subclassed, None, r"`model` must be a functional Keras model\. Received: model=<"),
        (keras.Sequential, None, r"`model` must be a functional Keras model\. Received: model=<"),
        (C2DResNet11, None, r"the model takes \(None, None, None, 3\)\. Received: input_shape=None$"),
        (C2DResNet11, (8, 64, None, 3), r"`input_shape` must give all sizes .*input_shape=\(8, 64, None, 3\)$"),
        (C2DResNet11, (64, 64, 3), r"`input_shape` must give .*Received: input_shape=\(64, 64, 3\)$"),
        (C2DResNet11, 8, r"the model takes \(None, None, None, 3\)\. Received: input_shape=8$"),
        (C2DResNet11, (8, 64, 64.0, 3), r"`input_shape` must give .*input_shape=\(8, 64, 64\.0, 3\)$"),
        (C2DResNet11, (8, 0, 64, 3), r"`input_shape` must give .*input_shape=\(8, 0, 64, 3\)$"),
        (C2DResNet11, [8, (64, 64, 3)], r"`input_shape` must give .*input_shape=\[8, \(64, 64, 3\)\]$"),
        (C2DResNet11, [(8, 64, 64, 3)] * 2, r"`input_shape` must give .*Received: input_shape=\[\(8, "),
    ],
)
def test_errors(model, input_shape, message):
    with pytest.raises(ValueError, match=message):
        summarize(model(), input_shape)
