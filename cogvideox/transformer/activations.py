"""Activations of the MLP, by diffusers' names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def _gated(activation: Activation) -> Activation:
    """Multiplies one half of the columns with the activation of the other half."""

    def apply(x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(x, 2, axis=-1)
        return hidden * activation(gate)

    return apply


# Every shard of a gated layer needs both halves of its columns.
GATED: dict[str, Activation] = {
    "geglu": _gated(lambda x: jax.nn.gelu(x, approximate=False)),
    "swiglu": _gated(jax.nn.silu),
}
ACTIVATIONS: dict[str, Activation] = GATED | {
    "gelu-approximate": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "linear-silu": jax.nn.silu,
}
