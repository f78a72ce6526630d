"""What only JAX has: the whole computation as an expression to look into."""

import jax
import jax.numpy as jnp

from keras_nonlocal import ops as knl_ops


def sizes(jaxpr):
    """Of every value that is computed, also inside of loops and of recomputed parts."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_chunks_bound_the_scores():
    """No array of all scores exists in a chunked call, forward or backward."""
    num_queries, num_keys = 96, 80

    def largest(query_chunk_size):
        def total(theta, phi, g):
            return knl_ops.non_local(theta, phi, g, query_chunk_size=query_chunk_size).sum()

        arrays = [jnp.ones((1, n, 4)) for n in (num_queries, num_keys, num_keys)]
        return max(sizes(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*arrays).jaxpr))

    assert largest(None) >= num_queries * num_keys  # the measure sees what it looks for
    assert 16 * num_keys <= largest(16) < num_queries * num_keys  # and looks into the loop


def test_keys_are_kept_once():
    """The backward pass of a chunked call holds the keys, not one copy of them for each chunk."""
    num_queries, num_keys, channels = 128, 64, 32

    def total(theta, phi, g):
        return knl_ops.non_local(theta, phi, g, query_chunk_size=8).sum()

    arrays = [jnp.ones((1, n, channels)) for n in (num_queries, num_keys, num_keys)]
    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*arrays).jaxpr
    assert max(sizes(jaxpr)) <= num_queries * channels < 16 * num_keys * channels
