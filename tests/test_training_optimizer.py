"""The recipe's SGD and learning rates, against numbers by hand, NumPy and the paper's."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_nonlocal.applications import I3DResNet11
from keras_nonlocal.training import SGD, LearningRate, make_optimizer, read_recipe
from keras_nonlocal.training.optimizer import learning_rate_of


def rates(schedule, steps):
    return [float(schedule(step)) for step in steps]


# Learning rates


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kinetics-8x8", {0: 0.01, 149_999: 0.01, 150_000: 0.001, 299_999: 0.001, 300_000: 1e-4, 399_999: 1e-4}),
        ("kinetics-32x2", {0: 0.01, 149_999: 0.01, 150_000: 0.001, 299_999: 0.001, 300_000: 1e-4, 399_999: 1e-4}),
        ("kinetics-32x4", {0: 0.0025, 149_999: 0.0025, 150_000: 2.5e-4, 299_999: 2.5e-4, 300_000: 2.5e-5}),
        ("kinetics-128x1", {0: 0.0025, 149_999: 0.0025, 150_000: 2.5e-4, 300_000: 2.5e-5, 399_999: 2.5e-5}),
        ("charades", {0: 0.00125, 74_999: 0.00125, 75_000: 1.25e-4, 150_000: 1.25e-5, 199_999: 1.25e-5}),
    ],
)
def test_rates_of_the_paper(name, expected):
    schedule = learning_rate_of(read_recipe(name))
    np.testing.assert_allclose(rates(schedule, expected), list(expected.values()), rtol=1e-6)
    assert schedule.total_steps == (200_000 if name == "charades" else 400_000)


def test_rate_and_steps_follow_the_batch():
    """A batch of 8 in place of 64: an eighth of the rate, eight times the steps."""
    schedule = learning_rate_of(read_recipe("kinetics-8x8", batch_size=8))
    expected = {0: 0.00125, 1_199_999: 0.00125, 1_200_000: 1.25e-4, 2_400_000: 1.25e-5, 3_199_999: 1.25e-5}
    np.testing.assert_allclose(rates(schedule, expected), list(expected.values()), rtol=1e-6)
    # A batch of one clip: steps beyond 2**24 are told apart, which float32 numbers are not.
    schedule = learning_rate_of(read_recipe("kinetics-8x8", batch_size=1))
    assert schedule.milestones == (9_600_000, 19_200_000)
    np.testing.assert_allclose(rates(schedule, (19_199_999, 19_200_000)), (0.01 / 640, 0.01 / 6400), rtol=1e-6)


def test_milestones_as_fractions():
    recipe = read_recipe("kinetics-8x8", total_steps=1000, milestones=[0.375, 0.75], batch_size=32)
    np.testing.assert_allclose(
        rates(learning_rate_of(recipe), (749, 750, 1499, 1500)), (5e-3, 5e-4, 5e-4, 5e-5), rtol=1e-6
    )


def test_warm_up():
    schedule = LearningRate(0.1, 100, milestones=(50,), warmup_steps=10, warmup_factor=0.2)
    expected = {0: 0.02, 1: 0.028, 5: 0.06, 9: 0.092, 10: 0.1, 49: 0.1, 50: 0.01}
    np.testing.assert_allclose(rates(schedule, expected), list(expected.values()), rtol=1e-6)


def test_cosine():
    schedule = LearningRate(0.2, 8, schedule="cosine")
    # 0.1 (1 + cos(π k / 8)): cos of 0, 45, 90 and 157.5 degrees; then as the last.
    expected = {0: 0.2, 2: 0.1 + 0.05 * 2**0.5, 4: 0.1, 7: 0.0076120467, 100: 0.0076120467}
    np.testing.assert_allclose(rates(schedule, expected), list(expected.values()), rtol=1e-5)
    schedule = LearningRate(0.2, 8, schedule="cosine", warmup_steps=4, warmup_factor=0.5)
    np.testing.assert_allclose(float(schedule(2)), (0.1 + 0.05 * 2**0.5) * 0.75, rtol=1e-6)
    assert rates(LearningRate(0.2, 8, schedule="constant"), (0, 7)) == [np.float32(0.2)] * 2


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"one of 'step', 'cosine', 'constant'. Received: schedule='linear'"):
        LearningRate(0.1, 10, schedule="linear")


# Steps


def gradient_steps(optimizer, start, gradients):
    """The weight after each step."""
    weight = keras.Variable(np.array(start, "float32"), name="kernel")
    values = []
    for gradient in gradients:
        optimizer.apply([ops.convert_to_tensor(np.array(gradient, "float32"))], [weight])
        values.append(ops.convert_to_numpy(weight).copy())
    return values


def test_decay_goes_through_the_momentum():
    """By hand, without gradients: v = 0.9 v + 0.1 w, w = w - 0.5 (0.1 w + 0.9 v)."""
    optimizer = SGD(0.5, momentum=0.9, coupled_weight_decay=0.1)
    np.testing.assert_allclose(gradient_steps(optimizer, [1.0], [[0.0]] * 2), [[0.905], [0.778525]], rtol=1e-6)
    # Keras' own decay, which does not: w = w - 0.5 * 0.1 w.
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9, nesterov=True, weight_decay=0.1)
    np.testing.assert_allclose(gradient_steps(optimizer, [1.0], [[0.0]] * 2), [[0.95], [0.9025]], rtol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_against_numpy(rng, momentum, nesterov):
    """The equations in float64, over a drop of the rate; the velocity knows no rates."""
    start, gradients = rng.normal(size=(3, 2)), rng.normal(size=(6, 3, 2))
    schedule = LearningRate(0.3, 6, milestones=(3,))
    optimizer = SGD(schedule, momentum=momentum, nesterov=nesterov, coupled_weight_decay=0.05)
    w, v, expected = start, 0.0, []
    for step, gradient in enumerate(gradients):
        g = gradient + 0.05 * w
        v = momentum * v + g
        w = w - (0.3 if step < 3 else 0.03) * (g + momentum * v if nesterov else v)
        expected.append(w)
    np.testing.assert_allclose(gradient_steps(optimizer, start, gradients), expected, rtol=1e-5, atol=1e-6)


def test_keras_decay_is_refused():
    with pytest.raises(ValueError, match="as this is `coupled_weight_decay`. Received: weight_decay=0.1"):
        SGD(weight_decay=0.1)


# All weights of an I3D ResNet-11 with a non-local block that the paper's recipe decays, biases included.
CONVOLUTIONS = ["conv1", "res2_0_branch1", "res2_0_branch2a", "res2_0_branch2b", "res2_0_branch2c"]
CONVOLUTIONS += [f"res3_{block}" for block in ("0_branch1", "0_branch2a", "0_branch2b", "0_branch2c")]
CONVOLUTIONS += [f"res3_1_branch2{branch}" for branch in "abc"]
DECAYED = [f"{name}/kernel" for name in CONVOLUTIONS]
DECAYED += [f"nonlocal_conv3_1/{part}/{name}" for part in ("theta", "phi", "g", "out") for name in ("kernel", "bias")]
DECAYED += ["pred/kernel", "pred/bias"]


def test_decayed_weights():
    """What a step without gradients shrinks: convolutions, projections and the head; nothing of batch normalization."""
    model = I3DResNet11(input_shape=(4, 32, 32, 3), classes=3, non_local=1)
    for weight in model.trainable_variables:
        weight.assign(ops.ones(weight.shape))
    optimizer = make_optimizer(read_recipe("kinetics-8x8"))
    optimizer.apply([ops.zeros(weight.shape) for weight in model.trainable_variables], model.trainable_variables)
    shrunk, kept = {}, {}
    for weight in model.trainable_variables:
        value = np.unique(ops.convert_to_numpy(weight))
        (kept if value.tolist() == [1.0] else shrunk)[weight.path] = value
    assert sorted(shrunk) == sorted(DECAYED)
    np.testing.assert_allclose(list(shrunk.values()), 1 - 0.01 * (1e-4 + 0.9 * 1e-4), rtol=0, atol=1e-7)
    names = [f"{name}_bn/{weight}" for name in ("res_conv1", *CONVOLUTIONS[1:]) for weight in ("gamma", "beta")]
    assert sorted(kept) == sorted([*names, "nonlocal_conv3_1/norm/gamma", "nonlocal_conv3_1/norm/beta"])


# Parts of a batch, averages


def linear(optimizer):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(optimizer, "mse")
    return model


def test_parts_of_a_batch_make_the_step_of_the_whole(rng):
    """Also the rates: counted in whole batches, though Keras counts the parts."""
    options = {"total_steps": 6, "milestones": [2], "warmup_steps": 2, "batch_size": 12, "reference_batch_size": 12}
    x, y = rng.normal(size=(6, 12, 3)).astype("float32"), rng.normal(size=(6, 12, 2)).astype("float32")
    whole, parts = (
        linear(make_optimizer(read_recipe("kinetics-8x8", learning_rate=0.5, **options, **extra)))
        for extra in ({}, {"gradient_accumulation_steps": 3})
    )
    parts.set_weights(whole.get_weights())
    schedule = learning_rate_of(read_recipe("kinetics-8x8", learning_rate=0.5, **options))
    for step in range(6):
        whole.train_on_batch(x[step], y[step])
        before = parts.get_weights()
        for part in range(3):
            for a, b in zip(before, parts.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
            assert float(parts.optimizer.learning_rate) == float(schedule(step))
            parts.train_on_batch(x[step, 4 * part : 4 * part + 4], y[step, 4 * part : 4 * part + 4])
        assert int(parts.optimizer.iterations) == int(whole.optimizer.iterations) == step + 1
        for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_moving_average_of_the_weights(rng, parts):
    """average = 0.9 average + 0.1 weights at every step, from the weights after the first; whatever the parts."""
    options = {"batch_size": 4, "reference_batch_size": 4, "learning_rate": 0.3, "ema_momentum": 0.9}
    recipe = read_recipe("kinetics-8x8", gradient_accumulation_steps=parts, **options)
    model = linear(make_optimizer(recipe))
    x, y = rng.normal(size=(5, 4, 3)).astype("float32"), rng.normal(size=(5, 4, 2)).astype("float32")
    average = None
    for step in range(5):
        for part in range(parts):
            rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
            model.train_on_batch(x[step, rows], y[step, rows])
        weights = model.get_weights()
        average = weights if average is None else [0.9 * a + 0.1 * w for a, w in zip(average, weights, strict=True)]
    if parts == 2:
        # Keras also averages while the parts of the next batch come in, which completes the average of this one.
        model.train_on_batch(x[0, :2], y[0, :2])
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for a, b in zip(average, model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Files


def test_saved_and_loaded(rng, tmp_path):
    """Goes on as if it had not been saved, to the last bit."""
    recipe = read_recipe("kinetics-8x8", total_steps=8, milestones=[3], batch_size=64, learning_rate=0.5)
    model = linear(make_optimizer(recipe))
    x, y = rng.normal(size=(5, 4, 3)).astype("float32"), rng.normal(size=(5, 4, 2)).astype("float32")
    for step in range(2):
        model.train_on_batch(x[step], y[step])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is SGD and type(loaded.optimizer.get_config()["learning_rate"]) is dict
    for step in range(2, 5):
        model.train_on_batch(x[step], y[step])
        loaded.train_on_batch(x[step], y[step])
    assert float(loaded.optimizer.learning_rate) == pytest.approx(0.05)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    config = make_optimizer(recipe).get_config()
    assert config["coupled_weight_decay"] == 1e-4 and config["not_decayed"] == ["gamma", "beta"]
    assert SGD.from_config(config | {"not_decayed": ["kernel"]}).not_decayed == ("kernel",)
