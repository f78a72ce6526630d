"""Blocks in anybody's network: the same outputs at the start, a copy of its own, clear errors."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_nonlocal.applications import C2DResNet11, insert_non_local
from keras_nonlocal.layers import NonLocal1D, NonLocal2D, NonLocal3D
from tests.descriptors import randomise

BLOCKS = (NonLocal1D, NonLocal2D, NonLocal3D)
SLOW = pytest.mark.slow  # test_insert_example.py has ResNet-50 in every run


def example_of(model, batch_size=2):
    """Inputs for a model, in the structure that it takes."""
    rng = np.random.default_rng(0)

    def draw(x):
        shape = [batch_size] + [7 if size is None else size for size in x.shape[1:]]
        if x.dtype.startswith("int"):
            return rng.integers(1, 4, size=shape).astype(x.dtype)
        return rng.normal(size=shape).astype("float32")

    return keras.tree.map_structure(draw, model.inputs[0] if isinstance(model, keras.Sequential) else model.input)


def outputs_of(model, x):
    outputs = keras.tree.flatten(model(x, training=False))
    return [keras.ops.convert_to_numpy(output).copy() for output in outputs]


def assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype and np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


def names_of(model):
    """Names of all layers, as paths."""
    names = set()
    for layer in model.layers:
        names.add(layer.name)
        names |= {f"{layer.name}/{name}" for name in (names_of(layer) if isinstance(layer, keras.Model) else ())}
    return names


def assert_inserted(model, after, **options):
    """All that holds of every insertion; returns the copy."""
    x = example_of(model)
    before, weights = outputs_of(model, x), [np.array(weight) for weight in model.weights]
    copy = insert_non_local(model, after, **options)
    assert_equal(outputs_of(copy, x), before)
    assert copy.name == model.name
    # Names stay, so weights can be loaded by layer. A sequential model does not list its input, but the copy does.
    new = names_of(copy) - names_of(model)
    assert {name for name in new if "input" not in name} == {f"{name}_non_local" for name in after}
    assert names_of(model) <= names_of(copy)
    # Independent: what changes the copy leaves the original.
    shared = {id(variable) for variable in model.variables} & {id(variable) for variable in copy.variables}
    assert not shared
    randomise(copy, seed=1)
    assert any(not np.array_equal(a, b) for a, b in zip(outputs_of(copy, x), before, strict=True))
    assert_equal(outputs_of(model, x), before)
    assert_equal([np.array(weight) for weight in model.weights], weights)
    return copy


# Networks of all kinds


def signal():
    inputs = keras.Input((None, 3))
    x = layers.Conv1D(6, 3, name="first", activation="relu")(inputs)
    y = layers.Conv1D(6, 3, padding="same", name="second")(x)
    x = layers.Add(name="sum")([x, y])
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x), name="signal")


def volume():
    inputs = keras.Input((4, 6, 6, 2))
    x = layers.Conv3D(4, 3, padding="same", name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Flatten()(x))


def sequential():
    stack = [keras.Input((6, 6, 2)), layers.Conv2D(4, 3, name="first"), layers.Flatten(), layers.Dense(2, name="head")]
    return keras.Sequential(stack, name="mine")


def shared_layer():
    """A layer that is called twice, and two inputs and outputs."""
    shared = layers.Dense(3, name="shared")
    inputs = [keras.Input((5, 3)), keras.Input((5, 3))]
    a, b = shared(inputs[0]), shared(inputs[1])
    a = layers.Conv1D(3, 1, name="first")(a)
    return keras.Model(inputs, [a, layers.Multiply()([a, b])])


def pyramid():
    """Features of two sizes with names, from inputs with names."""
    inputs = {"image": keras.Input((8, 8, 3), name="image"), "extra": keras.Input((8, 8, 1), name="extra")}
    x = layers.Conv2D(4, 3, padding="same", name="fine")(layers.Concatenate()(list(inputs.values())))
    y = layers.Conv2D(4, 3, strides=2, padding="same", name="coarse")(x)
    x = layers.Add(name="merge")([x, layers.UpSampling2D()(layers.Conv2D(4, 1, name="lateral")(y))])
    return keras.Model(inputs, {"P3": x, "P4": y})


def operations():
    """Sums and slices of tensors, and a function, none of them a layer with weights."""
    scale = 0.5  # in the function's closure
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    x = keras.ops.relu(x + layers.Lambda(lambda t: keras.ops.sin(t) * scale, name="sine")(x))[:, 1:]
    return keras.Model(inputs, x * 2.0)


def nested():
    """A model in a model in a model, one of them sequential, called twice."""
    inner = keras.Sequential([keras.Input((6, 6, 4)), layers.Conv2D(4, 3, padding="same", name="conv")], name="inner")
    inputs = keras.Input((6, 6, 3))
    x = inner(layers.Conv2D(4, 1, name="stem")(inputs))
    backbone = keras.Model(inputs, [x, layers.Lambda(lambda t: t + 1.0, name="plus")(inner(x))], name="backbone")
    images = keras.Input((6, 6, 3))
    fine, coarse = backbone(images)
    return keras.Model(images, layers.Conv2D(2, 1, name="head")(fine + coarse))


def masked():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(5, 4, mask_zero=True, embeddings_regularizer="l2", name="embedding")(inputs)
    x = layers.Conv1D(4, 1, name="conv", kernel_regularizer="l2")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.LSTM(3, return_sequences=True)(x)))


NETWORKS = {
    "signal": (signal, ["first", "sum"]),
    "volume": (volume, ["norm"]),
    "sequential": (sequential, ["first"]),
    "shared layer": (shared_layer, ["first", "shared"]),
    "pyramid": (pyramid, ["coarse", "merge"]),
    "operations": (operations, ["conv", "sine", "relu"]),
    "nested": (nested, ["backbone/stem", "backbone/inner", "backbone/inner/conv", "backbone/plus"]),
    "beside nested": (nested, ["head"]),
    "masked": (masked, ["embedding", "conv"]),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("error:The structure of")  # the copy takes what the original took
def test_same_outputs_at_the_start(name):
    make, after = NETWORKS[name]
    model = randomise(make())
    copy = assert_inserted(model, after, pairwise="gaussian")
    assert len(copy.outputs) == len(model.outputs) and len(copy.losses) == len(model.losses)


APPLICATIONS = {
    "ResNet50": ["conv3_block4_out", "conv4_block6_out"],
    "MobileNetV2": ["block_6_project_BN", "block_9_add"],
    "ResNet50V2": ["conv3_block4_out", "conv4_block6_out"],
    "EfficientNetB0": ["block4a_expand_activation"],
    "EfficientNetV2B0": ["block4a_project_bn"],
    "MobileNetV3Small": ["expanded_conv_5_add"],
    "DenseNet121": ["pool3_relu"],
    "InceptionV3": ["mixed5"],
    "ConvNeXtTiny": ["convnext_tiny_stage_1_block_1_identity"],
}


@SLOW
@pytest.mark.parametrize("name", APPLICATIONS)
def test_networks_of_keras(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(75, 75, 3), classes=5)
    for layer in model.layers:  # `Normalization` derives what it computes with from its variables
        if not isinstance(layer, layers.Normalization):
            randomise(layer)
    assert_inserted(model, APPLICATIONS[name], pool_size=2)


def test_the_block_stands_where_it_should():
    copy = insert_non_local(nested(), ["backbone/plus", "head"])
    block = copy.get_layer("backbone").get_layer("plus_non_local")
    assert block.input is copy.get_layer("backbone").get_layer("plus").output
    assert block.output is copy.get_layer("backbone").outputs[1]
    assert copy.get_layer("head_non_local").output is copy.outputs[0]


def test_the_block_does_what_it_does_alone():
    model = randomise(operations())
    copy = randomise(insert_non_local(model, "conv", pairwise="gaussian"), seed=1)
    x = example_of(model)
    block = NonLocal2D("gaussian")
    features = copy.get_layer("conv")(x)
    block.build(features.shape)
    block.set_weights(copy.get_layer("conv_non_local").get_weights())
    y = block(features, training=False)
    expected = keras.ops.relu(y + keras.ops.sin(y) * 0.5)[:, 1:] * 2.0
    np.testing.assert_allclose(copy(x, training=False), expected, rtol=1e-5, atol=1e-6)


def test_an_official_block_equals_the_builders():
    """A C2D without blocks and one inserted is the C2D with one block."""
    options = {"input_shape": (4, 33, 27, 3), "classes": 5}
    plain = C2DResNet11(non_local=0, **options)
    inserted = insert_non_local(plain, "res3_1_out", pool_size=(1, 2, 2), scale="sqrt")
    built = C2DResNet11(non_local=1, **options)
    assert [weight.shape for weight in inserted.weights] == [weight.shape for weight in built.weights]
    randomise(inserted)
    built.set_weights(inserted.get_weights())
    x = example_of(plain)
    expected = inserted(x, training=False)
    np.testing.assert_allclose(built(x, training=False), expected, atol=1e-6 * np.abs(expected).max())


def test_inner_models_that_are_shared_stay_one():
    inner = keras.Sequential([keras.Input((5, 3)), layers.Conv1D(3, 1, name="conv")], name="inner")
    inputs = keras.Input((5, 3))
    outer = keras.Model(inputs, inner(inputs), name="outer")
    model = keras.Model(inputs, layers.Conv1D(2, 1, name="last")(outer(inputs) + inner(inputs)))
    copy = assert_inserted(model, ["last"])
    assert copy.get_layer("outer").get_layer("inner") is copy.get_layer("inner")


class Named(keras.Model):
    """A functional subclass, as backbones are."""


@pytest.mark.parametrize("kind", [keras.Model, Named])
@pytest.mark.parametrize("path", ["inner/conv", "outer/inner/conv"])
def test_a_block_in_an_inner_model_that_is_shared(kind, path):
    """Whichever path names it, and whichever place is copied first."""
    inner = keras.Sequential([keras.Input((5, 3)), layers.Conv1D(3, 1, name="conv")], name="inner")
    inputs = keras.Input((5, 3))
    outer = kind(inputs, inner(inputs), name="outer")
    model = randomise(keras.Model(inputs, outer(inputs) + 2.0 * inner(inputs)))
    x = example_of(model)
    copy = insert_non_local(model, [path])
    assert_equal(outputs_of(copy, x), outputs_of(model, x))
    shared = copy.get_layer("inner")
    assert copy.get_layer("outer").get_layer("inner") is shared
    randomise(shared.get_layer("conv_non_local"))
    assert not np.allclose(shared(x), inner(x))
    np.testing.assert_allclose(copy(x), 3.0 * np.asarray(shared(x)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"each layer once, and has 'outer/inner/conv' twice\. Received: after=\["):
        insert_non_local(model, ["inner/conv", "outer/inner/conv"])


class Nameless(layers.Layer):
    def get_config(self):
        return {}

    def call(self, inputs):
        return inputs + 1.0


def test_a_block_after_a_layer_whose_configuration_has_no_name():
    inputs = keras.Input((5, 3))
    copy = insert_non_local(keras.Model(inputs, Nameless(name="mine")(inputs)), ["mine"])
    assert copy.get_layer("mine_non_local").output is copy.outputs[0]


class Doubled(keras.Model):
    def call(self, inputs, training=None, mask=None):
        return 2.0 * super().call(inputs, training=training)


class DoubledSequential(keras.Sequential):
    def call(self, inputs, training=None, mask=None):
        return 2.0 * super().call(inputs, training=training)


def doubled():
    inputs = keras.Input((5, 3))
    return Doubled(inputs, layers.Conv1D(3, 1, name="conv")(inputs), name="doubled")


def doubled_sequential():
    return DoubledSequential([keras.Input((5, 3)), layers.Conv1D(3, 1, name="conv")], name="doubled")


@pytest.mark.parametrize("make", [doubled, doubled_sequential])
def test_a_call_of_its_own(make):
    """What it does is not in the graph of the layers: it stays, or is refused."""
    inner, inputs = make(), keras.Input((5, 3))
    model = randomise(keras.Model(inputs, layers.Conv1D(2, 1, name="last")(inner(inputs))))
    for refused, path in ((inner, "conv"), (model, "doubled/conv")):
        with pytest.raises(ValueError, match=r"with a `call` of its own .*\. Received: <Doubled.* name=doubled, "):
            insert_non_local(refused, [path])
    x = example_of(model)
    np.testing.assert_allclose(inner(x), 2.0 * np.asarray(inner.get_layer("conv")(x)), rtol=1e-6)
    assert type(assert_inserted(model, ["doubled"]).get_layer("doubled")) is type(inner)


# State that is not weights alone


def test_frozen_layers_stay_frozen_and_the_blocks_train():
    model = nested()
    model.get_layer("backbone").trainable = False
    copy = insert_non_local(model, ["backbone/stem"])
    assert copy.get_layer("backbone").get_layer("stem").trainable is False
    trains = {variable.path.split("/")[0] for variable in copy.trainable_variables}
    assert {path.removesuffix("_non_local") for path in trains} <= {"head", "backbone", "stem"}
    block = copy.get_layer("backbone").get_layer("stem_non_local")
    assert len(copy.trainable_variables) == len(block.trainable_variables) + len(model.trainable_variables)
    assert len(block.trainable_variables) > 0


def test_parts_of_a_layer_stay_frozen(rng):
    attention = layers.MultiHeadAttention(2, 2, name="attention")
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, attention(inputs, inputs))
    attention._query_dense.trainable = False
    attention._output_dense.bias.trainable = False
    copy = insert_non_local(model, "attention")
    flags = [variable.trainable for variable in model.variables]
    assert [variable.trainable for variable in copy.get_layer("attention").variables] == flags
    assert flags.count(False) == 3


def test_parts_in_a_list_stay_frozen():
    inputs = keras.Input((5, 4))
    recurrent = layers.RNN([layers.GRUCell(3), layers.GRUCell(3)], return_sequences=True, name="recurrent")
    model = keras.Model(inputs, recurrent(inputs))
    recurrent.cell.cells[1].trainable = False
    copy = insert_non_local(model, "recurrent").get_layer("recurrent")
    assert [cell.trainable for cell in copy.cell.cells] == [True, False]
    assert copy.trainable and len(copy.trainable_variables) == 3


@pytest.mark.parametrize("output_shape", [(5, 3), lambda shape: (*shape[:2], 3)], ids=["shape", "function"])
def test_functions_keep_the_shape_that_was_given(output_shape):
    inputs = keras.Input((5, 3))
    x = layers.Lambda(lambda x: x, output_shape=output_shape, name="same")(inputs)
    copy = insert_non_local(keras.Model(inputs, x), "same").get_layer("same")
    assert copy.get_config()["output_shape"] == layers.Lambda(lambda x: x, output_shape).get_config()["output_shape"]


@pytest.mark.filterwarnings("ignore:.*unregister")
def test_a_compiled_model_need_not_be_registered():
    model = signal()
    model.compile("sgd", loss=lambda y_true, y_pred: keras.ops.mean(y_pred - y_true))
    copy = insert_non_local(model, "sum")
    assert not copy.compiled and model.compiled


def test_preprocessing_keeps_what_it_learned(rng):
    images, numbers = keras.Input((6, 6, 3), name="images"), keras.Input((1,), dtype="int64", name="numbers")
    normalization, lookup = layers.Normalization(name="normalization"), layers.IntegerLookup(name="lookup")
    normalization.adapt(rng.normal(3, 5, size=(20, 6, 6, 3)))
    lookup.adapt(np.array([[30], [40], [40]]))
    x = layers.Conv2D(4, 3, name="conv")(normalization(images))
    extra = layers.Embedding(4, 4)(lookup(numbers))
    model = keras.Model([images, numbers], x + extra[:, None])
    copy = insert_non_local(model, "conv")
    values = [rng.normal(size=(3, 6, 6, 3)).astype("float32"), np.array([[30], [40], [50]])]
    assert_equal(outputs_of(copy, values), outputs_of(model, values))
    np.testing.assert_array_equal(copy.get_layer("lookup")(values[1]), [[2], [1], [0]])


def test_seeds_go_on_where_they_were(rng):
    inputs = keras.Input((6, 6, 3))
    x = layers.Dropout(0.5, seed=3)(layers.Conv2D(4, 1, name="conv")(inputs))
    model = keras.Model(inputs, x)
    x = rng.normal(size=(2, 6, 6, 3)).astype("float32")
    first = np.array(model(x, training=True))
    copy = insert_non_local(model, "conv", normalization=None)
    second = np.array(model(x, training=True))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(copy(x, training=True), second)


def test_quantized_weights_stay_as_they_are():
    model = randomise(nested_dense())
    model.quantize("int8")
    copy = insert_non_local(model, "first")
    x = example_of(model)
    assert_equal(outputs_of(copy, x), outputs_of(model, x))
    assert copy.get_layer("first").quantization_mode == "int8"
    assert copy.get_layer("first_non_local").dtype_policy.name == "float32"


def nested_dense():
    inputs = keras.Input((5, 3))
    return keras.Model(inputs, layers.Dense(2, name="last")(layers.Dense(4, name="first")(inputs)))


# Precision and data format


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_the_block_has_the_precision_of_the_layer(policy, name):
    policy(name)
    model = randomise(signal())
    policy("float32")  # what holds when the block is made is not what held when the model was
    x = example_of(model)
    copy = insert_non_local(model, ["sum"])
    assert_equal(outputs_of(copy, x), outputs_of(model, x))
    assert copy.get_layer("sum_non_local").dtype_policy.name == name
    assert insert_non_local(model, ["sum"], dtype="float32").get_layer("sum_non_local").dtype_policy.name == "float32"


def channels_first():
    inputs = keras.Input((3, 8, 6))
    x = layers.Permute((2, 3, 1), name="to_last")(inputs)
    x = layers.Conv2D(4, 1, name="conv", data_format="channels_last")(x)
    x = layers.Permute((3, 1, 2), name="to_first")(x)
    x = layers.ZeroPadding2D(name="pad", data_format="channels_first")(x)
    return keras.Model(inputs, layers.ReLU(name="relu")(x))


def test_the_block_has_the_data_format_of_the_layer():
    model = channels_first()
    copy = assert_inserted(model, ["conv", "pad"])
    assert copy.get_layer("conv_non_local").data_format == "channels_last"
    assert copy.get_layer("pad_non_local").data_format == "channels_first"
    with pytest.raises(ValueError, match=r"'relu' has none\. Received: data_format=None$"):
        insert_non_local(model, ["relu"])
    given = insert_non_local(model, ["relu"], data_format="channels_first")
    assert given.get_layer("relu_non_local").data_format == "channels_first"


def test_the_block_has_the_data_format_of_all_layers():
    inputs = keras.Input((3, 8, 6))
    x = layers.ReLU(name="relu")(layers.ZeroPadding2D(data_format="channels_first")(inputs))
    block = insert_non_local(keras.Model(inputs, x), "relu").get_layer("relu_non_local")
    assert block.data_format == "channels_first" and block.g.kernel.shape[0] == 3


# Pyramids, saving, inserting again


def test_a_pyramid_on_a_backbone_with_blocks():
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="c3")(inputs)
    backbone = keras.Model(inputs, layers.Conv2D(8, 3, strides=2, padding="same", name="c4")(x))

    def with_pyramid(network):
        """Takes features out of the network by name."""
        fine, coarse = network.get_layer("c3").output, network.outputs[0]
        top = layers.Conv2D(4, 1, kernel_initializer="ones")(coarse)
        bottom = layers.Conv2D(4, 1, kernel_initializer="ones")(fine)
        return keras.Model(network.input, [bottom + layers.UpSampling2D()(top), top])

    copy = insert_non_local(backbone, ["c4"])
    x = example_of(backbone)
    expected = outputs_of(with_pyramid(backbone), x)
    assert_equal(outputs_of(with_pyramid(copy), x), expected)
    randomise(copy.get_layer("c4_non_local"))
    for a, b in zip(outputs_of(with_pyramid(copy), x), expected, strict=True):
        assert not np.allclose(a, b)


@pytest.mark.parametrize("name", ["signal", "sequential", "shared layer", "pyramid", "masked"])
def test_the_copy_saves(name, tmp_path):
    make, after = NETWORKS[name]
    model = randomise(insert_non_local(make(), after))
    x = example_of(model)
    model.save(tmp_path / "model.keras")
    assert_equal(outputs_of(keras.saving.load_model(tmp_path / "model.keras"), x), outputs_of(model, x))


def test_a_copy_with_functions_saves(tmp_path):
    model = randomise(insert_non_local(nested(), NETWORKS["nested"][1]))
    x = example_of(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert_equal(outputs_of(loaded, x), outputs_of(model, x))


def test_insertion_again_behind_the_block():
    model = insert_non_local(signal(), "sum")
    with pytest.raises(
        ValueError, match=r"to put one more behind 'sum_non_local', name that\. Received: after=\['sum'\]"
    ):
        insert_non_local(model, "sum")
    copy = assert_inserted(randomise(model), ["sum_non_local"])
    assert copy.get_layer("sum_non_local_non_local").input is copy.get_layer("sum_non_local").output


# Errors


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


class Forgetful(layers.Layer):
    """A layer whose configuration leaves its size out."""

    def __init__(self, units=1, **options):
        super().__init__(**options)
        self.units = units

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(self.units,))

    def call(self, inputs):
        return inputs * keras.ops.sum(self.scale)

    def get_config(self):
        return {"name": self.name}


def forgetful():
    inputs = keras.Input((5, 3))
    return keras.Model(inputs, Forgetful(units=2, name="forgetful")(inputs))


class Incomplete(layers.Layer):
    """A layer whose configuration leaves out what it must have."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)

    def get_config(self):
        return {"name": self.name}


