"""The public functions: from arrays as callers hold them to the kernel's operands.

Axis letters: B batch, N heads (with batch, where flattened), S query tokens, K key tokens,
D head size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from splash_attention.block_sizes import BlockSizes, choose_block_sizes, current_chip
from splash_attention.kernel import attention_kernel, can_lie_side_by_side
from splash_attention.quantize import quantize
from splash_attention.reference import check_shapes

_MAX_HEAD_DIM = 256
_HEAD_DIM_STEP = 64
_PRECISIONS = ("bf16", "int8_qk")


def query_scale(head_dim: int, scale: float | None = None) -> float:
    """The factor on q that makes q.k the base-2 logarithm of a softmax weight.

    Multiply q by it in float32, before the one rounding to bfloat16: a second rounding is the
    larger half of the kernel's error.
    """
    return (1 / math.sqrt(head_dim) if scale is None else scale) * math.log2(math.e)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    block_sizes: BlockSizes | None = None,
    precision: str = "bf16",
    smooth_k: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Exact softmax attention, non-causal, on a TPU core.

    Args:
        q: [..., S, D] bfloat16 or float32; batch and heads are optional leading axes. D is at most
            256; 64, 128, 192 and 256 run as they are, others are padded with zeros.
        k: [..., K, D], leading axes and dtype of `q`.
        v: [..., K, D], leading axes and dtype of `q`.
        scale: factor on the scores; 1 / sqrt(D) when None.
        window_size: with w, query i sees only the keys j with |i - j| <= w; what no query of a tile
            sees is skipped. All keys when None.
        block_sizes: tiles of the kernel; chosen from the tuned table of the chip when None.
        precision: "bf16" multiplies in the dtype of the inputs: bfloat16 operands with float32
            accumulation, float32 operands without loss. "int8_qk" makes q (one step a query) and k
            (one step a head) pairs of int8 for Q.K and keeps P.V in bfloat16: a fifth fewer cycles
            at head size 64, a relative error of 8e-3 of unit normal inputs instead of 3e-3. Best
            with `smooth_k` where keys have a common offset, as trained models have.
        smooth_k: subtract the mean key of a head from its keys first. Softmax does not change;
            what is left is small, so that rounding it to int8, or to bfloat16 in a later product,
            loses less. Costs a pass over k.
        interpret: run the kernel in TPU interpret mode, on any backend.

    Returns:
        [..., S, D] in the dtype of `q`.

    Raises:
        TypeError: a dtype other than bfloat16 and float32, or mixed dtypes.
        ValueError: shapes that do not fit together, an option out of range, a query that sees no
            key, or block sizes that need more VMEM than the chip has.
    """
    check_shapes(q.shape, k.shape, v.shape, window_size)
    out = sequence_minor_attention(
        *_sequence_minor(q, k, v, scale),
        window_size=window_size,
        block_sizes=block_sizes,
        precision=precision,
        smooth_k=smooth_k,
        interpret=interpret,
    )
    return out.swapaxes(1, 2)[..., : q.shape[-1]].reshape(q.shape)


