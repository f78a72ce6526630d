"""What only TensorFlow has: sizes unknown while tracing, and graphs to look into."""

import functools

import pytest
import tensorflow as tf

from keras_nonlocal import ops as knl_ops
from tests import reference
from tests.backends import assert_close
from tests.test_ops import PAIRWISE, make_arguments, make_mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_unknown_sizes(rng, pairwise, masked):
    arguments = make_arguments(rng, pairwise, 9, 5)
    kernel = arguments.pop("score_kernel", None)
    mask = make_mask(rng, 2, 5)
    for query_chunk_size in (None, 4, 100, "auto"):

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, None, 3)),
                tf.TensorSpec((None, None, 3)),
                tf.TensorSpec((None, None, 4)),
                tf.TensorSpec((None, None), tf.bool),
            ]
        )
        def function(theta, phi, g, mask, query_chunk_size=query_chunk_size):
            return knl_ops.non_local(
                theta,
                phi,
                g,
                pairwise,
                score_kernel=kernel,
                mask=mask if masked else None,
                query_chunk_size=query_chunk_size,
            )

        y = function(arguments["theta"], arguments["phi"], arguments["g"], mask)
        expected = reference.non_local(
            **arguments, pairwise=pairwise, score_kernel=kernel, mask=mask if masked else None
        )
        assert_close(y, expected, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_gradients_of_unknown_sizes(rng, pairwise, masked):
    """Unknown sizes train by chunks or by the linear forms; known ones of this size by neither."""
    arguments = make_arguments(rng, pairwise, 9, 5)
    mask = make_mask(rng, 2, 5) if masked else None
    direction = rng.normal(size=(2, 9, 4)).astype("float32")

    def slopes(query_chunk_size, *tensors):
        tensors = dict(zip(arguments, tensors, strict=True))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = knl_ops.non_local(**tensors, pairwise=pairwise, mask=mask, query_chunk_size=query_chunk_size)
            total = tf.reduce_sum(y * direction)
        return tape.gradient(total, list(tensors.values()))

    arrays = list(arguments.values())
    expected = slopes(None, *(tf.constant(array) for array in arrays))
    signature = [tf.TensorSpec((None, None, array.shape[-1])) for array in arrays[:3]]
    signature += [tf.TensorSpec(array.shape) for array in arrays[3:]]
    for query_chunk_size in (4, "auto"):
        traced = tf.function(functools.partial(slopes, query_chunk_size), input_signature=signature)
        for actual, known in zip(traced(*arrays), expected, strict=True):
            assert_close(actual, known, 1e-5)


def test_chunks_bound_the_scores(rng):
    """No tensor of all scores is in the graph of a chunked call, forward or backward."""
    num_queries, num_keys = 96, 80

    def largest(query_chunk_size):
        def step(theta, phi, g):
            with tf.GradientTape() as tape:
                tape.watch(theta)
                y = knl_ops.non_local(theta, phi, g, query_chunk_size=query_chunk_size)
            return tape.gradient(y, theta)

        graph = (
            tf.function(step)
            .get_concrete_function(*[tf.TensorSpec((1, n, 4)) for n in (num_queries, num_keys, num_keys)])
            .graph
        )
        graphs, shapes = [graph], []
        while graphs:
            graph = graphs.pop()
            graphs += [f.graph for f in graph._functions.values() if hasattr(f, "graph")]
            for operation in graph.get_operations():
                shapes += [t.shape for t in operation.outputs]
        sizes = [s.num_elements() for s in shapes if s.rank is not None and s.is_fully_defined()]
        return max(sizes)

    assert largest(None) >= num_queries * num_keys  # the measure sees what it looks for
    assert 16 * num_keys <= largest(16) < num_queries * num_keys  # and looks into the loop


def test_chunks_are_recomputed_in_the_backward_pass(rng, monkeypatch):
    calls = []

    def spy(*arguments, original=knl_ops._bilinear_scores):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(knl_ops, "_bilinear_scores", spy)

    @tf.function
    def step(x, query_chunk_size, backward):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = knl_ops.non_local(x, x, x, query_chunk_size=query_chunk_size)
        return tape.gradient(y, x) if backward else y

    def count(*arguments):
        calls.clear()
        step(tf.constant(rng.normal(size=(1, 9, 4)).astype("float32")), *arguments)
        return len(calls)

    assert count(None, False) == count(None, True) == 1  # whole weights are kept
    assert 1 <= count(4, False) < count(4, True)  # chunks are not
