"""Attention in plain jax.numpy: float32 arithmetic, bounded memory, no kernel.

"int8_qk" rounds as the kernel does, so that it is also the definition of the kernel's result.

Tests compare the kernel with it, and CPUs run it. It computes the scores of one block of queries at
a time and never holds the whole [S, K] matrix.

Axis letters: N heads, S query tokens, K key tokens, D head size.
"""

import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

from splash_attention import bounds
from splash_attention.block_lists import BlockLists
from splash_attention.quantize import quantize

# Scores held at once, over batch and heads: 2**26 float32 values are 256 MiB. A few thousand tokens
# fit in one block and need no loop.
_MAX_SCORES = 2**26


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    block_lists: BlockLists | None = None,
    rule: jax.Array | None = None,
    precision: str = "bf16",
    smooth_k: bool = False,
) -> jax.Array:
    """Compute non-causal softmax attention in float32, whatever the input dtype.

    Args:
        q: [..., S, D] of any dtype. Batch and heads are optional leading axes.
        k: [..., K, D], with the leading axes of `q`.
        v: [..., K, Dv], with the leading axes of `q`.
        scale: factor on the scores. Default: 1 / sqrt(D).
        window_size: query i attends only to keys j with |i - j| <= window_size. Default: all keys.
        block_lists, rule: as in `splash_attention`; the scores that no list names are masked.
        precision: "bf16" computes in float32; "int8_qk" as in `splash_attention`.
        smooth_k: as in `splash_attention`.

    Returns:
        [..., S, Dv] in the dtype of `q`.

    Raises:
        ValueError: shapes do not fit together, or a query sees no key.
        TypeError: window_size is not an integer.
    """
    check_shapes(q.shape, k.shape, v.shape, window_size)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    *leading, q_len, _ = q.shape
    kv_len = k.shape[-2]
    scores_per_query = math.prod(leading) * kv_len
    block = max(1, min(q_len, _MAX_SCORES // max(scores_per_query, 1)))
    dtype = q.dtype
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)
    valid = jnp.ones(kv_len, jnp.bool_)
    if block_lists is not None:
        # Padding may hold anything; 0 x NaN would be NaN.
        valid = block_lists.valid_keys()[:kv_len]
        k32, v32 = jnp.where(valid[:, None], k32, 0), jnp.where(valid[:, None], v32, 0)
    if smooth_k:
        k32 = bounds.smooth(k32.reshape(-1, *k.shape[-2:]), valid).reshape(k.shape)
    quantized = precision == "int8_qk"
    if quantized:
        q, k32, steps = _quantized(q.astype(jnp.float32), k32, scale)
        v32 = _to_bfloat16(v32)
        scale = 1.0
    if block_lists is not None:
        rules = jnp.zeros(q.shape[:-2], jnp.int32) if rule is None else rule

    def attend(q_block: jax.Array, first_query: jax.Array | int) -> jax.Array:
        q32 = q_block.astype(jnp.float32) * scale
        scores = jnp.einsum("...sd,...kd->...sk", q32, k32, precision=jax.lax.Precision.HIGHEST)
        if quantized:
            of_block = jax.lax.dynamic_slice_in_dim(steps, first_query, q_block.shape[-2], -2)
            scores = _to_bfloat16(scores) * of_block.astype(jnp.float32)
        if window_size is not None:
            query = first_query + jnp.arange(q_block.shape[-2])[:, None]
            visible = jnp.abs(query - jnp.arange(kv_len)[None, :]) <= window_size
            scores = jnp.where(visible, scores, -jnp.inf)
        if block_lists is not None:
            tile = (first_query + jnp.arange(q_block.shape[-2])) // block_lists.block_q
            visible = block_lists.keep()[rules[..., None], tile, :kv_len]
            scores = jnp.where(visible, scores, -jnp.inf)
        weights = _weights(scores, quantized)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("...sk,...kd->...sd", weights, v32, precision=jax.lax.Precision.HIGHEST)
        return (out / total).astype(dtype)

    return _by_blocks(attend, q, block, (*leading, q_len, v.shape[-1]), dtype)


def _by_blocks(
    attend: Callable[[jax.Array, jax.Array | int], jax.Array],
    q: jax.Array,
    block: int,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """Call `attend` on blocks of the queries [..., S, D], and join its results to `shape`."""
    axis = q.ndim - 2
    q_len = q.shape[axis]
    if block == q_len:
        return attend(q, 0)
    # The last block starts early enough to end with the last query, so no block needs padding. Some
    # queries are computed twice, with the same result.
    starts = jnp.minimum(jnp.arange(-(-q_len // block)) * block, q_len - block)

    def write_block(i: jax.Array, out: jax.Array) -> jax.Array:
        q_block = jax.lax.dynamic_slice_in_dim(q, starts[i], block, axis)
        return jax.lax.dynamic_update_slice_in_dim(out, attend(q_block, starts[i]), starts[i], axis)

    return jax.lax.fori_loop(0, starts.size, write_block, jnp.zeros(shape, dtype))


def _quantized(q: jax.Array, k: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantise q [..., S, D] and k [..., K, D] to whole float32 numbers [..., S or K, 2 x D].

    Their products are exact: sums of at most 512 products below 2^14.

    Returns:
        q, k, and the step of the products of each query, [..., S, 1] bfloat16.
    """
    leading, kv_len = q.shape[:-2], k.shape[-2]
    scaled = q.reshape(-1, *q.shape[-2:]).swapaxes(1, 2) * bounds.query_scale(q.shape[-1], scale)
    q8, k8, steps = quantize(scaled, k.reshape(-1, *k.shape[-2:]), kv_len)
    q8, steps = q8.swapaxes(1, 2).astype(jnp.float32), steps.swapaxes(1, 2)
    whole = q8, k8[:, :kv_len].astype(jnp.float32), steps
    q, k, steps = (x.reshape(*leading, *x.shape[-2:]) for x in whole)
    return q, k, steps


def _weights(scores: jax.Array, quantized: bool) -> jax.Array:
    """Return softmax weights without their denominator."""
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if not quantized:
        return jnp.exp(scores - highest)
    # A whole number of powers of two does not change how the weights round.
    return _to_bfloat16(jnp.exp2(scores - jnp.ceil(highest)))


def _to_bfloat16(x: jax.Array) -> jax.Array:
    """Round float32 to bfloat16. XLA may drop a conversion there and back, but not this."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def check_shapes(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], window_size: int | None
) -> None:
    """Check the shapes q [..., S, D], k [..., K, D], v [..., K, Dv], and the window.

    Raises:
        ValueError: shapes do not fit together, are empty, or leave a query without a key.
        TypeError: window_size is not an integer.
    """
    if min(map(len, (q, k, v))) < 2 or q[:-2] != k[:-2] or q[-1] != k[-1] or k[:-1] != v[:-1]:
        raise ValueError(
            f"attention needs q [..., S, D], k [..., K, D], v [..., K, Dv]; got {q}, {k}, {v}"
        )
    if min(q + k + v) < 1:
        raise ValueError(f"attention of an empty array: q {q}, k {k}, v {v}")
    if window_size is None:
        return
    if not isinstance(window_size, numbers.Integral):
        raise TypeError(f"window_size is {window_size!r}; it must be an integer or None")
    if window_size < 0:
        raise ValueError(f"window_size is {window_size}; it must be 0 or more")
    if q[-2] > k[-2] + window_size:
        raise ValueError(
            f"with {k[-2]} keys and window_size {window_size}, query {q[-2] - 1} sees no key; "
            f"the window must be at least {q[-2] - k[-2]}"
        )
