"""q/k norm and rotary embedding, between the projections and the attention kernel.

A head's rotary pairs lie half a head apart (`rotary_halves`). Everything is computed in float32 and
rounded once.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# diffusers' CogVideoXBlock gives its q/k norms this epsilon, whatever the config says.
EPS = 1e-6

Rotary = tuple[jax.Array, jax.Array]


def rotary_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders each head's rows (first axis) from pairs side by side to even half, odd half.

    q.k does not change when q and k are reordered alike.
    """
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.moveaxis(paired, 2, 1).reshape(rows.shape)


def norm_and_rotate(
    x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
) -> jax.Array:
    """LayerNorm over each head's numbers, then the rotary embedding.

    Args:
        x: [b, s, R], R = heads x D.
        weight, bias: of the norm, [D] float32; a factor on the result goes into both.
        rotary: cos and sin [D / 2, s] float32.

    Returns:
        [b, s, R] in x's dtype.
    """
    heads = x.reshape(*x.shape[:2], -1, weight.size).astype(jnp.float32)
    tables = rotary and tuple(table.T[:, None] for table in rotary)
    return norm_heads(heads, weight, bias, tables, axis=-1).reshape(x.shape).astype(x.dtype)


def longest_row(weight: jax.Array, bias: jax.Array) -> jax.Array:
    """A bound on the norm of what `norm_and_rotate` makes of any one head's row, [] float32.

    A normed row is at most sqrt(D) long before weight and bias, and rotating keeps its length; 1%
    covers the rounding to bfloat16.
    """
    longest = jnp.abs(weight).max() * math.sqrt(weight.size) + jnp.linalg.norm(bias)
    return 1.01 * longest


def norm_heads(
    x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None, axis: int = -2
) -> jax.Array:
    """`norm_and_rotate` of x float32 with D along `axis`; the rest broadcasts against it."""
    centred = x - x.mean(axis, keepdims=True)
    variance = jnp.square(centred).mean(axis, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + EPS) * weight + bias
    if rotary is None:
        return normed
    cos, sin = rotary
    even, odd = jnp.split(normed, 2, axis=axis)
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=axis)
