"""The decoder's layers: weights, caches, and the interface of the implementations.

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


class NormWeights(NamedTuple):
    """A spatial norm: scale and bias [C] of its group norm, and two 1x1x1 convolutions [Z, C]."""

    scale: jax.Array
    bias: jax.Array
    multiplier: ConvWeights
    summand: ConvWeights


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


class Layers(Protocol):
    """The decoder's layers on one device's columns, inside `jax.shard_map`."""

    def first_conv(
        self, z: jax.Array, conv: ConvWeights, cache: ConvCache
    ) -> tuple[Features, ConvCache]:
        """Applies the causal convolution to the latents [B, T, W, H, Z]."""
        ...

    def resnet(
        self,
        features: Features,
        z: jax.Array,
        weights: ResnetWeights,
        caches: ConvCache,
        upsample: UpsampleWeights | None = None,
    ) -> tuple[Features, ConvCache]:
        """Applies a resnet block, after an upsampler if it is the first of its resolution.

        Source: CogVideoXResnetBlock3D and CogVideoXUpsample3D.
        """
        ...

    def last_conv(
        self,
        features: Features,
        z: jax.Array,
        norm: NormWeights,
        conv: ConvWeights,
        cache: ConvCache,
    ) -> tuple[jax.Array, ConvCache]:
        """Applies norm, SiLU and the causal convolution to RGB planes [B, F, W, 3, H]."""
        ...


# The decoder on one device's columns: (weights by diffusers' names, scaled latents [B, T, W, H, Z],
# caches or None) -> (video [B, F, W s, 3, H s] in about -1..1, caches for the next batch).
Forward = Callable[
    [Mapping[str, jax.Array], jax.Array, DecoderCaches | None], tuple[jax.Array, DecoderCaches]
]