class WithoutConfiguration(Incomplete):
    def get_config(self):
        raise NotImplementedError("no configuration")


def incomplete(kind=Incomplete):
    inputs = keras.Input((5, 3))
    return keras.Model(inputs, kind(lambda x: x, name="identity")(inputs))


def without_configuration():
    return incomplete(WithoutConfiguration)


def two_outputs():
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, layers.LSTM(3, return_state=True, return_sequences=True, name="lstm")(inputs))


FUNCTIONAL = r"`model` must be a functional Keras model, or a sequential one that is built\. Received: model=<"


@pytest.mark.parametrize(
    ("model", "after", "options", "message"),
    [
        (
            signal,
            ["nowhere"],
            {},
            r"model 'signal' that are no inputs; 'nowhere' is none\. Received: after=\['nowhere'\]$",
        ),
        (signal, ["fist", "sum"], {}, r"'fist' is none \(near: \['first'\]\)\. Received: after=\['fist', 'sum'\]$"),
        (nested, "conv", {}, r"'conv' is none \(near: \['backbone/inner/conv'\]\)\. Received: after=\['conv'\]$"),
        (nested, "backbone/inner/cnv", {}, r"none \(near: \['backbone/inner/conv'"),
        (pyramid, ["image"], {}, r"are no inputs; 'image' is none"),
        (signal, [3], {}, r"`after` must be a list of one or more names of layers\. Received: after=\[3\]$"),
        (signal, [], {}, r"`after` must be a list of one or more names of layers\. Received: after=\[\]$"),
        (signal, None, {}, r"`after` must be a list of one or more names of layers\. Received: after=None$"),
        (signal, [["sum"]], {}, r"`after` must be a list of .* names of layers\. Received: after=\[\['sum'\]\]$"),
        (signal, ["sum", "first", "sum"], {}, r"has 'sum' twice\. Received: after=\['sum', 'first', 'sum'\]$"),
        (volume, ["flatten"], {}, r"one map of .* of 'flatten' is \(None, 576\)\. Received: after=\['flatten'\]$"),
        (two_outputs, ["lstm"], {}, r"of 'lstm' is \(\(None, 5, 3\), \(None, 3\), \(None, 3\)\)\. Received"),
        (nested, ["backbone"], {}, r"of 'backbone' is \[\(None, 6, 6, 4\), \(None, 6, 6, 4\)\]\. Received"),
        (Subclassed, ["first"], {}, FUNCTIONAL),
        (keras.Sequential, ["first"], {}, FUNCTIONAL),
        (forgetful, ["forgetful"], {}, r"`get_config\(\)`; 'forgetful' has .*\(2,\)\)\]\. Received: .*\(1,\)\)\]$"),
        (incomplete, ["identity"], {}, r"`get_config\(\)`; 'identity' does not \(TypeError\)\. Received: <Incomplete "),
        (without_configuration, ["identity"], {}, r"'identity' does not \(NotImplementedError\)\. Received: <Without"),
        (signal, ["sum"], {"name": "block"}, r"names of the blocks .* Received: name='block'$"),
        (signal, ["sum"], {"pairwise": "euclid"}, r"Received: pairwise='euclid'"),
        (volume, ["norm"], {"window": (3, None, None)}, r"`window` must divide"),
    ],
)
def test_errors(model, after, options, message):
    keras.utils.clear_session(free_memory=False)
    with pytest.raises(ValueError, match=message):
        insert_non_local(model(), after, **options)
