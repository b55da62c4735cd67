"""The VAE decoder through TorchAx: diffusers' module tree, its leaves computed in JAX.

`CogVideoXDecoder3D` is built on torch's meta device and called functionally with JAX arrays under
torchax. What its leaf modules compute (causal convolutions, spatial norms, upsamplers) comes from
`vae_ops`; what remains of torch is the structure, the names, the activations and the sums between
leaves, none of which cares about the layout of the arrays.
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


def _kernel(weight: jax.Array) -> jax.Array:
    """torch's [C', C, K...] -> [K..., C, C'], with the width before the height."""
    spatial = tuple(range(2, weight.ndim))
    width_first = (*spatial[:-2], spatial[-1], spatial[-2])
    return weight.transpose(*width_first, 1, 0)


def _matrix(weight: jax.Array) -> jax.Array:
    """torch's [C', C, 1, 1, 1] -> [C, C']."""
    return weight[:, :, 0, 0, 0].T


def _compute_in_jax(module: torch.nn.Module, shards: WidthShards) -> None:
    """Give every leaf below `module` its JAX computation; instances only, never classes."""
    for child in module.children():
        if isinstance(child, CogVideoXCausalConv3d):
            child.forward = _causal_conv(child, shards)
        elif isinstance(child, CogVideoXSafeConv3d):
            child.forward = _pointwise(child)
        elif isinstance(child, CogVideoXSpatialNorm3D):
            child.forward = _spatial_norm(child, shards)
        elif isinstance(child, CogVideoXUpsample3D):
            child.forward = _upsample(child, shards)
        else:
            _compute_in_jax(child, shards)


def _causal_conv(module: CogVideoXCausalConv3d, shards: WidthShards):
    def compute(x, weight, bias, cache):
        return vae_ops.causal_conv(x, _kernel(weight), bias, cache, shards)

    def forward(inputs, conv_cache=None):
        conv = module.conv
        return interop.call_jax(compute, inputs, conv.weight, conv.bias, conv_cache)

    return forward


def _pointwise(module: CogVideoXSafeConv3d):
    def compute(x, weight, bias):
        return vae_ops.pointwise(x, _matrix(weight), bias)

    def forward(inputs):
        return interop.call_jax(compute, inputs, module.weight, module.bias)

    return forward


def _spatial_norm(module: CogVideoXSpatialNorm3D, shards: WidthShards):
    groups = module.norm_layer.num_groups

    def compute(x, z, norm_scale, norm_bias, weight_y, bias_y, weight_b, bias_b):
        kernel_y, kernel_b = _matrix(weight_y), _matrix(weight_b)
        return vae_ops.spatial_norm(
            x, z, norm_scale, norm_bias, kernel_y, bias_y, kernel_b, bias_b, groups, shards
        )

    def forward(f, zq, conv_cache=None):
        norm, y, b = module.norm_layer, module.conv_y.conv, module.conv_b.conv
        parameters = (norm.weight, norm.bias, y.weight, y.bias, b.weight, b.bias)
        # diffusers caches the latents of 1x1x1 convolutions, which never look back.
        return interop.call_jax(compute, f, zq, *parameters), {}

    return forward


def _upsample(module: CogVideoXUpsample3D, shards: WidthShards):
    def compute(x, weight, bias):
        return vae_ops.upsample(x, _kernel(weight), bias, module.compress_time, shards)

    def forward(inputs):
        return interop.call_jax(compute, inputs, module.conv.weight, module.conv.bias)

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
