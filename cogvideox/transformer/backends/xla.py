"""Base of the backends that use XLA for everything except attention."""

import jax
import jax.numpy as jnp

from cogvideox.transformer import norms, projections
from cogvideox.transformer.backends.base import Backend
from cogvideox.transformer.norms import Rotary


class XlaBackend(Backend):
    """Exchanges heads and tokens in parts, overlapped with the products.

    Its layout is [b, S, R]. k and v have the tokens in sequence order. q and the output have this
    device's tokens first, then those of the next shards, cyclically (`projections`). Attention is
    independent for each query, so these need no reordering.
    """

    def norm_and_modulate(
        self, x: jax.Array, scale: jax.Array, shift: jax.Array, text_rows: jax.Array, eps: float
    ) -> jax.Array:
        return norms.norm_and_modulate(x, scale, shift, text_rows, eps)

    def project(self, modulated: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        return projections.project(modulated, weight, bias)

    def queries(
        self, q: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        tables = rotary and (projections.own_first(rotary[0]), projections.own_first(rotary[1]))
        return norms.norm_and_rotate(q, weight, bias, tables)

    def keys(
        self, k: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        return projections.in_order(self.queries(k, weight, bias, rotary))

    def values(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return projections.in_order(v), jnp.abs(v).max(1)

    def project_out(self, out: jax.Array, weight: jax.Array) -> jax.Array:
        return projections.project_out(out, weight)
