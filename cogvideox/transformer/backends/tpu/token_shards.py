"""Pallas TPU kernels between the all-to-alls and the attention kernel.

An all-to-all returns the tokens of each shard separately, [b, shards, R, s]. Attention needs one
sequence, [b, R, shards x s]. XLA converts between the two in two passes. Here the conversion is
free with the q/k norm and takes one pass for v and the output.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cogvideox.transformer.norms import Rotary, norm_heads

# Tokens in registers at once, by 128 rows (the lanes of a transposed tile).
_ROWS, _CHUNK = 128, 1280
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiling of x [b, shards, R, s]: all tokens of a shard, a few rows at a time.

    s is a multiple of 128 and of nothing else, so only full shards align with blocks of the joined
    sequence. A single shard is cut into chunks.
    """

    batch: int
    shards: int
    all_rows: int
    shard_tokens: int

    @property
    def rows(self) -> int:
        return _ROWS if self.all_rows % _ROWS == 0 else self.all_rows

    @property
    def tokens(self) -> int:
        return self.shard_tokens if self.shards > 1 else min(_CHUNK, self.shard_tokens)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Grid: batch, shards, tiles of tokens in a shard, tiles of rows."""
        return (
            *(self.batch, self.shards),
            *(pl.cdiv(self.shard_tokens, self.tokens), self.all_rows // self.rows),
        )

    # Either the shard index or the token tile index is always 0; their sum is the block index.

    @property
    def apart(self) -> pl.BlockSpec:
        """Blocks of [b, shards, R, s]."""
        return pl.BlockSpec((1, 1, self.rows, self.tokens), lambda b, i, t, r: (b, i, r, t))

    @property
    def joined(self) -> pl.BlockSpec:
        """Blocks of [b, R, shards x s]."""
        return pl.BlockSpec((1, self.rows, self.tokens), lambda b, i, t, r: (b, r, i + t))

    @property
    def transposed(self) -> pl.BlockSpec:
        """Blocks of [b, shards x s, R]."""
        return pl.BlockSpec((1, self.tokens, self.rows), lambda b, i, t, r: (b, i + t, r))

    def table(self, rows: int) -> pl.BlockSpec:
        """Returns blocks of a table [rows, shards x s]."""
        return pl.BlockSpec((rows, self.tokens), lambda b, i, t, r: (0, i + t))

    def call(
        self, kernel: Callable[..., None], *operands: jax.Array, interpret: bool, **specs: Any
    ) -> Any:
        # Everything is double-buffered: at most input, output and two tables, 2 and 4 bytes each.
        block = self.rows * self.tokens * operands[0].dtype.itemsize
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 4,
                vmem_limit_bytes=2 * (2 * block + _ROWS * self.tokens * 4) + 16 * 2**20,
            ),
            interpret=pltpu.InterpretParams() if interpret else False,
            **specs,
        )(*operands)


def norm_and_rotate(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    rotary: Rotary | None,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Computes `norms.norm_and_rotate` and joins the shards' tokens: one read, one write.

    XLA takes five float32 passes for the norm alone, 2.2M v6e cycles. This kernel takes 0.2M
    (compiler estimates, 12 heads x 45,568 tokens).

    Args:
        x: [b, shards, R, s]; D divides 128, s is a multiple of 128.
        weight, bias: as in `norms.norm_and_rotate`.
        rotary: cos and sin [D / 2, shards x s] float32.
        transposed: return tokens as rows.

    Returns:
        [b, R, shards x s], or transposed [b, shards x s, R].
    """
    tiles, head_dim = Tiles(*x.shape), weight.size
    shape = (tiles.batch, tiles.all_rows, tiles.shards * tiles.shard_tokens)
    column = pl.BlockSpec((head_dim, 1), lambda b, i, t, r: (0, 0))
    tables = () if rotary is None else rotary
    return tiles.call(
        functools.partial(_norm_kernel, transposed=transposed),
        *(x, weight[:, None], bias[:, None], *tables),
        name="norm_and_rotate",
        in_specs=[tiles.apart, column, column, *(tiles.table(len(table)) for table in tables)],
        out_specs=tiles.transposed if transposed else tiles.joined,
        out_shape=jax.ShapeDtypeStruct(
            (shape[0], shape[2], shape[1]) if transposed else shape, x.dtype
        ),
        interpret=interpret,
    )


