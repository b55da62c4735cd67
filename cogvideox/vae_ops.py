"""What a CogVideoX decoder computes, as pure functions on one device's columns of the video.

Every function here runs inside `jax.shard_map` over one mesh axis that splits the width. Arrays
are channels-last with the width before the height, [B, T, W, H, C]: the columns that a convolution
borrows from its neighbours are then whole contiguous slabs, and the height, which no mesh splits,
is the innermost spatial axis.

A width that the devices do not divide is padded on the right to equal shards. Padded columns may
hold any finite value between operations; each operation that looks at more than its own column
(convolutions, group statistics) takes them out itself.

The algorithms are those of `diffusers.models.autoencoders.autoencoder_kl_cogvideox`, reordered
where the result is the same but for rounding.

Axis letters: B batch, T latent frames, F frames, W H width and height, C channels, Z latent
channels, K kernel size, s pixels per latent.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cogvideox import vae_conv_tpu

NORM_EPS = 1e-6  # CogVideoXSpatialNorm3D fixes it; the config's norm_eps never reaches the decoder


class Conv(NamedTuple):
    """A convolution: kernel [K..., C, C'] with the width before the height, bias [C']."""

    kernel: jax.Array
    bias: jax.Array


class Norm(NamedTuple):
    """A spatial norm: scale and bias [C] of its group norm, and the 1x1x1 convolutions [Z, C]."""

    scale: jax.Array
    bias: jax.Array
    multiplier: Conv
    summand: Conv


class Resnet(NamedTuple):
    """A resnet block; `shortcut` is a 1x1x1 convolution where the channels change, else None."""

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None


class Upsample(NamedTuple):
    """A 3x3 convolution after nearest doubling in space and, if `compress_time`, in time."""

    conv: Conv
    compress_time: bool


@dataclasses.dataclass(frozen=True)
class WidthShards:
    """How the columns of the latents are split over a mesh axis.

    Attributes:
        axis: name of the mesh axis inside `jax.shard_map`.
        count: devices on that axis.
        width: real columns of the latents, over all devices.
        platform: "tpu", "gpu" or "cpu": what the devices are.
    """

    axis: str
    count: int
    width: int
    platform: str

    @property
    def local_width(self) -> int:
        """Latent columns on each device, padding included."""
        return -(-self.width // self.count)

    @property
    def padded_width(self) -> int:
        """Latent columns over all devices, padding included."""
        return self.local_width * self.count

    def real_columns(self, columns: int) -> jax.Array:
        """How many of this device's `columns`, a multiple of `local_width`, are real: int32."""
        scale = columns // self.local_width
        before = lax.axis_index(self.axis) * columns
        return jnp.clip(self.width * scale - before, 0, columns).astype(jnp.int32)

    def keep_real(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` with the padded columns along `axis` set to zero."""
        if self.padded_width == self.width:
            return x
        columns = x.shape[axis]
        real = jnp.arange(columns) < self.real_columns(columns)
        return jnp.where(real.reshape(-1, *(1,) * (x.ndim - axis - 1)), x, 0)

    def neighbours(self, first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The last columns of the left device and the first of the right one; zero at borders.

        Args:
            first, last: this device's own border columns, without padded ones.
        """
        to_right = [(i, i + 1) for i in range(self.count - 1)]
        to_left = [(i + 1, i) for i in range(self.count - 1)]
        return lax.ppermute(last, self.axis, to_right), lax.ppermute(first, self.axis, to_left)


def _precision(dtype: jnp.dtype) -> lax.Precision:
    # TPUs and GPUs multiply float32 with fewer bits unless told otherwise.
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def pointwise(x: jax.Array, conv: Conv) -> jax.Array:
    """A 1x1x1 convolution: [..., C] -> [..., C']."""
    return jnp.einsum("...i,io->...o", x, conv.kernel, precision=_precision(x.dtype)) + conv.bias


def _conv_2d(x: jax.Array, kernel: jax.Array, shards: WidthShards) -> jax.Array:
    """Frames [N, W, H, C] by [KW, KH, C, C'], reading one column and row around the picture.

    [N, W, H, C'] for 3x3 kernels, [N, W + 1, H + 1, C'] for 2x2.
    """
    x = shards.keep_real(x, axis=1)
    pad_width = 1
    if shards.count > 1:
        left, right = shards.neighbours(x[:, :1], x[:, -1:])
        x = jnp.concatenate([left, x, right], axis=1)
        pad_width = 0
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((pad_width, pad_width), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(x.dtype),
    )


def _stacked_taps(kernel: jax.Array) -> jax.Array:
    """[3, KW, KH, C, C'] -> [KW, KH, 3 C, C']: three frames side by side in the channels."""
    return jnp.concatenate(list(kernel), axis=-2)


def causal_conv(
    x: jax.Array, conv: Conv, cache: jax.Array | None, shards: WidthShards
) -> tuple[jax.Array, jax.Array]:
    """A 3x3x3 convolution that sees only the present and the two frames before it.

    Source: CogVideoXCausalConv3d with pad_mode "first".

    Args:
        x: [B, F, W, H, C].
        conv: kernel [3, 3, 3, C, C'] over frames, width and height.
        cache: the two frames before `x`, [B, 2, W, H, C]; None at the start of a video, where the
            first frame stands in for both.
        shards: how the width is split.

    Returns:
        [B, F, W, H, C'] and the cache for the next frames.
    """
    b, frames = x.shape[:2]
    if cache is None:
        cache = jnp.repeat(x[:, :1], 2, axis=1)
    x = jnp.concatenate([cache, x], axis=1)
    stacked = jnp.concatenate([x[:, k : k + frames] for k in range(3)], axis=-1)
    stacked = stacked.reshape(b * frames, *stacked.shape[2:])
    out = _conv_2d(stacked, _stacked_taps(conv.kernel), shards) + conv.bias
    return out.reshape(b, frames, *out.shape[1:]), x[:, -2:]


def shown_latents(latent_frames: int, frames: int) -> tuple[int, ...]:
    """For each of `frames`, the latent frame that nearest interpolation puts under it.

    Source: CogVideoXSpatialNorm3D.forward: an odd number of frames keeps its first one single.
    """
    if frames > 1 and frames % 2 == 1:
        repeat = (frames - 1) // (latent_frames - 1)
        return (0, *(1 + t // repeat for t in range(frames - 1)))
    return tuple(t * latent_frames // frames for t in range(frames))


def _phase_kernel(kernel: jax.Array) -> jax.Array:
    """[3, 3, C, C'] -> [2, 2, C, 4 C']: nearest doubling and then `kernel`, on undoubled pixels.

    Along one axis, the doubled pixels 2p-1 and 2p both read only pixels p-1 and p: the first with
    weights (k0 + k1, k2), the second with (k0, k1 + k2).
    """

    def phases(k: jax.Array, axis: int) -> jax.Array:
        k0, k1, k2 = jnp.split(k, 3, axis=axis)
        odd = jnp.concatenate([k0 + k1, k2], axis=axis)
        even = jnp.concatenate([k0, k1 + k2], axis=axis)
        return jnp.stack([odd, even], axis=3)  # before C'

    # [3, 3, C, C'] -> [2, 3, C, pw, C'] -> [2, 2, C, ph, pw, C'] -> phases ordered (pw, ph)
    k = phases(phases(kernel.astype(jnp.float32), 0), 1)
    k = jnp.swapaxes(k, 3, 4)
    return k.reshape(2, 2, k.shape[2], -1).astype(kernel.dtype)


def upsample_frames(x: jax.Array, conv: Conv, shards: WidthShards) -> jax.Array:
    """Nearest doubling of frames [N, W, H, C] and a 3x3 convolution: [N, 2 W, 2 H, C'].

    Source: CogVideoXUpsample3D. As one 2x2 convolution for each of the four phases of the doubled
    picture this is 16/36 of its work.
    """
    n, columns, rows, _ = x.shape
    out = _conv_2d(x, _phase_kernel(conv.kernel), shards)  # [N, W + 1, H + 1, 4 C']
    out = out.reshape(n, columns + 1, rows + 1, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(n, 2 * columns + 2, 2 * rows + 2, -1)
    # The outermost ones belong to pixels -1 and 2 W of the doubled picture.
    return out[:, 1:-1, 1:-1] + conv.bias


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames [B, F, W, H, C] that may still have to be upsampled.

    diffusers convolves after doubling the frames; frames are convolved one by one, so doubling
    them comes last here. An odd number of frames keeps its first one single.

    Attributes:
        stored: [B, F', W', H', C'].
        upsample: what makes the frames of the stored ones; None if they are the same.
        shards: how the width is split.
    """

    stored: jax.Array
    upsample: Upsample | None
    shards: WidthShards

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the frames."""
        b, frames, columns, rows, channels = self.stored.shape
        if self.upsample is None:
            return self.stored.shape
        if self.upsample.compress_time and frames > 1:
            frames = 2 * frames - frames % 2
        return b, frames, 2 * columns, 2 * rows, self.upsample.conv.bias.shape[0]

    def frame(self, t: jax.Array) -> jax.Array:
        """Frame `t`, made now: [B, W, H, C]."""
        stored_frames, frames = self.stored.shape[1], self.shape[1]
        if frames > stored_frames:
            t = (t + stored_frames % 2) // 2
        x = lax.dynamic_index_in_dim(self.stored, t, axis=1, keepdims=False)
        return x if self.upsample is None else upsample_frames(x, self.upsample.conv, self.shards)

    def all_frames(self) -> jax.Array:
        """Every frame at once: [B, F, W, H, C]."""
        if self.upsample is None:
            return self.stored
        b, stored_frames = self.stored.shape[:2]
        x = self.stored.reshape(b * stored_frames, *self.stored.shape[2:])
        x = upsample_frames(x, self.upsample.conv, self.shards)
        x = x.reshape(b, stored_frames, *x.shape[1:])
        if self.shape[1] == stored_frames:
            return x
        odd = stored_frames % 2
        return jnp.concatenate([x[:, :odd], jnp.repeat(x[:, odd:], 2, axis=1)], axis=1)

    def sums(self) -> jax.Array:
        """Sum and sum of squares over frames, real columns and rows: float32 [B, 2, C]."""
        b, frames, _, _, channels = self.shape

        def add(t: jax.Array, sums: jax.Array) -> jax.Array:
            return sums + frame_sums(self.frame(t), self.shards)

        return lax.fori_loop(0, frames, add, jnp.zeros((b, 2, channels), jnp.float32))


def frame_sums(x: jax.Array, shards: WidthShards) -> jax.Array:
    """Sum and sum of squares of [B, W, H, C] over real columns and rows: float32 [B, 2, C]."""
    x = shards.keep_real(x.astype(jnp.float32), axis=1)
    return jnp.stack([x.sum(axis=(1, 2)), jnp.square(x).sum(axis=(1, 2))], axis=1)


def modulation(
    sums: jax.Array,
    shape: tuple[int, ...],
    z: jax.Array,
    norm: Norm,
    groups: int,
    shards: WidthShards,
) -> tuple[jax.Array, jax.Array]:
    """What a spatial norm multiplies its input by and adds to it, at the size of the latents.

    Source: CogVideoXSpatialNorm3D. There the latents are interpolated to the size of the input and
    then convolved; a 1x1x1 convolution and nearest interpolation commute, so here all but one
    multiplication and one addition happen at the size of the latents, up to 256 times fewer
    voxels. The group statistics take one pass, in float32, over all devices.

    Args:
        sums: this device's sum and sum of squares of the input, float32 [B, 2, C].
        shape: of the input on this device, [B, F, W s, H s, C].
        z: latents [B, T, W, H, Z].
        norm: the spatial norm's weights.
        groups: number of channel groups.
        shards: how the width is split.

    Returns:
        Multiplier and summand, float32 [B, T, W, H, C].
    """
    b, frames, columns, rows, channels = shape
    size = channels // groups
    real_width = shards.width * (columns // shards.local_width)
    sums = lax.psum(sums, shards.axis).reshape(b, 2, groups, size).sum(axis=3)
    moments = sums / (frames * real_width * rows * size)
    mean, mean_square = moments[:, 0], moments[:, 1]
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)  # rounding can take it below zero
    gain = jnp.repeat(lax.rsqrt(variance + NORM_EPS), size, axis=1) * norm.scale
    shift = norm.bias - jnp.repeat(mean, size, axis=1) * gain  # both float32 [B, C]

    multiplier = pointwise(z, norm.multiplier).astype(jnp.float32)
    summand = pointwise(z, norm.summand).astype(jnp.float32)
    gain, shift = (v[:, None, None, None] for v in (gain, shift))
    return gain * multiplier, shift * multiplier + summand


def _activate(x: jax.Array, multiplier: jax.Array, summand: jax.Array) -> jax.Array:
    """silu(x * multiplier + summand) of a frame [B, W s, H s, C], modulation [B, W, H, C]."""
    b, columns, rows, channels = x.shape
    width, height = multiplier.shape[1:3]
    blocks = x.reshape(b, width, columns // width, height, rows // height, channels)
    multiplier, summand = (v[:, :, None, :, None] for v in (multiplier, summand))
    blocks = jax.nn.silu(blocks.astype(jnp.float32) * multiplier + summand)
    return blocks.astype(x.dtype).reshape(x.shape)


class Residual(NamedTuple):
    """What a resnet adds to its convolutions: its input, through a shortcut if there is one."""

    video: Video
    shortcut: Conv | None

    def of(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C']."""
        return x if self.shortcut is None else pointwise(x, self.shortcut)


def norm_conv_by_frames(
    video: Video,
    multiplier: jax.Array,
    summand: jax.Array,
    conv: Conv,
    cache: jax.Array | None,
    residual: Residual | None,
    overwrite: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `norm_conv`. One frame at a time, so that what is not kept is never larger than one."""
    b, frames, columns, rows, channels = video.shape
    shards = video.shards
    shows = jnp.array(shown_latents(multiplier.shape[1], frames))
    kernel = _stacked_taps(conv.kernel)

    def activated(video: Video, t: jax.Array) -> jax.Array:
        latent = [lax.dynamic_index_in_dim(v, shows[t], 1, False) for v in (multiplier, summand)]
        return _activate(video.frame(t), *latent)

    def step(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, before_last, last, sums = carry
        now = activated(Video(out, None, shards) if overwrite else video, t)
        stacked = jnp.concatenate([before_last, last, now], axis=-1)
        y = _conv_2d(stacked, kernel, shards).astype(jnp.float32) + conv.bias
        if residual is not None:
            y += residual.of(residual.video.frame(t))
        out = lax.dynamic_update_index_in_dim(out, y.astype(out.dtype), t, axis=1)
        return out, last, now, sums + frame_sums(y, shards)

    if cache is None:
        before_last = last = activated(video, 0)
    else:
        before_last, last = cache[:, 0], cache[:, 1]
    out_channels = conv.bias.shape[0]
    out = video.stored
    if not overwrite:
        out = jnp.zeros((b, frames, columns, rows, out_channels), video.stored.dtype)
    sums = jnp.zeros((b, 2, out_channels), jnp.float32)
    out, before_last, last, sums = lax.fori_loop(0, frames, step, (out, before_last, last, sums))
    return out, jnp.stack([before_last, last], axis=1), sums


def norm_conv_by_kernel(
    x: jax.Array,
    multiplier: jax.Array,
    summand: jax.Array,
    conv: Conv,
    cache: jax.Array | None,
    residual: Residual | None,
    shards: WidthShards,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `norm_conv`. All frames at once, in the Pallas kernel."""
    columns, rows = x.shape[2:4]
    scale = rows // multiplier.shape[3]
    shows = shown_latents(multiplier.shape[1], x.shape[1])
    # The kernel wants a row of modulation for each row; for the columns it steps itself.
    multiplier, summand = (jnp.repeat(v, scale, axis=3) for v in (multiplier, summand))

    def border(column: int) -> jax.Array:  # activated, cached frames first: [B, F + 2, 1, H, C]
        column = slice(column, column + 1 or None)
        latent = [v[:, :, column][:, shows, ...] for v in (multiplier, summand)]
        value = jax.vmap(_activate, in_axes=1, out_axes=1)(x[:, :, column], *latent)
        before = value[:, [0, 0]] if cache is None else cache[:, :, column]
        return jnp.concatenate([before, value], axis=1)

    real = shards.real_columns(columns)
    first = jnp.where(real > 0, border(0), 0)
    last = jnp.where(real == columns, border(-1), 0)
    left, right = shards.neighbours(first, last)

    out_channels = conv.bias.shape[0]
    pad = -out_channels % vae_conv_tpu.LANES  # only the last convolution, to 3 channels, has any
    kernel = jnp.pad(conv.kernel, ((0, 0),) * 4 + ((0, pad),))
    out, cache, sums = vae_conv_tpu.norm_conv(
        x,
        multiplier,
        summand,
        cache,
        left,
        right,
        kernel,
        jnp.pad(conv.bias, (0, pad)),
        None if residual is None else residual.of(residual.video.stored),
        real[None],
        shows,
        interpret,
    )
    return out[..., :out_channels], cache, sums[..., :out_channels]


def _has_kernel(x: jax.Array, shards: WidthShards) -> bool:
    """Whether activations like `x` go through the Pallas kernel: in bfloat16, in full lanes."""
    full_lanes = x.shape[-1] % vae_conv_tpu.LANES == 0
    return shards.platform == "tpu" and x.dtype == jnp.bfloat16 and full_lanes


def norm_conv(
    video: Video,
    sums: jax.Array,
    z: jax.Array,
    norm: Norm,
    conv: Conv,
    cache: jax.Array | None,
    groups: int,
    residual: Residual | None = None,
    overwrite: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Spatial norm, SiLU and causal convolution: conv(silu(norm(video, z))) + residual.

    Source: CogVideoXResnetBlock3D and the end of CogVideoXDecoder3D.

    Args:
        video: [B, F, W s, H s, C].
        sums: of `video`; see `Video.sums`.
        z: latents [B, T, W, H, Z].
        norm, conv: the weights.
        cache: the two activated frames before, [B, 2, W s, H s, C]; None at the start of a video.
        groups: number of channel groups.
        residual: added to the result.
        overwrite: let the result take the place of `video`, which has its shape.

    Returns:
        [B, F, W s, H s, C'], the new cache, and the sums of the result.
    """
    multiplier, summand = modulation(sums, video.shape, z, norm, groups, video.shards)
    if video.upsample is None and _has_kernel(video.stored, video.shards):
        x = video.stored
        return norm_conv_by_kernel(x, multiplier, summand, conv, cache, residual, video.shards)
    return norm_conv_by_frames(video, multiplier, summand, conv, cache, residual, overwrite)


def resnet(
    x: jax.Array,
    z: jax.Array,
    weights: Resnet,
    caches: tuple[jax.Array, jax.Array] | None,
    groups: int,
    shards: WidthShards,
    upsample: Upsample | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A resnet block, after an upsampler where it is the first of its resolution.

    Source: CogVideoXResnetBlock3D. The upsampled frames are the largest array of the decoder
    (4.8 GB for 9 frames of 768x1360 with 256 channels): where frames are computed one by one they
    are made again for each use, a tenth of the work of a convolution, and never all exist.

    Args:
        x: [B, F, W s, H s, C], or before upsampling.
        z: latents [B, T, W, H, Z].
        weights: of the block.
        caches: of its two convolutions; None at the start of a video.
        groups: number of channel groups.
        shards: how the width is split.
        upsample: weights of the upsampler before the block, if there is one.

    Returns:
        [B, F, W s, H s, C'] and the new caches.
    """
    video = Video(x, upsample, shards)
    if _has_kernel(x, shards):
        video = Video(video.all_frames(), None, shards)
    cache1, cache2 = caches or (None, None)
    h, cache1, sums = norm_conv(
        video, video.sums(), z, weights.norm1, weights.conv1, cache1, groups
    )
    residual = Residual(video, weights.shortcut)
    h = Video(h, None, shards)
    out, cache2, _ = norm_conv(
        h, sums, z, weights.norm2, weights.conv2, cache2, groups, residual, overwrite=True
    )
    return out, (cache1, cache2)
