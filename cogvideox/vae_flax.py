"""The VAE decoder in Flax NNX, and the map of its weights from diffusers' names.

The structure follows `CogVideoXDecoder3D`; the arithmetic is `vae_ops`, on one device's columns.
Arrays are [B, T, W, H, C].
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox import vae_ops
from cogvideox.vae_decode import Decoder, Forward, width_mesh
from cogvideox.vae_ops import WidthShards
from cogvideox.vae_weights import VaeConfig, read_weights

MID_RESNETS = 2  # CogVideoXDecoder3D fixes it

Caches = dict[str, Any]


def _parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


class Conv(nnx.Module):
    """The weights of a convolution: kernel [K..., C, C'] and bias [C']."""

    def __init__(self, *kernel_shape: int) -> None:
        self.kernel = _parameter(*kernel_shape)
        self.bias = _parameter(kernel_shape[-1])

    def weights(self) -> vae_ops.Conv:
        return vae_ops.Conv(self.kernel[...], self.bias[...])


class SpatialNorm(nnx.Module):
    """The weights of a group normalisation that the latents scale and shift."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        self.scale = _parameter(channels)
        self.bias = _parameter(channels)
        self.multiplier = Conv(latent_channels, channels)
        self.summand = Conv(latent_channels, channels)

    def weights(self) -> vae_ops.Norm:
        convs = self.multiplier.weights(), self.summand.weights()
        return vae_ops.Norm(self.scale[...], self.bias[...], *convs)


class Resnet(nnx.Module):
    """Norm, activation, convolution, twice, around a shortcut."""

    def __init__(self, channels: int, out_channels: int, config: VaeConfig) -> None:
        self.groups = config.norm_num_groups
        self.norm1 = SpatialNorm(channels, config.latent_channels)
        self.conv1 = Conv(3, 3, 3, channels, out_channels)
        self.norm2 = SpatialNorm(out_channels, config.latent_channels)
        self.conv2 = Conv(3, 3, 3, out_channels, out_channels)
        change = channels != out_channels
        self.shortcut = Conv(channels, out_channels) if change else None

    def __call__(
        self,
        x: jax.Array,
        z: jax.Array,
        caches: Any,
        shards: WidthShards,
        upsample: vae_ops.Upsample | None = None,
    ) -> tuple[jax.Array, Any]:
        weights = vae_ops.Resnet(
            self.norm1.weights(),
            self.conv1.weights(),
            self.norm2.weights(),
            self.conv2.weights(),
            None if self.shortcut is None else self.shortcut.weights(),
        )
        return vae_ops.resnet(x, z, weights, caches, self.groups, shards, upsample)


