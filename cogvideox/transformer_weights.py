"""The transformer's parameters: their shapes, their checks, and the load into shards.

Needs neither torch nor diffusers, whose imports would take longer than reading the weights.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cogvideox.block import ACTIVATIONS, GATED
from cogvideox.checkpoint import StoredTensor, check_names_and_shapes
from cogvideox.qk_norm import rotary_halves
from cogvideox.sharding import parameter_specs

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
# The rows of these are reordered: each shard needs both halves of its gates, and rotary pairs lie
# half a head apart (see cogvideox/block.py).
_GATED = re.compile(r"transformer_blocks\.ff\.net\.0\.proj\.(weight|bias)")
_ROTATED = re.compile(r"transformer_blocks\.attn1\.(to_q|to_k|norm_q|norm_k)\.(weight|bias)")
# Threads that copy layers from mapped files, and that send whole parameters to the devices.
_READERS, _SENDERS = 32, 2
# Parameters in host buffers at once, of up to 3.2 GB.
_ON_THE_WAY = 4


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the checkpoint by name, from the config alone.

    Source: diffusers' CogVideoXTransformer3DModel, whose state_dict a test compares.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    time, affine = config["time_embed_dim"], config["norm_elementwise_affine"]
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, inputs)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, size: int, elementwise: bool) -> None:
        if elementwise:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    if patch_t is None:
        shapes["patch_embed.proj.weight"] = (width, config["in_channels"], patch, patch)
        if config["patch_bias"]:
            shapes["patch_embed.proj.bias"] = (width,)
    else:
        linear("patch_embed.proj", width, config["in_channels"] * patch * patch * patch_t)
    linear("patch_embed.text_proj", width, config["text_embed_dim"])
    linear("time_embedding.linear_1", time, width)
    linear("time_embedding.linear_2", time, time)
    hidden = 4 * width
    for layer in range(config["num_layers"]):
        block = f"transformer_blocks.{layer}"
        for number in (1, 2):
            linear(f"{block}.norm{number}.linear", 6 * width, time)
            norm(f"{block}.norm{number}.norm", width, affine)
        for name in ("norm_q", "norm_k"):
            norm(f"{block}.attn1.{name}", config["attention_head_dim"], True)
        for name in ("to_q", "to_k", "to_v"):
            linear(f"{block}.attn1.{name}", width, width, config["attention_bias"])
        linear(f"{block}.attn1.to_out.0", width, width)
        gated = config["activation_fn"] in GATED
        linear(f"{block}.ff.net.0.proj", 2 * hidden if gated else hidden, width)
        linear(f"{block}.ff.net.2", width, hidden)
    norm("norm_final", width, affine)
    linear("norm_out.linear", 2 * width, time)
    norm("norm_out.norm", width, affine)
    linear("proj_out", config["out_channels"] * patch * patch * (patch_t or 1), width)
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


# A part of a stored tensor, its rows in the order that the block wants.
RowOrder = Callable[[np.ndarray, tuple[slice, ...]], np.ndarray]


def _in_order(tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return tensor[index]


def _rotary_order(head_dim: int, tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return rotary_halves(tensor[index], head_dim)


def _gated_order(tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """Of a shard's rows, one half from each half of the tensor."""
    start, stop, _ = index[0].indices(tensor.shape[0])
    middle = tensor.shape[0] // 2
    halves = [slice(first + start // 2, first + stop // 2) for first in (0, middle)]
    return np.concatenate([tensor[(rows, *index[1:])] for rows in halves])


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

    def order(name: str) -> RowOrder:
        if _ROTATED.fullmatch(name):
            return functools.partial(_rotary_order, config["attention_head_dim"])
        if _GATED.fullmatch(name) and config["activation_fn"] in GATED:
            return _gated_order
        return _in_order

    loaded: dict[str, Future] = {}
    on_the_way: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(_SENDERS) as senders:
        # The largest first: the last transfer is the one that nothing hides.
        for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
            if len(on_the_way) == _ON_THE_WAY:
                on_the_way.popleft().result().block_until_ready()
            sharding = NamedSharding(mesh, specs[name])
            sources = _sources(name, stored)
            shards = _read_shards(sources, shapes[name], sharding, dtype, order(name), readers)
            loaded[name] = senders.submit(_send, shards, shapes[name], sharding)
            on_the_way.append(loaded[name])
            del shards  # freed when it has been sent
        return {name: loaded[name].result() for name in shapes}


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


def _read_shards(
    source: StoredTensor | list[StoredTensor],
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: jnp.dtype,
    order: RowOrder,
    readers: ThreadPoolExecutor,
) -> list[tuple[np.ndarray, list[jax.Device]]]:
    """A parameter's shards and who holds them; `order` gives the rows of a stacked one."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        index = tuple(slice(*bound) for bound in bounds)
        shard = np.empty(sharding.shard_shape(shape), dtype)
        if isinstance(source, list):

            def copy_layer(layer: int, shard=shard, index=index) -> None:
                shard[layer] = order(source[layer].mapped(), index[1:])

            list(readers.map(copy_layer, range(len(source))))
        else:
            shard[...] = source.mapped()[index]
        shards.append((shard, devices))
    return shards


def _send(
    shards: list[tuple[np.ndarray, list[jax.Device]]],
    shape: tuple[int, ...],
    sharding: NamedSharding,
) -> jax.Array:
    """Starts the copies to the devices."""
    placed = [jax.device_put(shard, device) for shard, devices in shards for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)
