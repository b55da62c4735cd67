"""What a CogVideoX decoder computes, as pure functions on one device's columns of the video.

Every function here runs inside `jax.shard_map` over one mesh axis that splits the width. Arrays are
channels-last with the width before the height, [B, T, W, H, C]: the columns that a convolution
borrows from its neighbours are then whole contiguous slabs, and the height, which no mesh splits, is
the innermost spatial axis.

A width that the devices do not divide is padded on the right to equal shards. Padded columns may
hold any finite value between operations; each operation that looks at more than its own column
(convolutions, group statistics) takes them out itself.

The algorithms are those of `diffusers.models.autoencoders.autoencoder_kl_cogvideox`, reordered where
the result is the same but for rounding.

Axis letters: B batch, T latent frames, F frames, W H width and height, C channels, K kernel size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

NORM_EPS = 1e-6  # CogVideoXSpatialNorm3D fixes it; the config's norm_eps never reaches the decoder


@dataclasses.dataclass(frozen=True)
class WidthShards:
    """How the columns of the latents are split over a mesh axis.

    Attributes:
        axis: name of the mesh axis inside `jax.shard_map`.
        count: devices on that axis.
        width: real columns of the latents, over all devices.
    """

    axis: str
    count: int
    width: int

    @property
    def local_width(self) -> int:
        """Latent columns on each device, padding included."""
        return -(-self.width // self.count)

    @property
    def padded_width(self) -> int:
        """Latent columns over all devices, padding included."""
        return self.local_width * self.count

    def real_columns(self, columns: int) -> jax.Array | None:
        """Which of this device's `columns` (a multiple of `local_width`) are real: bool [W].

        None where no device has a padded column, so that the mask costs nothing.
        """
        if self.padded_width == self.width:
            return None
        scale = columns // self.local_width
        first = lax.axis_index(self.axis) * columns
        return first + jnp.arange(columns) < self.width * scale

    def keep_real(self, x: jax.Array) -> jax.Array:
        """[B, T, W, H, C] with its padded columns set to zero."""
        real = self.real_columns(x.shape[2])
        return x if real is None else jnp.where(real[:, None, None], x, 0)

    def with_neighbours(self, x: jax.Array) -> jax.Array:
        """[B, T, W, H, C] -> [B, T, W + 2, H, C]: one column from each side, zero at the borders."""
        x = self.keep_real(x)
        to_right = [(i, i + 1) for i in range(self.count - 1)]
        to_left = [(i + 1, i) for i in range(self.count - 1)]
        left = lax.ppermute(x[:, :, -1:], self.axis, to_right)
        right = lax.ppermute(x[:, :, :1], self.axis, to_left)
        return jnp.concatenate([left, x, right], axis=2)


def _precision(dtype: jnp.dtype) -> lax.Precision:
    # TPUs multiply float32 in bfloat16 passes unless told otherwise.
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def pointwise(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """A 1x1x1 convolution: [..., C] by [C, C'] plus [C'] -> [..., C']."""
    return jnp.einsum("...i,io->...o", x, kernel, precision=_precision(x.dtype)) + bias


def _conv_2d(x: jax.Array, kernel: jax.Array, pad_height: int) -> jax.Array:
    """[B, T, W, H, C] by [KW, KH, C, C'], frame by frame, without borders in W."""
    b, t = x.shape[:2]
    out = lax.conv_general_dilated(
        x.reshape(b * t, *x.shape[2:]),
        kernel,
        window_strides=(1, 1),
        padding=((0, 0), (pad_height, pad_height)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(x.dtype),
    )
    return out.reshape(b, t, *out.shape[1:])


def causal_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    cache: jax.Array | None,
    shards: WidthShards,
) -> tuple[jax.Array, jax.Array]:
    """A 3x3x3 convolution that sees only the present and the two frames before it.

    Source: CogVideoXCausalConv3d with pad_mode "first".

    Args:
        x: [B, F, W, H, C].
        kernel: [3, 3, 3, C, C'] over frames, width and height.
        bias: [C'].
        cache: the two frames before `x` with their neighbour columns, [B, 2, W + 2, H, C]; None at
            the start of a video, where the first frame stands in for both.
        shards: how the width is split.

    Returns:
        [B, F, W, H, C'] and the cache for the next frames.
    """
    frames = x.shape[1]
    x = shards.with_neighbours(x)
    if cache is None:
        cache = jnp.repeat(x[:, :1], 2, axis=1)
    x = jnp.concatenate([cache, x], axis=1)
    # Three 2-D convolutions on shifted frames: XLA's 3-D convolutions are slower on TPU
    # (13.2M against 9.2M cycles for 128 channels at full size, compiler estimate).
    out = sum(_conv_2d(x[:, k : k + frames], kernel[k], pad_height=1) for k in range(3))
    return out + bias, x[:, -2:]


def _frame_repeats(latent_frames: int, frames: int) -> tuple[int, int]:
    """How often nearest interpolation shows the first latent frame, and each of the others.

    Source: CogVideoXSpatialNorm3D.forward: an odd number of frames keeps its first one single.
    """
    if frames > 1 and frames % 2 == 1:
        return 1, (frames - 1) // (latent_frames - 1)
    return frames // latent_frames, frames // latent_frames


def _repeat_frames(z: jax.Array, frames: int) -> jax.Array:
    """[B, T, ...] -> [B, F, ...], nearest in time."""
    first, rest = _frame_repeats(z.shape[1], frames)
    if first == rest:
        return jnp.repeat(z, rest, axis=1)
    return jnp.concatenate([z[:, :1], jnp.repeat(z[:, 1:], rest, axis=1)], axis=1)


def group_moments(x: jax.Array, groups: int, shards: WidthShards) -> tuple[jax.Array, jax.Array]:
    """Mean and reciprocal deviation of each channel's group over frames, width and height.

    One pass in float32, over the real columns of every device.

    Args:
        x: [B, F, W, H, C].
        groups: number of channel groups.
        shards: how the width is split.

    Returns:
        Two float32 arrays [B, C], equal within a group.
    """
    b, frames, columns, height, channels = x.shape
    x = shards.keep_real(x.astype(jnp.float32))
    sums = jnp.stack([x.sum(axis=(1, 2, 3)), jnp.square(x).sum(axis=(1, 2, 3))])
    sums = lax.psum(sums, shards.axis).reshape(2, b, groups, channels // groups).sum(axis=3)
    scale = columns // shards.local_width
    count = frames * shards.width * scale * height * (channels // groups)
    mean, mean_square = sums / count
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)  # rounding can take it below zero
    reciprocal = lax.rsqrt(variance + NORM_EPS)
    return tuple(jnp.repeat(m, channels // groups, axis=1) for m in (mean, reciprocal))


def spatial_norm(
    x: jax.Array,
    z: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array,
    kernel_y: jax.Array,
    bias_y: jax.Array,
    kernel_b: jax.Array,
    bias_b: jax.Array,
    groups: int,
    shards: WidthShards,
) -> jax.Array:
    """Group normalisation whose scale and shift come from the latents.

    Source: CogVideoXSpatialNorm3D. There the latents are interpolated to the size of `x` and then
    convolved; a 1x1x1 convolution and nearest interpolation commute, so here everything but one
    multiply and one add happens at the size of the latents (up to 256 times fewer voxels).

    Args:
        x: [B, F, W s, H s, C] for some spatial scale s.
        z: latents [B, T, W, H, Z].
        norm_scale, norm_bias: [C] of the group normalisation.
        kernel_y, bias_y: [Z, C] and [C], the multiplier's convolution.
        kernel_b, bias_b: the same for the summand.
        groups: number of channel groups.
        shards: how the width is split.

    Returns:
        float of the dtype and shape of `x`.
    """
    b, frames, columns, rows, channels = x.shape
    mean, reciprocal = group_moments(x, groups, shards)
    gain = reciprocal * norm_scale  # [B, C], float32
    shift = norm_bias - mean * gain
    y = pointwise(z, kernel_y, bias_y).astype(jnp.float32)
    summand = pointwise(z, kernel_b, bias_b).astype(jnp.float32)
    over_voxels = (slice(None), None, None, None, slice(None))
    multiplier = _repeat_frames(gain[over_voxels] * y, frames)
    summand = _repeat_frames(shift[over_voxels] * y + summand, frames)

    scale = columns // z.shape[2]
    x_blocks = x.reshape(b, frames, z.shape[2], scale, z.shape[3], scale, channels)
    each_latent = (slice(None), slice(None), slice(None), None, slice(None), None)
    out = x_blocks.astype(jnp.float32) * multiplier[each_latent] + summand[each_latent]
    return out.astype(x.dtype).reshape(x.shape)


def _phase_kernel(kernel: jax.Array) -> jax.Array:
    """[3, 3, C, C'] -> [2, 2, C, 4 C']: nearest doubling and then `kernel`, on undoubled pixels.

    Along one axis, the doubled pixels 2p-1 and 2p both read only pixels p-1 and p: the first with
    weights (k0 + k1, k2), the second with (k0, k1 + k2).
    """
    k = kernel.astype(jnp.float32)

    def phases(k: jax.Array, axis: int) -> jax.Array:
        k0, k1, k2 = jnp.split(k, 3, axis=axis)
        odd = jnp.concatenate([k0 + k1, k2], axis=axis)
        even = jnp.concatenate([k0, k1 + k2], axis=axis)
        return jnp.stack([odd, even], axis=3)  # before C'

    # [3, 3, C, C'] -> [2, 3, C, pw, C'] -> [2, 2, C, ph, pw, C'] -> phases ordered (pw, ph)
    k = jnp.swapaxes(phases(phases(k, 0), 1), 3, 4)
    return k.reshape(2, 2, k.shape[2], -1).astype(kernel.dtype)


def upsample(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    compress_time: bool,
    shards: WidthShards,
) -> jax.Array:
    """Nearest doubling in space, a 3x3 convolution, and where asked nearest doubling in time.

    Source: CogVideoXUpsample3D, which doubles before it convolves. In space that is 16/36 of the
    work as 2x2 convolutions, one for each of the four phases; in time the frames are convolved one
    by one, so doubling them afterwards halves the work again. An odd number of frames keeps its
    first one single.

    Args:
        x: [B, F, W, H, C].
        kernel: [3, 3, C, C'] over width and height.
        bias: [C'].
        compress_time: whether frames are doubled too.
        shards: how the width is split.

    Returns:
        [B, F', 2 W, 2 H, C'].
    """
    b, frames, columns, rows, _ = x.shape
    x = shards.with_neighbours(x)
    out = _conv_2d(x, _phase_kernel(kernel), pad_height=1)  # [B, F, W + 1, H + 1, 4 C']
    out = out.reshape(b, frames, columns + 1, rows + 1, 2, 2, -1).transpose(0, 1, 2, 4, 3, 5, 6)
    out = out.reshape(b, frames, 2 * columns + 2, 2 * rows + 2, -1)
    # The outermost ones belong to pixels -1 and 2 W of the doubled picture.
    out = out[:, :, 1:-1, 1:-1] + bias
    if not compress_time or frames == 1:
        return out
    return _repeat_frames(out, 2 * frames - frames % 2)
