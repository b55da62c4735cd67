"""The decoder's layers with XLA's convolutions, frame by frame, for GPU and CPU.

Temporary arrays have at most a few frames, so a decode of 768x1360 needs little more memory than
its caches. A causal convolution is one 2-D convolution of three frames concatenated along the
channels: one float32 accumulator sums all 27 taps, and each frame is written once. The three frames
are in a ring buffer. Each new frame replaces the oldest, and the kernel's taps are rotated to
match. `benchmarks/vae_convolution.py` compares other forms.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cogvideox.vae.layers import (
    ConvWeights,
    DownsampleWeights,
    Features,
    NormWeights,
    ResnetWeights,
    UpsampleWeights,
)
from cogvideox.vae.norm import (
    activate,
    channel_sums,
    frame_repeat,
    modulation,
    pointwise,
)
from cogvideox.vae.sharding import WidthShards, edges
from cogvideox.vae.xla.resample import conv_2d, downsample, upsample_frame

# The last two activated frames that a convolution read, [B, 1, W, H, C] each, with the columns that
# `with_neighbours` adds.
Cache = tuple[jax.Array, jax.Array]

# A frame [B, W, H, C] and, if the mesh splits the width, the columns left and right of it.
Pieces = list[jax.Array]

_RING = 3  # frames that a causal convolution reads


def with_neighbours(x: jax.Array, shards: WidthShards) -> jax.Array:
    """Adds a column from each side to [B, F, W, H, C]: [B, F, W + 2, H, C].

    On a single device it returns `x`, because the convolution pads the border.
    """
    if shards.count == 1:
        return x
    left, right = shards.neighbours(edges(x), x.shape[2])
    return jnp.concatenate([left, shards.keep_real(x, axis=2), right], axis=2)


def _ring_kernels(conv: ConvWeights) -> jax.Array:
    """Rearranges [3 (frames) 3 (columns) C, 3 (rows) C'] to [3, 3, 2 3 (frames) C, C'].

    The frames' taps are repeated once, so each rotation is a contiguous slice.
    """
    channels, out_channels = conv.weight.shape[0] // 9, conv.bias.shape[0]
    kernel = conv.weight.reshape(_RING, 3, channels, 3, out_channels).transpose(1, 3, 0, 2, 4)
    kernel = kernel.reshape(3, 3, _RING * channels, out_channels)
    return jnp.concatenate([kernel, kernel], axis=2)


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames [B, F, W, H, C], upsampled on reading.

    diffusers doubles the frames and then convolves each one separately, so both copies of a frame
    are equal and one is stored.

    Attributes:
        stored: [B, F', W', H', C'].
        beside: the columns left and right of `stored`, [B, F', 1, H', C'] each; empty if the width
            is not split.
        upsample: the upsampler to apply to a stored frame; None for no upsampling.
        shards: split of the width.
    """

    stored: jax.Array
    beside: tuple[jax.Array, ...]
    upsample: UpsampleWeights | None
    shards: WidthShards

    @classmethod
    def of(cls, x: jax.Array, upsample: UpsampleWeights | None, shards: WidthShards) -> "Video":
        """Makes a video of `x`; fetches the neighbouring columns of all frames at once."""
        beside = () if shards.count == 1 else shards.neighbours(edges(x), x.shape[2])
        return cls(x, beside, upsample, shards)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the frames, [B, F, W, H, C]."""
        if self.upsample is None:
            return self.stored.shape
        b, stored, columns, rows, _ = self.stored.shape
        channels = self.upsample.conv.bias.shape[0]
        return b, self.upsample.frames(stored), 2 * columns, 2 * rows, channels

    def pieces(self, t: jax.Array) -> Pieces:
        """Computes frame `t` and its neighbouring columns."""
        stored = self.stored.shape[1]
        if self.shape[1] > stored:
            t = (t + stored % 2) // 2
        pieces = [lax.dynamic_index_in_dim(x, t, 1, False) for x in (self.stored, *self.beside)]
        if self.upsample is None:
            return pieces
        x = pieces[0]
        if self.beside:
            x, left, right = pieces
            x = jnp.concatenate([left, self.shards.keep_real(x, axis=1), right], axis=1)
        with jax.named_scope("upsample"):
            x = upsample_frame(x, self.upsample.conv, self.shards)
        return [x[:, 1:-1], x[:, :1], x[:, -1:]] if self.beside else [x[:, 1:-1]]

    def frame(self, t: jax.Array) -> jax.Array:
        """Computes frame `t`: [B, W, H, C]."""
        return self.pieces(t)[0]

    def sums(self) -> jax.Array:
        """Computes the sums of all frames; see `Features`."""
        b, frames, _, _, channels = self.shape

        def add(t: jax.Array, sums: jax.Array) -> jax.Array:
            return sums + channel_sums(self.frame(t)[:, None], self.shards)

        return lax.fori_loop(0, frames, add, jnp.zeros((b, 2, channels), jnp.float32))


class Residual(NamedTuple):
    """Residual of a resnet block: its input, through the shortcut if there is one."""

    video: Video
    shortcut: ConvWeights | None

    @classmethod
    def of(cls, video: Video, shortcut: ConvWeights | None) -> "Residual":
        """Makes a residual; fuses upsampler and shortcut, both linear, into one upsampler."""
        if video.upsample is None or shortcut is None:
            return cls(video, shortcut)
        conv, compress_time = video.upsample
        weight = conv.weight.reshape(*conv.weight.shape[:2], 4, -1)  # [2, 2 C, 2 2, C']
        weight = pointwise(weight, shortcut._replace(bias=jnp.zeros((), weight.dtype)))
        both = ConvWeights(
            weight.reshape(*conv.weight.shape[:2], -1), pointwise(conv.bias, shortcut)
        )
        return cls(dataclasses.replace(video, upsample=UpsampleWeights(both, compress_time)), None)

    def frame(self, t: jax.Array) -> jax.Array:
        """Computes frame `t`: [B, W, H, C']."""
        x = self.video.frame(t)
        return x if self.shortcut is None else pointwise(x, self.shortcut)


@dataclasses.dataclass(frozen=True)
class XlaLayers:
    """Implements `cogvideox.vae.layers.Layers`; caches are of type `Cache`.

    Attributes:
        shards: split of the width.
        groups: channel groups of the norms.
        still: the video is one frame, an image. The three frames that a causal convolution reads
            are then equal, so one product with the sum of their taps replaces three.
    """

    shards: WidthShards
    groups: int
    still: bool = False

    def first_conv(
        self, z: jax.Array, conv: ConvWeights, cache: Cache | None
    ) -> tuple[Features, Cache]:
        video = Video.of(z, None, self.shards)
        if self.still:
            return _still_conv(video, Video.pieces, conv)
        return _causal_conv(video, Video.pieces, conv, cache)

    def resnet(
        self,
        features: Features,
        z: jax.Array | None,
        weights: ResnetWeights,
        caches: tuple[Cache, Cache] | None,
        upsample: UpsampleWeights | None = None,
    ) -> tuple[Features, tuple[Cache, Cache]]:
        # Storing all upsampled frames would need the largest array, 4.8 GB for 9 frames of
        # 768x1360 with 256 channels. Each of the three uses recomputes them frame by frame, for a
        # tenth of the work of one convolution.
        video = Video.of(features.x, upsample, self.shards)
        sums = features.sums if upsample is None else video.sums()
        cache1, cache2 = caches or (None, None)
        h, cache1 = self._norm_conv(video, sums, z, weights.norm1, weights.conv1, cache1)
        residual = Residual.of(video, weights.shortcut)
        video = Video.of(h.x, None, self.shards)
        out, cache2 = self._norm_conv(
            video, h.sums, z, weights.norm2, weights.conv2, cache2, residual
        )
        return out, (cache1, cache2)

    def downsample(self, x: jax.Array, weights: DownsampleWeights) -> Features:
        return downsample(x, weights, self.shards)

    def last_conv(
        self,
        features: Features,
        z: jax.Array | None,
        norm: NormWeights,
        conv: ConvWeights,
        cache: Cache | None,
        planar: bool = True,
    ) -> tuple[jax.Array, Cache]:
        video = Video.of(features.x, None, self.shards)
        out, cache = self._norm_conv(video, features.sums, z, norm, conv, cache)
        return jnp.swapaxes(out.x, 3, 4) if planar else out.x, cache

    def _norm_conv(
        self,
        video: Video,
        sums: jax.Array,
        z: jax.Array | None,
        norm: NormWeights,
        conv: ConvWeights,
        cache: Cache | None,
        residual: Residual | None = None,
    ) -> tuple[Features, Cache]:
        shape, shards = video.shape, self.shards
        with jax.named_scope("norm"):
            beside = None if z is None else with_neighbours(z, shards)
            modulated = modulation(sums, shape, beside, norm, self.groups, shards)
        repeat, offset = frame_repeat(modulated[0].shape[1], shape[1])

        def activated(video: Video, t: jax.Array) -> Pieces:
            latent = (t + offset) // repeat
            at = [lax.dynamic_index_in_dim(v, latent, 1, False) for v in modulated]
            pieces = video.pieces(t)
            columns = [slice(None)] * len(pieces)  # a group norm's values are those of all columns
            if video.beside and z is not None:
                columns = [slice(1, -1), slice(1), slice(-1, None)]
            with jax.named_scope("norm"):
                return [
                    activate(piece, *(v[:, own] for v in at))
                    for piece, own in zip(pieces, columns, strict=True)
                ]

        if self.still:
            return _still_conv(video, activated, conv, residual)
        # The input of a resnet's second convolution has no other reader.
        overwrite = residual is not None
        return _causal_conv(video, activated, conv, cache, residual, overwrite)


def _put(ring: jax.Array, pieces: Pieces, place: jax.Array, shards: WidthShards) -> jax.Array:
    """Writes a frame to one of the three slots of the ring [B, W (+ 2), H, 3 C]."""
    frame, *others = pieces
    columns, channels = frame.shape[1], frame.shape[3]
    starts = [0]
    if others:
        device = lax.axis_index(shards.axis)
        left_is_real = device > 0
        right_is_real = (device + 1) * columns < shards.width * (columns // shards.local_width)
        others = [
            jnp.where(real, x, 0)
            for real, x in zip((left_is_real, right_is_real), others, strict=True)
        ]
        starts = [1, 0, columns + 1]
    pieces = [shards.keep_real(frame, axis=1), *others]
    for piece, start in zip(pieces, starts, strict=True):
        ring = lax.dynamic_update_slice(ring, piece, (0, start, 0, place * channels))
    return ring


def _still_conv(
    video: Video,
    prepared: Callable[[Video, jax.Array], Pieces],
    conv: ConvWeights,
    residual: Residual | None = None,
) -> tuple[Features, Cache]:
    """Applies a 3x3x3 convolution to an image; see `XlaLayers.still` and `_causal_conv`."""
    shards, first = video.shards, jnp.int32(0)
    channels, out_channels = conv.weight.shape[0] // 9, conv.bias.shape[0]
    kernel = conv.weight.astype(jnp.float32).reshape(_RING, 3, channels, 3, out_channels)
    kernel = kernel.sum(axis=0).transpose(0, 2, 1, 3).astype(conv.weight.dtype)
    border = 2 if video.beside else 0
    b, _, columns, rows, _ = video.shape
    frame = jnp.zeros((b, columns + border, rows, channels), video.stored.dtype)
    frame = _put(frame, prepared(video, first), first, shards)
    y = conv_2d(frame, kernel, shards).astype(jnp.float32) + conv.bias
    if residual is not None:
        y += residual.frame(first)
    out = y.astype(video.stored.dtype)[:, None]
    return Features(out, channel_sums(out, shards)), (frame[:, None], frame[:, None])


def _causal_conv(
    video: Video,
    prepared: Callable[[Video, jax.Array], Pieces],
    conv: ConvWeights,
    cache: Cache | None,
    residual: Residual | None = None,
    overwrite: bool = False,
) -> tuple[Features, Cache]:
    """Applies a 3x3x3 convolution to each frame and the two before it.

    Source: CogVideoXCausalConv3d with pad_mode "first", which pads the start of a video with two
    copies of its first frame.

    Args:
        video: the input, before `prepared`.
        prepared: computes frame t of the convolution's input from a video.
        conv: weights of the convolution.
        cache: the two previous frames; None at the start of a video.
        residual: added to the result.
        overwrite: write the result into `video.stored`, which must have the same shape.

    Returns:
        The result and the cache for the next batch.
    """
    b, frames, columns, rows, channels = video.shape
    shards, kernels = video.shards, _ring_kernels(conv)
    dtype, out_channels = video.stored.dtype, conv.bias.shape[0]

    # Frame t uses slot (t + 2) % 3; the two frames of the cache use slots 0 and 1.
    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, ring = carry
        now = dataclasses.replace(video, stored=out) if overwrite else video
        ring = _put(ring, prepared(now, t), (t + 2) % _RING, shards)
        start = -t % _RING * channels
        kernel = lax.dynamic_slice_in_dim(kernels, start, _RING * channels, axis=2)
        # The barrier prevents cuDNN from fusing the next operations: a fused convolution cannot
        # write into `out`, so its result would be copied.
        with jax.named_scope("conv"):
            y = lax.optimization_barrier(conv_2d(ring, kernel, shards))
        y = y.astype(jnp.float32) + conv.bias
        if residual is not None:
            y += residual.frame(t)
        return lax.dynamic_update_index_in_dim(out, y.astype(dtype), t, axis=1), ring

    # Buffers that are overwritten before they are read start as a value of the input: XLA allocates
    # constants long before they are needed, and copies the caches.
    some = video.stored[0, 0, 0, 0, 0]
    if cache is None:
        border = 2 if video.beside else 0
        ring = jnp.full((b, columns + border, rows, _RING * channels), some)
        first = prepared(video, jnp.int32(0))
        for place in range(_RING - 1):
            ring = _put(ring, first, jnp.int32(place), shards)
    else:
        before_last, last = (x.squeeze(1) for x in cache)
        ring = jnp.concatenate([before_last, last, jnp.full_like(last, some)], axis=3)
    out = video.stored
    if not overwrite:
        out = jnp.full((b, frames, columns, rows, out_channels), some)
    out, ring = lax.fori_loop(0, frames, step, (out, ring))
    places = jnp.split(ring[:, None], _RING, axis=4)
    cache = places[frames % _RING], places[(frames + 1) % _RING]
    return Features(out, channel_sums(out, shards)), cache
