"""The Pallas kernel: one head and one tile of queries at a time, keys and values in VMEM.

Scores are laid out (keys, queries): the queries are the stationary operand of Q.K, and the
probabilities come out as the stationary operand of P.V, so that no operand is ever transposed.

    scores [chunk, block_q] = k [chunk, D] @ q [D, block_q]           log2 units: q is scaled
    p                       = exp2(scores - shift)
    out    [D, block_q]    += v [D, chunk] @ p

What happens to the scores of a tile is in `bodies.py`.

Axis letters: N heads (batch and heads flattened), S queries, K keys, D head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from splash_attention.block_sizes import BlockSizes
from splash_attention.bodies import NO_SCORE, SUBLANES, Plan, Refs, attend_bounded, attend_online

_LANES = 128


def _place_queries(plan: Plan, q_ref: jax.Ref, wide_q_ref: jax.Ref) -> None:
    """The queries [R, block_q] on the rows of this head's lanes, zeros on its neighbours' rows."""
    rows = q_ref.shape[0]
    place = pl.program_id(0) % plan.packed
    for i in range(plan.packed):
        wide_q_ref[i * rows : (i + 1) * rows, :] = jnp.where(
            place == i, q_ref[...], jnp.zeros_like(q_ref)
        )


def _kernel_body(kv_len_ref: jax.Ref, *refs: jax.Ref, plan: Plan, bounded: bool | None) -> None:
    """One grid step: head, tile of queries, block of keys."""
    refs = iter(refs)
    bounded_ref = next(refs) if bounded is None else None
    q_scale_ref = next(refs) if plan.quantized else None
    q_ref, k_ref, v_ref, out_ref = (next(refs) for _ in range(4))
    log_total_ref = next(refs) if plan.with_log_total else None
    wide_q_ref = next(refs) if plan.packed > 1 else q_ref
    refs = Refs(kv_len_ref, wide_q_ref, q_scale_ref, k_ref, v_ref, *refs)
    if bounded is None:
        bounded = bounded_ref[pl.program_id(0)] != 0

    @pl.when(pl.program_id(2) == 0)
    def _():
        # The bounded body never touches its shift, 0.
        refs.shift[...] = jnp.full_like(refs.shift, jnp.where(bounded, 0.0, NO_SCORE))
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.acc[...] = jnp.zeros_like(refs.acc)
        if plan.packed > 1:
            _place_queries(plan, q_ref, wide_q_ref)

    if bounded is True:
        attend_bounded(plan, refs)
    elif bounded is False:
        attend_online(plan, refs)
    else:
        pl.when(bounded)(lambda: attend_bounded(plan, refs))
        pl.when(jnp.logical_not(bounded))(lambda: attend_online(plan, refs))

    @pl.when(pl.program_id(2) == plan.kv_blocks - 1)
    def _():
        total = jnp.sum(refs.total[...], axis=0, keepdims=True)
        out_ref[...] = (refs.acc[...] * (1 / total)).astype(out_ref.dtype)
        if log_total_ref is not None:
            log_total_ref[...] = refs.shift[...] + jnp.log2(total)


def can_lie_side_by_side(rows: int, heads: int) -> bool:
    """Whether the kernel reads the keys of `heads` heads from one array [K, heads x rows].

    A block of keys is whole registers of 128 lanes, so two heads of 64 share one: a contraction
    over 128 takes the MXU no longer than one over 64.
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
    block_sizes: BlockSizes,
    vmem_limit_bytes: int,
    out_dtype: jnp.dtype,
    with_log_total: bool = False,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, ...]:
    """Attention of operands that already have the kernel's layout.

    Args:
        q: [N, R, S], scale x log2(e) folded in; R is D for bfloat16 and float32, 2 D for the int8
            of `quantize`.
        k: [B, K, N / B x R], the dtype of `q`: the keys of N / B heads side by side, more than one
            if `can_lie_side_by_side(R, N / B)`.
        v: [N, D, K], the dtype of `q`; bfloat16 beside int8.
        bounded: [N] int32, nonzero for the heads that need no running maximum; True or False when
            it is the same for all and known when compiling, which leaves out the other path.
        kv_len: [1] int32, keys that count: `always_valid` <= kv_len <= `most_valid` <= K.
        q_scale: [N, 1, S] bfloat16 powers of two, of int8 operands: what a product is
            worth.
        always_valid: lower bound of `kv_len`, known when compiling; only the chunks past it are
            masked.
        most_valid: upper bound of `kv_len`, known when compiling; keys past it are not looked at.
        window_size: query i sees the keys within this distance; all when None.
        block_sizes: tiles of queries and of keys.
        vmem_limit_bytes: VMEM the compiler may use.
        out_dtype: dtype of the output.
        with_log_total: also return the logarithms of the denominators.
        interpret: run in TPU interpret mode, on any backend.

    Returns:
        The output [N, D, S]; and, asked for, log2 of the softmax denominators [N, 1, S] float32,
        with which parts of one attention over disjoint keys can be merged.
    """
    heads, rows, q_len = q.shape
    head_dim = v.shape[1]
    heads_beside = heads // k.shape[0]
    packed = max(1, _LANES // rows) if heads_beside > 1 else 1
    block_q, block_kv = block_sizes.block_q, block_sizes.block_kv
    plan = Plan(
        block_q=block_q,
        block_kv=block_kv,
        chunk=block_sizes.chunk,
        unroll=block_sizes.unroll,
        q_len=q_len,
        kv_blocks=pl.cdiv(most_valid, block_kv),
        always_valid=always_valid,
        window_size=window_size,
        quantized=q_scale is not None,
        with_log_total=with_log_total,
        packed=packed,
    )
    one_path = isinstance(bounded, bool)

    def of_queries(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, block_q), lambda h, i, j, *_: (h, 0, i))

    scalars = [kv_len] if one_path else [kv_len, bounded]
    operands = ([q_scale] if plan.quantized else []) + [q, k, v]
    scores = heads * q_len * most_valid
    return pl.pallas_call(
        functools.partial(_kernel_body, plan=plan, bounded=bounded if one_path else None),
        out_shape=[
            jax.ShapeDtypeStruct((heads, head_dim, q_len), out_dtype),
            jax.ShapeDtypeStruct((heads, 1, q_len), jnp.float32),
        ][: 1 + with_log_total],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(heads, pl.cdiv(q_len, block_q), plan.kv_blocks),
            in_specs=([of_queries(1)] if plan.quantized else [])
            + [
                of_queries(rows),
                pl.BlockSpec(
                    (None, block_kv, packed * rows),
                    lambda h, i, j, *_: (h // heads_beside, j, h % heads_beside // packed),
                ),
                pl.BlockSpec((None, head_dim, block_kv), lambda h, i, j, *_: (h, 0, j)),
            ],
            out_specs=[of_queries(head_dim), of_queries(1)][: 1 + with_log_total],
            scratch_shapes=[pltpu.VMEM((packed * rows, block_q), q.dtype)] * (packed > 1)
            + [
                pltpu.VMEM((1, block_q), jnp.float32),
                pltpu.VMEM((SUBLANES, block_q), jnp.float32),
                pltpu.VMEM((head_dim, block_q), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * head_dim,
            transcendentals=scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands)
            + heads * head_dim * q_len * jnp.dtype(out_dtype).itemsize,
        ),
        interpret=interpret,
        name="splash_attention",
    )(*scalars, *operands)
