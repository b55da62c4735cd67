"""The bodies of the kernel: softmax of one tile of queries over the keys that are in VMEM.

Three of them compute the same softmax and differ in the shift:

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
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Stands for "no key seen yet" and for a masked score. Finite, so that its difference from itself is
# not NaN, and below all scores but the last few that float32 holds.
NO_SCORE = -3e38

# A group is done again when a score leaves its shift by more than this many powers of two, where
# its values could hide the others' below float32, or when what it adds up is over _MAX_SUM.
_MAX_RISE = 32.0
_MAX_SUM = 2.0**120

SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Plan:
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
class Refs:
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


def _products(plan: Plan, refs: Refs, start: jax.Array) -> jax.Array:
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


def _scores(refs: Refs, products: jax.Array) -> jax.Array:
    """Scores in float32 from the products of a chunk."""
    if refs.q_scale is None:
        return products
    return products.astype(jnp.float32) * refs.q_scale[...].astype(jnp.float32)


def _weigh(
    plan: Plan,
    refs: Refs,
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


def _key_index(plan: Plan, start: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    first = pl.program_id(2) * plan.block_kv + start
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _in_range(
    plan: Plan, refs: Refs, start: jax.Array, shape: tuple[int, ...], axis: int
) -> jax.Array:
    return _key_index(plan, start, shape, axis) < refs.kv_len[0]


def _visible(plan: Plan, refs: Refs, start: jax.Array, window: bool) -> jax.Array:
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
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)


def _max_by_eight(x: jax.Array) -> jax.Array:
    return jnp.max(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)


def _chunk_start(plan: Plan, group: jax.Array, index: int | jax.Array) -> jax.Array:
    return pl.multiple_of(group * plan.group + index * plan.chunk, plan.chunk)


def _pipelined_products(
    plan: Plan, refs: Refs, group: jax.Array
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


def _bounded_group(plan: Plan, refs: Refs, group: jax.Array) -> None:
    total, acc = refs.total[...], refs.acc[...]
    window = plan.window_size is not None
    for i, start, products in _pipelined_products(plan, refs, group):
        check = i >= plan.first_checked_chunk
        scores = _scores(refs, products)
        if check or window:
            scores = jnp.where(_visible(plan, refs, start, window), scores, NO_SCORE)
        p = jnp.exp2(scores)
        total += _sum_by_eight(p)
        acc += _weigh(plan, refs, start, p, check)
    refs.total[...], refs.acc[...] = total, acc


def _bounded_group_int8(plan: Plan, refs: Refs, group: jax.Array) -> None:
    """The bounded body of int8 operands, where the vector units are the limit.

    Scores are scaled and exponentiated in bfloat16, half the registers of float32; rows of ones
    under the values give the denominators on the MXU.
    """
    head_dim = refs.acc.shape[0]
    ones = jnp.ones((2 * SUBLANES, plan.chunk), jnp.bfloat16)
    acc = jnp.zeros((head_dim + ones.shape[0], plan.block_q), jnp.float32)
    window = plan.window_size is not None
    for i, start, products in _pipelined_products(plan, refs, group):
        check = i >= plan.first_checked_chunk
        # Powers of two: the product with a scale is exact.
        scores = products.astype(jnp.float32).astype(jnp.bfloat16) * refs.q_scale[...]
        if check or window:
            visible = _visible(plan, refs, start, window)
            scores = jnp.where(visible, scores.astype(jnp.float32), NO_SCORE).astype(jnp.bfloat16)
        acc += _weigh(plan, refs, start, jnp.exp2(scores), check, ones)
    refs.acc[...] += acc[:head_dim]
    refs.total[...] += acc[head_dim : head_dim + SUBLANES] * (1 / SUBLANES)


def _online_group(plan: Plan, refs: Refs, group: jax.Array, first: jax.Array) -> None:
    @pl.when(first)
    def _():
        start = _chunk_start(plan, group, 0)
        scores = jnp.where(
            _visible(plan, refs, start, False),
            _scores(refs, _products(plan, refs, start)),
            NO_SCORE,
        )
        refs.shift[...] = jnp.max(scores, axis=0, keepdims=True)

    shift = refs.shift[...]
    total = jnp.zeros_like(refs.total)
    acc = jnp.zeros_like(refs.acc)
    rise = jnp.full_like(total, NO_SCORE)
    for i, start, products in _pipelined_products(plan, refs, group):
        check = i >= plan.first_checked_chunk
        scores = _scores(refs, products) - shift
        if check:
            scores = jnp.where(_visible(plan, refs, start, False), scores, NO_SCORE)
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
            refs.shift[...] = jnp.full_like(refs.shift, NO_SCORE)

        _careful_chunks(plan, refs, group * plan.unroll, (group + 1) * plan.unroll)


def _careful_chunks(plan: Plan, refs: Refs, first: jax.Array, last: jax.Array) -> None:
    """Online softmax of the chunks first <= i < last of the block, as far as they hold keys."""
    keys = refs.kv_len[0] - pl.program_id(2) * plan.block_kv
    last = jnp.minimum(last, pl.cdiv(keys, plan.chunk))

    def one_chunk(i: jax.Array, _: None) -> None:
        start = pl.multiple_of(i * plan.chunk, plan.chunk)
        visible = _visible(plan, refs, start, plan.window_size is not None)
        scores = _scores(refs, _products(plan, refs, start))
        scores = jnp.where(visible, scores, NO_SCORE)
        old = refs.shift[...]
        new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
        # A query that has seen no key yet has shift NO_SCORE, where exp2(scores - shift) is 1.
        p = jnp.where(visible, jnp.exp2(scores - new), 0.0)
        shrink = jnp.exp2(old - new)
        refs.shift[...] = new
        refs.total[...] = refs.total[...] * shrink + _sum_by_eight(p)
        refs.acc[...] = refs.acc[...] * shrink + _weigh(plan, refs, start, p, True)

    jax.lax.fori_loop(first, last, one_chunk, None)


def _chunks_in_window(plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The chunks of this block of keys, first and last + 1, that some query of the tile sees."""
    first_query = pl.program_id(1) * plan.block_q
    last_query = jnp.minimum(first_query + plan.block_q, plan.q_len) - 1
    first_key = first_query - plan.window_size - pl.program_id(2) * plan.block_kv
    last_key = last_query + plan.window_size - pl.program_id(2) * plan.block_kv
    chunks = plan.block_kv // plan.chunk
    first = jnp.clip(first_key // plan.chunk, 0, chunks)
    return first, jnp.clip(last_key // plan.chunk + 1, first, chunks)


def attend_bounded(plan: Plan, refs: Refs) -> None:
    first, last = 0, plan.groups
    if plan.window_size is not None:
        first_chunk, last_chunk = _chunks_in_window(plan)
        first, last = first_chunk // plan.unroll, pl.cdiv(last_chunk, plan.unroll)
    group_body = _bounded_group if refs.q_scale is None else _bounded_group_int8
    jax.lax.fori_loop(first, last, lambda g, _: group_body(plan, refs, g), None)


def attend_online(plan: Plan, refs: Refs) -> None:
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
