"""Flax NNX modules that the VAE's encoder and decoder share, and the names of their parameters.

`cogvideox.vae.layers.Layers` does the arithmetic. See `cogvideox.vae.sharding` for the axis
letters.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from cogvideox.vae.layers import (
    ConvCache,
    ConvWeights,
    Features,
    Layers,
    NormWeights,
    ResnetWeights,
    UpsampleWeights,
)
from cogvideox.vae.weights import arranged_shape


def _parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


class Conv(nnx.Module):
    """Holds the weights of a convolution, in the order of `cogvideox.vae.weights.arrange`."""

    def __init__(
        self, channels: int, out_channels: int, *size: int, downsampler: bool = False
    ) -> None:
        shape = arranged_shape((out_channels, channels, *size), downsampler)
        self.weight = _parameter(*shape)
        self.bias = _parameter(out_channels)

    def weights(self) -> ConvWeights:
        return ConvWeights(self.weight[...], self.bias[...])


class GroupNorm(nnx.Module):
    """Holds the weights of a group norm."""

    def __init__(self, channels: int, eps: float) -> None:
        self.scale = _parameter(channels)
        self.bias = _parameter(channels)
        self.eps = eps

    def weights(self) -> NormWeights:
        return NormWeights(self.scale[...], self.bias[...], eps=self.eps)


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


# Makes the norm of a number of channels.
MakeNorm = Callable[[int], GroupNorm | SpatialNorm]


class Resnet(nnx.Module):
    """Applies norm, activation and convolution twice, around a shortcut."""

    def __init__(self, channels: int, out_channels: int, make_norm: MakeNorm) -> None:
        self.norm1 = make_norm(channels)
        self.conv1 = Conv(channels, out_channels, 3, 3, 3)
        self.norm2 = make_norm(out_channels)
        self.conv2 = Conv(out_channels, out_channels, 3, 3, 3)
        change = channels != out_channels
        self.shortcut = Conv(channels, out_channels, 1, 1, 1) if change else None

    def __call__(
        self,
        features: Features,
        z: jax.Array | None,
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


def named_parameters(modules: Iterable[tuple[str, nnx.Module]]) -> dict[str, nnx.Param]:
    """Returns each parameter by the name of its weight in a VAE folder.

    Args:
        modules: every module that owns weights, with diffusers' name for it.
    """
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
        elif isinstance(module, GroupNorm):
            named[f"{name}.weight"] = module.scale
            named[f"{name}.bias"] = module.bias
        elif isinstance(module, Conv):
            named[f"{name}.weight"] = module.weight
            named[f"{name}.bias"] = module.bias
        else:
            raise TypeError(f"{name}: {type(module).__name__} holds no weights")

    for name, module in modules:
        add(name, module)
    return named


def forward_of[Model: Callable](
    abstract_model: Callable[[], Model],
    parameters_of: Callable[[Model], Mapping[str, nnx.Param]],
    layers: Layers,
) -> Callable:
    """Returns (weights by diffusers' names, inputs, caches) -> what the model makes of them.

    Args:
        abstract_model: makes the model with abstract parameters.
        parameters_of: returns its parameters by the names of their weights.
    """

    def forward(weights: Mapping[str, jax.Array], inputs: jax.Array, caches: ConvCache) -> object:
        model = abstract_model()
        for name, parameter in parameters_of(model).items():
            parameter.set_value(weights[name])
        return model(inputs, caches, layers)

    return forward
