"""The VAE's layers with Pallas kernels, for TPU in bfloat16.

The kernels process all frames of a batch, column by column. They read the border columns of the
neighbouring devices as separate small arrays, so no activation is copied to attach them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cogvideox.vae.layers import (
    ConvWeights,
    DownsampleWeights,
    Features,
    NormWeights,
    ResnetWeights,
    UpsampleWeights,
)
from cogvideox.vae.norm import channel_sums, frame_repeat, modulation
from cogvideox.vae.sharding import WidthShards, edges
from cogvideox.vae.tpu.causal_conv import causal_conv
from cogvideox.vae.tpu.common import LANES, Interpret
from cogvideox.vae.tpu.upsample import upsample
from cogvideox.vae.xla.resample import downsample_frames

Caches = tuple[jax.Array, jax.Array]


def _pad_channels(conv: ConvWeights) -> ConvWeights:
    """Pads a causal convolution's input and output channels with zeros to full lanes."""
    out_channels = conv.bias.shape[0]
    channels = conv.weight.shape[0] // 9
    pad_in, pad_out = -channels % LANES, -out_channels % LANES
    weight = conv.weight.reshape(9, channels, 3, out_channels)
    weight = jnp.pad(weight, ((0, 0), (0, pad_in), (0, 0), (0, pad_out)))
    weight = weight.reshape(9 * (channels + pad_in), 3 * (out_channels + pad_out))
    return ConvWeights(weight, jnp.pad(conv.bias, (0, pad_out)))


@dataclasses.dataclass(frozen=True)
class TpuLayers:
    """Implements `cogvideox.vae.layers.Layers`; a cache is two activated frames, [B, 2, W, H, C].

    Attributes:
        shards: split of the width.
        groups: channel groups of the norms.
        interpret: see `cogvideox.vae.tpu.common.Interpret`.
    """

    shards: WidthShards
    groups: int
    interpret: Interpret = False

    def first_conv(
        self, z: jax.Array, conv: ConvWeights, cache: jax.Array | None
    ) -> tuple[Features, jax.Array]:
        channels = z.shape[-1]
        pad = ((0, 0),) * 4 + ((0, -channels % LANES),)
        z = jnp.pad(z, pad)
        cache = None if cache is None else jnp.pad(cache, pad)
        borders = self.shards.neighbours(_after(cache, edges(z)), z.shape[2])
        out, cache, sums = causal_conv(
            z,
            cache,
            *borders,
            *_pad_channels(conv),
            self.shards.real_columns(z.shape[2]),
            interpret=self.interpret,
        )
        return Features(out, sums), cache[..., :channels]

    def resnet(
        self,
        features: Features,
        z: jax.Array | None,
        weights: ResnetWeights,
        caches: Caches | None,
        upsample: UpsampleWeights | None = None,
    ) -> tuple[Features, Caches]:
        if upsample is not None:
            features = self._upsample(features.x, upsample)
        cache1, cache2 = caches or (None, None)
        h, cache1 = self._norm_conv(features, z, weights.norm1, weights.conv1, cache1)
        conv2, shortcut = weights.conv2, None
        if weights.shortcut is not None:
            conv2 = ConvWeights(conv2.weight, conv2.bias + weights.shortcut.bias)
            shortcut = weights.shortcut.weight
        h, cache2 = self._norm_conv(
            h, z, weights.norm2, conv2, cache2, residual=features.x, shortcut=shortcut
        )
        return h, (cache1, cache2)

    def downsample(self, x: jax.Array, weights: DownsampleWeights) -> Features:
        # XLA's convolution: a quarter of the outputs of the others and half of the frames.
        right = None
        if self.shards.count > 1:
            _, right = self.shards.neighbours(edges(x), x.shape[2])
        out = downsample_frames(x, right, weights, self.shards)
        return Features(out, channel_sums(out, self.shards))

    def last_conv(
        self,
        features: Features,
        z: jax.Array | None,
        norm: NormWeights,
        conv: ConvWeights,
        cache: jax.Array | None,
        planar: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        out_channels = conv.bias.shape[0]
        conv = _pad_channels(conv)
        out, cache = self._norm_conv(features, z, norm, conv, cache, planar=planar)
        return out.x[:, :, :, :out_channels] if planar else out.x[..., :out_channels], cache

    def _upsample(self, x: jax.Array, weights: UpsampleWeights) -> Features:
        real = self.shards.real_columns(x.shape[2])
        out, sums = upsample(
            x,
            *self.shards.neighbours(edges(x), x.shape[2]),
            *weights.conv,
            real,
            weights.frames(x.shape[1]),
            interpret=self.interpret,
        )
        return Features(out, sums)

    def _norm_conv(
        self,
        features: Features,
        z: jax.Array | None,
        norm: NormWeights,
        conv: ConvWeights,
        cache: jax.Array | None,
        *,
        residual: jax.Array | None = None,
        shortcut: jax.Array | None = None,
        planar: bool = False,
    ) -> tuple[Features, jax.Array]:
        """Computes conv(silu(norm(features, z)))."""
        x, sums = features
        # The kernel needs one row of modulation per row; it repeats columns and frames itself.
        if z is not None:
            z = jnp.repeat(z, x.shape[3] // z.shape[3], axis=3)
        with jax.named_scope("norm"):
            modulated = modulation(sums, x.shape, z, norm, self.groups, self.shards)
        if z is None:
            gain, shift = (jnp.repeat(v, x.shape[3], axis=3) for v in modulated)
            modulated = gain, shift
        repeat, offset = frame_repeat(modulated[0].shape[1], x.shape[1])
        # Activate this device's border columns for the neighbours, as in the kernel.
        gain, shift = (_show_frames(edges(v), repeat, offset) for v in modulated)
        borders = jax.nn.silu(edges(x).astype(jnp.float32) * gain + shift).astype(x.dtype)
        out, cache, sums = causal_conv(
            x,
            cache,
            *self.shards.neighbours(_after(cache, borders), x.shape[2]),
            *conv,
            self.shards.real_columns(x.shape[2]),
            modulation=modulated,
            repeat=repeat,
            offset=offset,
            interpret=self.interpret,
            residual=residual,
            shortcut=shortcut,
            planar=planar,
        )
        return Features(out, sums), cache


def _after(cache: jax.Array | None, borders: jax.Array) -> jax.Array:
    """Prepends the edges of the two previous frames to `borders`: [B, F + 2, 2, H, C]."""
    before = jnp.repeat(borders[:, :1], 2, axis=1) if cache is None else edges(cache)
    return jnp.concatenate([before, borders], axis=1)


def _show_frames(v: jax.Array, repeat: int, offset: int) -> jax.Array:
    """Repeats latent frames, [B, T, ...] -> [B, F, ...]; see `cogvideox.vae.norm.frame_repeat`."""
    if offset == 0:
        return jnp.repeat(v, repeat, axis=1)
    return jnp.concatenate([v[:, :1], jnp.repeat(v[:, 1:], repeat, axis=1)], axis=1)
