"""Pallas TPU kernel: nearest doubling followed by a 3x3 convolution.

Four 2x2 convolutions, one for each phase of the doubled frame, replace the doubling and the 3x3
convolution. See `cogvideox.vae.tpu.common` for the ring of columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cogvideox.vae.tpu.common import BORDER, Interpret, clear_border, compiler_params, dot


def _pack_bfloat16(low: jax.Array, high: jax.Array, interpret: Interpret) -> jax.Array:
    """Rounds two float32 [H, C] to bfloat16 and packs them into the halves of 32-bit words."""
    if not interpret:
        return pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
    # pack_elementwise is not implemented on other backends.
    bits = (lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) for x in (low, high))
    low_bits, high_bits = (x.astype(jnp.uint32) for x in bits)
    return low_bits | (high_bits << 16)


def _unpack_rows(words: jax.Array, interpret: Interpret) -> jax.Array:
    """Reads 32-bit words [H, C] as bfloat16 [2 H, C]: low halves are even rows, high ones odd."""
    if not interpret:
        return pltpu.bitcast(words, jnp.bfloat16)
    # pltpu.bitcast is not implemented on other backends.
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=1).astype(jnp.uint16)
    return lax.bitcast_convert_type(halves.reshape(-1, words.shape[1]), jnp.bfloat16)


def interleave_rows(
    even: jax.Array, odd: jax.Array, dtype: jnp.dtype, interpret: Interpret = False
) -> jax.Array:
    """Interleaves two float32 [H, C] to [2 H, C] with rows even[0], odd[0], even[1], ...

    A TPU stores two bfloat16 rows in one row of 32-bit words, so packing interleaves them.
    """
    if dtype == jnp.bfloat16:
        return _unpack_rows(_pack_bfloat16(even, odd, interpret), interpret)
    return jnp.stack([even, odd], axis=1).reshape(-1, even.shape[1]).astype(dtype)


class _Refs(NamedTuple):
    """Refs of one grid step; see `upsample` for the operands."""

    real: jax.Array
    x: jax.Array
    left: jax.Array
    right: jax.Array
    weight: jax.Array
    bias: jax.Array
    out: jax.Array
    sums: jax.Array
    ring: jax.Array  # [3, F', H, C]: three columns of the stored frames
    products: jax.Array  # float32 [H + 2 BORDER, 4 C']


def _kernel(*all_refs: jax.Array, interpret: Interpret) -> None:
    """Runs one grid step: reads a column; doubles and convolves the previous one."""
    refs = _Refs(*all_refs)
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
        refs.ring[newest] = refs.x[0, :, 0] * (step < refs.real[0]).astype(refs.x.dtype)

    @pl.when(step == columns)
    def _():
        refs.ring[newest] = refs.right[0, :, 0]

    @pl.when(step > 0)
    def _():
        _convolve_column(refs, step, newest, interpret)


def _convolve_column(refs: _Refs, step: jax.Array, newest: jax.Array, interpret: Interpret) -> None:
    """Writes the two columns made from column `step - 1`, and updates the sums."""
    stored, height = refs.x.shape[1], refs.x.shape[3]
    frames, out_channels = refs.out.shape[1], refs.bias.shape[1]
    slots = (lax.rem(step + 2, 3), lax.rem(step, 3), newest)
    real = (step - 1 < refs.real[0]).astype(jnp.float32)

    def convolve(t, _):
        if frames == stored:
            shown, times = [t], 1.0
        else:
            last = 2 * t + 1 - stored % 2
            shown = [jnp.maximum(last - 1, 0), last]
            times = jnp.where(last == 0, 1.0, 2.0)
        for side in range(2):  # the doubled column on the left, then on the right
            taps = [refs.ring[slots[side], t], refs.ring[slots[side + 1], t]]
            taps = jnp.concatenate(taps, axis=-1)
            refs.products[BORDER : BORDER + height] = dot(taps, refs.weight[side])

            def tap(index, shift):
                rows = pl.ds(BORDER + shift, height)
                return refs.products[rows, index * out_channels : (index + 1) * out_channels]

            even = refs.bias[...] + tap(0, -1) + tap(1, 0)
            odd = refs.bias[...] + tap(2, 0) + tap(3, 1)
            both = interleave_rows(even, odd, refs.out.dtype, interpret)
            for frame in shown:
                refs.out[0, frame, side] = both
            count = real * times
            for value in (even, odd):
                refs.sums[0, 0:1] += count * value.sum(axis=0, keepdims=True)
                refs.sums[0, 1:2] += count * jnp.square(value).sum(axis=0, keepdims=True)
        return 0

    lax.fori_loop(0, stored, convolve, 0)


def upsample(
    x: jax.Array,
    left: jax.Array,
    right: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    real_columns: jax.Array,
    frames: int,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """Doubles the frames' size (nearest), convolves 3x3, and optionally doubles their number.

    Args:
        x: [B, F', W, H, C].
        left, right: the neighbours' border columns [B, F', 1, H, C], zero outside the frame.
        weight: [2, 2 C, 4 C']; see `cogvideox.vae.weights.arrange`.
        bias: [C'].
        real_columns: int32 scalar; columns from this index on are padding and read as zeros.
        frames: F, one of F', 2 F', or 2 F' - 1, which does not double the first frame.
        interpret: see `Interpret`.

    Returns:
        [B, F, 2 W, 2 H, C'] and the sums of `causal_conv`.
    """
    batch, stored, columns, height, channels = x.shape
    out_channels = bias.shape[0]
    border_column = pl.BlockSpec((1, stored, 1, height, channels), lambda b, step: (b, 0, 0, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, interpret=interpret),
        name="upsample",
        grid=(batch, columns + 1),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(
                (1, stored, 1, height, channels),
                lambda b, step: (b, 0, jnp.minimum(step, columns - 1), 0, 0),
            ),
            border_column,
            border_column,
            pl.BlockSpec(weight.shape, lambda b, step: (0, 0, 0)),
            pl.BlockSpec((1, out_channels), lambda b, step: (0, 0)),
        ],
        out_specs=[
            pl.BlockSpec(
                (1, frames, 2, 2 * height, out_channels),
                lambda b, step: (b, 0, jnp.maximum(step - 1, 0), 0, 0),
            ),
            pl.BlockSpec((1, 2, out_channels), lambda b, step: (b, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, frames, 2 * columns, 2 * height, out_channels), x.dtype),
            jax.ShapeDtypeStruct((batch, 2, out_channels), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((3, stored, height, channels), x.dtype),
            pltpu.VMEM((height + 2 * BORDER, 4 * out_channels), jnp.float32),
        ],
        compiler_params=compiler_params(),
        interpret=interpret,
    )(
        real_columns[None],
        x,
        left,
        right,
        weight,
        bias.astype(jnp.float32)[None],
    )
