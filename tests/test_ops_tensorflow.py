"""What only TensorFlow has: sizes unknown while tracing, and graphs to look into."""

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

    def spy(*arguments, original=knl_ops.attention_weights, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(knl_ops, "attention_weights", spy)

    @tf.function
    def step(x, query_chunk_size):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = knl_ops.non_local(x, x, x, query_chunk_size=query_chunk_size)
        return tape.gradient(y, x)

    x = tf.constant(rng.normal(size=(1, 9, 4)).astype("float32"))
    step(x, None)
    assert len(calls) == 1
    step(x, 4)
    # 1, and 3 more: map traces it twice, the backward pass once. Without recomputation it is 2.
    assert len(calls) >= 4
