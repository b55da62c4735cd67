"""q and k for int8 attention as Pallas TPU kernels: normed, rotated and quantised in one pass.

XLA takes seven passes over q and k for smoothing, steps and digits: 5.4M v6e cycles a block, as
much as int8 attention saves. The step of k is that of a whole head, so one kernel finds the
statistics that it depends on, and a second one norms k again and quantises it.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cogvideox.transformer.backends.base import Norm
from cogvideox.transformer.backends.tpu.token_shards import LANES, Tiles, by_chunks
from cogvideox.transformer.norms import Rotary, norm_heads
from splash_attention.quantize import DIGITS, digits, key_step, score_scale

_CHUNK = 512  # tokens in registers at once


def quantize_heads(
    q: jax.Array,
    k: jax.Array,
    norm_q: Norm,
    norm_k: Norm,
    rotary: Rotary | None,
    valid: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `norms.norm_and_rotate` of q and k, smooths k, and quantises both.

    Args:
        q, k: [b, shards, R, s]; D divides 128, s is a multiple of 128.
        norm_q, norm_k: of the norms.
        rotary: cos and sin [D / 2, S] float32, S = shards x s.
        valid: bool [S]; other keys become zeros.

    Returns:
        What `splash_attention.quantize.quantize` makes of q and the smoothed k: q [b, 2 R, S] int8,
        k [b, S, 2 R] int8, and the scales of the products [b, N, 1, S] bfloat16.
    """
    tiles, head_dim = Tiles(*k.shape), norm_k[0].size
    tokens = tiles.shards * tiles.shard_tokens
    mask = valid.astype(jnp.float32)[None]
    call = functools.partial(_call, tiles, head_dim, rotary=rotary, interpret=interpret)

    part = pl.BlockSpec((1, 1, tiles.rows, LANES), lambda b, i, t, r: (b, i + t, r, 0))
    parts = tiles.batch, tiles.grid[1] * tiles.grid[2], tiles.all_rows, LANES
    low, high, total = call(
        functools.partial(_statistics, last=tokens),
        k,
        norm_k,
        tables=(mask,),
        name="key_statistics",
        outputs=[(part, jax.ShapeDtypeStruct(parts, jnp.float32))] * 3,
    )
    mean = total.sum((1, 3)) / valid.sum()
    largest = jnp.maximum(high.max((1, 3)) - mean, mean - low.min((1, 3)))
    step = key_step(largest.reshape(tiles.batch, -1, head_dim).max(-1, keepdims=True))
    of_rows = jnp.broadcast_to(step, (*step.shape[:2], head_dim)).reshape(mean.shape)

    rows = DIGITS * tiles.rows
    (k8,) = call(
        _keys,
        k,
        norm_k,
        columns=(mean, 1 / of_rows),
        tables=(mask,),
        name="quantize_keys",
        outputs=[
            (
                pl.BlockSpec((1, tiles.tokens, rows), lambda b, i, t, r: (b, i + t, r)),
                jax.ShapeDtypeStruct((tiles.batch, tokens, DIGITS * tiles.all_rows), jnp.int8),
            )
        ],
    )
    heads = tiles.rows // head_dim
    q8, scale = call(
        _queries,
        q,
        norm_q,
        columns=(of_rows,),
        name="quantize_queries",
        outputs=[
            (
                pl.BlockSpec((1, rows, tiles.tokens), lambda b, i, t, r: (b, r, i + t)),
                jax.ShapeDtypeStruct((tiles.batch, DIGITS * tiles.all_rows, tokens), jnp.int8),
            ),
            (
                pl.BlockSpec((1, heads, 1, tiles.tokens), lambda b, i, t, r: (b, r, 0, i + t)),
                jax.ShapeDtypeStruct((tiles.batch, step.shape[1], 1, tokens), jnp.bfloat16),
            ),
        ],
    )
    return q8, k8, scale


