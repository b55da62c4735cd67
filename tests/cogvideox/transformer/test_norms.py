"""Norms of a block that other tests do not compare."""

import jax.numpy as jnp
import numpy as np

from cogvideox.transformer.norms import longest_row, norm_and_rotate, rotary_halves

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


def test_rotation_is_a_product_of_complex_numbers():
    """Neighbouring channels are a complex number each; the angle differs by token and pair."""
    rng = np.random.default_rng(0)
    tokens, heads = 5, 3
    paired = rng.normal(size=(tokens, heads, HEAD_DIM)).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, size=(HEAD_DIM // 2, tokens))
    normed = paired - paired.mean(-1, keepdims=True)
    normed /= np.sqrt(np.square(normed).mean(-1, keepdims=True) + 1e-6)
    numbers = (normed[..., 0::2] + 1j * normed[..., 1::2]) * np.exp(1j * angles.T)[:, None]
    expected = np.concatenate([numbers.real, numbers.imag], axis=-1)

    halves = np.stack([rotary_halves(row.reshape(-1), HEAD_DIM) for row in paired])
    rotary = tuple(jnp.asarray(part(angles), jnp.float32) for part in (np.cos, np.sin))
    got = norm_and_rotate(
        jnp.asarray(halves)[None], jnp.ones(HEAD_DIM), jnp.zeros(HEAD_DIM), rotary
    )
    np.testing.assert_allclose(got[0], expected.reshape(tokens, -1), rtol=0, atol=1e-5)
