"""Compiled by XLA, with known sizes: the same values and gradients as eagerly. Not on PyTorch, see `backends.jit`."""

import numpy as np
import pytest
from keras import ops

from keras_nonlocal import ops as knl_ops
from tests import reference
from tests.backends import assert_close, gradients, jit, value_and_gradients
from tests.descriptors import SMALL
from tests.test_conformance import costly, ready
from tests.test_fast_forms import concatenation, expected_gradients, force_linear, make
from tests.test_ops import PAIRWISE, make_arguments, make_mask


@costly(SMALL)
def test_compiled(descriptor):
    model, x, expected = ready(descriptor)
    compiled = jit(lambda x: model(x, training=False))
    assert_close(compiled(x), expected, 1e-4)


@pytest.mark.parametrize("query_chunk_size", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_compiled_operation(rng, pairwise, masked, query_chunk_size):
    arguments = make_arguments(rng, pairwise)
    mask = make_mask(rng, 2, 5) if masked else None

    def function(*tensors):
        tensors = dict(zip(arguments, tensors, strict=True))
        y = knl_ops.non_local(**tensors, pairwise=pairwise, mask=mask, query_chunk_size=query_chunk_size)
        return y * ops.cast(ops.arange(7)[:, None], "float32")  # so that the gradients of queries differ

    def slopes(*tensors):
        return value_and_gradients(lambda *tensors: ops.sum(function(*tensors)), tensors)[1]

    arrays = list(arguments.values())
    expected = reference.non_local(**arguments, pairwise=pairwise, mask=mask) * np.arange(7.0)[:, None]
    assert_close(jit(function)(*arrays), expected)
    for actual, eager in zip(jit(slopes)(*arrays), gradients(function, arrays)[1], strict=True):
        assert_close(actual, eager)


def test_compiled_ties(rng, monkeypatch):
    """The sorted concatenation, with many pairs at a_i + b_j = 0: +0 and -0 are the same there."""
    force_linear(monkeypatch)
    arrays = [rng.integers(-1, 2, size=x.shape).astype("float32") for x in make(rng, 2, 12, 11, 1, 2)]
    arrays[3][:] = 1.0
    direction = rng.normal(size=(2, 12, 2)).astype("float32")

    def slopes(*tensors):
        return value_and_gradients(lambda *t: ops.sum(ops.multiply(concatenation(*t), direction)), tensors)[1]

    assert_close(jit(concatenation)(*arrays), reference.non_local(*arrays[:3], "concatenation", arrays[3]))
    for actual, expected in zip(jit(slopes)(*arrays), expected_gradients(arrays, direction), strict=True):
        assert_close(actual, expected)
