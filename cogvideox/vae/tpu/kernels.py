"""The decoder's convolutions as Pallas TPU kernels, with the norm before them.

XLA spends more on moving a full-size activation into the layout of its convolutions than on the
convolution: 9.5M cycles for 128 -> 128 channels on 8 frames of 768 x 176, of which 5.4M convolve,
and 4 to 16 s of compilation each. These kernels read every activation once and write the result
once, in their natural order: 3.6M cycles, norm, activation and group sums included (compiler
estimates for v6e).

How they work. The grid walks over the columns of one device. `causal_conv` brings one column of
every frame into a ring of three columns in VMEM, normalised and activated, behind the two frames
of the cache, and then convolves the column before it. For a frame, the nine (frame, column) taps
lie side by side along the contraction axis and the three row taps along the output axis, so one
matrix product [H, 9 C] x [9 C, 3 C'] does all 27 taps; the row taps are then added with a shift of
one row, cheap in float32 and awkward in packed bfloat16 inputs. `upsample` does the same with the
four 2x2 convolutions that replace nearest doubling and a 3x3 one.

Weights come as the matrices that the products need (see `cogvideox.vae.layers.Conv`). Channels are
multiples of 128.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_PLANES = 8  # a float32 tile's rows: what `planar` results are padded to
_PAD = 8  # rows of zeros above and below the products: the picture's border
_VMEM_BYTES = 100 * 2**20  # of 128 MiB on v6e; the largest layer of the published VAE needs 60


def _precision(dtype: jnp.dtype) -> lax.Precision:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(x, weight, preferred_element_type=jnp.float32, precision=_precision(x.dtype))


def _clear_border(products: Any, height: int) -> None:
    border = jnp.zeros((_PAD, products.shape[1]), jnp.float32)
    products[:_PAD] = border
    products[_PAD + height :] = border


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a kernel's body has to know before it runs."""

    repeat: int
    offset: int
    modulated: bool
    cached: bool
    residual: bool
    shortcut: bool
    planar: bool


