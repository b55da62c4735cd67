"""The Pallas kernel: one head and one tile of queries per grid step, keys and values in VMEM.

Scores are laid out (keys, queries). The queries are the stationary operand of Q.K, and the
probabilities come out as the stationary operand of P.V, so no operand is transposed.

    scores [chunk, block_q] = k [chunk, D] @ q [D, block_q]           log2 units: q is scaled
    p                       = exp2(scores - shift)
    out    [D, block_q]    += v [D, chunk] @ p

`bodies.py` holds the softmax of a tile.

Axis letters: N heads (batch and heads flattened), S queries, K keys, D head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from splash_attention.block_sizes import BlockSizes
from splash_attention.bodies import NO_SCORE, SUBLANES, attend_bounded, attend_online
from splash_attention.refs import KernelConfig, ListRefs, Refs

_LANES = 128


def _place_queries(config: KernelConfig, q_ref: jax.Ref, wide_q_ref: jax.Ref) -> None:
    """Copy the queries [R, block_q] to the rows of this head's lanes, and zeros to the others."""
    rows = q_ref.shape[0]
    place = pl.program_id(0) % config.packed
    for i in range(config.packed):
        wide_q_ref[i * rows : (i + 1) * rows, :] = jnp.where(
            place == i, q_ref[...], jnp.zeros(q_ref.shape, q_ref.dtype)
        )


def _kernel_body(
    kv_len_ref: jax.Ref, *all_refs: jax.Ref, config: KernelConfig, one_path: bool | None
) -> None:
    """Run one grid step: one head, one tile of queries, one block of keys."""
    remaining = iter(all_refs)
    bounded_ref = next(remaining) if one_path is None else None
    lists = None
    if config.listed_valid is not None:
        lists = ListRefs(*(next(remaining) for _ in range(4)))
    q_scale_ref = next(remaining) if config.quantized else None
    q_ref, k_ref, v_ref, out_ref = (next(remaining) for _ in range(4))
    log_total_ref = next(remaining) if config.with_log_total else None
    wide_q_ref = next(remaining) if config.packed > 1 else q_ref
    refs = Refs(kv_len_ref, wide_q_ref, q_scale_ref, k_ref, v_ref, *remaining, lists=lists)
    bounded = bool(one_path) if bounded_ref is None else bounded_ref[pl.program_id(0)] != 0

    @pl.when(pl.program_id(2) == 0)
    def _():
        # The bounded body leaves its shift at 0.
        refs.shift[...] = jnp.full(refs.shift.shape, jnp.where(bounded, 0.0, NO_SCORE))
        refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
        refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)
        if config.packed > 1:
            _place_queries(config, q_ref, wide_q_ref)

    if one_path is True:
        attend_bounded(config, refs)
    elif one_path is False:
        attend_online(config, refs)
    else:
        pl.when(bounded)(lambda: attend_bounded(config, refs))
        pl.when(jnp.logical_not(bounded))(lambda: attend_online(config, refs))

    @pl.when(pl.program_id(2) == config.kv_blocks - 1)
    def _():
        total = jnp.sum(refs.total[...], axis=0, keepdims=True)
        out_ref[...] = (refs.acc[...] * (1 / total)).astype(out_ref.dtype)
        if log_total_ref is not None:
            log_total_ref[...] = refs.shift[...] + jnp.log2(total)


def can_lie_side_by_side(rows: int, heads: int) -> bool:
    """Return whether the kernel can read the keys of `heads` heads from one [K, heads x rows].

    A block of keys is a multiple of 128 lanes, so two heads of 64 share one. The MXU contracts over
    128 in the time of 64.
    """
    return rows % _LANES == 0 or (2 * rows == _LANES and heads % 2 == 0)


