"""Compiled by XLA, with known sizes: the same values and gradients as eagerly. Not on PyTorch, see `backends.jit`."""

import numpy as np
import pytest

from keras_nonlocal import ops as knl_ops
from tests.backends import assert_close, gradients, jit, weight_gradients
from tests.descriptors import LAYERS, SMALL
from tests.test_conformance import costly, ready
from tests.test_ops import PAIRWISE, make_arguments, make_mask


@costly(SMALL)
def test_compiled(descriptor):
    model, x, expected = ready(descriptor)
    compiled = jit(lambda x: model(x, training=False))
    assert_close(compiled(x), expected, 1e-4)
