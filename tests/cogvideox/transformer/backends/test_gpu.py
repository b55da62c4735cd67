"""The part of the GPU's attention that runs anywhere."""

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.transformer.backends.gpu import add_keys


def test_keys_added_outside_the_kernel():
    """Attention over all keys equals that over some, extended; values reach 10, in float32."""
    shapes = {"q": 37, "k": 301, "v": 301}
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        3 * jax.random.normal(key, (2, n, 4, 64))
        for key, n in zip(keys, shapes.values(), strict=True)
    )
    attend = jax.nn.dot_product_attention
    out, log_total = attend(q, k[:, :256], v[:, :256], return_residual=True)
    np.testing.assert_allclose(
        add_keys(out, log_total, q, k[:, 256:], v[:, 256:]), attend(q, k, v), rtol=0, atol=2e-5
    )
    assert jnp.abs(out - attend(q, k, v)).max() > 0.1  # the further keys matter
