"""The Hopper kernel in Pallas Mosaic GPU: one head and one tile of queries per thread block.

One warpgroup copies tiles of keys and values into shared memory with the bulk tensor copy engine.
The others compute, 64 queries each:

    scores [64, block_kv] = q [64, D] @ k [block_kv, D]^T             log2 units: q is scaled
    p                     = exp2(scores - shift)                      rounded to the dtype of v
    out    [64, D]       += p @ v [block_kv, D]
    total  [64, 8]       += p @ ones [block_kv, 8]

The denominators are sums of the rounded weights: rounding then cancels where few keys have most of
the weight, and the tensor cores add faster than the other units.

A warpgroup starts p @ v for the first keys of a tile while it computes p for the next, and does not
wait for it before the next tile's scores. While it waits, the other warpgroups use the units for
exponentials: at head size 64 these are as busy as the tensor cores.

Axis letters: B batch, S queries, K keys, N heads, D head size.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from splash_attention.hopper.tiles import (
    ROW_MULTIPLE,
    AllKeys,
    HopperConfig,
    Keys,
    ListedKeys,
    ListTables,
)

_BLOCK_Q = 64  # queries of a warpgroup: rows of a matrix instruction
_CHUNK = 64  # keys of one p @ v: a row of a shared-memory tile, 128 bytes
_SUMS = 8  # equal columns of denominators: the fewest of a matrix instruction
_COPY_REGISTERS = 24  # registers of a thread of the copying warpgroup
_TRANSFORMS = (
    plgpu.TilingTransform((ROW_MULTIPLE, _CHUNK)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)


class _Arrays(NamedTuple):
    """Arrays in global memory."""

    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    bounded: jax.Ref
    out: jax.Ref
    log_total: jax.Ref


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Shared memory and barriers of a thread block."""

    q: jax.Ref  # [warpgroups, 64, D]; later the output
    k: jax.Ref  # [stages, block_kv, D]
    v: jax.Ref
    ones: jax.Ref  # [64, 64]: an array of this shape has a layout to write it from
    log_total: jax.Ref  # [warpgroups, 64] float32
    q_ready: jax.Ref
    k_ready: jax.Ref
    v_ready: jax.Ref
    k_free: jax.Ref
    v_free: jax.Ref


