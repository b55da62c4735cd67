"""The VAE decoder in Flax NNX, and the map of its weights from diffusers' names.

The structure follows `CogVideoXDecoder3D`; the arithmetic is that of `vae_parts.Layers`, on one
device's columns. Arrays are [B, T, W, H, C].
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cogvideox.model.config import VaeConfig
from cogvideox.vae import layers as vae_parts
from cogvideox.vae.decode import Forward
from cogvideox.vae.weights import MID_RESNETS, arranged_shape

Caches = dict[str, Any]


def _parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


class Conv(nnx.Module):
    """The weights of a convolution with a kernel of the given size (see `vae_weights.arrange`)."""

    def __init__(self, channels: int, out_channels: int, *size: int) -> None:
        self.weight = _parameter(*arranged_shape((out_channels, channels, *size)))
        self.bias = _parameter(out_channels)

    def weights(self) -> vae_parts.Conv:
        return vae_parts.Conv(self.weight[...], self.bias[...])


class SpatialNorm(nnx.Module):
    """The weights of a group normalisation that the latents scale and shift."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        self.scale = _parameter(channels)
        self.bias = _parameter(channels)
        self.multiplier = Conv(latent_channels, channels, 1, 1, 1)
        self.summand = Conv(latent_channels, channels, 1, 1, 1)

    def weights(self) -> vae_parts.Norm:
        convs = self.multiplier.weights(), self.summand.weights()
        return vae_parts.Norm(self.scale[...], self.bias[...], *convs)


class Resnet(nnx.Module):
    """Norm, activation, convolution, twice, around a shortcut."""

    def __init__(self, channels: int, out_channels: int, config: VaeConfig) -> None:
        self.norm1 = SpatialNorm(channels, config.latent_channels)
        self.conv1 = Conv(channels, out_channels, 3, 3, 3)
        self.norm2 = SpatialNorm(out_channels, config.latent_channels)
        self.conv2 = Conv(out_channels, out_channels, 3, 3, 3)
        change = channels != out_channels
        self.shortcut = Conv(channels, out_channels, 1, 1, 1) if change else None

    def __call__(
        self,
        features: vae_parts.Features,
        z: jax.Array,
        caches: Any,
        layers: vae_parts.Layers,
        upsample: vae_parts.Upsample | None = None,
    ) -> tuple[vae_parts.Features, Any]:
        weights = vae_parts.Resnet(
            self.norm1.weights(),
            self.conv1.weights(),
            self.norm2.weights(),
            self.conv2.weights(),
            None if self.shortcut is None else self.shortcut.weights(),
        )
        return layers.resnet(features, z, weights, caches, upsample)


class Upsample(nnx.Module):
    """Twice the width and height, and where asked twice the frames."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        self.compress_time = compress_time
        self.conv = Conv(channels, channels, 3, 3)

    def weights(self) -> vae_parts.Upsample:
        return vae_parts.Upsample(self.conv.weights(), self.compress_time)


class UpBlock(nnx.Module):
    """One resolution: but for the first block an upsampler, and resnets."""

    def __init__(self, level: int, config: VaeConfig) -> None:
        widths = config.block_out_channels[::-1]
        channels, out_channels = widths[max(level - 1, 0)], widths[level]
        # diffusers counts it to the block before, which it ends.
        self.upsample = Upsample(channels, level <= config.time_levels) if level else None
        self.resnets = nnx.List(
            Resnet(channels if i == 0 else out_channels, out_channels, config)
            for i in range(config.layers_per_block + 1)
        )

    def __call__(
        self,
        features: vae_parts.Features,
        z: jax.Array,
        caches: list[Any],
        layers: vae_parts.Layers,
    ) -> tuple[vae_parts.Features, list[Any]]:
        upsample = None if self.upsample is None else self.upsample.weights()
        new = []
        for resnet, cache in zip(self.resnets, caches, strict=True):
            features, cache = resnet(features, z, cache, layers, upsample)
            new.append(cache)
            upsample = None
        return features, new


class VaeDecoder(nnx.Module):
    """Latents to video; see `__call__`."""

    def __init__(self, config: VaeConfig) -> None:
        channels = config.block_out_channels[::-1]
        latent = config.latent_channels
        self.latent_conv = Conv(latent, latent, 1, 1, 1) if config.use_post_quant_conv else None
        self.conv_in = Conv(latent, channels[0], 3, 3, 3)
        self.mid = nnx.List(Resnet(channels[0], channels[0], config) for _ in range(MID_RESNETS))
        self.up = nnx.List(UpBlock(level, config) for level in range(len(channels)))
        self.norm_out = SpatialNorm(channels[-1], latent)
        self.conv_out = Conv(channels[-1], config.out_channels, 3, 3, 3)

    def __call__(
        self, z: jax.Array, caches: Caches | None, layers: vae_parts.Layers
    ) -> tuple[jax.Array, Caches]:
        """Decode a batch of frames.

        Args:
            z: scaled latents [B, T, W, H, Z].
            caches: what the convolutions keep of the batch before; None for the first.
            layers: how they are computed.

        Returns:
            Video in about -1..1, [B, F, W s, 3, H s], and the caches for the next batch.
        """
        old = caches or {
            "conv_in": None,
            "mid": [None] * len(self.mid),
            "up": [[None] * len(block.resnets) for block in self.up],
            "conv_out": None,
        }
        new: Caches = {"mid": [], "up": []}
        if self.latent_conv is not None:
            z = vae_parts.pointwise(z, self.latent_conv.weights())
        x, new["conv_in"] = layers.first_conv(z, self.conv_in.weights(), old["conv_in"])
        for resnet, cache in zip(self.mid, old["mid"], strict=True):
            x, cache = resnet(x, z, cache, layers)
            new["mid"].append(cache)
        for block, cache in zip(self.up, old["up"], strict=True):
            x, cache = block(x, z, cache, layers)
            new["up"].append(cache)
        norm, conv = self.norm_out.weights(), self.conv_out.weights()
        video, new["conv_out"] = layers.last_conv(x, z, norm, conv, old["conv_out"])
        return video, new


def _modules_by_diffusers_name(decoder: VaeDecoder) -> Iterator[tuple[str, nnx.Module]]:
    """Every module that owns weights, with the name diffusers gives to the same one."""
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
    """Each parameter under the name of its weight in a VAE folder."""
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
        else:
            named[f"{name}.weight"] = module.weight
            named[f"{name}.bias"] = module.bias

    for name, module in _modules_by_diffusers_name(decoder):
        add(name, module)
    return named


def abstract_model(config: VaeConfig) -> VaeDecoder:
    """The decoder with shapes for parameters."""
    return nnx.eval_shape(lambda: VaeDecoder(config))


def build_forward(config: VaeConfig, layers: vae_parts.Layers) -> Forward:
    """The decoder's computation on one device's columns; weights by diffusers' names."""

    def forward(weights, z, caches):
        model = abstract_model(config)
        for name, parameter in parameters_by_diffusers_name(model).items():
            parameter.set_value(weights[name])
        return model(z, caches, layers)

    return forward
