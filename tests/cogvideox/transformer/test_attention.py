"""The TPU kernel as stage 2 calls it equals the reference attention, padding and all.

float32 in interpret mode; 2e-6 is the kernel's own bound for float32, a few roundings of sums over
hundreds of keys.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox.transformer.attention import Bounds, _reference, _splash
from cogvideox.transformer.qk_norm import longest_row, norm_and_rotate
from splash_attention import query_scale

HEAD_DIM, TOKENS, KEYS = 64, 384, 301


@pytest.mark.parametrize(("heads", "poison"), [(1, np.nan), (2, np.inf), (4, np.nan)])
def test_splash_equals_reference(heads, poison):
    rng = np.random.default_rng(heads)
    q, k, v = rng.normal(size=(3, 2, heads * HEAD_DIM, TOKENS)).astype(np.float32)
    k = np.swapaxes(k, 1, 2)
    padded_k, padded_v = k.copy(), v.copy()
    padded_k[:, KEYS:] = poison
    padded_v[..., KEYS:] = poison
    scaled = jnp.asarray(q * np.float32(query_scale(HEAD_DIM)))

    # Loose enough for any of these inputs; a kernel told 1e6 must take the other path.
    for largest_score in (np.float32(100), np.float32(1e6)):
        bound = Bounds(largest_score, np.abs(v).max(-1))
        got = _splash(scaled, padded_k, padded_v, HEAD_DIM, KEYS, bound, interpret=True)
        tokens_first = (jnp.asarray(x) for x in (np.swapaxes(q, 1, 2), k, np.swapaxes(v, 1, 2)))
        expected = np.swapaxes(_reference(*tokens_first, HEAD_DIM, KEYS, bound), 1, 2)
        assert got.shape == q.shape
        assert np.linalg.norm(got - expected) <= 2e-6 * np.linalg.norm(expected)


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
