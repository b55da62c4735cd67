"""The Pallas kernel: one head and one tile of queries at a time, keys and values in VMEM.

Scores are laid out (keys, queries): the queries are the stationary operand of Q.K, and the
probabilities come out as the stationary operand of P.V, so that no operand is ever transposed.

    scores [chunk, block_q] = k [chunk, D] @ q [D, block_q]           log2 units: q is scaled
    p                       = exp2(scores - shift)
    out    [D, block_q]    += v [D, chunk] @ p

Three bodies compute the same softmax and differ in the shift:

- `_bounded_group` has none. The caller proves, per head, that no score is so large or so small that
  exp2 leaves the range of float32 (`attention.bounded_heads`); softmax does not depend on a shift,
  and relative rounding does not depend on magnitude.
- `_online_group` shifts a whole group of chunks by the running maximum of the groups before it (the
  first group by the maximum of its first chunk), tracks the group's own maximum beside, and
  rescales once a group. A group that rises or falls too far from its shift is thrown away and done
  again by the third body.
- `_careful_chunks` is the online softmax of Milakov and Gimelshein (2018, "Online normalizer
  calculation for softmax"), a maximum and a rescale for every chunk: slow, right for every input.

Axis letters: N heads (batch and heads flattened), S queries, K keys, D head size.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from splash_attention.block_sizes import BlockSizes

# Stands for "no key seen yet" and for a masked score. Finite, so that its difference from itself is
# not NaN, and below all scores but the last few that float32 holds.
_NO_SCORE = -3e38

# A group is done again when a score leaves its shift by more than this many powers of two, where
# its values could hide the others' below float32, or when what it adds up is over _MAX_SUM.
_MAX_RISE = 32.0
_MAX_SUM = 2.0**120

_SUBLANES, _LANES = 8, 128


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static facts of one kernel call."""

    block_q: int
    block_kv: int
    chunk: int
    unroll: int
    q_len: int
    kv_blocks: int
    # Keys before this index are valid in every call; chunks past it compare with `kv_len`.
    always_valid: int
    window_size: int | None
    quantized: bool
    with_log_total: bool
    # Heads whose keys share the lanes of one block of k; the queries of the others are zeros.
    packed: int

    @property
    def group(self) -> int:
        """Keys in one straight-line body."""
        return self.unroll * self.chunk

    @property
    def groups(self) -> int:
        """Bodies run for one block of keys."""
        return self.block_kv // self.group

    @property
    def first_checked_chunk(self) -> int:
        """Position in a group from which a chunk may hold keys past the end."""
        last_group = (self.kv_blocks * self.groups - 1) * self.unroll
        return max(0, self.always_valid // self.chunk - last_group)


@dataclasses.dataclass(frozen=True)
class _Refs:
    """What a body reads and writes in VMEM and SMEM."""

    kv_len: jax.Ref  # SMEM [1] int32
    q: jax.Ref  # [packed x R, block_q]; R is D, of int8 operands 2 D
    q_scale: jax.Ref | None  # [1, block_q] bfloat16, of int8 operands
    k: jax.Ref  # [block_kv, packed x R]
    v: jax.Ref  # [D, block_kv]
    shift: jax.Ref  # [1, block_q] float32, the running maximum
    total: jax.Ref  # [8, block_q] float32, the denominators, to be summed over the 8
    acc: jax.Ref  # [D, block_q] float32


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    # The MXU multiplies bfloat16. HIGHEST splits a float32 operand into three of them.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _products(plan: _Plan, refs: _Refs, start: jax.Array) -> jax.Array:
    """k @ q [chunk, block_q] of the chunk that begins at key `start` of the block.

    float32 scores, or int32 products that are still to be scaled.
    """
    if not plan.quantized:
        return jax.lax.dot(
            refs.k[pl.ds(start, plan.chunk), :],
            refs.q[...],
            precision=_precision(refs.q.dtype),
            preferred_element_type=jnp.float32,
        )
    # The MXU takes the rows of p in from the last to the first of each 128. Making them in that
    # order, 32 at a time, the tile of int8, saves 8 of 146 bundles a chunk; in bfloat16, where the
    # MXU is the limit, it costs 7 of 166.
    firsts = [i + j for i in range(0, plan.chunk, 128) for j in (96, 64, 32, 0)]
    tiles = [refs.k[pl.ds(pl.multiple_of(start + i, 32), 32), :] for i in firsts]
    products = jax.lax.dot(
        jnp.concatenate(tiles, axis=0), refs.q[...], preferred_element_type=jnp.int32
    )
    return jnp.concatenate([products[i : i + 32] for i in firsts], axis=0)


def _scores(refs: _Refs, products: jax.Array) -> jax.Array:
    """Scores in float32 from the products of a chunk."""
    if refs.q_scale is None:
        return products
    return products.astype(jnp.float32) * refs.q_scale[...].astype(jnp.float32)


def _weigh(
    plan: _Plan,
    refs: _Refs,
    start: jax.Array,
    p: jax.Array,
    check: bool,
    below: jax.Array | None = None,
) -> jax.Array:
    """Values of the chunk, and the rows `below` them, weighed by p [chunk, block_q]: float32."""
    v = refs.v[:, pl.ds(start, plan.chunk)]
    if check:
        # What lies past the end is arbitrary; p is 0 there, and 0 x NaN would be NaN.
        v = jnp.where(_in_range(plan, refs, start, (1, plan.chunk), 1), v, jnp.zeros_like(v))
    if below is not None:
        v = jnp.concatenate([v, below], axis=0)
    return jax.lax.dot(
        v,
        p.astype(v.dtype),
        precision=_precision(v.dtype),
        preferred_element_type=jnp.float32,
    )


def _key_index(plan: _Plan, start: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    first = pl.program_id(2) * plan.block_kv + start
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _in_range(
    plan: _Plan, refs: _Refs, start: jax.Array, shape: tuple[int, ...], axis: int
) -> jax.Array:
    return _key_index(plan, start, shape, axis) < refs.kv_len[0]


def _visible(plan: _Plan, refs: _Refs, start: jax.Array, window: bool) -> jax.Array:
    """Which scores of a chunk count: bool, [chunk, 1] without window, else [chunk, block_q]."""
    visible = _in_range(plan, refs, start, (plan.chunk, 1), 0)
    if window:
        key = _key_index(plan, start, (plan.chunk, 1), 0)
        query = pl.program_id(1) * plan.block_q + jax.lax.broadcasted_iota(
            jnp.int32, (1, plan.block_q), 1
        )
        visible &= jnp.abs(key - query) <= plan.window_size
    return visible


def _sum_by_eight(x: jax.Array) -> jax.Array:
    """[chunk, block_q] -> [8, block_q]: whole registers are added, no sublane is moved."""
    return jnp.sum(x.reshape(-1, _SUBLANES, x.shape[-1]), axis=0)


def _max_by_eight(x: jax.Array) -> jax.Array:
    return jnp.max(x.reshape(-1, _SUBLANES, x.shape[-1]), axis=0)


def _chunk_start(plan: _Plan, group: jax.Array, index: int | jax.Array) -> jax.Array:
    return pl.multiple_of(group * plan.group + index * plan.chunk, plan.chunk)


def _pipelined_products(
    plan: _Plan, refs: _Refs, group: jax.Array
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """Yield (index, start, products) of a group's chunks, Q.K running ahead of P.V.

    The compiler keeps matmuls in program order. With two products queued before P.V, the MXU never
    waits for the exponentials of a chunk: 1,295 bundles per million scores against 2,144. The
    products of int8 are faster, and want one more.
    """
    ahead = min(3 if plan.quantized else 2, plan.unroll)
    queue = [_products(plan, refs, _chunk_start(plan, group, i)) for i in range(ahead)]
    for i in range(plan.unroll):
        if i + ahead < plan.unroll:
            queue.append(_products(plan, refs, _chunk_start(plan, group, i + ahead)))
        yield i, _chunk_start(plan, group, i), queue.pop(0)


def _bounded_group(plan: _Plan, refs: _Refs, group: jax.Array) -> None:
    total, acc = refs.total[...], refs.acc[...]
    window = plan.window_size is not None
    for i, start, products in _pipelined_products(plan, refs, group):
        check = i >= plan.first_checked_chunk
        scores = _scores(refs, products)
        if check or window:
            scores = jnp.where(_visible(plan, refs, start, window), scores, _NO_SCORE)
        p = jnp.exp2(scores)
        total += _sum_by_eight(p)
        acc += _weigh(plan, refs, start, p, check)
    refs.total[...], refs.acc[...] = total, acc


def _bounded_group_int8(plan: _Plan, refs: _Refs, group: jax.Array) -> None:
    """The bounded body of int8 operands, where the vector units are the limit.

    Scores are scaled and exponentiated in bfloat16, half the registers of float32; rows of ones
    under the values give the denominators on the MXU.
    """
    head_dim = refs.acc.shape[0]
    ones = jnp.ones((2 * _SUBLANES, plan.chunk), jnp.bfloat16)
    acc = jnp.zeros((head_dim + ones.shape[0], plan.block_q), jnp.float32)
    window = plan.window_size is not None
    for i, start, products in _pipelined_products(plan, refs, group):
        check = i >= plan.first_checked_chunk
        # Powers of two: the product with a scale is exact.
        scores = products.astype(jnp.float32).astype(jnp.bfloat16) * refs.q_scale[...]
        if check or window:
            visible = _visible(plan, refs, start, window)
            scores = jnp.where(visible, scores.astype(jnp.float32), _NO_SCORE).astype(jnp.bfloat16)
        acc += _weigh(plan, refs, start, jnp.exp2(scores), check, ones)
    refs.acc[...] += acc[:head_dim]
    refs.total[...] += acc[head_dim : head_dim + _SUBLANES] * (1 / _SUBLANES)


def _online_group(plan: _Plan, refs: _Refs, group: jax.Array, first: jax.Array) -> None:
    @pl.when(first)
    def _():
        start = _chunk_start(plan, group, 0)
        scores = jnp.where(
            _visible(plan, refs, start, False),
            _scores(refs, _products(plan, refs, start)),
            _NO_SCORE,
        )
        refs.shift[...] = jnp.max(scores, axis=0, keepdims=True)

    shift = refs.shift[...]
    total = jnp.zeros_like(refs.total)
    acc = jnp.zeros_like(refs.acc)
    rise = jnp.full_like(total, _NO_SCORE)
    for i, start, products in _pipelined_products(plan, refs, group):
        check = i >= plan.first_checked_chunk
        scores = _scores(refs, products) - shift
        if check:
            scores = jnp.where(_visible(plan, refs, start, False), scores, _NO_SCORE)
        rise = jnp.maximum(rise, _max_by_eight(scores))
        p = jnp.exp2(scores)
        total += _sum_by_eight(p)
        acc += _weigh(plan, refs, start, p, check)

    rise = jnp.max(rise, axis=0, keepdims=True)
    # The first group holds the score it is shifted by, so it cannot fall below it but by rounding.
    lowest = jnp.where(first, -_MAX_RISE, -jnp.inf)
    # Written so that NaN counts as unsafe.
    largest = jnp.max(jnp.abs(acc), axis=0, keepdims=True)
    safe = (rise <= _MAX_RISE) & (rise >= lowest) & (largest <= _MAX_SUM)
    query = pl.program_id(1) * plan.block_q + jax.lax.broadcasted_iota(jnp.int32, rise.shape, 1)
    unsafe = jnp.max(jnp.where(safe | (query >= plan.q_len), 0.0, 1.0)) > 0

    @pl.when(jnp.logical_not(unsafe))
    def _():
        up = jnp.maximum(rise, 0.0)
        shrink = jnp.exp2(-up)
        refs.shift[...] = shift + up
        refs.total[...] = (refs.total[...] + total) * shrink
        refs.acc[...] = (refs.acc[...] + acc) * shrink

    @pl.when(unsafe)
    def _():
        @pl.when(first)
        def _():
            refs.shift[...] = jnp.full_like(refs.shift, _NO_SCORE)

        _careful_chunks(plan, refs, group * plan.unroll, (group + 1) * plan.unroll)


def _careful_chunks(plan: _Plan, refs: _Refs, first: jax.Array, last: jax.Array) -> None:
    """Online softmax of the chunks first <= i < last of the block, as far as they hold keys."""
    keys = refs.kv_len[0] - pl.program_id(2) * plan.block_kv
    last = jnp.minimum(last, pl.cdiv(keys, plan.chunk))

    def one_chunk(i: jax.Array, _: None) -> None:
        start = pl.multiple_of(i * plan.chunk, plan.chunk)
        visible = _visible(plan, refs, start, plan.window_size is not None)
        scores = _scores(refs, _products(plan, refs, start))
        scores = jnp.where(visible, scores, _NO_SCORE)
        old = refs.shift[...]
        new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
        # A query that has seen no key yet has shift _NO_SCORE, where exp2(scores - shift) is 1.
        p = jnp.where(visible, jnp.exp2(scores - new), 0.0)
        shrink = jnp.exp2(old - new)
        refs.shift[...] = new
        refs.total[...] = refs.total[...] * shrink + _sum_by_eight(p)
        refs.acc[...] = refs.acc[...] * shrink + _weigh(plan, refs, start, p, True)

    jax.lax.fori_loop(first, last, one_chunk, None)


def _chunks_in_window(plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """The chunks of this block of keys, first and last + 1, that some query of the tile sees."""
    first_query = pl.program_id(1) * plan.block_q
    last_query = jnp.minimum(first_query + plan.block_q, plan.q_len) - 1
    first_key = first_query - plan.window_size - pl.program_id(2) * plan.block_kv
    last_key = last_query + plan.window_size - pl.program_id(2) * plan.block_kv
    chunks = plan.block_kv // plan.chunk
    first = jnp.clip(first_key // plan.chunk, 0, chunks)
    return first, jnp.clip(last_key // plan.chunk + 1, first, chunks)


def _place_queries(plan: _Plan, q_ref: jax.Ref, wide_q_ref: jax.Ref) -> None:
    """The queries [R, block_q] on the rows of this head's lanes, zeros on its neighbours' rows."""
    rows = q_ref.shape[0]
    place = pl.program_id(0) % plan.packed
    for i in range(plan.packed):
        wide_q_ref[i * rows : (i + 1) * rows, :] = jnp.where(
            place == i, q_ref[...], jnp.zeros_like(q_ref)
        )


def _attend_bounded(plan: _Plan, refs: _Refs) -> None:
    first, last = 0, plan.groups
    if plan.window_size is not None:
        first_chunk, last_chunk = _chunks_in_window(plan)
        first, last = first_chunk // plan.unroll, pl.cdiv(last_chunk, plan.unroll)
    group_body = _bounded_group if refs.q_scale is None else _bounded_group_int8
    jax.lax.fori_loop(first, last, lambda g, _: group_body(plan, refs, g), None)


def _attend_online(plan: _Plan, refs: _Refs) -> None:
    if plan.window_size is not None:
        # The first chunk of a tile need not hold a key that every query of it sees, so there is no
        # score to shift by.
        _careful_chunks(plan, refs, *_chunks_in_window(plan))
        return
    first_block = pl.program_id(2) == 0
    jax.lax.fori_loop(
        0,
        plan.groups,
        lambda g, _: _online_group(plan, refs, g, first_block & (g == 0)),
        None,
    )


def _kernel_body(kv_len_ref: jax.Ref, *refs: jax.Ref, plan: _Plan, bounded: bool | None) -> None:
    """One grid step: head, tile of queries, block of keys."""
    refs = iter(refs)
    bounded_ref = next(refs) if bounded is None else None
    q_scale_ref = next(refs) if plan.quantized else None
    q_ref, k_ref, v_ref, out_ref = (next(refs) for _ in range(4))
    log_total_ref = next(refs) if plan.with_log_total else None
    wide_q_ref = next(refs) if plan.packed > 1 else q_ref
    refs = _Refs(kv_len_ref, wide_q_ref, q_scale_ref, k_ref, v_ref, *refs)
    if bounded is None:
        bounded = bounded_ref[pl.program_id(0)] != 0

    @pl.when(pl.program_id(2) == 0)
    def _():
        # The bounded body never touches its shift, 0.
        refs.shift[...] = jnp.full_like(refs.shift, jnp.where(bounded, 0.0, _NO_SCORE))
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.acc[...] = jnp.zeros_like(refs.acc)
        if plan.packed > 1:
            _place_queries(plan, q_ref, wide_q_ref)

    if bounded is True:
        _attend_bounded(plan, refs)
    elif bounded is False:
        _attend_online(plan, refs)
    else:
        pl.when(bounded)(lambda: _attend_bounded(plan, refs))
        pl.when(jnp.logical_not(bounded))(lambda: _attend_online(plan, refs))

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
    plan = _Plan(
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
                pltpu.VMEM((_SUBLANES, block_q), jnp.float32),
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
