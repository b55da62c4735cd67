"""The diffusers transformer through TorchAx: abstract parameters, sharded load, one forward.

The module is diffusers' own CogVideoXTransformer3DModel, built without weights. Its blocks are
replaced by one JAX block (cogvideox/block.py) that `lax.scan` runs over stacked weights of the same
names, so that the compiler sees a single block however deep the model is.
"""

import concurrent.futures
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax.interop
from jax.sharding import NamedSharding

from cogvideox.attention import AttentionKernel
from cogvideox.block import ACTIVATIONS, GATED, Block, text_rows_first
from cogvideox.checkpoint import StoredTensor, check_names_and_shapes
from cogvideox.qk_norm import rotary_halves
from cogvideox.sharding import parameter_specs
from cogvideox.tokens import TokenLayout

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
# The rows of these are reordered: each shard needs both halves of its gates, and rotary pairs lie
# half a head apart (see cogvideox/block.py).
_GATED = re.compile(r"transformer_blocks\.ff\.net\.0\.proj\.(weight|bias)")
_ROTATED = re.compile(r"transformer_blocks\.attn1\.(to_q|to_k|norm_q|norm_k)\.(weight|bias)")


class StackedBlocks(torch.nn.Module):
    """All transformer blocks as one `lax.scan` of a JAX block over stacked parameters.

    It stands in diffusers' module where the blocks were, with the names of their parameters.
    """

    def __init__(self, blocks: torch.nn.ModuleList, block: Block):
        super().__init__()
        for name, child in blocks[0].named_children():
            self.add_module(name, child)
        self._block = block

    def forward(self, hidden_states: torch.Tensor, *shared: Any) -> torch.Tensor:
        """Tokens [b, s, E] through all blocks; `shared` goes to every `Block` call."""

        def scan(stacked, x, *shared):
            return jax.lax.scan(lambda x, layer: (self._block(x, layer, *shared), None), x, stacked)

        stacked = dict(self.named_parameters())
        return torchax.interop.call_jax(scan, stacked, hidden_states, *shared)[0]


