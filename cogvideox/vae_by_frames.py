"""The decoder's layers with XLA's convolutions, frame by frame: for GPU and CPU.

Nothing but what is kept is ever larger than one frame, so a decode of 768x1360 needs little more
memory than its caches. A causal convolution is three 2-D ones, summed in float32;
`benchmarks/vae_convolution.py` compares other forms.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cogvideox.vae_parts import (
    Conv,
    Features,
    Norm,
    Resnet,
    Upsample,
    WidthShards,
    activate,
    frame_repeat,
    frame_sums,
    modulation,
    pointwise,
    precision,
)

# The last two frames that a convolution read, [B, 1, W, H, C] with neighbouring columns: apart,
# because a loop takes them over as they are but would copy slices of one array.
Cache = tuple[jax.Array, jax.Array]


def with_neighbours(x: jax.Array, shards: WidthShards) -> jax.Array:
    """Frames [B, W, H, C] with a column from each side, [B, W + 2, H, C], as convolutions read
    them.

    On a single device they stay as they are: the convolution makes its own border.
    """
    if shards.count == 1:
        return x
    x = shards.keep_real(x, axis=1)
    left, right = shards.neighbours(x[:, :1], x[:, -1:])
    return jnp.concatenate([left, x, right], axis=1)


def _conv_2d(x: jax.Array, kernel: jax.Array, shards: WidthShards) -> jax.Array:
    """Frames from `with_neighbours` by [KW, KH, C, C'].

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


def _frame_kernels(conv: Conv) -> jax.Array:
    """[3 (frames) 3 (columns) C, 3 (rows) C'] -> [3 (frames), 3, 3, C, C']."""
    channels, out_channels = conv.weight.shape[0] // 9, conv.bias.shape[0]
    kernel = conv.weight.reshape(3, 3, channels, 3, out_channels)
    return kernel.transpose(0, 1, 3, 2, 4)


def _phase_kernel(conv: Conv) -> jax.Array:
    """[2 (side), 2 (columns) C, 2 (parity) 2 (rows) C'] -> [2, 2, C, 2 (side) 2 (parity) C'].

    Around the corner between four pixels lie the right half of the left ones and the left half of
    the right ones: sides and parities change their order.
    """
    channels, out_channels = conv.weight.shape[1] // 2, conv.bias.shape[0]
    kernel = conv.weight.reshape(2, 2, channels, 2, 2, out_channels)[::-1, :, :, ::-1]
    return kernel.transpose(1, 4, 2, 0, 3, 5).reshape(2, 2, channels, 4 * out_channels)


def upsample_frame(x: jax.Array, conv: Conv, shards: WidthShards) -> jax.Array:
    """Nearest doubling of [B, W, H, C] and a 3x3 convolution: [B, 2 W, 2 H, C'].

    Source: CogVideoXUpsample3D. As one 2x2 convolution for each of the four phases of the doubled
    picture this is 16/36 of its work.
    """
    b, columns, rows, _ = x.shape
    x = with_neighbours(x, shards)
    out = _conv_2d(x, _phase_kernel(conv), shards)  # [B, W + 1, H + 1, 4 C']
    out = out.reshape(b, columns + 1, rows + 1, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(b, 2 * columns + 2, 2 * rows + 2, -1)
    # The outermost ones belong to pixels -1 and 2 W of the doubled picture.
    return out[:, 1:-1, 1:-1] + conv.bias


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames [B, F, W, H, C] that may still have to be upsampled.

    diffusers convolves after doubling the frames; it convolves them one by one, so doubling them
    can come last, or never: a doubled frame is the same frame asked for twice.

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
        if self.upsample is None:
            return self.stored.shape
        b, stored, columns, rows, _ = self.stored.shape
        channels = self.upsample.conv.bias.shape[0]
        return b, self.upsample.frames(stored), 2 * columns, 2 * rows, channels

    def frame(self, t: jax.Array) -> jax.Array:
        """Frame `t`, made now: [B, W, H, C]."""
        stored = self.stored.shape[1]
        if self.shape[1] > stored:
            t = (t + stored % 2) // 2
        x = lax.dynamic_index_in_dim(self.stored, t, axis=1, keepdims=False)
        return x if self.upsample is None else upsample_frame(x, self.upsample.conv, self.shards)

    def sums(self) -> jax.Array:
        """See `Features`."""
        b, frames, _, _, channels = self.shape

        def add(t: jax.Array, sums: jax.Array) -> jax.Array:
            return sums + frame_sums(self.frame(t), self.shards)

        return lax.fori_loop(0, frames, add, jnp.zeros((b, 2, channels), jnp.float32))


class Residual(NamedTuple):
    """What a resnet adds to its convolutions: its input, through a shortcut if there is one."""

    video: Video
    shortcut: Conv | None

    def frame(self, t: jax.Array) -> jax.Array:
        """[B, W, H, C']."""
        x = self.video.frame(t)
        return x if self.shortcut is None else pointwise(x, self.shortcut)


@dataclasses.dataclass(frozen=True)
class FrameLayers:
    """See `cogvideox.vae_parts.Layers`. Caches hold two activated frames as convolutions read them.

    Attributes:
        shards: how the width is split.
        groups: channel groups of the norms.
    """

    shards: WidthShards
    groups: int

    def first_conv(self, z: jax.Array, conv: Conv, cache: Cache | None) -> tuple[Features, Cache]:
        return _causal_conv(Video(z, None, self.shards), Video.frame, conv, cache)

    def resnet(
        self,
        features: Features,
        z: jax.Array,
        weights: Resnet,
        caches: tuple[Cache, Cache] | None,
        upsample: Upsample | None = None,
    ) -> tuple[Features, tuple[Cache, Cache]]:
        # The upsampled frames are the largest array of the decoder, 4.8 GB for 9 frames of
        # 768x1360 with 256 channels. They never all exist: each of their three uses makes them
        # again, for a tenth of the work of one convolution.
        video = Video(features.x, upsample, self.shards)
        sums = features.sums if upsample is None else video.sums()
        cache1, cache2 = caches or (None, None)
        h, cache1 = self._norm_conv(video, sums, z, weights.norm1, weights.conv1, cache1)
        residual = Residual(video, weights.shortcut)
        video = Video(h.x, None, self.shards)
        out, cache2 = self._norm_conv(
            video, h.sums, z, weights.norm2, weights.conv2, cache2, residual
        )
        return out, (cache1, cache2)

    def last_conv(
        self,
        features: Features,
        z: jax.Array,
        norm: Norm,
        conv: Conv,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache]:
        video = Video(features.x, None, self.shards)
        out, cache = self._norm_conv(video, features.sums, z, norm, conv, cache)
        return jnp.swapaxes(out.x, 3, 4), cache

    def _norm_conv(
        self,
        video: Video,
        sums: jax.Array,
        z: jax.Array,
        norm: Norm,
        conv: Conv,
        cache: Cache | None,
        residual: Residual | None = None,
    ) -> tuple[Features, Cache]:
        shape, shards = video.shape, self.shards
        multiplier, summand = modulation(sums, shape, z, norm, self.groups, shards)
        repeat, offset = frame_repeat(z.shape[1], shape[1])

        def activated(video: Video, t: jax.Array) -> jax.Array:
            latent = (t + offset) // repeat
            at = [lax.dynamic_index_in_dim(v, latent, 1, False) for v in (multiplier, summand)]
            return activate(video.frame(t), *at)

        # Nobody else wants what a resnet's second convolution reads.
        overwrite = residual is not None
        return _causal_conv(video, activated, conv, cache, residual, overwrite)


def _causal_conv(
    video: Video,
    prepared: Callable[[Video, jax.Array], jax.Array],
    conv: Conv,
    cache: Cache | None,
    residual: Residual | None = None,
    overwrite: bool = False,
) -> tuple[Features, Cache]:
    """A 3x3x3 convolution that sees only the present and the two frames before it.

    Source: CogVideoXCausalConv3d with pad_mode "first": the first frame of a video stands in for
    the two before it.

    Args:
        video: what is convolved, before `prepared`.
        prepared: makes frame t of a video ready for the convolution, [B, W, H, C].
        conv: the weights.
        cache: the two frames before, as it returns them.
        residual: added to the result.
        overwrite: let the result take the place of `video.stored`, which has its shape.
    """
    b, frames, columns, rows, _ = video.shape
    shards, kernels = video.shards, _frame_kernels(conv)
    out_channels = conv.bias.shape[0]

    def step(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, before_last, last, sums = carry
        now = prepared(Video(out, None, shards) if overwrite else video, t)
        now = with_neighbours(now, shards)
        y = conv.bias.astype(jnp.float32)
        if residual is not None:
            y += residual.frame(t)
        for frame, kernel in zip((before_last, last, now), kernels, strict=True):
            # Apart from the sum, because XLA would make cuDNN's fused convolutions of the two, with
            # which three decodes of 768x1360x81 did not end within two minutes on an H200.
            y += lax.optimization_barrier(_conv_2d(frame, kernel, shards))
        # Both of its readers, the result and the sums, would otherwise add up for themselves.
        y = lax.optimization_barrier(y.astype(video.stored.dtype))
        out = lax.dynamic_update_index_in_dim(out, y, t, axis=1)
        return out, last, now, sums + frame_sums(y, shards)

    if cache is None:
        before_last = last = with_neighbours(prepared(video, jnp.int32(0)), shards)
    else:
        before_last, last = (x.squeeze(1) for x in cache)
    out = video.stored
    if not overwrite:
        # Some value of the input: zeros would be made, and held, long before they are needed.
        out = jnp.broadcast_to(out[:, :1, :1, :1, :1], (b, frames, columns, rows, out_channels))
    sums = jnp.zeros((b, 2, out_channels), jnp.float32)
    out, before_last, last, sums = lax.fori_loop(0, frames, step, (out, before_last, last, sums))
    return Features(out, sums), (before_last[:, None], last[:, None])