def attention_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounded: jax.Array | bool,
    kv_len: jax.Array,
    *,
    q_scale: jax.Array | None = None,
    always_valid: int,
    most_valid: int,
    window_size: int | None = None,
    lists: tuple[jax.Array, ...] = (),
    listed_valid: int | None = None,
    block_sizes: BlockSizes,
    vmem_limit_bytes: int,
    out_dtype: DTypeLike,
    with_log_total: bool = False,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, ...]:
    """Run the kernel on operands that already have its layout.

    Args:
        q: [N, R, S], scaled by `query_scale`; R is D, or 2 D for the int8 operands of `quantize`.
        k: [B, K, N / B x R], the dtype of `q`. N / B heads lie side by side; more than one only if
            `can_lie_side_by_side(R, N / B)`.
        v: [N, D, K], the dtype of `q`, or bfloat16 with int8.
        bounded: [N] int32, nonzero for heads that need no running maximum. A Python bool applies to
            all heads and compiles only that path.
        kv_len: [1] int32, number of valid keys: `always_valid` <= kv_len <= `most_valid` <= K.
        q_scale: [N, 1, S] bfloat16 powers of two, the scales of int8 products.
        always_valid: static lower bound on `kv_len`; only later chunks are masked.
        most_valid: static upper bound on `kv_len`; later keys are not read.
        window_size: query i attends only to keys within this distance. Default: all keys.
        lists: the arrays of `ListRefs`, with the keys as one block; `kv_len` is then not used.
        listed_valid: with lists, a lower bound on the valid keys of every listed chunk.
        block_sizes: tile sizes.
        vmem_limit_bytes: VMEM the compiler may use.
        out_dtype: dtype of the output.
        with_log_total: also return the logarithms of the denominators.
        interpret: run in TPU interpret mode, on any backend.

    Returns:
        The output [N, D, S]. With `with_log_total` also log2 of the softmax denominators [N, 1, S]
        float32, from which attention over disjoint parts of the keys can be merged.
    """
    config = KernelConfig(
        block_q=block_sizes.block_q,
        block_kv=block_sizes.block_kv,
        chunk=block_sizes.chunk,
        unroll=block_sizes.unroll,
        q_len=q.shape[2],
        kv_blocks=pl.cdiv(most_valid, block_sizes.block_kv),
        always_valid=always_valid,
        window_size=window_size,
        quantized=q_scale is not None,
        with_log_total=with_log_total,
        packed=_packed_heads(q, k),
        listed_valid=listed_valid,
    )
    one_path = bounded if isinstance(bounded, bool) else None
    scalars = [kv_len, *([] if isinstance(bounded, bool) else [bounded]), *lists]
    operands = ([] if q_scale is None else [q_scale]) + [q, k, v]
    heads, _, q_len = q.shape
    head_dim = v.shape[1]
    return pl.pallas_call(
        functools.partial(_kernel_body, config=config, one_path=one_path),
        out_shape=[
            jax.ShapeDtypeStruct((heads, head_dim, q_len), out_dtype),
            jax.ShapeDtypeStruct((heads, 1, q_len), jnp.float32),
        ][: 1 + with_log_total],
        grid_spec=_grid(config, q, k, v, num_scalars=len(scalars)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(operands, heads * q_len * most_valid, head_dim, out_dtype),
        interpret=interpret,
        name="splash_attention",
    )(*scalars, *operands)


def _cost(
    operands: list[jax.Array], scores: int, head_dim: int, out_dtype: DTypeLike
) -> pl.CostEstimate:
    """Return what the kernel costs if every tile of queries visits all keys."""
    *_, q, _, v = operands
    out_bytes = v.shape[0] * head_dim * q.shape[2] * jnp.dtype(out_dtype).itemsize
    return pl.CostEstimate(
        flops=4 * scores * head_dim,
        transcendentals=scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands) + out_bytes,
    )


def _packed_heads(q: jax.Array, k: jax.Array) -> int:
    """Return how many heads share the 128 lanes of a block of keys."""
    heads_beside = q.shape[0] // k.shape[0]
    return max(1, _LANES // q.shape[1]) if heads_beside > 1 else 1


def _grid(
    config: KernelConfig, q: jax.Array, k: jax.Array, v: jax.Array, *, num_scalars: int
) -> pltpu.PrefetchScalarGridSpec:
    """Return the grid (heads, tiles of queries, blocks of keys) and the blocks of each operand."""
    heads, rows, q_len = q.shape
    head_dim, heads_beside = v.shape[1], heads // k.shape[0]
    packed, block_q, block_kv = config.packed, config.block_q, config.block_kv

    def of_queries(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, block_q), lambda h, i, j, *_: (h, 0, i))

    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=num_scalars,
        grid=(heads, pl.cdiv(q_len, block_q), config.kv_blocks),
        in_specs=([of_queries(1)] if config.quantized else [])
        + [
            of_queries(rows),
            pl.BlockSpec(
                (None, block_kv, packed * rows),
                lambda h, i, j, *_: (h // heads_beside, j, h % heads_beside // packed),
            ),
            pl.BlockSpec((None, head_dim, block_kv), lambda h, i, j, *_: (h, 0, j)),
        ],
        out_specs=[of_queries(head_dim), of_queries(1)][: 1 + config.with_log_total],
        scratch_shapes=[pltpu.VMEM((packed * rows, block_q), q.dtype)] * (packed > 1)
        + [
            pltpu.VMEM((1, block_q), jnp.float32),
            pltpu.VMEM((SUBLANES, block_q), jnp.float32),
            pltpu.VMEM((head_dim, block_q), jnp.float32),
        ],
    )
