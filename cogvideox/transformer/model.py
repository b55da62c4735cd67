"""The transformer: diffusers' module through TorchAx, with its blocks in JAX.

The module is diffusers' CogVideoXTransformer3DModel, built without weights; weights are arguments.
`lax.scan` runs one JAX block (cogvideox/transformer/block.py) over stacked parameters of the same
names in place of its blocks, so the compiler compiles a single block at any depth.
"""

import dataclasses
from collections.abc import Mapping
from typing import cast

import diffusers
import jax
import jax.numpy as jnp
import torch
from torchax.interop import call_jax, call_torch

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.backends.base import Backend
from cogvideox.transformer.block import Block
from cogvideox.transformer.collectives import text_rows_first
from cogvideox.transformer.sparse_step import SparseTables
from cogvideox.transformer.tokens import TokenLayout
from splash_attention import BlockLists


class TokenTransformer(diffusers.CogVideoXTransformer3DModel):
    """diffusers' transformer on the tokens of one device, with stacked blocks.

    Parameters and their names are diffusers'. Only the cutting of latents into patches is left out.
    """

    @classmethod
    def abstract(
        cls,
        config: TransformerConfig,
        layout: TokenLayout,
        backend: Backend,
        lists: BlockLists | None = None,
    ) -> "TokenTransformer":
        """Builds the module on the meta device; `lists` makes its attention sparse."""
        with torch.device("meta"):
            # The weights of `ofs` are part of a bias; see `cogvideox.transformer.ofs`.
            module = cls(**{**dataclasses.asdict(config), "ofs_embed_dim": None}).eval()
        block = Block(
            head_dim=config.attention_head_dim,
            norm_eps=config.norm_eps,
            activation=config.activation_fn,
            text_tokens=layout.text,
            tokens=layout.tokens,
            backend=backend,
            lists=lists,
        )
        module.transformer_blocks = StackedBlocks(module.transformer_blocks[0], block)
        return module

    def forward(
        self,
        tokens: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        embedding: torch.Tensor | None = None,
        sparse: SparseTables[torch.Tensor] | None = None,
        *,
        residual: torch.Tensor | None = None,
        return_residual: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Predicts on one device of a mesh, inside shard_map.

        Args:
            tokens: noisy latents as patches [b, s, C], this device's rows; text rows are unused.
            encoder_hidden_states: [b, S_text, text_embed_dim], the full text on every device.
            timestep: [b].
            rotary, embedding: this device's rows of `tokens.positions`.
            sparse: in a sparse step, of all layers.
            residual: [b, s, E], added to the embedded tokens in place of the blocks.
            return_residual: also return what the blocks add to the embedded tokens.

        Returns:
            [b, s, C]; text and padding rows are undefined. With `return_residual` also the
            residual [b, s, E] in the tokens' dtype.
        """
        embedded, temb = self.embed(tokens, encoder_hidden_states, timestep, embedding)
        if residual is None:
            with jax.named_scope("blocks"):
                hidden_states = self.transformer_blocks(embedded, temb, rotary, sparse)
        else:
            hidden_states = (embedded + residual).to(embedded.dtype)
        output = self._project_out(hidden_states, temb)
        return (output, hidden_states - embedded) if return_residual else output

    def embed(
        self,
        tokens: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        embedding: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the embedded tokens [b, s, E] and the timestep's embedding."""
        with jax.named_scope("embed"):
            temb = self.time_embedding(self.time_proj(timestep).to(tokens.dtype))
            patch = self.patch_embed.proj  # a strided convolution in 1.0, a linear layer in 1.5
            video = torch.nn.functional.linear(tokens, patch.weight.flatten(1), patch.bias)
            text = self.patch_embed.text_proj(encoder_hidden_states)
            hidden_states = cast(torch.Tensor, call_jax(text_rows_first, text, video))
            if embedding is not None:
                hidden_states = hidden_states + embedding.to(hidden_states.dtype)
            return hidden_states, temb

    def _project_out(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Projects tokens [b, s, E] to the prediction [b, s, C]."""
        with jax.named_scope("project_out"):
            hidden_states = self.norm_final(hidden_states)
            hidden_states = self.norm_out(hidden_states, temb=temb)
            return self.proj_out(hidden_states)


class StackedBlocks(torch.nn.Module):
    """All transformer blocks as one `lax.scan` of a JAX block over stacked parameters.

    It replaces diffusers' list of blocks; its parameters have the names of one block's.
    """

    def __init__(self, first: torch.nn.Module, block: Block) -> None:
        super().__init__()
        for name, child in first.named_children():
            self.add_module(name, child)
        self.block = block

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        sparse: SparseTables[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Runs tokens [b, s, E] through all blocks; see `Block.__call__`."""

        def scan(stacked, x, temb, rotary, sparse):
            def run(x, layer):
                parameters, heads = layer
                of_layer = None if sparse is None else SparseTables(sparse.lists, *heads)
                return self.block(x, parameters, temb, rotary, of_layer), None

            heads = None if sparse is None else (sparse.rule, sparse.order)
            return jax.lax.scan(run, x, (stacked, heads))[0]

        parameters = dict(self.named_parameters())
        return cast(torch.Tensor, call_jax(scan, parameters, hidden_states, temb, rotary, sparse))


def predict(
    module: TokenTransformer,
    parameters: Mapping[str, jax.Array],
    tokens: jax.Array,
    prompt_embeds: jax.Array,
    timestep: jax.Array,
    positions: Mapping[str, object],
    *,
    residual: jax.Array | None = None,
    return_residual: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs `TokenTransformer.forward` on JAX arrays; the batch shares one `timestep` [].

    Returns:
        The prediction, and the residual with `return_residual`, else None.
    """

    def forward(parameters, *arguments, **keywords):
        with torch.no_grad():
            return torch.func.functional_call(module, parameters, arguments, keywords)

    timesteps = jnp.full(tokens.shape[0], timestep)
    output = call_torch(
        *(forward, dict(parameters), tokens, prompt_embeds, timesteps),
        **positions,
        residual=residual,
        return_residual=return_residual,
    )
    if return_residual:
        return cast(tuple[jax.Array, jax.Array], output)
    return cast(jax.Array, output), None
