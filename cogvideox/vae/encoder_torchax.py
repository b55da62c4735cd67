"""The VAE encoder in torch, computed by JAX layers through TorchAx.

The modules follow diffusers' CogVideoXEncoder3D and have its parameter names. See
`cogvideox.vae.decoder_torchax` for how they are built and called, `cogvideox.vae.blocks_torchax`
for the modules it shares with the decoder, and `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Sequence
from typing import cast

import jax
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXSafeConv3d,
)
from diffusers.models.downsampling import CogVideoXDownsample3D

from cogvideox.model.config import VaeConfig
from cogvideox.vae.blocks_torchax import (
    MakeNorm,
    MidBlock3D,
    ResnetBlock3D,
    TorchFeatures,
    call_jax,
    conv_weights,
    forward_of,
    norm_weights,
)
from cogvideox.vae.layers import (
    NORM_EPS,
    ConvCache,
    DownsampleWeights,
    EncoderCaches,
    EncoderForward,
    Layers,
)
from cogvideox.vae.norm import pointwise


def _resnet_norm(config: VaeConfig) -> MakeNorm:
    return lambda channels: torch.nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)


class DownBlock3D(torch.nn.Module):
    """Applies the resnets of one resolution, then a downsampler except in the last block.

    Source: CogVideoXDownBlock3D.
    """

    def __init__(self, level: int, config: VaeConfig, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        widths = config.block_out_channels
        in_channels, out_channels = widths[max(level - 1, 0)], widths[level]
        self.resnets = torch.nn.ModuleList(
            ResnetBlock3D(
                out_channels if i else in_channels, out_channels, _resnet_norm(config), layers
            )
            for i in range(config.layers_per_block)
        )
        self.downsamplers = None
        if level < len(widths) - 1:
            downsampler = CogVideoXDownsample3D(
                out_channels, out_channels, compress_time=level < config.time_levels
            )
            self.downsamplers = torch.nn.ModuleList([downsampler])

    def forward(
        self, features: TorchFeatures, caches: list[ConvCache]
    ) -> tuple[TorchFeatures, list[ConvCache]]:
        new = []
        for i, (resnet, cache) in enumerate(zip(self.resnets, caches, strict=True)):
            with jax.named_scope(f"resnets.{i}"):
                features, cache = resnet(features, None, cache)
            new.append(cache)
        if self.downsamplers is not None:
            downsampler = cast(CogVideoXDownsample3D, self.downsamplers[0])
            weights = DownsampleWeights(conv_weights(downsampler.conv), downsampler.compress_time)
            with jax.named_scope("downsample"):
                features = call_jax(self.layers.downsample, features.x, weights)
        return features, new


class Encoder3D(torch.nn.Module):
    """Encodes video to the moments of latents. Source: CogVideoXEncoder3D."""

    def __init__(self, config: VaeConfig, layers: Layers) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CogVideoXCausalConv3d(config.in_channels, widths[0], kernel_size=3)
        self.down_blocks = torch.nn.ModuleList(
            DownBlock3D(level, config, layers) for level in range(len(widths))
        )
        self.mid_block = MidBlock3D(widths[-1], _resnet_norm(config), layers)
        self.norm_out = torch.nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = CogVideoXCausalConv3d(widths[-1], 2 * config.latent_channels, kernel_size=3)

    def forward(
        self, video: torch.Tensor, caches: EncoderCaches | None
    ) -> tuple[torch.Tensor, EncoderCaches]:
        """Encodes a batch of frames.

        Args:
            video: in -1..1, [B, F, W s, H s, 3].
            caches: of the batch before; None for the first.

        Returns:
            Mean and logarithm of the variance [B, T, W, H, 2 Z], and the caches for the next batch.
        """
        old = caches or EncoderCaches.empty(self.config)
        with jax.named_scope("conv_in"):
            features, conv_in = call_jax(
                self.layers.first_conv, video, conv_weights(self.conv_in.conv), old.conv_in
            )
        down = []
        blocks = cast(Sequence[DownBlock3D], self.down_blocks)
        for level, (block, cache) in enumerate(zip(blocks, old.down, strict=True)):
            with jax.named_scope(f"down_blocks.{level}"):
                features, cache = block(features, cache)
            down.append(cache)
        with jax.named_scope("mid_block"):
            features, mid = self.mid_block(features, None, old.mid)
        norm, conv = norm_weights(self.norm_out), conv_weights(self.conv_out.conv)
        with jax.named_scope("conv_out"):
            moments, conv_out = call_jax(
                self.layers.last_conv, features, None, norm, conv, old.conv_out, False
            )
        return moments, EncoderCaches(conv_in, conv_out, down, mid)


class AutoencoderEncoder(torch.nn.Module):
    """The parts of AutoencoderKLCogVideoX that encode, by its names."""

    def __init__(self, config: VaeConfig, layers: Layers) -> None:
        super().__init__()
        self.encoder = Encoder3D(config, layers)
        self.quant_conv = None
        if config.use_quant_conv:
            moments = 2 * config.latent_channels
            self.quant_conv = CogVideoXSafeConv3d(moments, moments, kernel_size=1)

    def forward(
        self, video: torch.Tensor, caches: EncoderCaches | None
    ) -> tuple[torch.Tensor, EncoderCaches]:
        """Encodes a batch of frames; see `Encoder3D.forward`."""
        moments, new_caches = self.encoder(video, caches)
        if self.quant_conv is not None:
            with jax.named_scope("quant_conv"):
                moments = call_jax(pointwise, moments, conv_weights(self.quant_conv))
        return moments, new_caches


def build_model(config: VaeConfig, layers: Layers) -> AutoencoderEncoder:
    """Returns the encoder with parameters on the meta device, of the shapes diffusers stores."""
    with torch.device("meta"):
        return AutoencoderEncoder(config, layers).eval()


def build_forward(config: VaeConfig, layers: Layers) -> EncoderForward:
    """Returns the function that encodes one device's columns; see `EncoderForward`."""
    return forward_of(lambda: build_model(config, layers))
