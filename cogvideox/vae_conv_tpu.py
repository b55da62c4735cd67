"""Norm, SiLU and causal 3x3x3 convolution as one Pallas TPU kernel.

XLA spends more on moving a full-size activation into the layout of its convolutions than on the
convolution: 9.5M cycles for 128 -> 128 channels on 8 frames of 768 x 176, of which 5.4M convolve,
and 4 to 16 s of compilation each. This kernel reads every activation once and writes the result
once, in their natural order: 3.6M cycles, norm, activation and group sums included, 3 s of
compilation (all compiler estimates for v6e).

How it works. The grid walks over the columns of one device. A step normalises one column of every
frame into a ring of three columns in VMEM, whose first two frames come from the cache, and then
convolves the column before it. For a frame, the nine (frame, column) taps lie side by side along
the contraction axis, and the three row taps along the output axis, so one matrix product
[H, 9 C] x [9 C, 3 C'] does all 27 taps; the row taps are then added with a shift of one row, which
is cheap in float32 and awkward in packed bfloat16 inputs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_PAD = 8  # rows of zeros above and below the products: the picture's border
_VMEM_BYTES = 100 * 2**20  # of 128 MiB on v6e; the largest layer of the published VAE needs 50


def _kernel(
    real_ref,
    x_ref,
    multiplier_ref,
    summand_ref,
    cache_ref,
    left_ref,
    right_ref,
    weight_ref,
    bias_ref,
    *refs,
    shows: Sequence[int],
    has_cache: bool,
    has_residual: bool,
    precision: lax.Precision,
):
    """One step; see `norm_conv` for the operands. `shows[t]`: the latent frame under frame t."""
    refs = list(refs)
    residual_ref = refs.pop(0) if has_residual else None
    out_ref, new_cache_ref, sums_ref, ring, products = refs
    step = pl.program_id(1)
    columns = pl.num_programs(1) - 1
    frames, height, out_channels = out_ref.shape[1], out_ref.shape[3], out_ref.shape[4]
    newest = lax.rem(step + 1, 3)  # column c lives in slot (c + 1) % 3

    @pl.when(step == 0)
    def _():
        ring[0] = left_ref[0, :, 0]
        sums_ref[...] = jnp.zeros_like(sums_ref)
        border = jnp.zeros((_PAD, products.shape[1]), jnp.float32)
        products[:_PAD] = border
        products[_PAD + height :] = border

    @pl.when(step < columns)
    def _():
        real = (step < real_ref[0]).astype(jnp.float32)
        for t in range(frames):
            value = x_ref[0, t, 0].astype(jnp.float32)
            value = value * multiplier_ref[0, shows[t], 0] + summand_ref[0, shows[t], 0]
            ring[newest, t + 2] = (value * jax.nn.sigmoid(value) * real).astype(ring.dtype)
        for t in range(2):
            ring[newest, t] = cache_ref[0, t, 0] if has_cache else ring[newest, 2]
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
            products[_PAD : _PAD + height] = jnp.dot(
                jnp.concatenate(taps, axis=-1),
                weight_ref[...],
                preferred_element_type=jnp.float32,
                precision=precision,
            )
            out = bias_ref[...]
            for k in range(3):
                rows = pl.ds(_PAD - 1 + k, height)
                out = out + products[rows, k * out_channels : (k + 1) * out_channels]
            if residual_ref is not None:
                out = out + residual_ref[0, t, 0].astype(jnp.float32)
            out_ref[0, t, 0] = out.astype(out_ref.dtype)
            out = out * real
            sums_ref[0, 0:1] += out.sum(axis=0, keepdims=True)
            sums_ref[0, 1:2] += jnp.square(out).sum(axis=0, keepdims=True)
            return 0

        lax.fori_loop(0, frames, convolve, 0)


def norm_conv(
    x: jax.Array,
    multiplier: jax.Array,
    summand: jax.Array,
    cache: jax.Array | None,
    left: jax.Array,
    right: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    real_columns: jax.Array,
    shows: Sequence[int],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """conv(silu(x * multiplier + summand)) + bias + residual, on one device's columns.

    C and C' are multiples of 128.

    Args:
        x: [B, F, W, H, C].
        multiplier, summand: float32 [B, T, W / s, H, C], one column for s columns of `x`.
        cache: the two frames before `x`, activated, [B, 2, W, H, C]; its buffer is reused for the
            new cache. None at the start of a video.
        left, right: the neighbours' activated border columns, cached frames first, zero beyond the
            picture: [B, F + 2, 1, H, C].
        kernel: [3, 3, 3, C, C'] over frames, width and height.
        bias: [C'].
        residual: [B, F, W, H, C'] or None.
        real_columns: int32 [1]; columns from there on are padding, read as zeros.
        shows: for each of the F frames its latent frame in 0..T-1.
        interpret: run on any backend, slowly.

    Returns:
        [B, F, W, H, C'], the new cache, and float32 [B, 2, C']: sum and sum of squares of the
        result over frames, real columns and rows.
    """
    batch, frames, columns, height, channels = x.shape
    out_channels = kernel.shape[-1]
    latent_frames, latent_columns = multiplier.shape[1:3]
    scale = columns // latent_columns
    has_cache, has_residual = cache is not None, residual is not None
    if cache is None:  # an operand that the kernel does not read, for the same list of operands
        cache = jnp.zeros((batch, 2, columns, height, channels), x.dtype)
    # [dt, dw, dh, C, C'] -> [(dt dw C), (dh C')]
    weight = kernel.transpose(0, 1, 3, 2, 4).reshape(9 * channels, 3 * out_channels)

    def reading(b, step):  # the column that a step normalises
        return b, 0, jnp.minimum(step, columns - 1), 0, 0

    def reading_latent(b, step):
        return b, 0, jnp.minimum(step, columns - 1) // scale, 0, 0

    def writing(b, step):  # the column that it convolves
        return b, 0, jnp.maximum(step - 1, 0), 0, 0

    def per_batch(b, step):
        return b, 0, 0, 0, 0

    def whole(b, step):
        return 0, 0

    in_column = pl.BlockSpec((1, frames, 1, height, channels), reading)
    latent_column = pl.BlockSpec((1, latent_frames, 1, height, channels), reading_latent)
    cache_column = pl.BlockSpec((1, 2, 1, height, channels), reading)
    border_column = pl.BlockSpec((1, frames + 2, 1, height, channels), per_batch)
    out_column = pl.BlockSpec((1, frames, 1, height, out_channels), writing)
    operands = [
        (real_columns, pl.BlockSpec(memory_space=pltpu.SMEM)),
        (x, in_column),
        (multiplier, latent_column),
        (summand, latent_column),
        (cache, cache_column),
        (left, border_column),
        (right, border_column),
        (weight, pl.BlockSpec(weight.shape, whole)),
        (bias.astype(jnp.float32)[None], pl.BlockSpec((1, out_channels), whole)),
    ]
    if has_residual:
        operands.append((residual, out_column))
    arrays, in_specs = zip(*operands, strict=True)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            shows=tuple(shows),
            has_cache=has_cache,
            has_residual=has_residual,
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
        ),
        name="norm_conv",
        grid=(batch, columns + 1),
        in_specs=in_specs,
        out_specs=[
            out_column,
            cache_column,
            pl.BlockSpec((1, 2, out_channels), lambda b, step: (b, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*x.shape[:4], out_channels), x.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
            jax.ShapeDtypeStruct((batch, 2, out_channels), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((3, frames + 2, height, channels), x.dtype),
            pltpu.VMEM((height + 2 * _PAD, 3 * out_channels), jnp.float32),
        ],
        input_output_aliases={4: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
    )(*arrays)
