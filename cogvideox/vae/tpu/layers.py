"""The decoder's layers with the Pallas kernels of `vae_conv_tpu`: for TPU in bfloat16.

All frames of a batch at once, column by column. The kernels read the border columns of the
neighbouring devices as small arrays beside their main one, so that no activation is copied to
attach them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cogvideox.vae.layers import (
    Conv,
    Features,
    Norm,
    Resnet,
    Upsample,
    WidthShards,
    edges,
    frame_repeat,
    modulation,
)
from cogvideox.vae.tpu import kernels as vae_conv_tpu

Caches = tuple[jax.Array, jax.Array]


def _pad_channels(conv: Conv) -> Conv:
    """A causal convolution with channels, in and out, filled up to whole lanes with zeros."""
    out_channels = conv.bias.shape[0]
    channels = conv.weight.shape[0] // 9
    pad_in, pad_out = -channels % vae_conv_tpu.LANES, -out_channels % vae_conv_tpu.LANES
    weight = conv.weight.reshape(9, channels, 3, out_channels)
    weight = jnp.pad(weight, ((0, 0), (0, pad_in), (0, 0), (0, pad_out)))
    weight = weight.reshape(9 * (channels + pad_in), 3 * (out_channels + pad_out))
    return Conv(weight, jnp.pad(conv.bias, (0, pad_out)))


@dataclasses.dataclass(frozen=True)
class ColumnLayers:
    """See `cogvideox.vae.layers.Layers`. Caches hold activated frames, [B, 2, W, H, C].

    Attributes:
        shards: how the width is split.
        groups: channel groups of the norms.
        interpret: run the kernels on any backend, slowly.
    """

    shards: WidthShards
    groups: int
    interpret: bool = False

    def first_conv(
        self, z: jax.Array, conv: Conv, cache: jax.Array | None
    ) -> tuple[Features, jax.Array]:
        channels = z.shape[-1]
        pad = ((0, 0),) * 4 + ((0, -channels % vae_conv_tpu.LANES),)
        z = jnp.pad(z, pad)
        cache = None if cache is None else jnp.pad(cache, pad)
        borders = self.shards.neighbours(_behind(cache, edges(z)), z.shape[2])
        out, cache, sums = vae_conv_tpu.causal_conv(
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
        z: jax.Array,
        weights: Resnet,
        caches: Caches | None,
        upsample: Upsample | None = None,
    ) -> tuple[Features, Caches]:
        if upsample is not None:
            features = self._upsample(features.x, upsample)
        cache1, cache2 = caches or (None, None)
        h, cache1 = self._norm_conv(features, z, weights.norm1, weights.conv1, cache1)
        conv2, shortcut = weights.conv2, None
        if weights.shortcut is not None:
            conv2 = Conv(conv2.weight, conv2.bias + weights.shortcut.bias)
            shortcut = weights.shortcut.weight
        h, cache2 = self._norm_conv(
            h, z, weights.norm2, conv2, cache2, residual=features.x, shortcut=shortcut
        )
        return h, (cache1, cache2)

    def last_conv(
        self,
        features: Features,
        z: jax.Array,
        norm: Norm,
        conv: Conv,
        cache: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        colours = conv.bias.shape[0]
        conv = _pad_channels(conv)
        out, cache = self._norm_conv(features, z, norm, conv, cache, planar=True)
        return out.x[:, :, :, :colours], cache

    def _upsample(self, x: jax.Array, upsample: Upsample) -> Features:
        real = self.shards.real_columns(x.shape[2])
        out, sums = vae_conv_tpu.upsample(
            x,
            *self.shards.neighbours(edges(x), x.shape[2]),
            *upsample.conv,
            real,
            upsample.frames(x.shape[1]),
            interpret=self.interpret,
        )
        return Features(out, sums)

    def _norm_conv(
        self,
        features: Features,
        z: jax.Array,
        norm: Norm,
        conv: Conv,
        cache: jax.Array | None,
        **options,
    ) -> tuple[Features, jax.Array]:
        """conv(silu(norm(features, z))), with the options of `vae_conv_tpu.causal_conv`."""
        x, sums = features
        # The kernel wants a row of modulation for each row; columns and frames it counts itself.
        z = jnp.repeat(z, x.shape[3] // z.shape[3], axis=3)
        modulated = modulation(sums, x.shape, z, norm, self.groups, self.shards)
        repeat, offset = frame_repeat(z.shape[1], x.shape[1])
        # The neighbours get this device's border columns as the kernel would make them.
        gain, shift = (_show_frames(edges(v), repeat, offset) for v in modulated)
        borders = jax.nn.silu(edges(x).astype(jnp.float32) * gain + shift).astype(x.dtype)
        out, cache, sums = vae_conv_tpu.causal_conv(
            x,
            cache,
            *self.shards.neighbours(_behind(cache, borders), x.shape[2]),
            *conv,
            self.shards.real_columns(x.shape[2]),
            modulation=modulated,
            repeat=repeat,
            offset=offset,
            interpret=self.interpret,
            **options,
        )
        return Features(out, sums), cache


def _behind(cache: jax.Array | None, borders: jax.Array) -> jax.Array:
    """Edges of frames behind those of the two frames before them: [B, F + 2, 2, H, C]."""
    before = jnp.repeat(borders[:, :1], 2, axis=1) if cache is None else edges(cache)
    return jnp.concatenate([before, borders], axis=1)


def _show_frames(v: jax.Array, repeat: int, offset: int) -> jax.Array:
    """[B, T, ...] -> [B, F, ...]; see `cogvideox.vae.layers.frame_repeat`."""
    if offset == 0:
        return jnp.repeat(v, repeat, axis=1)
    return jnp.concatenate([v[:, :1], jnp.repeat(v[:, 1:], repeat, axis=1)], axis=1)