def _call(
    tiles: Tiles,
    head_dim: int,
    kernel: Callable[..., None],
    x: jax.Array,
    norm: Norm,
    *,
    rotary: Rotary | None,
    columns: tuple[jax.Array, ...] = (),
    tables: tuple[jax.Array, ...] = (),
    interpret: bool,
    name: str,
    outputs: Sequence[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
) -> list[jax.Array]:
    """Runs a kernel over x [b, shards, R, s].

    It is called as kernel(normed, columns, tables, outputs): a function that returns the normed and
    rotated [heads, D, tokens] of a slice of tokens, and references.

    Args:
        columns: [b, R] float32 each, which the kernel sees as [1, rows, 1].
        tables: [1, S] float32 each.
    """
    weight, bias = (x[:, None] for x in norm)
    tables_of_rotary = () if rotary is None else rotary
    of_norm = pl.BlockSpec((head_dim, 1), lambda b, i, t, r: (0, 0))
    of_rows = pl.BlockSpec((1, tiles.rows, 1), lambda b, i, t, r: (b, r, 0))

    def body(x_ref, weight_ref, bias_ref, *refs) -> None:
        rotary_refs, refs = refs[: len(tables_of_rotary)], refs[len(tables_of_rotary) :]
        inputs, refs = refs[: len(columns)], refs[len(columns) :]

        def normed(tokens: pl.Slice) -> jax.Array:
            x = x_ref[0, 0, :, tokens].astype(jnp.float32).reshape(-1, head_dim, tokens.size)
            of_tokens = tuple(table[:, tokens] for table in rotary_refs) or None
            return norm_heads(x, weight_ref[...], bias_ref[...], of_tokens)

        kernel(normed, inputs, refs[: len(tables)], refs[len(tables) :], x_ref.shape[-1])

    return tiles.call(
        body,
        *(x, weight, bias, *tables_of_rotary, *(x[..., None] for x in columns), *tables),
        in_specs=[
            *(tiles.apart, of_norm, of_norm),
            *(tiles.table(len(table)) for table in tables_of_rotary),
            *[of_rows] * len(columns),
            *(tiles.table(1) for _ in tables),
        ],
        interpret=interpret,
        name=name,
        out_specs=[spec for spec, _ in outputs],
        out_shape=[shape for _, shape in outputs],
    )


def _statistics(normed, columns, tables, outputs, tokens: int, *, last: int) -> None:
    """Finds minimum, maximum and sum of each row over the valid tokens, by lanes."""
    (mask_ref,), (low_ref, high_ref, total_ref) = tables, outputs
    low_ref[...] = jnp.full(low_ref.shape, jnp.inf)
    high_ref[...] = jnp.full(high_ref.shape, -jnp.inf)
    total_ref[...] = jnp.zeros(total_ref.shape)
    first = (pl.program_id(1) + pl.program_id(2)) * tokens

    def chunk(at: pl.Slice) -> None:
        x = normed(at)
        x = x.reshape(-1, x.shape[-1])
        index = first + at.start + jax.lax.broadcasted_iota(jnp.int32, (1, at.size), 1)
        valid = (mask_ref[:, at] > 0) & (index < last)
        for ref, nothing, combine in (
            (low_ref, jnp.inf, jnp.minimum),
            (high_ref, -jnp.inf, jnp.maximum),
            (total_ref, 0.0, jnp.add),
        ):
            seen = jnp.where(valid, x, nothing)
            lanes = [seen[:, i : i + LANES] for i in range(0, at.size, LANES)]
            ref[0, 0] = functools.reduce(combine, lanes, ref[0, 0])

    by_chunks(tokens, chunk, _CHUNK)


def _keys(normed, columns, tables, outputs, tokens: int) -> None:
    """Quantises smoothed keys, tokens first: the digits of each head beside each other."""
    (mean_ref, inverse_ref), (mask_ref,), (out_ref,) = columns, tables, outputs

    def chunk(at: pl.Slice) -> None:
        x = normed(at)
        mean, inverse = (
            ref[0].reshape(x.shape[0], x.shape[1], 1) for ref in (mean_ref, inverse_ref)
        )
        x = digits(jnp.where(mask_ref[:, at] > 0, (x - mean) * inverse, 0.0), axis=1)
        x = x.reshape(-1, x.shape[-1])
        out_ref[0, at, :] = x.T.astype(jnp.int8)

    by_chunks(tokens, chunk, _CHUNK)


def _queries(normed, columns, tables, outputs, tokens: int) -> None:
    """Quantises queries, tokens last, each with a step of its own."""
    (step_ref,), (out_ref, scale_ref) = columns, outputs

    def chunk(at: pl.Slice) -> None:
        x = normed(at)
        step = step_ref[0].reshape(x.shape[0], x.shape[1], 1)[:, :1]
        factor, scale = score_scale(jnp.max(jnp.abs(x), axis=1, keepdims=True), step)
        x = digits(x * factor, axis=1)
        out_ref[0, :, at] = x.reshape(-1, x.shape[-1]).astype(jnp.int8)
        scale_ref[0, :, :, at] = scale.astype(jnp.bfloat16)

    by_chunks(tokens, chunk, _CHUNK)
