"""The fully convolutional form of a classifier: against the classifier, a loop over locations, a loop over crops."""

import keras
import numpy as np
import pytest

from keras_nonlocal.applications import C2DResNet11, I3DResNet11, fully_convolutional, insert_non_local

LAYERS = keras.layers
GAP = LAYERS.GlobalAveragePooling3D


def clips(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sharpen(model, features):
    """A head whose scores differ from position to position, or a mean of them would prove nothing."""
    head = next(layer for layer in reversed(model.layers) if layer.weights)
    kernel = np.random.default_rng(0).normal(size=head.kernel.shape)
    kernel /= (features @ kernel).std(axis=0) + 1e-9
    head.set_weights([kernel, -(features @ kernel).mean(axis=0)])


NETWORKS = {
    "c2d": (lambda: C2DResNet11(input_shape=(4, 48, 48, 3), classes=5), None, softmax),
    "i3d of any size": (lambda: I3DResNet11(classes=5, non_local=1), 48, softmax),
    "sigmoid": (
        lambda: C2DResNet11(input_shape=(4, 48, 48, 3), classes=5, classifier_activation="sigmoid"),
        (48, 48),
        sigmoid,
    ),
    "inserted": (
        lambda: insert_non_local(C2DResNet11(input_shape=(4, 48, 48, 3), classes=5, non_local=0), ["res3_0_out"]),
        None,
        softmax,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_model_on_crops_and_a_loop_over_locations_on_frames(name):
    build, image_size, activation = NETWORKS[name]
    model = build()
    whole = fully_convolutional(model, image_size)
    assert whole.input_shape[2:4] == (None, None)
    # What the pooling gets, averaged over time.
    features = keras.Model(whole.inputs[0], whole.get_layer("pool5_windows").input)
    crops, frames = clips(2, 4, 48, 48, 3), clips(2, 4, 64, 112, 3)
    h, w = features(crops).shape[2:4]
    maps = np.asarray(features(frames), "float64")[:, 0]  # B H W C
    rows, columns = maps.shape[1] - h + 1, maps.shape[2] - w + 1
    assert rows > 1 and columns > 1
    means = [maps[:, y : y + h, x : x + w].mean(axis=(1, 2)) for y in range(rows) for x in range(columns)]
    sharpen(model, np.concatenate(means))
    kernel, bias = (np.asarray(weight, "float64") for weight in model.layers[-1].get_weights())
    locations = [activation(mean @ kernel + bias) for mean in means]
    assert np.std(locations, axis=0).min() > 0.01
    np.testing.assert_allclose(whole(frames), np.mean(locations, axis=0), atol=2e-5)
    np.testing.assert_allclose(whole(crops), model(crops), atol=2e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_without_padding_it_is_the_mean_over_all_crops(data_format):
    """Where nothing reaches beyond a crop, each location is the model on its crop: no look inside needed."""
    first = data_format == "channels_first"
    inputs = keras.Input((3, None, 13, 17) if first else (None, 13, 17, 3))
    options = {"activation": "relu", "data_format": data_format}
    # 1×1 kernels with strides on CPU run in both formats; the pooling before them has an extent.
    x = inputs
    if first:
        x = LAYERS.Permute((2, 3, 4, 1))(x)
    x = LAYERS.Conv3D(8, (1, 3, 3), strides=(1, 2, 2), **options | {"data_format": "channels_last"})(x)
    x = LAYERS.Conv3D(6, (1, 2, 2), strides=(1, 2, 2), **options | {"data_format": "channels_last"})(x)
    if first:
        x = LAYERS.Permute((4, 1, 2, 3))(x)
    x = GAP(data_format=data_format, name="pool")(x)
    x = LAYERS.Dropout(0.5)(LAYERS.Dense(7, activation="tanh")(x))  # a hidden layer is a 1×1×1 convolution, too
    model = keras.Model(inputs, LAYERS.Activation("softmax")(LAYERS.Dense(4)(x)))
    frames = clips(2, 3, 21, 33, 3)

    def arranged(x):
        return x.transpose(0, 4, 1, 2, 3) if first else x

    crops = [frames[:, :, y : y + 13, x : x + 17] for y in range(0, 9, 4) for x in range(0, 17, 4)]
    hidden = keras.Model(inputs, model.layers[-3].output)
    sharpen(model, np.concatenate([hidden(arranged(crop)) for crop in crops]))
    expected = [np.asarray(model(arranged(crop)), "float64") for crop in crops]
    assert np.std(expected, axis=0).min() > 0.01
    np.testing.assert_allclose(fully_convolutional(model)(arranged(frames)), np.mean(expected, axis=0), atol=1e-6)


def test_shares_the_weights_and_leaves_the_model():
    model = C2DResNet11(input_shape=(4, 48, 48, 3), classes=5)
    crops = clips(1, 4, 48, 48, 3)
    before, config = np.asarray(model(crops)), model.get_config()
    whole = fully_convolutional(model)
    assert model.get_config() == config and model.input_shape == (None, 4, 48, 48, 3)
    np.testing.assert_array_equal(model(crops), before)
    assert {id(weight) for weight in whole.weights} == {id(weight) for weight in model.weights}
    model.layers[-1].bias.assign(np.arange(5.0))
    np.testing.assert_allclose(whole(crops), model(crops), atol=1e-6)
    assert np.abs(np.asarray(whole(crops)) - before).max() > 0.01


def test_is_saved_and_made_of_a_loaded_model(tmp_path):
    model = C2DResNet11(input_shape=(4, None, None, 3), classes=5)
    whole = fully_convolutional(model, 48)
    frames = clips(1, 4, 48, 80, 3)
    whole.save(tmp_path / "whole.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "whole.keras")(frames), whole(frames), atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = fully_convolutional(keras.saving.load_model(tmp_path / "model.keras"), 48)
    np.testing.assert_allclose(loaded(frames), whole(frames), atol=1e-6)


class LeftHalf(LAYERS.Layer):
    """A layer that computes with its sizes in Python."""

    def call(self, inputs):
        return inputs[:, :, :, : inputs.shape[3] // 2]


def sequential(*layers, shape=(4, 8, 8, 3)):
    return keras.Sequential([keras.Input(shape), *layers], name="small")


@pytest.mark.parametrize(
    ("model", "image_size", "message"),
    [
        (lambda: "no model", None, r"must be a functional Keras model\. Received: model='no model'$"),
        (
            lambda: sequential(LAYERS.Conv3D(2, 1)),
            None,
            r"give scores \(batch, classes\)\. Received: model='small' with the shapes \[\(None, 4, 8, 8, 3\), \(None,",
        ),
        (
            lambda: sequential(GAP(), LAYERS.Dense(2)),
            None,
            r"one of softmax, sigmoid\. Received: the last activation 'linear' in 'small'$",
        ),
        (
            lambda: sequential(GAP()),
            None,
            r"one of softmax, sigmoid\. Received: the last activation None in 'small'$",
        ),
        (
            lambda: sequential(LAYERS.GlobalMaxPooling3D(name="maximum"), LAYERS.Dense(2, activation="softmax")),
            None,
            r"must end with `GlobalAveragePooling3D`, then.* Received: 'maximum' in 'small'$",
        ),
        (
            lambda: sequential(LeftHalf(), GAP(), LAYERS.Dense(2, activation="softmax")),
            None,
            r"must run on frames of any size \(TypeError: .*Received: model='small'$",
        ),
        (
            lambda: C2DResNet11(name="any", classes=2),
            None,
            r"be given for a model that takes crops of any size, such as \(None, None, None, None, 3\)\. "
            r"Received: image_size=None$",
        ),
        (lambda: C2DResNet11(classes=2), 0, r"must be a positive integer or a pair.* Received: image_size=0$"),
        (
            lambda: C2DResNet11(input_shape=(4, 48, 48, 3), classes=2),
            64,
            r"that of the model's inputs, \(48, 48\)\. Received: image_size=64$",
        ),
    ],
)
def test_errors_say_what_was_expected(model, image_size, message):
    with pytest.raises(ValueError, match=message):
        fully_convolutional(model(), image_size)