def _sequence_minor(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [..., S, D], k and v [..., K, D] as the kernel takes them, [N, D, S], [N, K, D], [N, D, K].

    q is scaled; D is filled up with zeros to a multiple of 64.
    """
    _check_dtypes(q, k, v)
    head_dim = q.shape[-1]
    if v.shape[-1] != head_dim:
        raise ValueError(f"v has head size {v.shape[-1]}, q and k have {head_dim}")
    if head_dim > _MAX_HEAD_DIM:
        raise ValueError(f"head size is {head_dim}; at most {_MAX_HEAD_DIM} is supported")
    padding = (0, 0), (0, 0), (0, -head_dim % _HEAD_DIM_STEP)
    q = (q.astype(jnp.float32) * query_scale(head_dim, scale)).astype(q.dtype)
    q, k, v = (
        jnp.pad(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]), padding) for x in (q, k, v)
    )
    return q.swapaxes(1, 2), k, v.swapaxes(1, 2)


def attention_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """`splash_attention` to some of the keys, to be merged with the parts of the others.

    Args:
        q, k, v: [..., S, D] and [..., K, D], as in `splash_attention`.
        kv_len: int32, how many of the keys count, from 0 to K; what follows must be finite.
        scale, block_sizes, interpret: as in `splash_attention`.

    Returns:
        The output [..., S, D] float32 and log2 of the softmax denominators [..., S, 1] float32.
        Where no key counts they are NaN and -infinity.
    """
    check_shapes(q.shape, k.shape, v.shape, None)
    minor = _sequence_minor(q, k, v, scale)
    keys, head_dim = minor[1].shape[1:]
    out, log_total = attention_kernel(
        *minor,
        bounded_heads(largest_scores(*minor[:2], keys), largest_values(minor[2], keys), keys),
        kv_len.reshape(1),
        always_valid=0,
        most_valid=keys,
        out_dtype=jnp.float32,
        with_log_total=True,
        **_how_to_run(block_sizes, head_dim, q.shape[-2], keys, q.dtype, interpret),
    )
    out = out.swapaxes(1, 2)[..., : q.shape[-1]].reshape(q.shape)
    return out, log_total.reshape(*q.shape[:-1], 1)


def sequence_minor_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kv_len: int | None = None,
    largest_score: jax.Array | None = None,
    largest_value: jax.Array | None = None,
    window_size: int | None = None,
    block_sizes: BlockSizes | None = None,
    precision: str = "bf16",
    smooth_k: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`splash_attention` of operands in the kernel's own layout: nothing is transposed outside.

    Args:
        q: [..., D, S], already multiplied by `query_scale` before it was rounded; D is a multiple
            of 64, at most 256.
        k: [..., K, D]; or, with q [..., N, D, S], [..., K, N x D], the keys of N heads side by side
            as a projection makes them. These are read as they are for D = 64 with N even and for
            D = 128 and 256, and transposed first for others. Two heads of 64 share a product, so a
            NaN or infinity in the keys of one reaches both.
        v: [..., D, K].
        kv_len: keys that count; those from it on are padding, whatever they hold. K when None.
        largest_score: [...], for each head a number that no |score| exceeds, in powers of two, as
            q.k comes out. Spares reading q and k for their norms; too low a number lets softmax
            overflow. From the norms when None.
        largest_value: [...], for each head a number that no |v| exceeds; spares reading v.
        window_size, block_sizes, precision, smooth_k, interpret: as in `splash_attention`.

    Returns:
        [..., D, S] in the dtype of `q`.

    Raises:
        TypeError, ValueError: as `splash_attention`.
    """
    *leading, head_dim, q_len = q.shape if q.ndim > 1 else (0, 0)
    heads = math.prod(leading)
    side_by_side = bool(leading) and k.ndim == q.ndim - 1
    beside, batch = (leading[-1], leading[:-1]) if side_by_side else (1, leading)
    keys = k.shape[-2] if k.ndim > 1 else 0
    if k.shape != (*batch, keys, beside * head_dim) or v.shape != (*leading, head_dim, keys):
        raise ValueError(
            "attention needs q [..., D, S], k [..., K, D], v [..., D, K], or with q [..., N, D, S] "
            f"k [..., K, N x D]; got {q.shape}, {k.shape}, {v.shape}"
        )
    if kv_len is None:
        kv_len = keys
    if not 0 < kv_len <= keys:
        raise ValueError(f"kv_len is {kv_len}; k and v have {keys} keys")
    valid = (*leading, kv_len, head_dim)
    check_shapes((*leading, q_len, head_dim), valid, valid, window_size)
    if head_dim % _HEAD_DIM_STEP or head_dim > _MAX_HEAD_DIM:
        raise ValueError(
            f"head size is {head_dim}; this entry takes multiples of {_HEAD_DIM_STEP} up to "
            f"{_MAX_HEAD_DIM}"
        )
    if precision not in _PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {_PRECISIONS}")
    _check_dtypes(q, k, v)
    for name, largest in (("largest_score", largest_score), ("largest_value", largest_value)):
        if largest is not None and largest.shape != tuple(leading):
            raise ValueError(f"{name} is {largest.shape}; q has heads {tuple(leading)}")
    if window_size is not None and window_size >= max(q_len, kv_len) - 1:
        window_size = None

    q, v = (x.reshape(heads, head_dim, -1) for x in (q, v))
    k = k.reshape(heads // beside, keys, beside * head_dim)
    if beside > 1 and not can_lie_side_by_side(head_dim, beside):
        k = k.reshape(-1, keys, beside, head_dim).swapaxes(1, 2).reshape(heads, keys, head_dim)
    if precision == "int8_qk":
        # What smoothing leaves is rounded once, to int8.
        k = k.astype(jnp.float32)
    if smooth_k:
        k = smooth(k, kv_len)
    if largest_score is None:
        largest_score = largest_scores(q, k, kv_len)
    elif smooth_k:
        # The mean key has a score of its own, no larger than theirs.
        largest_score = 2 * largest_score
    if largest_value is None:
        largest_value = largest_values(v, kv_len)
    bounded = bounded_heads(largest_score.reshape(heads), largest_value.reshape(heads), kv_len)
    out_dtype, q_scale = q.dtype, None
    if precision == "int8_qk":
        q, k, q_scale = quantize(q, k, kv_len)
        v = v.astype(jnp.bfloat16)
    (out,) = attention_kernel(
        q,
        k,
        v,
        bounded,
        jnp.array([kv_len], jnp.int32),
        q_scale=q_scale,
        always_valid=kv_len,
        most_valid=kv_len,
        window_size=window_size,
        out_dtype=out_dtype,
        **_how_to_run(block_sizes, head_dim, q_len, kv_len, q.dtype, interpret),
    )
    return out.reshape(*leading, head_dim, q_len)


def _check_dtypes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        raise TypeError(
            "q, k and v must all be bfloat16 or all float32; "
            f"got {q.dtype.name}, {k.dtype.name}, {v.dtype.name}"
        )


def _how_to_run(
    block_sizes: BlockSizes | None,
    head_dim: int,
    q_len: int,
    kv_len: int,
    dtype: jnp.dtype,
    interpret: bool | pltpu.InterpretParams,
) -> dict[str, Any]:
    """The kernel's tiles, VMEM limit and interpretation, as its keyword arguments."""
    chip = current_chip(interpret=bool(interpret))
    if not isinstance(block_sizes, BlockSizes | None):
        raise TypeError(f"block_sizes is {block_sizes!r}; it must be a BlockSizes or None")
    if block_sizes is None:
        block_sizes = choose_block_sizes(chip, head_dim, q_len, kv_len, dtype)
    return {
        "block_sizes": block_sizes,
        "vmem_limit_bytes": chip.require_vmem(block_sizes, head_dim, dtype),
        "interpret": pltpu.InterpretParams() if interpret is True else interpret,
    }


def smooth(k: jax.Array, kv_len: int) -> jax.Array:
    """k [B, K, N x D] less the mean of its first `kv_len` keys, in its own dtype.

    q.(k - mean) differs from q.k by the same number for every key, which softmax ignores
    (SageAttention, Zhang et al. 2024).
    """
    mean = jnp.mean(k[:, :kv_len].astype(jnp.float32), axis=1, keepdims=True)
    return (k.astype(jnp.float32) - mean).astype(k.dtype)


def largest_scores(q: jax.Array, k: jax.Array, kv_len: int) -> jax.Array:
    """What no |score| of a head exceeds, by Cauchy and Schwarz: max|q| max|k|, [N] float32.

    Args:
        q: [N, D, S] with `query_scale` folded in.
        k: [B, K, N / B x D].
        kv_len: keys that count.
    """
    heads, head_dim, _ = q.shape
    q_squares = jnp.square(q.astype(jnp.float32))
    k_squares = jnp.square(k[:, :kv_len].astype(jnp.float32))
    k_squares = k_squares.reshape(k.shape[0], kv_len, -1, head_dim)
    q_norm = jnp.sqrt(jnp.max(jnp.sum(q_squares, axis=1), axis=1))
    k_norm = jnp.sqrt(jnp.max(jnp.sum(k_squares, axis=3), axis=1))
    return q_norm * k_norm.reshape(heads)


def largest_values(v: jax.Array, kv_len: int) -> jax.Array:
    """max|v| over the first `kv_len` keys of v [N, D, K], [N]."""
    return jnp.max(jnp.abs(v[..., :kv_len]), axis=(1, 2))


def bounded_heads(largest_score: jax.Array, largest_value: jax.Array, kv_len: int) -> jax.Array:
    """Which heads need no running maximum: [N] int32.

    Where every score s, in powers of two, has |s| <= B, 2^-B <= exp2(s) <= 2^B, and neither the
    denominator nor the sum of weighed values overflows while B + log2(keys) + log2(max|v|) stays
    below 127. At the other end the smallest weight times a value 2^-24 of the largest must still be
    a normal number, above 2^-126. A head with an infinity compares false, and takes the online
    path. NaN may take either: it comes out in the same places.

    Args:
        largest_score: B, [N].
        largest_value: max|v|, [N].
        kv_len: keys that count.
    """
    log_v = jnp.log2(largest_value.astype(jnp.float32))
    above = largest_score + math.log2(kv_len) + jnp.maximum(log_v, 0) <= 126
    below = largest_score + jnp.maximum(-log_v, 0) <= 126 - 24
    return (above & below).astype(jnp.int32)
