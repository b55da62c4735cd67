"""Table of the transformer's parameters, for checks, loading, sharding and compiling.

It imports neither torch nor diffusers: their imports take longer than reading the weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import TransformerConfig
from cogvideox.model.folder import check_headers
from cogvideox.transformer.activations import ACTIVATIONS, GATED
from runtime.tensor_files import StoredTensor

BLOCKS = "transformer_blocks."  # names in the table have no block number after it
OFS = "ofs_embedding."
LEARNED_POSITIONS = "patch_embed.pos_embedding"

# torch's linear layers compute x @ W.T with W [out, in]. Column parallel splits the outputs (W's
# first axis and the bias), row parallel the inputs (W's second axis). A column parallel layer
# followed by a row parallel one needs a single all-reduce, after the second (Megatron-LM,
# arXiv 1909.08053).
_Split = Literal["column", "row", "none"]
_SPECS: dict[_Split, tuple[P, P]] = {  # of weight and bias
    "column": (P("tp", None), P("tp")),
    "row": (P(None, "tp"), P(None)),
    "none": (P(), P()),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter; parameters of the blocks are stacked along a leading axis [L].

    Attributes:
        shape: including the axis L.
        spec: mesh axes that shard it.
        row_order: order of its rows in memory. "rotary": pairs half a head apart, see
            `norms.rotary_halves`. "gated": both halves of a shard's columns, see
            `activations.GATED`. "stored": as in the file.
        quantizable: whether it may be stored in fewer bits; it is a factor in `linear`.
        lora: whether a LoRA may be added to it.
    """

    shape: tuple[int, ...]
    spec: P
    row_order: Literal["stored", "rotary", "gated"] = "stored"
    quantizable: bool = False
    lora: bool = False


def parameter_table(config: TransformerConfig) -> dict[str, Parameter]:
    """Returns every parameter by diffusers' name without its block number.

    Source: diffusers' CogVideoXTransformer3DModel; a test compares its state_dict.
    """
    width, time, affine = config.width, config.time_embed_dim, config.norm_elementwise_affine
    patch, patch_t = config.patch_size, config.patch_size_t
    table: dict[str, Parameter] = {}

    def linear(
        name: str,
        out: int,
        inputs: int,
        split: _Split = "none",
        *,
        bias: bool = True,
        row_order: Literal["stored", "rotary", "gated"] = "stored",
    ) -> None:
        layers = (config.num_layers,) if name.startswith(BLOCKS) else ()
        stacked = (None,) * len(layers)
        weight_spec, bias_spec = (P(*stacked, *spec) for spec in _SPECS[split])
        table[f"{name}.weight"] = Parameter(
            (*layers, out, inputs), weight_spec, row_order, quantizable=bool(layers), lora=True
        )
        if bias:
            table[f"{name}.bias"] = Parameter((*layers, out), bias_spec, row_order)

    def norm(name: str, size: int, row_order: Literal["stored", "rotary"] = "stored") -> None:
        layers = (config.num_layers,) if name.startswith(BLOCKS) else ()
        for kind in ("weight", "bias"):
            table[f"{name}.{kind}"] = Parameter((*layers, size), P(), row_order)

    # Token-wise layers before and after the blocks; their parameters are replicated.
    if patch_t is None:
        shape = (width, config.in_channels, patch, patch)
        table["patch_embed.proj.weight"] = Parameter(shape, P(), lora=True)
        if config.patch_bias:
            table["patch_embed.proj.bias"] = Parameter((width,), P())
    else:
        linear("patch_embed.proj", width, config.in_channels * patch * patch * patch_t)
    linear("patch_embed.text_proj", width, config.text_embed_dim)
    linear("time_embedding.linear_1", time, width)
    linear("time_embedding.linear_2", time, time)
    # tp splits the heads from the q/k/v projections to the output projection, and the MLP's hidden
    # width between its two layers.
    for number in (1, 2):
        # 14% of the 5B model's weights; their outputs are gathered, [B, 6E] each.
        linear(f"{BLOCKS}norm{number}.linear", 6 * width, time, "column")
        if affine:
            norm(f"{BLOCKS}norm{number}.norm", width)
    for name in ("norm_q", "norm_k"):
        norm(f"{BLOCKS}attn1.{name}", config.attention_head_dim, "rotary")
    for name in ("to_q", "to_k"):
        linear(
            f"{BLOCKS}attn1.{name}", width, width, "column",
            bias=config.attention_bias, row_order="rotary",
        )  # fmt: skip
    linear(f"{BLOCKS}attn1.to_v", width, width, "column", bias=config.attention_bias)
    linear(f"{BLOCKS}attn1.to_out.0", width, width, "row")
    if config.activation_fn in GATED:
        linear(f"{BLOCKS}ff.net.0.proj", 8 * width, width, "column", row_order="gated")
    else:
        linear(f"{BLOCKS}ff.net.0.proj", 4 * width, width, "column")
    linear(f"{BLOCKS}ff.net.2", width, 4 * width, "row")
    if affine:
        norm("norm_final", width)
    linear("norm_out.linear", 2 * width, time)
    if affine:
        norm("norm_out.norm", width)
    linear("proj_out", config.out_channels * patch * patch * (patch_t or 1), width)
    return table


