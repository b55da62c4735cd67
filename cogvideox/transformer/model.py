"""The diffusers transformer through TorchAx: one forward, of parameters that are arguments.

The module is diffusers' own CogVideoXTransformer3DModel, built without weights. Its blocks are
replaced by one JAX block (cogvideox/transformer/block.py) that `lax.scan` runs over stacked weights
of the same names, so that the compiler sees a single block however deep the model is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import torch
import torchax.interop

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.attention import AttentionKernel
from cogvideox.transformer.block import Block, text_rows_first
from cogvideox.transformer.tokens import TokenLayout


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
        cls, config: TransformerConfig, layout: TokenLayout, kernel: AttentionKernel
    ) -> "TokenTransformer":
        """The module on the meta device."""
        with torch.device("meta"):
            module = cls(**dataclasses.asdict(config)).eval()
        block = Block(
            head_dim=config.attention_head_dim,
            norm_eps=config.norm_eps,
            activation=config.activation_fn,
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
