"""Attention of operands that are quantised where they are made.

Axis letters: B batch, N heads, S queries, K keys, D head size.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from splash_attention import bounds
from splash_attention.arguments import flatten_heads, how_to_run, list_arguments
from splash_attention.block_lists import BlockLists
from splash_attention.block_sizes import BlockSizes
from splash_attention.kernel import attention_kernel


def quantized_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: jax.Array,
    *,
    kv_len: int | None = None,
    largest_score: jax.Array,
    largest_value: jax.Array,
    block_lists: BlockLists | None = None,
    rule: jax.Array | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Compute `sequence_minor_attention` with "int8_qk" of operands that `quantize` has made.

    Args:
        q: [B, N, 2 x D, S] int8, the digits of each number D rows apart.
        k: [B, K, N x 2 x D] int8, smoothed before; keys of padding are zeros.
        v: [B, N, D, K].
        scale: [B, N, 1, S] bfloat16 powers of two, of the products of q and k.
        kv_len, largest_value, block_lists, rule, block_sizes, interpret: as in
            `sequence_minor_attention`.
        largest_score: [B, N], an upper bound on |q.k| of the smoothed keys.

    Returns:
        [B, N, D, S] in the dtype of `v`.
    """
    heads, (head_dim, keys) = q.shape[:2], v.shape[2:]
    kv_len = keys if kv_len is None else kv_len
    listed = {}
    if block_lists is not None:
        listed = list_arguments(block_lists, rule, q, keys, kv_len, None, block_sizes)
        k = jnp.pad(k, ((0, 0), (0, block_lists.keys - keys), (0, 0)))
        block_sizes = block_lists.block_sizes
    dtype, tokens = v.dtype, q.shape[-1]
    q, k, v = flatten_heads(q, k, v.astype(jnp.bfloat16), heads[1])
    (out,) = attention_kernel(
        *(q, k, v),
        bounds.bounded_heads(largest_score.reshape(-1), largest_value.reshape(-1), kv_len),
        jnp.array([kv_len], jnp.int32),
        q_scale=scale.reshape(-1, 1, tokens),
        always_valid=kv_len,
        most_valid=kv_len,
        window_size=None,
        **listed,
        out_dtype=dtype,
        **how_to_run(block_sizes, v.shape[1], tokens, kv_len, q.dtype, interpret),
    )
    return out[:, :head_dim].reshape(*heads, head_dim, tokens)
