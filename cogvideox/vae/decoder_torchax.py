"""The VAE decoder in torch, computed by JAX layers through TorchAx.

The modules follow diffusers' CogVideoXDecoder3D and have its parameter names; diffusers' leaf
modules (convolutions, norms) hold the parameters. Each `forward` passes them to the JAX layers of
`cogvideox.vae.layers.Layers` with `interop.call_jax`. Modules are built on torch's meta device and
called functionally with JAX arrays. Importing this module takes seconds; only tracing needs it.
See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import torch
import torchax
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torchax import interop

from cogvideox.model.config import VaeConfig
from cogvideox.vae.layers import (
    ConvCache,
    ConvWeights,
    DecoderCaches,
    Forward,
    Layers,
    NormWeights,
    ResnetWeights,
    UpsampleWeights,
)
from cogvideox.vae.norm import pointwise
from cogvideox.vae.weights import MID_RESNETS


class TorchFeatures(NamedTuple):
    """`cogvideox.vae.layers.Features` as torch tensors."""

    x: torch.Tensor
    sums: torch.Tensor


def _call_jax(function: Callable[..., object], *args: object) -> Any:
    """Calls a JAX function with torch tensors, alone or in trees; returns torch tensors."""
    return interop.call_jax(function, *args)  # pyright: ignore[reportArgumentType]


def _conv(module: torch.nn.Conv2d | torch.nn.Conv3d) -> ConvWeights:
    return ConvWeights(*interop.jax_view((module.weight, module.bias)))


def _norm(module: CogVideoXSpatialNorm3D) -> NormWeights:
    scale, bias = interop.jax_view((module.norm_layer.weight, module.norm_layer.bias))
    return NormWeights(scale, bias, _conv(module.conv_y.conv), _conv(module.conv_b.conv))


def _upsample(module: CogVideoXUpsample3D) -> UpsampleWeights:
    return UpsampleWeights(_conv(module.conv), module.compress_time)


def _spatial_norm(channels: int, config: VaeConfig) -> CogVideoXSpatialNorm3D:
    return CogVideoXSpatialNorm3D(channels, config.latent_channels, config.norm_num_groups)


class ResnetBlock3D(torch.nn.Module):
    """Applies norm, activation and convolution twice, around a shortcut.

    Source: CogVideoXResnetBlock3D.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: VaeConfig, layers: Layers
    ) -> None:
        super().__init__()
        self.layers = layers
        self.norm1 = _spatial_norm(in_channels, config)
        self.conv1 = CogVideoXCausalConv3d(in_channels, out_channels, kernel_size=3)
        self.norm2 = _spatial_norm(out_channels, config)
        self.conv2 = CogVideoXCausalConv3d(out_channels, out_channels, kernel_size=3)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = CogVideoXSafeConv3d(in_channels, out_channels, kernel_size=1)

    def forward(
        self,
        features: TorchFeatures,
        z: torch.Tensor,
        caches: ConvCache,
        upsampler: CogVideoXUpsample3D | None = None,
    ) -> tuple[TorchFeatures, ConvCache]:
        """Applies the block to `features`, which `upsampler` doubles first if there is one."""
        weights = ResnetWeights(
            _norm(self.norm1),
            _conv(self.conv1.conv),
            _norm(self.norm2),
            _conv(self.conv2.conv),
            None if self.conv_shortcut is None else _conv(self.conv_shortcut),
        )
        upsample = None if upsampler is None else _upsample(upsampler)
        return _call_jax(self.layers.resnet, features, z, weights, caches, upsample)


class MidBlock3D(torch.nn.Module):
    """Applies the resnets at the resolution of the latents. Source: CogVideoXMidBlock3D."""

    def __init__(self, channels: int, config: VaeConfig, layers: Layers) -> None:
        super().__init__()
        self.resnets = torch.nn.ModuleList(
            ResnetBlock3D(channels, channels, config, layers) for _ in range(MID_RESNETS)
        )

    def forward(
        self, features: TorchFeatures, z: torch.Tensor, caches: list[ConvCache]
    ) -> tuple[TorchFeatures, list[ConvCache]]:
        new = []
        for i, (resnet, cache) in enumerate(zip(self.resnets, caches, strict=True)):
            with jax.named_scope(f"resnets.{i}"):
                features, cache = resnet(features, z, cache)
            new.append(cache)
        return features, new


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
            ResnetBlock3D(out_channels if i else in_channels, out_channels, config, layers)
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
        self.mid_block = MidBlock3D(widths[0], config, layers)
        self.up_blocks = torch.nn.ModuleList(
            UpBlock3D(level, config, layers) for level in range(len(widths))
        )
        self.norm_out = _spatial_norm(widths[-1], config)
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
            features, conv_in = _call_jax(
                self.layers.first_conv, z, _conv(self.conv_in.conv), old.conv_in
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
        norm, conv = _norm(self.norm_out), _conv(self.conv_out.conv)
        with jax.named_scope("conv_out"):
            video, conv_out = _call_jax(
                self.layers.last_conv, features, z, norm, conv, old.conv_out
            )
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
                z = _call_jax(pointwise, z, _conv(self.post_quant_conv))
        return self.decoder(z, caches)


def build_model(config: VaeConfig, layers: Layers) -> AutoencoderDecoder:
    """Returns the decoder with parameters on the meta device, of the shapes diffusers stores."""
    with torch.device("meta"):
        return AutoencoderDecoder(config, layers).eval()


def build_forward(config: VaeConfig, layers: Layers) -> Forward:
    """Returns the function that decodes one device's columns; see `Forward`."""
    torchax.default_env()  # makes an array, which must not become part of the traced program
    model = build_model(config, layers)

    def forward(
        weights: dict[str, torch.Tensor], z: torch.Tensor, caches: DecoderCaches | None
    ) -> tuple[torch.Tensor, DecoderCaches]:
        return torch.func.functional_call(model, weights, (z, caches))

    return interop.jax_view(forward)
