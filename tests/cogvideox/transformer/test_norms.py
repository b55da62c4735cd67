"""Norms of a block that other tests do not compare."""

import jax.numpy as jnp
import numpy as np

from cogvideox.transformer.norms import longest_row, norm_and_rotate

HEAD_DIM = 64


def test_bound_on_the_length_of_a_row():
    """Holds for the longest row there can be, and is not much longer."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, HEAD_DIM)).astype(np.float32)
    weight[0] = 5  # the longest row has all its variance here
    x = rng.normal(size=(1, 1000, HEAD_DIM)).astype(np.float32)
    x[0, 0] = 0
    x[0, 0, 0] = 1000
    rows = norm_and_rotate(jnp.asarray(x), weight, bias, None)
    longest = float(jnp.linalg.norm(rows, axis=2).max())
    assert longest <= longest_row(weight, bias) < 1.5 * longest
