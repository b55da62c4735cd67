"""Backend for CPU in plain XLA; it runs on any hardware."""

import dataclasses

import jax
import jax.numpy as jnp

from cogvideox.transformer.backends.base import Bounds
from cogvideox.transformer.backends.xla import XlaBackend
from splash_attention.reference import reference_attention


@dataclasses.dataclass(frozen=True)
class CpuBackend(XlaBackend):
    """Computes attention without a kernel, in blocks of queries (`--attention reference`)."""

    name = "reference"

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int, keys: int, bounds: Bounds
    ) -> jax.Array:
        q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k[:, :keys], v[:, :keys]))
        out = reference_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
        return jnp.swapaxes(out, 1, 2).reshape(*q.shape[:2], -1)
