"""The VAE decoder through TorchAx: diffusers' module tree, its leaves computed in JAX.

`CogVideoXDecoder3D` is built on torch's meta device and called functionally with JAX arrays under
torchax. What its resnets, upsamplers and convolutions compute comes from `vae_parts.Layers`; what
remains of torch is the structure, the names, the order of the blocks and the way of the caches,
none of which cares about the layout of the arrays. Importing this takes seconds; tracing needs it.
"""

from typing import Any

import torch
import torchax
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torchax import interop

from cogvideox.model.config import VaeConfig
from cogvideox.vae import layers as vae_parts
from cogvideox.vae.decode import Forward


class _DecoderWithLatentConv(torch.nn.Module):
    """The parts of AutoencoderKLCogVideoX that decode, under its names."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.decoder = CogVideoXDecoder3D(
            in_channels=config.latent_channels,
            out_channels=config.out_channels,
            up_block_types=config.up_block_types,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            act_fn=config.act_fn,
            norm_num_groups=config.norm_num_groups,
            temporal_compression_ratio=config.temporal_compression_ratio,
        )
        self.post_quant_conv = None
        if config.use_post_quant_conv:
            self.post_quant_conv = CogVideoXSafeConv3d(config.out_channels, config.out_channels, 1)

    def forward(self, latents: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents, conv_cache=cache)


def _conv(module: torch.nn.Module) -> vae_parts.Conv:
    return vae_parts.Conv(*interop.jax_view((module.weight, module.bias)))


def _norm(module: CogVideoXSpatialNorm3D) -> vae_parts.Norm:
    scale, bias = interop.jax_view((module.norm_layer.weight, module.norm_layer.bias))
    return vae_parts.Norm(scale, bias, _conv(module.conv_y.conv), _conv(module.conv_b.conv))


def _compute_in_jax(module: _DecoderWithLatentConv, layers: vae_parts.Layers) -> None:
    """Give the modules below `module` their JAX computation; instances only, never classes.

    What travels between them as diffusers' hidden states are `vae_parts.Features`. An upsampler,
    and the last norm and activation, are computed together with the module that follows them, and
    themselves pass on what they get.
    """
    decoder = module.decoder
    if module.post_quant_conv is not None:
        module.post_quant_conv.forward = _pointwise(module.post_quant_conv)
    decoder.conv_in.forward = _first_conv(decoder.conv_in, layers)
    for resnet in decoder.mid_block.resnets:
        resnet.forward = _resnet(resnet, None, layers)
    upsampler = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            resnet.forward = _resnet(resnet, upsampler, layers)
            upsampler = None
        if block.upsamplers is not None:
            (upsampler,) = block.upsamplers
            upsampler.forward = _pass_on
    decoder.norm_out.forward = _pair_with_latents
    decoder.conv_act.forward = _pass_on
    decoder.conv_out.forward = _last_conv(decoder.norm_out, decoder.conv_out, layers)


def _pass_on(inputs):
    return inputs


def _pair_with_latents(f, zq, conv_cache=None):
    return (f, zq), None


def _pointwise(module: CogVideoXSafeConv3d):
    def forward(inputs):
        return interop.call_jax(lambda x: vae_parts.pointwise(x, _conv(module)), inputs)

    return forward


def _first_conv(module: CogVideoXCausalConv3d, layers: vae_parts.Layers):
    def compute(z, cache):
        return layers.first_conv(z, _conv(module.conv), cache)

    def forward(inputs, conv_cache=None):
        return interop.call_jax(compute, inputs, conv_cache)

    return forward


def _resnet(
    module: CogVideoXResnetBlock3D,
    upsampler: CogVideoXUpsample3D | None,
    layers: vae_parts.Layers,
):
    def compute(features, z, caches):
        weights = vae_parts.Resnet(
            _norm(module.norm1),
            _conv(module.conv1.conv),
            _norm(module.norm2),
            _conv(module.conv2.conv),
            _conv(module.conv_shortcut) if module.in_channels != module.out_channels else None,
        )
        upsample = None
        if upsampler is not None:
            upsample = vae_parts.Upsample(_conv(upsampler.conv), upsampler.compress_time)
        return layers.resnet(features, z, weights, caches, upsample)

    def forward(inputs, temb, zq, conv_cache=None):
        return interop.call_jax(compute, inputs, zq, conv_cache)

    return forward


def _last_conv(
    norm: CogVideoXSpatialNorm3D, module: CogVideoXCausalConv3d, layers: vae_parts.Layers
):
    def compute(features, z, cache):
        return layers.last_conv(features, z, _norm(norm), _conv(module.conv), cache)

    def forward(inputs, conv_cache=None):
        return interop.call_jax(compute, *inputs, conv_cache)

    return forward


def build_forward(config: VaeConfig, layers: vae_parts.Layers) -> Forward:
    """The decoder's computation on one device's columns; weights by diffusers' names."""
    torchax.default_env()  # makes an array, which must not be one of the program that is traced
    with torch.device("meta"):
        module = _DecoderWithLatentConv(config).eval()
    _compute_in_jax(module, layers)

    def forward(weights, latents, cache):
        return torch.func.functional_call(module, weights, (latents, cache))

    return interop.jax_view(forward)