def stored_names(name: str, parameter: Parameter) -> list[str]:
    """Returns the names in the safetensors files: one, or one for each block."""
    if not name.startswith(BLOCKS):
        return [name]
    rest = name.removeprefix(BLOCKS)
    return [f"{BLOCKS}{layer}.{rest}" for layer in range(parameter.shape[0])]


def stored_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor in the safetensors files, by name, from the config."""
    shapes = {}
    for name, parameter in parameter_table(config).items():
        shape = parameter.shape[1:] if name.startswith(BLOCKS) else parameter.shape
        shapes |= dict.fromkeys(stored_names(name, parameter), shape)
    return shapes


def folded_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of stored tensors that are no parameters of the program, by name.

    Those of `ofs` become part of a bias, see `ofs`; the learned positions are an argument beside
    the weights, see `tokens.positions`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if config.ofs_embed_dim:
        size = config.ofs_embed_dim
        for number in (1, 2):
            shapes[f"{OFS}linear_{number}.weight"] = (size, size)
            shapes[f"{OFS}linear_{number}.bias"] = (size,)
    if config.use_learned_positional_embeddings:
        patch = config.patch_size
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        tokens = frames * (config.sample_height // patch) * (config.sample_width // patch)
        rows = config.max_text_seq_length + tokens
        shapes[LEARNED_POSITIONS] = (1, rows, config.width)
    return shapes


def abstract_parameters(
    config: TransformerConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of the parameters that `loading.load_parameters` returns."""
    return {
        name: jax.ShapeDtypeStruct(
            parameter.shape, dtype, sharding=NamedSharding(mesh, parameter.spec)
        )
        for name, parameter in parameter_table(config).items()
    }


def check_weights(config: TransformerConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Checks the headers of the safetensors files against the config.

    Raises:
        ValueError: the activation is unknown, or weights are missing, extra or of the wrong shape;
            the message lists all of them.
    """
    if config.activation_fn not in ACTIVATIONS:
        raise ValueError(
            f"the transformer's activation_fn is {config.activation_fn!r}; "
            f"known: {', '.join(ACTIVATIONS)}"
        )
    if config.ofs_embed_dim not in (None, config.time_embed_dim):
        raise ValueError(
            f"the transformer's ofs_embed_dim is {config.ofs_embed_dim}; its embedding is added to "
            f"one of time_embed_dim={config.time_embed_dim}"
        )
    shapes = stored_shapes(config) | folded_shapes(config)
    check_headers(stored, shapes, what="the transformer")
