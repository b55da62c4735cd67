"""What each rule of sparse attention changes in the output of each head, in a dense step.

Axis letters: L layers, N heads, R rules.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import PartitionSpec as P
from torchax.interop import call_torch

from cogvideox.denoising.program import TOKENS, Denoiser
from cogvideox.transformer.backends.base import Bounds, Listed
from cogvideox.transformer.block import Block
from cogvideox.transformer.block_rules import DENSE, Rule, SparseAttention
from cogvideox.transformer.model import TokenTransformer
from cogvideox.transformer.parameters import BLOCKS, abstract_parameters
from cogvideox.transformer.projections import own_first
from cogvideox.transformer.sparse_step import SparseTables


def measuring(exact: Denoiser, rules: Sequence[Rule]) -> Denoiser:
    """Returns a denoiser whose layout fits sparse attention, for `compile_errors`."""
    return dataclasses.replace(exact, sparse=SparseAttention((DENSE, *rules)))


def compile_errors(denoiser: Denoiser) -> Callable[..., np.ndarray]:
    """Compiles the measurement; it needs the memory of a step, whatever the number of rules.

    Args:
        denoiser: result of `measuring`.

    Returns:
        A function of tokens [B, S, C] in the denoiser's layout, parameters, positions,
        prompt_embeds and timestep [] int32. It returns for each head and rule the L2 norm of the
        difference that the rule makes in attention's output, relative to that of the dense output:
        [L, N, R].
    """
    specs = jax.tree.map(
        lambda leaf: leaf.sharding.spec,
        abstract_parameters(denoiser.config, denoiser.mesh, jnp.dtype(denoiser.dtype)),
    )
    squares = jax.jit(
        jax.shard_map(
            lambda *arguments: _squares_of_step(denoiser, *arguments),
            mesh=denoiser.mesh,
            in_specs=(TOKENS, specs, denoiser.position_specs, P("dp"), P()),
            out_specs=P(None, ("tp", "sp"), None),
            check_vma=False,  # as the step's
        )
    )

    def measure(*arguments: object) -> np.ndarray:
        with jax.sharding.use_abstract_mesh(denoiser.mesh.abstract_mesh):
            dense, *others = np.moveaxis(np.asarray(squares(*arguments)), -1, 0)
        return np.sqrt(np.stack(others, -1) / dense[..., None])

    return measure


def _squares_of_step(
    denoiser: Denoiser,
    tokens: jax.Array,
    parameters: Mapping[str, jax.Array],
    positions: Mapping[str, Any],
    prompt_embeds: jax.Array,
    timestep: jax.Array,
) -> jax.Array:
    """Runs a dense step on one device; returns sums of squares of its heads, [L, n, 1 + R].

    The first is that of the dense output, the others those of the rules' differences from it.
    """
    step = denoiser.sparse_step
    assert step is not None
    module = TokenTransformer.abstract(
        denoiser.config, denoiser.layout, denoiser.backend, step.lists
    )
    ready = module.transformer_blocks.block
    block = _MeasuringBlock(
        **{field.name: getattr(ready, field.name) for field in dataclasses.fields(Block)},
        is_token=_is_token(denoiser),
        found=[],
    )
    samples = denoiser.own_samples(tokens, prompt_embeds)
    timesteps = jnp.full(samples.shape[0], timestep)
    inputs = (samples, prompt_embeds, timesteps, positions.get("embedding"))
    output = call_torch(_embed(module), dict(parameters), *inputs)
    embedded, temb = cast(tuple[jax.Array, jax.Array], output)
    sparse = positions["sparse"]
    assert isinstance(sparse, SparseTables)
    stacked = {
        name.removeprefix(BLOCKS): array
        for name, array in parameters.items()
        if name.startswith(BLOCKS)
    }

    def run(x, layer):
        layer_parameters, rule = layer
        tables = SparseTables(sparse.lists, rule, None)
        x = block(x, layer_parameters, temb, positions.get("rotary"), tables)
        return x, block.found.pop()

    return jax.lax.psum(jax.lax.scan(run, embedded, (stacked, sparse.rule))[1], "dp")


def _embed(module: TokenTransformer) -> Callable:
    """Returns the part of the transformer before its blocks, as a function of its parameters."""

    class Embed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = module

        def forward(self, *arguments):
            return self.transformer.embed(*arguments)

    def embed(parameters, *arguments):
        named = {f"transformer.{name}": array for name, array in parameters.items()}
        with torch.no_grad():
            return torch.func.functional_call(Embed(), named, arguments)

    return embed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MeasuringBlock(Block):
    """A block that also tries every rule on all of its heads.

    Attributes:
        is_token: by row; padding is not counted.
        found: the sums of squares of the call that was traced last, [n, 1 + R].
    """

    is_token: np.ndarray
    found: list[jax.Array]

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, keys: int | Listed, bounds: Bounds
    ) -> jax.Array:
        assert isinstance(keys, Listed)
        dense = super()._attend(q, k, v, keys, bounds)
        squares = [self._squares(dense)]
        for rule in range(1, keys.lists.chunks.shape[0]):
            # One after the other, so that only one output more is held.
            dense, q = jax.lax.optimization_barrier((dense, q))
            listed = Listed(keys.lists, jnp.full_like(keys.rule, rule))
            other = super()._attend(q, k, v, listed, bounds)
            squares.append(self._squares(other.astype(jnp.float32) - dense.astype(jnp.float32)))
        self.found.append(jnp.stack(squares, -1))
        return dense

    def _squares(self, out: jax.Array) -> jax.Array:
        """Sums the squares of each head over samples, tokens and channels: [n]."""
        squares = jnp.square(out.astype(jnp.float32))
        is_token = jnp.asarray(self.is_token)
        if self.backend.tokens_last:
            of_rows = jnp.where(is_token, squares, 0).sum((0, 2))
        else:
            is_token = own_first(is_token[None])[0]
            of_rows = jnp.where(is_token[:, None], squares, 0).sum((0, 1))
        return of_rows.reshape(-1, self.head_dim).sum(-1)


def _is_token(denoiser: Denoiser) -> np.ndarray:
    """Returns which rows hold a token of text or video: bool [S]."""
    layout = denoiser.layout
    is_token = np.zeros(layout.padded, np.bool_)
    is_token[: layout.text] = True
    is_token[layout.video] = True
    return is_token
