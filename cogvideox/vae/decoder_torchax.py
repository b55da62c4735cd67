"""The VAE decoder in torch, computed by JAX layers through TorchAx.

The modules follow diffusers' CogVideoXDecoder3D and have its parameter names. Modules are built on
torch's meta device and called functionally with JAX arrays. Importing this module takes seconds;
only tracing needs it. See `cogvideox.vae.blocks_torchax`, and `cogvideox.vae.sharding` for the axis
letters.
"""

from collections.abc import Sequence
from typing import cast

import jax
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D

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
from cogvideox.vae.layers import ConvCache, DecoderCaches, Forward, Layers
from cogvideox.vae.norm import pointwise


def _make_norm(config: VaeConfig) -> MakeNorm:
    return lambda channels: CogVideoXSpatialNorm3D(
        channels, config.latent_channels, config.norm_num_groups
    )


class UpBlock3D(torch.nn.Module):
    """Applies the resnets of one resolution, and holds the upsampler that follows them.

    The upsampler is computed together with the first resnet of the next block, so that the largest
    arrays of the decoder need not exist. Source: CogVideoXUpBlock3D.
    """

    def __init__(self, level: int, config: VaeConfig, layers: Layers) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        in_channels, out_channels = widths[max(level - 1, 0)], widths[level]
        self.resnets = torch.nn.ModuleList(
            ResnetBlock3D(
                out_channels if i else in_channels, out_channels, _make_norm(config), layers
            )
            for i in range(config.layers_per_block + 1)
        )
        self.upsamplers = None
        if level < len(widths) - 1:
            upsampler = CogVideoXUpsample3D(
                out_channels, out_channels, compress_time=level < config.time_levels
            )
            self.upsamplers = torch.nn.ModuleList([upsampler])

    @property
    def upsampler(self) -> CogVideoXUpsample3D | None:
        """The upsampler that follows the block; None for the last one."""
        return None if self.upsamplers is None else cast(CogVideoXUpsample3D, self.upsamplers[0])

    def forward(
        self,
        features: TorchFeatures,
        z: torch.Tensor,
        caches: list[ConvCache],
        upsampler: CogVideoXUpsample3D | None,
    ) -> tuple[TorchFeatures, list[ConvCache]]:
        """Applies the block to `features`, after `upsampler` of the block before."""
        new = []
        for i, (resnet, cache) in enumerate(zip(self.resnets, caches, strict=True)):
            with jax.named_scope(f"resnets.{i}"):
                features, cache = resnet(features, z, cache, None if i else upsampler)
            new.append(cache)
        return features, new


class Decoder3D(torch.nn.Module):
    """Decodes scaled latents to video. Source: CogVideoXDecoder3D."""

    def __init__(self, config: VaeConfig, layers: Layers) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        widths = config.block_out_channels[::-1]
        self.conv_in = CogVideoXCausalConv3d(config.latent_channels, widths[0], kernel_size=3)
        self.mid_block = MidBlock3D(widths[0], _make_norm(config), layers)
        self.up_blocks = torch.nn.ModuleList(
            UpBlock3D(level, config, layers) for level in range(len(widths))
        )
        self.norm_out = _make_norm(config)(widths[-1])
        self.conv_out = CogVideoXCausalConv3d(widths[-1], config.out_channels, kernel_size=3)

    def forward(
        self, z: torch.Tensor, caches: DecoderCaches | None
    ) -> tuple[torch.Tensor, DecoderCaches]:
        """Decodes a batch of frames.

        Args:
            z: scaled latents [B, T, W, H, Z].
            caches: of the batch before; None for the first.

        Returns:
            Video in about -1..1, [B, F, W s, 3, H s], and the caches for the next batch.
        """
        old = caches or DecoderCaches.empty(self.config)
        with jax.named_scope("conv_in"):
            features, conv_in = call_jax(
                self.layers.first_conv, z, conv_weights(self.conv_in.conv), old.conv_in
            )
        with jax.named_scope("mid_block"):
            features, mid = self.mid_block(features, z, old.mid)
        up, upsampler = [], None
        blocks = cast(Sequence[UpBlock3D], self.up_blocks)
        for level, (block, cache) in enumerate(zip(blocks, old.up, strict=True)):
            with jax.named_scope(f"up_blocks.{level}"):
                features, cache = block(features, z, cache, upsampler)
            up.append(cache)
            upsampler = block.upsampler
        norm, conv = norm_weights(self.norm_out), conv_weights(self.conv_out.conv)
        with jax.named_scope("conv_out"):
            video, conv_out = call_jax(self.layers.last_conv, features, z, norm, conv, old.conv_out)
        return video, DecoderCaches(conv_in, conv_out, mid, up)


class AutoencoderDecoder(torch.nn.Module):
    """The parts of AutoencoderKLCogVideoX that decode, by its names."""

    def __init__(self, config: VaeConfig, layers: Layers) -> None:
        super().__init__()
        self.decoder = Decoder3D(config, layers)
        self.post_quant_conv = None
        if config.use_post_quant_conv:
            channels = config.latent_channels
            self.post_quant_conv = CogVideoXSafeConv3d(channels, channels, kernel_size=1)

    def forward(
        self, z: torch.Tensor, caches: DecoderCaches | None
    ) -> tuple[torch.Tensor, DecoderCaches]:
        """Decodes a batch of frames; see `Decoder3D.forward`."""
        if self.post_quant_conv is not None:
            with jax.named_scope("post_quant_conv"):
                z = call_jax(pointwise, z, conv_weights(self.post_quant_conv))
        return self.decoder(z, caches)


def build_model(config: VaeConfig, layers: Layers) -> AutoencoderDecoder:
    """Returns the decoder with parameters on the meta device, of the shapes diffusers stores."""
    with torch.device("meta"):
        return AutoencoderDecoder(config, layers).eval()


def build_forward(config: VaeConfig, layers: Layers) -> Forward:
    """Returns the function that decodes one device's columns; see `Forward`."""
    return forward_of(lambda: build_model(config, layers))
