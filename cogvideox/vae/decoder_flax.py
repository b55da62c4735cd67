"""The VAE decoder in Flax NNX, and the map of its parameters from diffusers' names.

The structure follows diffusers' CogVideoXDecoder3D; `cogvideox.vae.layers.Layers` does the
arithmetic. See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from cogvideox.model.config import VaeConfig
from cogvideox.vae.layers import (
    ConvCache,
    ConvWeights,
    DecoderCaches,
    Features,
    Forward,
    Layers,
    NormWeights,
    ResnetWeights,
    UpsampleWeights,
)
from cogvideox.vae.norm import pointwise
from cogvideox.vae.weights import MID_RESNETS, arranged_shape


def _parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


class Conv(nnx.Module):
    """Holds the weights of a convolution, in the order of `cogvideox.vae.weights.arrange`."""

    def __init__(self, channels: int, out_channels: int, *size: int) -> None:
        self.weight = _parameter(*arranged_shape((out_channels, channels, *size)))
        self.bias = _parameter(out_channels)

    def weights(self) -> ConvWeights:
        return ConvWeights(self.weight[...], self.bias[...])


class SpatialNorm(nnx.Module):
    """Holds the weights of a group norm that the latents scale and shift."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        self.scale = _parameter(channels)
        self.bias = _parameter(channels)
        self.multiplier = Conv(latent_channels, channels, 1, 1, 1)
        self.summand = Conv(latent_channels, channels, 1, 1, 1)

    def weights(self) -> NormWeights:
        convs = self.multiplier.weights(), self.summand.weights()
        return NormWeights(self.scale[...], self.bias[...], *convs)


class Resnet(nnx.Module):
    """Applies norm, activation and convolution twice, around a shortcut."""

    def __init__(self, channels: int, out_channels: int, config: VaeConfig) -> None:
        self.norm1 = SpatialNorm(channels, config.latent_channels)
        self.conv1 = Conv(channels, out_channels, 3, 3, 3)
        self.norm2 = SpatialNorm(out_channels, config.latent_channels)
        self.conv2 = Conv(out_channels, out_channels, 3, 3, 3)
        change = channels != out_channels
        self.shortcut = Conv(channels, out_channels, 1, 1, 1) if change else None

    def __call__(
        self,
        features: Features,
        z: jax.Array,
        caches: ConvCache,
        layers: Layers,
        upsample: UpsampleWeights | None = None,
    ) -> tuple[Features, ConvCache]:
        weights = ResnetWeights(
            self.norm1.weights(),
            self.conv1.weights(),
            self.norm2.weights(),
            self.conv2.weights(),
            None if self.shortcut is None else self.shortcut.weights(),
        )
        return layers.resnet(features, z, weights, caches, upsample)


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
            Resnet(channels if i == 0 else out_channels, out_channels, config)
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
        self.mid = nnx.List(Resnet(channels[0], channels[0], config) for _ in range(MID_RESNETS))
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
    named: dict[str, nnx.Param] = {}

    def add(name: str, module: nnx.Module) -> None:
        if isinstance(module, Resnet):
            add(f"{name}.norm1", module.norm1)
            add(f"{name}.conv1.conv", module.conv1)
            add(f"{name}.norm2", module.norm2)
            add(f"{name}.conv2.conv", module.conv2)
            if module.shortcut is not None:
                add(f"{name}.conv_shortcut", module.shortcut)
        elif isinstance(module, SpatialNorm):
            named[f"{name}.norm_layer.weight"] = module.scale
            named[f"{name}.norm_layer.bias"] = module.bias
            add(f"{name}.conv_y.conv", module.multiplier)
            add(f"{name}.conv_b.conv", module.summand)
        elif isinstance(module, Conv):
            named[f"{name}.weight"] = module.weight
            named[f"{name}.bias"] = module.bias
        else:
            raise TypeError(f"{name}: {type(module).__name__} holds no weights")

    for name, module in _modules_by_diffusers_name(decoder):
        add(name, module)
    return named


def abstract_model(config: VaeConfig) -> VaeDecoder:
    """Returns the decoder with abstract parameters."""
    return nnx.eval_shape(lambda: VaeDecoder(config))


def build_forward(config: VaeConfig, layers: Layers) -> Forward:
    """Returns the function that decodes one device's columns; see `Forward`."""

    def forward(
        weights: Mapping[str, jax.Array], z: jax.Array, caches: DecoderCaches | None
    ) -> tuple[jax.Array, DecoderCaches]:
        model = abstract_model(config)
        for name, parameter in parameters_by_diffusers_name(model).items():
            parameter.set_value(weights[name])
        return model(z, caches, layers)

    return forward