def _norm_kernel(x_ref, weight_ref, bias_ref, *refs, transposed: bool) -> None:
    *tables, out_ref = refs
    head_dim = weight_ref.shape[0]

    def chunk(tokens: pl.Slice) -> None:
        x = x_ref[0, 0, :, tokens].astype(jnp.float32).reshape(-1, head_dim, tokens.size)
        rotary = tuple(table[:, tokens] for table in tables) or None
        out = norm_heads(x, weight_ref[...], bias_ref[...], rotary)
        out = out.reshape(-1, tokens.size).astype(out_ref.dtype)
        if transposed:
            out_ref[0, tokens, :] = out.T
        else:
            out_ref[0, :, tokens] = out

    by_chunks(x_ref.shape[-1], chunk)


def join_values(x: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Joins the shards' tokens; also computes the largest magnitude of each row.

    Args:
        x: [b, shards, R, s]; two shards or more, s is a multiple of 128.

    Returns:
        [b, R, shards x s] and [b, R], in x's dtype.
    """
    tiles = Tiles(*x.shape)
    batch, shards = tiles.batch, tiles.shards
    joined, largest = tiles.call(
        _join_kernel,
        x,
        name="join_values",
        in_specs=[tiles.apart],
        out_specs=[
            tiles.joined,
            pl.BlockSpec((1, 1, tiles.rows, LANES), lambda b, i, t, r: (b, i, r, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, tiles.all_rows, shards * tiles.shard_tokens), x.dtype),
            jax.ShapeDtypeStruct((batch, shards, tiles.all_rows, LANES), x.dtype),
        ],
        interpret=interpret,
    )
    return joined, largest.max((1, 3))


def _join_kernel(x_ref, out_ref, largest_ref) -> None:
    out_ref[0] = x_ref[0, 0]
    largest_ref[...] = jnp.zeros(largest_ref.shape, largest_ref.dtype)

    def column(i: jax.Array, _: None) -> None:
        x = jnp.abs(x_ref[0, 0, :, pl.ds(pl.multiple_of(i * LANES, LANES), LANES)])
        largest_ref[0, 0] = jnp.maximum(largest_ref[0, 0], x)

    jax.lax.fori_loop(0, x_ref.shape[-1] // LANES, column, None)


def part_tokens(x: jax.Array, shards: int, *, interpret: bool = False) -> jax.Array:
    """Splits [b, R, S] into the tokens of each shard, [b, shards, R, S / shards]."""
    batch, rows, tokens = x.shape
    tiles = Tiles(batch, shards, rows, tokens // shards)
    return tiles.call(
        _part_kernel,
        x,
        name="part_tokens",
        in_specs=[tiles.joined],
        out_specs=tiles.apart,
        out_shape=jax.ShapeDtypeStruct((batch, shards, rows, tokens // shards), x.dtype),
        interpret=interpret,
    )


def _part_kernel(x_ref, out_ref) -> None:
    out_ref[0, 0] = x_ref[0]


def by_chunks(tokens: int, chunk: Callable[[pl.Slice], None], size: int = _CHUNK) -> None:
    """Calls `chunk` on consecutive slices of at most `size` that cover `tokens`."""
    whole, rest = divmod(tokens, size)

    def body(i: jax.Array, _: None) -> None:
        chunk(pl.ds(pl.multiple_of(i * size, size), size))

    jax.lax.fori_loop(0, whole, body, None)
    if rest:
        chunk(pl.ds(whole * size, rest))
