"""Entry points of the Hopper kernel: check the arguments, pad them, choose a path per head.

Axis letters: B batch, S queries, K keys, N heads, D head size.
"""

import math

import jax
import jax.numpy as jnp

from splash_attention.block_lists import BlockLists
from splash_attention.bounds import bounded_heads
from splash_attention.hopper.tiles import ROW_MULTIPLE, AllKeys, HopperConfig, list_tables

COMPUTE_CAPABILITY = "9.0"
# By head size; other sizes are padded to the next. Measured on an H100 while the other units added
# the denominators: 96 heads of 45,106 tokens and size 64 take 76 ms with three warpgroups and tiles
# of 128 keys, 86 ms with two and 128, 103 ms with three and 64. At size 128, 48 heads take 69 ms
# with two and 128, 71 ms with three and 64.
_CONFIGS = {
    64: HopperConfig(warpgroups=3, block_kv=128, stages=4, registers=160),
    128: HopperConfig(warpgroups=2, block_kv=128, stages=2, registers=240),
}
# With fewer keys, reading q, k and v for the bounds takes longer than the running maximum: 0.6 ms
# against 0.2 ms for 96 heads of 4,096 tokens on an H100.
_FEWEST_KEYS_TO_BOUND = 16384
# float16 holds weights of 2^-14 to 2^15 with full precision.
_FLOAT16_BOUND = 14


def choose_config(head_dim: int) -> HopperConfig:
    """Return the layout of a thread block for a head size.

    Raises:
        ValueError: the head size is over 128.
    """
    for size, config in _CONFIGS.items():
        if head_dim <= size:
            return config
    raise ValueError(f"head size is {head_dim}; the Hopper kernel supports at most {max(_CONFIGS)}")


def runs_on_hopper() -> bool:
    """Return whether JAX compiles for a GPU of compute capability 9.0 by default."""
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability == COMPUTE_CAPABILITY


def load_runtime() -> None:
    """Import Mosaic GPU, which names its runtime library to XLA.

    A process that loads a serialized executable with this kernel must do so first.
    """
    from splash_attention.hopper import kernel  # noqa: F401