class Upsample(nnx.Module):
    """Twice the width and height, and where asked twice the frames."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        self.compress_time = compress_time
        self.conv = Conv(3, 3, channels, channels)

    def weights(self) -> vae_ops.Upsample:
        return vae_ops.Upsample(self.conv.weights(), self.compress_time)


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
        self, x: jax.Array, z: jax.Array, caches: list[Any], shards: WidthShards
    ) -> tuple[jax.Array, list[Any]]:
        upsample = None if self.upsample is None else self.upsample.weights()
        new = []
        for resnet, cache in zip(self.resnets, caches, strict=True):
            x, cache = resnet(x, z, cache, shards, upsample)
            new.append(cache)
            upsample = None
        return x, new


class VaeDecoder(nnx.Module):
    """Latents to video; see `__call__`."""

    def __init__(self, config: VaeConfig) -> None:
        channels = config.block_out_channels[::-1]
        latent = config.latent_channels
        self.groups = config.norm_num_groups
        self.latent_conv = Conv(latent, latent) if config.use_post_quant_conv else None
        self.conv_in = Conv(3, 3, 3, latent, channels[0])
        self.mid = nnx.List(Resnet(channels[0], channels[0], config) for _ in range(MID_RESNETS))
        self.up = nnx.List(UpBlock(level, config) for level in range(len(channels)))
        self.norm_out = SpatialNorm(channels[-1], latent)
        self.conv_out = Conv(3, 3, 3, channels[-1], config.out_channels)

    def __call__(
        self, z: jax.Array, caches: Caches | None, shards: WidthShards
    ) -> tuple[jax.Array, Caches]:
        """Decode a batch of frames.

        Args:
            z: scaled latents [B, T, W, H, Z].
            caches: what the convolutions keep of the batch before; None for the first.
            shards: how the width is split.

        Returns:
            Video [B, F, W s, H s, 3] in about -1..1, and the caches for the next batch.
        """
        old = caches or {
            "conv_in": None,
            "mid": [None] * len(self.mid),
            "up": [[None] * len(block.resnets) for block in self.up],
            "conv_out": None,
        }
        new: Caches = {"mid": [], "up": []}
        if self.latent_conv is not None:
            z = vae_ops.pointwise(z, self.latent_conv.weights())
        x, new["conv_in"] = vae_ops.causal_conv(z, self.conv_in.weights(), old["conv_in"], shards)
        for resnet, cache in zip(self.mid, old["mid"], strict=True):
            x, cache = resnet(x, z, cache, shards)
            new["mid"].append(cache)
        for block, cache in zip(self.up, old["up"], strict=True):
            x, cache = block(x, z, cache, shards)
            new["up"].append(cache)
        video = vae_ops.Video(x, None, shards)
        norm, conv = self.norm_out.weights(), self.conv_out.weights()
        x, new["conv_out"], _ = vae_ops.norm_conv(
            video, video.sums(), z, norm, conv, old["conv_out"], self.groups
        )
        return x, new


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
    """Each of the decoder's parameters under the name of its weight in a VAE folder."""
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
            named[f"{name}.weight"] = module.kernel
            named[f"{name}.bias"] = module.bias

    for name, module in _modules_by_diffusers_name(decoder):
        add(name, module)
    return named


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape diffusers stores for a parameter of ours (see `from_torch`)."""
    if len(shape) == 1:
        return shape
    *spatial, channels, out_channels = shape
    return (out_channels, channels, *(spatial or (1, 1, 1)))


def from_torch(weight: np.ndarray, ndim: int) -> np.ndarray:
    """diffusers' weight as ours with `ndim` axes.

    Convolutions [C', C, (frames,) height, width] become [(frames,) width, height, C, C'], 1x1x1
    ones [C, C']; vectors stay.
    """
    if weight.ndim == 1:
        return weight
    if ndim == 2:
        return weight[:, :, 0, 0, 0].T
    frames = tuple(range(2, weight.ndim - 2))
    return weight.transpose(*frames, weight.ndim - 1, weight.ndim - 2, 1, 0)


def _abstract_model(config: VaeConfig) -> VaeDecoder:
    return nnx.eval_shape(lambda: VaeDecoder(config))


def _decoder(config: VaeConfig, mesh: Mesh, dtype: jnp.dtype, model: VaeDecoder) -> Decoder:
    graph, state = nnx.split(model)

    def build_forward(shards: WidthShards) -> Forward:
        return lambda weights, z, caches: nnx.merge(graph, weights)(z, caches, shards)

    return Decoder(config, mesh, dtype, state, build_forward)


def abstract_decoder(config: VaeConfig, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """A decoder that compiles but holds no weights, for any mesh, also of absent devices."""
    mesh = width_mesh(mesh)
    replicated = NamedSharding(mesh, P())
    model = _abstract_model(config)
    for parameter in parameters_by_diffusers_name(model).values():
        parameter.set_value(jax.ShapeDtypeStruct(parameter.shape, dtype, sharding=replicated))
    return _decoder(config, mesh, dtype, model)


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
    replicated = NamedSharding(mesh, P())
    model = _abstract_model(config)
    parameters = parameters_by_diffusers_name(model)
    arrays = read_weights(vae_folder, {k: torch_shape(p.shape) for k, p in parameters.items()})
    for name, parameter in parameters.items():
        array = np.asarray(from_torch(arrays[name], parameter.ndim), dtype=dtype)
        parameter.set_value(jax.device_put(array, replicated))
    return _decoder(config, mesh, dtype, model)
