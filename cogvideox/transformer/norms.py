"""The norms of a block: LayerNorm with modulation, and the q/k norm with rotary embedding.

Everything is computed in float32 and rounded once. The rotary pairs of a head lie half a head apart
(`rotary_halves`), so that rotating moves no lanes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# diffusers' CogVideoXBlock gives its q/k norms this epsilon, whatever the config says.
EPS = 1e-6

Rotary = tuple[jax.Array, jax.Array]


def norm_and_modulate(
    x: jax.Array, scale: jax.Array, shift: jax.Array, text_rows: jax.Array, eps: float
) -> jax.Array:
    """CogVideoXLayerNormZero: LayerNorm over E without parameters, times `scale`, plus `shift`.

    Args:
        x: [b, s, E]; text rows come first.
        scale, shift: [b, 2, E] float32, for text and for video.
        text_rows: [] int32, how many of the s rows are text.
        eps: of the norm.

    Returns:
        [b, E, s] in x's dtype. With the tokens last the products that follow give q and v with the
        tokens last, and a v6e computes the MLP's first product in 1.8M cycles instead of 3.0M
        (compiler estimates).
    """
    is_text = (jnp.arange(x.shape[1]) < text_rows)[:, None]
    scale, shift = (jnp.where(is_text, part[:, :1], part[:, 1:]) for part in (scale, shift))
    modulated = layer_norm(x.astype(jnp.float32), eps) * scale + shift
    return jnp.swapaxes(modulated.astype(x.dtype), 1, 2)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis, without parameters."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def rotary_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders each head's rows (first axis) from pairs side by side to even half, odd half.

    q.k does not change when q and k are reordered alike.
    """
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.moveaxis(paired, 2, 1).reshape(rows.shape)


def norm_and_rotate(
    x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
) -> jax.Array:
    """LayerNorm over the D numbers of each head, then the rotary embedding.

    Args:
        x: [b, s, R], R = heads x D.
        weight, bias: of the norm, [D] float32; a factor on the result goes into both.
        rotary: cos and sin [D / 2, s] float32.

    Returns:
        [b, s, R] in x's dtype.
    """
    heads = x.reshape(*x.shape[:2], -1, weight.size).astype(jnp.float32)
    tables = rotary and (rotary[0].T[:, None], rotary[1].T[:, None])
    return norm_heads(heads, weight, bias, tables, axis=-1).reshape(x.shape).astype(x.dtype)


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


def longest_row(weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Upper bound on the norm of a head's row after `norm_and_rotate`, [] float32.

    A normed row has a norm of at most sqrt(D) before weight and bias, and rotating keeps norms. 1%
    covers the rounding to bfloat16.
    """
    longest = jnp.abs(weight).max() * math.sqrt(weight.size) + jnp.linalg.norm(bias)
    return 1.01 * longest
