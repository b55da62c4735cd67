"""The VAE decoder through TorchAx: diffusers' module tree, its leaves computed in JAX.

`CogVideoXDecoder3D` is built on torch's meta device and called functionally with JAX arrays under
torchax. What its resnets, upsamplers and convolutions compute comes from `vae_ops`; what remains of
torch is the structure, the names, the order of the blocks and the way of the caches, none of which
cares about the layout of the arrays.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchax import interop

from cogvideox import vae_ops
from cogvideox.vae_decode import Decoder, Forward, width_mesh
from cogvideox.vae_ops import WidthShards
from cogvideox.vae_weights import VaeConfig, read_weights


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


def _meta_module(config: VaeConfig) -> _DecoderWithLatentConv:
    with torch.device("meta"):
        return _DecoderWithLatentConv(config).eval()


def _conv(module: torch.nn.Module) -> vae_ops.Conv:
    """torch's weight [C', C, K...] as [K..., C, C'], with the width before the height.

    Kernels of one voxel become matrices.
    """
    weight, bias = interop.jax_view((module.weight, module.bias))
    if set(weight.shape[2:]) == {1}:
        return vae_ops.Conv(weight.reshape(weight.shape[:2]).T, bias)
    frames = tuple(range(2, weight.ndim - 2))
    order = (*frames, weight.ndim - 1, weight.ndim - 2, 1, 0)
    return vae_ops.Conv(weight.transpose(order), bias)


def _norm(module: CogVideoXSpatialNorm3D) -> vae_ops.Norm:
    scale, bias = interop.jax_view((module.norm_layer.weight, module.norm_layer.bias))
    return vae_ops.Norm(scale, bias, _conv(module.conv_y.conv), _conv(module.conv_b.conv))


def _compute_in_jax(module: _DecoderWithLatentConv, shards: WidthShards) -> None:
    """Give the modules below `module` their JAX computation; instances only, never classes.

    An upsampler, and the last norm and activation, are computed together with the module that
    follows them, and themselves pass on what they get.
    """
    decoder = module.decoder
    if module.post_quant_conv is not None:
        module.post_quant_conv.forward = _pointwise(module.post_quant_conv)
    decoder.conv_in.forward = _causal_conv(decoder.conv_in, shards)
    for resnet in decoder.mid_block.resnets:
        resnet.forward = _resnet(resnet, None, shards)
    upsampler = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            resnet.forward = _resnet(resnet, upsampler, shards)
            upsampler = None
        if block.upsamplers is not None:
            (upsampler,) = block.upsamplers
            upsampler.forward = _pass_on
    decoder.norm_out.forward = _pair_with_latents
    decoder.conv_act.forward = _pass_on
    decoder.conv_out.forward = _last_conv(decoder.norm_out, decoder.conv_out, shards)


def _pass_on(inputs):
    return inputs


def _pointwise(module: CogVideoXSafeConv3d):
    def forward(inputs):
        return interop.call_jax(lambda x: vae_ops.pointwise(x, _conv(module)), inputs)

    return forward


def _causal_conv(module: CogVideoXCausalConv3d, shards: WidthShards):
    def compute(x, cache):
        return vae_ops.causal_conv(x, _conv(module.conv), cache, shards)

    def forward(inputs, conv_cache=None):
        return interop.call_jax(compute, inputs, conv_cache)

    return forward


def _resnet(
    module: CogVideoXResnetBlock3D, upsampler: CogVideoXUpsample3D | None, shards: WidthShards
):
    groups = module.norm1.norm_layer.num_groups

    def compute(x, z, caches):
        weights = vae_ops.Resnet(
            _norm(module.norm1),
            _conv(module.conv1.conv),
            _norm(module.norm2),
            _conv(module.conv2.conv),
            _conv(module.conv_shortcut) if module.in_channels != module.out_channels else None,
        )
        upsample = None
        if upsampler is not None:
            upsample = vae_ops.Upsample(_conv(upsampler.conv), upsampler.compress_time)
        return vae_ops.resnet(x, z, weights, caches, groups, shards, upsample)

    def forward(inputs, temb, zq, conv_cache=None):
        return interop.call_jax(compute, inputs, zq, conv_cache)

    return forward


def _pair_with_latents(f, zq, conv_cache=None):
    return (f, zq), None


def _last_conv(norm: CogVideoXSpatialNorm3D, module: CogVideoXCausalConv3d, shards: WidthShards):
    groups = norm.norm_layer.num_groups

    def compute(x, z, cache):
        video = vae_ops.Video(x, None, shards)
        weights = _norm(norm), _conv(module.conv)
        out, cache, _ = vae_ops.norm_conv(video, video.sums(), z, *weights, cache, groups)
        return out, cache

    def forward(inputs, conv_cache=None):
        return interop.call_jax(compute, *inputs, conv_cache)

    return forward


def build_forward(config: VaeConfig, shards: WidthShards) -> Forward:
    """The decoder's computation on one device's columns; weights by diffusers' names."""
    module = _meta_module(config)
    _compute_in_jax(module, shards)

    def forward(weights, latents, cache):
        return torch.func.functional_call(module, weights, (latents, cache))

    return interop.jax_view(forward)


def weight_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by diffusers' name."""
    return {name: tuple(t.shape) for name, t in _meta_module(config).state_dict().items()}


def _decoder(config: VaeConfig, mesh: Mesh, dtype: jnp.dtype, weights: Any) -> Decoder:
    torchax.default_env()  # torchax changes JAX's configuration when first used
    return Decoder(config, mesh, dtype, weights, lambda shards: build_forward(config, shards))


def abstract_decoder(config: VaeConfig, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """A decoder that compiles but holds no weights, for any mesh, also of absent devices."""
    mesh = width_mesh(mesh)
    replicated = NamedSharding(mesh, P())
    weights = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)
        for name, shape in weight_shapes(config).items()
    }
    return _decoder(config, mesh, dtype, weights)


def load_decoder(vae_folder: Path, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """Read a VAE folder and place the decoder's weights on every device of `mesh`.

    Args:
        vae_folder: diffusers' layout: config.json and safetensors.
        mesh: its axes are used as one, to split the width.
        dtype: bfloat16 or float32.

    Raises:
        ValueError: the config cannot be decoded, or weights do not fit it.
    """
    config = VaeConfig.from_folder(vae_folder)
    mesh = width_mesh(mesh)
    arrays = read_weights(vae_folder, weight_shapes(config))
    replicated = NamedSharding(mesh, P())
    weights = {
        name: jax.device_put(np.asarray(array, dtype=dtype), replicated)
        for name, array in arrays.items()
    }
    return _decoder(config, mesh, dtype, weights)