class TokenTransformer(diffusers.CogVideoXTransformer3DModel):
    """diffusers' transformer on the tokens of one device, its blocks stacked.

    Parameters and their names are diffusers'; only what cuts latents into patches is left out.
    """

    @classmethod
    def abstract(
        cls, config: Mapping[str, Any], layout: TokenLayout, kernel: AttentionKernel
    ) -> "TokenTransformer":
        """The module on the meta device."""
        with torch.device("meta"):
            module = cls.from_config(dict(config)).eval()
        block = Block(
            head_dim=config["attention_head_dim"],
            norm_eps=config["norm_eps"],
            activation=config["activation_fn"],
            text_tokens=layout.text,
            tokens=layout.tokens,
            kernel=kernel,
        )
        module.transformer_blocks = StackedBlocks(module.transformer_blocks, block)
        return module

    def forward(
        self,
        tokens: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicts on one device of a mesh, inside shard_map.

        Args:
            tokens: patches of the noisy latents [b, s, C], the device's rows; text rows are unused.
            encoder_hidden_states: [b, S_text, text_embed_dim], all of the text.
            timestep: [b].
            rotary, embedding: of `tokens.positions`, the device's rows.

        Returns:
            [b, s, C], of no meaning in text and padding rows.
        """
        temb = self.time_embedding(self.time_proj(timestep).to(tokens.dtype))
        projection = self.patch_embed.proj  # a strided convolution in 1.0, a linear layer in 1.5
        weight = projection.weight.flatten(1)
        video = torch.nn.functional.linear(tokens, weight, projection.bias)
        text = self.patch_embed.text_proj(encoder_hidden_states)
        hidden_states = torchax.interop.call_jax(text_rows_first, text, video)
        if embedding is not None:
            hidden_states = hidden_states + embedding.to(hidden_states.dtype)
        hidden_states = self.transformer_blocks(hidden_states, temb, rotary)
        hidden_states = self.norm_out(self.norm_final(hidden_states), temb=temb)
        return self.proj_out(hidden_states)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the checkpoint by name, from the config alone."""
    with torch.device("meta"):
        module = diffusers.CogVideoXTransformer3DModel.from_config(dict(config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


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


# Reads a part of a stored tensor, its rows in the order that the block wants.
RowOrder = Callable[[StoredTensor, tuple[slice, ...]], np.ndarray]


def _in_order(tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
    return tensor.read(index)


def _rotary_order(head_dim: int, tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
    return rotary_halves(tensor.read(index), head_dim)


def _gated_order(tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
    """Of a shard's rows, one half from each half of the tensor."""
    start, stop, _ = index[0].indices(tensor.shape[0])
    middle = tensor.shape[0] // 2
    halves = [slice(first + start // 2, first + stop // 2) for first in (0, middle)]
    return np.concatenate([tensor.read((rows, *index[1:])) for rows in halves])


def abstract_parameters(
    config: Mapping[str, Any], mesh: jax.sharding.Mesh, dtype: jnp.dtype
) -> dict[str, jax.ShapeDtypeStruct]:
    """The stacked parameters as `load_parameters` places them, without any weight."""
    shapes = stack_shapes(parameter_shapes(config), config["num_layers"])
    return {
        name: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=NamedSharding(mesh, spec))
        for name, spec in parameter_specs(shapes).items()
    }


def load_parameters(
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    mesh: jax.sharding.Mesh,
    dtype: jnp.dtype,
) -> dict[str, jax.Array]:
    """Reads the weights from mapped files straight into their shards.

    Every shard is assembled (layers stacked) in one host buffer of its own size, sent to the
    devices that hold it, and freed: the host never holds the model.

    Returns:
        The stacked parameters by name, placed as the sharding table says, in `dtype`.
    """
    shapes = stack_shapes(parameter_shapes(config), config["num_layers"])
    specs = parameter_specs(shapes)

    def load(name: str) -> jax.Array:
        sharding = NamedSharding(mesh, specs[name])
        order: RowOrder = _in_order
        if _ROTATED.fullmatch(name):
            order = functools.partial(_rotary_order, config["attention_head_dim"])
        elif _GATED.fullmatch(name) and config["activation_fn"] in GATED:
            order = _gated_order
        return _load_sharded(_sources(name, stored), shapes[name], sharding, dtype, order)

    # Two readers keep files and device copies busy; more would hold more buffers of up to 3.2 GB.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(shapes, pool.map(load, shapes), strict=True))


def check_weights(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """Holds the files' headers against the config's module and the sharding table.

    Raises:
        ValueError: listing every missing, extra or misshapen weight, or every gap in the table.
    """
    if config["activation_fn"] not in ACTIVATIONS:
        raise ValueError(
            f"the transformer's activation_fn is {config['activation_fn']!r}; "
            f"known: {', '.join(ACTIVATIONS)}"
        )
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"the transformer makes {config['out_channels']} channels of {config['in_channels']}; "
            "text-to-video models have as many out as in"
        )
    shapes = parameter_shapes(config)
    check_names_and_shapes(stored, shapes, what="the transformer")
    parameter_specs(stack_shapes(shapes, config["num_layers"]))


def _sources(name: str, stored: Mapping[str, StoredTensor]) -> StoredTensor | list[StoredTensor]:
    """The stored tensor of a parameter, or those of all its layers in order."""
    if name in stored:
        return stored[name]
    prefix, rest = name.split(".", 1)
    layers = []
    while (layer := stored.get(f"{prefix}.{len(layers)}.{rest}")) is not None:
        layers.append(layer)
    return layers


def _load_sharded(
    source: StoredTensor | list[StoredTensor],
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: jnp.dtype,
    order: RowOrder,
) -> jax.Array:
    """Reads a parameter shard by shard; `order` reads the rows of a stacked one."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        index = tuple(slice(*bound) for bound in bounds)
        if isinstance(source, list):
            shard = np.empty(sharding.shard_shape(shape), dtype)
            for layer, tensor in enumerate(source):
                shard[layer] = order(tensor, index[1:])
        else:
            shard = source.read(index).astype(dtype)
        shards += [jax.device_put(shard, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def predict(
    module: TokenTransformer,
    parameters: Mapping[str, jax.Array],
    tokens: jax.Array,
    prompt_embeds: jax.Array,
    timestep: jax.Array,
    positions: Mapping[str, Any],
) -> jax.Array:
    """`TokenTransformer.forward` on JAX arrays; `timestep` [] is the whole batch's."""

    def forward(parameters, *arguments, **positions):
        with torch.no_grad():
            return torch.func.functional_call(module, parameters, arguments, positions)

    timesteps = jnp.full(tokens.shape[0], timestep)
    return torchax.interop.call_torch(
        forward, dict(parameters), tokens, prompt_embeds, timesteps, **positions
    )
