"""Backend for CPU in plain XLA; it runs on any hardware."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from cogvideox.transformer.backends.base import Bounds, Listed, Queries
from cogvideox.transformer.backends.xla import XlaBackend
from cogvideox.transformer.precision import ATTENTION
from cogvideox.transformer.projections import in_order, own_first
from splash_attention.reference import reference_attention


@dataclasses.dataclass(frozen=True)
class CpuBackend(XlaBackend):
    """Computes attention without a kernel, in blocks of queries (`--attention reference`)."""

    name = "reference"
    takes_lists = True
    attention_precisions = ATTENTION

    def attend(
        self,
        q: Queries,
        k: jax.Array,
        v: jax.Array,
        head_dim: int,
        keys: int | Listed,
        bounds: Bounds,
    ) -> jax.Array:
        quantized = self.precision.attention == "int8_qk"
        attend = functools.partial(
            reference_attention, precision=self.precision.attention, smooth_k=quantized
        )
        assert isinstance(q, jax.Array)
        if isinstance(keys, Listed):
            out = attend(
                *(_heads_first(x, head_dim) for x in (in_order(q), k, v)),
                block_lists=keys.lists,
                rule=jnp.broadcast_to(keys.rule, (q.shape[0], keys.rule.size)),
            )
            return own_first(_tokens_first(out))
        operands = (q, k[:, :keys], v[:, :keys])
        return _tokens_first(attend(*(_heads_first(x, head_dim) for x in operands)))


def _heads_first(x: jax.Array, head_dim: int) -> jax.Array:
    """[b, S, R] to [b, N, S, D]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, head_dim), 1, 2)


def _tokens_first(x: jax.Array) -> jax.Array:
    """[b, N, S, D] to [b, S, R]."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)
