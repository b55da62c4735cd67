"""The decoder's layers with the Pallas kernels of `vae_conv_tpu`: for TPU in bfloat16.

All frames of a batch at once, column by column. The kernels read the border columns of the
neighbouring devices as small arrays beside their main one, so that no activation is copied to
attach them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cogvideox import vae_conv_tpu
from cogvideox.vae_parts import (
    Conv,
    Features,
    Norm,
    Resnet,
    Upsample,
    WidthShards,
    activate,
    frame_repeat,
    modulation,
)

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
    """See `cogvideox.vae_parts.Layers`. Caches hold activated frames, [B, 2, W, H, C].

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
        borders = self._neighbours(z, lambda column: _behind(cache, column, z[:, :, column]))
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
            *self._neighbours(x, lambda column: x[:, :, column]),
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
        shown = [(t + offset) // repeat for t in range(x.shape[1])]

        def edge(column: slice) -> jax.Array:
            latent = slice(0, 1) if column.start == 0 else slice(-1, None)
            at = [jnp.stack([v[:, t, latent] for t in shown], axis=1) for v in modulated]
            activated = jax.vmap(activate, in_axes=1, out_axes=1)(x[:, :, column], *at)
            return _behind(cache, column, activated)

        out, cache, sums = vae_conv_tpu.causal_conv(
            x,
            cache,
            *self._neighbours(x, edge),
            *conv,
            self.shards.real_columns(x.shape[2]),
            modulation=modulated,
            repeat=repeat,
            offset=offset,
            interpret=self.interpret,
            **options,
        )
        return Features(out, sums), cache

    def _neighbours(
        self, x: jax.Array, edge: Callable[[slice], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """The columns beside this device's columns of `x`, of what `edge` makes of `x`."""
        columns = x.shape[2]
        real = self.shards.real_columns(columns)
        first = jnp.where(real > 0, edge(slice(0, 1)), 0)
        last = jnp.where(real == columns, edge(slice(columns - 1, columns)), 0)
        return self.shards.neighbours(first, last)


def _behind(cache: jax.Array | None, column: slice, x: jax.Array) -> jax.Array:
    """Frames [B, F, 1, H, C] of a column behind the two before them."""
    before = jnp.repeat(x[:, :1], 2, axis=1) if cache is None else cache[:, :, column]
    return jnp.concatenate([before, x], axis=1)
