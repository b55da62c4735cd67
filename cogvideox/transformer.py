"""The diffusers transformer through TorchAx: abstract parameters, sharded load, one forward.

The module is diffusers' own CogVideoXTransformer3DModel, built without weights; embeddings, final
norms and patches run as diffusers wrote them. Its blocks are replaced by one JAX block
(cogvideox/block.py) that `lax.scan` runs over stacked weights of the same names, so that the
compiler sees a single block however deep the model is.
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

from cogvideox.attention import AttentionKernel, padded_tokens
from cogvideox.block import ACTIVATIONS, Block
from cogvideox.checkpoint import StoredTensor, check_names_and_shapes
from cogvideox.qk_norm import rotary_halves
from cogvideox.settings import LatentShape
from cogvideox.sharding import parameter_spec, parameter_specs

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
# Rows of these are reordered so that rotary pairs lie half a head apart (see cogvideox/block.py).
_ROTATED = re.compile(r"transformer_blocks\.attn1\.(to_q|to_k|norm_q|norm_k)\.(weight|bias)")
_TOKENS = P("dp", ("sp", "tp"), None)  # [B, S, E]
_ROTARY = P(None, "sp")  # [D / 2, S]


class StackedBlocks(torch.nn.Module):
    """All transformer blocks as one `lax.scan` of a JAX block over stacked parameters.

    It stands in diffusers' module where the blocks were, with the names of their parameters, and is
    called by diffusers' forward as if it were the only block.
    """

    def __init__(
        self, blocks: torch.nn.ModuleList, config: Mapping[str, Any], mesh: jax.sharding.Mesh,
        kernel: AttentionKernel,
    ):  # fmt: skip
        super().__init__()
        for name, child in blocks[0].named_children():
            self.add_module(name, child)
        self._config, self._mesh, self._kernel = config, mesh, kernel

    def __iter__(self) -> Iterator["StackedBlocks"]:
        yield self

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video [B, S_video, E] and text [B, S_text, E] tokens through all blocks."""
        stacked = dict(self.named_parameters())
        arguments = (stacked, encoder_hidden_states, hidden_states, temb, image_rotary_emb)
        return torchax.interop.call_jax(self._run, *arguments)

    def _run(self, stacked, text, video, temb, rotary):
        text_tokens, tokens = text.shape[1], text.shape[1] + video.shape[1]
        shards = self._mesh.shape["sp"] * self._mesh.shape["tp"]
        padding = padded_tokens(tokens, self._kernel, shards) - tokens
        block = Block(
            head_dim=self._config["attention_head_dim"],
            norm_eps=self._config["norm_eps"],
            activation=self._config["activation_fn"],
            text_tokens=text_tokens,
            tokens=tokens,
            kernel=self._kernel,
        )

        def blocks(x, stacked, temb, rotary):
            return jax.lax.scan(lambda x, layer: (block(x, layer, temb, rotary), None), x, stacked)[
                0
            ]

        specs = {n: parameter_spec(f"transformer_blocks.{n}", p.shape) for n, p in stacked.items()}
        sharded = jax.shard_map(
            blocks,
            mesh=self._mesh,
            in_specs=(
                _TOKENS,
                specs,
                P("dp"),
                None if rotary is None else (_ROTARY, _ROTARY),
            ),
            out_specs=_TOKENS,
            check_vma=False,  # pallas_call does not say over which axes its output varies
        )
        x = jnp.concatenate([text, video], axis=1)
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        if rotary is not None:
            rotary = tuple(jnp.pad(table, ((0, 0), (0, padding))) for table in rotary)
        x = sharded(x, stacked, temb, rotary)
        return x[:, text_tokens:tokens], x[:, :text_tokens]


def build_module(
    config: Mapping[str, Any],
    latents: LatentShape,
    kernel: AttentionKernel,
    mesh: jax.sharding.Mesh,
) -> diffusers.CogVideoXTransformer3DModel:
    """diffusers' transformer on the meta device, with `StackedBlocks` for its blocks.

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
    module.transformer_blocks = StackedBlocks(
        module.transformer_blocks, module.config, mesh, kernel
    )
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
        head_dim = config["attention_head_dim"] if _ROTATED.fullmatch(name) else None
        return _load_sharded(_sources(name, stored), shapes[name], sharding, dtype, head_dim)

    # Four readers keep mapped files and host-to-device copies busy at once.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
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
    head_dim: int | None,
) -> jax.Array:
    """Reads a parameter shard by shard; rows are reordered by `rotary_halves` with a `head_dim`."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        index = tuple(slice(*bound) for bound in bounds)
        if isinstance(source, list):
            shard = np.empty(sharding.shard_shape(shape), dtype)
            for layer, tensor in enumerate(source):
                rows = tensor.read(index[1:])
                shard[layer] = rotary_halves(rows, head_dim) if head_dim else rows
        else:
            shard = source.read(index).astype(dtype)
        shards += [jax.device_put(shard, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def positions(config: Mapping[str, Any], latents: LatentShape, text_tokens: int) -> dict[str, Any]:
    """What tells the tokens where they are: rotary tables, or the sincos embedding of 1.0-2b.

    The 1.5 tables are a slice from 0 of an unbounded grid, so they do not depend on the sample
    size in the config, which differs between published revisions.

    Returns:
        {"rotary": (cos, sin) [D / 2, S] float32, the text's columns rotating by nothing} or
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
    tables = get_3d_rotary_pos_embed(config["attention_head_dim"], grid_size=grid, **kind)
    # diffusers repeats every angle for the two of a pair.
    cos, sin = (table.numpy()[:, ::2].T for table in tables)
    text = (cos.shape[0], text_tokens)
    cos = np.concatenate([np.ones(text, np.float32), cos], axis=1)
    sin = np.concatenate([np.zeros(text, np.float32), sin], axis=1)
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