def hopper_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    factor: float,
    kv_len: int | None = None,
    largest_score: jax.Array | None = None,
    largest_value: jax.Array | None = None,
    block_lists: BlockLists | None = None,
    rule: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute non-causal softmax attention on one Hopper GPU, exact or over lists of chunks.

    Args:
        q: [B, S, N, D] bfloat16 or float16. D is at most 128; sizes other than 64 and 128 are
            padded with zeros, which copies all operands. So does S or K that is not a multiple
            of 8.
        k: [B, K, N, D], in the dtype of `q`.
        v: [B, K, N, D], in the dtype of `q`.
        factor: factor on q.k that gives the base-2 logarithm of a softmax weight: `query_scale`.
            1 if q was multiplied by it before it was rounded, which saves time.
        kv_len: number of valid keys; later keys are padding and may hold anything. Default: K.
        largest_score: [B, N], an upper bound on |q.k| x factor. If it is too low, softmax
            overflows. Default: from the norms of q and k, which are read for it; below 16,384 keys
            no bound, so that all heads take the online path.
        largest_value: [B, N], an upper bound on |v|. Default: v is read for it.
        block_lists: the chunks of keys that each tile of queries attends to, by rule. They replace
            `kv_len`. v is copied, with zeros for its padding.
        rule: [B, N] int32, the rule of each head. Default: the first rule of `block_lists`.

    Returns:
        The output [B, S, N, D] in the dtype of `q`, and log2 of the softmax denominators
        [B, N, S] float32.

    Raises:
        TypeError: dtypes are mixed, or are neither bfloat16 nor float16.
        ValueError: shapes or lists do not fit together, or kv_len or the head size is out of
            range.
    """
    from splash_attention.hopper.kernel import hopper_kernel

    if block_lists is not None and kv_len is not None:
        raise ValueError("block_lists replace kv_len; pass only one of them")
    kv_len = _check(q, k, v, kv_len)
    head_dim, queries, keys = q.shape[-1], q.shape[1], k.shape[1]
    config = choose_config(head_dim)
    listed, valid_k = {}, k[:, :kv_len]
    if block_lists is not None:
        rule = block_lists.rule_of_heads(rule, q.shape[::2], queries, keys)
        tables = list_tables(block_lists, rule, config.block_kv)
        listed = {"lists": tables, "block_q": block_lists.block_q}
        valid = block_lists.valid_keys()[:keys, None, None]
        valid_k, v = (jnp.where(valid, x, jnp.zeros_like(x)) for x in (k, v))
    if factor <= 0:
        # The running maximum is of q.k, before the factor, which must be positive.
        q, factor = -q if factor else jnp.zeros_like(q), -factor or 1.0
    if largest_score is None and kv_len < _FEWEST_KEYS_TO_BOUND:
        bounded = jnp.zeros(q.shape[::2], jnp.int32)
    else:
        if largest_score is None:
            largest_score = largest_scores(q, valid_k) * factor
        if largest_value is None:
            largest_value = jnp.max(jnp.abs(v[:, :kv_len]), axis=(1, 3))
        bounded = bounded_heads(largest_score, largest_value, kv_len)
        if q.dtype == jnp.float16:
            bounded = bounded * (largest_score <= _FLOAT16_BOUND)
    padded_head_dim = next(size for size in _CONFIGS if head_dim <= size)
    q, k, v = (_pad(x, padded_head_dim) for x in (q, k, v))
    # Masked weights are 0, but 0 times NaN is NaN.
    v = v.at[:, kv_len : AllKeys(kv_len, config.block_kv).end].set(0)
    out, log_total = hopper_kernel(
        q, k, v, bounded, kv_len=kv_len, config=config, factor=factor, **listed
    )
    return out[:, :queries, :, :head_dim], log_total[..., :queries]


def heads_first_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    factor: float,
    block_lists: BlockLists | None = None,
    rule: jax.Array | None = None,
) -> jax.Array:
    """Compute `hopper_attention` of q [..., S, D], k and v [..., K, D], rule [...]: [..., S, D]."""
    if rule is not None and rule.shape != q.shape[:-2]:
        raise ValueError(f"rule is {rule.shape}; q has heads {q.shape[:-2]}")
    heads = (x.reshape(-1, x.shape[-2], 1, x.shape[-1]) for x in (q, k, v))
    out, _ = hopper_attention(
        *heads,
        factor=factor,
        block_lists=block_lists,
        rule=None if rule is None else rule.reshape(-1, 1),
    )
    return out.reshape(q.shape)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, kv_len: int | None) -> int:
    """Check the operands of `hopper_attention`; return the number of valid keys."""
    if {x.ndim for x in (q, k, v)} != {4} or q.shape[::2] != k.shape[::2] or k.shape != v.shape:
        raise ValueError(
            "attention needs q [B, S, N, D], k [B, K, N, D] and v [B, K, N, D]; "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if min(*q.shape, *k.shape) < 1:
        raise ValueError(f"attention of an empty array: q {q.shape}, k {k.shape}")
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        raise TypeError(
            "on a Hopper GPU q, k and v must all be bfloat16 or all float16; "
            f"got {q.dtype.name}, {k.dtype.name}, {v.dtype.name}"
        )
    kv_len = k.shape[1] if kv_len is None else kv_len
    if not 0 < kv_len <= k.shape[1]:
        raise ValueError(f"kv_len is {kv_len}; k and v have {k.shape[1]} keys")
    return kv_len


def largest_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Bound |q.k| per head by the Cauchy-Schwarz inequality: max|q| max|k|, [B, N] float32."""
    longest = (jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=3), axis=1) for x in (q, k))
    return jnp.sqrt(math.prod(longest))


def _pad(x: jax.Array, head_dim: int) -> jax.Array:
    """Pad x [B, S, N, D] with zeros to whole row tiles and to a head size of the kernel."""
    rows, columns = -x.shape[1] % ROW_MULTIPLE, head_dim - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x
