"""Doubling and halving of frames by XLA's convolutions.

See `cogvideox.vae.sharding` for the axis letters.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cogvideox.vae.layers import ConvWeights, DownsampleWeights, Features
from cogvideox.vae.norm import channel_sums, precision
from cogvideox.vae.sharding import WidthShards, edges


def conv_2d(x: jax.Array, kernel: jax.Array, shards: WidthShards) -> jax.Array:
    """Convolves [B, W (+ 2 if the width is split), H, C] with [KW, KH, C, C'].

    Returns:
        [B, W, H, C'] for 3x3 kernels, [B, W + 1, H + 1, C'] for 2x2.
    """
    pad_width = 1 if shards.count == 1 else 0
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((pad_width, pad_width), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
    )


def _phase_kernel(conv: ConvWeights) -> jax.Array:
    """Rearranges [2 (side), 2 (columns) C, 2 (parity) 2 (rows) C'] to [2, 2, C, 2 2 C'].

    The 2x2 convolution computes the four phases around the corner of four pixels: the right half of
    the left pixels and the left half of the right ones. So sides and parities are reversed.
    """
    channels, out_channels = conv.weight.shape[1] // 2, conv.bias.shape[0]
    kernel = conv.weight.reshape(2, 2, channels, 2, 2, out_channels)[::-1, :, :, ::-1]
    return kernel.transpose(1, 4, 2, 0, 3, 5).reshape(2, 2, channels, 4 * out_channels)


def upsample_frame(x: jax.Array, conv: ConvWeights, shards: WidthShards) -> jax.Array:
    """Doubles [B, W (+ 2 if the width is split), H, C] by nearest, then convolves with 3x3.

    Source: CogVideoXUpsample3D. One 2x2 convolution for each of the four phases of the doubled
    frame needs only 16/36 of the products.

    Returns:
        [B, 2 W + 2, 2 H, C'], with a column from each side.
    """
    b = x.shape[0]
    out = lax.optimization_barrier(conv_2d(x, _phase_kernel(conv), shards))
    columns, rows, channels = *out.shape[1:3], conv.bias.shape[0]
    # Outputs are at the corners of pixels: one more column and one more row than pixels.
    out = out.reshape(b, columns, rows, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(b, 2 * columns, 2 * rows, channels)
    return out[:, :, 1:-1] + conv.bias


def downsample_frames(
    x: jax.Array, right: jax.Array | None, weights: DownsampleWeights, shards: WidthShards
) -> jax.Array:
    """Halves frames [B, F, W, H, C] in space, and pairs of them in time; see `Layers.downsample`.

    Args:
        right: the column right of the frames, [B, F, 1, H, C]; None if the width is not split.

    Returns:
        [B, F', W / 2, H / 2, C'].
    """
    x = shards.keep_real(x, axis=2)
    if right is not None:
        x = jnp.concatenate([x, right], axis=2)
    if weights.compress_time and x.shape[1] > 1:
        x, first = x[:, x.shape[1] % 2 :], x[:, : x.shape[1] % 2]
        pairs = (x[:, ::2].astype(jnp.float32) + x[:, 1::2].astype(jnp.float32)) / 2
        x = jnp.concatenate([first, pairs.astype(x.dtype)], axis=1)
    b, frames, *size = x.shape
    y = lax.conv_general_dilated(
        x.reshape(b * frames, *size),
        weights.conv.weight,
        window_strides=(2, 2),
        padding=((0, 1 if right is None else 0), (0, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
    )
    y = (y.astype(jnp.float32) + weights.conv.bias).astype(x.dtype)
    return y.reshape(b, frames, *y.shape[1:])


def downsample(x: jax.Array, weights: DownsampleWeights, shards: WidthShards) -> Features:
    """Halves [B, F, W, H, C] frame by frame; see `cogvideox.vae.layers.Layers.downsample`."""
    b, frames, columns, rows, _ = x.shape
    right = None if shards.count == 1 else shards.neighbours(edges(x), columns)[1]
    # Frame 0 of an odd number is kept, and is then the average of itself twice.
    pairs = weights.compress_time and frames > 1
    odd = frames % 2

    def step(t: jax.Array, out: jax.Array) -> jax.Array:
        chosen = [jnp.maximum(2 * t - odd, 0), 2 * t + 1 - odd] if pairs else [t]

        def read(video: jax.Array) -> jax.Array:
            return jnp.concatenate(
                [lax.dynamic_slice_in_dim(video, at, 1, axis=1) for at in chosen], axis=1
            )

        beside = None if right is None else read(right)
        y = downsample_frames(read(x), beside, weights, shards)
        return lax.dynamic_update_slice_in_dim(out, y, t, axis=1)

    shape = (b, weights.frames(frames), columns // 2, rows // 2, weights.conv.bias.shape[0])
    out = jnp.full(shape, x[0, 0, 0, 0, 0])  # see `_causal_conv`
    out = lax.fori_loop(0, shape[1], step, out)
    return Features(out, channel_sums(out, shards))
