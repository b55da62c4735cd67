"""Quantise q and k to pairs of int8, with scales that the kernel applies without rounding.

Axis letters: N heads, S queries, K keys, D head size.
"""

import jax
import jax.numpy as jnp

# int8 digits per number.
DIGITS = 2

# Rows of an int8 tile. Keys that end inside a tile cost 64 more load instructions per chunk.
_TILE = 32
_MOST = 127
# The step of an all-zero operand, so that nothing divides by zero.
_TINY = 2.0**-60

# The share of the first digit in the second, and the factor on a product of pairs; see `digits`.
_SHARE = 1 / 4
_GAIN = 1 + _SHARE**2


def quantize(q: jax.Array, k: jax.Array, kv_len: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantise q and k to pairs of int8, with one scale per query for their products.

    k has one step per head and q one per query, chosen such that the product of the two steps is a
    power of two: the kernel scales in bfloat16, where only such a product is exact.

    Args:
        q: [N, D, S], scaled by `query_scale`.
        k: [B, K, N / B x D].
        kv_len: number of valid keys.

    Returns:
        q [N, 2 x D, S] int8, k [B, K rounded up to 32, N / B x 2 x D] int8, and the scales
        [N, 1, S] bfloat16.
    """
    heads, head_dim, _ = q.shape
    q = q.astype(jnp.float32)
    k = k.astype(jnp.float32).reshape(*k.shape[:2], -1, head_dim)
    step = key_step(jnp.max(jnp.abs(k[:, :kv_len]), axis=(1, 3), keepdims=True))
    largest = jnp.max(jnp.abs(q), axis=1, keepdims=True)
    factor, scale = score_scale(largest, step.reshape(heads, 1, 1))
    q8 = digits(q * factor, axis=1).astype(jnp.int8)
    k8 = digits(k / step, axis=3).astype(jnp.int8).reshape(*k.shape[:2], -1)
    k8 = jnp.pad(k8, ((0, 0), (0, -k.shape[1] % _TILE), (0, 0)))
    return q8, k8, scale.astype(jnp.bfloat16)


def key_step(largest: jax.Array) -> jax.Array:
    """Return the step of keys of this largest magnitude."""
    return jnp.maximum(largest / _MOST, _TINY)


def score_scale(largest: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the factor on queries before `digits`, and the scale of their products with keys.

    Args:
        largest: magnitude of each query.
        step: of the keys; broadcasts.
    """
    q_step = jnp.maximum(largest / _MOST, _TINY)
    scale = jnp.exp2(jnp.ceil(jnp.log2(q_step * step / _GAIN)))
    return step / (scale * _GAIN), scale


def digits(x: jax.Array, axis: int) -> jax.Array:
    """Split |x| <= 127 into two digits: a = round(x), and s a + g / s (x - a), rounded.

    Both are whole numbers of at most 127 in magnitude, in float32.

    s is _SHARE and g is _GAIN = 1 + s^2. For x and y with first digits a and b, the products of the
    first and of the second digits add up to

        g (a b + a (y - b) + (x - a) b) + (g / s)^2 (x - a) (y - b)

    This is g x y, but for a multiple of the last term and the rounding of the second digits, a
    quarter of a step. The MXU contracts over 128 numbers in nearly the time of 64.
    """
    first = jnp.round(x)
    second = jnp.round(_SHARE * first + _GAIN / _SHARE * (x - first))
    return jnp.concatenate([first, second], axis=axis)
