"""The decoder's layers with XLA's convolutions, frame by frame: for GPU and CPU.

Nothing but what is kept is ever larger than a few frames, so a decode of 768x1360 needs little more
memory than its caches. A causal convolution is one 2-D convolution of three frames side by side in
the channels: all 27 taps are then added in one float32 accumulator, and a frame is written once.
The three lie in a ring, in which each new frame takes the place of the oldest, and the taps turn
with it. `benchmarks/vae_convolution.py` compares other forms.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cogvideox.vae.layers import (
    Conv,
    Features,
    Norm,
    Resnet,
    Upsample,
    WidthShards,
    activate,
    channel_sums,
    edges,
    frame_repeat,
    modulation,
    pointwise,
    precision,
)

# The last two frames that a convolution read, [B, 1, W, H, C] as `with_neighbours` makes them.
Cache = tuple[jax.Array, jax.Array]

# A frame [B, W, H, C], and where the mesh splits the width also the columns beside it.
Pieces = list[jax.Array]

_RING = 3  # frames that a causal convolution reads


def with_neighbours(x: jax.Array, shards: WidthShards) -> jax.Array:
    """[B, F, W, H, C] with a column from each side, [B, F, W + 2, H, C], as convolutions read it.

    On a single device it stays as it is: the convolution makes its own border.
    """
    if shards.count == 1:
        return x
    left, right = shards.neighbours(edges(x), x.shape[2])
    return jnp.concatenate([left, shards.keep_real(x, axis=2), right], axis=2)


def _conv_2d(x: jax.Array, kernel: jax.Array, shards: WidthShards) -> jax.Array:
    """[B, W (+ 2 if the width is split), H, C] by [KW, KH, C, C'].

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


def _ring_kernels(conv: Conv) -> jax.Array:
    """[3 (frames) 3 (columns) C, 3 (rows) C'] -> [3, 3, 2 3 (frames) C, C'], the frames twice.

    Any three frames of it in a row are the taps for one turn of the ring.
    """
    channels, out_channels = conv.weight.shape[0] // 9, conv.bias.shape[0]
    kernel = conv.weight.reshape(_RING, 3, channels, 3, out_channels).transpose(1, 3, 0, 2, 4)
    kernel = kernel.reshape(3, 3, _RING * channels, out_channels)
    return jnp.concatenate([kernel, kernel], axis=2)


def _phase_kernel(conv: Conv) -> jax.Array:
    """[2 (side), 2 (columns) C, 2 (parity) 2 (rows) C'] -> [2, 2, C, 2 (side) 2 (parity) C'].

    Around the corner between four pixels lie the right half of the left ones and the left half of
    the right ones: sides and parities change their order.
    """
    channels, out_channels = conv.weight.shape[1] // 2, conv.bias.shape[0]
    kernel = conv.weight.reshape(2, 2, channels, 2, 2, out_channels)[::-1, :, :, ::-1]
    return kernel.transpose(1, 4, 2, 0, 3, 5).reshape(2, 2, channels, 4 * out_channels)


def upsample_frame(x: jax.Array, conv: Conv, shards: WidthShards) -> jax.Array:
    """Nearest doubling of [B, W (+ 2 if the width is split), H, C] and a 3x3 convolution.

    Source: CogVideoXUpsample3D. As one 2x2 convolution for each of the four phases of the doubled
    picture this is 16/36 of its work.

    Returns:
        [B, 2 W + 2, 2 H, C'], with a column from each side.
    """
    b = x.shape[0]
    out = lax.optimization_barrier(_conv_2d(x, _phase_kernel(conv), shards))
    columns, rows, channels = *out.shape[1:3], conv.bias.shape[0]
    # The columns and rows are corners between four pixels, hence one more of each than pixels.
    out = out.reshape(b, columns, rows, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(b, 2 * columns, 2 * rows, channels)
    return out[:, :, 1:-1] + conv.bias


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames [B, F, W, H, C] that may still have to be upsampled.

    diffusers convolves after doubling the frames; it convolves them one by one, so doubling them
    can come last, or never: a doubled frame is the same frame asked for twice.

    Attributes:
        stored: [B, F', W', H', C'].
        beside: the columns left and right of them, [B, F', 1, H', C'] each, or none if the width
            is not split.
        upsample: what makes the frames of the stored ones; None if they are the same.
        shards: how the width is split.
    """

    stored: jax.Array
    beside: tuple[jax.Array, ...]
    upsample: Upsample | None
    shards: WidthShards

    @classmethod
    def of(cls, x: jax.Array, upsample: Upsample | None, shards: WidthShards) -> "Video":
        """With the columns beside `x` fetched from the neighbours, for all frames at once."""
        beside = () if shards.count == 1 else shards.neighbours(edges(x), x.shape[2])
        return cls(x, beside, upsample, shards)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the frames."""
        if self.upsample is None:
            return self.stored.shape
        b, stored, columns, rows, _ = self.stored.shape
        channels = self.upsample.conv.bias.shape[0]
        return b, self.upsample.frames(stored), 2 * columns, 2 * rows, channels

    def pieces(self, t: jax.Array) -> Pieces:
        """Frame `t`, made now, and what is beside it."""
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
        x = upsample_frame(x, self.upsample.conv, self.shards)
        return [x[:, 1:-1], x[:, :1], x[:, -1:]] if self.beside else [x[:, 1:-1]]

    def frame(self, t: jax.Array) -> jax.Array:
        """Frame `t`: [B, W, H, C]."""
        return self.pieces(t)[0]

    def sums(self) -> jax.Array:
        """See `Features`."""
        b, frames, _, _, channels = self.shape

        def add(t: jax.Array, sums: jax.Array) -> jax.Array:
            return sums + channel_sums(self.frame(t)[:, None], self.shards)

        return lax.fori_loop(0, frames, add, jnp.zeros((b, 2, channels), jnp.float32))


class Residual(NamedTuple):
    """What a resnet adds to its convolutions: its input, through a shortcut if there is one."""

    video: Video
    shortcut: Conv | None

    @classmethod
    def of(cls, video: Video, shortcut: Conv | None) -> "Residual":
        """An upsampler and a shortcut after it, both linear, become one upsampler."""
        if video.upsample is None or shortcut is None:
            return cls(video, shortcut)
        conv, compress_time = video.upsample
        weight = conv.weight.reshape(*conv.weight.shape[:2], 4, -1)  # [2, 2 C, 2 2, C']
        weight = pointwise(weight, shortcut._replace(bias=jnp.zeros((), weight.dtype)))
        both = Conv(weight.reshape(*conv.weight.shape[:2], -1), pointwise(conv.bias, shortcut))
        return cls(dataclasses.replace(video, upsample=Upsample(both, compress_time)), None)

    def frame(self, t: jax.Array) -> jax.Array:
        """[B, W, H, C']."""
        x = self.video.frame(t)
        return x if self.shortcut is None else pointwise(x, self.shortcut)


@dataclasses.dataclass(frozen=True)
class FrameLayers:
    """See `vae.layers.Layers`. Caches hold two activated frames as convolutions read them.

    Attributes:
        shards: how the width is split.
        groups: channel groups of the norms.
    """

    shards: WidthShards
    groups: int

    def first_conv(self, z: jax.Array, conv: Conv, cache: Cache | None) -> tuple[Features, Cache]:
        return _causal_conv(Video.of(z, None, self.shards), Video.pieces, conv, cache)

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

    def last_conv(
        self,
        features: Features,
        z: jax.Array,
        norm: Norm,
        conv: Conv,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache]:
        video = Video.of(features.x, None, self.shards)
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
        modulated = modulation(sums, shape, with_neighbours(z, shards), norm, self.groups, shards)
        repeat, offset = frame_repeat(z.shape[1], shape[1])

        def activated(video: Video, t: jax.Array) -> Pieces:
            latent = (t + offset) // repeat
            at = [lax.dynamic_index_in_dim(v, latent, 1, False) for v in modulated]
            columns = [slice(1, -1), slice(1), slice(-1, None)] if video.beside else [slice(None)]
            return [
                activate(piece, *(v[:, own] for v in at))
                for piece, own in zip(video.pieces(t), columns, strict=True)
            ]

        # Nobody else wants what a resnet's second convolution reads.
        overwrite = residual is not None
        return _causal_conv(video, activated, conv, cache, residual, overwrite)


def _put(ring: jax.Array, pieces: Pieces, place: jax.Array, shards: WidthShards) -> jax.Array:
    """The ring [B, W (+ 2), H, 3 C] with a frame in one of its three places."""
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


def _causal_conv(
    video: Video,
    prepared: Callable[[Video, jax.Array], Pieces],
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
        prepared: makes frame t of a video ready for the convolution.
        conv: the weights.
        cache: the two frames before, as it returns them.
        residual: added to the result.
        overwrite: let the result take the place of `video.stored`, which has its shape.
    """
    b, frames, columns, rows, channels = video.shape
    shards, kernels = video.shards, _ring_kernels(conv)
    dtype, out_channels = video.stored.dtype, conv.bias.shape[0]

    # Frame t lies in place (t + 2) % 3, so that the cache's two come before the first one.
    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, ring = carry
        now = dataclasses.replace(video, stored=out) if overwrite else video
        ring = _put(ring, prepared(now, t), (t + 2) % _RING, shards)
        start = -t % _RING * channels
        kernel = lax.dynamic_slice_in_dim(kernels, start, _RING * channels, axis=2)
        # Apart from what follows: one of cuDNN's fused convolutions could not write into `out`, and
        # its result would be copied there.
        y = lax.optimization_barrier(_conv_2d(ring, kernel, shards))
        y = y.astype(jnp.float32) + conv.bias
        if residual is not None:
            y += residual.frame(t)
        return lax.dynamic_update_index_in_dim(out, y.astype(dtype), t, axis=1), ring

    # What is written over before it is read starts as some value of the input: constants would be
    # made, and held, long before they are needed, and the caches copied.
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
