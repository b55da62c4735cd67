"""The unit of scores, and bounds that prove, per head, that softmax needs no running maximum.

Axis letters: B batch, N heads (with batch), S queries, K keys, D head size.
"""

import math

import jax
import jax.numpy as jnp


def query_scale(head_dim: int, scale: float | None = None) -> float:
    """Return the factor on q that turns q.k into the base-2 logarithm of a softmax weight.

    Multiply q by it in float32 before q is rounded to bfloat16. Rounding q a second time would be
    the larger half of the kernel's error.
    """
    return (1 / math.sqrt(head_dim) if scale is None else scale) * math.log2(math.e)


def smooth(k: jax.Array, valid: jax.Array) -> jax.Array:
    """Subtract from k [B, K, N x D] the mean of its valid keys, keeping its dtype.

    Other keys become zeros.

    q.(k - mean) differs from q.k by the same number for every key, so softmax does not change.

    Source: SageAttention (arXiv 2410.02367).

    Args:
        valid: bool [K].
    """
    valid = valid[:, None]
    k32 = jnp.where(valid, k.astype(jnp.float32), 0)
    mean = jnp.sum(k32, axis=1, keepdims=True) / jnp.sum(valid)
    return jnp.where(valid, k32 - mean, 0).astype(k.dtype)


def largest_scores(q: jax.Array, k: jax.Array, kv_len: int) -> jax.Array:
    """Bound |q.k| per head by the Cauchy-Schwarz inequality: max|q| max|k|, [N] float32.

    Args:
        q: [N, D, S], scaled by `query_scale`.
        k: [B, K, N / B x D].
        kv_len: number of valid keys.
    """
    heads, head_dim, _ = q.shape
    q_squares = jnp.square(q.astype(jnp.float32))
    k_squares = jnp.square(k[:, :kv_len].astype(jnp.float32))
    k_squares = k_squares.reshape(k.shape[0], kv_len, -1, head_dim)
    q_norm = jnp.sqrt(jnp.max(jnp.sum(q_squares, axis=1), axis=1))
    k_norm = jnp.sqrt(jnp.max(jnp.sum(k_squares, axis=3), axis=1))
    return q_norm * k_norm.reshape(heads)


def largest_values(v: jax.Array, kv_len: int) -> jax.Array:
    """Return max|v| per head over the first `kv_len` keys of v [N, D, K]: [N]."""
    return jnp.max(jnp.abs(v[..., :kv_len]), axis=(1, 2))


def bounded_heads(largest_score: jax.Array, largest_value: jax.Array, kv_len: int) -> jax.Array:
    """Return 1 for each head that needs no running maximum, else 0: [N] int32.

    If every score s, in powers of two, has |s| <= B, then 2^-B <= exp2(s) <= 2^B. The denominator
    and the weighted sum of values stay finite while B + log2(keys) + log2(max|v|) < 127. At the
    other end, the smallest weight times a value of 2^-24 max|v| must be a normal number, above
    2^-126. A head with an infinity compares false and takes the online path. A head with NaN may
    take either path; the NaN comes out in the same places.

    Args:
        largest_score: B, [N].
        largest_value: max|v|, [N].
        kv_len: number of valid keys.
    """
    log_v = jnp.log2(largest_value.astype(jnp.float32))
    above = largest_score + math.log2(kv_len) + jnp.maximum(log_v, 0) <= 126
    below = largest_score + jnp.maximum(-log_v, 0) <= 126 - 24
    return (above & below).astype(jnp.int32)
