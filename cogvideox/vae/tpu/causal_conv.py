"""Pallas TPU kernel: norm, activation and a causal 3x3x3 convolution.

The nine (frame, column) taps are concatenated along the contraction axis and the three row taps
along the output axis, so one matrix product [H, 9 C] x [9 C, 3 C'] computes all 27 taps. The row
taps are then added with a shift of one row. The shift is cheap in float32 and expensive in packed
bfloat16 inputs. See `cogvideox.vae.tpu.common` for the ring of columns.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cogvideox.vae.tpu.common import BORDER, Interpret, clear_border, compiler_params, dot

_PLANES = 8  # rows of a float32 tile; `planar` results are padded to them
_CACHE_OPERAND = 6  # index of the cache among the operands, if present


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static options of the kernel's body; see `causal_conv`."""

    repeat: int
    offset: int
    modulated: bool
    cached: bool
    residual: bool
    shortcut: bool
    planar: bool


class _Refs(NamedTuple):
    """Refs of one grid step; see `causal_conv` for the operands."""

    real: jax.Array
    x: jax.Array
    left: jax.Array
    right: jax.Array
    weight: jax.Array
    bias: jax.Array
    cache: jax.Array | None
    multiplier: jax.Array | None
    summand: jax.Array | None
    residual: jax.Array | None
    shortcut: jax.Array | None
    out: jax.Array
    new_cache: jax.Array
    sums: jax.Array
    ring: jax.Array  # [3, F + 2, H, C]: three columns of activated frames
    products: jax.Array  # float32 [H + 2 BORDER, 3 C']

    @classmethod
    def of(cls, refs: Sequence[jax.Array], options: _Options) -> "_Refs":
        """Names the refs; the options decide which ones are present."""
        present = [True] * 6 + [options.cached, options.modulated, options.modulated]
        present += [options.residual, options.shortcut] + [True] * 5
        remaining = iter(refs)
        arguments = (next(remaining) if here else None for here in present)
        return cls(*arguments)  # pyright: ignore[reportArgumentType]


def _kernel(*all_refs: jax.Array, options: _Options) -> None:
    """Runs one grid step: reads a column and convolves the previous one."""
    refs = _Refs.of(all_refs, options)
    step = pl.program_id(1)
    columns = pl.num_programs(1) - 1
    newest = lax.rem(step + 1, 3)  # column c uses slot (c + 1) % 3 of the ring

    @pl.when(step == 0)
    def _():
        refs.ring[0] = refs.left[0, :, 0]
        refs.sums[...] = jnp.zeros_like(refs.sums)
        clear_border(refs.products, refs.x.shape[3])

    @pl.when(step < columns)
    def _():
        _activate_column(refs, options, step, newest)

    @pl.when(step == columns)
    def _():
        refs.ring[newest] = refs.right[0, :, 0]

    @pl.when(step > 0)
    def _():
        _convolve_column(refs, options, step, newest)


def _activate_column(refs: _Refs, options: _Options, step: jax.Array, newest: jax.Array) -> None:
    """Writes the activated frames of column `step` to the ring, after the cache's two frames."""
    frames = refs.x.shape[1]
    real = (step < refs.real[0]).astype(jnp.float32)

    def activate(t, _):
        value = refs.x[0, t, 0].astype(jnp.float32)
        if refs.multiplier is not None and refs.summand is not None:
            latent = (t + options.offset) // options.repeat
            value = value * refs.multiplier[0, latent, 0] + refs.summand[0, latent, 0]
            value = value * jax.nn.sigmoid(value)
        refs.ring[newest, t + 2] = (value * real).astype(refs.ring.dtype)
        return 0

    lax.fori_loop(0, frames, activate, 0)
    for t in range(2):
        refs.ring[newest, t] = refs.ring[newest, 2] if refs.cache is None else refs.cache[0, t, 0]
    for t in range(2):
        refs.new_cache[0, t, 0] = refs.ring[newest, frames + t]


def _convolve_column(refs: _Refs, options: _Options, step: jax.Array, newest: jax.Array) -> None:
    """Convolves column `step - 1` of every frame and updates the sums."""
    frames, height = refs.x.shape[1], refs.x.shape[3]
    out_channels = refs.bias.shape[1]
    slots = (lax.rem(step + 2, 3), lax.rem(step, 3), newest)
    real = (step - 1 < refs.real[0]).astype(jnp.float32)

    def convolve(t, _):
        taps = [refs.ring[slot, t + k] for k in range(3) for slot in slots]
        taps = jnp.concatenate(taps, axis=-1)
        refs.products[BORDER : BORDER + height] = dot(taps, refs.weight[...])
        out = refs.bias[...]
        for k in range(3):
            rows = pl.ds(BORDER - 1 + k, height)
            out = out + refs.products[rows, k * out_channels : (k + 1) * out_channels]
        if refs.shortcut is not None and refs.residual is not None:
            out = out + dot(refs.residual[0, t, 0], refs.shortcut[...])
        elif refs.residual is not None:
            out = out + refs.residual[0, t, 0].astype(jnp.float32)
        if options.planar:
            refs.out[0, t, 0] = out.T[:_PLANES]
            return 0
        refs.out[0, t, 0] = out.astype(refs.out.dtype)
        out = out * real
        refs.sums[0, 0:1] += out.sum(axis=0, keepdims=True)
        refs.sums[0, 1:2] += jnp.square(out).sum(axis=0, keepdims=True)
        return 0

    lax.fori_loop(0, frames, convolve, 0)


