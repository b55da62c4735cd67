"""The VAE's layers: weights, caches, and the interface of the implementations.

Two implementations exist: `cogvideox.vae.tpu.layers` with Pallas kernels, and
`cogvideox.vae.xla.layers` for GPU and CPU. See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from cogvideox.model.config import VaeConfig
from cogvideox.vae.weights import MID_RESNETS

# State that a convolution passes from one batch of frames to the next: a tree of arrays, opaque to
# all but the layers that made it. None at the start of a video.
ConvCache = Any


class ConvWeights(NamedTuple):
    """A convolution: weight in the layout of `cogvideox.vae.weights.arrange`, and bias [C']."""

    weight: jax.Array
    bias: jax.Array


# Fixed by diffusers' CogVideoXSpatialNorm3D and the encoder's norm_out; the decoder ignores the
# config's norm_eps.
NORM_EPS = 1e-6


class NormWeights(NamedTuple):
    """A group norm, and in the decoder what makes it a spatial norm.

    Attributes:
        scale, bias: of the group norm, [C].
        multiplier, summand: 1x1x1 convolutions of the latents, [Z, C]; None in the encoder.
        eps: added to the variance.
    """

    scale: jax.Array
    bias: jax.Array
    multiplier: ConvWeights | None = None
    summand: ConvWeights | None = None
    eps: float = NORM_EPS


class ResnetWeights(NamedTuple):
    """A resnet block; `shortcut` is a 1x1x1 convolution if the channels change, else None."""

    norm1: NormWeights
    conv1: ConvWeights
    norm2: NormWeights
    conv2: ConvWeights
    shortcut: ConvWeights | None


class UpsampleWeights(NamedTuple):
    """A 3x3 convolution after nearest doubling in space and, if `compress_time`, in time."""

    conv: ConvWeights
    compress_time: bool

    def frames(self, stored: int) -> int:
        """Returns the number of upsampled frames; if `stored` is odd, the first is not doubled."""
        return 2 * stored - stored % 2 if self.compress_time and stored > 1 else stored


class DownsampleWeights(NamedTuple):
    """A 3x3 convolution of stride 2, after averaging pairs of frames if `compress_time`."""

    conv: ConvWeights
    compress_time: bool

    def frames(self, stored: int) -> int:
        """Returns the number of frames after averaging; if `stored` is odd, the first is kept."""
        return (stored + 1) // 2 if self.compress_time else stored


class Features(NamedTuple):
    """Activations, and their statistics for the next norm.

    Attributes:
        x: [B, F, W, H, C].
        sums: float32 [B, 2, C], sum and sum of squares over frames, rows and this device's real
            columns.
    """

    x: jax.Array
    sums: jax.Array


class DecoderCaches(NamedTuple):
    """Caches of all convolutions of the decoder, between two batches of frames.

    Attributes:
        conv_in, conv_out: caches of the first and last convolution.
        mid: for each resnet of the mid block, the caches of its two convolutions.
        up: for each up block, the same.
    """

    conv_in: ConvCache
    conv_out: ConvCache
    mid: list[ConvCache]
    up: list[list[ConvCache]]

    @classmethod
    def empty(cls, config: VaeConfig) -> "DecoderCaches":
        """Returns the caches at the start of a video."""
        up = [[None] * (config.layers_per_block + 1) for _ in config.block_out_channels]
        return cls(None, None, [None] * MID_RESNETS, up)


class EncoderCaches(NamedTuple):
    """Caches of all convolutions of the encoder, between two batches of frames.

    Attributes:
        conv_in, conv_out: caches of the first and last convolution.
        down: for each resnet of each down block, the caches of its two convolutions.
        mid: the same for the mid block.
    """

    conv_in: ConvCache
    conv_out: ConvCache
    down: list[list[ConvCache]]
    mid: list[ConvCache]

    @classmethod
    def empty(cls, config: VaeConfig) -> "EncoderCaches":
        """Returns the caches at the start of a video."""
        down = [[None] * config.layers_per_block for _ in config.block_out_channels]
        return cls(None, None, down, [None] * MID_RESNETS)


class Layers(Protocol):
    """The VAE's layers on one device's columns, inside `jax.shard_map`.

    `z` are the latents that the decoder's spatial norms read; None in the encoder, whose norms are
    group norms.
    """

    def first_conv(
        self, z: jax.Array, conv: ConvWeights, cache: ConvCache
    ) -> tuple[Features, ConvCache]:
        """Applies the causal convolution to latents [B, T, W, H, Z] or frames [B, F, W, H, 3]."""
        ...

    def resnet(
        self,
        features: Features,
        z: jax.Array | None,
        weights: ResnetWeights,
        caches: ConvCache,
        upsample: UpsampleWeights | None = None,
    ) -> tuple[Features, ConvCache]:
        """Applies a resnet block, after an upsampler if it is the first of its resolution.

        Source: CogVideoXResnetBlock3D and CogVideoXUpsample3D.
        """
        ...

    def downsample(self, x: jax.Array, weights: DownsampleWeights) -> Features:
        """Halves [B, F, W, H, C] in space and, if the weights say so, in time.

        Source: CogVideoXDownsample3D.
        """
        ...

    def last_conv(
        self,
        features: Features,
        z: jax.Array | None,
        norm: NormWeights,
        conv: ConvWeights,
        cache: ConvCache,
        planar: bool = True,
    ) -> tuple[jax.Array, ConvCache]:
        """Applies norm, SiLU and the causal convolution.

        Returns:
            Planes [B, F, W, C', H], as videos are written, or [B, F, W, H, C'] if not `planar`; and
            the cache for the next batch.
        """
        ...


# The encoder on one device's columns: (weights by diffusers' names, frames [B, F, W s, H s, 3] in
# -1..1, caches or None) -> (mean and logarithm of the variance [B, T, W, H, 2 Z], caches).
EncoderForward = Callable[
    [Mapping[str, jax.Array], jax.Array, EncoderCaches | None], tuple[jax.Array, EncoderCaches]
]

# The decoder on one device's columns: (weights by diffusers' names, scaled latents [B, T, W, H, Z],
# caches or None) -> (video [B, F, W s, 3, H s] in about -1..1, caches for the next batch).
Forward = Callable[
    [Mapping[str, jax.Array], jax.Array, DecoderCaches | None], tuple[jax.Array, DecoderCaches]
]
