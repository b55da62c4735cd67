"""Torch modules that the VAE's encoder and decoder share, computed by JAX layers through TorchAx.

diffusers' leaf modules (convolutions, norms) hold the parameters. Each `forward` passes them to the
JAX layers of `cogvideox.vae.layers.Layers` with `interop.call_jax`. Importing this module takes
seconds; only tracing needs it. See `cogvideox.vae.sharding` for the axis letters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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

from cogvideox.vae.layers import (
    ConvCache,
    ConvWeights,
    Layers,
    NormWeights,
    ResnetWeights,
    UpsampleWeights,
)
from cogvideox.vae.weights import MID_RESNETS


class TorchFeatures(NamedTuple):
    """`cogvideox.vae.layers.Features` as torch tensors."""

    x: torch.Tensor
    sums: torch.Tensor


def call_jax(function: Callable[..., object], *args: object) -> Any:
    """Calls a JAX function with torch tensors, alone or in trees; returns torch tensors."""
    return interop.call_jax(function, *args)  # pyright: ignore[reportArgumentType]


def conv_weights(module: torch.nn.Conv2d | torch.nn.Conv3d) -> ConvWeights:
    return ConvWeights(*interop.jax_view((module.weight, module.bias)))


def norm_weights(module: torch.nn.Module) -> NormWeights:
    if isinstance(module, torch.nn.GroupNorm):
        return NormWeights(*interop.jax_view((module.weight, module.bias)), eps=module.eps)
    assert isinstance(module, CogVideoXSpatialNorm3D)
    scale, bias = interop.jax_view((module.norm_layer.weight, module.norm_layer.bias))
    convs = conv_weights(module.conv_y.conv), conv_weights(module.conv_b.conv)
    return NormWeights(scale, bias, *convs)


def upsample_weights(module: CogVideoXUpsample3D) -> UpsampleWeights:
    return UpsampleWeights(conv_weights(module.conv), module.compress_time)


# Makes the norm of a number of channels: diffusers' spatial norm, or torch's group norm.
MakeNorm = Callable[[int], torch.nn.Module]


class ResnetBlock3D(torch.nn.Module):
    """Applies norm, activation and convolution twice, around a shortcut.

    Source: CogVideoXResnetBlock3D.
    """

    def __init__(
        self, in_channels: int, out_channels: int, make_norm: MakeNorm, layers: Layers
    ) -> None:
        super().__init__()
        self.layers = layers
        self.norm1 = make_norm(in_channels)
        self.conv1 = CogVideoXCausalConv3d(in_channels, out_channels, kernel_size=3)
        self.norm2 = make_norm(out_channels)
        self.conv2 = CogVideoXCausalConv3d(out_channels, out_channels, kernel_size=3)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = CogVideoXSafeConv3d(in_channels, out_channels, kernel_size=1)

    def forward(
        self,
        features: TorchFeatures,
        z: torch.Tensor | None,
        caches: ConvCache,
        upsampler: CogVideoXUpsample3D | None = None,
    ) -> tuple[TorchFeatures, ConvCache]:
        """Applies the block to `features`, which `upsampler` doubles first if there is one."""
        weights = ResnetWeights(
            norm_weights(self.norm1),
            conv_weights(self.conv1.conv),
            norm_weights(self.norm2),
            conv_weights(self.conv2.conv),
            None if self.conv_shortcut is None else conv_weights(self.conv_shortcut),
        )
        upsample = None if upsampler is None else upsample_weights(upsampler)
        return call_jax(self.layers.resnet, features, z, weights, caches, upsample)


class MidBlock3D(torch.nn.Module):
    """Applies the resnets at the resolution of the latents. Source: CogVideoXMidBlock3D."""

    def __init__(self, channels: int, make_norm: MakeNorm, layers: Layers) -> None:
        super().__init__()
        self.resnets = torch.nn.ModuleList(
            ResnetBlock3D(channels, channels, make_norm, layers) for _ in range(MID_RESNETS)
        )

    def forward(
        self, features: TorchFeatures, z: torch.Tensor | None, caches: list[ConvCache]
    ) -> tuple[TorchFeatures, list[ConvCache]]:
        new = []
        for i, (resnet, cache) in enumerate(zip(self.resnets, caches, strict=True)):
            with jax.named_scope(f"resnets.{i}"):
                features, cache = resnet(features, z, cache)
            new.append(cache)
        return features, new


def forward_of(build_model: Callable[[], torch.nn.Module]) -> Callable:
    """Returns (weights by diffusers' names, inputs, caches) -> what the model makes of them.

    Args:
        build_model: makes the model, with parameters on the meta device.
    """
    torchax.default_env()  # makes an array, which must not become part of the traced program
    model = build_model()

    def forward(
        weights: dict[str, torch.Tensor], inputs: torch.Tensor, caches: ConvCache
    ) -> object:
        return torch.func.functional_call(model, weights, (inputs, caches))

    return interop.jax_view(forward)
