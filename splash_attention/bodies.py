"""Kernel bodies: softmax of one tile of queries over the keys in VMEM.

Three bodies compute the same softmax and differ in what they subtract from the scores:

- `_bounded_group` subtracts nothing. The caller proves per head that exp2 of every score stays in
  the range of float32 (`bounds.bounded_heads`). Softmax does not depend on the shift, and the
  relative rounding of a float does not depend on its magnitude.
- `_online_group` subtracts from a group of chunks the running maximum of the groups before it (from
  the first group the maximum of its first chunk), and rescales once per group. A group whose scores
  differ too much from its shift is discarded and computed again by the third body.
- `_careful_chunks` updates the maximum and rescales for every chunk. It is slow and correct for
  every input. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

Axis letters: N heads (batch and heads flattened), S queries, K keys, D head size.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from splash_attention.refs import Chunk, KernelConfig, Refs

# A masked score, and the maximum of no keys. Finite, so that NO_SCORE - NO_SCORE is not NaN.
NO_SCORE = -3e38

# A group is computed again if a score exceeds its shift by more than 2^_MAX_RISE, which could push
# the other values below float32, or if an accumulator exceeds _MAX_SUM.
_MAX_RISE = 32.0
_MAX_SUM = 2.0**120

SUBLANES = 8


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    # The MXU multiplies bfloat16; HIGHEST splits a float32 operand into three bfloat16.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _products(config: KernelConfig, refs: Refs, start: jax.Array) -> jax.Array:
    """Compute k @ q [chunk, block_q] for the chunk at key `start` of the block.

    Returns float32 scores, or unscaled int32 products of int8 operands.
    """
    if not config.quantized:
        return jax.lax.dot(
            refs.k[pl.ds(start, config.chunk), :],
            refs.q[...],
            precision=_precision(refs.q.dtype),
            preferred_element_type=jnp.float32,
        )
    # The MXU reads the rows of p from last to first in each 128. Producing them in that order, an
    # int8 tile of 32 at a time, saves 8 of 146 bundles per chunk. In bfloat16, where the MXU is the
    # limit, it costs 7 of 166.
    firsts = [i + j for i in range(0, config.chunk, 128) for j in (96, 64, 32, 0)]
    tiles = [refs.k[pl.ds(pl.multiple_of(start + i, 32), 32), :] for i in firsts]
    products = jax.lax.dot(
        jnp.concatenate(tiles, axis=0), refs.q[...], preferred_element_type=jnp.int32
    )
    return jnp.concatenate([products[i : i + 32] for i in firsts], axis=0)


def _scores(refs: Refs, products: jax.Array) -> jax.Array:
    """Convert the products of a chunk to float32 scores."""
    if refs.q_scale is None:
        return products
    return products.astype(jnp.float32) * refs.q_scale[...].astype(jnp.float32)


def _weigh(
    config: KernelConfig,
    refs: Refs,
    chunk: Chunk,
    p: jax.Array,
    check: bool,
    below: jax.Array | None = None,
) -> jax.Array:
    """Multiply the values of a chunk, with the rows `below` appended, by p [chunk, block_q].

    Returns float32 [D + rows, block_q]. With `check`, values of padding are replaced by zeros.
    """
    v = refs.v[:, pl.ds(chunk.start, config.chunk)]
    if check:
        # Padding may hold NaN: p is 0 there, but 0 x NaN is NaN.
        v = jnp.where(_in_range(config, refs, chunk, (1, config.chunk), 1), v, jnp.zeros_like(v))
    if below is not None:
        v = jnp.concatenate([v, below], axis=0)
    return jax.lax.dot(
        v,
        p.astype(v.dtype),
        precision=_precision(v.dtype),
        preferred_element_type=jnp.float32,
    )


def _key_index(
    config: KernelConfig, start: jax.Array, shape: tuple[int, ...], axis: int
) -> jax.Array:
    first = pl.program_id(2) * config.block_kv + start
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _in_range(
    config: KernelConfig, refs: Refs, chunk: Chunk, shape: tuple[int, ...], axis: int
) -> jax.Array:
    if chunk.valid is not None:
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < chunk.valid
    return _key_index(config, chunk.start, shape, axis) < refs.kv_len[0]


def _visible(config: KernelConfig, refs: Refs, chunk: Chunk, window: bool) -> jax.Array:
    """Return a bool mask of the visible scores: [chunk, 1], or [chunk, block_q] with a window."""
    visible = _in_range(config, refs, chunk, (config.chunk, 1), 0)
    if window:
        assert config.window_size is not None
        key = _key_index(config, chunk.start, (config.chunk, 1), 0)
        query = pl.program_id(1) * config.block_q + jax.lax.broadcasted_iota(
            jnp.int32, (1, config.block_q), 1
        )
        visible &= jnp.abs(key - query) <= config.window_size
    return visible


def exp2_bfloat16(x: jax.Array) -> jax.Array:
    """Exponentiate bfloat16: one instruction of a TPU, which rounds once.

    Other backends round x ln 2 first, which doubles the error; tests replace this function there.
    """
    return jnp.exp2(x)


def _sum_by_eight(x: jax.Array) -> jax.Array:
    """Sum [chunk, block_q] to [8, block_q], adding whole registers."""
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)


def _max_by_eight(x: jax.Array) -> jax.Array:
    return jnp.max(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)


def _chunk_at(config: KernelConfig, refs: Refs, group: jax.Array, index: int) -> Chunk:
    """Return a chunk of a group: the next keys, or the next entry of the tile's list."""
    if refs.lists is None:
        start = group * config.group + index * config.chunk
        return Chunk(pl.multiple_of(start, config.chunk), None)
    return refs.lists.chunk(config, group * config.unroll + index)


