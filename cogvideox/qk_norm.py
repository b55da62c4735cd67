"""q/k norm and rotary embedding: one pass between the projections and the attention kernel.

Arrays have the sequence last, [b, R, s], with R = heads x D rows; a head's rotary pairs lie half a
head apart (`rotary_halves`). Everything is computed in float32 and rounded once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# diffusers' CogVideoXBlock gives its q/k norms this epsilon, whatever the config says.
EPS = 1e-6

Rotary = tuple[jax.Array, jax.Array]

# A tile is 128 rows (the lanes of a transposed one) by this many tokens; 1280 leaves 1% of the
# 11,392 tokens of a shard to padding.
_TILE_ROWS, _TILE_TOKENS = 128, 1280


def rotary_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders each head's rows (first axis) from pairs side by side to even half, odd half.

    q.k does not change when q and k are reordered alike.
    """
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.moveaxis(paired, 2, 1).reshape(rows.shape)


def norm_and_rotate(
    x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
) -> jax.Array:
    """LayerNorm over each head's rows, then the rotary embedding.

    Args:
        x: [b, R, s].
        weight, bias: of the norm, [D] float32; a factor on the result goes into both.
        rotary: cos and sin [D / 2, s] float32.

    Returns:
        [b, R, s] in x's dtype.
    """
    heads = x.reshape(x.shape[0], -1, weight.size, x.shape[-1]).astype(jnp.float32)
    out = _norm_and_rotate(heads, weight[:, None], bias[:, None], rotary)
    return out.reshape(x.shape).astype(x.dtype)


def longest_row(weight: jax.Array, bias: jax.Array) -> jax.Array:
    """A bound on the norm of what `norm_and_rotate` makes of any one head's row, [] float32.

    A normed row is at most sqrt(D) long before weight and bias, and rotating keeps its length; 1%
    covers the rounding to bfloat16.
    """
    longest = jnp.abs(weight).max() * math.sqrt(weight.size) + jnp.linalg.norm(bias)
    return 1.01 * longest


def _norm_and_rotate(
    x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
) -> jax.Array:
    """[..., D, s] float32, weight and bias [D, 1]."""
    centred = x - x.mean(-2, keepdims=True)
    variance = jnp.square(centred).mean(-2, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + EPS) * weight + bias
    if rotary is None:
        return normed
    cos, sin = rotary
    even, odd = jnp.split(normed, 2, axis=-2)
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-2)


def norm_and_rotate_tpu(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    rotary: Rotary | None,
    *,
    keys_for: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`norm_and_rotate` as a Pallas TPU kernel: one read, one write.

    XLA needs five passes over float32 for it, 2.2M cycles of a v6e where this takes 0.2M (compiler
    estimates, 48 heads x 11,392 tokens).

    Args:
        x, weight, bias, rotary: as in `norm_and_rotate`; D divides 128, R is a multiple of 128.
        keys_for: None leaves the layout; a number of shards makes the tokens the rows, grouped by
            the shard that a head goes to.

    Returns:
        [b, R, s], or with `keys_for` [b, shards, s, R / shards].
    """
    batch, rows, tokens = x.shape
    head_dim = weight.size
    tables = () if rotary is None else rotary
    tile = min(_TILE_TOKENS, tokens)
    grid = _grid(x.shape)
    if keys_for is None:
        out_shape = x.shape
        out_spec = pl.BlockSpec((1, _TILE_ROWS, tile), lambda b, r, t: (b, r, t))
    else:
        per_shard = grid[1] // keys_for
        out_shape = (batch, keys_for, tokens, rows // keys_for)
        out_spec = pl.BlockSpec(
            (1, 1, tile, _TILE_ROWS), lambda b, r, t: (b, r // per_shard, t, r % per_shard)
        )
    column = pl.BlockSpec((head_dim, 1), lambda b, r, t: (0, 0))
    table = pl.BlockSpec((head_dim // 2, tile), lambda b, r, t: (0, t))
    return pl.pallas_call(
        functools.partial(_kernel, transposed=keys_for is not None),
        name="norm_and_rotate",
        grid=grid,
        in_specs=[
            pl.BlockSpec((1, _TILE_ROWS, tile), lambda b, r, t: (b, r, t)),
            column,
            column,
            *[table] * len(tables),
        ],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(out_shape, x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel")
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
    )(x, weight[:, None], bias[:, None], *tables)


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    batch, rows, tokens = shape
    return batch, rows // _TILE_ROWS, pl.cdiv(tokens, min(_TILE_TOKENS, tokens))


def grid_steps(shape: tuple[int, ...]) -> int:
    """How many tiles the kernel cuts x [b, R, s] into."""
    return math.prod(_grid(shape))


def _kernel(x_ref, weight_ref, bias_ref, *refs, transposed: bool) -> None:
    *tables, out_ref = refs
    head_dim, tile = weight_ref.shape[0], x_ref.shape[-1]
    x = x_ref[0].astype(jnp.float32).reshape(-1, head_dim, tile)
    rotary = tuple(table[...] for table in tables) or None
    out = _norm_and_rotate(x, weight_ref[...], bias_ref[...], rotary)
    out = out.reshape(-1, tile).astype(out_ref.dtype)
    if transposed:
        out_ref[0, 0] = out.T
    else:
        out_ref[0] = out