def hopper_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounded: jax.Array,
    *,
    kv_len: int,
    config: HopperConfig,
    factor: float,
    lists: ListTables | None = None,
    block_q: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to the first `kv_len` keys, or to those of lists.

    Args:
        q: [B, S, N, D] bfloat16 or float16; D is 64 or 128, S a multiple of 8.
        k, v: [B, K, N, D]; K is a multiple of 8. The rows of v of every visited tile are finite;
            other rows, and those of k that are not valid, may hold anything.
        bounded: [B, N] int32; 0 for the heads that need a running maximum.
        kv_len: number of valid keys; not used with lists.
        config: layout of a thread block.
        factor: positive factor on q.k that gives the base-2 logarithm of a softmax weight. 1 saves
            a multiplication per score.
        lists: the tiles of keys that each tile of queries visits, by rule.
        block_q: with lists, queries of a tile, a multiple of 64.

    Returns:
        The output [B, S, N, D] in the dtype of `q`, and log2 of the softmax denominators [B, N, S']
        float32, where S' is S rounded up to whole thread blocks, or to whole tiles of queries.
    """
    batch, queries, heads, head_dim = q.shape
    rows = config.warpgroups * _BLOCK_Q
    block_q = block_q or rows
    tiles, blocks_of_tile = -(-queries // block_q), -(-block_q // rows)
    # The copy engine needs rows of a multiple of 16 bytes.
    log_total_type = jax.ShapeDtypeStruct((batch, heads, tiles * block_q), jnp.float32)

    def body(*refs: jax.Ref) -> None:
        inputs, outputs = refs[:-2], refs[-2:]
        at = _Arrays(*inputs[:4], *outputs)
        head, block = (lax.axis_index("batch"), lax.axis_index("head")), lax.axis_index("block")
        tile = lax.div(block, jnp.int32(blocks_of_tile))
        keys: Keys = AllKeys(kv_len, config.block_kv)
        if lists is not None:
            tables = ListTables(*inputs[4:])  # pyright: ignore[reportArgumentType]
            keys = ListedKeys(tables, tables.rule[head], tile)

        def run(*scratch_refs: jax.Ref) -> None:
            scratch, warpgroup = _Scratch(*scratch_refs), lax.axis_index("warpgroup")

            @pl.when(warpgroup < config.warpgroups)
            def _() -> None:
                plgpu.set_max_registers(config.registers, action="increase")
                in_tile = lax.rem(block, jnp.int32(blocks_of_tile)) * rows + warpgroup * _BLOCK_Q
                first = tile * block_q + in_tile
                compute = functools.partial(_compute, scratch, at, head, first, keys, config)
                if block_q % rows == 0:
                    compute(factor)
                else:
                    pl.when(in_tile < block_q)(lambda: compute(factor))
                    pl.when(in_tile >= block_q)(lambda: _let_pass(scratch, keys, config))

            @pl.when(warpgroup == config.warpgroups)
            def _() -> None:
                plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
                _copy_keys(scratch, at, head, keys, config)

        pl.run_scoped(run, *_scratch_types(config, head_dim, q.dtype), collective_axes="warpgroup")

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), log_total_type),
        grid=(batch, heads, tiles * blocks_of_tile),
        grid_names=("batch", "head", "block"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="splash_attention_hopper",
    )(q, k, v, bounded, *(lists or ()))


def _scratch_types(config: HopperConfig, head_dim: int, dtype: jnp.dtype) -> list:
    """Return the types of `_Scratch`, in order."""
    tile = (config.stages, config.block_kv, head_dim)
    ready = plgpu.Barrier(num_barriers=config.stages)
    free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)
    return [
        plgpu.SMEM((config.warpgroups, _BLOCK_Q, head_dim), dtype, transforms=_TRANSFORMS),
        plgpu.SMEM(tile, dtype, transforms=_TRANSFORMS),
        plgpu.SMEM(tile, dtype, transforms=_TRANSFORMS),
        plgpu.SMEM((_BLOCK_Q, _CHUNK), dtype, transforms=_TRANSFORMS),
        plgpu.SMEM((config.warpgroups, _BLOCK_Q), jnp.float32),
        plgpu.Barrier(num_barriers=config.warpgroups),
        *(ready, ready),
        *(free, free),
    ]


def _compute(
    at: _Scratch,
    arrays: _Arrays,
    head: tuple[jax.Array, jax.Array],
    first: jax.Array,
    keys: Keys,
    config: HopperConfig,
    factor: float,
) -> None:
    """Compute the queries of this warpgroup, of which `first` is the first."""
    warpgroup = lax.axis_index("warpgroup")
    rows = head[0], pl.ds(first, _BLOCK_Q), head[1]
    ready = at.q_ready.at[warpgroup]
    plgpu.copy_gmem_to_smem(arrays.q.at[rows], at.q.at[warpgroup], ready)
    plgpu.barrier_wait(ready)
    flag = arrays.bounded[head]
    pl.when(flag != 0)(lambda: _attend(at, warpgroup, keys, config, factor, False))
    pl.when(flag == 0)(lambda: _attend(at, warpgroup, keys, config, factor, True))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(at.q.at[warpgroup], arrays.out.at[rows])
    total_rows = arrays.log_total.at[(*head, pl.ds(first, _BLOCK_Q))]
    plgpu.copy_smem_to_gmem(at.log_total.at[warpgroup], total_rows)
    plgpu.wait_smem_to_gmem(0)


def _copy_keys(
    at: _Scratch,
    arrays: _Arrays,
    head: tuple[jax.Array, jax.Array],
    keys: Keys,
    config: HopperConfig,
) -> None:
    """Copy all tiles of keys and values to shared memory, each as soon as its place is free."""
    tiles = keys.tiles
    filled = (
        min(config.stages, tiles) if isinstance(tiles, int) else jnp.minimum(config.stages, tiles)
    )

    def copy(i: jax.Array, wait: bool) -> None:
        stage = lax.rem(i, jnp.int32(config.stages))
        rows = head[0], pl.ds(keys.start(i), config.block_kv), head[1]
        for source, target, free, ready in (
            (arrays.k, at.k, at.k_free, at.k_ready),
            (arrays.v, at.v, at.v_free, at.v_ready),
        ):
            if wait:
                plgpu.barrier_wait(free.at[stage])
            plgpu.copy_gmem_to_smem(source.at[rows], target.at[stage], ready.at[stage])

    pl.loop(0, filled)(functools.partial(copy, wait=False))
    pl.loop(filled, tiles)(functools.partial(copy, wait=True))


def _let_pass(at: _Scratch, keys: Keys, config: HopperConfig) -> None:
    """Release every tile of keys unread, for a warpgroup that has no queries."""
    tiles = keys.tiles

    @pl.loop(0, tiles)
    def _(i: jax.Array) -> None:
        stage = lax.rem(i, jnp.int32(config.stages))
        plgpu.barrier_wait(at.k_ready.at[stage])
        plgpu.barrier_arrive(at.k_free.at[stage])
        plgpu.barrier_wait(at.v_ready.at[stage])
        pl.when(i + 1 < tiles)(lambda: plgpu.barrier_arrive(at.v_free.at[stage]))


def _mask(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Set scores to -infinity from column `valid` on."""

    def cut(scores: jax.Array) -> jax.Array:
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        return jnp.where(column < valid, scores, -jnp.inf)

    return lax.cond(valid < scores.shape[1], cut, lambda scores: scores, scores)


def _attend(
    at: _Scratch,
    warpgroup: jax.Array,
    keys: Keys,
    config: HopperConfig,
    factor: float,
    online: bool,
) -> None:
    """Compute the queries of a warpgroup; write the output over them, and log2 of the totals."""
    _, rows, head_dim = at.q.shape
    tiles = keys.tiles

    def scores(stage: jax.Array) -> jax.Array:
        def product(ref: jax.Ref) -> jax.Array:
            k = at.k.at[stage].transpose((1, 0))
            plgpu.wgmma(ref, at.q.at[warpgroup], k)  # pyright: ignore[reportArgumentType]
            return ref[...]  # waits for all products, also for p @ v of the tile before

        return pl.run_scoped(product, plgpu.ACC((rows, config.block_kv), jnp.float32))

    def all_tiles(acc: jax.Ref, total: jax.Ref) -> tuple[jax.Array, ...]:
        def tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            highest, valid = carry
            # Read ahead: it may come from global memory.
            valid_next = keys.valid(jnp.minimum(i + 1, tiles - 1))
            stage = lax.rem(i, jnp.int32(config.stages))
            plgpu.barrier_wait(at.k_ready.at[stage])
            s = scores(stage)
            plgpu.barrier_arrive(at.k_free.at[stage])

            @pl.when(i > 0)
            def _() -> None:
                plgpu.barrier_arrive(at.v_free.at[lax.rem(i - 1, jnp.int32(config.stages))])

            if keys.padded == "once" or (online and keys.padded == "often"):
                s = _mask(s, valid)
            if online:
                before, highest = highest, jnp.maximum(highest, s.max(axis=1))
                rescale = jnp.exp2((before - highest) * factor)
                for ref in (acc, total):
                    ref[...] = ref[...] * lax.broadcast_in_dim(rescale, ref.shape, [0])
            shift = lax.broadcast_in_dim(highest * factor, (rows, _CHUNK), [0])
            parts = [s[:, start : start + _CHUNK] for start in range(0, config.block_kv, _CHUNK)]
            if not online and keys.padded == "often":
                # Padding is short, so few parts have any: 0.92 of the time of masks of whole tiles.
                parts = [_mask(x, valid - i * _CHUNK) for i, x in enumerate(parts)]
            for start, x in zip(range(0, config.block_kv, _CHUNK), parts, strict=True):
                x = x if factor == 1 else x * factor
                p = jnp.exp2(x - shift if online else x).astype(at.v.dtype)
                if start == 0:
                    plgpu.barrier_wait(at.v_ready.at[stage])
                v = at.v.at[stage, pl.ds(start, _CHUNK)]
                plgpu.wgmma(acc, p, v)  # pyright: ignore[reportArgumentType]
                ones = at.ones.at[pl.ds(0, _SUMS)].transpose((1, 0))
                plgpu.wgmma(total, p, ones)  # pyright: ignore[reportArgumentType]
            return highest, valid_next

        highest = jnp.full((rows,), -jnp.inf if online else 0, jnp.float32)
        highest = plgpu.layout_cast(highest, plgpu.Layout.WGMMA.reduce(1))
        carry = highest, keys.valid(jnp.int32(0))
        highest, _ = lax.fori_loop(0, tiles, tile, carry)
        return acc[...], total[...].max(axis=1), highest

    # Every warpgroup writes the same ones, so that it need not wait for another.
    at.ones[...] = plgpu.layout_cast(jnp.ones(at.ones.shape, at.ones.dtype), plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    accumulators = (plgpu.ACC((rows, n), jnp.float32) for n in (head_dim, _SUMS))
    out, total, highest = pl.run_scoped(all_tiles, *accumulators)
    out = out * lax.broadcast_in_dim(1 / total, out.shape, [0])
    at.q[warpgroup] = out.astype(at.q.dtype)
    at.log_total[warpgroup] = highest * factor + jnp.log2(total)
