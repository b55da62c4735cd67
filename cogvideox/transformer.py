"""The diffusers transformer through TorchAx: abstract parameters, sharded load, one forward.

The module is diffusers' own CogVideoXTransformer3DModel, built without weights. Its blocks are
replaced by one block that `lax.scan` runs over stacked weights, so that the compiler sees a single
block however deep the model is.
"""

import concurrent.futures
import re
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax.interop
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.attention import AttentionProcessor, Kernel
from cogvideox.checkpoint import StoredTensor, check_names_and_shapes
from cogvideox.settings import LatentShape
from cogvideox.sharding import parameter_specs

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


class StackedBlocks(torch.nn.Module):
    """All transformer blocks as one `lax.scan` over parameters stacked along a leading axis."""

    def __init__(self, block: torch.nn.Module, activations: NamedSharding):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self._block = [block]  # in a list, so that its parameters are registered only once
        self._activations = activations

    def __iter__(self) -> Iterator["StackedBlocks"]:
        yield self  # diffusers' forward loops over the blocks; this is all of them

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        image_rotary_emb=None,
        attention_kwargs=None,
    ):
        stacked = dict(self.named_parameters())
        return torchax.interop.call_jax(
            self._scan, stacked, hidden_states, encoder_hidden_states, temb, image_rotary_emb
        )

    def _scan(self, stacked, hidden_states, encoder_hidden_states, temb, rotary):
        def block(layer, *tokens):
            call = (*tokens, torchax.interop.torch_view(temb), torchax.interop.torch_view(rotary))
            return torch.func.functional_call(self._block[0], layer, call)

        def body(tokens, layer):
            tokens = torchax.interop.call_torch(block, layer, *tokens)
            return [jax.lax.with_sharding_constraint(x, self._activations) for x in tokens], None

        tokens, _ = jax.lax.scan(body, [hidden_states, encoder_hidden_states], stacked)
        return tuple(tokens)


def build_module(
    config: Mapping[str, Any], latents: LatentShape, kernel: Kernel, mesh: jax.sharding.Mesh
) -> diffusers.CogVideoXTransformer3DModel:
    """diffusers' transformer on the meta device, its blocks stacked, attending through `kernel`.

    The config's sample size becomes the run's, so that the sincos positions of the 1.0-2b model
    are an input (see `positions`) instead of being made anew in every step.
    """
    frames = (latents.frames - 1) * config["temporal_compression_ratio"] + 1
    sizes = {
        "sample_height": latents.height,
        "sample_width": latents.width,
        "sample_frames": frames,
    }
    with torch.device("meta"):
        module = diffusers.CogVideoXTransformer3DModel.from_config({**config, **sizes})
    block = module.transformer_blocks[0]
    block.attn1.set_processor(AttentionProcessor(kernel))
    module.transformer_blocks = StackedBlocks(block, NamedSharding(mesh, P("dp")))
    return module.eval()


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
        return _load_sharded(_sources(name, stored), shapes[name], sharding, dtype)

    # Four readers keep mapped files and host-to-device copies busy at once.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(shapes, pool.map(load, shapes), strict=True))


def check_weights(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """Holds the files' headers against the config's module and the sharding table.

    Raises:
        ValueError: listing every missing, extra or misshapen weight, or every gap in the table.
    """
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
) -> jax.Array:
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        index = tuple(slice(*bound) for bound in bounds)
        if isinstance(source, list):
            shard = np.empty(sharding.shard_shape(shape), dtype)
            for layer, tensor in enumerate(source):
                shard[layer] = tensor.read(index[1:])
        else:
            shard = source.read(index).astype(dtype)
        shards += [jax.device_put(shard, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def positions(config: Mapping[str, Any], latents: LatentShape, text_tokens: int) -> dict[str, Any]:
    """What tells the tokens where they are: rotary tables, or the sincos embedding of 1.0-2b.

    The 1.5 tables are a slice from 0 of an unbounded grid, so they do not depend on the sample
    size in the config, which differs between published revisions.

    Returns:
        {"rotary": (cos, sin) [S, D] float32, the text's rows rotating by nothing} or
        {"pos_embedding": [1, S, E] float32}.
    """
    if not config["use_rotary_positional_embeddings"]:
        frames = (latents.frames - 1) * config["temporal_compression_ratio"] + 1
        with torch.device("meta"):
            module = diffusers.CogVideoXTransformer3DModel.from_config(dict(config, num_layers=0))
        embedding = module.patch_embed._get_positional_embeddings(
            latents.height, latents.width, frames, device="cpu"
        )
        return {"pos_embedding": embedding.numpy()}
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    grid = (latents.height // patch, latents.width // patch)
    if patch_t is None:
        sample = (config["sample_width"] // patch, config["sample_height"] // patch)
        crops = get_resize_crop_region_for_grid(grid, *sample)
        kind = {"crops_coords": crops, "temporal_size": latents.frames}
    else:
        kind = {
            "crops_coords": None,
            "temporal_size": latents.frames // patch_t,
            "grid_type": "slice",
            "max_size": grid,
        }
    cos, sin = get_3d_rotary_pos_embed(config["attention_head_dim"], grid_size=grid, **kind)
    text = (text_tokens, cos.shape[1])
    cos = np.concatenate([np.ones(text, np.float32), cos.numpy()])
    sin = np.concatenate([np.zeros(text, np.float32), sin.numpy()])
    return {"rotary": (cos, sin)}


def predict(
    module: diffusers.CogVideoXTransformer3DModel,
    parameters: Mapping[str, jax.Array],
    positions: Mapping[str, Any],
    latents: jax.Array,
    prompt_embeds: jax.Array,
    timestep: jax.Array,
) -> jax.Array:
    """One forward of the transformer; traceable by jax.jit.

    Args:
        parameters: the stacked parameters of `load_parameters`.
        positions: of `positions`.
        latents: [B, T, C, H, W] in the run's dtype.
        prompt_embeds: [B, S_text, E_text] in the run's dtype.
        timestep: [] int32, the same for the whole batch.

    Returns:
        The model output [B, T, C, H, W] in the run's dtype.
    """
    state = dict(parameters)
    if "pos_embedding" in positions:
        state["patch_embed.pos_embedding"] = positions["pos_embedding"]

    def forward(state, latents, prompt_embeds, timestep, rotary):
        arguments = {
            "hidden_states": latents,
            "encoder_hidden_states": prompt_embeds,
            "timestep": timestep,
            "image_rotary_emb": rotary,
            "return_dict": False,
        }
        with torch.no_grad():
            return torch.func.functional_call(module, state, kwargs=arguments)[0]

    timesteps = jnp.full(latents.shape[0], timestep)
    rotary = positions.get("rotary")
    return torchax.interop.call_torch(forward, state, latents, prompt_embeds, timesteps, rotary)
