"""Public entry points: check the arguments, lay them out for the kernel, choose a path per head.

Axis letters: B batch, N heads (with batch, where flattened), S query tokens, K key tokens,
D head size.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from splash_attention import bounds
from splash_attention.arguments import HEAD_DIM_STEP, flatten_heads, how_to_run, list_arguments
from splash_attention.block_lists import BlockLists
from splash_attention.block_sizes import BlockSizes
from splash_attention.hopper.attention import heads_first_attention, runs_on_hopper
from splash_attention.kernel import attention_kernel
from splash_attention.quantize import quantize
from splash_attention.reference import check_shapes

_MAX_HEAD_DIM = 256
_PRECISIONS = ("bf16", "int8_qk")


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    block_lists: BlockLists | None = None,
    rule: jax.Array | None = None,
    block_sizes: BlockSizes | None = None,
    precision: str = "bf16",
    smooth_k: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Compute exact, non-causal softmax attention on one TPU core or one Hopper GPU.

    JAX's default device decides which kernel runs. That of a GPU of compute capability 9.0 takes
    bfloat16 and float16, D up to 128, and of the options `scale`, `block_lists` and `rule`.

    Args:
        q: [..., S, D] bfloat16 or float32. Batch and heads are optional leading axes. D is at most
            256; sizes other than 64, 128, 192 and 256 are padded with zeros.
        k: [..., K, D], with the leading axes and the dtype of `q`.
        v: [..., K, D], with the leading axes and the dtype of `q`.
        scale: factor on the scores. Default: 1 / sqrt(D).
        window_size: query i attends only to keys j with |i - j| <= window_size. Tiles outside the
            window are skipped. Default: all keys.
        block_lists: the chunks of keys that each tile of queries attends to, by rule. Chunks that
            no list names cost nothing. Default: all keys.
        rule: [...] int32, the rule of each head. Default: the first rule of `block_lists`.
        block_sizes: tile sizes of the kernel. Default: the chip's entry in the tuned table.
        precision: "bf16" multiplies in the dtype of the inputs: bfloat16 with float32 accumulation,
            or float32 without loss. "int8_qk" quantises q (a step per query) and k (a step per
            head) to pairs of int8 for Q.K and keeps P.V in bfloat16. At head size 64 it takes a
            fifth fewer cycles; its relative error on unit normal inputs is 8e-3 instead of 3e-3.
        smooth_k: subtract each head's mean key from its keys first. Softmax does not change, and
            smaller keys lose less to rounding. Use it with "int8_qk" where keys share an offset, as
            those of trained models do. Costs one pass over k.
        interpret: run the kernel in TPU interpret mode, on any backend.

    Returns:
        [..., S, D] in the dtype of `q`.

    Raises:
        TypeError: dtypes are mixed, or the kernel does not take them.
        ValueError: shapes do not fit together, an option is out of range, a query sees no key, the
            block sizes need more VMEM than the chip has, or there is no kernel for the device.
    """
    check_shapes(q.shape, k.shape, v.shape, window_size)
    if not interpret and runs_on_hopper():
        refused = (window_size, block_sizes, smooth_k or None)
        if precision != "bf16" or any(option is not None for option in refused):
            raise ValueError(
                "on a Hopper GPU, splash_attention takes only scale, block_lists and rule"
            )
        factor = bounds.query_scale(q.shape[-1], scale)
        return heads_first_attention(q, k, v, factor, block_lists, rule)
    out = sequence_minor_attention(
        *_sequence_minor(q, k, v, scale),
        window_size=window_size,
        block_lists=block_lists,
        rule=None if rule is None else rule.reshape(-1),  # as q is flattened
        block_sizes=block_sizes,
        precision=precision,
        smooth_k=smooth_k,
        interpret=interpret,
    )
    return out.swapaxes(1, 2)[..., : q.shape[-1]].reshape(q.shape)


