"""What differs between the backends of Keras, so that a test is written once: gradients, compilation, comparing.

Values are compared as float64 NumPy arrays; all else in a test is `keras.ops`.
"""

import keras
import numpy as np
from keras import ops

BACKEND = keras.config.backend()


def to_numpy(tensor):
    """Of a tensor, a variable or an array; half precision comes as float32, which is exact.

    NumPy has no bfloat16 of PyTorch's, and no tensor of PyTorch's that has a gradient.
    """
    if dtype_of(tensor) in ("bfloat16", "float16"):
        tensor = ops.cast(tensor, "float32")
    return ops.convert_to_numpy(tensor)


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def assert_close(actual, expected, tolerance=1e-5):
    """The largest difference, relative to the largest expected number."""
    actual, expected = np.float64(to_numpy(actual)), np.float64(to_numpy(expected))
    assert actual.shape == expected.shape
    largest = np.abs(expected).max(initial=1e-3)
    assert np.abs(actual - expected).max(initial=0.0) <= tolerance * largest


def assert_equal(actual, expected):
    np.testing.assert_array_equal(to_numpy(actual), to_numpy(expected))


def gradients(function, arrays):
    """`function(*arrays)` and the gradients of its sum to each of the arrays, as NumPy.

    Zero where none arrives, on every backend.
    """
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    value, result = value_and_gradients(lambda *tensors: ops.sum(function(*tensors)), tensors)
    return to_numpy(value), [to_numpy(gradient) for gradient in result]


def weight_gradients(model, loss, inputs, **options):
    """`loss(model(inputs, **options))` and its gradients to the trainable weights of the model or layer."""
    weights = [weight.value for weight in model.trainable_weights]
    if BACKEND == "jax":
        # Weights are arguments there, so that they can be traced.
        others = [weight.value for weight in model.non_trainable_weights]

        def function(*weights):
            outputs, _ = model.stateless_call(list(weights), others, ops.convert_to_tensor(inputs), **options)
            return loss(outputs)
    else:

        def function(*weights):
            return loss(model(inputs, **options))

    value, result = value_and_gradients(function, weights)
    return to_numpy(value), [to_numpy(gradient) for gradient in result]


def value_and_gradients(function, tensors):
    """Of a function with one number as its result; tensors in and out, so that it can be compiled."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        return value, tape.gradient(value, tensors, unconnected_gradients="zero")
    if BACKEND == "jax":
        import jax

        return jax.value_and_grad(function, argnums=tuple(range(len(tensors))))(*tensors)
    import torch

    for tensor in tensors:
        tensor.requires_grad_(True)  # weights have it already
    value = function(*tensors)
    return value, torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)


def jit(function):
    """Compiled by XLA, for fixed shapes.

    PyTorch has no part in it: Keras runs it eagerly unless told otherwise, and its compiler wants a C++ tool chain at
    run time. Tests of compiled code are not collected there.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    raise ValueError(f"Nothing to compile on this backend. Received: backend={BACKEND!r}")