def _pipelined_products(
    config: KernelConfig, refs: Refs, group: jax.Array
) -> Iterator[tuple[bool, Chunk, jax.Array]]:
    """Yield (check, chunk, products) per chunk of a group, computing Q.K ahead of P.V.

    `check` says whether the chunk may hold padding.

    The compiler keeps matmuls in program order. With two products queued before P.V, the MXU never
    waits for the exponentials of a chunk: 1,295 instead of 2,144 bundles per million scores. int8
    products are faster and need a third one queued.
    """
    ahead = min(3 if config.quantized else 2, config.unroll)
    chunks = [_chunk_at(config, refs, group, i) for i in range(config.unroll)]
    queue = [_products(config, refs, chunk.start) for chunk in chunks[:ahead]]
    for i, chunk in enumerate(chunks):
        if i + ahead < config.unroll:
            queue.append(_products(config, refs, chunks[i + ahead].start))
        check = refs.lists is not None or i >= config.first_checked_chunk
        yield check, chunk, queue.pop(0)


def _mask_end(config: KernelConfig, scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Mask scores [chunk, block_q] past the `valid` keys of a listed chunk.

    Only whole registers that may hold padding: masking all costs 2 of 169 bundles per chunk.
    """
    assert config.listed_valid is not None
    first = config.listed_valid // SUBLANES * SUBLANES
    if first == config.chunk:
        return scores
    key = first + jax.lax.broadcasted_iota(jnp.int32, (config.chunk - first, 1), 0)
    end = jnp.where(key < valid, scores[first:], NO_SCORE)
    return jnp.concatenate([scores[:first], end], axis=0)


def _bounded_group(config: KernelConfig, refs: Refs, group: jax.Array) -> None:
    total, acc = refs.total[...], refs.acc[...]
    window = config.window_size is not None
    for check, chunk, products in _pipelined_products(config, refs, group):
        scores = _scores(refs, products)
        if chunk.valid is not None:
            scores = _mask_end(config, scores, chunk.valid)
        elif check or window:
            scores = jnp.where(_visible(config, refs, chunk, window), scores, NO_SCORE)
        p = jnp.exp2(scores)
        sums = _sum_by_eight(p)
        # An entry past the end of the list repeats a chunk; `_weigh` replaces its values by zeros.
        total += sums if chunk.valid is None else jnp.where(chunk.valid > 0, sums, 0.0)
        acc += _weigh(config, refs, chunk, p, check)
    refs.total[...], refs.acc[...] = total, acc


def _bounded_group_int8(config: KernelConfig, refs: Refs, group: jax.Array) -> None:
    """Run the bounded body on int8 operands, where the vector units are the limit.

    Scores are scaled and exponentiated in bfloat16, which takes half the registers of float32. Rows
    of ones below the values make the MXU compute the denominators.
    """
    assert refs.q_scale is not None
    head_dim = refs.acc.shape[0]
    ones = jnp.ones((2 * SUBLANES, config.chunk), jnp.bfloat16)
    acc = jnp.zeros((head_dim + ones.shape[0], config.block_q), jnp.float32)
    window = config.window_size is not None
    for check, chunk, products in _pipelined_products(config, refs, group):
        # Scales are powers of two, so this product is exact.
        scores = products.astype(jnp.float32).astype(jnp.bfloat16) * refs.q_scale[...]
        below = ones
        if chunk.valid is not None:
            # Listed keys are zeros where they are padding: their weights are 1, and drop out here.
            below = jnp.broadcast_to(
                _in_range(config, refs, chunk, (1, config.chunk), 1).astype(jnp.bfloat16),
                ones.shape,
            )
        elif check or window:
            visible = _visible(config, refs, chunk, window)
            scores = jnp.where(visible, scores.astype(jnp.float32), NO_SCORE).astype(jnp.bfloat16)
        acc += _weigh(config, refs, chunk, exp2_bfloat16(scores), check, below)
    refs.acc[...] += acc[:head_dim]
    refs.total[...] += acc[head_dim : head_dim + SUBLANES] * (1 / SUBLANES)


def _online_group(config: KernelConfig, refs: Refs, group: jax.Array, first: jax.Array) -> None:
    @pl.when(first)
    def _():
        chunk = _chunk_at(config, refs, group, 0)
        scores = jnp.where(
            _visible(config, refs, chunk, False),
            _scores(refs, _products(config, refs, chunk.start)),
            NO_SCORE,
        )
        refs.shift[...] = jnp.max(scores, axis=0, keepdims=True)

    shift = refs.shift[...]
    total = jnp.zeros(refs.total.shape, jnp.float32)
    acc = jnp.zeros(refs.acc.shape, jnp.float32)
    rise = jnp.full_like(total, NO_SCORE)
    for check, chunk, products in _pipelined_products(config, refs, group):
        scores = _scores(refs, products) - shift
        if check:
            scores = jnp.where(_visible(config, refs, chunk, False), scores, NO_SCORE)
        rise = jnp.maximum(rise, _max_by_eight(scores))
        p = jnp.exp2(scores)
        total += _sum_by_eight(p)
        acc += _weigh(config, refs, chunk, p, check)

    rise = jnp.max(rise, axis=0, keepdims=True)
    # The first group contains the score it is shifted by, so it cannot lie far below its shift.
    lowest = jnp.where(first, -_MAX_RISE, -jnp.inf)
    # These comparisons are false for NaN, which makes it unsafe.
    largest = jnp.max(jnp.abs(acc), axis=0, keepdims=True)
    safe = (rise <= _MAX_RISE) & (rise >= lowest) & (largest <= _MAX_SUM)
    query = pl.program_id(1) * config.block_q + jax.lax.broadcasted_iota(jnp.int32, rise.shape, 1)
    unsafe = jnp.max(jnp.where(safe | (query >= config.q_len), 0.0, 1.0)) > 0

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
            refs.shift[...] = jnp.full(refs.shift.shape, NO_SCORE)

        _careful_chunks(config, refs, group * config.unroll, (group + 1) * config.unroll)


def _careful_chunks(config: KernelConfig, refs: Refs, first: jax.Array, last: jax.Array) -> None:
    """Run online softmax on the chunks first <= i < last of the block or of the tile's list."""
    if refs.lists is None:
        keys = refs.kv_len[0] - pl.program_id(2) * config.block_kv
        last = jnp.minimum(last, pl.cdiv(keys, config.chunk))

    def one_chunk(i: jax.Array, _: None) -> None:
        if refs.lists is None:
            chunk = Chunk(pl.multiple_of(i * config.chunk, config.chunk), None)
        else:
            chunk = refs.lists.chunk(config, i)
        visible = _visible(config, refs, chunk, config.window_size is not None)
        scores = _scores(refs, _products(config, refs, chunk.start))
        scores = jnp.where(visible, scores, NO_SCORE)
        old = refs.shift[...]
        new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
        # For a query without a visible key so far, exp2(NO_SCORE - NO_SCORE) would be 1.
        p = jnp.where(visible, jnp.exp2(scores - new), 0.0)
        shrink = jnp.exp2(old - new)
        refs.shift[...] = new
        refs.total[...] = refs.total[...] * shrink + _sum_by_eight(p)
        refs.acc[...] = refs.acc[...] * shrink + _weigh(config, refs, chunk, p, True)

    jax.lax.fori_loop(first, last, one_chunk, None)


def _chunks_in_window(config: KernelConfig) -> tuple[jax.Array, jax.Array]:
    """Return the range (first, last + 1) of the block's chunks that a query of the tile sees."""
    assert config.window_size is not None
    first_query = pl.program_id(1) * config.block_q
    last_query = jnp.minimum(first_query + config.block_q, config.q_len) - 1
    first_key = first_query - config.window_size - pl.program_id(2) * config.block_kv
    last_key = last_query + config.window_size - pl.program_id(2) * config.block_kv
    chunks = config.block_kv // config.chunk
    first = jnp.clip(first_key // config.chunk, 0, chunks)
    return first, jnp.clip(last_key // config.chunk + 1, first, chunks)


def _all_groups(config: KernelConfig, refs: Refs) -> tuple[int, int | jax.Array]:
    if refs.lists is None:
        return 0, config.groups
    return 0, pl.cdiv(refs.lists.length, config.unroll)


def attend_bounded(config: KernelConfig, refs: Refs) -> None:
    first, last = _all_groups(config, refs)
    if config.window_size is not None:
        first_chunk, last_chunk = _chunks_in_window(config)
        first, last = first_chunk // config.unroll, pl.cdiv(last_chunk, config.unroll)
    group_body = _bounded_group if refs.q_scale is None else _bounded_group_int8
    jax.lax.fori_loop(first, last, lambda g, _: group_body(config, refs, g), None)


def attend_online(config: KernelConfig, refs: Refs) -> None:
    if config.window_size is not None:
        # `_online_group` needs a first chunk with a visible key for every query of the tile.
        _careful_chunks(config, refs, *_chunks_in_window(config))
        return
    first_block = pl.program_id(2) == 0
    jax.lax.fori_loop(
        *_all_groups(config, refs),
        lambda g, _: _online_group(config, refs, g, first_block & (g == 0)),
        None,
    )
