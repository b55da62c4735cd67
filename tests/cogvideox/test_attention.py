"""The TPU kernel as stage 2 calls it equals the reference attention, padding and all.

float32 in interpret mode; 2e-6 is the kernel's own bound for float32, a few roundings of sums over
hundreds of keys.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox.attention import _reference, _splash
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

    got = _splash(scaled, padded_k, padded_v, HEAD_DIM, KEYS, interpret=True)
    expected = np.asarray(_reference(jnp.asarray(q), k, v, HEAD_DIM, KEYS))

    assert got.shape == q.shape
    assert np.linalg.norm(got - expected) <= 2e-6 * np.linalg.norm(expected)
