"""bfloat16 arithmetic of a TPU on other backends."""

from unittest import mock

import jax
import jax.numpy as jnp

from splash_attention import bodies


def exp2_as_on_a_tpu():
    """Returns a patch under which interpreted kernels round exponentials once, as a TPU does."""

    def exp2(x: jax.Array) -> jax.Array:
        return jnp.exp2(x.astype(jnp.float32)).astype(jnp.bfloat16)

    return mock.patch.object(bodies, "exp2_bfloat16", exp2)