def _sequence_minor(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Convert q [..., S, D], k and v [..., K, D] to [N, D, S], [N, K, D] and [N, D, K].

    q is scaled. D is padded with zeros to a multiple of 64.
    """
    _check_dtypes(q, k, v)
    head_dim = q.shape[-1]
    if v.shape[-1] != head_dim:
        raise ValueError(f"v has head size {v.shape[-1]}, q and k have {head_dim}")
    _check_head_dim(head_dim)
    padding = (0, 0), (0, 0), (0, -head_dim % HEAD_DIM_STEP)
    q = (q.astype(jnp.float32) * bounds.query_scale(head_dim, scale)).astype(q.dtype)
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
    """Attend to one part of the keys; merge parts by their softmax denominators.

    Args:
        q, k, v: [..., S, D] and [..., K, D], as in `splash_attention`.
        kv_len: int32 scalar in 0..K, the number of valid keys. Keys past it must be finite.
        scale, block_sizes, interpret: as in `splash_attention`.

    Returns:
        The output [..., S, D] float32, and log2 of the softmax denominators [..., S, 1] float32.
        With no valid key these are NaN and -infinity.
    """
    check_shapes(q.shape, k.shape, v.shape, None)
    minor = _sequence_minor(q, k, v, scale)
    keys, head_dim = minor[1].shape[1:]
    out, log_total = attention_kernel(
        *minor,
        bounds.bounded_heads(
            bounds.largest_scores(*minor[:2], keys), bounds.largest_values(minor[2], keys), keys
        ),
        kv_len.reshape(1),
        always_valid=0,
        most_valid=keys,
        out_dtype=jnp.float32,
        with_log_total=True,
        **how_to_run(block_sizes, head_dim, q.shape[-2], keys, q.dtype, interpret),
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
    block_lists: BlockLists | None = None,
    rule: jax.Array | None = None,
    block_sizes: BlockSizes | None = None,
    precision: str = "bf16",
    smooth_k: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Compute `splash_attention` on operands in the kernel's layout, without transposing them.

    Args:
        q: [..., D, S], multiplied by `query_scale` before it was rounded. D is at most 256; sizes
            other than 64, 128, 192 and 256 are padded with zeros, which copies all operands.
        k: [..., K, D]; or, with q [..., N, D, S], [..., K, N x D]: the keys of N heads side by side
            as a projection makes them. D = 64 with even N, D = 128 and D = 256 are read in place,
            other sizes are transposed first. Two heads of 64 share a product, so NaN or infinity in
            the keys of one head reaches both.
        v: [..., D, K].
        kv_len: number of valid keys; later keys are padding and may hold anything. Default: K.
        largest_score: [...], an upper bound per head on |q.k|, in powers of two. Saves reading q
            and k for their norms. If it is too low, softmax overflows. Default: from the norms.
        largest_value: [...], an upper bound per head on |v|. Saves reading v.
        window_size, block_lists, rule, block_sizes, precision, smooth_k, interpret: as in
            `splash_attention`. Lists replace `kv_len`.

    Returns:
        [..., D, S] in the dtype of `q`.

    Raises:
        TypeError, ValueError: as `splash_attention`.
    """
    kv_len, beside = _check_sequence_minor(q, k, v, kv_len, window_size, precision)
    *leading, head_dim, q_len = q.shape
    _check_bounds(largest_score, largest_value, tuple(leading))
    if window_size is not None and window_size >= max(q_len, kv_len) - 1:
        window_size = None
    listed = {}
    if block_lists is not None:
        listed = list_arguments(block_lists, rule, q, k.shape[-2], kv_len, window_size, block_sizes)
    q, k, v = flatten_heads(q, k, v, beside)
    valid = jnp.arange(k.shape[1]) < kv_len
    bounds_given = largest_score is not None and largest_value is not None
    if block_lists is not None and (precision != "bf16" or smooth_k or not bounds_given):
        k, v = _clear_padding(block_lists, k, v)
        valid = block_lists.valid_keys()
    if precision == "int8_qk":
        k = k.astype(jnp.float32)  # smoothed keys are rounded once, to int8
    if smooth_k:
        k = bounds.smooth(k, valid)
    bounded = _bounded(q, k, v, kv_len, largest_score, largest_value, smooth_k)
    out_dtype, q_scale, padded_head_dim = q.dtype, None, q.shape[1]
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
        **listed,
        out_dtype=out_dtype,
        **how_to_run(
            block_sizes if block_lists is None else block_lists.block_sizes,
            *(padded_head_dim, q_len, kv_len, q.dtype, interpret),
        ),
    )
    return out[:, :head_dim].reshape(*leading, head_dim, q_len)


def _check_sequence_minor(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_len: int | None,
    window_size: int | None,
    precision: str,
) -> tuple[int, int]:
    """Check the operands of `sequence_minor_attention`; return kv_len and the heads side by side.

    Raises:
        TypeError, ValueError: as `splash_attention`.
    """
    *leading, head_dim, q_len = q.shape if q.ndim > 1 else (0, 0)
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
    _check_head_dim(head_dim)
    if precision not in _PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {_PRECISIONS}")
    _check_dtypes(q, k, v)
    return kv_len, beside


def _check_bounds(
    largest_score: jax.Array | None, largest_value: jax.Array | None, heads: tuple[int, ...]
) -> None:
    for name, largest in (("largest_score", largest_score), ("largest_value", largest_value)):
        if largest is not None and largest.shape != heads:
            raise ValueError(f"{name} is {largest.shape}; q has heads {heads}")


def _bounded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_len: int,
    largest_score: jax.Array | None,
    largest_value: jax.Array | None,
    smoothed: bool,
) -> jax.Array:
    """Return `bounded_heads` of the bounds given, for keys before smoothing, or of those found."""
    if largest_score is None:
        largest_score = bounds.largest_scores(q, k, kv_len)
    elif smoothed:
        # |q.mean| is at most the largest |q.k|.
        largest_score = 2 * largest_score
    if largest_value is None:
        largest_value = bounds.largest_values(v, kv_len)
    return bounds.bounded_heads(largest_score.reshape(-1), largest_value.reshape(-1), kv_len)


def _clear_padding(
    block_lists: BlockLists, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replace the padding of k [B, K, R] and v [N, D, K] by zeros, and pad k to whole chunks.

    The kernel masks padding itself, but the passes over k and v before it do not; and its int8 path
    removes only the weights of padding, which must be finite.
    """
    valid = block_lists.valid_keys()[: k.shape[1]]
    k = jnp.where(valid[:, None], k, jnp.zeros_like(k))
    v = jnp.where(valid, v, jnp.zeros_like(v))
    return jnp.pad(k, ((0, 0), (0, block_lists.keys - k.shape[1]), (0, 0))), v


def _check_head_dim(head_dim: int) -> None:
    if head_dim > _MAX_HEAD_DIM:
        raise ValueError(f"head size is {head_dim}; at most {_MAX_HEAD_DIM} is supported")


def _check_dtypes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        raise TypeError(
            "q, k and v must all be bfloat16 or all float32; "
            f"got {q.dtype.name}, {k.dtype.name}, {v.dtype.name}"
        )