def _causal_conv_kernel(real_ref, x_ref, left_ref, right_ref, weight_ref, bias_ref, *refs, call):
    """One step; see `causal_conv` for the operands."""
    refs = list(refs)
    cache_ref = refs.pop(0) if call.cached else None
    multiplier_ref, summand_ref = (refs.pop(0), refs.pop(0)) if call.modulated else (None, None)
    residual_ref = refs.pop(0) if call.residual else None
    shortcut_ref = refs.pop(0) if call.shortcut else None
    out_ref, new_cache_ref, sums_ref, ring, products = refs
    step = pl.program_id(1)
    columns = pl.num_programs(1) - 1
    frames, height = x_ref.shape[1], x_ref.shape[3]
    out_channels = bias_ref.shape[1]
    newest = lax.rem(step + 1, 3)  # column c lives in slot (c + 1) % 3

    @pl.when(step == 0)
    def _():
        ring[0] = left_ref[0, :, 0]
        sums_ref[...] = jnp.zeros_like(sums_ref)
        _clear_border(products, height)

    @pl.when(step < columns)
    def _():
        real = (step < real_ref[0]).astype(jnp.float32)

        def activate(t, _):
            value = x_ref[0, t, 0].astype(jnp.float32)
            if call.modulated:
                latent = (t + call.offset) // call.repeat
                value = value * multiplier_ref[0, latent, 0] + summand_ref[0, latent, 0]
                value = value * jax.nn.sigmoid(value)
            ring[newest, t + 2] = (value * real).astype(ring.dtype)
            return 0

        lax.fori_loop(0, frames, activate, 0)
        for t in range(2):
            ring[newest, t] = ring[newest, 2] if cache_ref is None else cache_ref[0, t, 0]
        for t in range(2):
            new_cache_ref[0, t, 0] = ring[newest, frames + t]

    @pl.when(step == columns)
    def _():
        ring[newest] = right_ref[0, :, 0]

    @pl.when(step > 0)
    def _():
        slots = (lax.rem(step + 2, 3), lax.rem(step, 3), newest)
        real = (step - 1 < real_ref[0]).astype(jnp.float32)

        def convolve(t, _):
            taps = [ring[slot, t + k] for k in range(3) for slot in slots]
            taps = jnp.concatenate(taps, axis=-1)
            products[_PAD : _PAD + height] = _dot(taps, weight_ref[...])
            out = bias_ref[...]
            for k in range(3):
                rows = pl.ds(_PAD - 1 + k, height)
                out = out + products[rows, k * out_channels : (k + 1) * out_channels]
            if shortcut_ref is not None:
                out = out + _dot(residual_ref[0, t, 0], shortcut_ref[...])
            elif residual_ref is not None:
                out = out + residual_ref[0, t, 0].astype(jnp.float32)
            if call.planar:
                out_ref[0, t, 0] = out.T[:_PLANES]
                return 0
            out_ref[0, t, 0] = out.astype(out_ref.dtype)
            out = out * real
            sums_ref[0, 0:1] += out.sum(axis=0, keepdims=True)
            sums_ref[0, 1:2] += jnp.square(out).sum(axis=0, keepdims=True)
            return 0

        lax.fori_loop(0, frames, convolve, 0)


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A causal 3x3x3 convolution with what surrounds it, on one device's columns.

    conv(silu(x * multiplier + summand)) + bias + residual (x shortcut), or conv(x) + ... without
    `modulation`.

    Args:
        x: [B, F, W, H, C].
        cache: the two activated frames before `x`, [B, 2, W, H, C]; its buffer is reused for the
            new cache. None at the start of a video, where the first frame stands in for both.
        left, right: the neighbours' activated border columns, the two frames before first, zero
            beyond the picture: [B, F + 2, 1, H, C].
        weight: [9 C, 3 C'], rows by (frame, column, channel), columns by (row, channel).
        bias: [C'].
        real_columns: int32 scalar; columns from there on are padding, read as zeros.
        modulation: multiplier and summand, float32 [B, T, W / s, H, C], each of whose columns
            serves s columns of `x`; frame t takes latent frame (t + offset) // repeat.
        residual: [B, F, W, H, C'], or [B, F, W, H, R] with a `shortcut` [R, C'].
        planar: give [B, F, W, 8, H] float32, the first 8 channels as planes, and no sums.
        interpret: run on any backend, slowly.

    Returns:
        [B, F, W, H, C'], the new cache, and float32 [B, 2, C']: sum and sum of squares of the
        result over frames, real columns and rows.
    """
    batch, frames, columns, height, channels = x.shape
    out_channels = bias.shape[0]
    call = _Call(
        repeat,
        offset,
        modulated=modulation is not None,
        cached=cache is not None,
        residual=residual is not None,
        shortcut=shortcut is not None,
        planar=planar,
    )

    def reading(b, step):  # the column that a step brings in
        return b, 0, jnp.minimum(step, columns - 1), 0, 0

    def writing(b, step):  # the column that it convolves
        return b, 0, jnp.maximum(step - 1, 0), 0, 0

    def per_video(b, step):
        return b, 0, 0, 0, 0

    def whole(array):
        return pl.BlockSpec(array.shape, lambda b, step: (0,) * array.ndim)

    cache_column = pl.BlockSpec((1, 2, 1, height, channels), reading)
    border_column = pl.BlockSpec((1, frames + 2, 1, height, channels), per_video)
    bias = bias.astype(jnp.float32)[None]
    operands = [
        (real_columns[None], pl.BlockSpec(memory_space=pltpu.SMEM)),
        (x, pl.BlockSpec((1, frames, 1, height, channels), reading)),
        (left, border_column),
        (right, border_column),
        (weight, whole(weight)),
        (bias, whole(bias)),
    ]
    aliases = {}
    if cache is not None:
        aliases = {len(operands): 1}
        operands.append((cache, cache_column))
    if modulation is not None:
        latent_frames, latent_columns = modulation[0].shape[1:3]
        scale = columns // latent_columns

        def reading_latent(b, step):
            return b, 0, jnp.minimum(step, columns - 1) // scale, 0, 0

        latent_column = pl.BlockSpec((1, latent_frames, 1, height, channels), reading_latent)
        operands += [(array, latent_column) for array in modulation]
    if residual is not None:
        block = (1, frames, 1, height, residual.shape[-1])
        operands.append((residual, pl.BlockSpec(block, writing)))
    if shortcut is not None:
        operands.append((shortcut, whole(shortcut)))
    if planar:
        out = jax.ShapeDtypeStruct((batch, frames, columns, _PLANES, height), jnp.float32)
    else:
        out = jax.ShapeDtypeStruct((*x.shape[:4], out_channels), x.dtype)
    arrays, in_specs = zip(*operands, strict=True)
    return pl.pallas_call(
        functools.partial(_causal_conv_kernel, call=call),
        name="causal_conv",
        grid=(batch, columns + 1),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, frames, 1, *out.shape[3:]), writing),
            cache_column,
            pl.BlockSpec((1, 2, out_channels), lambda b, step: (b, 0, 0)),
        ],
        out_shape=[
            out,
            jax.ShapeDtypeStruct((batch, 2, columns, height, channels), x.dtype),
            jax.ShapeDtypeStruct((batch, 2, out_channels), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((3, frames + 2, height, channels), x.dtype),
            pltpu.VMEM((height + 2 * _PAD, 3 * out_channels), jnp.float32),
        ],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
    )(*arrays)


def _interleave_rows(even: jax.Array, odd: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Two float32 [H, C] -> [2 H, C] with rows even[0], odd[0], even[1], ..."""
    if dtype == jnp.bfloat16:  # two bfloat16 rows share a 32-bit word
        return pltpu.bitcast(pltpu.pack_elementwise([even, odd], packed_dtype=dtype), dtype)
    return jnp.stack([even, odd], axis=1).reshape(-1, even.shape[1]).astype(dtype)


def _upsample_kernel(
    real_ref, x_ref, left_ref, right_ref, weight_ref, bias_ref, out_ref, sums_ref, ring, products
):
    """One step; see `upsample` for the operands."""
    step = pl.program_id(1)
    columns = pl.num_programs(1) - 1
    stored, height = x_ref.shape[1], x_ref.shape[3]
    frames = out_ref.shape[1]
    out_channels = bias_ref.shape[1]
    newest = lax.rem(step + 1, 3)

    @pl.when(step == 0)
    def _():
        ring[0] = left_ref[0, :, 0]
        sums_ref[...] = jnp.zeros_like(sums_ref)
        _clear_border(products, height)

    @pl.when(step < columns)
    def _():
        ring[newest] = x_ref[0, :, 0] * (step < real_ref[0]).astype(x_ref.dtype)

    @pl.when(step == columns)
    def _():
        ring[newest] = right_ref[0, :, 0]

    @pl.when(step > 0)
    def _():
        slots = (lax.rem(step + 2, 3), lax.rem(step, 3), newest)
        real = (step - 1 < real_ref[0]).astype(jnp.float32)

        def convolve(t, _):
            if frames == stored:
                shown, times = [t], 1.0
            else:
                last = 2 * t + 1 - stored % 2
                shown = [jnp.maximum(last - 1, 0), last]
                times = jnp.where(last == 0, 1.0, 2.0)
            for side in range(2):  # the doubled column on the left, then on the right
                taps = jnp.concatenate([ring[slots[side], t], ring[slots[side + 1], t]], axis=-1)
                products[_PAD : _PAD + height] = _dot(taps, weight_ref[side])

                def tap(index, shift):
                    rows = pl.ds(_PAD + shift, height)
                    return products[rows, index * out_channels : (index + 1) * out_channels]

                even = bias_ref[...] + tap(0, -1) + tap(1, 0)
                odd = bias_ref[...] + tap(2, 0) + tap(3, 1)
                both = _interleave_rows(even, odd, out_ref.dtype)
                for frame in shown:
                    out_ref[0, frame, side] = both
                count = real * times
                for value in (even, odd):
                    sums_ref[0, 0:1] += count * value.sum(axis=0, keepdims=True)
                    sums_ref[0, 1:2] += count * jnp.square(value).sum(axis=0, keepdims=True)
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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Nearest doubling of the picture, a 3x3 convolution, and doubling of the frames if asked.

    Args:
        x: [B, F', W, H, C].
        left, right: the neighbours' border columns, zero beyond the picture: [B, F', 1, H, C].
        weight: [2, 2 C, 4 C']; see `cogvideox.vae.layers.Upsample`.
        bias: [C'].
        real_columns: int32 scalar; columns from there on are padding, read as zeros.
        frames: F, either F' or 2 F' or, with the first frame single, 2 F' - 1.
        interpret: run on any backend, slowly.

    Returns:
        [B, F, 2 W, 2 H, C'] and the sums of `causal_conv`.
    """
    batch, stored, columns, height, channels = x.shape
    out_channels = bias.shape[0]
    border_column = pl.BlockSpec((1, stored, 1, height, channels), lambda b, step: (b, 0, 0, 0, 0))
    return pl.pallas_call(
        _upsample_kernel,
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
            pltpu.VMEM((height + 2 * _PAD, 4 * out_channels), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
    )(
        real_columns[None],
        x,
        left,
        right,
        weight,
        bias.astype(jnp.float32)[None],
    )
