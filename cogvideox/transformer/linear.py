"""The matrix products of a block: the only place that knows their precision.

Weights are torch's, [O, I]. Products take operands in the run's dtype (bfloat16 or float32) and
return it; the backend accumulates in float32. The functions differ in where the tokens lie: a TPU
multiplies without a copy only if they lie where the next operation wants them.
"""

import jax
import jax.numpy as jnp


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] times weight [O, I], plus bias [O]: [..., O]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def linear_to_tokens_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [b, I, s] times weight [O, I]: [b, s, O]."""
    return jnp.einsum("bis,oi->bso", x, weight)


def linear_tokens_last(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [b, I, s] times weight [O, I]: [b, O, s]."""
    return jnp.einsum("oi,bis->bos", weight, x)
