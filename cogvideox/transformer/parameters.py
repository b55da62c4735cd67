"""The transformer's parameters: their shapes, their places and their checks.

Needs neither torch nor diffusers, whose imports would take longer than reading the weights.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cogvideox.model.config import TransformerConfig
from cogvideox.model.folder import StoredTensor, check_names_and_shapes
from cogvideox.transformer.block import ACTIVATIONS, GATED
from cogvideox.transformer.sharding import parameter_specs

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the checkpoint by name, from the config alone.

    Source: diffusers' CogVideoXTransformer3DModel, whose state_dict a test compares.
    """
    width = config.width
    time, affine = config.time_embed_dim, config.norm_elementwise_affine
    patch, patch_t = config.patch_size, config.patch_size_t
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, inputs)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, size: int, elementwise: bool) -> None:
        if elementwise:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    if patch_t is None:
        shapes["patch_embed.proj.weight"] = (width, config.in_channels, patch, patch)
        if config.patch_bias:
            shapes["patch_embed.proj.bias"] = (width,)
    else:
        linear("patch_embed.proj", width, config.in_channels * patch * patch * patch_t)
    linear("patch_embed.text_proj", width, config.text_embed_dim)
    linear("time_embedding.linear_1", time, width)
    linear("time_embedding.linear_2", time, time)
    hidden = 4 * width
    for layer in range(config.num_layers):
        block = f"transformer_blocks.{layer}"
        for number in (1, 2):
            linear(f"{block}.norm{number}.linear", 6 * width, time)
            norm(f"{block}.norm{number}.norm", width, affine)
        for name in ("norm_q", "norm_k"):
            norm(f"{block}.attn1.{name}", config.attention_head_dim, True)
        for name in ("to_q", "to_k", "to_v"):
            linear(f"{block}.attn1.{name}", width, width, config.attention_bias)
        linear(f"{block}.attn1.to_out.0", width, width)
        gated = config.activation_fn in GATED
        linear(f"{block}.ff.net.0.proj", 2 * hidden if gated else hidden, width)
        linear(f"{block}.ff.net.2", width, hidden)
    norm("norm_final", width, affine)
    linear("norm_out.linear", 2 * width, time)
    norm("norm_out.norm", width, affine)
    linear("proj_out", config.out_channels * patch * patch * (patch_t or 1), width)
    return shapes


def stack_shapes(shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> dict[str, tuple]:
    """Checkpoint shapes to those of the stacked parameters: blocks gain a leading axis [L]."""
    stacked = {}
    for name, shape in shapes.items():
        match = _BLOCK.fullmatch(name)
        if match:
            stacked[f"transformer_blocks.{match[2]}"] = (num_layers, *shape)
        else:
            stacked[name] = shape
    return stacked


def abstract_parameters(
    config: TransformerConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype
) -> dict[str, jax.ShapeDtypeStruct]:
    """The stacked parameters as `weight_loading` places them, without any weight."""
    shapes = stack_shapes(parameter_shapes(config), config.num_layers)
    return {
        name: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=NamedSharding(mesh, spec))
        for name, spec in parameter_specs(shapes).items()
    }


def check_weights(config: TransformerConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Holds the files' headers against the config's module and the sharding table.

    Raises:
        ValueError: listing every missing, extra or misshapen weight, or every gap in the table.
    """
    if config.activation_fn not in ACTIVATIONS:
        raise ValueError(
            f"the transformer's activation_fn is {config.activation_fn!r}; "
            f"known: {', '.join(ACTIVATIONS)}"
        )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"the transformer makes {config.out_channels} channels of {config.in_channels}; "
            "text-to-video models have as many out as in"
        )
    shapes = parameter_shapes(config)
    check_names_and_shapes(stored, shapes, what="the transformer")
    parameter_specs(stack_shapes(shapes, config.num_layers))
