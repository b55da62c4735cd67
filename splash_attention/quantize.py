"""int8 operands for Q.K, with scales that the kernel can apply without another rounding.

Axis letters: N heads, S queries, K keys, D head size.
"""

import jax
import jax.numpy as jnp

# int8 numbers that stand for one of an operand.
DIGITS = 2

# Rows of an int8 tile; keys that end inside one are loaded through 64 more instructions a chunk.
_TILE = 32
_MOST = 127

# How much of the first digit is in the second, and what a product of both pairs then comes to.
_SHARE = 1 / 4
_GAIN = 1 + _SHARE**2


def quantize(q: jax.Array, k: jax.Array, kv_len: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q and k as pairs of int8, and what a product of the two is worth.

    The step of k is one number a head, that of q one a query, such that the product of the two
    steps is a power of two: the kernel scales in bfloat16, where only such a product is exact.

    Args:
        q: [N, D, S], scale x log2(e) folded in.
        k: [B, K, N / B x D].
        kv_len: keys that count.

    Returns:
        q [N, 2 x D, S] int8, k [B, K rounded up to 32, N / B x 2 x D] int8, scales [N, 1, S]
        bfloat16.
    """
    heads, head_dim, _ = q.shape
    q = q.astype(jnp.float32)
    k = k.astype(jnp.float32).reshape(*k.shape[:2], -1, head_dim)
    # An operand of zeros has any step.
    tiny = jnp.float32(2.0**-60)
    k_step = jnp.max(jnp.abs(k[:, :kv_len]), axis=(1, 3), keepdims=True) / _MOST
    q_step = jnp.max(jnp.abs(q), axis=1, keepdims=True) / _MOST
    k_step, q_step = jnp.maximum(k_step, tiny), jnp.maximum(q_step, tiny)
    k_step_of_head = k_step.reshape(heads, 1, 1)
    scale = jnp.exp2(jnp.ceil(jnp.log2(q_step * k_step_of_head / _GAIN)))
    q8 = _digits(q * (k_step_of_head / (scale * _GAIN)), axis=1)
    k8 = _digits(k / k_step, axis=3).reshape(*k.shape[:2], -1)
    k8 = jnp.pad(k8, ((0, 0), (0, -k.shape[1] % _TILE), (0, 0)))
    return q8, k8, scale.astype(jnp.bfloat16)


def _digits(x: jax.Array, axis: int) -> jax.Array:
    """x, at most 127, as two int8: its rounding a, and s a + g / s (x - a), rounded.

    s is _SHARE, g is _GAIN = 1 + s^2. Of two numbers x and y with roundings a and b, the product of
    the first digits plus that of the second is

        g (a b + a (y - b) + (x - a) b) + (g / s)^2 (x - a) (y - b)

    and so g x y but for what is left of the last term, and a quarter of a step where the second
    digits are rounded. Contracting over 128 numbers takes the MXU hardly longer than over 64.
    """
    first = jnp.round(x)
    second = jnp.round(_SHARE * first + _GAIN / _SHARE * (x - first))
    return jnp.concatenate([first, second], axis=axis).astype(jnp.int8)
