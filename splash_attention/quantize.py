"""int8 operands for Q.K, with scales that the kernel can apply without another rounding.

Axis letters: N heads, S queries, K keys, D head size.
"""

import jax
import jax.numpy as jnp

# Rows of an int8 tile; keys that end inside one are loaded through 64 more instructions a chunk.
_TILE = 32
_MOST = 127


def quantize(q: jax.Array, k: jax.Array, kv_len: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Round q and k to int8, and say what a product of the two is worth.

    The step of k is one number a head, that of q one a query, such that the product of the two
    steps is a power of two: the kernel scales in bfloat16, where only such a product is exact. It
    costs up to one bit of q.

    Args:
        q: [N, D, S], scale x log2(e) folded in.
        k: [B, K, N / B x D], smoothed where it has channels with a common offset.
        kv_len: keys that count.

    Returns:
        q [N, D, S] int8, k [B, K rounded up to 32, N / B x D] int8, scales [N, 1, S] bfloat16.
    """
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    # An operand of zeros has any step.
    tiny = jnp.float32(2.0**-60)
    heads, head_dim, _ = q.shape
    k_most = jnp.max(jnp.abs(k[:, :kv_len]), axis=1).reshape(heads, head_dim).max(axis=1)
    k_step = jnp.maximum(k_most / _MOST, tiny)
    q_step = jnp.maximum(jnp.max(jnp.abs(q), axis=1, keepdims=True) / _MOST, tiny)
    lanes = jnp.repeat(k_step, head_dim).reshape(k.shape[0], 1, k.shape[2])
    k_step = k_step[:, None, None]
    scale = jnp.exp2(jnp.ceil(jnp.log2(q_step * k_step)))
    q8 = jnp.round(q * (k_step / scale)).astype(jnp.int8)
    k8 = jnp.round(k / lanes).astype(jnp.int8)
    k8 = jnp.pad(k8, ((0, 0), (0, -k.shape[1] % _TILE), (0, 0)))
    return q8, k8, scale.astype(jnp.bfloat16)
