"""The VAE's norms, and small functions shared by both implementations of the layers.

Source: diffusers.models.autoencoders.autoencoder_kl_cogvideox, reordered; results differ only by
rounding. See `cogvideox.vae.sharding` for the axis letters.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cogvideox.vae.layers import ConvWeights, NormWeights
from cogvideox.vae.sharding import WidthShards


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Returns the precision for products; TPUs and GPUs round float32 operands by default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def pointwise(x: jax.Array, conv: ConvWeights) -> jax.Array:
    """Applies a 1x1x1 convolution: [..., C] -> [..., C']."""
    return jnp.einsum("...i,io->...o", x, conv.weight, precision=precision(x.dtype)) + conv.bias


def frame_repeat(latent_frames: int, frames: int) -> tuple[int, int]:
    """Returns (repeat, offset): frame t uses latent frame (t + offset) // repeat, the nearest.

    Source: CogVideoXSpatialNorm3D.forward, which does not repeat the first of an odd number.
    """
    if latent_frames == 1:
        return frames, 0
    if frames > 1 and frames % 2 == 1:
        repeat = (frames - 1) // (latent_frames - 1)
        return repeat, repeat - 1
    return frames // latent_frames, 0


def channel_sums(x: jax.Array, shards: WidthShards) -> jax.Array:
    """Returns the sum and sum of squares of [B, F, W, H, C] as in `Features`: float32 [B, 2, C]."""
    x = shards.keep_real(x.astype(jnp.float32), axis=2)
    return jnp.stack([x.sum(axis=(1, 2, 3)), jnp.square(x).sum(axis=(1, 2, 3))], axis=1)


def modulation(
    sums: jax.Array,
    shape: tuple[int, ...],
    z: jax.Array | None,
    norm: NormWeights,
    groups: int,
    shards: WidthShards,
) -> tuple[jax.Array, jax.Array]:
    """Computes the multiplier and the summand of a norm, of a spatial one at the latents' size.

    Source: CogVideoXSpatialNorm3D, which interpolates the latents to the size of the input and then
    convolves them. A 1x1x1 convolution and nearest interpolation commute. So here only one
    multiplication and one addition run at full size; the rest has up to 256 times fewer voxels. The
    group statistics take one pass, in float32, over all devices.

    Args:
        sums: sums of the input; see `Features`.
        shape: shape of the input on this device, [B, F, W s, H s, C].
        z: latents [B, T, W, H', Z]; None for a group norm.
        norm: the norm's weights.
        groups: number of channel groups.
        shards: split of the width.

    Returns:
        Multiplier and summand, float32 [B, T, W, H', C]; of a group norm [B, 1, 1, 1, C].
    """
    b, frames, columns, rows, channels = shape
    size = channels // groups
    real_width = shards.width * (columns // shards.local_width)
    sums = lax.psum(sums, shards.axis).reshape(b, 2, groups, size).sum(axis=3)
    moments = sums / (frames * real_width * rows * size)
    mean, mean_square = moments[:, 0], moments[:, 1]
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)  # rounding can make it negative
    gain = jnp.repeat(lax.rsqrt(variance + norm.eps), size, axis=1) * norm.scale
    shift = norm.bias - jnp.repeat(mean, size, axis=1) * gain  # both float32 [B, C]

    if z is None or norm.multiplier is None or norm.summand is None:
        return gain[:, None, None, None], shift[:, None, None, None]
    multiplier = pointwise(z, norm.multiplier).astype(jnp.float32)
    summand = pointwise(z, norm.summand).astype(jnp.float32)
    gain, shift = (v[:, None, None, None] for v in (gain, shift))
    return gain * multiplier, shift * multiplier + summand


def activate(x: jax.Array, multiplier: jax.Array, summand: jax.Array) -> jax.Array:
    """Returns silu(x * multiplier + summand) of a frame [B, W s, H s, C].

    Args:
        x: the frame.
        multiplier, summand: float32 [B, W, H, C]; see `modulation`.
    """
    b, columns, rows, channels = x.shape
    width, height = multiplier.shape[1:3]
    blocks = x.reshape(b, width, columns // width, height, rows // height, channels)
    multiplier, summand = (v[:, :, None, :, None] for v in (multiplier, summand))
    blocks = jax.nn.silu(blocks.astype(jnp.float32) * multiplier + summand)
    return blocks.astype(x.dtype).reshape(x.shape)
