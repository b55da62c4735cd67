"""The VAE decoder in Flax NNX, and the map of its parameters from diffusers' names.

The structure follows diffusers' CogVideoXDecoder3D; `cogvideox.vae.layers.Layers` does the
arithmetic. See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Iterator

import jax
from flax import nnx

from cogvideox.model.config import VaeConfig
from cogvideox.vae.blocks_flax import (
    Conv,
    MakeNorm,
    Resnet,
    SpatialNorm,
    forward_of,
    named_parameters,
)
from cogvideox.vae.layers import (
    ConvCache,
    DecoderCaches,
    Features,
    Forward,
    Layers,
    UpsampleWeights,
)
from cogvideox.vae.norm import pointwise
from cogvideox.vae.weights import MID_RESNETS


def _make_norm(config: VaeConfig) -> MakeNorm:
    return lambda channels: SpatialNorm(channels, config.latent_channels)


class Upsample(nnx.Module):
    """Doubles width and height and, if `compress_time`, the frames; then convolves."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        self.compress_time = compress_time
        self.conv = Conv(channels, channels, 3, 3)

    def weights(self) -> UpsampleWeights:
        return UpsampleWeights(self.conv.weights(), self.compress_time)


class UpBlock(nnx.Module):
    """Applies the resnets of one resolution, after an upsampler except in the first block."""

    def __init__(self, level: int, config: VaeConfig) -> None:
        widths = config.block_out_channels[::-1]
        channels, out_channels = widths[max(level - 1, 0)], widths[level]
        # In diffusers' names it belongs to the block before.
        self.upsample = Upsample(channels, level <= config.time_levels) if level else None
        self.resnets = nnx.List(
            Resnet(channels if i == 0 else out_channels, out_channels, _make_norm(config))
            for i in range(config.layers_per_block + 1)
        )

    def __call__(
        self,
        features: Features,
        z: jax.Array,
        caches: list[ConvCache],
        layers: Layers,
    ) -> tuple[Features, list[ConvCache]]:
        upsample = None if self.upsample is None else self.upsample.weights()
        new = []
        for i, (resnet, cache) in enumerate(zip(self.resnets, caches, strict=True)):
            with jax.named_scope(f"resnets.{i}"):
                features, cache = resnet(features, z, cache, layers, upsample)
            new.append(cache)
            upsample = None
        return features, new


class VaeDecoder(nnx.Module):
    """Decodes latents to video; see `__call__`."""

    def __init__(self, config: VaeConfig) -> None:
        self.config = config
        channels = config.block_out_channels[::-1]
        latent = config.latent_channels
        self.latent_conv = Conv(latent, latent, 1, 1, 1) if config.use_post_quant_conv else None
        self.conv_in = Conv(latent, channels[0], 3, 3, 3)
        self.mid = nnx.List(
            Resnet(channels[0], channels[0], _make_norm(config)) for _ in range(MID_RESNETS)
        )
        self.up = nnx.List(UpBlock(level, config) for level in range(len(channels)))
        self.norm_out = SpatialNorm(channels[-1], latent)
        self.conv_out = Conv(channels[-1], config.out_channels, 3, 3, 3)

    def __call__(
        self, z: jax.Array, caches: DecoderCaches | None, layers: Layers
    ) -> tuple[jax.Array, DecoderCaches]:
        """Decodes a batch of frames.

        Args:
            z: scaled latents [B, T, W, H, Z].
            caches: of the batch before; None for the first.
            layers: the implementation of the layers.

        Returns:
            Video in about -1..1, [B, F, W s, 3, H s], and the caches for the next batch.
        """
        old = caches or DecoderCaches.empty(self.config)
        if self.latent_conv is not None:
            with jax.named_scope("post_quant_conv"):
                z = pointwise(z, self.latent_conv.weights())
        with jax.named_scope("conv_in"):
            features, conv_in = layers.first_conv(z, self.conv_in.weights(), old.conv_in)
        mid, up = [], []
        with jax.named_scope("mid_block"):
            for i, (resnet, cache) in enumerate(zip(self.mid, old.mid, strict=True)):
                with jax.named_scope(f"resnets.{i}"):
                    features, cache = resnet(features, z, cache, layers)
                mid.append(cache)
        for level, (block, cache) in enumerate(zip(self.up, old.up, strict=True)):
            with jax.named_scope(f"up_blocks.{level}"):
                features, cache = block(features, z, cache, layers)
            up.append(cache)
        norm, conv = self.norm_out.weights(), self.conv_out.weights()
        with jax.named_scope("conv_out"):
            video, conv_out = layers.last_conv(features, z, norm, conv, old.conv_out)
        return video, DecoderCaches(conv_in, conv_out, mid, up)


def _modules_by_diffusers_name(decoder: VaeDecoder) -> Iterator[tuple[str, nnx.Module]]:
    """Yields every module that owns weights with diffusers' name for it."""
    if decoder.latent_conv is not None:
        yield "post_quant_conv", decoder.latent_conv
    yield "decoder.conv_in.conv", decoder.conv_in
    for i, resnet in enumerate(decoder.mid):
        yield f"decoder.mid_block.resnets.{i}", resnet
    for level, block in enumerate(decoder.up):
        for i, resnet in enumerate(block.resnets):
            yield f"decoder.up_blocks.{level}.resnets.{i}", resnet
        if block.upsample is not None:
            yield f"decoder.up_blocks.{level - 1}.upsamplers.0.conv", block.upsample.conv
    yield "decoder.norm_out", decoder.norm_out
    yield "decoder.conv_out.conv", decoder.conv_out


def parameters_by_diffusers_name(decoder: VaeDecoder) -> dict[str, nnx.Param]:
    """Returns each parameter by the name of its weight in a VAE folder."""
    return named_parameters(_modules_by_diffusers_name(decoder))


def abstract_model(config: VaeConfig) -> VaeDecoder:
    """Returns the decoder with abstract parameters."""
    return nnx.eval_shape(lambda: VaeDecoder(config))


def build_forward(config: VaeConfig, layers: Layers) -> Forward:
    """Returns the function that decodes one device's columns; see `Forward`."""
    return forward_of(lambda: abstract_model(config), parameters_by_diffusers_name, layers)
