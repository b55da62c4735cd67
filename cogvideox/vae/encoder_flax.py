"""The VAE encoder in Flax NNX, and the map of its parameters from diffusers' names.

The structure follows diffusers' CogVideoXEncoder3D; `cogvideox.vae.layers.Layers` does the
arithmetic. See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Iterator

import jax
from flax import nnx

from cogvideox.model.config import VaeConfig
from cogvideox.vae.blocks_flax import (
    Conv,
    GroupNorm,
    MakeNorm,
    Resnet,
    forward_of,
    named_parameters,
)
from cogvideox.vae.layers import (
    NORM_EPS,
    ConvCache,
    DownsampleWeights,
    EncoderCaches,
    EncoderForward,
    Features,
    Layers,
)
from cogvideox.vae.norm import pointwise
from cogvideox.vae.weights import MID_RESNETS


class Downsample(nnx.Module):
    """Halves width and height and, if `compress_time`, the frames."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        self.compress_time = compress_time
        self.conv = Conv(channels, channels, 3, 3, downsampler=True)

    def weights(self) -> DownsampleWeights:
        return DownsampleWeights(self.conv.weights(), self.compress_time)


class DownBlock(nnx.Module):
    """Applies the resnets of one resolution, then a downsampler except in the last block."""

    def __init__(self, level: int, config: VaeConfig) -> None:
        widths = config.block_out_channels
        channels, out_channels = widths[max(level - 1, 0)], widths[level]
        self.resnets = nnx.List(
            Resnet(out_channels if i else channels, out_channels, _resnet_norm(config))
            for i in range(config.layers_per_block)
        )
        last = level == len(widths) - 1
        self.downsample = None if last else Downsample(out_channels, level < config.time_levels)

    def __call__(
        self, features: Features, caches: list[ConvCache], layers: Layers
    ) -> tuple[Features, list[ConvCache]]:
        new = []
        for i, (resnet, cache) in enumerate(zip(self.resnets, caches, strict=True)):
            with jax.named_scope(f"resnets.{i}"):
                features, cache = resnet(features, None, cache, layers)
            new.append(cache)
        if self.downsample is not None:
            with jax.named_scope("downsample"):
                features = layers.downsample(features.x, self.downsample.weights())
        return features, new


class VaeEncoder(nnx.Module):
    """Encodes video to the moments of latents; see `__call__`."""

    def __init__(self, config: VaeConfig) -> None:
        self.config = config
        channels, moments = config.block_out_channels, 2 * config.latent_channels
        self.conv_in = Conv(config.in_channels, channels[0], 3, 3, 3)
        self.down = nnx.List(DownBlock(level, config) for level in range(len(channels)))
        self.mid = nnx.List(
            Resnet(channels[-1], channels[-1], _resnet_norm(config)) for _ in range(MID_RESNETS)
        )
        self.norm_out = GroupNorm(channels[-1], NORM_EPS)
        self.conv_out = Conv(channels[-1], moments, 3, 3, 3)
        self.moments_conv = Conv(moments, moments, 1, 1, 1) if config.use_quant_conv else None

    def __call__(
        self, video: jax.Array, caches: EncoderCaches | None, layers: Layers
    ) -> tuple[jax.Array, EncoderCaches]:
        """Encodes a batch of frames.

        Args:
            video: in -1..1, [B, F, W s, H s, 3].
            caches: of the batch before; None for the first.
            layers: the implementation of the layers.

        Returns:
            Mean and logarithm of the variance [B, T, W, H, 2 Z], and the caches for the next batch.
        """
        old = caches or EncoderCaches.empty(self.config)
        with jax.named_scope("conv_in"):
            features, conv_in = layers.first_conv(video, self.conv_in.weights(), old.conv_in)
        down, mid = [], []
        for level, (block, cache) in enumerate(zip(self.down, old.down, strict=True)):
            with jax.named_scope(f"down_blocks.{level}"):
                features, cache = block(features, cache, layers)
            down.append(cache)
        with jax.named_scope("mid_block"):
            for i, (resnet, cache) in enumerate(zip(self.mid, old.mid, strict=True)):
                with jax.named_scope(f"resnets.{i}"):
                    features, cache = resnet(features, None, cache, layers)
                mid.append(cache)
        norm, conv = self.norm_out.weights(), self.conv_out.weights()
        with jax.named_scope("conv_out"):
            moments, conv_out = layers.last_conv(
                features, None, norm, conv, old.conv_out, planar=False
            )
        if self.moments_conv is not None:
            with jax.named_scope("quant_conv"):
                moments = pointwise(moments, self.moments_conv.weights())
        return moments, EncoderCaches(conv_in, conv_out, down, mid)


def _resnet_norm(config: VaeConfig) -> MakeNorm:
    return lambda channels: GroupNorm(channels, config.norm_eps)


def _modules_by_diffusers_name(encoder: VaeEncoder) -> Iterator[tuple[str, nnx.Module]]:
    """Yields every module that owns weights with diffusers' name for it."""
    yield "encoder.conv_in.conv", encoder.conv_in
    for level, block in enumerate(encoder.down):
        for i, resnet in enumerate(block.resnets):
            yield f"encoder.down_blocks.{level}.resnets.{i}", resnet
        if block.downsample is not None:
            yield f"encoder.down_blocks.{level}.downsamplers.0.conv", block.downsample.conv
    for i, resnet in enumerate(encoder.mid):
        yield f"encoder.mid_block.resnets.{i}", resnet
    yield "encoder.norm_out", encoder.norm_out
    yield "encoder.conv_out.conv", encoder.conv_out
    if encoder.moments_conv is not None:
        yield "quant_conv", encoder.moments_conv


def parameters_by_diffusers_name(encoder: VaeEncoder) -> dict[str, nnx.Param]:
    """Returns each parameter by the name of its weight in a VAE folder."""
    return named_parameters(_modules_by_diffusers_name(encoder))


def abstract_model(config: VaeConfig) -> VaeEncoder:
    """Returns the encoder with abstract parameters."""
    return nnx.eval_shape(lambda: VaeEncoder(config))


def build_forward(config: VaeConfig, layers: Layers) -> EncoderForward:
    """Returns the function that encodes one device's columns; see `EncoderForward`."""
    return forward_of(lambda: abstract_model(config), parameters_by_diffusers_name, layers)
