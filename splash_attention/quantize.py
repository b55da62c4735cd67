"""int8 operands for Q.K: each number is a sum of int8 digits, scaled by powers of two.

The MXU of v6e multiplies a depth of 256 in the time of 64. A head of 64 therefore has room for two
digits of q and two of k, every pair of which is multiplied: (a + b)(c + d) = ac + ad + bc + bd.
Two digits hold -254..254, one bit more than int8 for no more time.

Axis letters: N heads, S queries, K keys, D head size, C depth of the product.
"""

import jax
import jax.numpy as jnp

_MXU_DEPTH = 256
_DIGIT = 127


def digits(head_dim: int) -> tuple[int, int]:
    """int8 digits of a number of q and of k, whose pairs fill the depth of the MXU."""
    pairs = _MXU_DEPTH // head_dim
    return (2, 2) if pairs >= 4 else (2, 1) if pairs >= 2 else (1, 1)


def depth(head_dim: int) -> int:
    """C, the depth of the product of the digits of one score."""
    of_q, of_k = digits(head_dim)
    return head_dim * of_q * of_k


def quantize(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int8 digits of q and k, and what their product is worth.

    The step of k is one number a head; that of q one number a query, such that the product of the
    two steps is a power of two. The kernel scales in bfloat16, where only such a product is exact.

    Args:
        q: [N, D, S], scale x log2(e) folded in.
        k: [N, K, D].

    Returns:
        q digits [N, C, S] int8, k digits [N, K, C] int8, scales [N, 1, S] bfloat16.
    """
    of_q, of_k = digits(q.shape[1])
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    k_step = jnp.maximum(jnp.max(jnp.abs(k), axis=(1, 2), keepdims=True) / (of_k * _DIGIT), tiny)
    q_step = jnp.maximum(jnp.max(jnp.abs(q), axis=1, keepdims=True) / (of_q * _DIGIT), tiny)
    scale = jnp.exp2(jnp.ceil(jnp.log2(q_step * k_step)))
    q_digits = _split(jnp.round(q * (k_step / scale)), of_q)
    k_digits = _split(jnp.round(k / k_step), of_k)
    # Depth, in order: every digit of q beside every digit of k.
    q_operand = jnp.concatenate([d for d in q_digits for _ in k_digits], axis=1)
    k_operand = jnp.concatenate([d for _ in q_digits for d in k_digits], axis=2)
    return q_operand, k_operand, scale.astype(jnp.bfloat16)


def _split(x: jax.Array, count: int) -> list[jax.Array]:
    """Whole numbers within count x 127 as `count` int8 digits of that sum."""
    if count == 1:
        return [x.astype(jnp.int8)]
    half = jnp.floor(x / 2)
    return [half.astype(jnp.int8), (x - half).astype(jnp.int8)]