def _reading(columns: int):
    """Returns the index map of the column that a step reads."""
    return lambda b, step: (b, 0, jnp.minimum(step, columns - 1), 0, 0)


def _writing(b: jax.Array, step: jax.Array) -> tuple[jax.Array | int, ...]:
    """Index map of the column that a step convolves."""
    return b, 0, jnp.maximum(step - 1, 0), 0, 0


def _whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda b, step: (0,) * array.ndim)


def _cache_column(x: jax.Array) -> pl.BlockSpec:
    _, _, columns, height, channels = x.shape
    return pl.BlockSpec((1, 2, 1, height, channels), _reading(columns))


def _operands(
    x: jax.Array,
    cache: jax.Array | None,
    left: jax.Array,
    right: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    real_columns: jax.Array,
    modulation: tuple[jax.Array, jax.Array] | None,
    residual: jax.Array | None,
    shortcut: jax.Array | None,
) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """Returns the arrays that are present, in the order of `_Refs`, with their block specs."""
    _, frames, columns, height, channels = x.shape
    border_column = pl.BlockSpec(
        (1, frames + 2, 1, height, channels), lambda b, step: (b, 0, 0, 0, 0)
    )
    bias = bias.astype(jnp.float32)[None]
    operands = [
        (real_columns[None], pl.BlockSpec(memory_space=pltpu.SMEM)),
        (x, pl.BlockSpec((1, frames, 1, height, channels), _reading(columns))),
        (left, border_column),
        (right, border_column),
        (weight, _whole(weight)),
        (bias, _whole(bias)),
    ]
    if cache is not None:
        operands.append((cache, _cache_column(x)))
    if modulation is not None:
        latent_frames, latent_columns = modulation[0].shape[1:3]
        scale = columns // latent_columns

        def reading_latent(b, step):
            return b, 0, jnp.minimum(step, columns - 1) // scale, 0, 0

        latent_column = pl.BlockSpec((1, latent_frames, 1, height, channels), reading_latent)
        operands += [(array, latent_column) for array in modulation]
    if residual is not None:
        block = (1, frames, 1, height, residual.shape[-1])
        operands.append((residual, pl.BlockSpec(block, _writing)))
    if shortcut is not None:
        operands.append((shortcut, _whole(shortcut)))
    return operands


def causal_conv(
    x: jax.Array,
    cache: jax.Array | None,
    left: jax.Array,
    right: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    real_columns: jax.Array,
    *,
    modulation: tuple[jax.Array, jax.Array] | None = None,
    repeat: int = 1,
    offset: int = 0,
    residual: jax.Array | None = None,
    shortcut: jax.Array | None = None,
    planar: bool = False,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes conv(silu(x * multiplier + summand)) + bias + residual on one device's columns.

    Args:
        x: [B, F, W, H, C].
        cache: the two activated frames before `x`, [B, 2, W, H, C]; the new cache reuses its
            buffer. None at the start of a video, where the first frame replaces both.
        left, right: the neighbours' activated border columns [B, F + 2, 1, H, C], starting with the
            two previous frames; zero outside the frame.
        weight: [9 C, 3 C'], rows by (frame, column, channel), columns by (row, channel).
        bias: [C'].
        real_columns: int32 scalar; columns from this index on are padding and read as zeros.
        modulation: multiplier and summand, float32 [B, T, W / s, H, C]. Each column applies to s
            columns of `x`; frame t uses latent frame (t + offset) // repeat. None skips
            multiplier, summand and silu.
        residual: [B, F, W, H, C'], or [B, F, W, H, R] with a `shortcut` [R, C'] to multiply by.
        planar: return [B, F, W, 8, H] float32, the first 8 channels as planes, and no sums.
        interpret: see `Interpret`.

    Returns:
        [B, F, W, H, C'], the new cache, and float32 [B, 2, C']: sum and sum of squares of the
        result over frames, real columns and rows.
    """
    batch, frames, columns, height, channels = x.shape
    out_channels = bias.shape[0]
    options = _Options(
        repeat,
        offset,
        modulated=modulation is not None,
        cached=cache is not None,
        residual=residual is not None,
        shortcut=shortcut is not None,
        planar=planar,
    )
    required = (x, cache, left, right, weight, bias, real_columns)
    operands = _operands(*required, modulation, residual, shortcut)
    if planar:
        out = jax.ShapeDtypeStruct((batch, frames, columns, _PLANES, height), jnp.float32)
    else:
        out = jax.ShapeDtypeStruct((*x.shape[:4], out_channels), x.dtype)
    arrays, in_specs = zip(*operands, strict=True)
    return pl.pallas_call(
        functools.partial(_kernel, options=options),
        name="causal_conv",
        grid=(batch, columns + 1),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, frames, 1, *out.shape[3:]), _writing),
            _cache_column(x),
            pl.BlockSpec((1, 2, out_channels), lambda b, step: (b, 0, 0)),
        ],
        out_shape=[
            out,
            jax.ShapeDtypeStruct((batch, 2, columns, height, channels), x.dtype),
            jax.ShapeDtypeStruct((batch, 2, out_channels), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((3, frames + 2, height, channels), x.dtype),
            pltpu.VMEM((height + 2 * BORDER, 3 * out_channels), jnp.float32),
        ],
        input_output_aliases={} if cache is None else {_CACHE_OPERAND: 1},
        compiler_params=compiler_params(),
        interpret=interpret,
    )(*arrays)
